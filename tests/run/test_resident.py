"""Training from images that stay on the device."""

import pytest
from run_folders import assert_resumes_exactly, run_until_killed

from tract_transfer.run.run import run

RESIDENT = ("data.cache=device", "data.transforms.flip_prob=0.5", "engine.accumulate=2")
RESIZED = ("data.transforms.crop=random_resized", "data.transforms.pad_px=null")
ERASED = ("data.transforms.erase_prob=0.5",)


@pytest.mark.parametrize("killed_at, more", [(1, ()), (3, (*RESIZED, *ERASED))])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, load_tiny, kill_at, killed_at, more):
    def config(name):
        words = (*RESIDENT, *more)
        return load_tiny(
            tmp_path, *words, f"output_dir={tmp_path / name}", "engine.checkpoint.every_iters=1"
        )

    assert_resumes_exactly(kill_at, killed_at, config("whole"), config("killed"))


def test_it_is_another_run_than_that_of_the_loader(tmp_path, load_tiny, kill_at):
    """Its random numbers are others, so none goes on with the other's."""
    words = (f"output_dir={tmp_path / 'run'}", "engine.checkpoint.every_iters=1")
    run_until_killed(kill_at, 2, load_tiny(tmp_path, *RESIDENT, *words))
    changed = load_tiny(tmp_path, *RESIDENT[1:], "data.cache=ram", *words)
    with pytest.raises(ValueError, match=r"data.cache: 'device' then, 'ram' now"):
        run(changed, resume=True)


@pytest.mark.parametrize(
    "word, named",
    [
        ("data.transforms.crop=resize_random", "crop"),
        ("data.transforms.augment=trivial_augment", "augment"),
        ("data.transforms.color_jitter=0.2", "color_jitter"),
        ("data.transforms.rotation_deg=5", "rotation_deg"),
    ],
)
def test_what_is_not_done_in_batches_is_refused(tmp_path, load_tiny, word, named):
    words = ("data.cache=device", "data.transforms.pad_px=null", word)
    with pytest.raises(ValueError, match=f"cache: device supports crop: .* not its {named}. Set"):
        load_tiny(tmp_path, *words)
