"""Backbones on disk: `model.safetensors`, and beside it `model.json`, which says what they are."""

import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

from tract_transfer.files import atomic_path, sha256_of, sync, write_json
from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import build_backbone
from tract_transfer.models.weights_file import (
    CARD_NAME,
    WEIGHTS_NAME,
    check_hash,
    hash_in_card,
    read_tensors,
)
from tract_transfer.models.weights_match import (
    HEADS,
    OTHER,
    TRAINING_ONLY,
    MatchReport,
    check_patterns,
    few,
    fill,
    find_prefix,
    from_transformers,
    looks_like,
    resize_by,
    split_tree,
)

logger = logging.getLogger(__name__)


def save_backbone(folder: Path, backbone: Backbone, card: Mapping[str, Any]) -> None:
    """Write the weights and their card; `card` tells method, seed, data and the like.

    Both files are written aside, synced and renamed. The card's `sha256` is the weights' own; a
    card of other weights is removed before these take their place, so that a kill in between leaves
    weights without a card, and never with another's.
    """
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_path(folder / WEIGHTS_NAME, needed) as aside:
        save_file(tensors, aside)
        digest = sha256_of(aside)
        if has_metadata(folder) and hash_in_card(folder) != digest:
            (folder / CARD_NAME).unlink()
            sync(folder)
    complete = {
        **card,
        **backbone.origin,
        "first_layers": backbone.first_layers,
        "feature_dim": backbone.feature_dim,
        "maps": {name: info._asdict() for name, info in backbone.map_info.items()},
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "sha256": digest,
    }
    write_json(folder / CARD_NAME, complete)


def has_metadata(path: Path) -> bool:
    """Whether a card lies in the run folder, or beside the weights file, `path`."""
    return ((path if path.is_dir() else path.parent) / CARD_NAME).is_file()


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the card of the backbone in the run folder, or beside the weights file, `path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the card is not JSON, or describes no backbone; or there is none, and the file
            `path` is none of weights.
    """
    file = (path if path.is_dir() else path.parent) / CARD_NAME
    if not file.is_file():
        if path.is_file():
            read_tensors(path)  # what is no weights file at all says so first
        raise FileNotFoundError(
            f"No {CARD_NAME} at {file.parent}, so nothing says what backbone {path} is. Set "
            f"model.backbone.name{_hub_name(file.parent)}, or model.weights to a finished run "
            "folder."
        )
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Copy it from the run again.") from error
    if not isinstance(card, dict) or not {"name", "stem", "args"} <= card.keys():
        raise ValueError(f"{file} lacks the name, stem and args of a backbone. Copy it again.")
    return card


def _hub_name(folder: Path) -> str:
    """The name that timm's own config.json gives, where one lies in the folder."""
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return f"=timm/{told['architecture']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def build_from_metadata(card: Mapping[str, Any]) -> Backbone:
    """Build the backbone a card describes, without its weights."""
    return build_backbone(card["name"], stem=card["stem"], args=card["args"])


class WeightsError(ValueError):
    """Weights that do not fit a backbone; `report` says what does and what does not."""

    def __init__(self, message: str, report: MatchReport) -> None:
        super().__init__(message)
        self.report = report


def load_weights(
    backbone: Backbone,
    path: Path,
    *,
    ignore_missing: Sequence[str] = (),
    adapt_stem: bool = False,
) -> MatchReport:
    """Load a weights file, or a folder's, into a backbone: all of its weights or none.

    Prefixes of any wrapper are found and stripped, a file's own head is dropped, position
    embeddings are resized (by timm). Mean and std are taken where the file has them.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.bin` or `.pkl` file (nothing in it is executed),
            or a folder that holds model.safetensors or pytorch_model.bin.
        ignore_missing: patterns, as of file names, of weights that the file may lack or have in
            another shape; they start anew.
        adapt_stem: resample a patch embedding to the backbone's patch size, as timm does.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read or is not what the card beside it tells, or a pattern is
            of no name.
        WeightsError: its names, shapes or values are not fit; nothing was loaded.
    """
    file = weights_file(path)
    wanted = backbone.model.state_dict()
    check_patterns(ignore_missing, wanted)
    doubt = check_hash(file)
    tensors, report, colours = _tensors_of(file, backbone, wanted)
    if doubt is not None:
        logger.warning("%s.", doubt)
        report.notes.append(doubt)
    tree, dropped = split_tree(tensors, report.prefix, wanted, HEADS)
    report.dropped |= dropped
    tree = _adapted(backbone, tree, wanted, report, adapt_stem=adapt_stem)
    parameters = {name for name, _ in backbone.model.named_parameters()}
    fitting = fill(report, wanted, parameters, tree, ignore_missing)
    if not report.fits:
        raise WeightsError(_refusal(report, backbone, tree), report)
    backbone.model.load_state_dict(fitting, strict=False)
    backbone.set_normalization(*(None if c is None else c.flatten().tolist() for c in colours))
    backbone.loaded = report
    return report


def weights_file(path: Path) -> Path:
    """Return the weights file at `path`, or in the folder `path`.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_dir():
        if path.is_file():
            return path
        raise FileNotFoundError(f"No weights at {path}. Set model.weights to a file or run folder.")
    for name in (WEIGHTS_NAME, "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"No weights at {path / WEIGHTS_NAME}. Set model.weights to a file or run folder."
    )


