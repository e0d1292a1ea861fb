"""Data that cannot be used: the error names the file, row or line, and the fix."""

import json
import re
from io import BytesIO

import datasets
import image_folders
import numpy as np
import pytest
from box_data import NAMES as PETS
from box_data import picture, write_coco, write_voc
from PIL import Image
from stream_rows import NAMES, huggingface, make_rows, order_of, write_folders, write_shards

from tract_transfer.config.schema import load_config
from tract_transfer.data.classification import ClassificationDataset, hold_out
from tract_transfer.data.digits import load_digits, write_digit_scenes
from tract_transfer.data.findings import Findings
from tract_transfer.data.folder import describe_folder
from tract_transfer.data.huggingface import load_huggingface, load_huggingface_boxes
from tract_transfer.data.images import UndecodableImage, decode_image, read_video
from tract_transfer.data.sampling import EpochOrder, TrainBatchSampler
from tract_transfer.data.streaming import StreamBatches, stream_huggingface
from tract_transfer.data.transforms import detection_train
from tract_transfer.run.evaluate import evaluate_run
from tract_transfer.run.run import run

pytestmark = pytest.mark.usefixtures("offline_cache")
OBJECTS = [("dog", (4, 5, 5, 7.5)), ("cat", (0, 0, 40, 30))]
INTEGER, STRING = datasets.Value("int64"), datasets.Value("string")
ONE_BOX = [("dog", (4, 5, 14, 25))]


# Rows of Hugging Face `datasets`.


def rows(*labels, load=None, split="train", **options):
    """Load parquet rows of these labels, by default three; `load` are the loader's arguments."""

    def make(folder):
        make_rows(list(labels) or 3, **options).to_parquet(folder / "train.parquet")
        load_huggingface(str(folder), split, key="k", **(load or {}))

    return make


def saved(change, read):
    """Save three rows, changed, and read them."""

    def make(folder):
        change(make_rows(3)).save_to_disk(folder / "saved")
        read(load_huggingface(str(folder / "saved"), "train[:0]"))

    return make


def parquet(rows):
    buffer = BytesIO()
    rows.to_parquet(buffer)
    return buffer.getvalue()


def files(contents, path="", load=load_huggingface):
    """Write these files and load split train of a path."""

    def make(folder):
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        load(str(folder / path), "train")

    return make


def cell_of_another_file(load):
    def make(folder):
        picture(1).save(folder / "secret.png")
        (folder / "data").mkdir()
        cells = [{"bytes": None, "path": str(folder / "secret.png")}] * 2
        feature = datasets.Image(decode=False)
        made = make_rows([0, 1], image=(feature, cells)).with_format("arrow")
        datasets.Dataset(made.data).cast_column("image", datasets.Image()).to_parquet(
            folder / "data/train.parquet"
        )
        load(str(folder / "data"), "train").image(0)

    return make


