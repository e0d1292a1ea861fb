"""A run's trained model, and its predictions for images from anywhere."""

# B images of a batch, H height and W width in pixels, K classes

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tract_transfer import names_missing_extra
from tract_transfer.build.batches import build_transforms
from tract_transfer.build.data import build_data
from tract_transfer.build.model import build_evaluated, build_model
from tract_transfer.build.trainer import PRECISIONS
from tract_transfer.config.file import Overrides, read_overrides
from tract_transfer.config.schema import (
    ClassificationConfig,
    Config,
    DetectionConfig,
    ProbeConfig,
    TrainedTask,
    load_config,
)
from tract_transfer.config.sections import BackboneConfig
from tract_transfer.data.images import UndecodableImage, convert_image, decode_image
from tract_transfer.engine.checkpoint import Checkpointer
from tract_transfer.engine.determinism import deterministic, keeps_random_state
from tract_transfer.engine.hooks import evaluating
from tract_transfer.files import CONFIG_NAME
from tract_transfer.models import Backbone
from tract_transfer.models.weights import has_metadata, read_metadata, recorded_plugins
from tract_transfer.registry import trusted_plugins

ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
Images: TypeAlias = ImageLike | Iterable[ImageLike]
Task = TypeVar("Task", bound=TrainedTask)


@dataclass(frozen=True, eq=False)
class Classification:
    """The k most probable classes of an image, on the CPU.

    Attributes:
        labels: k class names, the most probable first.
        scores: (k,) float32 probabilities, descending; those of all K classes sum to 1.
        class_ids: (k,) int64 positions in `class_names`.
    """

    labels: list[str]
    scores: Tensor
    class_ids: Tensor


@dataclass(frozen=True, eq=False)
class Detections:
    """The n objects found in an image, on the CPU.

    Attributes:
        labels: n class names.
        scores: (n,) float32 in [0, 1], descending.
        boxes_xyxy: (n, 4) float32 in pixels of the image as given, after its EXIF orientation;
            0-based, x2 and y2 exclusive.
        class_ids: (n,) int64 positions in `class_names`.
    """

    labels: list[str]
    scores: Tensor
    boxes_xyxy: Tensor
    class_ids: Tensor


@dataclass(eq=False)
class Trained(Generic[Task]):
    """A run's reported model, as its evaluation measured it.

    Images of `predict` and `stream` are one or several, in any mixture, of:

    - a path to an image file. EXIF orientation, gray, palette, CMYK, 16-bit and transparent images
      are read as in training; `data.max_pixels` holds.
    - a PIL image, converted in the same way.
    - a NumPy array (H, W, 3), uint8 RGB.
    - a torch tensor (3, H, W), RGB, uint8 or floating in [0, 1], on any device.

    Anything else is a TypeError (a wrong type) or a ValueError (a wrong shape, dtype or range, a
    file that cannot be decoded, no image at all), and a missing file a FileNotFoundError; the
    message names the image as `inputs[17]`.

    Attributes:
        config: the run's config.
        model: in eval mode; maps a batch to logits or detections (docs/architecture.md).
        backbone: the model's Backbone.
        class_names: K names, by class id.
        checkpoint: the folder of the checkpoint that was loaded.
        device: where the model is.
    """

    config: Task
    model: nn.Module
    backbone: Backbone
    class_names: list[str]
    checkpoint: Path
    device: torch.device

    def _outputs(
        self,
        inputs: Images,
        batch_size: int | None,
        prepare: Callable[[Tensor], Tensor],
        join: Callable[[list[Tensor]], Any],
    ) -> Iterator[Any]:
        """Yield the model's output for each image; one batch is in memory at a time."""
        batch_size = batch_size or self.config.data.batch_size
        images = map(prepare, read_images(inputs, self.config.data.max_pixels))
        engine = self.config.engine
        precision = PRECISIONS[engine.precision]
        while batch := list(islice(images, batch_size)):
            autocast = torch.autocast(self.device.type, precision, enabled=precision is not None)
            with deterministic(engine.deterministic), evaluating(self.model), autocast:
                outputs = self.model(join(batch))
            yield from outputs.float().cpu() if isinstance(outputs, Tensor) else outputs


