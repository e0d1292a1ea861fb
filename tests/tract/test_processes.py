"""TrAct over two processes is TrAct over one with the joined batch."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import tract_transfer
from tract_transfer.tract import TrAct

# A script instead of a function of this module, whose imports would cost each process seconds.
WORKER = """
import copy
import itertools
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tract_transfer.tract import TrAct

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
plain, images, shares = torch.load(f"{folder}/case.pt", weights_only=False)
gradients = {}
for wrapper, case in itertools.product(("ddp", "fsdp", "tract, then fsdp"), shares):
    model, share = copy.deepcopy(plain), images.split(shares[case])[rank]
    if wrapper == "tract, then fsdp":
        tract = TrAct(model)
    ddp = wrapper == "ddp"
    wrapped = nn.parallel.DistributedDataParallel(model) if ddp else fully_shard(model, mesh=mesh)
    if wrapper != "tract, then fsdp":
        tract = TrAct(wrapped)

    def backward(images):
        # The mean of this over processes is the sum over all images divided by their number.
        (wrapped(images).square().flatten(1).mean(1).sum() * 2 / 6).backward()

    if case == "micro":
        with wrapped.no_sync() if ddp else nullcontext():
            backward(share[:1])
        backward(share[1:])
    else:
        if case == "skipped second":
            backward(share)
            tract.step()
            wrapped.zero_grad()
        if case.startswith("skipped"):
            backward(3 + 2 * share[:1])
            wrapped.zero_grad()
        backward(share)
    if rank == 0:
        tract.report()  # a report is of one process and waits for no other
    tract.step()
    assert tract.report().is_safe
    gradient = model[0].weight.grad
    if not ddp:
        assert gradient.to_local().shape[0] == {0: 2, 1: 1}[rank]
        gradient = gradient.full_tensor()
    gradients[f"{wrapper}: {case}"] = gradient
torch.save(gradients, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""
SHARES = {
    "even": [3, 3],
    "uneven": [4, 2],
    "empty": [6, 0],
    "micro": [4, 2],
    "skipped first": [2, 4],
    "skipped second": [2, 4],
}


def test_two_processes_are_one(tmp_path):
    """With batches even, uneven, or all on one side; micro-batches; a step that a scaler skips.

    FSDP2 shards weights by row, before or after TrAct is made.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Flatten(), nn.Linear(48, 2)).double()
    images = torch.randn(6, 3, 8, 8).double()
    torch.save((model, images, SHARES), tmp_path / "case.pt")
    root = Path(tract_transfer.__file__).parents[1]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], cwd=root)
        for rank in range(2)
    ]
    tract = TrAct(model)
    (model(images).square().flatten(1).mean(1).sum() / 6).backward()
    tract.step()
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    for rank in range(2):
        updates = torch.load(tmp_path / f"{rank}.pt")
        assert len(updates) == 3 * len(SHARES)
        for case, update in updates.items():
            torch.testing.assert_close(
                update, model[0].weight.grad, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: c + m
            )
