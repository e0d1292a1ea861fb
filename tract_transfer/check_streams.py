"""What a config asks of data that are read in order, and cannot have."""

from collections.abc import Mapping
from typing import Any

from tract_transfer.config import Config, ProbeConfig
from tract_transfer.data.streaming import Stream


def check_streams(config: Config, splits: Mapping[str, Any]) -> None:
    """Refuse what needs any image of a stream at any time, and options of streams elsewhere.

    Raises:
        ConfigError: which key, and what to set.
    """
    sections: Any = config.data
    train_streams = isinstance(splits["train"], Stream)
    for key in ("shuffle_rows", "readers"):
        if not train_streams and getattr(sections, key, None) is not None:
            message = "has no use here: an image folder is shuffled whole. Leave it out."
            raise config.error(f"data.{key}", message)
    for name in (name for name, dataset in splits.items() if isinstance(dataset, Stream)):
        key = f"data.{name}.streaming"
        if isinstance(config, ProbeConfig):
            message = (
                "a probe asks for images by number. Set it to false; data.cache: none keeps none."
            )
            raise config.error(key, message)
        if sections.cache != "none":
            message = f"{sections.cache} keeps all images, and {key} none. Set data.cache: none."
            raise config.error("data.cache", message)
    if not train_streams:
        return
    if getattr(sections, "repeats", 1) > 1:
        message = "asks for images by number, and data.train is streamed. Set it to 1."
        raise config.error("data.repeats", message)
    if config.model.backbone.stem == "whitened":
        message = "whitened asks for 5000 images of all, and data.train is streamed. Set another."
        raise config.error("model.backbone.stem", message)
