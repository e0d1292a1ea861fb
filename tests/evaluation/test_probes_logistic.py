import numpy as np
import pytest
from probe_rows import TEST, TRAIN, clusters
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation.linear_probes import accuracy_by_c, logistic_regression
from tract_transfer.evaluation.probes import Rows, Selection, hold_out_selection

CS = (0.01, 0.1, 1.0)


def fit(train=TRAIN, test_x=TEST.x, cs=CS, max_iters=500, num_classes=4, selection=None):
    selection = selection or hold_out_selection(train, 0.25, seed=0)
    return logistic_regression(
        train, test_x, selection=selection, cs=cs, max_iters=max_iters, num_classes=num_classes
    )


def pipeline(c):
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500))


def test_it_is_scikit_learns_on_all_of_train_with_the_chosen_c():
    result = fit()
    best = result.chosen["c"]
    oracle = pipeline(best).fit(TRAIN.x.astype(float), TRAIN.y)
    np.testing.assert_allclose(
        result.scores, oracle.predict_log_proba(TEST.x.astype(float)), atol=1e-6
    )
    tried = result.details["val_top1"]
    assert list(tried) == ["0.01", "0.1", "1"]
    assert tried[f"{best:g}"] == max(tried.values())
    assert result.details["converged"]
    assert (result.scores.argmax(1) == TEST.y).mean() > 0.8


def test_c_is_chosen_on_the_selection_alone():
    """The C that is best there, whatever train and test show."""
    fit_rows, val = clusters(60, seed=3), clusters(60, seed=4)
    cs = (1e-6, 1e-2, 1.0, 1e4)
    found = accuracy_by_c(Selection(fit_rows, val), cs, 500)
    for c, value in found.items():
        oracle = pipeline(c).fit(fit_rows.x.astype(float), fit_rows.y)
        assert value == pytest.approx(oracle.score(val.x.astype(float), val.y), abs=0.02)
    result = fit(cs=cs, selection=Selection(fit_rows, val))
    assert result.chosen["c"] == next(c for c in cs if found[c] == max(found.values()))
    other = fit(cs=cs, selection=Selection(fit_rows, val), test_x=TEST.x[:1] * 100)
    assert (other.chosen, other.details) == (result.chosen, result.details)


def test_it_standardises_so_units_do_not_matter():
    scale = np.float32(2.0) ** np.arange(6)
    moved = fit(Rows(TRAIN.x * scale + 1, TRAIN.y), TEST.x * scale + 1)
    np.testing.assert_allclose(moved.scores, fit().scores, atol=1e-3)


@pytest.mark.parametrize("present", [(1, 3), (0, 2, 5)])
def test_absent_classes_have_a_column_that_never_wins(present):
    y = np.array(present)[np.arange(len(TRAIN.x)) % len(present)]
    scores = fit(Rows(TRAIN.x, y), num_classes=7).scores
    assert scores.shape == (80, 7)
    assert np.isfinite(scores).all()
    assert set(scores.argmax(1)) <= set(present)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1)
    absent = [k for k in range(7) if k not in present]
    assert scores[:, absent].max() < scores[:, list(present)].min()


def test_it_serves_a_class_of_one_row_and_reports_unfinished_fits():
    y = TRAIN.y.copy()
    y[0] = 4
    result = fit(Rows(TRAIN.x, y), max_iters=1, num_classes=5)
    assert result.scores.shape == (80, 5)
    assert not result.details["converged"]


def test_it_names_what_is_wrong():
    with pytest.raises(ValueError, match="values of C"):
        fit(cs=())
    with pytest.raises(ValueError, match="values of C"):
        fit(cs=(0.0, 1.0))