class TrainedClassifier(Trained[ClassificationConfig]):
    """A run's classifier; see Trained."""

    def predict(
        self, inputs: Images, *, top_k: int = 5, batch_size: int | None = None
    ) -> list[Classification]:
        """Return the most probable classes of each image, in order.

        Args:
            inputs: one image or several, also from a generator; see Trained.
            top_k: number of classes, or all K if there are fewer.
            batch_size: images at a time. None is the run's own: then predictions for the images
                of its evaluation are the evaluation's to the bit.

        Raises:
            TypeError, ValueError, FileNotFoundError: see Trained.
        """
        return list(self.stream(inputs, top_k=top_k, batch_size=batch_size))

    def stream(
        self, inputs: Images, *, top_k: int = 5, batch_size: int | None = None
    ) -> Iterator[Classification]:
        """Yield what `predict` returns, reading the images of one batch at a time."""
        _check_count("top_k", top_k)
        _check_count("batch_size", batch_size, or_none=True)
        _, transform = build_transforms(self.config)
        outputs = self._outputs(inputs, batch_size, transform, self._join)
        return map(partial(self._classification, top_k), outputs)

    def _join(self, images: list[Tensor]) -> Tensor:
        if len({image.dtype for image in images}) > 1:  # stack would keep 0..255 beside [0, 1]
            images = [i.float().div_(255) if i.dtype == torch.uint8 else i for i in images]
        return torch.stack(images).to(self.device)

    def _classification(self, top_k: int, logits: Tensor) -> Classification:
        # By logits, as in the evaluation: probabilities may round to ties.
        class_ids = logits.argsort(descending=True, stable=True)[:top_k]
        scores = logits.softmax(0)[class_ids]
        labels = [self.class_names[k] for k in class_ids.tolist()]
        return Classification(labels, scores, class_ids)


class TrainedDetector(Trained[DetectionConfig]):
    """A run's detector; see Trained."""

    def predict(
        self, inputs: Images, *, min_score: float = 0.0, batch_size: int | None = None
    ) -> list[Detections]:
        """Return the objects in each image, in order.

        Args:
            inputs: one image or several, also from a generator; see Trained.
            min_score: drop detections with a lower score. The detector itself drops those below
                `model.detector.args.box.score_threshold`.
            batch_size: images at a time. None is the run's own: then predictions for the images
                of its evaluation are the evaluation's to the bit.

        Raises:
            TypeError, ValueError, FileNotFoundError: see Trained.
        """
        return list(self.stream(inputs, min_score=min_score, batch_size=batch_size))

    def stream(
        self, inputs: Images, *, min_score: float = 0.0, batch_size: int | None = None
    ) -> Iterator[Detections]:
        """Yield what `predict` returns, reading the images of one batch at a time."""
        if isinstance(min_score, bool) or not isinstance(min_score, int | float):
            raise TypeError(f"min_score: must be a number in [0, 1], got {min_score!r}.")
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: must be in [0, 1], got {min_score}.")
        _check_count("batch_size", batch_size, or_none=True)
        outputs = self._outputs(inputs, batch_size, lambda image: image, self._join)
        return map(partial(self._detections, min_score), outputs)

    def _join(self, images: list[Tensor]) -> list[Tensor]:
        return [image.to(self.device) for image in images]

    def _detections(self, min_score: float, detected: dict[str, Tensor]) -> Detections:
        kept = detected["scores"] >= min_score
        boxes, scores, class_ids = (
            detected[key][kept].cpu() for key in ("boxes", "scores", "labels")
        )
        labels = [self.class_names[k] for k in class_ids.tolist()]
        return Detections(labels, scores, boxes, class_ids)


# Images from anywhere.

_ONE_IMAGE = (str, os.PathLike, Image.Image, np.ndarray, Tensor)
_KINDS = "must be a path, a PIL image, a NumPy array (H, W, 3) of uint8 or a torch tensor (3, H, W)"


