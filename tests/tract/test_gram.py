"""The Gram matrix against an oracle that does not unfold: the layer itself.

A filter that is one at one place and zero elsewhere copies that place of the window to the output.
So a layer with all such filters, run on the input, returns its own rows.
"""

import copy
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tract_transfer.tract.gram as gram_module
import tract_transfer.tract.lags as lags_module
from tract_transfer.tract import TrAct, gram_matrix
from tract_transfer.tract.lags import Canvas, lag_gram


def relative_error(gram: torch.Tensor, exact: torch.Tensor) -> float:
    return float((gram - exact).norm() / exact.norm().clamp_min(1e-30))


def rows_of(layer: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
    """(R, N) rows, by the layer's own forward with one-hot filters, in float64."""
    probe = copy.deepcopy(layer).double()
    num_inputs = probe.weight[0].numel()
    probe.weight = nn.Parameter(torch.eye(num_inputs).double().view(-1, *probe.weight.shape[1:]))
    probe.bias = None
    probe.out_channels = num_inputs
    with torch.no_grad():
        return probe(images.double()).permute(0, 2, 3, 1).reshape(-1, num_inputs)


def assert_is_the_product(layer: nn.Conv2d, images: torch.Tensor) -> None:
    rows = rows_of(layer, images)
    gram, num_rows = gram_matrix(layer, images.double())
    assert gram.dtype == torch.float64
    assert num_rows == len(rows)
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid", "same"], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 1)], ids=str)
def test_gram_is_the_unfolded_product(padding, padding_mode, dilation):
    images = torch.randn(2, 2, 9, 8)
    for kernel, stride in itertools.product([1, 3, (2, 4)], [1, 2, (3, 1)]):
        if padding == "same" and stride != 1:
            continue  # torch refuses it
        layer = nn.Conv2d(
            2, 3, kernel, stride, padding, dilation, padding_mode=padding_mode, bias=False
        )
        assert_is_the_product(layer, images)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12), (3, 3)], ids=str)
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (4, 2, 1), (7, 4, 1), (3, 2, 2)])
def test_dynamic_same_pads_by_the_size(size, kernel, stride, dilation):
    layer = Conv2dSame(2, 3, kernel, stride, 0, dilation)
    assert_is_the_product(layer, torch.randn(2, 2, *size))


def test_sum_does_not_depend_on_weights_and_batches():
    images, layer = torch.randn(5, 3, 8, 8).double(), nn.Conv2d(3, 4, 3, 2, 1)
    gram, _ = gram_matrix(layer, images)
    nn.init.zeros_(layer.weight)
    one_by_one = sum(gram_matrix(layer, image)[0] for image in images)  # without a batch dimension
    torch.testing.assert_close(one_by_one, gram)


def test_empty_batch_adds_nothing_and_no_graph_is_kept():
    for layer, shape in ((nn.Conv2d(3, 4, 3), (0, 3, 8, 8)), (nn.Linear(3, 4), (0, 3))):
        gram, num_rows = gram_matrix(layer, torch.zeros(shape, requires_grad=True))
        assert num_rows == 0
        assert not gram.any()
        assert not gram.requires_grad


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_summed_in_float32(dtype, dilation, stride):
    images = torch.randn(2, 3, 30, 30).to(dtype)
    layer = nn.Conv2d(3, 4, 3, stride, 1, dilation)
    gram, _ = gram_matrix(layer, images)
    assert gram.dtype == torch.float32
    assert relative_error(gram, gram_matrix(layer, images.double())[0]) < 1e-6


