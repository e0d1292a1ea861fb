"""Saves and loads backbones: `model.safetensors`, and `model.json` beside it, its metadata."""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.vision_transformer import interpolate_embeddings

import tract_transfer.models.weights_match as matching
from tract_transfer.files import atomic_path, sha256_of, sync, write_json
from tract_transfer.models.backbone import Backbone
from tract_transfer.models.backbones import BACKBONES, build_backbone
from tract_transfer.models.weights_detectron2 import load_detectron2
from tract_transfer.models.weights_file import (
    METADATA_NAME,
    WEIGHTS_NAME,
    check_hash,
    read_tensors,
    recorded_hash,
)
from tract_transfer.models.weights_match import MatchReport, few, looks_like
from tract_transfer.registry import load_plugins, trusted_plugins


def save_backbone(folder: Path, backbone: Backbone, metadata: Mapping[str, Any]) -> None:
    """Write the weights, and model.json with `metadata` (method, seed, data, ...) beside them.

    Both files are written atomically. A model.json of other weights is removed in between: a kill
    leaves weights without metadata, and never with wrong ones.
    """
    tensors = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_path(folder / WEIGHTS_NAME, needed_bytes) as temporary:
        save_file(tensors, temporary)
        digest = sha256_of(temporary)
        if recorded_hash(folder) != digest:
            (folder / METADATA_NAME).unlink(missing_ok=True)
            sync(folder)
    complete = {
        **metadata,
        **backbone.origin,
        "first_layers": backbone.first_layers,
        "feature_dim": backbone.feature_dim,
        "maps": {name: info._asdict() for name, info in backbone.map_info.items()},
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "sha256": digest,
    }
    write_json(folder / METADATA_NAME, complete)


def has_metadata(path: Path) -> bool:
    """Whether there is a model.json in the run folder, or beside the weights file, `path`."""
    return _metadata_path(path).is_file()


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the content of model.json in the run folder, or beside the weights file, `path`.

    Raises:
        FileNotFoundError, ValueError: there is no model.json, or it describes no backbone.
    """
    file = _metadata_path(path)
    if not file.is_file():
        if path.is_file():
            read_tensors(path)  # its errors come first: a web page needs another fix
        raise FileNotFoundError(
            f"No {METADATA_NAME} at {file.parent}, so the backbone of {path} is unknown. Set "
            "model.backbone.name, or model.weights to a finished run folder."
        )
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Copy it from the run again.") from error
    if not isinstance(metadata, dict) or not {"name", "stem", "args"} <= metadata.keys():
        raise ValueError(f"{file} lacks the name, stem and args of a backbone. Copy it again.")
    return metadata


def _metadata_path(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / METADATA_NAME


def recorded_plugins(path: Path) -> list[str]:
    """Return the plug-ins that model.json at `path` names; [] without any."""
    plugins = read_metadata(path).get("plugins") if has_metadata(path) else []
    return [plugin for plugin in plugins if isinstance(plugin, str)] if plugins else []


def import_plugins_of(metadata: Mapping[str, Any], plugins: Sequence[str] = ()) -> None:
    """Import what registers the backbone that `metadata` describes, unless something did.

    Args:
        plugins: those that the user names; files that only the metadata name are not imported.

    Raises:
        PluginError: a plug-in is missing, or cannot be used.
    """
    name = str(metadata["name"])
    if name.startswith(("timm/", "torchvision/")) or name in BACKBONES:
        return
    load_plugins(trusted_plugins(metadata.get("plugins"), plugins, f"The backbone {name}"))


def build_from_metadata(metadata: Mapping[str, Any], plugins: Sequence[str] = ()) -> Backbone:
    """Build the backbone that `read_metadata` describes, without its weights.

    Args:
        plugins: as in `import_plugins_of`.
    """
    import_plugins_of(metadata, plugins)
    return build_backbone(metadata["name"], stem=metadata["stem"], args=metadata["args"])


class WeightsError(ValueError):
    """Weights that do not fit a backbone; `report` lists what fits and what does not."""

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
    """Load a weights file into a backbone: all of its weights or none.

    Prefixes of wrappers are stripped, the file's head is dropped, position embeddings are resized
    (by timm), and mean and std are loaded if the file has them.

    Args:
        path: a `.safetensors`, `.pth`, `.pt`, `.bin` or `.pkl` file, or a folder with
            model.safetensors or pytorch_model.bin. Nothing in it is executed.
        ignore_missing: patterns (conv1.*) of weights that may be missing or have another shape;
            they keep their initialization.
        adapt_stem: resample a patch embedding to the backbone's patch size, as timm does.

    Raises:
        FileNotFoundError, ValueError: no such file; it cannot be read, is not the one that its
            model.json describes, or a pattern matches no name.
        WeightsError: names, shapes or values do not fit; nothing was loaded.
    """
    file = weights_file(path)
    model_state = backbone.model.state_dict()
    matching.check_patterns(ignore_missing, model_state)
    check_hash(file)
    tensors, report, normalization = _read(file, backbone, model_state)
    weights = matching.drop_others(report, tensors, model_state)
    weights = _adapt(backbone, weights, model_state, report, adapt_stem)
    fitting = matching.fill(report, backbone.model, weights, ignore_missing)
    if not report.fits:
        raise WeightsError(_refusal(report, backbone, weights), report)
    backbone.model.load_state_dict(fitting, strict=False)
    backbone.set_normalization(*(values.flatten().tolist() for values in normalization))
    backbone.loaded = report
    return report


def weights_file(path: Path) -> Path:
    """Return the weights file at `path` or in the folder `path`; else raise FileNotFoundError."""
    names = (WEIGHTS_NAME, "pytorch_model.bin")
    files = [path / name for name in names] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f"No weights at {files[0]}. Set model.weights to a file or run folder.")


def _read(
    file: Path, backbone: Backbone, model_names: Iterable[str]
) -> tuple[dict[str, Tensor], MatchReport, tuple[Tensor, ...]]:
    """Return tensors in timm's and torchvision's names, a new report, and mean and std, if any."""
    tensors = read_tensors(file)
    if any(name.endswith("stem.conv1.norm.weight") for name in tensors):
        source, _, skipped = load_detectron2(file)
        report = MatchReport(str(file), "", dropped={matching.OTHER: skipped} if skipped else {})
        report.notes.append(f"detectron2's names; normalization from {file.with_suffix('.yaml')}")
        return source.model.state_dict(), report, (source.mean, source.std)
    tensors = matching.from_transformers(tensors)
    report = MatchReport(str(file), matching.find_prefix(model_names, tensors))
    normalization: tuple[Tensor, ...] = ()
    if report.prefix == "model." or report.prefix.endswith("backbone.model."):  # saved by us
        names = [f"{report.prefix.removesuffix('model.')}{name}" for name in ("mean", "std")]
        normalization = tuple(tensors.pop(name) for name in names if name in tensors)
    if [values.shape for values in normalization] != [backbone.mean.shape] * 2:
        report.notes.append("the file has no normalization: the backbone keeps its mean and std")
        normalization = ()
    return tensors, report, normalization


def _adapt(
    backbone: Backbone,
    weights: dict[str, Tensor],
    model_state: Mapping[str, Tensor],
    report: MatchReport,
    adapt_stem: bool,
) -> dict[str, Tensor]:
    """Convert `weights` by the function of the model's library, if they then fit better."""
    convert = _conversion(backbone.model)
    if convert is None:
        return weights
    try:
        adapted = convert(dict(weights))
    except (KeyError, IndexError, RuntimeError, ValueError, AssertionError, AttributeError):
        return weights  # the file has another architecture
    if matching.num_misfits(adapted, model_state) >= matching.num_misfits(weights, model_state):
        return weights
    if not adapt_stem:
        kept = {tensor.data_ptr() for tensor in weights.values()}
        stems = [name for name in _stem_weights(backbone) if name in weights and name in adapted]
        adapted |= {name: weights[name] for name in stems if adapted[name].data_ptr() not in kept}
    for name, old in weights.items():
        if name in adapted and old.shape != adapted[name].shape:
            report.resized[name] = f"{tuple(old.shape)} -> {tuple(adapted[name].shape)}"
    used = {tensor.data_ptr() for tensor in adapted.values()}
    unused = [n for n, t in weights.items() if n not in adapted and t.data_ptr() not in used]
    if unused:
        report.dropped["by the conversion of the backbone's library"] = unused
    return adapted


