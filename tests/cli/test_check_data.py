"""tools/check_data.py as its user runs it, in this process."""

import json
import sys
from pathlib import Path

import datasets
import pytest
from box_data import write_coco, write_voc
from PIL import Image

from tract_transfer.cli import check_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Run the tool's main(); return its exit code, what it printed, and its json."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(config_file, *overrides):
        path = tmp_path / "report.json"
        words = ["check_data.py", "--config-file", config_file, "--json", path, *overrides]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        code = check_data.main()
        said = capsys.readouterr()
        return code, said.out + said.err, json.loads(path.read_text()) if path.exists() else None

    return run


OBJECTS = [("dog", (4, 5, 14, 25))]


def write_config(write_tiny, folder):
    """A detection config whose train is a VOC devkit and whose test is a COCO file."""
    write_voc(folder / "voc", OBJECTS)
    write_coco(folder / "coco", OBJECTS)
    for index in range(3):  # other pictures than train's
        Image.new("RGB", (40, 30), (9, 9, 60 * index)).save(folder / f"coco/images/{index}.png")
    return write_tiny(folder, "detection"), [
        f"data.train={{source: voc, root: {folder / 'voc'}, sets: [2007/train], "
        "classes: [cat, dog]}",
        f"data.test={{source: coco, images: {folder / 'coco/images'}, "
        f"annotations: {folder / 'coco/boxes.json'}}}",
    ]


def test_clean_data_end_with_status_0(check, write_tiny, tmp_path):
    code, text, report = check(*flat(write_config(write_tiny, tmp_path)))
    assert code == 0, text
    assert report["is_clean"]
    assert report["splits"]["train"]["statistics"]["classes"]["dog"] == {"images": 2, "objects": 2}
    assert "0 problems" in text
    assert "images 2, objects 2" in text
    assert "train has no example of 1 of 2 classes: cat" in report["warnings"]


def flat(written):
    return written[0], *written[1]


def test_everything_broken_is_told_at_once(check, write_tiny, tmp_path):
    written = write_config(write_tiny, tmp_path)
    devkit = tmp_path / "voc/VOC2007"
    (devkit / "Annotations/0.xml").write_text("<annotation>")
    (devkit / "JPEGImages/1.jpg").write_bytes(b"none")
    (tmp_path / "coco/images/2.png").unlink()
    boxes = tmp_path / "coco/boxes.json"
    boxes.write_text(boxes.read_text().replace("[0, 0, 40, 30]", "[0, 0, 90, 30]"))
    more = ("data.undecodable=skip", "data.invalid_boxes=clip")  # pass over, but not here
    code, text, report = check(*flat(written), *more)
    assert code == 1
    train, test = (report["splits"][name]["problems"] for name in ("train", "test"))
    assert [("0.xml" in train[0]), ("1.jpg" in train[1]), len(train)] == [True, True, 2]
    assert ["2.png does not exist" in test[0], "[0, 0, 90, 30]" in test[1], len(test)] == [
        True, True, 2,
    ]  # fmt: skip
    for problem in [*train, *test]:
        assert problem in text
    assert "4 problems" in text


def test_a_split_that_does_not_load_leaves_the_others(check, write_tiny, tmp_path):
    path, overrides = write_config(write_tiny, tmp_path)
    (tmp_path / "coco/boxes.json").write_text("{")
    code, text, report = check(path, *overrides)
    assert code == 1
    assert "not a readable json file" in text
    assert report["splits"]["test"]["statistics"] is None
    assert report["splits"]["train"]["problems"] == []


def test_the_same_picture_in_two_splits_is_worth_a_look(check, write_tiny, tmp_path):
    written = write_config(write_tiny, tmp_path)
    picture = tmp_path / "coco/images/0.png"
    with Image.open(tmp_path / "voc/VOC2007/JPEGImages/1.jpg") as image:
        image.save(picture)
    code, _, report = check(*flat(written))
    assert code == 0
    (warning,) = [each for each in report["warnings"] if "shows the same" in each]
    assert str(picture) in warning
    assert "1.jpg" in warning


def test_an_image_that_may_be_upside_down_is_worth_a_look(check, write_tiny, tmp_path):
    written = write_config(write_tiny, tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = tmp_path / "voc/VOC2007/JPEGImages/1.jpg"
    Image.new("RGB", (40, 30), (9, 9, 200)).save(picture, exif=exif)
    code, text, report = check(*flat(written))
    assert code == 0
    (warning,) = [each for each in report["warnings"] if "EXIF orientation 3" in each]
    assert warning.startswith(f"train: {picture}")
    assert warning in text


def test_classes_that_differ_between_splits_are_broken(check, write_tiny, tmp_path):
    written = write_config(write_tiny, tmp_path)
    code, text, report = check(*flat(written), "data.test.classes=[dog, cat]")
    assert code == 1
    assert "same classes in the same order" in report["problems"][0]
    assert report["problems"][0] in text


def test_every_unlabelled_row_is_told(check, write_tiny, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(4)], "label": [0, -1, 1, 5]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    ).cast_column("label", datasets.Value("int64"))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = rows.data.table.cast(features.arrow_schema)
    datasets.Dataset(table).to_parquet(tmp_path / "train.parquet")
    source = f"{{source: huggingface, path: {tmp_path / 'train.parquet'}, split: train}}"
    overrides = (f"data.train={source}", "data.test={source: digits, split: test}")
    code, _, report = check(write_tiny(tmp_path), *overrides)
    assert code == 1
    problems = report["splits"]["train"]["problems"]
    assert ["row 1: label -1" in problems[0], "row 3: label 5" in problems[1]] == [True, True]
    assert report["splits"]["train"]["statistics"]["images"] == 2


def test_a_wrong_config_ends_with_status_2(check, write_tiny, tmp_path):
    code, text, report = check(write_tiny(tmp_path), "data.trian=1")
    assert (code, report) == (2, None)
    assert "data.trian: unknown. Did you mean data.train?" in text