def read_images(inputs: Images, max_pixels: int) -> Iterator[Tensor]:
    """Yield RGB images (3, H, W), uint8 or float32 in [0, 1], on the CPU; see Trained."""
    count = -1
    if isinstance(inputs, _ONE_IMAGE):
        yield _read_image(inputs, "inputs", max_pixels)
        return
    if not isinstance(inputs, Iterable) or isinstance(inputs, bytes | dict):
        raise TypeError(f"inputs: {_KINDS}, or several of them, got {type(inputs).__name__}.")
    for count, image in enumerate(inputs):
        yield _read_image(image, f"inputs[{count}]", max_pixels)
    if count < 0:
        raise ValueError("inputs: contains no image. Give at least one.")


def _read_image(image: ImageLike, name: str, max_pixels: int) -> Tensor:
    try:
        if isinstance(image, Image.Image):
            return convert_image(image, "the PIL image")
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            if path.is_dir():
                raise IsADirectoryError(f"{name}: {path} is a folder. List the images in it.")
            if not path.is_file():
                raise FileNotFoundError(f"{name}: there is no file {path}.")
            return decode_image(path, str(path), max_pixels=max_pixels)
    except UndecodableImage as error:
        raise ValueError(f"{name}: {error.item} cannot be decoded: {error.reason}.") from error
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, Tensor):
        return _from_tensor(image, name)
    raise TypeError(f"{name}: {_KINDS}, got {type(image).__name__}.")


def _from_array(array: np.ndarray, name: str) -> Tensor:
    shape = array.shape
    if array.ndim != 3 or shape[2] != 3 or 0 in shape:
        fix = "Give one array an image"
        if array.ndim == 4:
            fix = "A batch is given as a list: list(images)"
        elif array.ndim == 2 or (array.ndim == 3 and shape[2] in (1, 4)):
            fix = "PIL converts others: Image.fromarray(array)"
        elif array.ndim == 3 and shape[0] == 3:
            fix = "Channels come last in arrays: array.transpose(1, 2, 0)"
        raise ValueError(f"{name}: an array must be (H, W, 3), got {shape}. {fix}.")
    if array.dtype != np.uint8:
        fix = "Give a float image in [0, 1] as a torch tensor (3, H, W)"
        raise ValueError(f"{name}: an array must be uint8 in 0..255, got {array.dtype}. {fix}.")
    return torch.tensor(np.ascontiguousarray(array)).permute(2, 0, 1).contiguous()


def _from_tensor(tensor: Tensor, name: str) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim != 3 or shape[0] != 3 or 0 in shape:
        fix = "Give one tensor an image"
        if tensor.ndim == 4:
            fix = "A batch is given as a list: list(images)"
        elif tensor.ndim == 2 or (tensor.ndim == 3 and shape[0] == 1):
            fix = "Repeat a gray image: tensor.expand(3, -1, -1)"
        elif tensor.ndim == 3 and shape[2] == 3:
            fix = "Channels come first in tensors: tensor.permute(2, 0, 1)"
        raise ValueError(f"{name}: a tensor must be (3, H, W), got {shape}. {fix}.")
    tensor = tensor.detach().cpu()  # transformed where the evaluation transforms
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        fix = "Convert it: tensor.to(torch.uint8)"
        raise ValueError(f"{name}: a tensor must be uint8 or floating, got {tensor.dtype}. {fix}.")
    low, high = tensor.min().item(), tensor.max().item()
    if not (low >= 0 and high <= 1):
        fix = "Undo a normalization: the model normalizes"
        if low != low or high != high:
            fix = "It holds NaN"
        elif low >= 0 and high <= 255:
            fix = "Divide it by 255"
        values = f"{low:g} to {high:g}"
        raise ValueError(f"{name}: floating images must be in [0, 1], got {values}. {fix}.")
    return tensor.float()


def _check_count(name: str, value: int | None, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name}: must be 1 or more, got {value}.")


# From a run folder to its model.