def _tensors_of(
    file: Path, backbone: Backbone, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], MatchReport, Sequence[Tensor | None]]:
    """Return a file's tensors in timm's and torchvision's names, a new report, mean and std."""
    tensors = read_tensors(file)
    if any(name.endswith("stem.conv1.norm.weight") for name in tensors):
        from tract_transfer.models.weights_detectron2 import load_detectron2

        theirs = load_detectron2(file)
        report = MatchReport(str(file), "")
        report.notes.append(f"detectron2's names; its colours as {file.with_suffix('.yaml')} says")
        if theirs.aside:
            report.dropped[OTHER] = theirs.aside
        colours = [theirs.backbone.mean, theirs.backbone.std]
        return theirs.backbone.model.state_dict(), report, colours
    tensors = from_transformers(tensors)
    report = MatchReport(str(file), find_prefix(wanted, tensors))
    found: list[Tensor | None] = [None, None]
    if report.prefix == "model." or report.prefix.endswith("backbone.model."):  # as we save them
        outer = report.prefix.removesuffix("model.")
        found = [tensors.pop(f"{outer}{name}", None) for name in ("mean", "std")]
    if not all(c is not None and c.shape == backbone.mean.shape for c in found):
        report.notes.append("the file does not say its colours: mean and std stay the backbone's")
        found = [None, None]
    return tensors, report, found


def _adapted(
    backbone: Backbone,
    tree: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    report: MatchReport,
    *,
    adapt_stem: bool,
) -> dict[str, Tensor]:
    """Return `tree` by the library's own conversion for the model's family, where it fits better.

    A patch embedding that it resampled without leave is put back as it was.
    """
    adapt = _conversion(backbone.model)
    done = resize_by(adapt, tree, wanted) if adapt else None
    if done is not None:
        kept = {tensor.data_ptr() for tensor in tree.values()}
        adapted, report.resized = done
        for stem in _stems(backbone):
            resampled = stem in adapted and adapted[stem].data_ptr() not in kept
            if resampled and not adapt_stem and stem in tree:
                report.resized.pop(stem, None)
                adapted[stem] = tree[stem]
        used = {tensor.data_ptr() for tensor in adapted.values()}
        left = [n for n, t in tree.items() if n not in adapted and t.data_ptr() not in used]
        if left:
            report.dropped["by the conversion of the backbone's library"] = left
        tree = adapted
    tree, dropped = split_tree(tree, "", wanted, TRAINING_ONLY)
    report.dropped |= dropped
    return tree


def _conversion(model: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Timm's or torchvision's own way to make older or differently sized weights fit `model`."""
    if isinstance(model, torchvision.models.VisionTransformer):
        return partial(interpolate_embeddings, model.image_size, model.patch_size)  # type: ignore[no-any-return]
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    renames_scale = "adapt_layer_scale" in inspect.signature(convert).parameters  # DeiT-III's files
    return partial(convert, model=model, **({"adapt_layer_scale": True} if renames_scale else {}))


def _stems(backbone: Backbone) -> list[str]:
    return [f"{name.removeprefix('model.')}.weight" for name in backbone.first_layers]


def _refusal(report: MatchReport, backbone: Backbone, tree: Mapping[str, Tensor]) -> str:
    """Say why a file is refused, and what to do."""
    begin = f"{report.file} does not fit {type(backbone).__name__}"
    wrong = [name.partition(" ")[0] for name in report.misshapen]
    if report.not_finite and not (report.missing or wrong or report.unexpected):
        return (
            f"{begin}: NaN or infinite values in {few(report.not_finite)}. It was saved by a "
            "training that diverged, or damaged: take an earlier checkpoint or another copy."
        )
    if wrong and not (report.missing or report.unexpected) and set(wrong) <= set(_stems(backbone)):
        return (
            f"{begin} but for its first layer: of another shape {few(report.misshapen)}. Set "
            "model.backbone.stem (or patch_size in its args) to that of the weights; "
            "model.adapt_stem: true resamples a patch embedding, and model.ignore_missing: "
            f"{wrong} starts the layer anew."
        )
    return (
        f"{begin}: its weights are another architecture's. Missing {few(report.missing)}; "
        f"unexpected {few(report.unexpected)}; of another shape {few(report.misshapen)}. "
        f"{looks_like(tree)}Set model.backbone to the one the weights were trained with, or name "
        "in model.ignore_missing what may start anew."
    )
