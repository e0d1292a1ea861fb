"""Random wrong annotations: a reader raises an error that names the file, or returns valid boxes.

`make fuzz` gives each test 10,000 new inputs; the suite gives it a few, always the same.
"""

import json

import pytest
from box_data import NAMES, SIZE, coco_tree, voc_object, write_coco, write_voc
from fuzzing import damaged, fuzzed, said_by, tree
from hypothesis import given
from hypothesis import strategies as st

from tract_transfer.data.findings import Findings

OBJECTS = [("dog", (4, 5, 5, 7.5)), ("cat", (1, 1, 20, 20))]


def check_boxes(dataset):
    """All boxes that a reader returns are in their images."""
    for index in range(len(dataset)):
        target, (height, width) = dataset.target(index), dataset.size(index)
        assert len(target["labels"]) == len(target["boxes"]) == len(target["area"])
        for x1, y1, x2, y2 in target["boxes"].tolist():
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        assert all(0 <= label < len(dataset.class_names) for label in target["labels"].tolist())


def check_reading(load, file):
    """Every policy returns data or raises an error that names the file."""
    for findings in (Findings(), Findings("clip"), Findings(collect=True)):
        message = said_by(lambda findings=findings: check_boxes(load(findings=findings)))
        assert message is None or str(file) in message


# VOC.

ODD = ["nan", "inf", "-inf", "1e400", "1e-320", "", " ", "0x10", "1_0", "９", "9" * 400, "½", "1,5"]
number = st.one_of(
    st.integers(-9, 50).map(str), st.sampled_from(ODD), st.floats().map(repr), st.text(max_size=4)
)
word = st.one_of(st.sampled_from([*NAMES, "eel", "", "&e;", "<b/>", "]]>"]), st.text(max_size=6))


@st.composite
def element(draw, tag, inside):
    """An element that may be missing, doubled, without an end, or with another one inside."""
    text = draw(inside)
    shape = draw(
        st.sampled_from(["{0}{1}{2}"] * 8 + ["", "{0}{1}{2}{0}{2}", "{0}{1}", "{0}<x>{1}</x>{2}"])
    )
    return shape.format(f"<{tag}>", text, f"</{tag}>")


def joined(*parts):
    return st.tuples(*parts).map("".join)


SIDES = ("xmin", "ymin", "xmax", "ymax")
bndbox = joined(*(element(side, number) for side in SIDES))
thing = joined(
    element("name", word), element("bndbox", bndbox), element("difficult", number | st.just("1"))
)
annotation = joined(
    element("size", joined(element("width", number), element("height", number))),
    st.lists(element("object", thing), max_size=3).map("".join),
)
HEADS = ["", '<?xml version="1.0"?>', '<?xml version="1.0" encoding="utf-16"?>',
         '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>']  # fmt: skip
xml = joined(st.sampled_from(HEADS), element("annotation", annotation))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    return folder / "VOC2007", write_voc(folder, OBJECTS)


XML = f"<annotation>{SIZE}{voc_object('dog', (0, 0, 40, 30))}</annotation>".encode()


@fuzzed
@given(content=xml.map(lambda text: text.encode("utf-8", "surrogatepass")) | damaged(XML))
def test_voc_annotations(voc, content):
    devkit, load = voc
    file = devkit / "Annotations/0.xml"
    file.write_bytes(content)
    check_reading(load, file)


@fuzzed
@given(
    content=damaged(b"0\n1  1\n2 -1\n") | st.text("012 -\n\t/.\u2028", max_size=30).map(str.encode)
)
def test_voc_split_files(voc, content):
    devkit, load = voc
    (devkit / "Annotations/0.xml").write_text("<annotation/>")
    file = devkit / "ImageSets/Main/train.txt"
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        check_reading(load, file)
    finally:
        file.write_bytes(whole)


# COCO.


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return folder / "boxes.json", write_coco(folder, OBJECTS)


@fuzzed
@given(data=st.data())
def test_coco_json(coco, data):
    file, load = coco
    content = coco_tree(OBJECTS)
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["images", "categories", "annotations"]))
        entries = content[part]
        where = data.draw(st.integers(0, len(entries) - 1)) if entries else 0
        keys = sorted(entries[where]) if entries and isinstance(entries[where], dict) else []
        if keys and data.draw(st.integers(0, 9)):
            entries[where][data.draw(st.sampled_from([*keys, "ignore", "area"]))] = data.draw(tree)
        elif entries:
            entries[where] = data.draw(tree)
    if not data.draw(st.integers(0, 9)):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(tree)
    file.write_text(json.dumps(content))
    check_reading(load, file)