LAYERS = {
    "cifar": (nn.Conv2d(3, 8, 3, 1, 1), (32, 3, 32, 32)),
    "imagenet": (nn.Conv2d(3, 8, 7, 2, 3), (2, 3, 224, 224)),
    "odd": (nn.Conv2d(3, 8, 5, 3, 2), (3, 3, 75, 101)),
    "patches": (nn.Conv2d(3, 8, 16, 16), (4, 3, 224, 224)),
    "photograph": (nn.Conv2d(3, 8, 3, 1, 1), (1, 3, 300, 400)),
    "linear": (nn.Linear(300, 8), (64, 49, 300)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale, offset, bound", [(1, 0.0, 1e-6), (1, 2.0, 1e-6), (0, 0.7, 3e-6)])
def test_relative_error_is_a_millionth_in_float32_and_3_thousandths_in_bfloat16(
    name, scale, offset, bound
):
    """All products of a constant image are equal, so that rounding errors add up."""
    layer, shape = LAYERS[name]
    images = scale * torch.randn(shape) + offset
    exact = gram_matrix(layer, images.double())[0]
    assert relative_error(gram_matrix(layer, images)[0], exact) < bound
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(gram_matrix(layer, images)[0], exact) < 3e-3


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("level", ["high", "medium"])
def test_less_precise_products_of_the_model_do_not_change_the_sum(name, level):
    """`torch.set_float32_matmul_precision` would round the sums in G."""
    layer, shape = LAYERS[name]
    images = torch.randn(shape) + 2
    before = torch.get_float32_matmul_precision()
    expected = gram_matrix(layer, images)[0]
    torch.set_float32_matmul_precision(level)
    try:
        assert torch.equal(gram_matrix(layer, images)[0], expected)
        assert torch.get_float32_matmul_precision() == level
    finally:
        torch.set_float32_matmul_precision(before)


def test_threads_do_not_change_the_precision_of_other_threads():
    """The precision of products is a setting of the process."""
    layer, images = nn.Conv2d(3, 8, 16, 16), torch.randn(4, 3, 64, 64)
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and newer
    before = getattr(settings, "fp32_precision", None)

    def grams(autocast: bool, count: int) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [gram_matrix(layer, images)[0] for _ in range(count)]

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(grams, (False, True), (40, 40)))
    for autocast, sums in enumerate(results):
        (expected,) = grams(bool(autocast), 1)
        assert all(torch.equal(gram, expected) for gram in sums)
    assert getattr(settings, "fp32_precision", None) == before


@pytest.mark.parametrize("seed", range(10))
def test_windows_of_any_shape_in_chunks_of_any_size(seed, monkeypatch):
    """Windows that overlap, skip pixels, or lie in the padding only."""
    rng = random.Random(seed)
    for _ in range(40):
        kernel, stride, padding = (
            [rng.randint(low, high) for _ in range(2)] for low, high in ((1, 7), (1, 6), (0, 8))
        )
        size = [rng.randint(max(1, k - 2 * p), 24) for k, p in zip(kernel, padding, strict=True)]
        layer = nn.Conv2d(rng.randint(1, 4), 1, kernel, stride, padding, bias=False)
        images = torch.randn(rng.randint(1, 5), layer.in_channels, *size)
        if rng.random() < 0.5:
            images = images.contiguous(memory_format=torch.channels_last)
        monkeypatch.setattr(lags_module, "CHUNK_BYTES", {"cpu": rng.choice([1, 3000, 2**22])})
        monkeypatch.setattr(lags_module, "WIDE", rng.choice([1, 36]))
        monkeypatch.setattr(lags_module, "FEW", rng.choice([0, float("inf")]))
        assert_is_the_product(layer, images)
        rows = rows_of(layer, images)
        assert relative_error(gram_matrix(layer, images)[0], rows.T @ rows) < 1e-6, (layer, size)


@pytest.fixture
def products_as_on_cuda(monkeypatch):
    """Factors of 16 bits, sums of float32, and no Fourier transforms."""
    for module in (gram_module, lags_module):
        monkeypatch.setattr(module, "batch_product", lambda a, b: torch.bmm(a.float(), b.float()))
    monkeypatch.setattr(lags_module, "WIDE", float("inf"))


@pytest.mark.parametrize("name", ["cifar", "imagenet", "odd", "photograph"])
def test_lags_on_a_gpu_round_the_images_and_not_the_sums(name, products_as_on_cuda):
    layer, shape = LAYERS[name]
    images = torch.randn(shape) + 1
    kernel, stride = layer.kernel_size, layer.stride
    padding = gram_module._padding(layer, *shape[2:])
    outputs = layer(images).shape[2:]

    def gram(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return gram_module._gram_by_lags(images, kernel, stride, outputs, padding, dtype)

    exact = gram(images.double(), torch.float64)
    assert relative_error(gram(images, torch.float32), exact) < 1e-6
    for dtype, bound in ((torch.bfloat16, 1e-3), (torch.float16, 1e-4)):
        assert bound / 100 < relative_error(gram(images, dtype), exact) < bound
        rounded = gram(images.to(dtype).double(), torch.float64)
        assert relative_error(gram(images, dtype), rounded) < 1e-6


def test_products_of_rows_on_a_gpu_round_the_rows_and_not_the_sums(products_as_on_cuda):
    rows = torch.randn(1000, 300) + 1
    rounded = rows.half().double()
    product = gram_module._product(rows, torch.float16)
    assert relative_error(product, rounded.T @ rounded) < 1e-6


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under it held at one time, besides the input."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.input_storage = images.untyped_storage()._cdata
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata != self.input_storage:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.alive.values()))
        return result


