"""Bad configs: files, overrides, keys and values, and keys without effect."""

import pytest
from config_texts import CLASSIFICATION, TEXTS

from tract_transfer.config.file import ConfigError, override, parse_words
from tract_transfer.config.schema import load_config


@pytest.fixture
def message(tmp_path):
    """Return a function from a config to the message of its error."""

    def read(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            load_config(path, overrides)
        return str(error.value)

    return read


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
NOT_YAML = {
    "an open list": "a: [1\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "a key that is a list": "? [a]\n: 1\n",
    "a tag that does not fit": "a: !!int x",
    "an empty tag": "a: !!int ''",
    "bool": "a: !!bool x",
    "timestamp": "a: !!timestamp x",
    "an alias in itself": "a: &x {b: *x}",
    "an alias in its list": "a: &x [*x]",
    "a bomb of aliases": BOMB,
    "nested too deeply": "a: " + "[" * 1100,
    "a tag that runs code": "a: !!python/object/apply:pathlib.Path.touch [touched]",
    "a tag that builds an object": "a: !!python/object/new:pathlib.Path [touched]",
}


@pytest.mark.parametrize("text", NOT_YAML.values(), ids=NOT_YAML)
def test_unsafe_or_invalid_yaml_is_refused(message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path / 'x.yaml'}: not YAML, or not safe YAML: " in message(text)
    with pytest.raises(ConfigError, match=r"key: .* is not YAML"):
        parse_words([f"key={text}"])
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "{path}: a config must be a mapping of keys to values."),
        ("", "{path}: a config must be a mapping of keys to values."),
        ("_BASE_: 3\n", "_BASE_: must be a path or a list of paths, got 3 ({path})."),
        ("_BASE_: [{a: b}]\n", "_BASE_: must be a path or a list of paths, got [{'a': 'b'}]"),
        ("_BASE_:\n", "_BASE_: must be a path or a list of paths, got None ({path})."),
        ("task: a\nseed: 1\ntask: b\n", "task: given twice ({path} line 3 and {path} line 1)."),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "a.b: given twice ({path} line 4 and {path} line 2)."),
    ],
)
def test_a_file_must_be_a_mapping_with_each_key_once(message, text, expected, tmp_path):
    assert message(text).startswith(expected.replace("{path}", str(tmp_path / "x.yaml")))


def test_a_missing_file_is_named(tmp_path, refused):
    nowhere, path = tmp_path / "nowhere.yaml", tmp_path / "x.yaml"
    with refused("a missing config", ConfigError, match=r"No config .*nowhere\.yaml: there is no"):
        load_config(nowhere)
    path.write_text("_BASE_: gone.yaml\n")
    with refused(
        "a missing _BASE_",
        ConfigError,
        match=rf"_BASE_: No config .*gone\.yaml: .*\({path} line 1\)",
    ):
        load_config(path)


@pytest.mark.parametrize("bases", [["x"], ["b", "x"], ["b", "b"]])
def test_circular_bases_are_refused(tmp_path, bases, refused):
    for name, base in zip(["x", *bases], bases, strict=False):
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}.yaml\n")
    case = f"a _BASE_ that includes itself: {' > '.join(['x', *bases])}"
    with refused(case, ConfigError, match="_BASE_ leads back to the file itself"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["=1"], "is not an override"),
        (["--seed=1"], "is not an override"),
        (["a"], "a: given without a value"),
        (["a=1", "a.b=2"], "a was given a value before"),
        (["a=[1"], "is not YAML"),
    ],
)
def test_a_bad_override_is_refused(words, expected):
    with pytest.raises(ConfigError, match=expected):
        override({}, {}, parse_words(words))


