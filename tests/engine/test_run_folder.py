"""Whose a run folder is: what may go on in it, and what is refused before anything is written."""

import json
from pathlib import Path

import pytest
import yaml
from run_folders import (
    CARVED,
    Killed,
    assert_same_run,
    entries,
    held,
    results_of,
    whole_and_killed,
)
from safetensors.torch import load_file, save_file

from tract_transfer.engine.run_folder import (
    FolderInUseError,
    continue_environment,
    environment,
    is_finished,
    lock_folder,
    resume_hint,
)
from tract_transfer.files import sha256_of
from tract_transfer.run.run import run


@pytest.fixture
def finished(tmp_path, load_tiny):
    """A finished run's config and folder."""
    config = load_tiny(tmp_path, "solver.max_iters=2")
    run(config)
    return config, Path(config.output_dir)


def change(file, edit):
    content = yaml.safe_load(file.read_text())  # JSON is YAML
    edit(content)
    text = json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content)
    file.write_text(text)


def test_a_second_run_is_refused_and_disturbs_nothing(finished, load_tiny):
    config, folder = finished
    before = {name: (folder / name).stat().st_mtime_ns for name in entries(folder)}
    with held(folder) as pid, pytest.raises(FolderInUseError, match=f"in use by process {pid}"):
        run(config, resume=True)
    changed = {n for n in entries(folder) if (folder / n).stat().st_mtime_ns != before[n]}
    assert changed == {".lock"}
    run(config, resume=True)


def test_a_key_that_the_run_did_not_know_may_stand_at_its_default(finished):
    config, folder = finished
    change(folder / "config.yaml", lambda tree: tree["solver"].pop("ema_warmup"))
    change(folder / "config.yaml", lambda tree: tree["data"].pop("repeats"))
    before = results_of(folder)
    run(config, resume=True)
    assert results_of(folder) == before


def test_a_key_that_the_run_did_not_know_may_not_stand_elsewhere(
    finished, load_tiny, tmp_path, refused
):
    _, folder = finished
    change(folder / "config.yaml", lambda tree: tree["evaluation"].pop("flip"))
    config = load_tiny(tmp_path, "solver.max_iters=2", "evaluation.flip=true")
    with refused(
        "--resume with a key that the run did not know",
        ValueError,
        match=r"evaluation\.flip: False then, True now",
    ):
        run(config, resume=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.unlink(), "contains a run but no config.yaml"),
        (lambda file: file.write_text(""), "config.yaml is not a valid config of this"),
        (lambda file: file.write_text(file.read_text()[:200]), "not a valid config of this"),
        (lambda file: change(file, lambda t: t.update(old=1)), "old: unknown"),
    ],
    ids=["missing", "empty", "cut off", "of another version"],
)
def test_a_config_that_is_lost_is_told(finished, spoil, said):
    config, folder = finished
    spoil(folder / "config.yaml")
    with pytest.raises(ValueError, match=said) as caught:
        run(config, resume=True)
    assert "or set another output_dir" in str(caught.value)


def test_other_data_under_the_same_config_is_refused(finished, refused):
    config, folder = finished
    change(folder / "environment.json", lambda tree: tree["data"].update(test="0123456789abcdef"))
    before = (folder / "results.json").read_bytes()
    with refused(
        "--resume with other data under the same config",
        ValueError,
        match=r"data\.test changed .* 0123456789ab then, .* now",
    ):
        run(config, resume=True)
    assert (folder / "results.json").read_bytes() == before
    assert json.loads((folder / "environment.json").read_text())["data"]["test"][:3] == "012"


def test_other_weights_under_the_same_config_are_refused(tmp_path, load_tiny, finished, refused):
    _, folder = finished
    (tmp_path / "next").mkdir()
    words = [f"model.weights={folder}", "model.backbone={name: null}", "solver.max_iters=1"]
    config = load_tiny(tmp_path / "next", *words)
    run(config)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * each for name, each in weights.items()}, folder / "model.safetensors")
    now = sha256_of(folder / "model.safetensors")
    change(folder / "model.json", lambda card: card.update(sha256=now))
    with refused(
        "--resume with other weights under the same config",
        ValueError,
        match=rf"model\.weights changed .* {now[:12]} now",
    ):
        run(config, resume=True)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_text("{")])
