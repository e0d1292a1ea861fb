"""A modern recipe with every option resumes to the same bits, also on several processes."""

import pytest
from run_folders import CARVED, assert_resumes_exactly, results_of

from tract_transfer.run.run import run

RECIPE = (
    *CARVED,
    "model={backbone: {name: timm/vit_small_patch16_224, drop_path: {rate: 0.1, mode: constant}, "
    "args: {img_size: 32, patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3, mlp_ratio: 1}}, "
    "head: {name: linear, args: {zero_init: true}}, loss: bce, bce_target_threshold: 0}",
    "data.transforms={size_px: 32, crop: resize_random, pad_px: null, interpolation: bicubic, "
    "augment: three_augment, color_jitter: 0.3, rotation_deg: 5, erase_prob: 0.2}",
    "data.mixup={mixup_alpha: 0.8, cutmix_alpha: 1.0}",
    "data.repeats=3",
    "data.batch_size=48",
    "solver={lr: 0.01, momentum: null, weight_decay: 0.02, decay_all: false, layer_decay: 0.9, "
    "schedule: cosine_epochs, warmup_iters: 2, warmup_start: 0.01, end_factor: 0.01, "
    "max_iters: 40, ema_decay: 0.9, ema_warmup: true}",
    "engine={accumulate: 2, grad_clip: 1.0, log: {every_iters: 3}, checkpoint: {every_iters: 2}}",
    "evaluation={every_iters: 2, patience: 2}",
    "tract={enabled: true, update_every: 2}",
)
# The weights barely change, so that patience ends the run.
STILL = (*RECIPE, "solver.lr=1e-30")


@pytest.mark.parametrize(
    ("optimizer", "num_workers", "killed_at"),
    [
        (("solver.optimizer=lamb",), 2, 5),
        (("solver.optimizer=muon", "solver.optimizer_args={fallback_list: [head.*]}"), 0, 1),
    ],
    ids=["lamb", "muon"],
)
def test_a_killed_recipe_resumes_to_the_same_bits(
    tmp_path, load_tiny, kill_at, optimizer, num_workers, killed_at
):
    def config(name, workers):
        return load_tiny(
            tmp_path, *RECIPE, *optimizer, f"output_dir={tmp_path / name}",
            f"data.num_workers={workers}",
        )  # fmt: skip

    killed, resumed = config("killed", num_workers), config("killed", 0)
    results = assert_resumes_exactly(kill_at, killed_at, config("whole", 0), killed, resumed)
    assert killed_at < results["iterations"] < 40  # patience ended a schedule of 40
    assert results["early_stop"]["iteration"] == results["iterations"]
    assert results["protocol"]["stochastic depth"] == "rate 0.1, constant"
    assert "mixup_alpha: 0.8" in results["protocol"]["mixing"]


@pytest.mark.slow
def test_a_group_of_processes_ends_together(tmp_path, write_tiny, tool):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    path = write_tiny(tmp_path)
    words = (*STILL, "solver.optimizer=lamb")
    ran = tool("train_net.py", "--config-file", path, *words, launcher=launcher, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    results = results_of(tmp_path / "run")
    assert results["early_stop"]["iteration"] == results["iterations"] < 40


def test_a_recipe_learns(tmp_path, load_tiny):
    words = (
        "data.mixup={mixup_alpha: 0.2, cutmix_alpha: 0.2}", "data.repeats=2", "model.loss=bce",
        "solver={max_iters: 40, ema_decay: 0.8, ema_warmup: true, lr: 0.05}",
    )  # fmt: skip
    assert run(load_tiny(tmp_path, *words))["metrics"]["top1"] > 0.6  # of three classes
