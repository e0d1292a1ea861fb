import math

import numpy as np
import pytest
import torch
from probe_rows import TEST, TRAIN
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from tract_transfer.evaluation.linear_probes import linear_probe, train_linear
from tract_transfer.evaluation.probes import Rows, hold_out_selection

POINTS = [(0.1, 0.0), (0.01, 0.0), (0.1, 0.05)]
OPTIONS = {"max_epochs": 3, "batch_size": 32, "momentum": 0.9, "seed": 5, "num_classes": 4}


def tensors(rows=TRAIN):
    return torch.from_numpy(rows.x), torch.from_numpy(rows.y)


def probe(train=TRAIN, test_x=TEST.x, **changed):
    options = {**OPTIONS, "lrs": [0.01, 0.1], "weight_decays": [0.0], **changed}
    selection = options.pop("selection", None) or hold_out_selection(train, 0.25, seed=0)
    return linear_probe(train, test_x, selection=selection, **options)


@pytest.mark.parametrize(("lr", "weight_decay"), POINTS)
def test_a_point_is_torchs_sgd(lr, weight_decay):
    x, y = tensors()
    weight, bias = train_linear(x, y, [(lr, weight_decay)], **OPTIONS)
    layer = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [
        {"params": [layer.weight], "weight_decay": weight_decay},
        {"params": [layer.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    steps, total = 0, 3 * math.ceil(200 / 32)
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(200)
        for start in range(0, 200, 32):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * steps / total))
            rows = order[start : start + 32]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
    torch.testing.assert_close(weight[0].T, layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias[0], layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_a_point_learns_the_same_alone_or_in_a_grid():
    x, y = tensors()
    weights, biases = train_linear(x, y, POINTS, **OPTIONS)
    for at, point in enumerate(POINTS):
        weight, bias = train_linear(x, y, [point], **OPTIONS)
        torch.testing.assert_close(weights[at], weight[0])
        torch.testing.assert_close(biases[at], bias[0])
    assert not torch.equal(weights[0], weights[2])  # weight decay does something


def test_it_is_a_function_of_the_seed():
    x, y = tensors()
    one, again, other = (
        train_linear(x, y, POINTS[:1], **{**OPTIONS, "seed": seed})[0] for seed in (5, 5, 6)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_long_training_is_logistic_regression():
    x, y = tensors()
    x = (x - x.mean(0)) / x.std(0)
    options = {**OPTIONS, "max_epochs": 400, "batch_size": 200}
    weight, bias = train_linear(x, y, [(0.5, 0.01)], **options)
    c = 1 / (0.01 * len(x))
    oracle = LogisticRegression(C=c, max_iter=1000, tol=1e-8).fit(x.numpy(), y.numpy())
    ours = (x @ weight[0] + bias[0]).softmax(1)
    np.testing.assert_allclose(ours, oracle.predict_proba(x.numpy()), atol=1e-3)


def test_the_best_point_of_the_selection_is_trained_on_all_of_train():
    result = probe()
    tried = result.details["val_top1"]
    assert list(tried) == ["lr 0.01, weight decay 0", "lr 0.1, weight decay 0"]
    lr = result.chosen["lr"]
    assert tried[f"lr {lr:g}, weight decay 0"] == max(tried.values())
    scaler = StandardScaler().fit(TRAIN.x.astype(float))
    x, test = (torch.from_numpy(scaler.transform(a).astype(np.float32)) for a in (TRAIN.x, TEST.x))
    weight, bias = train_linear(x, torch.from_numpy(TRAIN.y), [(lr, 0.0)], **OPTIONS)
    np.testing.assert_allclose(result.scores, test @ weight[0] + bias[0], atol=1e-5)
    assert (result.scores.argmax(1) == TEST.y).mean() > 0.8


def test_the_test_images_choose_nothing():
    result = probe()
    other = probe(test_x=TEST.x[:1] * 100)
    assert (other.chosen, other.details) == (result.chosen, result.details)


def test_equals_take_the_smallest_and_a_point_that_diverges_is_never_chosen():
    selection = hold_out_selection(TRAIN, 0.25, seed=0)
    easy = Rows(selection.val.x[:1], selection.fit.y[:1] * 0 + selection.val.y[0])
    chosen = probe(selection=selection._replace(val=easy), lrs=[0.2, 0.1]).chosen
    assert chosen == {"lr": 0.1, "weight_decay": 0.0}
    wild = probe(lrs=[0.1, 1e5], weight_decays=[1.0], max_epochs=30)
    assert wild.details["val_top1"]["lr 100000, weight decay 1"] is None
    with pytest.raises(ValueError, match=r"Lower evaluation\.linear\.lrs"):
        probe(lrs=[1e5], weight_decays=[1e3], max_epochs=30)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="a learning rate and a weight decay"):
        probe(lrs=[])