ROW, CUT = parquet(make_rows(1)), {"train.parquet": b"PAR1 cut"}
EELS = parquet(make_rows(3, ["dog", "cat", "eel"]))
HUGGING_FACE = {
    **{f"no path {path}": (
        lambda _, path=path: load_huggingface(path, "train", key="data.val"), FileNotFoundError,
        "absent does not exist. Set data.val.path")
       for path in ("./absent", "~/absent", "/absent")},
    "a hub that does not answer": (lambda _: load_huggingface("owner/absent", "train"),
        ConnectionError, r"save_to_disk.*data.train.path"),
    "a revision of local data": (rows(load={"revision": "main"}), ValueError,
        "has neither revisions nor configurations. Remove k.revision"),
    "a file that is no parquet": (files({"train.csv": b"a,b"}, "train.csv"), ValueError,
        "neither a parquet file nor a folder"),
    "a parquet file of another split": (files({"test.parquet": ROW}, "test.parquet"), ValueError,
        r"no split 'train'.*\['test'\]"),
    "a broken parquet file": (files(CUT), ValueError, "train.parquet|did not load"),
    "no such split": (rows(split="trein"), ValueError,
        r"no split 'trein'. Did you mean 'train'\? Set k.split to one of"),
    "an empty folder": (files({"pets/x": b""}, "pets"), ValueError,
        r"<class>/x.png.*Set data.train.path"),
    "parquet shards of which one is missing": (
        files({"train-00000-of-00002.parquet": ROW}), ValueError,
        "all 2 files of split 'train', but has 1"),
    "a slice without rows": (saved(lambda rows: rows, len), ValueError,
        "has no rows. Set data.train.split"),
    "a saved split without rows": (saved(lambda rows: rows.select([]), len), ValueError,
        "data.train"),
    "no image column": (rows(image=None), ValueError,
        r"k.image_column: set it, as 0 columns hold images .* Columns: label \(ClassLabel\)"),
    "two image columns": (rows(other=(datasets.Image(), [picture(i) for i in range(3)])),
        ValueError, r"k.image_column: set it, as 2 columns .*other \(Image\)"),
    "an image column of labels": (rows(load={"image_column": "label"}), ValueError,
        r"k\.image_column: 'label' must hold images \(the feature Image"),
    "no label column": (rows(label=None), ValueError,
        r"k.label_column: set it, as 0 columns hold a ClassLabel.*image \(Image\)"),
    "integer labels without label_column": (rows(0, 7, feature=INTEGER), ValueError,
        r"k\.label_column: set it.*label \(int64\)"),
    "a misspelt label column": (rows(load={"label_column": "lable"}), ValueError,
        r"k.label_column: 'lable' must hold .* Did you mean 'label'.*image \(Image\)"),
    "labels of one class": (rows(0, 0, names=["cat"]), ValueError,
        r"one class, \['cat'\].*Set k.label_column"),
    "an unlabelled split": (rows(-1, -1), ValueError,
        r"split train row 0: label -1 in column 'label' must be in 0\.\.2.*unlabelled.*k\.split"),
    "a negative label": (rows(0, 1, -3, feature=INTEGER, load={"label_column": "label"}),
        ValueError, "row 2: label -3"),
    "an unsigned row without a label": (
        rows(1, None, feature=datasets.Value("uint8"), load={"label_column": "label"}), ValueError,
        "row 1: label -1"),
    "integers that are no class numbers": (
        rows(0, 5_000_000_000, feature=INTEGER, load={"label_column": "label"}), ValueError,
        r"k\.label_column: its integers reach 5000000000.*Number them 0, 1"),
    **{f"labels of type {dtype}": (
        rows(*labels, feature=feature, load={"label_column": "label"}), ValueError,
        rf"k\.label_column: 'label' must hold .*class_encode_column.*label \({dtype}\)")
       for dtype, feature, labels in [("string", STRING, ["b", "a"]),
           ("float32", datasets.Value("float32"), [0.0, 1.0]),
           ("List", datasets.List(INTEGER), [[0, 1], [1]])]},
    "a parquet cell that names a file elsewhere": (
        cell_of_another_file(load_huggingface), ValueError, "row 0 is the file .* not below"),
}  # fmt: skip


# Streams.


def stream(split="train", names=NAMES, **options):
    """Stream shards of 70 rows."""

    def make(folder):
        return stream_huggingface(write_shards(folder, names=names), split, **options)

    return make


def batches(*where, **order):
    def make(folder):
        opened = stream()(folder)
        StreamBatches(opened, order_of(opened, **order), *where)

    return make


STREAMS = {
    "a slice of a stream": (stream("train[:10%]"), ValueError,
        r"split: train\[:10%\] is a slice.*set data.train.streaming: false"),
    "num_classes of named classes": (stream(num_classes=3), ValueError,
        "num_classes: 'label' has its own classes"),
    "num_classes of an image folder": (
        lambda folder: stream_huggingface(write_folders(folder), "train", num_classes=3),
        ValueError, "num_classes: the folders of .* are its classes"),
    "streamed integers without num_classes": (
        stream(names=None, label_column="label"), ValueError,
        r"data.train.num_classes: 'label' holds integers"),
    "a streamed label above num_classes": (
        stream(names=None, label_column="label", num_classes=2), ValueError,
        r"row 2: label 2 .*must be in 0\.\.1"),
    "a streamed parquet file cut short": (files(CUT, load=stream_huggingface), ValueError,
        "no complete parquet file"),
    "a streamed parquet cell that names a file elsewhere": (
        cell_of_another_file(stream_huggingface), ValueError, "row 0 is the file .* not below"),
    "streamed shards of other classes": (
        files({"train-00000-of-00002.parquet": ROW, "train-00001-of-00002.parquet": EELS},
            load=stream_huggingface), ValueError,
        r"same columns and classes, and .*00001-of-00002"),
    "data.readers that do not divide the batch": (batches(readers=3), ValueError,
        r"data.readers must divide .* 3 does not divide 8"),
    "fewer readers than processes": (batches(0, 0, 8), ValueError,
        r"data.readers must be a multiple of .* 8, got 4"),
    "a streamed batch that does not divide": (batches(0, 0, 1, 3), ValueError,
        "divisible by processes x engine.accumulate"),
}  # fmt: skip


