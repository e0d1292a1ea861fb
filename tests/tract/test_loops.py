"""In every loop of docs/tract_loops.md the weights are those of the loop written by hand."""

import re
from collections.abc import Iterable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from timm.optim import Lookahead, create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from tract_transfer.tract import TrAct

PAGE = Path(__file__).parents[2] / "docs" / "tract_loops.md"
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
    """Four of four images, the later the larger: no two have one matrix."""
    torch.manual_seed(1)
    sizes = (1.0, 2.0, 3.0, 4.0)
    return [(s * torch.randn(4, 3, 6, 6).to(dtype), torch.randint(3, (4,))) for s in sizes]


def pairs(small: list[Batch]) -> list[Batch]:
    """Two batches of eight: what accumulating over two equals."""
    return [
        (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
        for first, second in zip(small[::2], small[1::2], strict=True)
    ]


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


def assert_same(model: nn.Module, other: nn.Module, tolerance: float = 1e-11) -> None:
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def blocks(heading: str) -> list[str]:
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    return re.findall(r"^```python\n(.*?)^```", section.partition("\n## ")[0], re.M | re.S)


def names(model: nn.Module, **more: Any) -> dict[str, Any]:
    """What a block finds."""
    return {
        "torch": torch,
        "TrAct": TrAct,
        "cross_entropy": cross_entropy,
        "model": model,
        "optimizer": momentum(model),
        "device": "cpu",
        **more,
    }


def test_every_block_of_the_page_compiles():
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert all(blocks(heading) for heading in headings)
    for block in chain.from_iterable(blocks(heading) for heading in headings):
        compile(block, str(PAGE), "exec")


def test_the_loops_by_hand_all_differ():
    """So that a loop of the page can equal only the one it is compared with."""
    data = batches()
    runs = [by_hand(data, clip) for clip in ("", "before", "after")]
    runs += [by_hand(data, clip, treated=False) for clip in ("", "before")]
    runs += [by_hand(pairs(data)), by_hand(data, lam_mode="relative")]
    for run, other in combinations(runs, 2):
        assert (run[0].weight - other[0].weight).abs().max() > 1e-4


def test_pytorch():
    model = tiny()
    exec(blocks("PyTorch")[0], names(model, batches=batches()))
    assert_same(model, by_hand(batches(), "after"))


def test_accumulation():
    model = tiny()
    exec(blocks("PyTorch")[1], names(model, batches=batches()))
    assert_same(model, by_hand(pairs(batches()), "after"))


def plain_loop() -> str:
    """The page's first, without TrAct and clipping."""
    return re.sub(r"^.*(tract|clip_grad).*\n", "", blocks("PyTorch")[0], flags=re.M)


def test_all_that_it_has_leaves_the_model_as_it_was():
    exec(blocks("PyTorch")[2] + plain_loop(), space := names(tiny(), batches=batches()))
    assert_same(space["model"], by_hand(batches(), treated=False))


def test_several_processes(tmp_path):
    """One runs the page's lines here; tests/tract/test_processes.py has more."""
    model = tiny()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        exec(blocks("Several processes")[0] + plain_loop(), names(model, batches=batches()))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(model, by_hand(batches()))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("overflow_at", [0, 2])
def test_a_step_that_a_scaler_skips_leaves_nothing_behind(overflow_at, clips):
    data, overflow = batches(torch.float32), batches(torch.float32)
    overflow.insert(overflow_at, (1e6 * data[0][0], data[0][1]))  # inf in float16
    models = [tiny(torch.float32), tiny(torch.float32)]
    for model, given in zip(models, (data, overflow), strict=True):
        space = names(model, batches=given)
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
    model = tiny()
    space = names(model, batches=batches())
    if attach:
        loop = loop.replace("    tract.step()", "    pass").replace("tract = TrAct(model)\n", "")
        loop = re.sub(r" *accelerator\.clip_grad_norm_.*\n", "", loop)
        lines = loop.splitlines()
        at = next(n for n, text in enumerate(lines) if "prepare(" in text)
        lines.insert(at + (attach == "after prepare"), line)
        loop = "\n".join(lines)
    exec(loop, space)
    assert_same(model, by_hand(pairs(batches()), "" if attach else "after"))


class WithLoss(nn.Module):
    """As the Hugging Face trainer calls models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.model(images), labels)}


@pytest.mark.parametrize("clips", [False, True])
def test_hugging_face_trainer(clips, tmp_path, accelerate_on_cpu):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    dataset = [
        {"images": image, "labels": label}
        for batch in batches()
        for image, label in zip(*batch, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_NORM if clips else 0,
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
    )
    space = names(WithLoss(model), arguments=arguments, dataset=dataset)
    exec(blocks("Hugging Face Trainer")[0], space)
    assert space["trainer"].state.global_step == 2
    assert_same(model, by_hand(pairs(batches()), "before" if clips else ""))


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
    exec(module_block, space)
    exec(callback_block, space)
    trainer = space["lightning"].Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=MAX_NORM if clips else None,
        callbacks=[space["TrActCallback"]()] if way == "callback" else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches(), batch_size=None)
    trainer.fit(space["Classifier"](model), loader)
    data = batches() if accumulate == 1 else pairs(batches())
    clip = {"attach": "before", "callback": "after"}[way] if clips else ""
    assert_same(model, by_hand(data, clip))


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("scales", [False, True])
def test_timm(clips, scales):
    """The lines of timm's train.py, whose loop cannot be imported."""
    model = tiny()
    space = names(model, create_optimizer_v2=create_optimizer_v2)
    exec(blocks("timm")[0], space)
    optimizer, clip_grad = space["optimizer"], MAX_NORM if clips else None
    scaler = timm.utils.NativeScaler(device="cpu") if scales else None
    optimizer.zero_grad()
    for index, (images, labels) in enumerate(batches()):
        loss = cross_entropy(model(images), labels) / 2
        need_update = index % 2 == 1
        if scaler is not None:
            scaler(
                loss,
                optimizer,
                clip_grad=clip_grad,
                parameters=model.parameters(),
                need_update=need_update,
            )
        else:
            loss.backward()
            if need_update:
                if clip_grad is not None:
                    timm.utils.dispatch_clip_grad(model.parameters(), clip_grad, mode="norm")
                optimizer.step()
        if need_update:
            optimizer.zero_grad()
    assert_same(model, by_hand(pairs(batches()), "before" if clips else ""))


def test_an_optimizer_that_calls_no_hooks_is_refused():
    model = tiny()
    inner = momentum(model)
    with pytest.raises(ValueError, match=r"Lookahead calls no hooks\. Attach to the optimizer"):
        TrAct(model).attach(Lookahead(inner))
    tract = TrAct(model)
    tract.attach(inner)
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    Lookahead(inner).step()
    assert tract.num_steps == 1
