"""Exports a trained classifier as timm's or torchvision's own model.

If neither library has such a model, it stays as it is, beside metadata to rebuild it.
"""

# B images, K classes

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from tract_transfer.files import sha256_of
from tract_transfer.models.backbone import Backbone
from tract_transfer.models.classifier import HEADS, Classifier
from tract_transfer.models.stem import POOL_NAMES
from tract_transfer.models.weights import build_from_metadata, read_metadata
from tract_transfer.models.weights_file import METADATA_NAME, WEIGHTS_NAME, check_hash, read_tensors
from tract_transfer.registry import load_plugins, trusted_plugins

CONFIG_NAME, ONNX_NAME = "config.json", "model.onnx"
OPSET, ONNX_PACKAGES = 18, ("onnx", "onnxruntime", "onnxscript")
MAX_DIFFERENCE, MAX_ONNX_DIFFERENCE = 1e-5, 1e-4


@dataclass
class Portable:
    """A classifier as the model `name` of a library (timm, torchvision or tract_transfer).

    Attributes:
        args: arguments of the library's constructor.
        model: in eval mode, with its weights. A library's takes normalized images.
        edits: Python lines that give the library's model the stem of ours.
        reason: why it is not a library's model.
    """

    library: str
    name: str
    args: dict[str, Any]
    model: nn.Module
    edits: list[str] = field(default_factory=list)
    reason: str | None = None


def to_library(classifier: Classifier, size_px: int) -> Portable:
    """Return a library's model with the classifier's logits at `size_px`, or the classifier."""
    classifier.eval()
    try:
        portable = _library_model(classifier)
        images = _random_images(size_px)
        with torch.no_grad():
            expected = classifier(images)
            logits = portable.model(classifier.backbone.normalize(images))
        difference = (logits - expected).abs().max().item()
        if not difference <= MAX_DIFFERENCE * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the library's model gives logits that differ by {difference:.1e}")
    except ValueError as error:
        name = classifier.backbone.origin["name"]
        return Portable("tract_transfer", name, {}, classifier, reason=str(error))
    return portable


def save_portable(folder: Path, portable: Portable, metadata: Mapping[str, Any]) -> None:
    """Write the weights, and `metadata` as config.json (timm's) or model.json (with their hash)."""
    tensors = {name: t.contiguous().clone() for name, t in portable.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    is_timm = portable.library == "timm" and not portable.edits
    if not is_timm:
        metadata = {**metadata, "sha256": sha256_of(folder / WEIGHTS_NAME)}
    text = json.dumps(metadata, indent=2) + "\n"
    (folder / (CONFIG_NAME if is_timm else METADATA_NAME)).write_text(text, encoding="utf-8")


def load_exported(folder: str | Path, plugins: Sequence[str] = ()) -> Classifier:
    """Load an exported classifier that is no library's model; it normalizes images itself.

    Args:
        plugins: what registers its backbone and head, if no installed module does.

    Raises:
        FileNotFoundError, ValueError: the folder holds none, or its weights were changed.
    """
    metadata = read_metadata(Path(folder))
    if "head" not in metadata:
        raise ValueError(
            f"{folder} holds no classifier of ours. Its README.md shows how to load it."
        )
    load_plugins(trusted_plugins(metadata.get("plugins"), plugins, str(folder)))
    backbone = build_from_metadata(metadata)
    head = metadata["head"]
    make_head, num_classes = HEADS.get(head["name"]), len(metadata["label_names"])
    classifier = Classifier(backbone, make_head(backbone.feature_dim, num_classes, **head["args"]))
    file = Path(folder) / WEIGHTS_NAME
    check_hash(file)
    try:
        classifier.load_state_dict(read_tensors(file))
    except RuntimeError as error:  # what load_state_dict raises
        raise ValueError(f"{file} does not match {METADATA_NAME} beside it: {error}") from error
    return classifier.eval()


def export_onnx(classifier: Classifier, size_px: int, file: Path) -> None:
    """Write the classifier with its normalization, for (B, 3, size_px, size_px) of any B.

    The file is compared with torch on two batch sizes, and removed if it differs.

    Raises:
        ImportError: a package is missing; the message has the pip command.
        ValueError: ONNX gives other logits than torch.
    """
    require_onnx()
    import onnxruntime

    images = _random_images(size_px)
    torch.onnx.export(
        classifier.eval(),
        (images,),
        file,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (images, torch.cat([images, 1 - images[:1]])):
        (logits,) = session.run(None, {"images": batch.numpy()})
        with torch.no_grad():
            difference = (torch.from_numpy(logits) - classifier(batch)).abs().max().item()
        if not difference <= MAX_ONNX_DIFFERENCE:
            file.unlink()
            raise ValueError(
                f"ONNX gives logits that differ by {difference:.1e} from torch's, more than "
                f"{MAX_ONNX_DIFFERENCE:g}. Leave --onnx out."
            )


def require_onnx() -> None:
    """Raise an ImportError with the pip command if a package for --onnx is missing."""
    if not all(map(find_spec, ONNX_PACKAGES)):
        raise ImportError(f"--onnx needs more packages: pip install {' '.join(ONNX_PACKAGES)}")


def _library_model(classifier: Classifier) -> Portable:
    """Build the library's model with the classifier's weights; a ValueError says why it cannot."""
    backbone, head = classifier.backbone, classifier.head
    if backbone.library is None:
        raise ValueError(f"the backbone {backbone.origin['name']} wraps no library's model")
    if not isinstance(head, nn.Linear):
        raise ValueError("the head has more than the one matrix of a library's model")
    library, name, args = backbone.library
    if library == "timm":
        model = timm.create_model(name, num_classes=head.out_features, **args)
        last = model.pretrained_cfg["classifier"]
    else:
        model = torchvision.models.get_model(name, num_classes=head.out_features, **args)
        linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
        last = linears[-1] if linears else None
    if not isinstance(last, str):
        raise ValueError(f"{library}'s {name} does not classify by one matrix")
    edits = _edit_stem(model, backbone)
    shape = model.get_submodule(last).weight.shape  # some classify with a 1x1 convolution
    try:
        weight = head.weight.detach().reshape(shape)
        state = {f"{last}.weight": weight, f"{last}.bias": head.bias}
        model.load_state_dict({**backbone.model.state_dict(), **state})
    except RuntimeError as error:
        raise ValueError(f"{library}'s {name} has other weights ({error})") from error
    return Portable(library, name, args, model.eval(), edits)


def _edit_stem(model: nn.Module, backbone: Backbone) -> list[str]:
    """Give a library's model the stem of the backbone; return the Python lines that do so."""
    ours = dict(backbone.model.named_modules())
    theirs = dict(model.named_modules())
    edits = []
    for name in [layer.removeprefix("model.") for layer in backbone.first_layers]:
        conv = ours[name]
        if repr(conv) == repr(theirs[name]) or not isinstance(conv, nn.Conv2d):
            continue
        sizes: Any = {key: getattr(conv, key) for key in ("kernel_size", "stride", "padding")}
        sizes["bias"] = conv.bias is not None
        new: Any = nn.Conv2d(conv.in_channels, conv.out_channels, **sizes)
        model.set_submodule(name, new)
        edits.append(f"model.set_submodule({name!r}, torch.nn.{new})")
    for name in POOL_NAMES:
        if isinstance(ours.get(name), nn.Identity) and not isinstance(theirs[name], nn.Identity):
            model.set_submodule(name, nn.Identity())
            edits.append(f"model.set_submodule({name!r}, torch.nn.Identity())")
    return edits


def _random_images(size_px: int) -> Tensor:
    return torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
