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
import sys
import torch
from torch import nn
from tract_transfer.tract import TrAct

torch.set_num_threads(1)
rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
)
model, images = torch.load(f"{folder}/case.pt", weights_only=False)
share = {"even": [3, 3], "empty": [6, 0]}.get(kind, [4, 2])
images = images.split(share)[rank]
if kind == "fsdp":
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    if folder.endswith("early"):
        tract = TrAct(model)
    wrapped = fully_shard(model, mesh=mesh)
    if not folder.endswith("early"):
        tract = TrAct(model)
else:
    wrapped = nn.parallel.DistributedDataParallel(model)
    tract = TrAct(wrapped)
# The mean over processes of this is the sum over all images over their number.
loss = wrapped(images).square().flatten(1).mean(1).sum() * 2 / 6
if kind == "micro":
    with wrapped.no_sync():
        (wrapped(images[:1]).square().flatten(1).mean(1).sum() * 2 / 6).backward()
    (wrapped(images[1:]).square().flatten(1).mean(1).sum() * 2 / 6).backward()
else:
    loss.backward()
tract.step()
gradient = model[0].weight.grad
if kind == "fsdp":
    assert gradient.to_local().shape[0] == {0: 2, 1: 1}[rank]
    gradient = gradient.full_tensor()
torch.save(gradient, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["even", "uneven", "empty", "micro", "fsdp", "fsdp early"])
def test_two_processes_are_one(kind, tmp_path):
    """Batches even, uneven, or all on one side; micro-batches; weights sharded by row (FSDP2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.Flatten(), nn.Linear(48, 2)).double()
    images = torch.randn(6, 3, 8, 8).double()
    folder = tmp_path / kind.partition(" ")[2] if " " in kind else tmp_path
    folder.mkdir(exist_ok=True)
    torch.save((model, images), folder / "case.pt")
    root = Path(tract_transfer.__file__).parents[1]
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), kind.split()[0]], cwd=root)
        for rank in range(2)
    ]
    tract = TrAct(model)
    (model(images).square().flatten(1).mean(1).sum() / 6).backward()
    tract.step()
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    for rank in range(2):
        update = torch.load(folder / f"{rank}.pt")
        torch.testing.assert_close(update, model[0].weight.grad, rtol=1e-10, atol=1e-12)