MEMORY = {
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
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_at_most_twice_the_input(name, autocast, monkeypatch):
    # Modes do not see into operators.
    monkeypatch.setattr(gram_module, "_gram_of_windows", gram_module._gram_of_windows._init_fn)
    layer, shape = MEMORY[name]
    images = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Memory(images) as memory:
        gram, _ = gram_matrix(layer, images)
    assert gram.nbytes < memory.peak_bytes <= 2 * images.nbytes


@pytest.mark.parametrize("lam", [1e-30, 1e-9])
@pytest.mark.parametrize("num_inputs", [27, 768])
@pytest.mark.parametrize("scale", [0, 1e-3, 255.0])
def test_tiny_lam_stays_finite_on_a_matrix_of_rank_one(lam, num_inputs, scale):
    """And blank images, whose relative lam is zero, change nothing."""
    layer = nn.Linear(num_inputs, 4)
    tract = TrAct(layer, lam, lam_mode="absolute" if scale else "relative")
    layer(scale * torch.ones(50, num_inputs)).sum().backward()
    tract.step()
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.any() == bool(scale)


def test_no_step_waits_for_the_device():
    """Nothing reads a value: a fake tensor has none."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for build, shape in (
            (lambda: nn.Conv2d(3, 8, 7, 2, 3), (4, 3, 64, 64)),
            (lambda: nn.Conv2d(3, 8, 16, 16), (4, 3, 64, 64)),
            (lambda: nn.Linear(12, 8), (4, 12)),
        ):
            layer = build()
            tract = TrAct(layer, lam_mode="relative")
            tract._report_problems = lambda wait: None  # reads what the device has finished
            layer(torch.randn(shape)).sum().backward()
            tract.step()
            assert layer.weight.grad.shape == layer.weight.shape
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones(1))


@pytest.mark.skipif(
    torch.__version__ < "2.9" and not torch.cuda.is_available(),
    reason="torch 2.8 asks the driver for its GPU when a slice is taken of a fake tensor on one",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_on_a_gpu_are_float32_and_do_not_wait(dtype):
    windows = gram_module._gram_of_windows._init_fn  # the operators' own fakes do nothing
    ones = [1, 1]
    with FakeTensorMode():
        images = torch.empty(4, 3, 131, 134, device="cuda", dtype=dtype)
        rows = torch.empty(500, 300, 1, 1, device="cuda", dtype=dtype)
        canvas = Canvas(images, (2, 2), (0, 0), (67, 67))
        grams = [
            lag_gram(canvas, (4, 4), dtype),
            windows(rows, ones, ones, ones, [0, 0, 0, 0], ones, dtype),
            windows(images, [4, 4], [4, 4], ones, [1, 1, 0, 2], [33, 34], dtype),
            windows(images, [3, 3], ones, [2, 2], [2, 2, 2, 2], [131, 134], dtype),
        ]
    shapes = [(4, 4, 4, 4, 12, 12), (300, 300), (48, 48), (27, 27)]
    assert [gram.shape for gram in grams] == shapes
    assert {(gram.dtype, gram.device.type) for gram in grams} == {(torch.float32, "cuda")}
