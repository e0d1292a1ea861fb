"""suite.json, and what run folders contain."""

import json
from dataclasses import replace

import pytest
from suites import cut_off, finish, make_suite

from tract_transfer.config.file import ConfigError
from tract_transfer.files import redact
from tract_transfer.report.runs import read_suite
from tract_transfer.suite.execute import refuse_others
from tract_transfer.suite.state import Suite, inspect_folder


@pytest.fixture
def suite(tmp_path):
    return make_suite(tmp_path)


@pytest.fixture
def run(suite):
    """A finished run that takes a backbone."""
    finish(suite.runs[2])
    return suite.runs[2]


def inspect(run, sha256="w1", **changes):
    state = inspect_folder(replace(run, config={**run.config, **changes}), sha256)
    return state.state, state.why


def test_report_reads_the_state_file(suite):
    suite.jobs[0].state, suite.jobs[1].error = "finished", "why"
    suite.write()
    content = read_suite(suite.folder / "suite.json")
    assert (content["baseline"], content["methods"]) == ("vanilla", ["vanilla", "tract"])
    assert (content["tasks"], content["seeds"]) == (["pretrain", "probe", "voc"], [0])
    assert content["runs"][3] == {
        "id": "tract-probe", "method": "tract", "task": "probe", "seed": 0,
        "folder": "tract/probe/seed0", "needs": "tract/pretrain/seed0", "state": "waiting",
        "attempts": 0, "error": None, "seconds": None, "also": [], "config_sha256": "",
        "spent": 0.0, "begun_with": None,
    }  # fmt: skip
    assert [path.name for path in suite.folder.iterdir()] == ["suite.json"]


def test_history_of_the_same_run_is_recalled_but_not_its_state(suite):
    history = {"attempts": 2, "seconds": 3.5, "spent": 3.5, "begun_with": "w1"}
    job = suite.jobs[0]
    for key, value in history.items():
        setattr(job, key, value)
    job.state = "finished"
    suite.write()
    recalled = Suite(suite.config, suite.runs).jobs[0]
    assert {key: getattr(recalled, key) for key in history} == history
    assert recalled.state == "waiting"
    other = Suite(suite.config, [replace(job.run, id="c" * 12)]).jobs[0]
    assert (other.attempts, other.begun_with) == (0, None)


ENTRY = '"folder": "vanilla/pretrain/seed0", "id": "vanilla-pretrain"'
NULLS = f'{{"runs": [{{{ENTRY}, "attempts": null, "spent": "x"}}]}}'


@pytest.mark.parametrize("text", ["", "{", "[]", '{"runs": [{}]}', '{"runs": 3}', NULLS])
def test_broken_state_file_is_ignored(suite, text):
    (suite.folder / "suite.json").write_text(text)
    jobs = Suite(suite.config, suite.runs).jobs
    assert {(job.attempts, job.spent, job.state) for job in jobs} == {(0, 0.0, "waiting")}


def test_folders_decide_the_state_of_jobs(suite):
    finish(suite.runs[0])
    cut_off(suite.runs[1])
    finish(suite.runs[3])  # its backbone is not finished
    assert suite.take_stock() == {}
    assert [(job.state, job.note) for job in suite.jobs[:4]] == [
        ("finished", ""),
        ("waiting", "resumes from iter_0000005"),
        ("waiting", ""),
        ("waiting", "finished, if its backbone turns out the same"),
    ]


def test_run_whose_backbone_was_retrained_is_another_run(suite):
    finish(suite.runs[0], sha256="w2")
    finish(suite.runs[2], sha256="w1")
    others = {suite.runs[2].folder: "its backbone has been retrained since"}
    assert suite.take_stock() == others
    suite = Suite(suite.config, suite.runs)
    cut_off(suite.runs[2])
    suite.jobs[2].begun_with = "w1"
    (why,) = suite.take_stock().values()
    assert why == "its backbone has been retrained since it started"


def test_folder_is_new_or_has_a_finished_run_with_results_and_its_config(suite, run):
    assert inspect(suite.runs[0]) == ("new", "")
    state = inspect_folder(run, "w1")
    assert (state.state, state.why) == ("finished", "")
    assert state.results == json.loads((run.folder / "results.json").read_text())
    assert inspect(run, seed=9) == ("other", "seed: 0 then, 9 now")


