"""A model card tells what its run tells, in words and as the hub reads it; and its upload."""

import json
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


def copied(finished, folder):
    """A copy of the run, to change."""
    folder.mkdir()
    for file in finished.rglob("*"):
        target = folder / file.relative_to(finished)
        target.mkdir(exist_ok=True) if file.is_dir() else target.write_bytes(file.read_bytes())
    return folder


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_tells_what_the_run_tells(finished, tmp_path):
    folder = finished
    export_run(folder, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    body = text.split("---\n", 2)[2]
    front = front_matter(tmp_path / "out")
    del front["model-index"]  # see below
    assert front == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "tract_transfer", "tract"],
        "metrics": ["accuracy"],
    }
    results = json.loads((folder / "results.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    for name, value in results["metrics"].items():
        assert f"| {escape(name)} | {value:.4f} |" in body
    for value in (*results["protocol"].values(), *environment["data"].values()):
        assert escape(value) in body
    for line in ("| seed | 0 |", "| TrAct in this training | lam 0.1, absolute |"):
        assert line in body
    assert escape(environment["versions"]["timm"]) in body
    assert str(folder) not in text


def test_hub_ids_are_listed_and_local_paths_told_by_their_name(finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    card = json.loads((folder / "model.json").read_text())
    card["data"]["hub_ids"] = {"train": "owner/a: b", "test": "owner/a: b"}
    (folder / "model.json").write_text(json.dumps(card))
    results = json.loads((folder / "results.json").read_text())
    results["details"]["class_names"] = ["a|b*", "<script>x</script>", "multi\n# line"]
    results["protocol"]["train"] = "/home/me/secret/pets: 3 images"
    (folder / "results.json").write_text(json.dumps(results))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for split in ("train", "test"):
        path = "/home/me/secret/pets"
        config["data"][split] = {"source": "huggingface", "path": path, "split": split}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    export_run(folder, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert front_matter(tmp_path / "out")["datasets"] == ["owner/a: b"]
    assert "| train | pets: 3 images |" in text
    assert "/home/me" not in text
    assert r"0 a\|b\*, 1 \<script\>x\</script\>, 2 multi \# line" in text


def test_data_in_the_working_folder_take_no_point_from_a_number(finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["protocol"]["test images"] = "crop ratio 0.875"
    (folder / "results.json").write_text(json.dumps(results))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for split in ("train", "test"):
        config["data"][split] = {"source": "huggingface", "path": ".", "split": split}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    export_run(folder, tmp_path / "out")
    assert "| crop ratio 0.875 |" in (tmp_path / "out/README.md").read_text()
    assert front_matter(tmp_path / "out")["model-index"][0]["results"][0]["dataset"]["name"] == "."


def test_the_hub_reads_the_results_with_data_and_split(finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    card = json.loads((folder / "model.json").read_text())
    card["data"]["hub_ids"] = {"train": "owner/pets", "test": "owner/pets"}
    (folder / "model.json").write_text(json.dumps(card))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for split in ("train", "test"):
        config["data"][split] = {
            "source": "huggingface", "path": "owner/pets", "split": f"{split}[:50%]",
            "config_name": "large", "revision": "v2",
        }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    export_run(folder, tmp_path / "out")
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    read = huggingface_hub.ModelCard.load(tmp_path / "out/README.md").data
    assert read.model_name == "run"
    assert "\n# run\n" in (tmp_path / "out/README.md").read_text()
    assert {each.metric_name: each.metric_value for each in read.eval_results} == {
        "top-1 accuracy": metrics["top1"],
        "mean per-class accuracy": metrics["mean_per_class"],
    }
    for each in read.eval_results:
        assert (each.task_type, each.metric_type) == ("image-classification", "accuracy")
        assert (each.dataset_type, each.dataset_split) == ("owner/pets", "test[:50%]")
        assert (each.dataset_config, each.dataset_revision) == ("large", "v2")
    name, again = model_index_to_eval_results(front_matter(tmp_path / "out")["model-index"])
    assert (name, again) == (read.model_name, read.eval_results)


def test_a_run_without_test_reports_its_val(load_tiny, tmp_path):
    words = ("data.val={source: train, fraction: 0.2}", "data.test=null", "solver.max_iters=1")
    run(load_tiny(tmp_path, *words))
    export_run(tmp_path / "run", tmp_path / "out")
    (result,) = front_matter(tmp_path / "out")["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "20% of train"}


def test_a_licence_is_what_is_told(finished, call, tmp_path):
    words = ("--run", finished, "--output")
    assert call("export_model.py", *words, tmp_path / "none").returncode == 0
    said = call("export_model.py", *words, tmp_path / "out", "--license", "apache-2.0")
    assert said.returncode == 0, said.stderr
    assert "license" not in front_matter(tmp_path / "none")
    assert "No license is stated" in (tmp_path / "none/README.md").read_text()
    assert front_matter(tmp_path / "out")["license"] == "apache-2.0"
    assert "No license is stated" not in (tmp_path / "out/README.md").read_text()


def test_training_images_among_the_reported_are_told(finished, tmp_path):
    folder = copied(finished, tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["leaks"] = {"train": {"images_in_test": 7, "first": []}}
    (folder / "results.json").write_text(json.dumps(results))
    export_run(folder, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "- 7 images of train are also among the images that the numbers are of." in text


def test_a_mirrored_evaluation_exports_one_view(load_tiny, tmp_path):
    run(load_tiny(tmp_path, "solver.max_iters=1", "evaluation.flip=true"))
    export_run(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "average each image and its mirror image; the model sees one of them" in text


class Hub:
    """What stands for the hub: notes what is asked of it."""

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


@pytest.mark.parametrize("private", [False, True])
def test_it_is_uploaded_only_when_told(private, finished, call, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    words = ("--run", finished, "--output")
    assert call("export_model.py", *words, tmp_path / "quiet").returncode == 0
    assert hub.calls == []
    more = ("--push-to-hub", "me/model", *(["--private"] if private else []))
    said = call("export_model.py", *words, tmp_path / "out", *more)
    assert said.returncode == 0, said.stderr
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", "me/model", private, True), ("upload", "me/model", files)]
    assert said.stdout.splitlines()[-1] == "https://hub/me/model"
    assert "snapshot_download('me/model')" in (tmp_path / "out/README.md").read_text()


def test_an_upload_that_cannot_be_is_refused(finished, call, tmp_path, monkeypatch):
    hub = Hub(is_private=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    words = ("--run", finished, "--output", tmp_path / "out", "--push-to-hub")
    assert "needs a token with write access" in call("export_model.py", *words, "me/m").stderr
    assert "must be owner/name, not 'm'" in call("export_model.py", *words, "m").stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    said = call("export_model.py", *words, "me/m", "--private")
    assert said.returncode == 2
    assert "me/m exists and is public, and nothing was uploaded" in said.stderr
    assert [kind for kind, *_ in hub.calls] == ["create"]
