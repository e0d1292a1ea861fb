"""TrAct over two processes is TrAct over one with the joined batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tract_transfer
from tract_transfer.tract import TrAct

# A script and not a function of this module, whose imports would cost each process seconds.
WORKER = """
import copy
import sys
from contextlib import nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from tract_transfer.tract import TrAct

torch.set_num_threads(1)
rank, folder, wrapper = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
plain, images, shares = torch.load(f"{folder}/case.pt", weights_only=False)
gradients = {}
for case, share in shares.items():
    model, own = copy.deepcopy(plain), images.split(share)[rank]
    if wrapper == "fsdp early":
        tract = TrAct(model)
    ddp = wrapper == "ddp"
    wrapped = nn.parallel.DistributedDataParallel(model) if ddp else fully_shard(model, mesh=mesh)
    if wrapper != "fsdp early":
        tract = TrAct(wrapped)

    def backward(images):
        # The mean over processes of this is the sum over all images over their number.
        (wrapped(images).square().flatten(1).mean(1).sum() * 2 / 6).backward()

    if case == "micro":
        with wrapped.no_sync() if ddp else nullcontext():
            backward(own[:1])
        backward(own[1:])
    elif case == "skipped":
        backward(own)
        tract.step()
        wrapped.zero_grad()
        backward(3 + 2 * own[:1])
        wrapped.zero_grad()
        backward(own)
    elif case == "skipped first":
        backward(3 + 2 * own[:1])
        wrapped.zero_grad()
        backward(own)
    else:
        backward(own)
    tract.step()
    gradient = model[0].weight.grad
    if not ddp:
        assert gradient.to_local().shape[0] == {0: 2, 1: 1}[rank]
        gradient = gradient.full_tensor()
    gradients[case] = gradient
torch.save(gradients, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""
SHARES = {
    "even": [3, 3],
    "uneven": [4, 2],
    "empty": [6, 0],
    "micro": [4, 2],
    "skipped": [2, 4],
    "skipped first": [2, 4],
}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp early"])
def test_two_processes_are_one(wrapper, tmp_path):
    """Batches even, uneven, or all on one side; micro-batches; a step that a scaler skipped, the
    second or the first.

    Weights sharded by row (FSDP2) after TrAct was made, and before (early).
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Flatten(), nn.Linear(48, 2)).double()
    images = torch.randn(6, 3, 8, 8).double()
    torch.save((model, images, SHARES), tmp_path / "case.pt")
    root = Path(tract_transfer.__file__).parents[1]
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path), wrapper], cwd=root)
        for rank in range(2)
    ]
    tract = TrAct(model)
    (model(images).square().flatten(1).mean(1).sum() / 6).backward()
    tract.step()
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    for rank in range(2):
        updates = torch.load(tmp_path / f"{rank}.pt")
        assert list(updates) == list(SHARES)
        for case, update in updates.items():
            torch.testing.assert_close(
                update, model[0].weight.grad, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: c + m
            )