# Boxes of a VOC devkit and of Hugging Face rows; COCO's are below, and invalid boxes of all formats
# in test_detection.py.


def box(*corners):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False)
    return "<bndbox>" + "".join(f"<{side}>{value}</{side}>" for side, value in sides) + "</bndbox>"


def thing(name="cat", corners=(1, 1, 40, 30), more=""):
    return f"<object><name>{name}</name>{more}{box(*corners)}</object>"


def voc(annotation=None, lines=None, remove=None, **options):
    """Load a devkit whose first annotation, split file or files are changed."""

    def make(folder):
        load = write_voc(folder, ONE_BOX)
        devkit = folder / "VOC2007"
        if annotation is not None:
            (devkit / "Annotations/0.xml").write_text(annotation)
        if lines is not None:
            (devkit / "ImageSets/Main/train.txt").write_bytes(lines)
        if remove is not None:
            (devkit / remove).unlink()
        load(key="data.val", **options)

    return make


def voc_object(objects):
    size = "<size><width>40</width><height>30</height></size>"
    return voc(f"<annotation>{size}{objects}</annotation>")


def xml(head):
    return voc(f"{head}<annotation><folder>&e;</folder>{thing()}</annotation>")


VOC = {
    "no VOC devkit of that year": (voc(sets=["2012/train"]), FileNotFoundError,
        r"No VOC devkit for '2012'.*VOC2012/Annotations.*Set data.val.root"),
    "no VOC split file": (voc(sets=["2007/trian"]), FileNotFoundError,
        r"trian.txt does not exist. Did you mean 'train'.*Set data.val.sets"),
    "a VOC set without a split": (voc(sets=["2007"]), ValueError, "must be <year>/<split>"),
    "a blank VOC split file": (voc(lines=b"\n  \n"), ValueError,
        r"train.txt names no image. Set data.val.sets"),
    "a malformed line of a VOC split file": (voc(lines=b"1 1 1\n"), ValueError,
        "train.txt line 1 must be an id, or an id and 1, 0 or -1, not '1 1 1'"),
    "a VOC split file that is no text": (voc(lines=b"0\n\xff\xfe\n"), FileNotFoundError,
        "train.txt line 2 needs"),
    "a repeated VOC image id": (voc(lines=b"0\n1\n0\n"), ValueError,
        r"train.txt line 3 repeats '0', already in .*train.txt line 1. Remove one"),
    "no VOC annotation": (voc(remove="Annotations/1.xml"), FileNotFoundError,
        r"train.txt line 2 needs .*1.xml, which does not exist"),
    "no VOC image": (voc(remove="JPEGImages/1.jpg"), FileNotFoundError,
        r"train.txt line 2 needs .*1.jpg, which does not exist"),
    "broken XML": (voc("<annotation><object>"), ValueError,
        "0.xml is not a readable XML file.*Repair it"),
    "XML with an entity bomb": (
        xml('<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;"><!ENTITY e "&b;&b;">]>'), ValueError,
        "0.xml is not a readable XML file"),
    "XML with an external entity": (
        xml('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>'), ValueError,
        "0.xml is not a readable XML file"),
    "XML of an unknown encoding": (xml('<?xml version="1.0" encoding="none-such"?>'), ValueError,
        "0.xml is not a readable XML file"),
    "an unknown VOC class": (voc_object(thing() + thing("catt")), ValueError,
        r"0.xml object 2 \(catt\): unknown class. Did you mean 'cat'.*Classes: cat, dog.*"
        "set data.val.classes"),
    "a missing VOC corner": (voc_object(thing(corners=(1, 1, 40))), ValueError,
        r"object 1 \(cat\): the box must be four finite numbers, not xmin 1, .*ymax None"),
    "a VOC corner of words": (voc_object(thing(corners=(1, 1, "wide", 30))), ValueError,
        "four finite numbers, not .*xmax wide"),
    "a VOC difficult flag of words": (
        voc_object(thing(more="<difficult>yes</difficult>")), ValueError,
        "<difficult> must be 0 or 1, not 'yes'"),
    **{f"the VOC image id {name}": (voc(lines=name.encode()), ValueError,
        "not a path out of the devkit") for name in ["../secret", "a/../../secret", "/etc/passwd"]},
}  # fmt: skip


