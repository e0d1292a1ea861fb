"""The model card of an export states what the run recorded; uploading it to the hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from tract_transfer.run.export import escape, export_run
from tract_transfer.run.run import run


@pytest.fixture(scope="module")
def finished(load_tiny, tmp_path_factory):
    """The folder of a run of a timm model."""
    folder = tmp_path_factory.mktemp("run")
    words = ["model.backbone={name: timm/test_resnet}", "solver.max_iters=2"]
    run(load_tiny(folder, *words, "tract.enabled=true"))
    return folder / "run"


@pytest.fixture
def card(finished, tmp_path):
    """Export a copy of the run with other data and results; return its README.md."""

    def export(source=None, hub_ids=(), **results):
        folder = tmp_path / "run"
        shutil.copytree(finished, folder)
        metadata = json.loads((folder / "model.json").read_text())
        metadata["data"]["hub_ids"] = {str(k): hub_id for k, hub_id in enumerate(hub_ids)}
        (folder / "model.json").write_text(json.dumps(metadata))
        stored = json.loads((folder / "results.json").read_text())
        for key, value in results.items():
            stored[key] = {**stored[key], **value} if isinstance(stored.get(key), dict) else value
        (folder / "results.json").write_text(json.dumps(stored))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for split in ("train", "test") if source else ():
            config["data"][split] = {"source": "huggingface", "split": split, **source}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        export_run(folder, tmp_path / "out")
        return (tmp_path / "out/README.md").read_text()

    return export


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_has_the_facts_of_the_run(card, finished):
    text = card()
    body = text.split("---\n", 2)[2]
    front = front_matter(text)
    del front["model-index"]  # see below
    assert front == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "tract_transfer", "tract"],
        "metrics": ["accuracy"],
    }
    results = json.loads((finished / "results.json").read_text())
    environment = json.loads((finished / "environment.json").read_text())
    for name, value in results["metrics"].items():
        assert f"| {escape(name)} | {value:.4f} |" in body
    for value in (*results["protocol"].values(), *environment["data"].values()):
        assert escape(value) in body
    for line in ("| seed | 0 |", "| TrAct in this training | lam 0.1, absolute |"):
        assert line in body
    assert escape(environment["versions"]["timm"]) in body
    assert str(finished) not in text
    assert "\n\n\n" not in body


def test_local_paths_are_shortened_and_markdown_is_escaped(card):
    text = card(
        {"path": "/home/me/photos/pets"},
        hub_ids=["owner/a: b", "owner/a: b"],
        details={"class_names": ["a|b*", "<script>x</script>", "multi\n# line"]},
        protocol={"train": "/home/me/photos/pets: 3 images"},
    )
    assert front_matter(text)["datasets"] == ["owner/a: b"]
    assert "| train | pets: 3 images |" in text
    assert "/home/me" not in text
    assert r"0 a\|b\*, 1 \<script\>x\</script\>, 2 multi \# line" in text


def test_a_data_path_of_one_dot_leaves_numbers_unchanged(card):
    text = card({"path": "."}, protocol={"test images": "crop ratio 0.875"})
    assert "| crop ratio 0.875 |" in text
    assert front_matter(text)["model-index"][0]["results"][0]["dataset"]["name"] == "."


def test_hub_reads_results_with_data_and_split(card, finished):
    path = "owner/pets"
    source = {"path": path, "split": "test[:50%]", "config_name": "large", "revision": "v2"}
    text = card(source, hub_ids=[path])
    metrics = json.loads((finished / "results.json").read_text())["metrics"]
    read = huggingface_hub.ModelCard(text).data
    assert read.model_name == "run"
    assert "\n# run\n" in text
    assert {result.metric_name: result.metric_value for result in read.eval_results} == {
        "top-1 accuracy": metrics["top1"],
        "mean per-class accuracy": metrics["mean_per_class"],
    }
    for result in read.eval_results:
        assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
        assert (result.dataset_type, result.dataset_split) == (path, "test[:50%]")
        assert (result.dataset_config, result.dataset_revision) == ("large", "v2")
    name, again = model_index_to_eval_results(front_matter(text)["model-index"])
    assert (name, again) == (read.model_name, read.eval_results)


def test_a_run_without_test_reports_its_val_and_one_view(load_tiny, tmp_path):
    words = ("data.val={source: train, fraction: 0.2}", "data.test=null", "solver.max_iters=1")
    run(load_tiny(tmp_path, *words, "evaluation.flip=true"))
    export_run(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    (result,) = front_matter(text)["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "20% of train"}
    assert "average each image and its mirror image; the model sees one of them" in text


def test_a_license_is_stated_only_when_given(finished, call, tmp_path):
    for number, given in enumerate((None, "apache-2.0")):
        words = ("--run", finished, "--output", tmp_path / str(number))
        done = call("export_model.py", *words, *(["--license", given] if given else []))
        assert done.returncode == 0, done.stderr
        text = (tmp_path / f"{number}/README.md").read_text()
        assert front_matter(text).get("license") == given
        assert ("No license is stated" in text) == (given is None)


def test_overlaps_and_skipped_images_are_limits(card):
    text = card(leaks={"train": {"images_in_test": 7, "first": []}}, skipped=["a.png"])
    assert "- 7 images of train are also among the images that the numbers are of.\n" in text
    assert "- 1 images could not be decoded and were skipped.\n" in text


class Hub:
    """A hub that records its calls."""

    def __init__(self, is_private=True):
        self.calls, self.is_private = [], is_private

    def create_repo(self, hub_id, private, exist_ok):
        self.calls.append(("create", hub_id, private, exist_ok))
        return f"https://hub/{hub_id}"

    def repo_info(self, hub_id):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, files))


def test_a_model_is_uploaded_only_when_asked(finished, call, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    words = ("--run", finished, "--output")
    assert call("export_model.py", *words, tmp_path / "quiet").returncode == 0
    assert hub.calls == []
    more = ("--push-to-hub", "me/model")
    for name, private in (("public", []), ("private", ["--private"])):
        done = call("export_model.py", *words, tmp_path / name, *more, *private)
        assert done.returncode == 0, done.stderr
        create, upload = hub.calls
        assert create == ("create", "me/model", bool(private), True)
        assert upload == ("upload", "me/model", ["README.md", "config.json", "model.safetensors"])
        assert done.stdout.splitlines()[-1] == "https://hub/me/model"
        assert "snapshot_download('me/model')" in (tmp_path / name / "README.md").read_text()
        hub.calls.clear()


def test_an_upload_that_would_fail_is_refused(finished, call, tmp_path, monkeypatch):
    hub = Hub(is_private=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    words = ("--run", finished, "--output", tmp_path / "out", "--push-to-hub")
    assert "needs a token with write access" in call("export_model.py", *words, "me/m").stderr
    assert "must be owner/name, not 'm'" in call("export_model.py", *words, "m").stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    done = call("export_model.py", *words, "me/m", "--private")
    assert done.returncode == 2
    assert "me/m exists and is public, and nothing was uploaded" in done.stderr
    assert [kind for kind, *_ in hub.calls] == ["create"]
