"""What the Gram matrix takes beside its input: never the unfolded batch."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tract_transfer.tract.gram as gram_module
from tract_transfer.tract import gram_matrix


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage()._cdata
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata != self.known:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.alive.values()))
        return made


CASES = {
    "cifar": (nn.Conv2d(3, 8, 3, 1, 1), (64, 3, 32, 32)),
    "imagenet": (nn.Conv2d(3, 8, 7, 2, 3), (8, 3, 224, 224)),
    "large overlapping patches": (nn.Conv2d(3, 8, 16, 8), (16, 3, 224, 224)),
    "odd sizes": (nn.Conv2d(3, 8, 7, 2, 3), (8, 3, 225, 231)),
    "one large photograph": (nn.Conv2d(3, 8, 7, 2, 3), (1, 3, 801, 1333)),
    "stride 1": (nn.Conv2d(3, 8, 3, 1, 1), (1, 3, 600, 800)),
    "patches": (nn.Conv2d(3, 8, 16, 16), (16, 3, 224, 224)),
    "dilated": (nn.Conv2d(3, 8, 3, 1, 1, 2), (8, 3, 224, 224)),
    "tokens": (nn.Linear(192, 8), (64, 196, 192)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_at_most_twice_the_input(name, autocast, monkeypatch):
    for operator in ("_gram_of_rows", "_gram_of_windows"):  # the modes do not see into operators
        monkeypatch.setattr(gram_module, operator, getattr(gram_module, operator)._init_fn)
    layer, shape = CASES[name]
    images = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Memory(images) as memory:
        gram, _ = gram_matrix(layer, images)
    assert memory.peak_bytes > gram.nbytes
    assert memory.peak_bytes <= 2 * images.nbytes