def _conversion(model: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Return the library's function that converts older or differently sized weights, if any."""
    if isinstance(model, torchvision.models.VisionTransformer):
        return partial(interpolate_embeddings, model.image_size, model.patch_size)  # type: ignore[no-any-return]
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return None
    renames_scale = "adapt_layer_scale" in inspect.signature(convert).parameters  # DeiT-III's files
    return partial(convert, model=model, **({"adapt_layer_scale": True} if renames_scale else {}))


def _stem_weights(backbone: Backbone) -> list[str]:
    return [f"{name.removeprefix('model.')}.weight" for name in backbone.first_layers]


def _refusal(report: MatchReport, backbone: Backbone, weights: Mapping[str, Tensor]) -> str:
    """Return why a file is refused, and what to do."""
    start = f"{report.file} does not fit {type(backbone).__name__}"
    misshapen = [name.partition(" ")[0] for name in report.misshapen]
    other_names = report.missing or report.unexpected
    if report.not_finite and not (other_names or misshapen):
        return (
            f"{start}: NaN or infinite values in {few(report.not_finite)}. It is damaged, or the "
            "training diverged: take an earlier checkpoint or another copy."
        )
    if misshapen and not other_names and set(misshapen) <= set(_stem_weights(backbone)):
        return (
            f"{start} but for its first layer: of another shape {few(report.misshapen)}. Set "
            "model.backbone.stem (or patch_size in its args) to that of the weights; "
            "model.adapt_stem: true resamples a patch embedding, and model.ignore_missing: "
            f"{misshapen} trains the layer from scratch."
        )
    return (
        f"{start}: its weights are another architecture's. Missing {few(report.missing)}; "
        f"unexpected {few(report.unexpected)}; of another shape {few(report.misshapen)}. "
        f"{looks_like(weights)}Set model.backbone to the one they were trained with, or list in "
        "model.ignore_missing what may be trained from scratch."
    )
