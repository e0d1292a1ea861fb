import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from tract_transfer.data.images import UndecodableImage, decode_image, fingerprint


def encode(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_rgb_png_is_exact():
    image = decode_image(encode(Image.fromarray(RGB)), "x")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(RGB).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_three_channels(mode):
    image = Image.fromarray(RGB).convert(mode)
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert decode_image(encode(image, format), "x").shape == (3, 6, 9)


def test_cmyk_keeps_its_colours():
    flat = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    colour = decode_image(encode(flat, "JPEG", quality=95), "x").float().mean((1, 2))
    assert torch.allclose(colour, torch.tensor([200.0, 40, 90]), atol=6)


def test_sixteen_bits_are_scaled_and_not_clipped():
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert torch.equal(
        decode_image(encode(wide), "x"), decode_image(encode(Image.fromarray(GREY)), "x")
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([255, 0, 0, 0, 0, 0])
        data = encode(image, transparency=0)
    else:
        data = encode(Image.new(mode, (4, 4), 0))
    assert (decode_image(data, "x") == 255).all()


def test_exif_orientation_is_followed_on_demand():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(RGB), "JPEG", exif=exif)
    assert decode_image(data, "x").shape == (3, 9, 6)
    assert decode_image(data, "x", exif=False).shape == (3, 6, 9)


def truncated(format):
    data = encode(Image.fromarray(np.tile(RGB, (20, 20, 1))), format)
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [
        ("no bytes", b"", "empty"),
        ("bytes that are none", b"not an image", "no image of"),
        ("a truncated JPEG", truncated("JPEG"), "truncated"),
        ("a truncated PNG", truncated("PNG"), ""),
        ("a TIFF of floats", encode(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "float"),
    ],
)
def test_undecodable_names_item_and_reason(kind, data, reason, refused):
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    says = r"train row 17 cannot.*data.undecodable: skip"
    with refused(f"an image of {kind}", UndecodableImage, match=says) as e:
        decode_image(data, "split train row 17")
    assert e.value.item == "split train row 17"
    assert reason in e.value.reason
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES


def test_decompression_bomb_is_undecodable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UndecodableImage, match="exceeds limit"):
        decode_image(encode(Image.fromarray(RGB)), "x")


def test_missing_file_is_not_called_undecodable(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "x.png", "x")


def test_error_survives_pickling_and_a_dataloader():
    error = pickle.loads(pickle.dumps(UndecodableImage("a.jpg", "cut short")))
    assert (error.item, error.reason) == ("a.jpg", "cut short")
    assert str(UndecodableImage(str(error))) == str(error)


def test_fingerprint_sees_every_part():
    def of(names=("a", "b"), labels=(0, 1, 1), data=b"x"):
        return fingerprint(names, [np.array(labels)], lambda index: data, len(labels))

    assert of() == of()
    assert len({of(), of(names=("b", "a")), of(labels=(0, 1, 0)), of(data=b"y")}) == 4
