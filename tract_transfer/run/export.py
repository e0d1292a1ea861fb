"""The bridge out: a finished classification run as a folder that other tools load."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from tract_transfer.config.data import HeldOutSource
from tract_transfer.config.schema import ClassificationConfig
from tract_transfer.engine.run_folder import ENVIRONMENT_NAME, RESULTS_NAME
from tract_transfer.models import Backbone, Classifier
from tract_transfer.models.classifier import FlipClassifier
from tract_transfer.models.export import (
    ONNX_NAME,
    OPSET,
    Portable,
    export_onnx,
    require_onnx,
    save_portable,
    to_library,
)
from tract_transfer.models.weights import has_metadata, read_metadata
from tract_transfer.run.trained import load_trained

# --- The README.md of an exported model: front matter, results with their protocol, how to load

_ACCURACIES = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean per-class accuracy",
}
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~$&!{}])")


def model_card(
    config: ClassificationConfig,
    results: dict[str, Any],
    environment: dict[str, Any],
    saved: dict[str, Any],
    portable: Portable,
    backbone: Backbone,
    hub_id: str | None,
    onnx: bool,
    license_id: str | None,
) -> str:
    """Return the model card, Markdown with YAML front matter.

    Args:
        results, environment: the run's results.json and environment.json.
        saved: the run's model.json.
        hub_id: where the code loads from; None is the folder itself.
        onnx: whether model.onnx lies beside it.
        license_id: as the hub calls it, such as apache-2.0; None states none.
    """
    hub_ids = list(dict.fromkeys(saved.get("data", {}).get("hub_ids", {}).values()))
    names = results["details"]["class_names"]
    local = _local_paths(config, hub_ids)
    sections = [
        _front_matter(config, results, portable, hub_ids, onnx, license_id),
        f"# {escape(_title(config))}\n\n"
        f"{escape(portable.name)} that tells {len(names)} classes apart, trained with "
        f"tract_transfer ({escape(results['role'])} run, method {escape(results['method'])}).",
        _table("Results", results["metrics"], digits=True)
        + f"\n\nOf iteration {results['reported_iteration']}; "
        f"the primary metric is {escape(results['primary_metric'])}.",
        _table("Protocol", {k: _named(v, local) for k, v in results["protocol"].items()}),
        _table("Training", _training(results)),
        _table("Data fingerprints (sha256)", environment["data"]),
        _table("Versions", {**environment["versions"], **environment["git"]}),
        "## How to load it\n\n" + _code(config, portable, backbone, hub_id),
        _onnx(config) if onnx else "",
        "## Limits\n\n"
        + "\n".join(f"- {line}" for line in _limits(config, portable, results, license_id)),
        "## Classes\n\n" + ", ".join(f"{k} {escape(name)}" for k, name in enumerate(names)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escape(text: object) -> str:
    """Return text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def _title(config: ClassificationConfig) -> str:
    return config.name or Path(config.output_dir).name


def _front_matter(
    config: ClassificationConfig,
    results: dict[str, Any],
    portable: Portable,
    hub_ids: list[str],
    onnx: bool,
    license_id: str | None,
) -> str:
    """Return what the hub reads: library, task, licence, data, and the results as model-index."""
    from huggingface_hub import ModelCardData

    tags = ["image-classification", portable.library, "tract_transfer", results["method"]]
    data = ModelCardData(
        library_name=portable.library,
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys([*tags, *(["onnx"] if onnx else [])])),
        datasets=hub_ids or None,
        metrics=["accuracy"],
        license=license_id,
        model_name=_title(config),
        eval_results=_eval_results(config, results, hub_ids),
    )
    return f"---\n{data.to_yaml()}\n---"


def _eval_results(
    config: ClassificationConfig, results: dict[str, Any], hub_ids: list[str]
) -> list[Any]:
    """Return the reported accuracies, of the reported split."""
    from huggingface_hub import EvalResult

    split = "test" if config.data.test is not None else "val"
    section: Any = getattr(config.data, split)
    told = getattr(section, "split", split)
    if isinstance(section, HeldOutSource):
        told = f"{section.fraction:.0%} of {getattr(config.data.train, 'split', 'train')}"
        section = config.data.train
    path = str(getattr(section, "path", section.source))
    name = path if path in hub_ids else Path(path).name or path
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=getattr(section, "config_name", None),
            dataset_split=told,
            dataset_revision=getattr(section, "revision", None),
            metric_type="accuracy",
            metric_name=title,
            metric_value=results["metrics"][metric],
        )
        for metric, title in _ACCURACIES.items()
        if metric in results["metrics"]
    ]


def _training(results: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"seed": results["seed"], "method": results["method"]}
    weights = results.get("weights")
    if weights:
        facts["first weights"] = weights if weights == "pretrained" else Path(weights).name
        facts["first weights' sha256"] = results.get("weights_sha256")
    tract = results.get("tract")
    facts["TrAct in this training"] = (
        f"lam {tract['lam']:g}, {tract['lam_mode']}" if tract and tract["enabled"] else "no"
    )
    facts["iterations"] = results["iterations"]
    facts["epochs"] = f"{results['epochs']:.4g}"
    return {name: value for name, value in facts.items() if value is not None}


