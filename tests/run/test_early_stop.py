"""Early stopping: by data.val alone, at the same iteration after a resume."""

from run_folders import assert_resumes_exactly, lines_of

from tract_transfer.run.run import run

# The learning rate is almost 0: no evaluation is better than the first.
FROZEN = (
    "solver={lr: 1e-30, momentum: 0.0, schedule: constant, max_iters: 20}",
    "data.val={source: train, fraction: 0.2}",
    "model.backbone={name: cifar/vit, args: {depth: 1, width: 48, num_heads: 3}}",
    "data.transforms.size_px=32",
    "evaluation={every_iters: 2, patience: 3}",
)


def test_training_ends_after_patience_evaluations_without_a_better_one(tmp_path, load_tiny):
    results = run(load_tiny(tmp_path, *FROZEN))
    assert results["iterations"] == results["reported_iteration"] == 8  # evaluated at 2, 4, 6, 8
    stop = results["early_stop"]
    assert (stop["iteration"], stop["best_iteration"]) == (8, 2)
    lines = [line for line in lines_of(tmp_path / "run") if line["split"] == "val"]
    assert [line["iteration"] for line in lines] == [2, 4, 6, 8]
    assert {line["top1"] for line in lines} == {stop["best_value"]}
    text = results["protocol"]["early stopping"]
    assert text == "after 3 evaluations on val without a better top1"


def test_training_continues_while_val_improves(tmp_path, load_tiny):
    words = ("data.val={source: train, fraction: 0.2}", "evaluation={every_iters: 2, patience: 3}")
    results = run(load_tiny(tmp_path, *words))
    assert results["early_stop"] is None
    assert results["iterations"] == 6


def test_a_killed_run_stops_at_the_same_iteration(tmp_path, load_tiny, kill_at):
    def config(name):
        words = (f"output_dir={tmp_path / name}", "evaluation.report=best")
        return load_tiny(tmp_path, *FROZEN, *words)

    results = assert_resumes_exactly(kill_at, 7, config("whole"), config("killed"))
    assert (results["iterations"], results["reported_iteration"]) == (8, 2)
    (tmp_path / "whole/results.json").unlink()
    kill_at(8)  # a ninth step would raise
    again = run(config("whole"), resume=True)
    assert again["metrics"] == results["metrics"]
    assert again["early_stop"] == results["early_stop"]


def test_a_detector_stops_early(tmp_path, load_tiny):
    val = "{source: digit_scenes, split: test, num_train: 4, num_test: 4, size_px: 64, root: %s}"
    config = load_tiny(
        tmp_path, f"data.val={val % (tmp_path / 'val')}", "solver.lr=1e-30", "solver.max_iters=9",
        "evaluation={every_iters: 1, patience: 2}", task="detection",
    )  # fmt: skip
    assert run(config)["early_stop"]["iteration"] == 3
