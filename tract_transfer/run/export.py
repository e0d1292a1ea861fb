"""Export a finished classification run as a folder that other tools load, with a model card."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from tract_transfer.config.data import HeldOutSource
from tract_transfer.config.schema import ClassificationConfig
from tract_transfer.files import ENVIRONMENT_NAME, RESULTS_NAME
from tract_transfer.models import Backbone, Classifier, export
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.export import Portable
from tract_transfer.models.weights import read_metadata
from tract_transfer.registry import plugin_name
from tract_transfer.run.trained import load

TEMPLATE = "model_card.md.jinja"
_ACCURACIES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean per-class accuracy",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~$&!{}])")


def export_run(
    run: Path,
    output: Path,
    *,
    plugins: Sequence[str] = (),
    onnx: bool = False,
    hub_id: str | None = None,
    license_id: str | None = None,
) -> Portable:
    """Write the model that a run reports into the new folder `output`; return it.

    The folder has model.safetensors, config.json or model.json, README.md and, with `onnx`,
    model.onnx. It appears when all files are written and checked.

    Args:
        plugins: those of the run that the user names (see `run_config`).
        hub_id: where README.md loads the model from; None is its own folder.
        license_id: the license in README.md, as the hub names it.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `run` is not a run folder, or not finished.
        ImportError: a package that `onnx` needs is missing.
        ValueError: the run has no classifier, or ONNX gives other logits.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another --output.")
    if onnx:
        export.require_onnx()
    facts: dict[str, Any] = {"hub_id": hub_id, "onnx": onnx, "license_id": license_id}
    for name, file in (("results", RESULTS_NAME), ("environment", ENVIRONMENT_NAME)):
        if not (run / file).is_file():
            message = "it is not a finished run. Give another folder, or resume it."
            raise FileNotFoundError(f"No {run / file}: {message}")
        facts[name] = json.loads((run / file).read_text(encoding="utf-8"))
    trained = load(run, device="cpu", plugins=plugins)
    config, label_names = trained.config, trained.class_names
    if not isinstance(config, ClassificationConfig):
        raise ValueError(
            f"{run} contains a detector, whose parts no other library has. Use it with "
            "tract-transfer predict --run, or its backbone with model.weights: <run folder>."
        )
    is_flipped = isinstance(trained.model, FlipClassifier)
    classifier = trained.model.get_submodule("classifier") if is_flipped else trained.model
    assert isinstance(classifier, Classifier)
    size_px = config.data.transforms.size_px
    portable = export.to_library(classifier, size_px)
    hub_ids = read_metadata(run).get("data", {}).get("hub_ids", {})
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as parent:
        folder = Path(parent) / "complete"
        folder.mkdir()
        export.save_portable(folder, portable, _metadata(config, classifier, label_names, portable))
        if onnx:
            export.export_onnx(classifier, size_px, folder / export.ONNX_NAME)
        card = _model_card(config, portable, classifier.backbone, {*hub_ids.values()}, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.rename(output)
    return portable


def _metadata(
    config: ClassificationConfig, classifier: Classifier, label_names: list[str], portable: Portable
) -> dict[str, Any]:
    """Return timm's config.json, or our own model.json."""
    backbone, section = classifier.backbone, config.data.transforms
    preprocessing = {
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "interpolation": section.interpolation,
    }
    if portable.library != "timm" or portable.edits:
        sizes = {"size_px": section.size_px, "crop_ratio": section.crop_ratio}
        names: dict[str, Any] = {"head": config.model.head.model_dump(), "label_names": label_names}
        if config.plugins:
            names["plugins"] = [plugin_name(plugin) for plugin in config.plugins]
        return {**backbone.origin, **names, **preprocessing, **sizes}
    timm_config: dict[str, Any] = portable.model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": portable.name,
        "num_classes": len(label_names),
        "num_features": backbone.feature_dim,
        "label_names": label_names,
        "model_args": portable.args,
        "pretrained_cfg": {
            **preprocessing,
            "num_classes": len(label_names),
            "input_size": [3, section.size_px, section.size_px],
            "fixed_input_size": backbone.image_size_px is not None,
            "crop_pct": section.crop_ratio,
            "crop_mode": "center",
            "custom_load": False,
            "first_conv": timm_config["first_conv"],
            "classifier": timm_config["classifier"],
        },
    }


