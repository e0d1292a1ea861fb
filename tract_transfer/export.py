"""The bridge out: a finished classification run as a folder that other tools load."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tract_transfer.config import ClassificationConfig
from tract_transfer.engine.environment import ENVIRONMENT_NAME
from tract_transfer.engine.run_folder import RESULTS_NAME
from tract_transfer.model_card import model_card
from tract_transfer.models import Classifier
from tract_transfer.models.export import (
    ONNX_NAME,
    Portable,
    export_onnx,
    require_onnx,
    save_portable,
    to_library,
)
from tract_transfer.models.flip import FlipClassifier
from tract_transfer.models.weights import has_card, read_card
from tract_transfer.trained import load_trained


def export_run(
    run: Path,
    output: Path,
    *,
    onnx: bool = False,
    hub_id: str | None = None,
    license_id: str | None = None,
) -> Portable:
    """Write what the run in `run` reports into the new folder `output`; return its model.

    The folder holds model.safetensors, config.json or model.json, README.md and, with `onnx`,
    model.onnx. It appears when all of it is written and checked.

    Args:
        hub_id: what README.md loads from; without, it loads from its own folder.
        license_id: what README.md states, as the hub calls it; None states none.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `run` is no run folder, or not finished.
        ImportError: `onnx` needs a package more.
        ValueError: a run that holds no classifier, or ONNX gives other logits.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another --output.")
    if onnx:
        require_onnx()
    results = _read(run / RESULTS_NAME)
    config, classifier, label_names = _load_classifier(run)
    size_px = config.data.transforms.size_px
    portable = to_library(classifier, size_px)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as parent:
        folder = Path(parent) / "whole"
        folder.mkdir()
        save_portable(folder, portable, _card(config, classifier, label_names, portable))
        if onnx:
            export_onnx(classifier, size_px, folder / ONNX_NAME)
        text = model_card(
            config, results, _read(run / ENVIRONMENT_NAME),
            read_card(run) if has_card(run) else {}, portable, classifier.backbone,
            hub_id=hub_id, onnx=onnx, license_id=license_id,
        )  # fmt: skip
        (folder / "README.md").write_text(text, encoding="utf-8")
        folder.rename(output)
    return portable


def _load_classifier(run: Path) -> tuple[ClassificationConfig, Classifier, list[str]]:
    """Return a run's config, the classifier that answers for one view, and its label names."""
    trained = load_trained(run, ["engine.device=cpu"])
    if not isinstance(trained.config, ClassificationConfig):
        raise ValueError(
            f"{run} holds a detector, which is made of parts that no other library has. Use it "
            "with tools/predict.py --run; its backbone goes on with model.weights: <run folder>."
        )
    model = trained.model
    classifier = model.classifier if isinstance(model, FlipClassifier) else model
    assert isinstance(classifier, Classifier)
    return trained.config, classifier, trained.class_names


def check_hub(hub_id: str) -> None:
    """Refuse, before any work, an id or an account that nothing can be uploaded with.

    Raises:
        ValueError: the id is not `owner/name`, or there is no token.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"--push-to-hub must be owner/name, not {hub_id!r}.")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "--push-to-hub needs a token with write access: run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, hub_id: str, *, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; return its address.

    Raises:
        ValueError: `private`, and the repository is there and public: nothing is uploaded.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    address = api.create_repo(hub_id, private=private, exist_ok=True)
    if private and not api.repo_info(hub_id).private:
        raise ValueError(
            f"{hub_id} exists and is public, and nothing was uploaded. Make it private in its "
            "settings, or leave --private out."
        )
    api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload the model")
    return str(address)


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No {file}: it is no finished run. Give another folder, or resume it."
        ) from error
    return found


def _card(
    config: ClassificationConfig, classifier: Classifier, label_names: list[str], portable: Portable
) -> dict[str, Any]:
    """Return timm's config.json, or what our own model.json says."""
    backbone, section = classifier.backbone, config.data.transforms
    colours = {
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "interpolation": section.interpolation,
    }
    if portable.library != "timm" or portable.edits:
        sizes = {"size_px": section.size_px, "crop_ratio": section.crop_ratio}
        names = {"head": config.model.head.model_dump(), "label_names": label_names}
        return {**backbone.origin, **names, **colours, **sizes}
    timm_config: dict[str, Any] = portable.model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": portable.name,
        "num_classes": len(label_names),
        "num_features": backbone.feature_dim,
        "label_names": label_names,
        "model_args": portable.args,
        "pretrained_cfg": {
            **colours,
            "num_classes": len(label_names),
            "input_size": [3, section.size_px, section.size_px],
            "fixed_input_size": backbone.image_size_px is not None,
            "crop_pct": section.crop_ratio,
            "crop_mode": "center",
            "custom_load": False,
            "first_conv": timm_config["first_conv"],
            "classifier": timm_config["classifier"],
        },
    }
