"""What data may not do to the machine that reads them: fill its memory, read or run other files."""

import json
from io import BytesIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from box_data import NAMES, coco_tree, picture, write_voc
from PIL import Image

from tract_transfer.config.schema import ConfigError, load_config
from tract_transfer.data.huggingface import load_huggingface
from tract_transfer.data.coco import load_coco
from tract_transfer.data.findings import is_below
from tract_transfer.data.images import UndecodableImage, decode_image
from tract_transfer.data.voc import load_voc

OBJECTS = [("dog", (4, 5, 5, 7.5))]
OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd"]


def encode(image, format):
    buffer = BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_an_image_of_more_pixels_than_the_limit_is_not_decoded(refused):
    data = encode(picture(1), "PNG")
    assert decode_image(data, "x", max_pixels=1200).shape == (3, 30, 40)
    with refused(
        "an image bomb: more pixels than data.max_pixels",
        UndecodableImage,
        match=r"40x30 pixels, more than data\.max_pixels 1199",
    ):
        decode_image(data, "x", max_pixels=1199)


@pytest.mark.parametrize("format", ["EPS", "PDF"])
def test_formats_that_other_programs_read_are_not_opened(format, refused):
    with refused(f"an image of format {format}", UndecodableImage, match="are no image of"):
        decode_image(encode(picture(1), format), "x")


def test_max_pixels_cannot_be_set_above_what_pil_refuses(refused):
    with refused("data.max_pixels above what PIL decodes", ConfigError, match=r"data\.max_pixels"):
        load_config("configs/quickstart/finetune.yaml", ["data.max_pixels=178956971"])


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_out_of_the_folder_is_not_below_it(name, tmp_path):
    assert not is_below(tmp_path, name)
    assert is_below(tmp_path, "a/b.png")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_voc_id_out_of_the_devkit_is_refused(name, tmp_path, refused):
    write_voc(tmp_path, OBJECTS)
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text(f"{name}\n")
    with refused(f"the VOC image id {name}", ValueError, match="not a path out of the devkit"):
        load_voc(tmp_path, ["2007/train"], NAMES)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_coco_file_name_out_of_the_folder_is_refused(name, tmp_path, refused):
    tree = coco_tree(OBJECTS)
    tree["images"][0]["file_name"] = name
    (tmp_path / "boxes.json").write_text(json.dumps(tree))
    (tmp_path / "images").mkdir()
    with refused(f"the COCO file name {name}", ValueError, match="file_name must be a path below"):
        load_coco(tmp_path / "images", tmp_path / "boxes.json")


def test_a_parquet_cell_cannot_name_a_file_elsewhere(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    secret = tmp_path / "secret.png"
    picture(1).save(secret)
    folder = tmp_path / "data"
    folder.mkdir()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    cells = {"image": [{"bytes": None, "path": str(secret)}] * 2, "label": [0, 1]}
    table = pa.Table.from_pydict(cells, schema=features.arrow_schema)
    pq.write_table(table, folder / "train.parquet")
    with refused("a parquet cell that names a file elsewhere", ValueError, match="not below"):
        load_huggingface(str(folder), "train").image(0)


def test_a_playlist_is_no_video(tmp_path):
    pytest.importorskip("av")
    from tract_transfer.data.images import read_video

    playlist = tmp_path / "x.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        list(read_video(playlist))


def test_the_decoder_knows_what_is_a_picture():
    assert decode_image(encode(Image.new("RGB", (2, 2)), "BMP"), "x").shape == (3, 2, 2)
