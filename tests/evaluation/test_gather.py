"""Two processes with half of the images each compute what one computes."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tract_transfer.evaluation import ClassificationEvaluator, CocoEvaluator, VocEvaluator
from tract_transfer.evaluation.classification import all_rows

N, K = 30, 7


def classification():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=generator), torch.arange(N) % K


def voc():
    predictions, targets = [], []
    for image_id in range(N):
        generator = torch.Generator().manual_seed(image_id)
        corners = torch.rand(4, 2, generator=generator) * 50
        truth = torch.cat([corners, corners + 40], dim=1)[: image_id % 5]
        labels = torch.arange(len(truth)) % K
        scores = torch.randint(0, 4, (len(truth),), generator=generator) / 4  # many ties
        boxes = truth + torch.randn(truth.shape, generator=generator) * 6
        predictions.append({"boxes": boxes, "labels": labels, "scores": scores})
        difficult = torch.rand(len(truth), generator=generator) < 0.2
        targets.append(
            {"boxes": truth, "labels": labels, "difficult": difficult, "image_id": image_id}
        )
    return predictions, targets


def results_of(part):
    results = []
    makers = {VocEvaluator: voc, CocoEvaluator: voc, ClassificationEvaluator: classification}
    for kind, make in makers.items():
        predictions, targets = make()
        evaluator = kind([*"abcdefg"])
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
        ours = json.loads((tmp_path / f"{rank}.json").read_text())
        assert ours[4].pop("loss") == pytest.approx(loss, rel=1e-14)  # a sum in another order
        assert ours == expected
