"""mixup and CutMix: convex sums, pasted rectangles, and a draw that the iteration alone decides."""

import pytest
import torch

from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ConfigError
from tract_transfer.data.augment import BatchMix

TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])
IMAGES = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)


def pasted(images):
    """Where images differ from their own in any channel, (B, H, W)."""
    return (images != IMAGES).any(dim=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixup_is_one_convex_sum_of_neighbours_and_their_targets(dtype):
    images = IMAGES if dtype == torch.uint8 else IMAGES.float() / 255
    mixed, targets = BatchMix(4, 0, mixup_alpha=0.8)(images, TARGETS, 5)
    lam = targets[0, 0].item()  # image 0 is of class 0, its neighbour of class 1
    assert 0 < lam < 1
    unit = IMAGES.float() / 255
    torch.testing.assert_close(mixed, lam * unit + (1 - lam) * unit.roll(1, 0))
    one_hot = torch.eye(4)[TARGETS]
    torch.testing.assert_close(targets, lam * one_hot + (1 - lam) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_rectangle_and_its_share_is_the_target():
    for iteration in range(20):
        mixed, targets = BatchMix(4, 0, cutmix_alpha=1.0)(IMAGES, TARGETS, iteration)
        assert mixed.dtype == torch.uint8
        other = IMAGES.roll(1, 0)
        assert ((mixed == IMAGES) | (mixed == other)).all()
        area = pasted(mixed)[0].float().mean()
        assert targets[0, 0] == pytest.approx(1 - area.item(), abs=0.02)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_the_draw_is_the_iteration_s_alone():
    """So it is the same for every micro-batch and process, and after a resume."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    both = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    first = [BatchMix(4, 3, **both)(IMAGES, TARGETS, i) for i in range(10)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = BatchMix(4, 3, **both)
    for iteration in (7, 2):
        for ours, theirs in zip(first[iteration], again(IMAGES, TARGETS, iteration), strict=True):
            assert torch.equal(ours, theirs)
    part = again(IMAGES[:2], TARGETS[:2], 7)[1]
    assert sorted(part[0].unique().tolist()) == sorted(first[7][1][1].unique().tolist())
    assert len({targets.max().item() for _, targets in first}) == 10
    other = BatchMix(4, 4, **both)(IMAGES, TARGETS, 0)
    assert not torch.equal(other[1], first[0][1])


@pytest.mark.parametrize(("prob", "switch_prob"), [(1.0, 0.5), (0.5, 0.2), (0.9, 0.0), (0.9, 1.0)])
def test_each_kind_comes_as_often_as_told(prob, switch_prob):
    mixes = BatchMix(4, 0, mixup_alpha=0.8, cutmix_alpha=1.0, prob=prob, switch_prob=switch_prob)
    counts = {"none": 0, "mixup": 0, "cutmix": 0}
    for iteration in range(400):
        images, targets = mixes(IMAGES, TARGETS, iteration)
        kind = "none" if targets is TARGETS else "mixup" if images.is_floating_point() else "cutmix"
        counts[kind] += 1
    shares = {
        "none": 1 - prob, "mixup": prob * (1 - switch_prob), "cutmix": prob * switch_prob
    }  # fmt: skip
    for kind, share in shares.items():
        slack = 5 * (400 * share * (1 - share)) ** 0.5
        assert abs(counts[kind] - 400 * share) <= slack + 1e-6, (kind, counts)


def test_alpha_is_the_beta_distribution_s():
    mixes = BatchMix(4, 0, mixup_alpha=0.2)
    lams = torch.tensor([mixes(IMAGES, TARGETS, i)[1][0, 0].item() for i in range(400)])
    assert lams.mean() == pytest.approx(0.5, abs=0.1)
    assert lams.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.15)  # Beta(a, a)


def test_nothing_to_mix_is_refused():
    with pytest.raises(ValueError, match=r"data.mixup needs a mixup_alpha or a cutmix_alpha"):
        BatchMix(4, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{}", "give mixup_alpha or cutmix_alpha, or set data.mixup: null"),
        ("{mixup_alpha: 0.8, switch_prob: 0.3}", "switch_prob has no use here"),
        ("{mixup_alpha: -1}", "data.mixup.mixup_alpha: "),
        ("{mixup_alpha: 1, prob: 0}", "data.mixup.prob: "),
    ],
)
def test_a_mixup_that_mixes_nothing_is_refused(tmp_path, load_tiny, words, says):
    with pytest.raises(ConfigError) as error:
        load_tiny(tmp_path, f"data.mixup={words}")
    assert says in str(error.value)


def test_a_detector_has_no_mixup(tmp_path, load_tiny):
    with pytest.raises(ConfigError, match=r"data.mixup.* not a key of a detection config"):
        load_tiny(tmp_path, "data.mixup.mixup_alpha=0.8", task="detection")


def trainer_of(tmp_path, load_tiny, *words):
    config = load_tiny(tmp_path, *words)
    return build_trainer(config, build_data(config), build_accelerator(config))


def test_single_images_are_not_mixed(tmp_path, load_tiny):
    words = ("data.mixup={mixup_alpha: 0.8}", "data.batch_size=4", "engine.accumulate=4")
    with pytest.raises(ConfigError, match=r"data.mixup: mixes .* 4 images in 4 parts are single"):
        trainer_of(tmp_path, load_tiny, *words)


def test_the_trainer_mixes_by_its_iteration(tmp_path, load_tiny):
    trainer = trainer_of(tmp_path, load_tiny, "data.mixup={cutmix_alpha: 1.0, prob: 0.9}")
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    trainer.train()
    plain = trainer_of(tmp_path, load_tiny)
    batches = plain.batches(0)
    for iteration, (images, targets) in enumerate(seen):
        batch = next(batches)
        expected = trainer.mix(batch.images, batch.targets, iteration)
        assert torch.equal(images, expected[0])
        assert torch.equal(targets, expected[1])
    assert any(targets.ndim == 2 for _, targets in seen)
