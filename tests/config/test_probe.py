"""A probe's config: what its sections refuse, and what they say to do."""

import pytest

from tract_transfer.config.file import ConfigError
from tract_transfer.config.schema import load_config

PROBE = """\
task: probe
output_dir: out
model:
  backbone: {name: cifar/resnet18}
data:
  train: {source: digits, split: train}
  test: {source: digits, split: test}
  transforms: {size_px: 32}
  batch_size: 64
"""
VOC = PROBE.replace("source: digits", "source: voc, root: here, sets: [2007/train]").replace(
    ", split: train}", "}"
).replace(", split: test}", "}")  # fmt: skip
SVM_ALONE = ("evaluation={knn: null, logistic_regression: null, svm: {}, metric: svm_map_11point}",)


@pytest.fixture
def load(tmp_path):
    def read(text, *words):
        path = tmp_path / "probe.yaml"
        path.write_text(text)
        return load_config(path, words)

    return read


def test_the_defaults_are_those_of_dino_and_vissl(load):
    evaluation = load(PROBE, "evaluation.svm={}").evaluation
    assert evaluation.knn.ks == [10, 20, 100, 200]
    assert evaluation.knn.temperature == 0.07
    cs = evaluation.logistic_regression.cs
    assert (len(cs), cs[0], cs[-1]) == (45, pytest.approx(1e-6), pytest.approx(1e5))
    assert cs[1] / cs[0] == pytest.approx(10 ** (11 / 44))
    assert evaluation.svm.cs == [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000]
    assert evaluation.svm.folds == 3


@pytest.mark.parametrize(
    "metric",
    ["knn10_top1", "knn200_mean_per_class", "logistic_top5", "linear_top1", "svm_top1",
     "shot4_top1"],
)  # fmt: skip
def test_every_probe_that_runs_can_be_the_metric(load, metric):
    words = ("evaluation.linear={}", "evaluation.svm={}", "evaluation.few_shot={}")
    assert load(PROBE, *words, f"evaluation.metric={metric}").evaluation.metric == metric


@pytest.mark.parametrize("metric", ["svm_map_11point", "svm_map_area", "shot2_map_area"])
def test_of_several_labels_too(load, metric):
    few_shot = "evaluation.few_shot={ks: [2], classifier: svm}"
    words = (*SVM_ALONE, few_shot, f"evaluation.metric={metric}")
    assert load(VOC, *words).data.has_many_labels


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluation.metric=knn5_top1"],
         "evaluation.metric is knn5_top1, and its probe is left out; measured are: knn10_top1,"),
        (["evaluation={knn: null, logistic_regression: null}"], "none: every probe is null"),
        (["evaluation.knn.k=5"], "evaluation.knn.k"),
        (["evaluation.metric=svm_map_area", "evaluation.svm={}"], "measured are:"),
        (["evaluation.val_fraction=0.2", "data.val={source: digits, split: test}"],
         "give one of data.val and evaluation.val_fraction"),
        (["evaluation.val_fraction=0.2", "evaluation.logistic_regression=null"],
         "evaluation.val_fraction is for logistic_regression and linear to select on"),
        (["data.val={source: digits, split: test}", "evaluation.logistic_regression=null"],
         "data.val is for logistic_regression and linear to select on"),
        (["data.val={source: train, fraction: 0.1}"], "data.val.source"),
        (["data.test={source: digit_scenes, split: test}"], "Take both of one kind"),
        (["evaluation.few_shot={classifier: knn, cs: [1.0]}"],
         "evaluation.few_shot.cs is not for knn"),
        (["evaluation.few_shot={classifier: knn, folds: 3}"],
         "evaluation.few_shot.folds is not for knn"),
        (["evaluation.few_shot={temperature: 0.1}"],
         "evaluation.few_shot.temperature is not for logistic"),
        (["data.transforms={resize: whole, crop_ratio: 0.9}"],
         "crop_ratio is for resize: short, and resize is whole"),
        (["evaluation.svm={folds: 1}"], "evaluation.svm.folds"),
        (["evaluation.linear={lrs: []}"], "evaluation.linear.lrs"),
    ],
)  # fmt: skip
def test_what_has_no_use_is_refused(load, words, says):
    with pytest.raises(ConfigError) as caught:
        load(PROBE, *words)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evaluation.knn={}"], "Set evaluation.knn: null, and evaluation.svm"),
        (["evaluation.linear={}"], "Set evaluation.linear: null, and evaluation.svm"),
        (["evaluation.few_shot={}"], "Set evaluation.few_shot.classifier: svm"),
        (["evaluation.metric=svm_top1"], "measured are: svm_map_11point, svm_map_area"),
    ],
)
def test_probes_of_one_label_are_refused_where_there_are_several(load, words, says):
    with pytest.raises(ConfigError) as caught:
        load(VOC, *SVM_ALONE, *words)
    assert says in str(caught.value)
