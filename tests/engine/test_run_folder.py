"""A run folder: what may be resumed in it, what is refused before data are read, its files."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml
from run_folders import (
    CARVED,
    assert_same_run,
    entries,
    results_of,
    whole_and_killed,
)
from safetensors.torch import load_file, save_file

from tract_transfer.config.schema import ConfigError
from tract_transfer.engine.run_folder import (
    FolderInUseError,
    changed_keys,
    deciding_keys,
    environment,
    flatten,
    lock_folder,
    resume_hint,
)
from tract_transfer.files import sha256_of
from tract_transfer.run.evaluate import evaluate_run, preview
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, load_tiny):
    """The folder of a finished run of two iterations, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(load_tiny(folder, "solver.max_iters=2"))
    return folder / "run"


@pytest.fixture
def finished(trained, tmp_path, load_tiny):
    """A finished run's config and folder."""
    shutil.copytree(trained, tmp_path / "run")
    return load_tiny(tmp_path, "solver.max_iters=2"), tmp_path / "run"


@pytest.fixture
def no_data(monkeypatch):
    """Let any reading of data fail."""
    fail = lambda _config: pytest.fail("data were read")  # noqa: E731
    monkeypatch.setattr("tract_transfer.run.run.build_data", fail)
    monkeypatch.setattr("tract_transfer.run.evaluate.build_data", fail)


def change(file, edit):
    content = yaml.safe_load(file.read_text())  # JSON is YAML
    edit(content)
    text = json.dumps(content) if file.suffix == ".json" else yaml.safe_dump(content)
    file.write_text(text)


def contents(folder):
    files = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def truncate(file):
    file.write_text(file.read_text().partition("task: ")[0] + "tas")


