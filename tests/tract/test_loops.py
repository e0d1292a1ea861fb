"""Every loop of docs/guides/tract_loops.md gives the weights of the loop written by hand."""

import re
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tract_transfer.tract import TrAct

PAGE = (Path(__file__).parents[2] / "docs/guides" / "tract_loops.md").read_text(encoding="utf-8")
MAX_NORM = 0.1  # of the page
Batch = tuple[Tensor, Tensor]


def tiny(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return model.to(dtype)


def momentum(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Four batches of four images of growing scale, so that no two have the same matrix."""
    torch.manual_seed(1)
    return [
        (scale * torch.randn(4, 3, 6, 6).to(dtype), torch.randint(3, (4,))) for scale in range(1, 5)
    ]


def pairs() -> list[Batch]:
    """Two batches of eight: what accumulating over two batches equals."""
    (a, b), (c, d), (e, f), (g, h) = batches()
    return [(torch.cat([a, c]), torch.cat([b, d])), (torch.cat([e, g]), torch.cat([f, h]))]


def by_hand(
    data: Iterable[Batch], clip: str = "", treated: bool = True, lam_mode: str = "absolute"
) -> nn.Sequential:
    """The loop; it clips "before" or "after" TrAct, or not at all."""
    model = tiny()
    optimizer = momentum(model)
    tract = TrAct(model, layers=None if treated else [], lam_mode=lam_mode)
    for images, labels in data:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        if clip == "before":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        tract.step()
        if clip == "after":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return model


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-11) -> None:
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=tolerance, atol=tolerance)


def blocks(heading: str) -> list[str]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


def names(model: nn.Module, **more: Any) -> dict[str, Any]:
    """The names that a block uses."""
    common = {"torch": torch, "TrAct": TrAct, "cross_entropy": cross_entropy, "device": "cpu"}
    return {**common, "model": model, "optimizer": momentum(model), "batches": batches(), **more}


def test_every_block_of_the_page_compiles():
    for heading in re.findall(r"^## (.+)$", PAGE, re.M):
        assert blocks(heading)
        for block in blocks(heading):
            compile(block, heading, "exec")


def test_the_loops_by_hand_all_differ():
    """So a loop of the page can equal only the one it is compared with."""
    data = batches()
    runs = [by_hand(data, clip) for clip in ("", "before", "after")]
    runs += [by_hand(data, clip, treated=False) for clip in ("", "before")]
    runs += [by_hand(pairs()), by_hand(data, lam_mode="relative")]
    for run, other in combinations(runs, 2):
        assert (run[0].weight - other[0].weight).abs().max() > 1e-4


@pytest.mark.parametrize("block, data", [(0, batches), (1, pairs)])
def test_pytorch_and_accumulation(block, data):
    exec(blocks("PyTorch")[block], space := names(tiny()))
    assert_same(space["model"], by_hand(data(), "after"))


def plain_loop() -> str:
    """The first loop of the page, without TrAct and clipping."""
    return re.sub(r"^.*(tract|clip_grad).*\n", "", blocks("PyTorch")[0], flags=re.M)


def test_the_whole_interface_leaves_the_model_unchanged():
    exec(blocks("PyTorch")[2] + plain_loop(), space := names(tiny()))
    assert_same(space["model"], by_hand(batches(), treated=False))


def test_report_of_the_page_changes_nothing(capsys):
    exec(blocks("Is it working?")[0], space := names(tiny()))
    assert_same(space["model"], by_hand(batches()))
    assert capsys.readouterr().out == f"{space['tract'].report()}\n"
    assert "\n  verdict      " in str(space["tract"].report())


def test_several_processes(tmp_path):
    """One process runs the page's lines; tests/tract/test_processes.py has more."""
    model = tiny()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        exec(blocks("Several processes")[0] + plain_loop(), names(model))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(model, by_hand(batches()))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("overflow_at", [0, 2])
def test_step_that_a_scaler_skips_has_no_effect(overflow_at, clips):
    data, overflow = batches(torch.float32), batches(torch.float32)
    overflow.insert(overflow_at, (1e6 * data[0][0], data[0][1]))  # inf in float16
    models = [tiny(torch.float32), tiny(torch.float32)]
    for model, data_of_model in zip(models, (data, overflow), strict=True):
        space = names(model, batches=data_of_model)
        exec(blocks("Mixed precision")[int(clips)], space)
    assert space["scaler"].get_scale() == 2**15
    assert_same(*models, tolerance=1e-6)
    assert_same(models[0].double(), by_hand(batches(), "after" if clips else ""), tolerance=0.02)


@pytest.fixture
def accelerate_on_cpu(monkeypatch):
    """accelerate keeps its device and its accumulation for the process."""
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.parametrize("attach", ["", "before prepare", "after prepare"])
def test_accelerate(attach, accelerate_on_cpu):
    """It accumulates over two batches; TrAct steps with the optimizer, twice."""
    loop, line = blocks("accelerate")
    if attach:
        loop = loop.replace("    tract.step()", "    pass").replace("tract = TrAct(model)\n", "")
        loop = re.sub(r" *accelerator\.clip_grad_norm_.*\n", "", loop)
        order = r"\g<0>" + line if attach == "after prepare" else line + r"\g<0>"
        loop = re.sub(r"^.*prepare\(.*\n", order, loop, flags=re.M)
    model = tiny()
    exec(loop, names(model))
    assert_same(model, by_hand(pairs(), "" if attach else "after"))


class WithLoss(nn.Module):
    """The Hugging Face trainer calls models like this."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.model(images), labels)}


@pytest.mark.parametrize("clips", [False, True])
def test_hugging_face_trainer(clips, tmp_path, accelerate_on_cpu):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    samples = [sample for batch in batches() for sample in zip(*batch, strict=True)]
    dataset = [{"images": image, "labels": label} for image, label in samples]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1,
        optim="sgd", optim_args="momentum=0.9", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=MAX_NORM if clips else 0, train_sampling_strategy="sequential",
    )  # fmt: skip
    space = names(WithLoss(model), arguments=arguments, dataset=dataset)
    exec(blocks("Hugging Face Trainer")[0], space)
    assert space["trainer"].state.global_step == 2
    assert_same(model, by_hand(pairs(), "before" if clips else ""))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["attach", "callback"])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(way, clips, accumulate):
    pytest.importorskip("lightning")
    model = tiny()
    space = names(model)
    module_block, callback_block = blocks("Lightning")
    if way == "callback":
        module_block = module_block.replace("TrAct(self.model).attach(optimizer)", "pass")
    exec(module_block + callback_block, space)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = space["lightning"].Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=accumulate,
        gradient_clip_val=MAX_NORM if clips else None,
        callbacks=[space["TrActCallback"]()] if way == "callback" else [],
        **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(space["Classifier"](model), DataLoader(batches(), batch_size=None))
    clip = {"attach": "before", "callback": "after"}[way] if clips else ""
    assert_same(model, by_hand(batches() if accumulate == 1 else pairs(), clip))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_timm(clips, scales):
    """The lines of timm's train.py, whose loop cannot be imported."""
    model = tiny()
    space = names(model, create_optimizer_v2=create_optimizer_v2)
    exec(blocks("timm")[0], space)
    optimizer, clip_grad = space["optimizer"], MAX_NORM if clips else None
    scaler = timm.utils.NativeScaler(device="cpu") if scales else None
    weights = list(model.parameters())
    for index, (images, labels) in enumerate(batches()):
        loss = cross_entropy(model(images), labels) / 2
        updates = index % 2 == 1
        if scaler is not None:
            options = {"clip_grad": clip_grad, "parameters": weights, "need_update": updates}
            scaler(loss, optimizer, **options)
        else:
            loss.backward()
            if updates and clip_grad is not None:
                timm.utils.dispatch_clip_grad(weights, clip_grad, mode="norm")
            if updates:
                optimizer.step()
        if updates:
            optimizer.zero_grad()
    assert_same(model, by_hand(pairs(), "before" if clips else ""))