# Model card.


def _model_card(
    config: ClassificationConfig,
    portable: Portable,
    backbone: Backbone,
    hub_ids: set[str],
    facts: dict[str, Any],
) -> str:
    """Return the model card: Markdown with YAML front matter (see model_card.md.jinja).

    Args:
        hub_ids: the data sets of the hub that the run used.
        facts: the run's `results` and `environment`; `hub_id`, `onnx` and `license_id`.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(md=escape, py=repr)
    title = config.name or Path(config.output_dir).name
    return templates.get_template(TEMPLATE).render(
        **facts,
        front_matter=_front_matter(config, portable, hub_ids, facts, title),
        title=title,
        portable=portable,
        backbone=backbone,
        config=config,
        protocol=_without_folders(facts["results"]["protocol"], config, hub_ids),
        opset=export.OPSET,
        plugins=[plugin_name(plugin) for plugin in config.plugins],
    )


def escape(text: object) -> str:
    """Return text on one line that Markdown shows literally."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def _front_matter(
    config: ClassificationConfig,
    portable: Portable,
    hub_ids: set[str],
    facts: dict[str, Any],
    title: str,
) -> str:
    """Return what the hub reads: library, task, license, data, and the results as model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = facts["results"]
    split = "test" if config.data.test is not None else "val"
    section: Any = getattr(config.data, split)
    split_name = getattr(section, "split", split)
    if isinstance(section, HeldOutSource):
        split_name = f"{section.fraction:.0%} of {getattr(config.data.train, 'split', 'train')}"
        section = config.data.train
    path = str(getattr(section, "path", section.source))
    name = path if path in hub_ids else Path(path).name or path
    eval_results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=getattr(section, "config_name", None),
            dataset_split=split_name,
            dataset_revision=getattr(section, "revision", None),
            metric_type="accuracy",
            metric_name=metric_name,
            metric_value=results["metrics"][metric],
        )
        for metric, metric_name in _ACCURACIES.items()
        if metric in results["metrics"]
    ]
    tags = ["image-classification", portable.library, "tract_transfer", results["method"]]
    data = ModelCardData(
        library_name=portable.library,
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*tags, *(["onnx"] if facts["onnx"] else [])])),
        datasets=sorted(hub_ids) or None,
        metrics=["accuracy"],
        license=facts["license_id"],
        model_name=title,
        eval_results=eval_results,
    )
    return str(data.to_yaml())


def _without_folders(
    protocol: dict[str, Any], config: ClassificationConfig, hub_ids: set[str]
) -> dict[str, str]:
    """Return the protocol with the names of local data instead of their paths."""
    sections = (config.data.train, config.data.val, config.data.test)
    paths = {str(getattr(section, "path", "")) for section in sections} - hub_ids
    for path in sorted(paths, key=len, reverse=True):
        if name := Path(path).name:  # not for `.`, which is in every number
            protocol = {key: text.replace(path, name) for key, text in protocol.items()}
    return protocol


# Hugging Face hub.


def check_hub(hub_id: str) -> None:
    """Check that `hub_id` and the account allow an upload."""
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"--push-to-hub must be owner/name, not {hub_id!r}.")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "--push-to-hub needs a token with write access: run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, hub_id: str, *, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; return its URL.

    Raises:
        ValueError: `private`, but the repository exists and is public: nothing is uploaded.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    url = api.create_repo(hub_id, private=private, exist_ok=True)
    if private and not api.repo_info(hub_id).private:
        raise ValueError(
            f"{hub_id} exists and is public, and nothing was uploaded. Make it private in its "
            "settings, or leave out --private."
        )
    api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload the model")
    return str(url)