@pytest.mark.parametrize(
    "text", ["{oops", "[]", '{"metrics": 1, "primary_metric": "a"}', '{"metrics": {}}']
)
def test_run_with_broken_results_has_begun(run, text):
    (run.folder / "results.json").write_text(text)
    state, message = inspect(run)
    assert state == "begun"
    why = "cannot be read" if text == "{oops" else "lacks its primary metric"
    assert f"resumes from the beginning: results.json {why}" in message


OTHERS = {
    "no config": ("config.yaml", None, "config.yaml cannot be read"),
    "no YAML": ("config.yaml", "a: [", "config.yaml is not YAML"),
    "no mapping": ("config.yaml", "- a", "config.yaml is not a mapping"),
    "another config": ("config.yaml", "seed: 5", "seed: 5 then, 0 now"),
    "no environment": ("environment.json", None, "environment.json has no fingerprints of its"),
    "broken environment": ("environment.json", "{", "environment.json has no fingerprints of its"),
    "no fingerprints": ("environment.json", '{"data": 3}', "has no fingerprints of its data"),
    "other data": (
        "environment.json", '{"data": {"train": "t9", "val": "t3", "test": "t2"}}',
        "other images or labels in data.train and data.val",
    ),
    "another version": (
        "results.json", '{"format": 7}', "results.json has format 7, and this version reads 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "why"), OTHERS.values(), ids=OTHERS)
def test_folder_of_another_run_is_refused_with_the_reason(suite, name, text, why):
    run = suite.runs[0]
    finish(run)
    (run.folder / name).unlink()
    if text is not None:
        (run.folder / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        refuse_others(suite.take_stock())
    assert f"{run.folder} contains another run: " in str(error.value)
    assert why in str(error.value)
    assert "Nothing was started. Use --set-aside to move them" in str(error.value)


def test_all_conflicts_are_listed(suite):
    for run in suite.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "results.json").write_text('{"format": 9}')
    with pytest.raises(ConfigError) as error:
        refuse_others(suite.take_stock())
    assert str(error.value).count("contains another run: results.json has format 9") == 6
    finish(suite.runs[0])
    assert inspect(suite.runs[0], **{f"key{i}": i for i in range(9)})[1].endswith(" and 4 more")


def test_cut_off_run_with_other_data_is_another_run(run):
    cut_off(run)
    assert inspect(run) == ("begun", "resumes from iter_0000005")
    (run.folder / "environment.json").write_text('{"data": {}}')
    assert inspect(run)[0] == "other"
    known_to_the_run_alone = replace(run, fingerprints=None)
    assert inspect_folder(known_to_the_run_alone, "w1").state == "begun"


def test_run_whose_config_hides_a_secret_is_recognized(run):
    finish(
        replace(run, config=redact({**run.config, "name": "https://me:word@host"}, by_name=False))
    )
    planned = replace(run, config={**run.config, "name": "https://me:word@host"})
    assert inspect_folder(planned, "w1").state == "finished"


def test_suite_can_be_moved(run):
    """If a hash identifies the backbone, its path does not matter."""
    assert inspect(run, output_dir="y", model={"weights": "b/pretrain"}) == ("finished", "")
    assert inspect(run, None, model={"weights": "b/pretrain"})[0] == "other"
    assert inspect(run, "w2") == ("other", "its backbone has been retrained since")
    assert inspect_folder(run, backbone_known=False).state == "finished"


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_backbone_without_hash_is_another_one(suite, run, text):
    finish(suite.runs[0])
    (suite.runs[0].folder / "model.json").write_text(text)
    assert suite.take_stock() == {run.folder: "its backbone has been retrained since"}


def test_folders_are_set_aside_under_numbers(suite):
    run = suite.runs[0]
    for number in (1, 2):
        finish(run)
        moved = suite.set_aside(run.folder)
        assert moved == suite.folder / f"set_aside/vanilla/pretrain/seed0_{number}"
        assert (moved / "results.json").exists()
        assert not run.folder.exists()
