"""Two processes with a part of the images each compute what one computes."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from random_detections import NAMES, images

from tract_transfer.evaluation import ClassificationEvaluator, CocoEvaluator, VocEvaluator
from tract_transfer.evaluation.classification import all_rows

DETECTIONS, TARGETS = zip(*images(30), strict=True)
LOGITS = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
INPUTS = {
    VocEvaluator: (DETECTIONS, TARGETS),
    CocoEvaluator: (DETECTIONS, TARGETS),
    ClassificationEvaluator: (LOGITS, torch.arange(30) % 4),
}


def results_of(part):
    results = []
    for kind, (predictions, targets) in INPUTS.items():
        evaluator = kind(NAMES)
        evaluator.update(predictions[part], targets[part])
        results += [evaluator.compute(), evaluator.details()]
    return results


def worker(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    part = slice(0, 11) if rank else slice(11, None)  # out of order, of different size
    (folder / f"{rank}.json").write_text(json.dumps(results_of(part)))
    dist.destroy_process_group()


def test_without_a_group_the_rows_are_those_of_the_process():
    assert all_rows((1, 2)) == [1, 2]


def test_two_processes_compute_the_same_as_one(tmp_path):
    expected = json.loads(json.dumps(results_of(slice(None))))
    loss = expected[4].pop("loss")
    assert 0 < expected[0]["ap75"] < expected[0]["ap50"] < 1
    mp.spawn(worker, (tmp_path,), nprocs=2)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results[4].pop("loss") == pytest.approx(loss, rel=1e-14)  # a sum in another order
        assert results == expected
