"""Every kind of image becomes uint8 RGB."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.data.classification import ClassificationDataset
from tract_transfer.data.images import UndecodableImage, decode_image


def encode(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


GRAY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.fromarray(RGB).convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = decode_image(encode(image, format), "x")
    assert (decoded.shape, decoded.dtype) == ((3, 6, 9), torch.uint8)
    assert mode != "RGB" or torch.equal(decoded, torch.from_numpy(RGB).permute(2, 0, 1))


def test_cmyk_keeps_its_colors():
    flat = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    color = decode_image(encode(flat, "JPEG", quality=95), "x").float().mean((1, 2))
    assert torch.allclose(color, torch.tensor([200.0, 40, 90]), atol=6)


def test_sixteen_bits_are_scaled_and_not_clipped():
    images = [Image.fromarray(GRAY.astype(np.uint16) * 257), Image.fromarray(GRAY)]
    wide, narrow = (decode_image(encode(image), "x") for image in images)
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode):
    image = Image.new(mode, (4, 4), 0)
    options = {"transparency": 0} if mode == "P" else {}
    assert (decode_image(encode(image, **options), "x") == 255).all()


def test_the_exif_orientation_is_applied_on_demand():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(RGB), "JPEG", exif=exif)
    assert decode_image(data, "x").shape == (3, 9, 6)
    assert decode_image(data, "x", exif=False).shape == (3, 6, 9)


def test_a_decompression_bomb_is_undecodable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UndecodableImage, match="exceeds limit"):
        decode_image(encode(Image.fromarray(RGB)), "x")


class Stored:
    def __init__(self, data):
        self.encoded = lambda row: data


def test_a_fingerprint_covers_every_part():
    def of(names=("a", "b"), labels=(0, 1, 1), data=b"x"):
        return ClassificationDataset("x", names, labels, Stored(data)).fingerprint()

    assert of() == of()
    assert len({of(), of(names=("b", "a")), of(labels=(0, 1, 0)), of(data=b"y")}) == 4
