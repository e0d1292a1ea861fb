"""Frames of a video file, by PyAV where that is installed."""

# H x W a frame

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tract_transfer.data.images import MAX_PIXELS

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
