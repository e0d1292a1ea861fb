"""What holds of every source of boxes: VOC, COCO and Hugging Face."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from box_data import WRITERS, coco_tree, place, write_rows
from PIL import Image

from tract_transfer.data.coco import load_coco
from tract_transfer.data.findings import Findings
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.voc import load_voc

GOOD = [("dog", (4, 5, 5, 7.5)), ("cat", (0, 0, 40, 30))]
# name -> (box xyxy, what the error says, what `clip` makes of it)
WRONG = {
    "inverted": ((20, 5, 10, 9), "the box is empty or inverted", None),
    "empty": ((20, 5, 20, 9), "the box is empty or inverted", None),
    "too thin for float32": ((20, 5, 20.001, 9), "the box is empty or inverted", None),
    "nan": ((float("nan"), 5, 20, 9), "finite number", None),
    "infinite": ((3, 5, float("inf"), 9), "finite number", None),
    "partly outside": ((20, 5, 50, 9), "must lie in the image of 40x30 pixels", [20, 5, 40, 9]),
    "wholly outside": ((50, 5, 60, 9), "must lie in the image of 40x30 pixels", None),
    "negative": ((-3, -2, 6, 9), "must lie in the image of 40x30 pixels", [0, 0, 6, 9]),
}


pytestmark = pytest.mark.usefixtures("offline_cache")


@pytest.mark.parametrize("source", WRITERS)
def test_all_sources_read_the_same(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    assert len(dataset) == 3
    assert dataset.class_names == ["cat", "dog"]
    target = dataset.target(0)
    assert target["boxes"].tolist() == [[4, 5, 5, 7.5], [0, 0, 40, 30]]
    assert target["boxes"].dtype == target["area"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 0]
    assert target["labels"].dtype == torch.int64
    assert target["area"].tolist() == [2.5, 1200]
    assert not (target["difficult"] | target["crowd"]).any()
    assert [len(dataset.target(index)["labels"]) for index in range(3)] == [2, 1, 0]
    assert dataset.target(2)["boxes"].shape == (0, 4)
    assert dataset.size(0) == (30, 40)
    reds = torch.tensor([float(dataset.image(index)[0, 0, 0]) for index in range(3)])
    assert (reds - torch.tensor([0.0, 60, 120])).abs().max() <= 3
    assert len(dataset.fingerprint()) == 64


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_box_is_named_or_mended_and_listed(source, kind, tmp_path, refused):
    box, message, clipped = WRONG[kind]
    load = WRITERS[source](tmp_path / "data", [GOOD[0], ("cat", box), GOOD[1]])
    with refused(
        f"a box that is {kind} ({source})", ValueError, match=r"set data\.invalid_boxes: clip"
    ) as caught:
        load()
    assert place(source, 2, "cat") in str(caught.value)
    assert message in str(caught.value)
    findings = Findings("clip")
    boxes = load(findings=findings).target(0)["boxes"].tolist()
    assert boxes == [[4, 5, 5, 7.5], *([clipped] if clipped else []), [0, 0, 40, 30]]
    (mended,) = findings.fixed
    assert place(source, 2, "cat") in mended
    assert mended.endswith("clipped" if clipped else "dropped")


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("overhang", [0.4, 0.99])
def test_less_than_a_pixel_outside_is_a_rounding(source, overhang, tmp_path):
    box = (-overhang, 3, 40 + overhang, 30 + overhang)
    findings = Findings()
    dataset = WRITERS[source](tmp_path / "data", [("cat", box)])(findings=findings)
    assert dataset.target(0)["boxes"].tolist() == [[0, 3, 40, 30]]
    assert findings.fixed == []


@pytest.mark.parametrize("source", WRITERS)
def test_a_box_of_one_pixel_is_kept(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", [("cat", (39, 29, 40, 30))])()
    assert dataset.target(0)["boxes"].tolist() == [[39, 29, 40, 30]]


@pytest.mark.parametrize("source", WRITERS)
def test_collecting_tells_all_and_keeps_what_is_right(source, tmp_path):
    wrong = [("cat", box) for box, _, _ in WRONG.values()]
    objects = [*wrong, GOOD[0], ("eel", (1, 1, 2, 2))]
    findings = Findings(collect=True)
    dataset = WRITERS[source](tmp_path / "data", objects)(findings=findings)
    assert len(findings.problems) == len(WRONG) + 1
    for number, problem in enumerate(findings.problems[:-1], start=1):
        assert place(source, number, "cat") in problem
    assert dataset.target(0)["boxes"].tolist() == [[4, 5, 5, 7.5]]
    assert len(dataset) == 3


@pytest.mark.parametrize("source", ["voc", "huggingface"])
def test_an_unknown_class_is_told_with_the_known(source, tmp_path, refused):
    load = WRITERS[source](tmp_path / "data", [GOOD[0], ("eel", (1, 1, 2, 2))])
    with refused(
        f"an object of no known class ({source})",
        ValueError,
        match=r"unknown class.* Classes: cat, dog. Correct",
    ) as caught:
        load(key="data.val")
    assert place(source, 2, "eel") in str(caught.value)
    assert "set data.val.classes" in str(caught.value)


@pytest.mark.parametrize("source", WRITERS)
def test_classes_must_differ(source, tmp_path):
    load = WRITERS[source](tmp_path / "data", GOOD)
    with pytest.raises(ValueError, match=r"data.train.classes must be different .* \['cat'\] more"):
        load(classes=["cat", "dog", "cat"])


@pytest.mark.parametrize("source", WRITERS)
def test_images_without_objects_can_be_left_out(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    chosen = dataset.with_objects()
    assert [len(chosen.target(index)["labels"]) for index in range(len(chosen))] == [2, 1]
    assert [chosen.item(0), chosen.item(1)] == [dataset.item(0), dataset.item(1)]
    assert chosen.with_objects() is chosen
    crowd = dataset.select([0, 1], "crowds")
    crowd.objects.crowd[:2] = True
    assert crowd.with_objects().item(0) == dataset.item(1)


def encoded_as(path, kind):
    """Overwrite an image file by another of the same size."""
    grey = np.full((30, 40), 77, dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "grey": (Image.fromarray(grey), {"format": "JPEG"}),
        "palette": (Image.fromarray(grey).convert("P"), {"format": "PNG"}),
        "16-bit": (Image.fromarray(grey.astype(np.uint16) * 257), {"format": "PNG"}),
        "CMYK": (Image.fromarray(grey).convert("CMYK"), {"format": "JPEG"}),
        "turned by EXIF": (
            Image.fromarray(grey.T.copy()).convert("RGB"),
            {"format": "JPEG", "exif": exif},
        ),
    }
    image, options = images[kind]
    image.save(path, **options)


@pytest.mark.parametrize("source", ["voc", "coco"])
@pytest.mark.parametrize("kind", ["grey", "palette", "16-bit", "CMYK", "turned by EXIF"])
def test_every_kind_of_image_becomes_rgb_of_the_annotated_size(source, kind, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    encoded_as(dataset.item(0), kind)
    image = dataset.image(0)
    assert image.shape == (3, 30, 40)
    assert (image.float() - 77).abs().max() <= 3


CORNERS = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((20, 20), np.uint8))
# How a viewer turns what is stored, by EXIF orientation.
TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


def write_turned(source, folder, stored, orientation, size):
    """The data of box_data, its first image with this orientation and annotated (height, width)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(stored)
    if source == "huggingface":
        height, width = size
        annotated = {"height": [height, 30, 30], "width": [width, 40, 40]}
        return write_rows(folder, [], more=annotated, first=(photo, exif))()
    dataset = WRITERS[source](folder, [])()
    photo.save(dataset.item(0), exif=exif, format="PNG")
    if source == "voc":
        path = folder / "VOC2007/Annotations/0.xml"
        path.write_text(
            f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>"
            "</annotation>"
        )
        return load_voc(folder, ["2007/train"])
    tree = coco_tree([])
    tree["images"][0] |= {"height": size[0], "width": size[1]}
    (folder / "boxes.json").write_text(json.dumps(tree))
    return load_coco(folder / "images", folder / "boxes.json")


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_image_is_the_one_of_the_annotated_size(source, orientation, tmp_path):
    """Where both have that size, VOC's and COCO's is the stored one, Hugging Face's the upright."""
    stored = CORNERS[:30]
    upright = TURNED[orientation](stored)
    for size in {stored.shape, upright.shape}:
        folder = tmp_path / f"{size[0]}x{size[1]}"
        dataset = write_turned(source, folder, stored, orientation, size)
        fits_both = stored.shape == upright.shape
        is_stored = (source != "huggingface") if fits_both else size == stored.shape
        assert np.array_equal(dataset.image(0)[0], stored if is_stored else upright)
        unclear = orientation if fits_both and is_stored else 1
        assert dataset.unfollowed_orientation(0) == unclear
    square = write_turned(source, tmp_path / "square", CORNERS, orientation, (40, 40))
    wanted = TURNED[orientation](CORNERS) if source == "huggingface" else CORNERS
    assert np.array_equal(square.image(0)[0], wanted)
    assert np.array_equal(square.select([0], "one").image(0)[0], wanted)


@pytest.mark.parametrize("source", ["voc", "coco"])
def test_broken_images_wait_for_their_access(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    file = Path(dataset.item(0))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UndecodableImage, match="cannot be decoded"):
        dataset.image(0)
    Image.new("RGB", (50, 50)).save(dataset.item(1))
    with pytest.raises(ValueError, match=r"has 50x50 pixels .* its annotation says 40x30"):
        dataset.image(1)


def test_the_policy_must_be_known():
    with pytest.raises(ValueError, match=r"data.invalid_boxes must be error or clip, got 'drop'"):
        Findings("drop")