def coco(change=None, text=None, remove=()):
    """Load COCO data whose json is changed."""

    def make(folder):
        load = write_coco(folder / "data", OBJECTS, change)
        if text is not None:
            (folder / "data/boxes.json").write_text(text)
        for name in remove:
            (folder / "data" / name).rename(folder / "data/moved")
        load(key="data.val")

    return make


def entry(part, number, **values):
    return lambda tree: tree[part][number].update(values)


EMPTY = {"images": [], "annotations": [], "categories": []}
# What is wrong -> how the json is changed, and the end of the message.
COCO_ENTRIES = {
    "repeated image id": (entry("images", 1, id=30), r"images\[1\] id 30: the id is already used"),
    "repeated file": (entry("images", 1, file_name="0.png"), "the file 0.png is already used"),
    "missing file": (entry("images", 1, file_name="x.png"),
        "x.png does not exist. Add it, or set data.val.images"),
    "no file name": (entry("images", 1, file_name=None),
        r"images\[1\] id 29: file_name must be a path below"),
    "repeated annotation id": (entry("annotations", 1, id=100), r"annotations\[1\] id 100: the id"),
    "no such image": (entry("annotations", 1, image_id=7), "image_id 7 is no image's"),
    "no such category": (entry("annotations", 1, category_id=1), "category_id 1 is no category's"),
    "list as image": (entry("annotations", 1, image_id=[1]), r"image_id \[1\] is no image's"),
    "mapping as category": (entry("annotations", 1, category_id={}), "category_id {} is no"),
    "huge box": (entry("annotations", 1, bbox=[0, 0, 10**400, 1]), "be four finite numbers"),
    "three numbers": (entry("annotations", 1, bbox=[1, 2, 3]), "be four finite numbers"),
    "words": (entry("annotations", 1, bbox="1 2 3 4"), "be four finite numbers"),
    "strange crowd": (entry("annotations", 1, iscrowd=2), "iscrowd and ignore must be 0 or 1"),
    "no id": (lambda tree: tree["annotations"][1].pop("id"), r"annotations\[1\] must be a mapping"),
    "repeated category": (entry("categories", 1, name="dog"), r"categories\[1\] id 3: name 'dog'"),
    "no category name": (lambda tree: tree["categories"][0].pop("name"), "name None must be given"),
    **{f"file name {name}": (entry("images", 0, file_name=name), "file_name must be a path below")
       for name in ["../secret", "a/../../secret", "/etc/passwd"]},
}  # fmt: skip
COCO = {
    "COCO data without their json": (coco(remove=["boxes.json"]), FileNotFoundError,
        r"does not exist. Set data.val.annotations"),
    "COCO data without their folder of images": (coco(remove=["images"]), FileNotFoundError,
        r"no folder of images. Set data.val.images"),
    "COCO json cut short": (coco(text="{"), ValueError,
        "boxes.json is not a readable json file.* Repair it"),
    "COCO json of endless depth": (coco(text="[" * 100_000), ValueError,
        "boxes.json is not a readable json file"),
    "COCO json of a list": (coco(text="[]"), ValueError,
        "must have lists of images, annotations and categories, and has no images"),
    "COCO json without categories": (coco(text='{"images": [], "annotations": []}'), ValueError,
        "has no categories. Set data.val.annotations"),
    "COCO json that names no category": (coco(text=json.dumps(EMPTY)), ValueError,
        "names no category. Set data.val.annotations"),
    "COCO json without an image": (
        coco(text=json.dumps({**EMPTY, "categories": [{"id": 1, "name": "a"}]})), ValueError,
        "has no image to use. Set data.val.annotations"),
    **{f"COCO json: {name}": (coco(change), (ValueError, FileNotFoundError),
        f"data/boxes.json .*{message}") for name, (change, message) in COCO_ENTRIES.items()},
}  # fmt: skip


