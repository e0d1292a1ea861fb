"""What a model costs, block by block: parameters, FLOPs and what a training step must remember."""

# R rows an image that a first layer multiplies, N inputs a row, O outputs

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tract_transfer.engine.evaluate import evaluating

ELSEWHERE = "(elsewhere)"
# Parts that only hold the model proper: they are always opened.
_WRAPPERS = ("backbone", "model")


class Block(NamedTuple):
    """A part of a model by its dotted name; `flops` are those of a forward."""

    name: str
    kind: str
    parameters: int
    flops: int


class FirstLayer(NamedTuple):
    """A layer that reads the image: TrAct inverts a matrix of `inputs` x `inputs` for it."""

    name: str
    kind: str
    outputs: int
    inputs: int
    rows: int


def measure_blocks(model: nn.Module, run: Callable[[], object], depth: int = 1) -> list[Block]:
    """Run an evaluation and return the cost of every block, in their order.

    A multiplication and its addition count as two FLOPs; what is no convolution, product of
    matrices or attention counts as none. What no block has done itself is `(elsewhere)`.

    Args:
        run: calls the model, or a method of it.
        depth: how many levels of parts to open; `backbone` and `model` are no level.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        _Call(model, run)()
    # Modules have names below the one that was called, `_Call.model`.
    counts = {str(name): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    own = {name.removeprefix("_Call.model."): count for name, count in counts.items()}

    def flops(name: str, module: nn.Module) -> int:
        if name in own:
            return own[name]
        return sum(flops(f"{name}.{child}", part) for child, part in module.named_children())

    blocks = [
        Block(name, type(part).__name__, _count(part), flops(name, part))
        for name, part in _blocks(model, depth)
    ]
    rest = counter.get_total_flops() - sum(block.flops for block in blocks)
    parameters = _count(model) - sum(block.parameters for block in blocks)
    return blocks + ([Block(ELSEWHERE, "", parameters, rest)] if rest or parameters else [])


def measure_first_layers(
    model: nn.Module, names: list[str], run: Callable[[], object], num_images: int
) -> list[FirstLayer]:
    """Run an evaluation of `num_images` images and return what the named layers multiply."""
    layers = {name: model.get_submodule(name) for name in names}
    numbers: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            numbers[name] = output.numel()

        return hook

    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        outputs = len(weight)
        rows = numbers[name] // outputs // num_images
        kind = type(layer).__name__
        found.append(FirstLayer(name, kind, outputs, weight.numel() // outputs, rows))
    return found


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that a training forward keeps for its backward, weights left out.

    Args:
        run: calls the model, or a method of it, and returns what holds the graph.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # views share their storage: it counts once
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = run()  # alive until all is counted, so that no address comes twice
    del graph
    return sum(kept.values())


class _Call(nn.Module):
    """Makes any method of a model one call of a module, below which all parts have names."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self) -> object:
        return self.run()


def _blocks(model: nn.Module, depth: int, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for child, part in model.named_children():
        left = depth if child in _WRAPPERS else depth - 1
        has_parts = any(True for _ in part.children())
        if has_parts and (left > 0 or child in _WRAPPERS):
            yield from _blocks(part, left, f"{prefix}{child}.")
        else:
            yield f"{prefix}{child}", part


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
