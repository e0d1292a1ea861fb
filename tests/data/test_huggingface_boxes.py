from io import BytesIO

import datasets
import pytest
from box_data import NAMES, picture, write_rows
from PIL import Image

from tract_transfer.data.findings import Findings
from tract_transfer.data.huggingface import load_huggingface_boxes
from tract_transfer.data.images import UndecodableImage

OBJECTS = [("dog", (4, 5, 5, 7.5)), ("cat", (0, 0, 40, 30))]


pytestmark = pytest.mark.usefixtures("offline_cache")


def struct_of_lists(fields):
    return {name: datasets.List(field) for name, field in fields.items()}


def strings(fields):
    return datasets.List({**fields, "category": datasets.Value("string")})


def integers(fields):
    return datasets.List({**fields, "category": datasets.Value("int64")})


@pytest.mark.parametrize("feature", [None, struct_of_lists, integers])
def test_both_layouts_and_plain_integers_read_the_same(feature, tmp_path):
    load = write_rows(tmp_path, OBJECTS, feature)
    dataset = load(classes=NAMES if feature is integers else None)
    assert dataset.class_names == (NAMES if feature is integers else [*NAMES, "eel"])
    target = dataset.target(0)
    assert target["boxes"].tolist() == [[4, 5, 5, 7.5], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [1, 0]
    assert dataset.item(0).endswith("train row 0")


def test_classes_reorder_by_name(tmp_path):
    dataset = write_rows(tmp_path, OBJECTS)(classes=["eel", "dog", "cat"])
    assert dataset.target(0)["labels"].tolist() == [1, 2]


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
def test_every_format_is_the_same_box(box_format, unit, tmp_path):
    write_rows(tmp_path, OBJECTS, box=lambda box: FORMATS[box_format, unit](*box))
    dataset = load_huggingface_boxes(
        str(tmp_path / "train.parquet"), "train", box_format, box_unit=unit
    )
    boxes = dataset.target(0)["boxes"]
    assert (boxes - boxes.new_tensor([[4, 5, 5, 7.5], [0, 0, 40, 30]])).abs().max() < 1e-5


def write_cells(folder, images, things, extra=()):
    """Write rows whose objects have the fields given, and optional columns of integers."""
    fields = {"bbox": datasets.List(datasets.Value("float32")), "category": datasets.Value("int64")}
    fields |= {name: datasets.Value("float32") for name in ("difficult", "iscrowd", "area")}
    features = {"image": datasets.Image(), "objects": datasets.List(fields)}
    features |= {name: datasets.Value("int64") for name in dict(extra)}
    cells = {"image": images, "objects": things, **dict(extra)}
    rows = datasets.Dataset.from_dict(cells, features=datasets.Features(features))
    rows.save_to_disk(folder)
    return str(folder)


def thing(**more):
    given = {"bbox": [1, 2, 3, 4], "category": 0, "difficult": 0, "iscrowd": 0, "area": None}
    return {**given, **more}


def test_flags_and_areas_are_read_from_a_saved_dataset(tmp_path):
    things = [thing(difficult=1), thing(iscrowd=1, area=5.5), thing(difficult=None, iscrowd=None)]
    path = write_cells(tmp_path / "saved", [picture(0), picture(1)], [things, None])
    dataset = load_huggingface_boxes(path, "train", "xywh", classes=["cat"])
    target = dataset.target(0)
    assert target["difficult"].tolist() == [True, True, False]
    assert target["crowd"].tolist() == [False, True, False]
    assert target["area"].tolist() == [12, 5.5, 12]
    assert len(dataset.target(1)["labels"]) == 0


def turned():
    """A picture stored as 30x40 which its EXIF orientation turns to 40x30."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    Image.new("RGB", (30, 40)).save(buffer, "JPEG", exif=exif)
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("extra", "size"),
    [({}, (30, 40)), ({"width": [40], "height": [30]}, (30, 40)),
     ({"width": [30], "height": [40]}, (40, 30))],
)  # fmt: skip
def test_the_size_is_the_annotated_or_the_upright_one(extra, size, tmp_path):
    path = write_cells(tmp_path / "saved", [turned()], [[thing()]], extra)
    dataset = load_huggingface_boxes(path, "train", "xywh", classes=["cat"])
    assert dataset.size(0) == size
    assert tuple(dataset.image(0).shape[1:]) == size


def test_an_empty_cell_is_undecodable_at_its_access(tmp_path, refused):
    path = write_cells(tmp_path / "saved", [None, picture(1)], [[thing()], [thing()]])
    dataset = load_huggingface_boxes(path, "train", "xywh", classes=["cat"])
    with refused(
        "an empty image cell", UndecodableImage, match="row 0 cannot be decoded: it is empty"
    ):
        dataset.image(0)
    assert dataset.image(1).shape == (3, 30, 40)


def test_repeated_image_ids_are_told(tmp_path, refused):
    images, things = [picture(n) for n in range(3)], [[thing()], [], [thing()]]
    path = write_cells(tmp_path / "saved", images, things, {"image_id": [4, 5, 4]})
    with refused(
        "a repeated image_id (Hugging Face)",
        ValueError,
        match=r"row 2 repeats image_id 4 of row 0\. Take",
    ):
        load_huggingface_boxes(path, "train", "xywh", classes=["cat"])
    findings = Findings(collect=True)
    kept = load_huggingface_boxes(path, "train", "xywh", classes=["cat"], findings=findings)
    assert [kept.item(0)[-1], kept.item(1)[-1], len(kept)] == ["0", "1", 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([thing(category=3)], r"row 0 object 1 \(3\): unknown class"),
        ([thing(category=-1)], r"row 0 object 1 \(-1\): unknown class"),
        ([thing(), thing(bbox=[1, 2, 3])], r"object 2 \(cat\): the box must be four numbers"),
        ([thing(bbox=None)], r"the box must be four numbers, not None"),
    ],
)
def test_wrong_objects_name_row_and_number(given, message, tmp_path):
    path = write_cells(tmp_path / "saved", [picture(0)], [given])
    with pytest.raises(ValueError, match=message):
        load_huggingface_boxes(path, "train", "xywh", classes=["cat"])


def test_fields_of_different_length_are_told(tmp_path, refused):
    fields = {"bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    fields["category"] = datasets.List(datasets.Value("int64"))
    cells = {"image": [picture(0)], "objects": [{"bbox": [[1, 2, 3, 4]], "category": [0, 0]}]}
    features = datasets.Features({"image": datasets.Image(), "objects": fields})
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(tmp_path / "saved")
    with refused(
        "objects whose boxes and categories differ in number",
        ValueError,
        match=r"row 0: .* differ in length: {'bbox': 1, 'category': 2}",
    ):
        load_huggingface_boxes(str(tmp_path / "saved"), "train", "xywh", classes=["cat"])


def test_missing_columns_and_classes_name_their_keys(tmp_path, refused):
    load = write_rows(tmp_path, OBJECTS, integers)
    with refused(
        "boxes without class names",
        ValueError,
        match=r"data.val.classes is needed, .*objects.category is no",
    ):
        load(classes=None, key="data.val")
    with refused(
        "a misspelt objects column",
        ValueError,
        match=r"'object' is none. Did you mean 'objects'.*objects_col",
    ):
        load(objects_column="object")
    path = tmp_path / "plain.parquet"
    datasets.Dataset.from_dict({"image": [1], "box": [2]}).to_parquet(path)
    with pytest.raises(ValueError, match="feature Image, but 0 have"):
        load_huggingface_boxes(str(path), "train", "xywh")