BBOX = datasets.List(datasets.Value("float32"))
UNEVEN = {"bbox": datasets.List(BBOX), "category": datasets.List(INTEGER)}


def cells(*things, load=None, feature=None, **columns):
    """Load rows whose objects have these fields."""

    def make(folder):
        fields = feature or datasets.List({"bbox": BBOX, "category": INTEGER})
        column = (fields, list(things))
        images = (datasets.Image(), [picture(i) for i in range(len(things))])
        made = make_rows(len(things), label=None, image=images, objects=column, **columns)
        made.save_to_disk(folder / "saved")
        options = {"classes": ["cat"], **(load or {})}
        load_huggingface_boxes(str(folder / "saved"), "train", "xywh", key="data.val", **options)

    return make


GOOD = {"bbox": [1, 2, 3, 4], "category": 0}
BOXES = {
    "a label of no class": (cells([{**GOOD, "category": 3}]), ValueError,
        r"row 0 object 1 \(3\): unknown class"),
    "a negative class": (cells([{**GOOD, "category": -1}]), ValueError,
        r"row 0 object 1 \(-1\): unknown class"),
    "a box of three numbers": (cells([GOOD, {**GOOD, "bbox": [1, 2, 3]}]), ValueError,
        r"object 2 \(cat\): the box must be four finite numbers"),
    "no box": (cells([{**GOOD, "bbox": None}]), ValueError,
        "the box must be four finite numbers, not xywh None"),
    "a repeated image_id": (cells([GOOD], [], [GOOD], image_id=(INTEGER, [4, 5, 4])), ValueError,
        r"row 2 repeats image_id 4 of row 0\. Remove one"),
    "boxes and categories that differ in number": (
        cells({"bbox": [[1, 2, 3, 4]], "category": [0, 0]}, feature=UNEVEN), ValueError,
        r"row 0: .* differ in length: {'bbox': 1, 'category': 2}"),
    "boxes without class names": (cells([GOOD], load={"classes": None}), ValueError,
        r"data.val.classes is needed, .*objects.category is no"),
    "a misspelt objects column": (cells([GOOD], load={"objects_column": "object"}), ValueError,
        r"data.val.objects_column: 'object' must .* Did you mean 'objects'"),
    "repeated classes": (cells([GOOD], load={"classes": ["cat", "dog", "cat"]}), ValueError,
        r"data.val.classes must be different .* \['cat'\] more than once"),
    "no class of boxes": (cells([GOOD], load={"classes": []}), ValueError,
        "data.val.classes must be different names, got none"),
}  # fmt: skip


# Images and videos.