# Name -> what happens to config.yaml, overrides, resume, error, parts of the message.
REFUSALS = {
    "an output_dir that holds a run": (None, [], False, FileExistsError,
        ["run already contains a run. Resume it with --resume, or set another output_dir"]),
    "--resume with another config": (None, ["solver.lr=0.5", "data.batch_size=16"], True,
        ValueError, ["another config: data.batch_size: 32 then, 16 now; solver.lr: 0.05 then, 0.5",
         "run/config.yaml, or set another output_dir"]),
    "--resume without config.yaml": (Path.unlink, [], True, ValueError,
        ["No config ", "run/config.yaml", "or set another output_dir"]),
    "--resume with a truncated config.yaml": (truncate, [], True, ValueError,
        ["config.yaml is not a valid config of this version", "or set another output_dir"]),
    "--resume with a config.yaml of another version": (
        lambda file: change(file, lambda tree: tree.update(old=1)), [], True, ValueError,
        ["old: unknown", "or set another output_dir"]),
    "--resume with a key that the run did not know": (
        lambda file: change(file, lambda tree: tree["evaluation"].pop("flip")),
        ["evaluation.flip=true"], True,
        ValueError, ["evaluation.flip: False then, True now"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_is_refused_before_data_are_read_and_not_changed(
    name, finished, load_tiny, no_data, refused
):
    spoil, words, resume, error, expected = REFUSALS[name]
    _, folder = finished
    if spoil is not None:
        spoil(folder / "config.yaml")
    before = contents(folder)
    with refused(name, error) as caught:
        run(load_tiny(folder.parent, "solver.max_iters=2", *words), resume=resume)
    assert [part for part in expected if part not in str(caught.value)] == [], caught.value
    assert contents(folder) == before


def test_a_folder_in_use_is_refused_before_data_are_read_and_not_changed(finished, no_data):
    config, folder = finished
    before = contents(folder)
    with lock_folder(folder), pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
        run(config, resume=True)
    assert contents(folder) == before


def test_no_folder_is_made_below_a_file(tmp_path, load_tiny, no_data, refused):
    (tmp_path / "file").write_text("mine")
    with refused("an output_dir below a file", NotADirectoryError, match="output_dir: .*file/run"):
        run(load_tiny(tmp_path, f"output_dir={tmp_path}/file/run"))


def test_nothing_to_evaluate_is_reported_before_data_are_read(
    tmp_path, load_tiny, no_data, refused
):
    with refused(
        "--eval-only without a checkpoint",
        FileNotFoundError,
        match=r"No complete checkpoint in .*Train first, or set",
    ):
        evaluate_run(load_tiny(tmp_path))
    with refused("--eval-only of a probe", ConfigError, match=r"task: a probe trains no model"):
        evaluate_run(load_tiny(tmp_path, task="probe"))


def test_a_checkpoint_of_another_model_is_not_evaluated(trained, load_tiny, tmp_path, refused):
    config = load_tiny(tmp_path, f"output_dir={trained}", "model.backbone.args={width: 16}")
    with refused(
        "--eval-only with another model",
        ValueError,
        match=r"iter_0000002 .*another model.*config.yaml",
    ):
        evaluate_run(config)


def test_a_preview_warns_that_the_run_would_be_refused(finished, caplog):
    config, _ = finished
    assert "peak memory" in preview(config)
    assert "A run would be refused: " in caplog.text
    caplog.clear()
    preview(config, resume=True)
    assert "refused" not in caplog.text


def test_keys_of_place_and_speed_and_missing_defaults_may_differ_on_resume(finished, load_tiny):
    _, folder = finished
    change(folder / "config.yaml", lambda tree: tree["solver"].pop("ema_warmup"))
    change(folder / "config.yaml", lambda tree: tree["data"].pop("repeats"))
    before = results_of(folder)
    words = ("data.num_workers=1", "engine.log.every_iters=9", "engine.checkpoint.keep=3")
    run(load_tiny(folder.parent, "solver.max_iters=2", *words), resume=True)
    assert results_of(folder) == before


def test_other_data_under_the_same_config_are_refused(finished, refused):
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


def test_other_weights_under_the_same_config_are_refused_before_data_are_read(
    tmp_path, load_tiny, finished, refused, monkeypatch
):
    _, folder = finished
    (tmp_path / "next").mkdir()
    words = [f"model.weights={folder}", "model.backbone={name: null}", "solver.max_iters=1"]
    config = load_tiny(tmp_path / "next", *words)
    run(config)
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    now = sha256_of(folder / "model.safetensors")
    change(folder / "model.json", lambda metadata: metadata.update(sha256=now))
    monkeypatch.setattr("tract_transfer.run.run.build_data", None)
    with refused(
        "--resume with other weights under the same config",
        ValueError,
        match=rf"model\.weights changed .* {now[:12]} now",
    ):
        run(config, resume=True)


def test_unreadable_environment_is_a_warning(finished, caplog):
    config, folder = finished
    (folder / "environment.json").write_text("{")
    run(config, resume=True)
    assert "environment.json cannot be read, so the data cannot be compared" in caplog.text
    assert "another environment" not in caplog.text


def test_another_environment_is_a_warning_and_recorded(finished, caplog):
    config, folder = finished

    def edit(tree):
        tree["versions"].update(torch="1.0")
        tree["hardware"].update(processes="9", system="elsewhere")
        tree["git"] = {"commit": "abc"}

    change(folder / "environment.json", edit)
    run(config, resume=True)
    assert "another environment, so not to the same bits: git.commit: 'abc' then" in caplog.text
    assert "hardware.processes: '9' then, '1' now" in caplog.text
    assert "versions.torch: '1.0' then" in caplog.text
    assert "elsewhere" not in caplog.text
    (earlier,) = json.loads((folder / "environment.json").read_text())["earlier"]
    assert earlier["versions"]["torch"] == "1.0"
    caplog.clear()
    run(config, resume=True)
    assert "another environment" not in caplog.text


def test_no_secret_of_the_command_line_is_stored(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py", "hub.token=abc", "--api-key", "abc", "solver.lr=1"])
    assert environment({})["command"] == "x.py hub.token=*** --api-key *** solver.lr=1"


def test_a_truncated_log_line_is_completed_and_temporary_files_are_removed(finished):
    config, folder = finished
    text = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(f"{text}2026-01-01 00:00:00,000 INFO it")
    (folder / ".results.json.01234567.part").touch()
    (folder / "checkpoints/.iter_0000001").mkdir()
    (folder / ".mine").touch()
    run(config, resume=True)
    lines = (folder / "log.txt").read_text().splitlines()
    assert len(text.splitlines()) > 0
    assert lines[len(text.splitlines())].endswith("INFO it")
    assert "INFO Resumed from" in "\n".join(lines[len(text.splitlines()) + 1 :])
    assert [name for name in entries(folder) if name.startswith(".")] == [".lock", ".mine"]
    assert entries(folder / "checkpoints") == ["iter_0000002"]


def test_a_damaged_best_checkpoint_is_written_again(tmp_path, load_tiny, kill_at):
    """The newest checkpoint often is the best: training resumes from the one before it."""
    words = (*CARVED, "evaluation.every_iters=2", "engine.checkpoint={every_iters: 2, keep: 9}")
    config = whole_and_killed(tmp_path, load_tiny, kill_at, *words)
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "best.json").write_text('{"iteration": 4, "value": 0.9}')
    (checkpoints / "iter_0000004/model.safetensors").write_bytes(b"")
    run(config, resume=True)
    assert (checkpoints / "broken-iter_0000004").is_dir()
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resume_hint_depends_on_the_content_of_the_folder(tmp_path, finished):
    _, folder = finished
    assert resume_hint(folder) == f"the run is finished (output_dir {folder})."
    for unreadable in (b"\xff\xfe", b"{", b"[]", b""):
        (folder / "results.json").write_bytes(unreadable)
        assert "Resume with --resume" in resume_hint(folder)
    assert "Give the same command again" in resume_hint(tmp_path / "nothing")


CONFIG = {
    "output_dir": "a", "name": "x", "method": "vanilla", "seed": 0,
    "data": {"cache": "none", "num_workers": 2, "batch_size": 8},
    "engine": {"log": {"every_iters": 20}, "precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "changes"),
    [
        ({"output_dir": "b", "engine": {"log": {"every_iters": 5}, "precision": "fp32"}}, []),
        ({"data": {"cache": "ram", "num_workers": 0, "batch_size": 8}}, []),
        ({"seed": 1}, ["seed: 0 then, 1 now"]),
        ({"data": {**CONFIG["data"], "batch_size": 4}}, ["data.batch_size: 8 then, 4 now"]),
        ({"engine": {"log": {}}}, ["engine.precision: 'fp32' then, None now"]),
        # it augments with other random numbers
        ({"data": {**CONFIG["data"], "cache": "device"}},
         ["data.cache: 'none' then, 'device' now"]),
    ],
)  # fmt: skip
def test_keys_that_decide_numbers_may_not_change_on_resume(sections, changes):
    other = {**CONFIG, **sections}
    assert changed_keys(CONFIG, other) == changes
    assert (deciding_keys(CONFIG) == deciding_keys(other)) == (changes == [])


def test_labels_decide_nothing():
    assert deciding_keys(CONFIG) == deciding_keys({**CONFIG, "name": "y", "method": "tract"})


def test_flat_keys_are_dotted_and_empty_sections_stay():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": []}) == {"a.b.c": 1, "a.d": {}, "e": []}


# ------------------------------------------------------------------------------------ the lock


def owner_of(folder):
    return json.loads((folder / ".lock").read_text() or "{}")


def write_owner(folder, **changed):
    with lock_folder(folder):
        owner = owner_of(folder)
    (folder / ".lock").write_text(json.dumps({**owner, **changed}))


def test_a_second_run_is_refused_until_the_first_ends_though_its_workers_live(
    tmp_path, caplog, refused
):
    ready, write_ready = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with lock_folder(tmp_path):
                if os.fork() == 0:  # as a data worker
                    time.sleep(3)
                    os._exit(0)
                os.write(write_ready, b".")
                time.sleep(60)
        finally:
            os._exit(1)
    os.read(ready, 1)
    owner = f"in use by process {process} on {socket.gethostname()} since {time.gmtime().tm_year}-"
    refusal = refused("a second run in the same folder", FolderInUseError, match=owner)
    with refusal, lock_folder(tmp_path):
        pass
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert owner_of(tmp_path)["pid"] == process
    with caplog.at_level(logging.INFO, "tract_transfer"), lock_folder(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()
    assert re.search(f"was held by process {process} .*, which has ended", caplog.text)


def test_lock_is_released_after_any_exception(tmp_path):
    for end in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(end), lock_folder(tmp_path):
            raise end
        assert owner_of(tmp_path) == {}
    with lock_folder(tmp_path):
        pass


def test_owner_on_another_host_is_refused(tmp_path, refused):
    write_owner(tmp_path, host="node17", pid=7)
    match = rf"held by process 7 on node17 .* remove {tmp_path}/\.lock and start again"
    refusal = refused("a run folder that another host holds", FolderInUseError, match=match)
    with refusal, lock_folder(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    with lock_folder(tmp_path):
        pass


def test_a_reused_process_id_is_another_process(tmp_path):
    write_owner(tmp_path, started=12345.0)  # this process id, but of an earlier process
    with lock_folder(tmp_path):
        assert owner_of(tmp_path)["started"] > 12345.0


@pytest.mark.parametrize("text", ["{", "[1]", "", '{"host": 3}'])
def test_a_truncated_lock_file_names_no_owner(tmp_path, text):
    (tmp_path / ".lock").write_text(text.replace("3", json.dumps(socket.gethostname())))
    with lock_folder(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()


def test_without_kernel_locks_the_lock_file_decides(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    refused = pytest.raises(FolderInUseError, match="in use by process")
    with lock_folder(tmp_path), refused, lock_folder(tmp_path):
        pass
    assert "no file locks" in caplog.text
    with lock_folder(tmp_path):
        pass
