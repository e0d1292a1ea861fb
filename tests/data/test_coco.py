import json

import pytest
from box_data import write_coco

from tract_transfer.data.findings import Findings

OBJECTS = [("dog", (4, 5, 5, 7.5)), ("cat", (0, 0, 40, 30))]


@pytest.mark.parametrize("order", [["cat", "dog"], ["dog", "cat"]])
def test_labels_are_the_categories_by_id_or_by_classes(order, tmp_path):
    load = write_coco(tmp_path / "data", OBJECTS)
    dataset = load() if order == ["cat", "dog"] else load(classes=order)
    assert dataset.class_names == order
    named = [dataset.class_names[label] for label in dataset.target(0)["labels"]]
    assert named == ["dog", "cat"]


def test_crowds_and_ignored_objects_are_difficult(tmp_path):
    def mark(tree):
        tree["annotations"][0] |= {"iscrowd": 1, "area": 2.0}
        tree["annotations"][1] |= {"ignore": 1}
        del tree["annotations"][2]["iscrowd"]

    dataset = write_coco(tmp_path / "data", OBJECTS, mark)()
    target = dataset.target(0)
    assert target["crowd"].tolist() == [True, False]
    assert target["difficult"].tolist() == [True, True]
    assert target["area"].tolist() == [2, 1200]
    assert dataset.target(1)["difficult"].tolist() == [False]


def test_a_missing_size_is_that_of_the_stored_image(tmp_path):
    def forget(tree):
        del tree["images"][0]["width"]

    assert write_coco(tmp_path / "data", OBJECTS, forget)().size(0) == (30, 40)


def set_entry(part, number, **values):
    return lambda tree: tree[part][number].update(values)


MISTAKES = {
    "repeated image id": (set_entry("images", 1, id=30), "images[1] id 30: the id is already used"),
    "repeated file": (set_entry("images", 1, file_name="0.png"), "the file 0.png is already used"),
    "missing file": (set_entry("images", 1, file_name="x.png"), "x.png does not exist. Add it, or"),
    "no file name": (set_entry("images", 1, file_name=None), "images[1] id 29: file_name must be"),
    "repeated annotation id": (set_entry("annotations", 1, id=100), "annotations[1] id 100: the"),
    "no such image": (set_entry("annotations", 1, image_id=7), "image_id 7 is no image's"),
    "no such category": (set_entry("annotations", 1, category_id=1), "category_id 1 is no cat"),
    "list as image": (set_entry("annotations", 1, image_id=[1]), "image_id [1] is no image's"),
    "mapping as category": (set_entry("annotations", 1, category_id={}), "category_id {} is no"),
    "huge box": (set_entry("annotations", 1, bbox=[0, 0, 10**400, 1]), "bbox must be four numb"),
    "three numbers": (set_entry("annotations", 1, bbox=[1, 2, 3]), "bbox must be four numbers"),
    "words": (set_entry("annotations", 1, bbox="1 2 3 4"), "bbox must be four numbers"),
    "strange crowd": (set_entry("annotations", 1, iscrowd=2), "iscrowd and ignore must be 0 or 1"),
    "no id": (lambda tree: tree["annotations"][1].pop("id"), "annotations[1] must be a mapping"),
    "repeated category": (set_entry("categories", 1, name="dog"), "categories[1] id 3: name 'dog'"),
    "no category name": (lambda tree: tree["categories"][0].pop("name"), "name None must be given"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_names_file_and_entry(kind, tmp_path, refused):
    change, message = MISTAKES[kind]
    load = write_coco(tmp_path / "data", OBJECTS, change)
    with refused(f"COCO json: {kind}", (ValueError, FileNotFoundError)) as caught:
        load()
    assert str(tmp_path / "data/boxes.json") in str(caught.value)
    assert message in str(caught.value)
    findings = Findings(collect=True)
    load(findings=findings)
    assert any(message in problem for problem in findings.problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "boxes.json is not a readable json file.* Repair it"),
        ("[" * 100_000, "boxes.json is not a readable json file.* Repair it"),
        ("[]", "must have lists of images, annotations and categories, and has no images"),
        (json.dumps({"images": [], "annotations": [], "categories": []}),
         "names no category. Set data.val.annotations"),
        (json.dumps({"images": [], "annotations": []}), "has no categories. Set data.val.annot"),
        (json.dumps({"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}),
         "has no image to use. Set data.val.annotations"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_says_what_it_must_be(text, message, tmp_path):
    load = write_coco(tmp_path / "data", OBJECTS)
    (tmp_path / "data/boxes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(key="data.val")


def test_ids_may_be_numbers_and_texts(tmp_path):
    def rename(tree):
        tree["categories"][0]["id"] = "7"
        for entry in tree["annotations"]:
            entry["category_id"] = {7: "7"}.get(entry["category_id"], entry["category_id"])

    dataset = write_coco(tmp_path / "data", OBJECTS, rename)()
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.target(0)["labels"].tolist() == [1, 0]


def test_missing_paths_name_their_keys(tmp_path, refused):
    load = write_coco(tmp_path / "data", OBJECTS)
    (tmp_path / "data/images").rename(tmp_path / "data/away")
    with refused(
        "COCO data without their folder of images",
        FileNotFoundError,
        match=r"no folder of images. Set data.train.images",
    ):
        load()
    (tmp_path / "data/boxes.json").unlink()
    with refused(
        "COCO data without their json",
        FileNotFoundError,
        match=r"does not exist. Set data.train.annotations",
    ):
        load()


def test_a_huge_size_does_not_fit_and_a_huge_area_is_the_boxs(tmp_path):
    def grow(tree):
        tree["images"][0]["width"] = 10**400
        tree["annotations"][0]["area"] = 10**400

    dataset = write_coco(tmp_path / "data", OBJECTS, grow)()
    assert dataset.target(0)["area"].tolist()[0] == 2.5
    with pytest.raises(ValueError, match="40x30"):
        dataset.image(0)