@names_missing_extra
def load(
    run: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    plugins: Sequence[str] = (),
) -> TrainedClassifier | TrainedDetector:
    """Load the model that a run reports, or would report at its newest checkpoint.

    A finished run needs neither its data nor the weights it started from, and may have been moved.

    Args:
        run: a run folder, or what `tract_transfer.train` returned.
        device: `auto` (a GPU if torch finds one), `cpu`, `cuda`, `cuda:1` or a torch.device.
        plugins: modules and .py files that the run needs: files that only the run names are not
            imported.

    Returns:
        A TrainedClassifier or a TrainedDetector, by the run's task.

    Raises:
        FileNotFoundError: no run folder, or no complete checkpoint in it.
        ValueError: a probe's folder, a checkpoint of another model than the config's, or no such
            device.
        TypeError: an argument of another type.
    """
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run: must be the path of a run folder, got {type(run).__name__}.")
    folder, target = Path(run), _device(device)
    config = run_config(folder, plugins=plugins)
    if isinstance(config, ProbeConfig):
        weights = config.model.weights
        fix = f" Load what it probed: create_backbone(weights={weights!r})." if weights else ""
        raise config.error("task", f"a probe trains no model. Give another run.{fix}")
    checkpoint, parts = reported_checkpoint(config)
    if has_metadata(folder):
        class_names = [str(name) for name in read_metadata(folder)["data"]["classes"]]
    else:  # not finished
        class_names = build_data(config).class_names
    with keeps_random_state():  # the seed's weights are replaced
        model = build_model(_without_weights(config, folder), len(class_names))
    with fits(checkpoint, f"Put back the {CONFIG_NAME} that the run wrote."):
        model.load_state_dict(parts.get("ema", parts["model"]))
    if config.engine.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone = model.get_submodule("backbone")
    assert isinstance(backbone, Backbone)
    model = build_evaluated(config, model.to(target)).eval()
    if isinstance(config, DetectionConfig):
        return TrainedDetector(config, model, backbone, class_names, checkpoint, target)
    return TrainedClassifier(config, model, backbone, class_names, checkpoint, target)


def _device(device: str | torch.device) -> torch.device:
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: must be a string or a torch.device, got {device!r}.")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: torch has no {device!r}. Set auto, cpu or cuda.") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device: {device}, but torch finds {count} GPUs. Set auto or cpu.")
    return target


def run_config(folder: Path, overrides: Overrides = (), plugins: Sequence[str] = ()) -> Config:
    """Return the config of the run in `folder`, which may have been moved.

    Args:
        plugins: those that the user names: files that only the run names are not imported.

    Raises:
        FileNotFoundError: no run folder.
        PluginError: a plug-in of the run is missing.
    """
    if not (folder / CONFIG_NAME).is_file():
        fix = ""
        if has_metadata(folder):
            fix = f" Its backbone alone: tract_transfer.create_backbone(weights={str(folder)!r})."
        raise FileNotFoundError(f"{folder} is not a run folder: it contains no {CONFIG_NAME}.{fix}")
    config = load_config(folder / CONFIG_NAME, {"output_dir": str(folder)})
    recorded = [*config.plugins, *recorded_plugins(folder)]
    config = load_config(config, overrides) if overrides else config
    names_plugins = any(change.key == "plugins" for change in read_overrides(overrides))
    named = [*plugins, *(config.plugins if names_plugins else [])]
    trusted = trusted_plugins(recorded, named, str(folder))
    return config.model_copy(update={"plugins": trusted})


def reported_checkpoint(config: TrainedTask) -> tuple[Path, dict[str, Any]]:
    """Return path and tensors of the checkpoint that a run in `output_dir` reports."""
    checkpointer = Checkpointer(Path(config.output_dir) / "checkpoints")
    path = checkpointer.best() if config.evaluation.report == "best" else checkpointer.newest()
    if path is None:
        raise FileNotFoundError(
            f"No complete checkpoint in {checkpointer.folder}. Train first, or set output_dir."
        )
    return path, checkpointer.load(path)[0]


@contextlib.contextmanager
def fits(file: Path, fix: str) -> Iterator[None]:
    """Explain an error of load_state_dict, or that there is no average to load."""
    try:
        yield
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{file} holds another model than this config. {fix} ({error})") from error


def _without_weights(config: TrainedTask, folder: Path) -> TrainedTask:
    """Return the config of the same model without its initial weights."""
    backbone = config.model.backbone
    if backbone.name is None and has_metadata(folder):
        metadata = read_metadata(folder)
        origin = {key: metadata[key] for key in ("name", "stem", "args")}
        backbone = BackboneConfig(**origin, mean=backbone.mean, std=backbone.std)
    if backbone.name is None:
        return config
    model = config.model.model_copy(update={"backbone": backbone, "weights": None})
    return config.model_copy(update={"model": model})