# One override of a config, and how the message begins.
WRONG_KEYS = {
    "solver.lrr=1": "solver.lrr: unknown. Did you mean solver.lr?",
    "lr=1": "lr: unknown. Did you mean solver.lr?",
    "model.backbone.zzz=1": "model.backbone.zzz: unknown. Known: ['model.backbone.name'",
    "model.backbone.label_smooth=1": "model.backbone.label_smooth: unknown. Did you mean mod",
    "model.backbone.head=1": "model.backbone.head: unknown. Did you mean model.head?",
    "solvr.lr=1": "solvr: unknown. Did you mean solver?",
    "zzz=1": "zzz: unknown. Known: ['output_dir', 'seed'",
    "data.train.path=x": "data.train.path: not a key of source: digits.",
    "model.detector.name=x": "model.detector: not a key of a classification config (of detection)",
    "evaluation.save_detections=1": "evaluation.save_detections: not a key of a classif",
    "seed=1.0": "seed: Input should be a valid integer, got 1.0.",
    "seed=true": "seed: Input should be a valid integer, got True.",
    "name=1e-3": "name: Input should be a valid string, got 0.001.",
    "solver.lr=0": "solver.lr: Input should be greater than 0, got 0.",
    "solver.lr=1e999": "solver.lr: Input should be a finite number, got inf.",
    "solver.lr='1'": "solver.lr: Input should be a valid number, got '1'.",
    "solver=3": "solver: Input should be a valid dictionary",
    "tract.enabled=yes": "tract.enabled: Input should be a valid boolean, got 'yes'.",
    "data.train.source=voc": "data.train.source: 'voc' is none of 'huggingface', 'digits', a name",
    "data.train={source: digit, split: train}": "data.train.source: 'digit' is none of",
    "data.train={source: mine/x, root: x}": "data.train.root: ",
    "data.train.classes=[1,a]": "data.train.classes.1: Input should be a valid integer",
    "data.val={fraction: 0.1}": "data.val.source: required, but not set.",
    "data.val={source: train}": "data.val.fraction: required, but not set.",
    "data.train={source: digits, split: x}": "data.train.split: Input should be 'train' or",
    "task=foo": "task: 'foo' is none of 'classification', 'detection', 'probe'.",
}


@pytest.mark.parametrize("word", WRONG_KEYS)
def test_a_wrong_key_is_explained(message, word):
    text = message(CLASSIFICATION, word)
    assert text.startswith(WRONG_KEYS[word])
    assert text.endswith("(command line)")


def test_wrong_keys_are_explained_at_once_by_file_and_line(message, tmp_path):
    place = f"({tmp_path / 'x.yaml'} line"
    text = CLASSIFICATION.replace("  lr: 1e-3", "  lrr: 1e-3\n  nesterov: 3")
    assert message(text).splitlines() == [
        f"solver.lr: required, but not set. {place} 9)",
        f"solver.nesterov: Input should be a valid boolean, got 3. {place} 12)",
        f"solver.lrr: unknown. Did you mean solver.lr? {place} 11)",
    ]
    without_task = message(CLASSIFICATION.replace("task: classification\n", ""))
    assert without_task.startswith(
        "task: required, one of ['classification', 'detection', 'probe']."
    )


def test_a_key_of_a_replaced_section_does_not_show_its_line(message, tmp_path):
    (tmp_path / "base.yaml").write_text(CLASSIFICATION)
    text = message("_BASE_: base.yaml\n", "data.test={source: huggingface, path: x}")
    assert text == "data.test.split: required, but not set. (command line)"


