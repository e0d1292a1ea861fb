"""What is looked at before a suite's first run: data, model, and how they fit."""

import pytest
from box_data import write_voc

from tract_transfer.run import suite_plan as inspect_suite
from tract_transfer.run.suite_plan import Inspector

FITS = "model={weights: out/pretrain, backbone: {name: null}}"


@pytest.fixture
def pretrain(load_tiny, tmp_path):
    return load_tiny(tmp_path, "output_dir=out/pretrain")


def inspected(config, needed=None, kept=None):
    inspector = Inspector(kept)
    try:
        return inspector.inspect(config, needed)
    finally:
        inspector.keep()
        inspector.close()


def test_the_data_are_told_by_their_fingerprints(pretrain, load_tiny, tmp_path):
    prints = inspected(pretrain)
    assert set(prints) == {"train", "test"}
    fewer = load_tiny(tmp_path, "data.test.classes=[0, 1]", "data.train.classes=[0, 1]")
    assert not set(inspected(fewer).values()) & set(prints.values())


def test_a_task_is_built_on_a_backbone_that_is_not_trained_yet(pretrain, load_tiny, tmp_path):
    assert set(inspected(load_tiny(tmp_path, FITS), pretrain)) == {"train", "test"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model={weights: out/pretrain, backbone: {name: cifar/vit}}",
            "model.weights: the weights are those of .*Remove model.backbone",
        ),
        ("data.train.classes=[0, 1]", "classes"),
    ],
)
def test_a_config_that_does_not_fit_is_told_before_anything_runs(
    pretrain, load_tiny, tmp_path, override, says
):
    """And names the run whose backbone stood in, not the folder it stood in from."""
    config = load_tiny(tmp_path, FITS, override)
    with pytest.raises(ValueError, match=says) as error:
        inspected(config, pretrain)
    assert "/tmp" not in str(error.value).replace(str(tmp_path), "")


def test_a_detector_that_does_not_fit_its_backbone_is_told(pretrain, load_tiny, tmp_path):
    fits = load_tiny(tmp_path, FITS, task="detection")
    assert inspected(fits, pretrain)
    levels = load_tiny(
        tmp_path, FITS, "model.detector.args.num_levels=7", "model.detector.name=torchvision_c5",
        task="detection",
    )  # fmt: skip
    with pytest.raises(ValueError, match="detector"):
        inspected(levels, pretrain)


def test_missing_data_are_told(pretrain, load_tiny, tmp_path):
    config = load_tiny(tmp_path, "data.train={source: huggingface, path: ./nowhere, split: train}")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        inspected(config)


def test_what_was_looked_at_is_not_looked_at_again(pretrain, load_tiny, tmp_path, monkeypatch):
    kept = tmp_path / "suite/.plan.json"
    prints = inspected(pretrain, kept=kept)

    def look(self, config, needed):
        looked.append(config)
        return {"train": "new"}

    looked = []
    monkeypatch.setattr(inspect_suite.Inspector, "_look", look)
    assert inspected(pretrain, kept=kept) == prints
    seed = load_tiny(tmp_path, "output_dir=out/pretrain", "seed=5")
    assert inspected(seed, kept=kept) == prints  # which decides nothing of the data
    assert not looked
    longer = load_tiny(tmp_path, "output_dir=out/pretrain", "solver.max_iters=9")
    assert inspected(longer, kept=kept) == {"train": "new"}
    carved = "data.val={source: train, fraction: 0.2}"
    for number in (0, 1):
        inspected(load_tiny(tmp_path, carved, f"seed={number}"), kept=kept)
    assert len(looked) == 3  # a part carved out of train depends on the seed


def test_a_changed_file_is_looked_at_again(load_tiny, tmp_path):
    write_voc(tmp_path / "kit", [("dog", (1, 2, 30, 20))])
    voc = f"{{source: voc, root: {tmp_path}/kit, sets: [2007/train], classes: [cat, dog]}}"
    (tmp_path / "kit/VOC2007/ImageSets/Main/train.txt").write_text("0\n2\n")
    (tmp_path / "kit/VOC2007/ImageSets/Main/test.txt").write_text("1\n")
    words = (
        f"data.train={voc}",
        f"data.test={voc.replace('train]', 'test]')}",
        "data.batch_size=1",
    )
    config = load_tiny(tmp_path, *words, task="detection")
    kept = tmp_path / "plan.json"
    before = inspected(config, kept=kept)
    assert inspected(config, kept=kept) == before
    note = tmp_path / "kit/VOC2007/Annotations/0.xml"
    note.write_text(note.read_text().replace("dog", "cat"))
    assert inspected(config, kept=kept) != before


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_memory_is_none(pretrain, tmp_path, text):
    kept = tmp_path / "plan.json"
    kept.write_text(text)
    assert set(inspected(pretrain, kept=kept)) == {"train", "test"}
    assert kept.read_text() != text
