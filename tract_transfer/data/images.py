"""Decoding images: any mode to uint8 RGB (3, H, W), and one error that names the culprit."""

import hashlib
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

# What PIL's readers raise for bytes that are no image, cut short or corrupt.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# Formats of pictures. PIL knows more, and has other programs read some of them (EPS: Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# More is refused from the header, before anything is decoded; PIL itself refuses twice as many.
MAX_PIXELS = 89_478_485
_NUM_FINGERPRINT_IMAGES = 64


class UndecodableImage(ValueError):  # noqa: N818 - reads as what it is
    """An image that cannot be decoded.

    `item` says which (a file, or `split train row 17`), `reason` why. A DataLoader re-raises a
    worker's exception from its text alone: then `item` is that text and `reason` is empty.
    """

    def __init__(self, item: str, reason: str = "") -> None:
        super().__init__(item, reason)
        self.item = item
        self.reason = reason

    def __str__(self) -> str:
        if not self.reason:
            return self.item
        return (
            f"{self.item} cannot be decoded: {self.reason}. "
            "Repair or remove it, or set data.undecodable: skip."
        )


def decode_image(
    source: bytes | Path, item: str, exif: bool = True, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode an image (its first frame) to uint8 RGB (3, H, W).

    Transparency is composited over white, 16-bit grey is scaled to 8 bits (not clipped), CMYK and
    the rest are converted by PIL.

    Args:
        source: the encoded bytes, or the file that holds them.
        item: what an error calls the image.
        exif: turn the image as its EXIF orientation says.
        max_pixels: the largest width x height, by the image's header.

    Raises:
        UndecodableImage: none of FORMATS, cut short, too large, or of 32-bit floats, which have no
            defined range.
        OSError: the file `source` cannot be read.
    """
    data = read_stored(source)
    if not data:
        raise UndecodableImage(item, "it is empty (0 bytes)")
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"its header says {image.width}x{image.height} pixels, more than "
                    f"data.max_pixels {max_pixels}"
                )
            upright = ImageOps.exif_transpose(image) if exif else image
            pixels = np.array(_to_rgb(upright))
    except _DECODER_ERRORS as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"its {len(data)} bytes are no image of {', '.join(_formats())}"
        raise UndecodableImage(item, reason.rstrip(".")) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_size(source: bytes | Path, exif: bool = False) -> tuple[int, int]:
    """Return (height, width) from an image's header, turned as its EXIF orientation says or not.

    Raises:
        UndecodableImage: there is no header that PIL knows.
    """
    height, width, orientation = _read_header(source)
    return (width, height) if exif and orientation in (5, 6, 7, 8) else (height, width)


def read_orientation(source: bytes | Path) -> int:
    """Return the EXIF orientation in an image's header, 1..8; 1 is as stored, or not stated.

    Raises:
        UndecodableImage: there is no header that PIL knows.
    """
    orientation = _read_header(source)[2]
    return orientation if orientation in range(1, 9) else 1


def _read_header(source: bytes | Path) -> tuple[int, int, int]:
    """Return height, width and EXIF orientation."""
    try:
        stream = source if isinstance(source, Path) else BytesIO(source)
        with Image.open(stream, formats=_formats()) as header:
            orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
            return header.height, header.width, orientation
    except _DECODER_ERRORS as error:
        raise UndecodableImage(str(source)[:200], f"no size to be read ({error})") from error


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
    """Return the encoded bytes of an image, which lie in memory or in a file."""
    return stored.read_bytes() if isinstance(stored, Path) else stored


def decode_all(image: Callable[[int], Tensor], length: int) -> list[Tensor | None]:
    """Decode `length` images into RAM; None stands for one that cannot be decoded."""
    decoded: list[Tensor | None] = []
    for index in range(length):
        try:
            decoded.append(image(index))
        except UndecodableImage:  # noqa: PERF203 - decoding dwarfs it
            decoded.append(None)
    return decoded


def content_hashes(encoded: Callable[[int], bytes], length: int) -> list[str]:
    """Return the sha256 (hex) of each of `length` images' stored bytes."""
    return [hashlib.sha256(encoded(index)).hexdigest() for index in range(length)]


def fingerprint(
    class_names: Sequence[str],
    arrays: Iterable[np.ndarray],
    encoded: Callable[[int], bytes],
    length: int,
) -> str:
    """Return the sha256 (hex) of what a dataset of `length` images holds.

    It covers the length, the class names, every annotation in `arrays` and the encoded bytes of
    up to 64 evenly spaced images: enough to tell two datasets apart, without reading all of one.
    """
    digest = hashlib.sha256(json.dumps([length, list(class_names)]).encode())
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for index in _spread(length):
        digest.update(hashlib.sha256(encoded(index)).digest())
    return digest.hexdigest()


def estimated_bytes(encoded: Callable[[int], bytes], length: int) -> int:
    """Return about how many bytes `length` encoded images are, by the mean of the same 64."""
    sizes = [len(encoded(index)) for index in _spread(length)]
    return round(length * sum(sizes) / max(len(sizes), 1))


def _spread(length: int) -> list[int]:
    """Up to 64 evenly spaced images."""
    spread = np.linspace(0, length - 1, min(length, _NUM_FINGERPRINT_IMAGES)).round()
    return [int(index) for index in spread]


# --- Frames of a video file, by PyAV where that is installed.

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_FORMATS = "avi,mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,mpeg,mpegts"  # as FFmpeg calls them
_BITS_PER_SECOND = 8_000_000


def read_video(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[Tensor]:
    """Yield the frames of a video's first stream, uint8 RGB (3, H, W), one at a time.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file is no video, is cut short, or has frames of more than `max_pixels`.
    """
    av = _pyav()
    try:
        with _open(av, path) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise ValueError(
                    f"{path} has frames of {stream.width}x{stream.height} pixels, more than "
                    f"data.max_pixels {max_pixels}."
                )
            for frame in container.decode(video=0):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                yield pixels.permute(2, 0, 1).contiguous()
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}.") from error


def frame_rate(path: Path) -> float:
    """Return a video's frames per second.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the file is no video.
    """
    av = _pyav()
    try:
        with _open(av, path) as container:
            return float(container.streams.video[0].average_rate)
    except (av.FFmpegError, IndexError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}.") from error


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], frames_per_second: float) -> None:
    """Write (H, W, 3) RGB frames of one size as MPEG-4.

    Odd sizes lose their last row or column: the format wants even ones.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: there is no frame.
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


def _open(av: Any, path: Path) -> Any:
    """Open a video of a format that names no other files or addresses, as playlists do."""
    only = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    return av.open(str(path.absolute()), options=only)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos need PyAV. Install it: pip install av.") from error
    return av