@pytest.mark.parametrize("name", ["x.yaml", "transfer/x.yaml"])
def test_an_error_names_the_base_with_the_key(tmp_path, name, refused):
    base, path = tmp_path / "base.yaml", tmp_path / name
    base.write_text(CLASSIFICATION.replace("seed", "").replace("lr:", "lrr:"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"_BASE_: {'../' * name.count('/')}base.yaml\nsolver: {{lr: 1}}\n")
    with refused("a misspelled key in a _BASE_", ConfigError) as error:
        load_config(path)
    assert str(error.value) == f"solver.lrr: unknown. Did you mean solver.lr? ({base} line 11)"


STREAMED = "data.train={source: huggingface, path: p, split: s, streaming: true}"
# Task -> overrides that do not go together -> a part of the message.
CONFLICTS = {
    "classification": {
        "evaluation.report=best": "needs data.val to select on: never data.test",
        "data.test=null": "data.test or data.val is needed",
        "solver.steps_iters=[3]": "steps_epochs (or steps_iters) go together",
        "solver.schedule=multistep": "steps_epochs (or steps_iters) go together",
        "solver.max_iters=9": "give one of solver.max_epochs and solver.max_",
        "solver.max_epochs=null": "give one of solver.max_epochs and solver.max_",
        "solver.warmup_epochs=1 & solver.warmup_iters=1": "give one of solver.warmup_epochs",
        "solver.warmup_epochs=2": "warmup_epochs must be less than max_epochs",
        "solver.schedule=multistep & solver.steps_epochs=[2]": "steps_epochs must lie before",
        "evaluation.every_epochs=1 & evaluation.every_iters=1": "evaluation.every_epochs has no",
        "data.transforms.pad_px=4": "data.transforms.pad_px has no use here: pad_px is for crop:",
        "data.transforms.scale=[0.1,1]": "scale is for crop: random_resized",
        "data.transforms.augment_args={a: 1}": "augment is null",
        "data.transforms={resize: whole, crop_ratio: 0.9}": "data.transforms.crop_ratio has no",
        "data.mixup={}": "give mixup_alpha or cutmix_alpha",
        "data.mixup={mixup_alpha: 1, switch_prob: 0.1}": "data.mixup.switch_prob has no use",
        "data.readers=2": "data.train.streaming is false",
        "data.train={source: huggingface, path: p, split: s, num_classes: 3}":
            "data.train.num_classes has no use here: num_classes is for streaming: true",
        f"{STREAMED} & data.cache=ram": "ram keeps all images, and data.train is streamed",
        f"{STREAMED} & data.repeats=2": "data.repeats: needs random access to data.train",
        f"{STREAMED} & data.val={{source: train, fraction: 0.1}}": "holds out images of data.train",
        f"{STREAMED} & data.test={{source: train, fraction: 0.1}}": "data.test: holds out images",
        f"{STREAMED} & model.backbone.stem=whitened": "whitened needs a random sample of data",
        "data.cache=device & data.transforms.rotation_deg=3": "cache: device supports crop: pad,",
        "model.bce_target_threshold=0": "model.bce_target_threshold has no use here: it is for",
        "model.loss=bce & model.bce_target_threshold=0 & model.label_smoothing=0.1":
            "model.label_smoothing has no use here: bce_target_threshold makes smoothed targets 0",
        "model.backbone.name=null": "model.backbone.name is needed",
        "model.weights=a & model.backbone={name: null, stem: cifar}": "stem and args need",
        "model.adapt_stem=true": "ignore_missing and adapt_stem are for model.weights",
        "engine.max_skipped=3": "it is for engine.non_finite: skip",
        "tract.lam=0.5": "tract.lam has no use here: it is for tract.enabled: true",
        "solver.step_factor=0.5": "solver.step_factor has no use here: it is for schedule:",
        "solver.ema_warmup=true": "solver.ema_warmup has no use here: it is for the average that",
        "evaluation={patience: 2, every_iters: 1}": "evaluation.patience chooses by data.val",
        "evaluation={patience: 2, every_iters: 1} & data.test=null": "needs data.test beside it",
        "evaluation.patience=2": "no evaluation before the end: set evaluation.every_epochs or",
        "data.cache=device & data.transforms.crop=resize_random": "and not its crop. Set cache:",
        "model.weights=pretrained & model.ignore_missing=[a]": "ignore_missing and adapt_stem",
    },
    "probe": {
        STREAMED: "data.train.streaming: a probe needs random access",
        "solver.lr=1": "solver: not a key of a probe config",
        "evaluation.logistic_regression=null": "evaluation.metric is logistic_top1, and its",
        "evaluation.metric=knn5_top1": "evaluation.metric is knn5_top1, and its probe is left",
        "evaluation={knn: null, logistic_regression: null}": "none: every probe is null",
        "evaluation.knn.k=5": "evaluation.knn.k",
        "evaluation.metric=svm_map_area & evaluation.svm={}": "measured are:",
        "evaluation.val_fraction=0.2 & data.val={source: digits, split: test}":
            "give one of data.val and evaluation.val_frac",
        "evaluation.val_fraction=0.2 & evaluation.logistic_regression=null":
            "evaluation.val_fraction has no use here: only logistic_regression and linear",
        "data.val={source: digits, split: test} & evaluation.logistic_regression=null":
            "data.val has no use here: only logistic_regression and linear select on",
        "data.val={source: train, fraction: 0.1}": "data.val.source",
        "data.test={source: digit_scenes, split: test}": "Use two of the same kind",
        "evaluation.few_shot={classifier: knn, cs: [1.0]}": "evaluation.few_shot.cs has no use",
        "evaluation.few_shot={classifier: knn, folds: 3}": "evaluation.few_shot.folds has",
        "evaluation.few_shot={temperature: 0.1}": "evaluation.few_shot.temperature has no use",
        "evaluation.svm={folds: 1}": "evaluation.svm.folds",
        "evaluation.linear={lrs: []}": "evaluation.linear.lrs",
    },
    "voc probe": {
        "evaluation.knn={}": "Set evaluation.knn: null, and evaluation.svm",
        "evaluation.linear={}": "Set evaluation.linear: null, and evaluation.svm",
        "evaluation.few_shot={}": "Set evaluation.few_shot.classifier: svm",
        "evaluation.metric=svm_top1": "measured are: svm_map_11point, svm_map_area",
    },
}  # fmt: skip


@pytest.mark.parametrize("task", CONFLICTS)
def test_keys_that_do_not_go_together_are_refused(tmp_path, task, refused):
    path = tmp_path / "x.yaml"
    path.write_text(TEXTS[task])
    for words, expected in CONFLICTS[task].items():
        with refused(f"{task}: {words}", ConfigError) as error:
            load_config(path, words.split(" & "))
        assert expected in str(error.value), words