def encode(image, format="PNG", cut=False):
    buffer = BytesIO()
    image.save(buffer, format)
    data = buffer.getvalue()
    return data[: len(data) // 2] if cut else data


def image(data, **options):
    return lambda _: decode_image(data, "split train row 17", **options)


def empty_cell(folder):
    make_rows(2, image=(datasets.Image(), [None, picture(1)])).save_to_disk(folder / "saved")
    load_huggingface(str(folder / "saved"), "train").image(0)


def playlist(folder):
    pytest.importorskip("av")
    (folder / "x.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    list(read_video(folder / "x.mp4"))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 180, 3), np.uint8))
FLOATS = Image.fromarray(np.ones((8, 8), np.float32))
IMAGES = {
    "an image without bytes": (image(b""), UndecodableImage,
        r"train row 17 cannot be decoded: it is empty.*data.undecodable: skip"),
    "an image of other bytes": (image(b"not an image"), UndecodableImage, "no image of"),
    "a truncated JPEG": (image(encode(NOISE, "JPEG", cut=True)), UndecodableImage, "truncated"),
    "a truncated PNG": (image(encode(NOISE, cut=True)), UndecodableImage, "train row 17 cannot"),
    "a TIFF of floats": (image(encode(FLOATS, "TIFF")), UndecodableImage, "float"),
    "an image of format EPS": (image(encode(NOISE, "EPS")), UndecodableImage, "are no image of"),
    "an image of more pixels than data.max_pixels": (
        image(encode(picture(1)), max_pixels=1199), UndecodableImage,
        r"40x30 pixels, more than data\.max_pixels 1199"),
    "data.max_pixels above what PIL decodes": (
        lambda _: load_config("configs/quickstart/finetune.yaml", ["data.max_pixels=178956971"]),
        ValueError, r"data\.max_pixels"),
    "an empty image cell": (empty_cell, UndecodableImage, "row 0 cannot be decoded: it is empty"),
    "a missing image file": (lambda folder: decode_image(folder / "x.png", "x"), FileNotFoundError,
        "x.png"),
    "a playlist as a video": (playlist, ValueError, "cannot be read as a video"),
}  # fmt: skip


# Arguments.


def scenes(folder):
    write_digit_scenes(folder / "s", num_train=2, num_test=1, size_px=64)
    write_digit_scenes(folder / "s", num_train=3, num_test=1, size_px=64)


def order(count, batch_size, **options):
    return lambda _: EpochOrder(count, batch_size, 0, **options)


TALL = (np.arange(30) % 3 == 0).astype(np.int64)  # 10 of 30
ONE_EACH = ClassificationDataset("pets", PETS, np.arange(2), None)
ARGUMENTS = {
    "a digit that is none": (lambda _: load_digits("train", [1, 12]), ValueError,
        r"data.train.classes must be different digits in 0\.\.9, got \[1, 12\]"),
    "a split that digits do not have": (lambda _: load_digits("val"), ValueError,
        "no split 'val'. Set data.train.split"),
    "digit scenes over other digit scenes": (scenes, ValueError,
        "must be empty or contain digit scenes"),
    "a part held out of single images": (lambda _: hold_out(ONE_EACH, 0.5, 0), ValueError,
        "no class has two images"),
    "a batch larger than the data": (order(10, 11), ValueError,
        r"data.batch_size must lie in 1\.\.10, .* got 11. Set data.batch_size to 10"),
    "fewer tall images than a batch": (order(30, 12, groups=TALL), ValueError,
        "10 images that are tall: fewer than data.batch_size 12"),
    "a batch of the copies of one image": (order(30, 5, repeats=3), ValueError,
        r"batch_size must be 6 or more with data.repeats = 3, got 5"),
    "a batch that does not divide": (
        lambda _: TrainBatchSampler(EpochOrder(10, 6, 0), 0, 0, 2, 2), ValueError,
        "2 x 2 = 4, got 6. Set data.batch_size to 4, or another"),
    "a short side above the long one": (lambda _: detection_train([200], 100, 0.5), ValueError,
        "short_sides_px"),
}  # fmt: skip


# Folders in place of a config.


def folder(write):
    """Describe what `write` makes of a folder named `given`."""

    def make(base):
        (base / "given").mkdir()
        describe_folder(write(base / "given") or base / "given")

    return make


def file(name):
    return folder(lambda given: (given / name).touch() or given / name)


def clash(given):
    image_folders.classes(given, names=("bus", "train"))


def beside(given):
    image_folders.draw(image_folders.classes(given) / "x.png", 1)


def nested(given):
    image_folders.draw(image_folders.classes(given) / "ant/small/x.png", 1)


def run_folder(given):
    (given / "checkpoints").mkdir()
    (given / "config.yaml").touch()


def yolo(given):
    image_folders.draw(given / "images/train/1.png", 1)
    image_folders.draw(given / "images/val/1.png", 1)
    (given / "labels").mkdir()
    (given / "labels/1.txt").write_text("0 0.5 0.5 1 1")


def no_train_file(given):
    image_folders.devkit(given)
    (given / "VOC2007/ImageSets/Main/train.txt").unlink()


def no_images(given):
    image_folders.coco(given, "train", "val")
    (given / "train").rename(given / "photos")


def broken_json(given):
    (given / "_annotations.coco.json").write_text("{")


def broken_metadata(given):
    image_folders.metadata(given)
    (given / "metadata.jsonl").write_text('{"file_name": 1}')


def text_labels(given):
    column = (STRING, ["cat", "dog", "cat"])
    make_rows(3, label=None, breed=column).to_parquet(given / "train.parquet")


def ambiguous_boxes(given):
    image_folders.boxes(given, [("dog", (1, 2, 3, 5))])


FOLDERS = {
    "a folder that does not exist": (lambda base: describe_folder(base / "x"), FileNotFoundError,
        "x does not exist. Give the folder of the images"),
    "a folder without an entry": (folder(lambda _: None), ValueError, "given is empty"),
    "a folder of hidden files": (folder(lambda f: (f / ".DS_Store").touch()), ValueError, "empty"),
    "a folder of a run": (folder(run_folder), ValueError,
        r"is the folder of a run.*--weights .*given.*--config-file .*config.yaml --resume"),
    "an archive": (file("x.zip"), ValueError, "is an archive. Unpack it"),
    "an image in place of a folder": (file("x.jpg"), ValueError, "one image. Give the folder"),
    "a YAML file in place of a folder": (file("x.yaml"), ValueError, "with --config-file"),
    "a text file in place of a folder": (file("x.txt"), ValueError, "or a parquet file"),
    "a folder of one class": (folder(lambda f: image_folders.classes(f, names=("cat",)) and None),
        ValueError, "has one class, 'cat', and classification needs two"),
    "images without classes": (folder(lambda f: image_folders.draw(f / "x.png", 1) and None),
        ValueError, r"(?s)Looked for:.*class folders: .*Found: 1 .png.*sort them into a folder"),
    "a folder of unknown content": (folder(yolo), ValueError,
        r"(?s)nothing that can be trained on.*Found: 2 .png, 1 .txt; at the top: images/, labels/"),
    "two spellings of a split": (folder(lambda f: image_folders.split_classes(f, train=3, val=3,
        valid=3) and None), ValueError, "two parts that read as val: val and valid"),
    "a class that reads as a split": (folder(clash), ValueError, "class 'train', which reads as"),
    "an image beside the class folders": (folder(beside), ValueError,
        "x.png is not in .*given/<class>/"),
    "an image below a class folder": (folder(nested), ValueError, "x.png is not in .*/<class>/"),
    "no split that is train": (folder(lambda f: image_folders.parquet(f / "x", "test", "val")),
        ValueError, r"has the splits \['test', 'val'\], and none of them is train"),
    "rows without images": (folder(lambda f: make_rows(3, image=None).to_parquet(
        f / "train.parquet") and None), ValueError, "no column has the feature Image"),
    "labels of text": (folder(text_labels), ValueError,
        r"no column has labels \(ClassLabel, or integers named label\) or boxes.*class_encode"),
    "a folder of a broken parquet file": (folder(lambda f: (f / "train.parquet").write_bytes(
        b"PAR1 cut") and None), ValueError, "not a readable parquet file"),
    "metadata that do not load": (folder(broken_metadata), ValueError, "metadata in .* do not"),
    "boxes of an unknown format": (folder(ambiguous_boxes), ValueError,
        "boxes in column objects fit as .* and as .*data.train.box_format"),
    "a devkit without train.txt": (folder(no_train_file), ValueError,
        "has neither train.txt nor trainval.txt. Write the ids"),
    "a COCO file without its images": (folder(no_images), ValueError,
        "The images of .*instances_train.json are in none of"),
    "a COCO file that is no json": (folder(broken_json), ValueError, "not a readable json file"),
}  # fmt: skip
TABLE = HUGGING_FACE | STREAMS | VOC | COCO | BOXES | IMAGES | ARGUMENTS | FOLDERS


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused(name, tmp_path, refused):
    make, kind, match = TABLE[name]
    with refused(name, kind, match=match):
        make(tmp_path)


@pytest.mark.parametrize("name", COCO_ENTRIES)
def test_collecting_reports_a_wrong_entry(name, tmp_path):
    change, message = COCO_ENTRIES[name]
    findings = Findings(collect=True)
    write_coco(tmp_path / "data", OBJECTS, change)(findings=findings, key="data.val")
    assert any(re.search(message, text) for text in findings.problems)


# In a run: the same policy in every split, before anything is written.


@pytest.fixture
def devkits(tmp_path):
    """Return the overrides of a run of which one split is changed."""

    def make(split, change, *more):
        sources = []
        for name, shade in (("train", 0), ("test", 3)):
            write_voc(tmp_path / name, ONE_BOX)
            for index in range(3):
                picture(index + shade).save(tmp_path / name / f"VOC2007/JPEGImages/{index}.jpg")
            source = f"source: voc, root: {tmp_path / name}, sets: [2007/train], classes: {PETS}"
            sources.append(f"data.{name}={{{source}}}")
        change(tmp_path / split / "VOC2007")
        return [*sources, "data.batch_size=3", "solver.max_iters=2", *more]

    return make


def widen_box(devkit):
    file = devkit / "Annotations/0.xml"
    file.write_text(file.read_text().replace("<xmax>14<", "<xmax>80<"))


def break_images(devkit):
    (devkit / "JPEGImages/1.jpg").write_bytes(b"no image")
    file = devkit / "JPEGImages/2.jpg"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (widen_box, r"0.xml object 1 \(dog\): the box must lie in the image"),
        (break_images, r"[12]\.jpg cannot be decoded.*or set data.undecodable: skip"),
    ],
)
def test_bad_images_end_a_run_and_bad_boxes_before_it_writes_anything(
    change, message, split, devkits, tmp_path, load_tiny
):
    with pytest.raises(ValueError, match=message):
        run(load_tiny(tmp_path, *devkits(split, change), task="detection"))
    assert not (tmp_path / "run/results.json").exists()
    assert change is break_images or not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_skipped_images_of_a_detector_are_listed(split, devkits, tmp_path, load_tiny):
    words = devkits(split, break_images, "data.undecodable=skip")
    skipped = run(load_tiny(tmp_path, *words, task="detection"))["skipped"]
    assert [text.partition(".jpg")[0][-1] for text in skipped] == ["1", "2"]


