"""predict.py gives the predictions of the trained model for images and videos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tract_transfer.data.images import frame_rate, read_video, write_video
from tract_transfer.run.run import run
from tract_transfer.run.trained import TrainedDetector, load


@pytest.fixture(scope="module", params=["classification", "detection"])
def trained(request, load_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run(load_tiny(folder, "solver.max_iters=2", task=request.param))
    return folder / "run"


@pytest.fixture
def photos(tmp_path):
    """Two images of different size in a folder, one of them gray, and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (90, 40), dtype=np.uint8)).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def entries_of(folder):
    return json.loads((folder / "predictions.json").read_text())["predictions"]


def test_images_of_a_folder_are_predicted(trained, photos, call, tmp_path):
    model = load(trained)
    right, wrong, options = ("--min-score", 0), ("--top-k", 2), {}
    if not isinstance(model, TrainedDetector):
        right, wrong, options = wrong, right, {"top_k": 2}
    words = ("--run", trained, photos, "--output", tmp_path / "out")
    done = call("predict.py", *words, *wrong)
    assert done.returncode == 2
    assert f"{wrong[0]} is for " in done.stderr
    done = call("predict.py", *words, *right)
    assert done.returncode == 0, done.stderr
    entries = entries_of(tmp_path / "out")
    assert [entry["file"] for entry in entries] == [str(photos / n) for n in ("a.png", "b.jpg")]
    assert [(e["width"], e["height"]) for e in entries] == [(70, 50), (40, 90)]
    arrays = [np.array(Image.open(entry["file"]).convert("RGB")) for entry in entries]
    for entry, expected in zip(entries, model.predict(arrays, **options), strict=True):
        assert entry["scores"] == pytest.approx(expected.scores.tolist(), abs=0)
        assert entry["labels"] == expected.labels
    drawn = sorted(path.name for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == (["a.png.png", "b.jpg.png"] if isinstance(model, TrainedDetector) else [])


def test_a_moved_run_predicts_without_data_and_initial_weights(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tract_transfer.run.trained.build_data", None)
    moved = tmp_path / "elsewhere"
    trained.rename(moved)
    try:
        model = load(moved, device="cpu")
    finally:
        moved.rename(trained)
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    (prediction,) = model.predict([image])
    assert len(prediction.scores) == len(prediction.labels)
    assert (prediction.scores.diff() <= 0).all()
    if not isinstance(model, TrainedDetector):
        assert prediction.scores.sum() == pytest.approx(1)


def test_unreadable_inputs_are_reported_and_the_others_predicted(trained, photos, call, tmp_path):
    (photos / "broken.png").write_bytes(b"not an image")
    done = call("predict.py", "--run", trained, photos, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "broken.png cannot be decoded" in done.stderr
    assert len(entries_of(tmp_path / "out")) == 2
    words = ("predict.py", "--run", trained, photos / "broken.png", "--output", tmp_path / "none")
    assert call(*words).returncode == 1
    assert entries_of(tmp_path / "none") == []


def test_earlier_predictions_are_replaced_only_when_asked(trained, photos, call, tmp_path):
    detects = isinstance(load(trained), TrainedDetector)
    options = ("--min-score", 1) if detects else ()
    words = ("--run", trained, "--output", tmp_path, *options, photos / "a.png")
    done = call("predict.py", *words)
    assert done.returncode == 0, done.stderr
    if detects:
        assert f"{photos / 'a.png'}  0 of " in done.stdout
        assert "boxes score 1 or more" in done.stdout
    done = call("predict.py", *words[:-1], photos / "b.jpg")
    assert done.returncode == 2
    assert "predictions.json exists: set another --output, or --overwrite." in done.stderr
    assert [entry["file"] for entry in entries_of(tmp_path)] == [str(photos / "a.png")]
    assert call("predict.py", *words[:-1], photos / "b.jpg", "--overwrite").returncode == 0
    assert [entry["file"] for entry in entries_of(tmp_path)] == [str(photos / "b.jpg")]


def test_the_frames_of_a_video_are_predicted(trained, call, tmp_path):
    pytest.importorskip("av")
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    frames = [np.full((48, 64, 3), shade, np.uint8) + ramp[None, :, None] // 2 for shade in (0, 99)]
    write_video(tmp_path / "clip.mp4", frames, 5)
    assert frame_rate(tmp_path / "clip.mp4") == 5
    back = np.stack([f.permute(1, 2, 0).numpy() for f in read_video(tmp_path / "clip.mp4")])
    assert np.abs(back.astype(int) - np.stack(frames)).mean() < 4  # lossy
    done = call("predict.py", "--run", trained, tmp_path / "clip.mp4", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [entry["frame"] for entry in entries_of(tmp_path / "out")] == [0, 1]
    if "boxes" in entries_of(tmp_path / "out")[0]:
        assert len(list(read_video(tmp_path / "out/clip.mp4.mp4"))) == 2


def test_a_video_without_pyav_names_what_to_install(trained, call, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    done = call("predict.py", "--run", trained, tmp_path / "clip.mp4", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "pip install av" in done.stderr