def _table(title: str, facts: dict[str, Any], digits: bool = False) -> str:
    if not facts:
        return ""
    rows = [
        f"| {escape(name)} | {f'{value:.4f}' if digits else escape(value)} |"
        for name, value in facts.items()
    ]
    return f"## {title}\n\n| | |\n| --- | --- |\n" + "\n".join(rows)


def _local_paths(config: ClassificationConfig, hub_ids: list[str]) -> list[str]:
    """Paths of the machine that trained, the longest first: a card tells their last part alone."""
    sections = (config.data.train, config.data.val, config.data.test)
    paths = {str(getattr(section, "path", "")) for section in sections} - {"", *hub_ids}
    named = [path for path in paths if Path(path).name]  # `.` is in every number
    return sorted(named, key=len, reverse=True)


def _named(text: str, paths: list[str]) -> str:
    for path in paths:
        text = text.replace(path, Path(path).name)
    return text


def _code(
    config: ClassificationConfig, portable: Portable, backbone: Backbone, hub_id: str | None
) -> str:
    """Return the Python that loads the model and classifies photo.jpg."""
    section = config.data.transforms
    own = portable.library == "tract_transfer"
    plain_timm = portable.library == "timm" and not portable.edits
    mode = f"InterpolationMode.{section.interpolation.upper()}"
    mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    card = "config.json" if plain_timm else "model.json"
    arguments = f"{portable.name!r}, num_classes=len(names), **{portable.args!r}"
    build = {
        "timm": [f"model = timm.create_model({arguments})", *portable.edits],
        "torchvision": [f"model = torchvision.models.get_model({arguments})", *portable.edits],
        "tract_transfer": ["model = load_exported(folder)"],
    }[portable.library]
    if plain_timm:
        build = ['model = timm.create_model(f"local-dir:{folder}", pretrained=True)']
    elif not own:
        build.append('model.load_state_dict(load_file(f"{folder}/model.safetensors"))')
    steps = [
        "v2.PILToTensor()",
        f"v2.Resize({round(section.size_px / section.crop_ratio)}, {mode})",
        f"v2.CenterCrop({section.size_px})",
        "v2.ToDtype(torch.float32, scale=True)",
        *([] if own else [f"v2.Normalize({mean}, {std})"]),
    ]
    lines = [
        "import json",
        "",
        *_imports(portable, hub_id),
        "",
        f"folder = snapshot_download({hub_id!r})" if hub_id else 'folder = "."  # this folder',
        f'names = json.load(open(f"{{folder}}/{card}", encoding="utf-8"))["label_names"]',
        *build,
        "model.eval()",
        "transform = v2.Compose([",
        *[f"    {step}," for step in steps],
        "])",
        'image = Image.open("photo.jpg").convert("RGB")',
        "with torch.no_grad():",
        "    logits = model(transform(image).unsqueeze(0))",
        "print(names[logits.argmax()])",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _imports(portable: Portable, hub_id: str | None) -> list[str]:
    """Return the import lines of the code that loads the model, after the standard library's."""
    own = portable.library == "tract_transfer"
    plain_timm = portable.library == "timm" and not portable.edits
    return [
        *(["import timm"] if portable.library == "timm" else []),
        "import torch",
        *(["import torchvision"] if portable.library == "torchvision" else []),
        *(["from huggingface_hub import snapshot_download"] if hub_id else []),
        "from PIL import Image",
        *([] if own or plain_timm else ["from safetensors.torch import load_file"]),
        "from torchvision.transforms import InterpolationMode, v2",
        *(["from tract_transfer.models.export import load_exported"] if own else []),
    ]


def _onnx(config: ClassificationConfig) -> str:
    size_px = config.data.transforms.size_px
    return (
        f"`{ONNX_NAME}` (opset {OPSET}) takes `images`, float32 RGB in [0, 1] of shape "
        f"(batch, 3, {size_px}, {size_px}) with any batch, normalises them inside and gives "
        "`logits`:\n\n```python\nimport numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{ONNX_NAME}")\n'
        f"images = np.zeros((1, 3, {size_px}, {size_px}), np.float32)\n"
        '(logits,) = session.run(["logits"], {"images": images})\n```'
    )