@pytest.fixture
def pets(tmp_path):
    """Overrides of image rows, of which row 5 of each split is broken."""
    (tmp_path / "pets").mkdir()
    for split, first in (("train", 0), ("test", 100)):
        cells = [{"bytes": encode(picture(first + i)), "path": None} for i in range(12)]
        cells[5]["bytes"] = b"no image"
        made = make_rows(12, image=(datasets.Image(decode=False), cells))
        made = made.cast_column("image", datasets.Image())
        made.to_parquet(tmp_path / f"pets/{split}.parquet")
    return huggingface(tmp_path / "pets", "data.batch_size=4")


def test_the_error_of_a_worker_has_no_traceback(pets, tmp_path, load_tiny):
    with pytest.raises(UndecodableImage, match=r"split train row 5 cannot be decoded") as caught:
        run(load_tiny(tmp_path, *pets, "data.num_workers=1"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "more"), [("classification", ["data.cache=ram"]), ("probe", ["data.num_workers=1"])]
)
def test_undecodable_rows_are_skipped_and_listed(task, more, pets, tmp_path, load_tiny, caplog):
    results = run(load_tiny(tmp_path, *pets, "data.undecodable=skip", *more, task=task))
    for split, text in zip(("test", "train"), sorted(results["skipped"]), strict=True):
        assert f"split {split} row 5: its 8 bytes are no image of" in text
    assert "data.undecodable: skip" in caplog.text


def test_a_run_is_evaluated_under_another_protocol_but_not_with_other_classes(
    devkits, tmp_path, load_tiny
):
    words = devkits("train", lambda _: None)
    metrics = run(load_tiny(tmp_path, *words, task="detection"))["metrics"]
    config = load_tiny(tmp_path, *words, "evaluation.protocol=detectron2", task="detection")
    assert evaluate_run(config).keys() == metrics.keys()
    details = json.loads((tmp_path / "run/evaluation.json").read_text())["details"]
    assert "detectron2" in details["protocol"]
    more = [f"data.{split}.classes=[cat, dog, eel]" for split in ("train", "test")]
    with pytest.raises(ValueError, match="data of the same classes"):
        evaluate_run(load_tiny(tmp_path, *words, *more, task="detection"))
