"""Detection data: every format gives the same images and boxes, and wrong boxes are reported."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from box_data import NAMES, WRITERS, place, write_coco, write_rows, write_voc
from PIL import Image
from stream_rows import make_rows

from tract_transfer.data.classification import check_same_classes
from tract_transfer.data.detection import BoxReader, DetectionDataset, ImageFiles, ImageLabels
from tract_transfer.data.findings import Findings
from tract_transfer.data.huggingface import load_huggingface_boxes
from tract_transfer.data.images import UndecodableImage, content_hashes
from tract_transfer.data.voc import VOC_CLASSES, load_voc

SHARED = Path(__file__).parents[3] / "shared/data/voc"
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
all_sources = pytest.mark.parametrize("source", WRITERS)


@all_sources
def test_all_formats_give_the_same_data(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    assert len(dataset) == 3
    assert dataset.class_names == ["cat", "dog"]
    target = dataset.target(0)
    boxes = torch.tensor([[4, 5, 5, 7.5], [0, 0, 40, 30]])
    for name, expected in (("boxes", boxes), ("labels", torch.tensor([1, 0]))):
        torch.testing.assert_close(target[name], expected, rtol=0, atol=0)  # and the types
    torch.testing.assert_close(target["area"], torch.tensor([2.5, 1200]))
    assert not (target["difficult"] | target["crowd"]).any()
    assert target["image_id"] == 0
    assert [len(dataset.target(index)["labels"]) for index in range(3)] == [2, 1, 0]
    assert dataset.target(2)["boxes"].shape == (0, 4)
    assert dataset.size(0) == (30, 40)
    assert dataset.class_counts.tolist() == [1, 2]
    reds = torch.tensor([float(dataset.image(index)[0, 0, 0]) for index in range(3)])
    assert (reds - torch.tensor([0.0, 60, 120])).abs().max() <= 3


@all_sources
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_box_is_an_error_or_is_clipped_and_listed(source, kind, tmp_path, refused):
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
    (text,) = findings.clipped_boxes
    assert place(source, 2, "cat") in text
    assert text.endswith("clipped" if clipped else "dropped")


@all_sources
def test_collecting_reports_all_problems_and_keeps_good_objects(source, tmp_path):
    wrong = [("cat", box) for box, _, _ in WRONG.values()]
    findings = Findings(collect=True)
    load = WRITERS[source](tmp_path / "data", [*wrong, GOOD[0], ("eel", (1, 1, 2, 2))])
    dataset = load(findings=findings)
    assert len(findings.problems) == len(WRONG) + 1
    for number, problem in enumerate(findings.problems[:-1], start=1):
        assert place(source, number, "cat") in problem
    assert dataset.target(0)["boxes"].tolist() == [[4, 5, 5, 7.5]]
    assert len(dataset) == 3


def test_collecting_reports_every_line_and_file_of_a_devkit(tmp_path):
    load = write_voc(tmp_path, GOOD)
    devkit = tmp_path / "VOC2007"
    (devkit / "Annotations/1.xml").write_text("<broken>")
    (devkit / "ImageSets/Main/train.txt").write_text("0\nzz\n0\n2 2\n1\n")
    findings = Findings(collect=True)
    dataset = load(findings=findings)
    parts = ["line 2 needs", "line 3 repeats", "line 4 must", "1.xml is"]
    assert all(part in text for part, text in zip(parts, findings.problems, strict=True))
    assert [Path(dataset.item(index)).stem for index in range(len(dataset))] == ["0"]


@all_sources
@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-0.99, 3, 40.99, 30.4), [0, 3, 40, 30]),  # less than a pixel outside is rounding
        ((39, 29, 40, 30), [39, 29, 40, 30]),
    ],
)
def test_rounding_errors_are_clipped_and_one_pixel_is_a_box(source, box, expected, tmp_path):
    findings = Findings()
    dataset = WRITERS[source](tmp_path / "data", [("cat", box)])(findings=findings)
    assert dataset.target(0)["boxes"].tolist() == [expected]
    assert findings.clipped_boxes == []


@all_sources
def test_images_without_objects_besides_crowds_can_be_dropped(source, tmp_path):
    dataset = WRITERS[source](tmp_path / "data", GOOD)()
    kept = dataset.with_objects()
    assert [kept.item(index) for index in range(len(kept))] == [dataset.item(0), dataset.item(1)]
    assert kept.with_objects() is kept
    crowd = dataset.select([0, 1], "crowds")
    crowd.objects.crowd[:2] = True
    assert crowd.with_objects().item(0) == dataset.item(1)


def test_a_selection_keeps_the_objects_of_its_images(tmp_path):
    dataset = write_voc(tmp_path, GOOD)()
    chosen = dataset.select([2, 0], "part")
    assert [len(chosen.target(i)["labels"]) for i in range(2)] == [0, 2]
    assert torch.equal(chosen.target(1)["boxes"], dataset.target(0)["boxes"])
    assert chosen.fingerprint() != dataset.fingerprint()
    assert dataset.select([0, 1, 2], "all").fingerprint() == dataset.fingerprint()
    assert len(dataset.select([], "none")) == 0
    twenty = load_voc(tmp_path, ["2007/train"])
    assert "train has no example of 18 of 20 classes" in check_same_classes({"train": twenty})[0]


@pytest.mark.parametrize("what", ["boxes", "labels", "difficult", "crowd", "areas"])
def test_a_fingerprint_covers_every_object(what, tmp_path):
    dataset = write_voc(tmp_path, GOOD)()
    before = dataset.fingerprint()
    rows = getattr(dataset.objects, what)
    rows[1] = ~rows[1] if rows.dtype == bool else rows[1] + 1
    assert dataset.fingerprint() != before


# Images and their annotated sizes.


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


CORNERS = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((20, 20), np.uint8))
# How a viewer turns the stored pixels, by EXIF orientation.
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
    photo, exif, (height, width) = Image.fromarray(stored), exif_of(orientation), size
    if source == "huggingface":
        annotated = {"height": [height, 30, 30], "width": [width, 40, 40]}
        return write_rows(folder, [], more=annotated, first=(photo, exif))()
    load = write_coco(folder, [], lambda tree: tree["images"][0].update(height=height, width=width))
    photo.save(folder / "images/0.png", exif=exif)
    return load()


@pytest.mark.parametrize("source", ["coco", "huggingface"])
@pytest.mark.parametrize("orientation", TURNED)
def test_the_exif_orientation_is_applied_if_the_annotated_size_asks_for_it(
    source, orientation, tmp_path
):
    """If both sizes fit, COCO (as VOC) uses the image as stored, Hugging Face data upright."""
    for number, stored in enumerate((CORNERS[:30], CORNERS)):
        upright = TURNED[orientation](stored)
        for size in {stored.shape, upright.shape}:
            folder = tmp_path / f"{number}-{size[0]}"
            dataset = write_turned(source, folder, stored, orientation, size)
            fits_both = stored.shape == upright.shape
            is_stored = (source != "huggingface") if fits_both else size == stored.shape
            expected = stored if is_stored else upright
            assert np.array_equal(dataset.image(0)[0], expected)
            assert np.array_equal(dataset.select([0], "one").image(0)[0], expected)
            unclear = orientation if fits_both and is_stored else 1
            assert dataset.unfollowed_orientation(0) == unclear


@pytest.mark.parametrize("source", ["voc", "coco"])
def test_broken_images_raise_when_accessed_and_cached_images_stay(source, tmp_path):
    load = WRITERS[source](tmp_path / "data", GOOD)
    dataset = load()
    file = Path(dataset.item(0))
    file.write_bytes(file.read_bytes()[:60])
    dataset.cache_images()
    Image.new("RGB", (50, 50)).save(dataset.item(1))
    assert dataset.image(1).shape == dataset.select([1], "one").image(0).shape == (3, 30, 40)
    with pytest.raises(UndecodableImage, match="cannot be decoded"):
        dataset.image(0)
    with pytest.raises(ValueError, match=r"has 50x50 pixels .* its annotation says 40x30"):
        load().image(1)


# VOC.


def test_a_missing_size_is_that_of_the_image_and_a_broken_image_has_no_boxes(tmp_path):
    load = write_voc(tmp_path, GOOD)
    devkit = tmp_path / "VOC2007"
    for number in (0, 1):
        file = devkit / f"Annotations/{number}.xml"
        file.write_text(file.read_text().replace("<width>40</width>", ""))
    (devkit / "JPEGImages/1.jpg").write_bytes(b"broken")
    dataset = load()
    assert dataset.size(0) == (30, 40)
    assert len(dataset.target(1)["labels"]) == 0
    with pytest.raises(UndecodableImage, match=r"1\.jpg cannot be decoded"):
        dataset.image(1)


@pytest.mark.parametrize(
    ("tags", "difficult"),
    [("", False), ("<pose/><truncated/><difficult/>", False), ("<difficult>1</difficult>", True)],
)
def test_optional_tags_may_be_missing_or_blank_and_parts_are_ignored(tags, difficult, tmp_path):
    load = write_voc(tmp_path, GOOD[:1])
    file = tmp_path / "VOC2007/Annotations/0.xml"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    file.write_text(file.read_text().replace("<bndbox>", f"{tags}{part}<bndbox>"))
    assert load().target(0)["difficult"].tolist() == [difficult]


def test_sets_of_any_folder_are_joined_and_lines_with_minus_one_excluded(tmp_path):
    write_voc(tmp_path / "VOCdevkit", GOOD)
    write_voc(tmp_path / "other", GOOD)
    (tmp_path / "other/VOC2007").rename(tmp_path / "VOCdevkit/scenes")
    lines = tmp_path / "VOCdevkit/scenes/ImageSets/Main/cat_val.txt"
    lines.write_text("0  1\n1 -1\n2  0\n")
    dataset = load_voc(tmp_path, ["2007/train", "scenes/cat_val"])
    assert dataset.class_names == list(VOC_CLASSES)
    assert [Path(dataset.item(i)).stem for i in range(len(dataset))] == ["0", "1", "2", "0", "2"]
    assert len(load_voc(tmp_path / "VOCdevkit", ["2007/train"])) == 3


@pytest.mark.skipif(not SHARED.exists(), reason="no sample data")
def test_real_voc():
    dataset = load_voc(SHARED, ["2007/train", "2007/val"])
    assert len(dataset) == 800
    assert dataset.class_counts[VOC_CLASSES.index("person")] == 770
    assert dataset.objects.difficult.sum() == 507
    heights, widths = dataset.sizes[np.repeat(np.arange(800), np.diff(dataset.objects.first))].T
    assert (dataset.objects.boxes[:, :2] >= 0).all()
    assert (dataset.objects.boxes[:, 2] <= widths).all()
    assert (dataset.objects.boxes[:, 3] <= heights).all()


# COCO.


def test_coco_labels_follow_the_category_ids_or_classes(tmp_path):
    load = write_coco(tmp_path / "data", GOOD)
    for dataset, names in (
        (load(), ["cat", "dog"]),
        (load(classes=["dog", "cat"]), ["dog", "cat"]),
    ):
        assert dataset.class_names == names
        assert [names[label] for label in dataset.target(0)["labels"]] == ["dog", "cat"]


def test_coco_flags_areas_and_ids_are_read(tmp_path):
    def change(tree):
        tree["annotations"][0] |= {"iscrowd": 1, "area": 2.0}
        tree["annotations"][1] |= {"ignore": 1, "area": 10**400}
        del tree["annotations"][2]["iscrowd"]
        del tree["images"][0]["width"]
        tree["images"][1]["width"] = 10**400
        tree["categories"][0]["id"] = "7"  # ids may be numbers and strings
        for entry in tree["annotations"]:
            entry["category_id"] = {7: "7"}.get(entry["category_id"], entry["category_id"])

    dataset = write_coco(tmp_path / "data", GOOD, change)()
    target = dataset.target(0)
    assert target["labels"].tolist() == [1, 0]
    assert target["crowd"].tolist() == [True, False]
    assert target["difficult"].tolist() == [True, True]
    assert target["area"].tolist() == [2, 1200]
    assert dataset.target(1)["difficult"].tolist() == [False]
    assert dataset.size(0) == (30, 40)  # the image's
    with pytest.raises(ValueError, match="40x30"):
        dataset.image(1)


# Hugging Face rows.


def struct_of_lists(fields):
    return {name: datasets.List(field) for name, field in fields.items()}


def integers(fields):
    return datasets.List({**fields, "category": datasets.Value("int64")})


@pytest.mark.parametrize("feature", [None, struct_of_lists, integers])
def test_both_layouts_and_plain_integers_read_the_same(feature, tmp_path):
    load = write_rows(tmp_path, GOOD, feature)
    dataset = load(classes=NAMES if feature is integers else None)
    assert dataset.class_names == (NAMES if feature is integers else [*NAMES, "eel"])
    assert dataset.target(0)["boxes"].tolist() == [[4, 5, 5, 7.5], [0, 0, 40, 30]]
    assert dataset.target(0)["labels"].tolist() == [1, 0]
    if feature is not integers:
        assert load(classes=["eel", "dog", "cat"]).target(0)["labels"].tolist() == [1, 2]


FORMATS = {
    ("xywh", "pixel"): lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1],
    ("xyxy", "pixel"): lambda *box: list(box),
    ("cxcywh", "pixel"): lambda x1, y1, x2, y2: [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
    ("xyxy", "relative"): lambda x1, y1, x2, y2: [x1 / 40, y1 / 30, x2 / 40, y2 / 30],
    ("cxcywh", "relative"): lambda x1, y1, x2, y2: [
        (x1 + x2) / 80, (y1 + y2) / 60, (x2 - x1) / 40, (y2 - y1) / 30,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("box_format", "unit"), FORMATS)
def test_every_box_format_gives_the_same_box(box_format, unit, tmp_path):
    write_rows(tmp_path, GOOD, box=lambda box: FORMATS[box_format, unit](*box))
    path = str(tmp_path / "train.parquet")
    dataset = load_huggingface_boxes(path, "train", box_format, box_unit=unit)
    boxes = dataset.target(0)["boxes"]
    assert (boxes - boxes.new_tensor([[4, 5, 5, 7.5], [0, 0, 40, 30]])).abs().max() < 1e-5


def test_flags_and_areas_are_read_and_repeated_image_ids_skipped(tmp_path):
    number, names = datasets.Value("float32"), ("difficult", "iscrowd", "area")
    fields = {"bbox": datasets.List(number), "category": datasets.Value("int64")}
    fields |= dict.fromkeys(names, number)
    thing = {"bbox": [1, 2, 3, 4], "category": 0, "difficult": 0, "iscrowd": 0, "area": None}
    things = [{**thing, "difficult": 1}, {**thing, "iscrowd": 1, "area": 5.5}]
    things += [{**thing, "difficult": None, "iscrowd": None}]
    make_rows(
        3,
        label=None,
        objects=(datasets.List(fields), [things, None, []]),
        image_id=(datasets.Value("int64"), [4, 5, 4]),
    ).save_to_disk(tmp_path / "saved")
    findings, path = Findings(collect=True), str(tmp_path / "saved")
    dataset = load_huggingface_boxes(path, "train", "xywh", classes=["cat"], findings=findings)
    target = dataset.target(0)
    assert target["difficult"].tolist() == [True, True, False]
    assert target["crowd"].tolist() == [False, True, False]
    assert target["area"].tolist() == [12, 5.5, 12]
    assert len(dataset.target(1)["labels"]) == 0
    assert [dataset.item(index)[-1] for index in range(len(dataset))] == ["0", "1"]
    assert len(findings.problems) == 1


def test_the_size_of_a_row_is_by_default_the_upright_one(tmp_path):
    photo = Image.new("RGB", (30, 40))
    dataset = write_rows(tmp_path, [], first=(photo, exif_of(6)))()
    assert dataset.size(0) == tuple(dataset.image(0).shape[1:]) == (30, 40)


# Labels of whole images.


def test_marks_follow_the_rule_of_voc():
    """One counted object is a positive; difficult objects alone do not count."""
    reader = BoxReader(["a", "b", "c"], "data.train", Findings())
    images = [[(0, False), (0, True)], [(1, True), (1, True), (2, False)], [], [(2, True)]]
    for objects in images:
        index = reader.add_image((9, 9))
        for label, difficult in objects:
            box = (0, 0, 5, 5)
            reader.add_object(index, "x", "abc"[label], box, "", difficult=difficult)
    source = ImageFiles([f"{i}.png" for i in range(4)])
    labels = ImageLabels(DetectionDataset("made", ["a", "b", "c"], source, *reader.arrays()))
    expected = [[1, -1, -1], [-1, 0, 1], [-1, -1, -1], [-1, -1, 0]]
    np.testing.assert_array_equal(labels.marks, expected)
    assert [labels.target(i) for i in range(4)] == expected
    assert labels.labels.tolist() == [0, 2]
    assert labels.class_counts.tolist() == [1, 0, 1]
    assert labels.item(1) == "1.png"


def test_labels_of_images_share_the_images_and_fingerprint_of_the_boxes(tmp_path):
    objects = write_voc(tmp_path, GOOD)()
    labels = ImageLabels(objects)
    assert labels.fingerprint() == objects.fingerprint()
    assert labels.encoded(0) == (tmp_path / "VOC2007/JPEGImages/0.jpg").read_bytes()
    assert len(set(content_hashes(labels.encoded, len(labels)))) == 3
    assert labels.image(1).equal(objects.image(1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_marks_are_those_of_the_class_files_of_voc(split):
    files = sorted((SHARED / "VOCdevkit/VOC2007/ImageSets/Main").glob(f"*_{split}.txt"))
    if not files:
        pytest.skip("no files of a class in ../shared/data/voc")
    labels = ImageLabels(load_voc(SHARED, [f"2007/{split}"]))
    for file in files:
        written = [int(line.split()[1]) for line in file.read_text().splitlines()]
        k = labels.class_names.index(file.stem.removesuffix(f"_{split}"))
        np.testing.assert_array_equal(labels.marks[:, k], written)
