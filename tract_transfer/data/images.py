"""Images: decoding to uint8 RGB (3, H, W), where they are stored, and frames of videos."""

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from fractions import Fraction
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tract_transfer.data.findings import Origin, Size

# PIL can read more, some of it through other programs (EPS: Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# Larger images are refused from the header, before decoding. PIL itself refuses twice as many.
MAX_PIXELS = 89_478_485
# What PIL's readers raise for bytes that are truncated, corrupt or no image.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, AttributeError, LookupError,
    ArithmeticError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
_NUM_FINGERPRINT_IMAGES = 64


class UndecodableImage(ValueError):  # noqa: N818 - reads as what it is
    """An image that cannot be decoded: its name (`item`) and the reason.

    A DataLoader re-raises a worker's exception from its text alone: then that is the `item`.
    """

    def __init__(self, item: str, reason: str = "") -> None:
        super().__init__(item, reason)
        self.item, self.reason = item, reason

    def __str__(self) -> str:
        if not self.reason:
            return self.item
        return (
            f"{self.item} cannot be decoded: {self.reason}. "
            "Repair or remove it, or set data.undecodable: skip."
        )


def decode_image(
    stored: bytes | Path, item: str, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode an image (its first frame) to uint8 RGB (3, H, W).

    Transparent pixels are composited over white and 16-bit gray is scaled to 8 bits; PIL converts
    the other modes. `item` is the image's name in errors.

    Raises:
        UndecodableImage: the image is truncated, too large, in none of FORMATS, or has 32-bit
            floats, whose range is undefined.
        OSError: the file cannot be read.
    """
    data = read_stored(stored)
    if not data:
        raise UndecodableImage(item, "it is empty (0 bytes)")
    formats = _formats()
    with _undecodable(item, len(data)), Image.open(BytesIO(data), formats=formats) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"its header says {image.width}x{image.height} pixels, more than "
                f"data.max_pixels {max_pixels}"
            )
        return _pixels(image, exif)


def convert_image(image: Image.Image, item: str) -> Tensor:
    """Return an image that PIL opened or made as `decode_image` returns its file."""
    with _undecodable(item):
        return _pixels(image)


@contextmanager
def _undecodable(item: str, num_bytes: int = 0) -> Iterator[None]:
    """Turn what PIL's readers raise into an UndecodableImage."""
    try:
        yield
    except _DECODER_ERRORS as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"its {num_bytes} bytes are no image of {', '.join(_formats())}"
        raise UndecodableImage(item, reason.rstrip(".")) from error


def _pixels(image: Image.Image, exif: bool = True) -> Tensor:
    pixels = np.array(_to_rgb(ImageOps.exif_transpose(image) if exif else image))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_header(stored: bytes | Path) -> tuple[Size, int]:
    """Return (height, width) as stored and the EXIF orientation, 1..8. Raises UndecodableImage."""
    try:
        stream = stored if isinstance(stored, Path) else BytesIO(stored)
        with Image.open(stream, formats=_formats()) as header:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
            return (header.height, header.width), orientation if orientation in range(1, 9) else 1
    except _DECODER_ERRORS as error:
        raise UndecodableImage(str(stored)[:200], f"its header has no size ({error})") from error


def upright_size(size: Size, orientation: int) -> Size:
    """Return the (height, width) of an image after its EXIF orientation is applied."""
    return size[::-1] if orientation in (5, 6, 7, 8) else size


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this PIL reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # PIL itself would clip at 255 and return a white image.
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def read_stored(stored: bytes | Path) -> bytes:
    """Return the encoded bytes of an image, from memory or from its file."""
    return stored.read_bytes() if isinstance(stored, Path) else stored


class ImageSource:
    """Where the images of a data set are stored: a subclass defines `stored` and `item`."""

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        self._max_pixels = max_pixels

    def stored(self, row: int) -> bytes | Path:
        """Return a row's encoded image, or its file."""
        raise NotImplementedError

    def item(self, row: int) -> str:
        """Return the row's name in error messages."""
        raise NotImplementedError

    def encoded(self, row: int) -> bytes:
        """Return a row's encoded image."""
        return read_stored(self.stored(row))

    def image(self, row: int, exif: bool = True) -> Tensor:
        """Return a row's image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        return decode_image(self.stored(row), self.item(row), exif, self._max_pixels)


Self = TypeVar("Self", bound="IndexedImages")


class IndexedImages:
    """The images of a data set by index, decoded at each access unless `cache_images` is called."""

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        source: ImageSource,
        length: int,
        rows: Sequence[int] | np.ndarray | None,
        origin: Origin | None,
    ) -> None:
        self.name = name
        self.class_names = list(class_names)
        self.origin = origin or Origin()
        self._source = source
        self._rows = np.arange(length) if rows is None else np.asarray(rows, dtype=np.int64)
        self._cached: dict[int, Tensor] = {}  # by row, so selections share it

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        """Return an image, uint8 RGB (3, H, W). Raises UndecodableImage."""
        cached = self._cached.get(int(self._rows[index]))
        return self._decode(index) if cached is None else cached

    def _decode(self, index: int) -> Tensor:
        return self._source.image(int(self._rows[index]))

    def item(self, index: int) -> str:
        """Return the image's name in messages: its file, or `cifar10 split train row 17`."""
        return self._source.item(int(self._rows[index]))

    def encoded(self, index: int) -> bytes:
        """Return an image's stored bytes."""
        return self._source.encoded(int(self._rows[index]))

    def select(self: Self, indices: Sequence[int] | np.ndarray, name: str) -> Self:
        """Return the data set of these images, in this order; it keeps all classes."""
        selected = copy(self)
        selected.name = name
        selected._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        return selected

    def cache_images(self) -> None:
        """Decode every image once into RAM; an undecodable image raises when it is accessed."""
        for index, row in enumerate(self._rows.tolist()):
            with suppress(UndecodableImage):
                self._cached[row] = self.image(index)


def content_hashes(encoded: Callable[[int], bytes], length: int) -> list[str]:
    """Return the sha256 (hex) of each of `length` images' stored bytes."""
    return [hashlib.sha256(encoded(index)).hexdigest() for index in range(length)]


def fingerprint(dataset: Any, *annotations: np.ndarray) -> str:
    """Return the sha256 (hex) of length, class names, annotations and 64 images' stored bytes."""
    digest = hashlib.sha256(json.dumps([len(dataset), list(dataset.class_names)]).encode())
    for array in annotations:
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for index in _spread(len(dataset)):
        digest.update(hashlib.sha256(dataset.encoded(index)).digest())
    return digest.hexdigest()


def estimated_bytes(encoded: Callable[[int], bytes], length: int) -> int:
    """Estimate the size of `length` encoded images from the mean of up to 64 of them."""
    sizes = [len(encoded(index)) for index in _spread(length)]
    return round(length * sum(sizes) / max(len(sizes), 1))


def _spread(length: int) -> list[int]:
    """Return up to 64 evenly spaced indices."""
    indices = np.linspace(0, length - 1, min(length, _NUM_FINGERPRINT_IMAGES)).round()
    return [int(index) for index in indices]


# Frames of a video file, read and written by PyAV if it is installed.

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_VIDEO_FORMATS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts"  # FFmpeg's names
_BITS_PER_SECOND = 8_000_000


def read_video(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Tensor]:
    """Yield the frames of a video, uint8 RGB (3, H, W), one at a time.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file is no video, is truncated, or has frames of more than `max_pixels`.
    """
    with _open_video(path) as (container, stream):
        if stream.width * stream.height > max_pixels:
            raise ValueError(
                f"{path} has frames of {stream.width}x{stream.height} pixels, more than "
                f"data.max_pixels {max_pixels}."
            )
        for frame in container.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            yield pixels.permute(2, 0, 1).contiguous()


def frame_rate(path: Path) -> float:
    """Return a video's frames per second. Raises as `read_video`."""
    with _open_video(path) as (_, stream):
        return float(stream.average_rate)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video and its first stream, but no format that names other files, as playlists do."""
    av = _pyav()
    options = {"protocol_whitelist": "file", "format_whitelist": _VIDEO_FORMATS}
    try:
        with av.open(str(path.absolute()), options=options) as container:
            yield container, container.streams.video[0]
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}.") from error


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], frames_per_second: float) -> None:
    """Write RGB frames (H, W, 3) of one size as MPEG-4.

    The format needs even sides: an odd side loses its last row or column. Raises ImportError if
    PyAV is not installed, and ValueError if there is no frame.
    """
    av, frames = _pyav(), iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path} would be a video without a frame.")
    height, width = (side // 2 * 2 for side in first.shape[:2])
    with av.open(str(path), "w") as container:
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = height, width
        stream.pix_fmt, stream.bit_rate = "yuv420p", _BITS_PER_SECOND
        for frame in itertools.chain([first], frames):
            pixels = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos need PyAV. Install it: pip install av.") from error
    return av
