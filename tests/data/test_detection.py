from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.data.classification import check_same_classes
from tract_transfer.data.findings import Findings
from tract_transfer.data.images import UndecodableImage
from tract_transfer.data.voc import VOC_CLASSES, load_voc

SHARED = Path(__file__).parents[2] / "../shared/data/voc"
SIZE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def box(*corners):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
    return "<bndbox>" + "".join(f"<{side}>{value}</{side}>" for side, value in sides) + "</bndbox>"


def thing(name="cat", corners=(1, 1, 40, 30), more=""):
    return f"<object><name>{name}</name>{more}{box(*corners)}</object>"


def write(devkit, annotations, split="train", lines=None):
    """Write a devkit; annotations maps an id to the inside of its XML."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (devkit / folder).mkdir(parents=True, exist_ok=True)
    for image_id, inside in annotations.items():
        (devkit / f"Annotations/{image_id}.xml").write_text(f"<annotation>{inside}</annotation>")
        Image.new("RGB", (40, 30), (9, 9, 9)).save(devkit / f"JPEGImages/{image_id}.jpg")
    text = "".join(f"{line}\n" for line in (annotations if lines is None else lines))
    (devkit / f"ImageSets/Main/{split}.txt").write_text(text)


PART = f"<part><name>head</name>{box(1, 1, 2, 2)}</part>"


@pytest.fixture
def devkit(tmp_path):
    inside = {
        "a": SIZE + thing("dog", (5, 6, 5, 7.5), f"{PART}<difficult>1</difficult>") + thing(),
        "b": thing("person"),
        "c": SIZE,
    }
    write(tmp_path / "VOCdevkit/VOC2007", inside)
    return tmp_path / "VOCdevkit/VOC2007"


@pytest.mark.parametrize("up", ["..", "../.."])
def test_boxes_become_zero_based_and_exclusive(devkit, up):
    dataset = load_voc(devkit / up, ["2007/train"])
    target = dataset.target(0)
    assert target["boxes"].tolist() == [[4, 5, 5, 7.5], [0, 0, 40, 30]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [VOC_CLASSES.index("dog"), VOC_CLASSES.index("cat")]
    assert target["difficult"].tolist() == [True, False]
    assert target["image_id"] == 0
    assert dataset.target(2)["boxes"].shape == (0, 4)
    assert dataset.image(1).shape == (3, 30, 40)
    assert dataset.size(1) == (30, 40)  # from the header: its XML has none
    assert dataset.item(1).endswith("b.jpg")


def test_any_folder_name_and_several_sets(devkit):
    write(devkit.parent / "scenes", {"a": SIZE}, split="val")
    dataset = load_voc(devkit.parent, ["2007/train", "scenes/val"])
    assert len(dataset) == 4
    assert dataset.class_names == list(VOC_CLASSES)


def test_select_keeps_objects_with_their_image(devkit):
    dataset = load_voc(devkit.parent, ["2007/train"])
    chosen = dataset.select([2, 0], "part")
    assert [len(chosen.target(i)["labels"]) for i in range(2)] == [0, 2]
    assert torch.equal(chosen.target(1)["boxes"], dataset.target(0)["boxes"])
    assert chosen.fingerprint() != dataset.fingerprint()
    assert dataset.select([0, 1, 2], "all").fingerprint() == dataset.fingerprint()
    assert len(dataset.select([], "none")) == 0
    assert "train has no example of 17 of 20 classes" in check_same_classes({"train": dataset})[0]


@pytest.mark.parametrize("what", ["boxes", "labels", "difficult", "crowd", "areas"])
def test_a_fingerprint_covers_every_object(devkit, what):
    dataset = load_voc(devkit.parent, ["2007/train"])
    before = dataset.fingerprint()
    rows = getattr(dataset.objects, what)
    rows[1] = ~rows[1] if rows.dtype == bool else rows[1] + 1
    assert dataset.fingerprint() != before


def test_two_columns_keep_all_but_minus_one(devkit):
    write(devkit, {}, "cat_train", ["a  1", "b -1", "c  0"])
    dataset = load_voc(devkit.parent, ["2007/cat_train"])
    assert [Path(dataset.item(i)).stem for i in range(2)] == ["a", "c"]
    assert len(dataset) == 2


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (thing() + thing("catt"), r"a.xml object 2 \(catt\): unknown class. Did you mean 'cat'"),
        (thing(corners=(1, 1, 40)), r"object 1 \(cat\): <ymax> must be a finite number, not None"),
        (thing(corners=(1, "nan", 40, 30)), "<ymin> must be a finite number, not 'nan'"),
        (thing(corners=(1, 1, "wide", 30)), "<xmax> must be a finite number, not 'wide'"),
        (thing(corners=(9, 1, 8, 30)), "empty or inverted: xmin 9, ymin 1, xmax 8"),
        (thing(corners=(0, 1, 8, 30)), r"must lie in the image of 40x30 pixels, but is xmin 0"),
        (thing(corners=(1, 1, 41, 30)), r"must lie in .* xmax 41"),
        (thing(more="<difficult>yes</difficult>"), "<difficult> must be 0 or 1, not 'yes'"),
        ("<broken>", "a.xml is not a readable XML file"),
    ],
)
def test_bad_objects_name_file_number_and_class(objects, message, tmp_path):
    write(tmp_path / "VOC2007", {"a": SIZE + objects})
    with pytest.raises(ValueError, match=message):
        load_voc(tmp_path, ["2007/train"])


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        ([], ValueError, "train.txt names no image"),
        (["", "  "], ValueError, "train.txt names no image"),
        (["a", "zz"], FileNotFoundError, r"train.txt line 2 needs .*zz.xml"),
        (["noimage"], FileNotFoundError, r"train.txt line 1 needs .*noimage.jpg"),
        (["a 2"], ValueError, "line 1 must be an id"),
        (["a", "a"], ValueError, r"line 2 repeats 'a', already in .*line 1"),
    ],
)
def test_bad_split_files_name_file_and_line(lines, error, message, tmp_path):
    write(tmp_path / "VOC2007", {"a": SIZE, "noimage": SIZE}, lines=lines)
    (tmp_path / "VOC2007/JPEGImages/noimage.jpg").unlink()
    with pytest.raises(error, match=message):
        load_voc(tmp_path, ["2007/train"])


@pytest.mark.parametrize(
    ("voc_set", "error", "message"),
    [
        ("2012/train", FileNotFoundError, r"VOC2012/Annotations.*Set data.val.root"),
        ("2007/trian", FileNotFoundError, r"Did you mean 'train'.*Set data.val.sets"),
        ("2007", ValueError, "must be <year>/<split>"),
    ],
)
def test_unknown_sets_name_the_fix(devkit, voc_set, error, message, refused):
    with refused(f"the VOC set {voc_set}", error, match=message):
        load_voc(devkit.parent, [voc_set], key="data.val")


DOCTYPES = {
    "internal entity": '<!DOCTYPE x [<!ENTITY e "e">]>',
    "bomb": '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;"><!ENTITY e "&b;&b;">]>',
    "external entity": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>',
    "unknown encoding": '<?xml version="1.0" encoding="none-such"?>',
}


@pytest.mark.parametrize("kind", DOCTYPES)
def test_entities_are_refused(devkit, kind, refused):
    text = f"{DOCTYPES[kind]}<annotation><folder>&e;</folder>{SIZE}{thing()}</annotation>"
    (devkit / "Annotations/a.xml").write_text(text)
    with refused(
        f"XML with entities or encoding: {kind}",
        ValueError,
        match=r"a.xml is not a readable XML file: .*Repair it",
    ):
        load_voc(devkit.parent, ["2007/train"])


def test_a_split_file_of_other_bytes_names_the_line(devkit, refused):
    (devkit / "ImageSets/Main/train.txt").write_bytes(b"a\n\xff\xfe\n")
    with refused(
        "a VOC split file that is no text", FileNotFoundError, match=r"train.txt line 2 needs"
    ):
        load_voc(devkit.parent, ["2007/train"])


def test_without_a_size_a_broken_image_waits_for_its_access(devkit):
    (devkit / "JPEGImages/b.jpg").write_bytes(b"broken")
    dataset = load_voc(devkit.parent, ["2007/train"])
    assert len(dataset.target(1)["labels"]) == 0
    with pytest.raises(UndecodableImage, match=r"b\.jpg cannot be decoded"):
        dataset.image(1)


@pytest.mark.parametrize("tags", ["", "<pose/><truncated/><difficult/>", "<pose>Left</pose>"])
def test_pose_truncated_and_difficult_may_be_missing_or_blank(tags, tmp_path):
    write(tmp_path / "VOC2007", {"a": SIZE + thing(more=tags)})
    target = load_voc(tmp_path, ["2007/train"]).target(0)
    assert target["difficult"].tolist() == [False]


def test_collecting_tells_every_line_and_file(tmp_path):
    devkit = tmp_path / "VOC2007"
    lines = ["a", "zz", "a", "b 2", "c", "d"]
    write(devkit, {"a": SIZE + thing("catt"), "c": "<broken>", "d": SIZE + thing()}, lines=lines)
    findings = Findings(collect=True)
    dataset = load_voc(tmp_path, ["2007/train"], findings=findings)
    wanted = ["a.xml object 1 (catt)", "line 2 needs", "line 3 repeats", "line 4 must", "c.xml is"]
    for part, problem in zip(wanted, findings.problems, strict=True):
        assert part in problem
    assert [Path(dataset.item(index)).stem for index in range(2)] == ["a", "d"]


def test_the_image_must_have_the_annotated_size(devkit):
    dataset = load_voc(devkit.parent, ["2007/train"])
    Image.new("RGB", (41, 30)).save(devkit / "JPEGImages/a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg has 41x30 pixels .* says 40x30"):
        dataset.image(0)


def test_exif_is_followed_only_where_the_size_asks(devkit):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(devkit / "JPEGImages/a.jpg", exif=exif)
    Image.new("RGB", (30, 40)).save(devkit / "JPEGImages/c.jpg", exif=exif)
    dataset = load_voc(devkit.parent, ["2007/train"])
    assert dataset.image(0).shape == dataset.image(2).shape == (3, 30, 40)


def test_caching_defers_what_cannot_be_decoded(devkit):
    dataset = load_voc(devkit.parent, ["2007/train"])
    (devkit / "JPEGImages/a.jpg").write_bytes(b"broken")
    dataset.cache_images()
    (devkit / "JPEGImages/b.jpg").unlink()
    assert dataset.image(1).shape == (3, 30, 40)
    with pytest.raises(UndecodableImage, match=r"a\.jpg"):
        dataset.image(0)


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data")
def test_real_voc():
    dataset = load_voc(SHARED, ["2007/train", "2007/val"])
    assert len(dataset) == 800
    assert np.bincount(dataset.labels, minlength=20)[VOC_CLASSES.index("person")] == 770
    assert dataset.objects.difficult.sum() == 507
    assert len(dataset.labels) == dataset.objects.first[-1]
    heights, widths = dataset.sizes[np.repeat(np.arange(800), np.diff(dataset.objects.first))].T
    assert (dataset.objects.boxes[:, :2] >= 0).all()
    assert (dataset.objects.boxes[:, 2] <= widths).all()
    assert (dataset.objects.boxes[:, 3] <= heights).all()
    assert tuple(dataset.image(7).shape[1:]) == dataset.size(7)