def test_data_that_cannot_be_compared_are_warned_of(finished, caplog, spoil):
    config, folder = finished
    spoil(folder / "environment.json")
    run(config, resume=True)
    assert "environment.json cannot be read" in caplog.text
    assert "cannot be compared" in caplog.text


def test_going_on_elsewhere_is_warned_of_and_recorded(finished, caplog):
    config, folder = finished
    change(folder / "environment.json", lambda tree: tree["versions"].update(torch="1.0"))
    run(config, resume=True)
    assert "resumed in another environment, so not to the same bits: torch 1.0 then" in caplog.text
    earlier = json.loads((folder / "environment.json").read_text())["earlier"]
    assert [one["versions"]["torch"] for one in earlier] == ["1.0"]


def test_what_decides_the_bits_is_compared():
    now = environment({"train": "a"}, num_processes=2)
    assert continue_environment(now, now) == (now, [])
    then = json.loads(json.dumps(now))
    then["hardware"].update(processes="1", threads="9", system="elsewhere")
    then["git"] = {"commit": "abc", "changed": "no"}
    after, changes = continue_environment(now, then)
    threads = now["hardware"]["threads"]
    assert "processes 1 then, 2 now" in changes
    assert f"threads 9 then, {threads} now" in changes
    assert any(change.startswith("commit abc then") for change in changes)
    assert not any("system" in change for change in changes)
    assert [one["git"]["commit"] for one in after["earlier"]] == ["abc"]
    assert continue_environment(now, {})[1] == []  # an environment.json that was lost


def test_a_log_line_cut_off_stays_a_line_of_its_own(finished):
    config, folder = finished
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(f"{text}2026-01-01 00:00:00,000 INFO it")
    run(config, resume=True)
    lines = (folder / "log.txt").read_text().splitlines()
    assert len(text.splitlines()) > 0
    assert lines[len(text.splitlines())].endswith("INFO it")
    assert "INFO Resumed from" in "\n".join(lines[len(text.splitlines()) + 1 :])


def test_leftovers_of_a_killed_write_are_cleared(finished):
    config, folder = finished
    (folder / ".results.json.01234567.part").touch()
    (folder / "checkpoints/.iter_0000001").mkdir()
    (folder / ".mine").touch()
    run(config, resume=True)
    assert [name for name in entries(folder) if name.startswith(".")] == [".lock", ".mine"]
    assert entries(folder / "checkpoints") == ["iter_0000002"]


def test_the_lost_best_is_not_silently_the_last(tmp_path, load_tiny, kill_at):
    words = (*CARVED, "evaluation.every_iters=2", "engine.checkpoint.keep=9")
    config = whole_and_killed(tmp_path, load_tiny, kill_at, *words)
    (tmp_path / "run/checkpoints/best.json").write_text("{")
    run(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    best = json.loads((tmp_path / "run/checkpoints/best.json").read_text())["iteration"]
    (tmp_path / f"run/checkpoints/iter_{best:07d}/model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is the best of its run, which cannot be reported"):
        run(config, resume=True)


def test_advice_fits_what_is_there(tmp_path, finished):
    _, folder = finished
    assert resume_hint(folder) == f"the run is finished (output_dir {folder})."
    (folder / "results.json").unlink()
    assert "Resume with --resume" in resume_hint(folder)
    assert "Give the same command again" in resume_hint(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", b"[]", b""])
def test_results_that_are_none_are_not_the_end(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    assert not is_finished(tmp_path)
    (tmp_path / "results.json").write_bytes(b"{}")
    assert is_finished(tmp_path)


def test_a_best_that_is_to_come_again_may_be_damaged(tmp_path, load_tiny, kill_at, caplog):
    """The newest checkpoint is the best more often than not: the one before goes on to it."""
    words = (*CARVED, "evaluation.every_iters=2", "engine.checkpoint={every_iters: 2, keep: 9}")
    config = whole_and_killed(tmp_path, load_tiny, kill_at, *words)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "best.json").write_text('{"iteration": 4, "value": 0.9}')
    (checkpoints / "iter_0000004/model.safetensors").write_bytes(b"")
    run(config, resume=True)
    assert (checkpoints / "broken-iter_0000004").is_dir()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_held_folder_is_let_go_when_a_run_fails(tmp_path, load_tiny, kill_at):
    kill_at(1)
    with pytest.raises(Killed):
        run(load_tiny(tmp_path))
    with lock_folder(tmp_path / "run"):
        pass