def _limits(
    config: ClassificationConfig,
    portable: Portable,
    results: dict[str, Any],
    license_id: str | None,
) -> list[str]:
    lines = [
        "The numbers are of one run with one seed, on the split and by the protocol above.",
        "Images of other kinds than the training's were not measured.",
    ]
    for split, leak in (results.get("leaks") or {}).items():
        if count := next(number for key, number in leak.items() if key.startswith("images_in_")):
            lines.append(f"{count} images of {split} are among those the numbers are of.")
    if license_id is None:
        lines.append("No licence is stated: ask its owner, and mind the data's own terms.")
    if portable.edits:
        lines.append("Its stem is not the library's: it loads by the code above alone.")
    if portable.reason:
        reason = escape(portable.reason)
        lines.append(f"It loads with tract_transfer alone, because {reason}.")
    if config.evaluation.flip:
        lines.append("The numbers average each image and its mirror image; the model looks once.")
    if results.get("skipped"):
        lines.append(f"{len(results['skipped'])} images could not be decoded and were left out.")
    return lines


def export_run(
    run: Path,
    output: Path,
    *,
    onnx: bool = False,
    hub_id: str | None = None,
    license_id: str | None = None,
) -> Portable:
    """Write what the run in `run` reports into the new folder `output`; return its model.

    The folder holds model.safetensors, config.json or model.json, README.md and, with `onnx`,
    model.onnx. It appears when all of it is written and checked.

    Args:
        hub_id: what README.md loads from; without, it loads from its own folder.
        license_id: what README.md states, as the hub calls it; None states none.

    Raises:
        FileExistsError: `output` exists.
        FileNotFoundError: `run` is no run folder, or not finished.
        ImportError: `onnx` needs a package more.
        ValueError: a run that holds no classifier, or ONNX gives other logits.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Name another --output.")
    if onnx:
        require_onnx()
    results = _read(run / RESULTS_NAME)
    config, classifier, label_names = _load_classifier(run)
    size_px = config.data.transforms.size_px
    portable = to_library(classifier, size_px)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export") as parent:
        folder = Path(parent) / "whole"
        folder.mkdir()
        save_portable(folder, portable, _card(config, classifier, label_names, portable))
        if onnx:
            export_onnx(classifier, size_px, folder / ONNX_NAME)
        text = model_card(
            config, results, _read(run / ENVIRONMENT_NAME),
            read_metadata(run) if has_metadata(run) else {}, portable, classifier.backbone,
            hub_id=hub_id, onnx=onnx, license_id=license_id,
        )  # fmt: skip
        (folder / "README.md").write_text(text, encoding="utf-8")
        folder.rename(output)
    return portable


def _load_classifier(run: Path) -> tuple[ClassificationConfig, Classifier, list[str]]:
    """Return a run's config, the classifier that answers for one view, and its label names."""
    trained = load_trained(run, ["engine.device=cpu"])
    if not isinstance(trained.config, ClassificationConfig):
        raise ValueError(
            f"{run} holds a detector, which is made of parts that no other library has. Use it "
            "with tools/predict.py --run; its backbone goes on with model.weights: <run folder>."
        )
    model = trained.model
    classifier = model.classifier if isinstance(model, FlipClassifier) else model
    assert isinstance(classifier, Classifier)
    return trained.config, classifier, trained.class_names


def check_hub(hub_id: str) -> None:
    """Refuse, before any work, an id or an account that nothing can be uploaded with.

    Raises:
        ValueError: the id is not `owner/name`, or there is no token.
    """
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise ValueError(f"--push-to-hub must be owner/name, not {hub_id!r}.")
    if huggingface_hub.get_token() is None:
        raise ValueError(
            "--push-to-hub needs a token with write access: run `hf auth login`, or set HF_TOKEN."
        )


def push(folder: Path, hub_id: str, *, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub; return its address.

    Raises:
        ValueError: `private`, and the repository is there and public: nothing is uploaded.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    address = api.create_repo(hub_id, private=private, exist_ok=True)
    if private and not api.repo_info(hub_id).private:
        raise ValueError(
            f"{hub_id} exists and is public, and nothing was uploaded. Make it private in its "
            "settings, or leave --private out."
        )
    api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Upload the model")
    return str(address)


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No {file}: it is no finished run. Give another folder, or resume it."
        ) from error
    return found


def _card(
    config: ClassificationConfig, classifier: Classifier, label_names: list[str], portable: Portable
) -> dict[str, Any]:
    """Return timm's config.json, or what our own model.json says."""
    backbone, section = classifier.backbone, config.data.transforms
    colours = {
        "mean": backbone.mean.flatten().tolist(),
        "std": backbone.std.flatten().tolist(),
        "interpolation": section.interpolation,
    }
    if portable.library != "timm" or portable.edits:
        sizes = {"size_px": section.size_px, "crop_ratio": section.crop_ratio}
        names = {"head": config.model.head.model_dump(), "label_names": label_names}
        return {**backbone.origin, **names, **colours, **sizes}
    timm_config: dict[str, Any] = portable.model.pretrained_cfg  # type: ignore[assignment]
    return {
        "architecture": portable.name,
        "num_classes": len(label_names),
        "num_features": backbone.feature_dim,
        "label_names": label_names,
        "model_args": portable.args,
        "pretrained_cfg": {
            **colours,
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
