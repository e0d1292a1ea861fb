"""Policies draw from the sample's random numbers, mixup and CutMix from the iteration's."""

from collections import Counter

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from tract_transfer.build.batches import build_transforms
from tract_transfer.build.data import build_data
from tract_transfer.build.trainer import build_accelerator, build_trainer
from tract_transfer.config.schema import ConfigError
from tract_transfer.data.augment import AUGMENTATIONS, BatchMix
from tract_transfer.data.digits import load_digits
from tract_transfer.data.loader import SampledDataset
from tract_transfer.data.sampling import Sample
from tract_transfer.data.transforms import classification_train

NAMES = sorted(name for name, _ in AUGMENTATIONS)
all_policies = pytest.mark.parametrize("name", NAMES)


def noise(height=32, width=32):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def everything(name, size_px=16):
    return classification_train(
        size_px, "resize_random", 2, (1, 1), 0.5, "bicubic", rotation_deg=15.0,
        augment=AUGMENTATIONS.get(name)(), color_jitter=0.3, erase_prob=0.5,
    )  # fmt: skip


def augmented(name, epoch, indices, copy=0):
    images = SampledDataset(load_digits("train"), everything(name), 3)
    return torch.stack([images[Sample(epoch, index, copy)].image for index in indices])


@all_policies
def test_a_policy_depends_on_seed_epoch_and_sample_alone(name):
    first = augmented(name, 0, range(30))
    assert torch.equal(first, augmented(name, 0, reversed(range(30))).flip(0))
    for other in (augmented(name, 1, range(30)), augmented(name, 0, range(30), copy=1)):
        assert (first != other).flatten(1).any(dim=1).sum() > 27


@all_policies
@pytest.mark.parametrize("size", [(20, 90), (300, 41)])
def test_shape_and_type_hold(name, size):
    image = everything(name, 32)(noise(*size))
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def test_three_augment_is_one_of_three_equally_often():
    image = noise(16, 16)
    policy = AUGMENTATIONS.get("three_augment")(solarize_threshold=100, blur_sigma_px=[0.1, 1])
    gray = v2.functional.rgb_to_grayscale(image, 3)
    solarized = v2.functional.solarize(image, 100)
    counts = torch.zeros(3)
    torch.manual_seed(0)
    for _ in range(300):
        result = policy(image)
        kind = 0 if torch.equal(result, gray) else 1 if torch.equal(result, solarized) else 2
        counts[kind] += 1
        if kind == 2:  # a blur keeps the mean
            assert result.float().mean() == pytest.approx(image.float().mean(), abs=4)
    assert (counts - 100).abs().max() < 5 * (300 * 2 / 9) ** 0.5
    strong = AUGMENTATIONS.get("three_augment")(blur_sigma_px=[1.5, 1.5])
    expected = v2.functional.gaussian_blur(image, [11, 11], [1.5, 1.5])
    assert any(torch.equal(strong(image), expected) for _ in range(40))


MORE = {"fill": [9, 8, 7], "interpolation": "bilinear"}
LIKEWISE = (InterpolationMode.BILINEAR, MORE["fill"])
POLICIES = {
    "rand_augment": ({"num_ops": 3, "magnitude": 20, "num_magnitude_bins": 25},
        v2.RandAugment(3, 20, 25, *LIKEWISE)),
    "trivial_augment": ({"num_magnitude_bins": 20}, v2.TrivialAugmentWide(20, *LIKEWISE)),
    **{f"auto_augment_{policy.value}": ({}, v2.AutoAugment(policy, *LIKEWISE))
       for policy in v2.AutoAugmentPolicy},
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_that_of_torchvision(name):
    arguments, theirs = POLICIES[name]
    ours, image = AUGMENTATIONS.get(name)(**arguments, **MORE), noise()
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("randaugment", r"data.transforms.augment: .* Did you mean \'rand_augment\'"),
        ("rand_augment, augment_args: {strength: 3}",
            r"data.transforms.augment_args.strength: unknown. .*rand_augment takes \['num_ops'"),
        ("rand_augment, augment_args: {magnitude: 31}", r"augment_args.magnitude: must be at most"),
        ("rand_augment, augment_args: {num_ops: 0}", r"augment_args.num_ops: .*equal to 1"),
        ("rand_augment, augment_args: {num_ops: two}", r"num_ops: .*valid integer"),
        ("trivial_augment, augment_args: {num_magnitude_bins: 1}", r"bins: .*equal to 2"),
        ("auto_augment_svhn, augment_args: {policy: svhn}", r"policy: unknown"),
        ("auto_augment_svhn, augment_args: {fill: [0, 0, 256]}", r"args.fill.2: .*equal to 255"),
        ("auto_augment_svhn, augment_args: {interpolation: cubic}",
            r"augment_args.interpolation: .*'bicubic'"),
        ("three_augment, augment_args: {blur_sigma_px: [2.0, 1.0]}", r"blur_sigma_px: must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_policy_name_their_key(tmp_path, load_tiny, words, says):
    config = load_tiny(tmp_path, f"data.transforms={{size_px: 16, augment: {words}}}")
    with pytest.raises(ConfigError, match=says):
        build_transforms(config)


def test_the_config_reaches_the_transform(tmp_path, load_tiny):
    words = (
        "{size_px: 16, augment: three_augment, augment_args: {solarize_threshold: 0}, "
        "rotation_deg: 5, color_jitter: 0.3, erase_prob: 0.1}"
    )
    train, evaluation = build_transforms(load_tiny(tmp_path, f"data.transforms={words}"))
    assert [type(step).__name__ for step in train.transforms] == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "RandomRotation", "RandomChoice",
        "ColorJitter", "RandomErasing",
    ]  # fmt: skip
    assert len(evaluation.transforms) == 2


# mixup and CutMix.

TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])
IMAGES = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixup_is_one_convex_sum_of_neighbors_and_their_targets(dtype):
    images = IMAGES if dtype == torch.uint8 else IMAGES.float() / 255
    mixed, targets = BatchMix(4, 0, mixup_alpha=0.8)(images, TARGETS, 5)
    lam = targets[0, 0].item()  # image 0 is of class 0, its neighbor of class 1
    assert 0 < lam < 1
    unit, one_hot = IMAGES.float() / 255, torch.eye(4)[TARGETS]
    torch.testing.assert_close(mixed, lam * unit + (1 - lam) * unit.roll(1, 0))
    torch.testing.assert_close(targets, lam * one_hot + (1 - lam) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_rectangle_whose_area_is_the_target():
    for iteration in range(20):
        mixed, targets = BatchMix(4, 0, cutmix_alpha=1.0)(IMAGES, TARGETS, iteration)
        assert mixed.dtype == torch.uint8
        assert ((mixed == IMAGES) | (mixed == IMAGES.roll(1, 0))).all()
        area = (mixed != IMAGES).any(dim=1)[0].float().mean()
        assert targets[0, 0] == pytest.approx(1 - area.item(), abs=0.02)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_the_draw_depends_on_seed_and_iteration_alone():
    """So it is the same for every micro-batch and process, and after a resume."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    both = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    first = [BatchMix(4, 3, **both)(IMAGES, TARGETS, i) for i in range(10)]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = BatchMix(4, 3, **both)
    for iteration in (7, 2):
        assert all(map(torch.equal, first[iteration], again(IMAGES, TARGETS, iteration)))
    part = again(IMAGES[:2], TARGETS[:2], 7)[1]
    assert sorted(part[0].unique().tolist()) == sorted(first[7][1][1].unique().tolist())
    assert len({targets.max().item() for _, targets in first}) == 10
    assert not torch.equal(BatchMix(4, 4, **both)(IMAGES, TARGETS, 0)[1], first[0][1])


@pytest.mark.parametrize(("prob", "switch_prob"), [(1.0, 0.5), (0.5, 0.2), (0.9, 0.0), (0.9, 1.0)])
def test_each_kind_is_as_frequent_as_asked(prob, switch_prob):
    mixes = BatchMix(4, 0, mixup_alpha=0.8, cutmix_alpha=1.0, prob=prob, switch_prob=switch_prob)
    counts = Counter()
    for iteration in range(400):
        images, targets = mixes(IMAGES, TARGETS, iteration)
        counts[targets is TARGETS, images.is_floating_point()] += 1
    shares = {(True, False): 1 - prob, (False, True): prob * (1 - switch_prob)}  # none, mixup
    for kind, share in shares.items():
        assert abs(counts[kind] - 400 * share) <= 5 * (400 * share * (1 - share)) ** 0.5 + 1e-6


def test_alpha_is_that_of_the_beta_distribution():
    mixes = BatchMix(4, 0, mixup_alpha=0.2)
    lams = torch.tensor([mixes(IMAGES, TARGETS, i)[1][0, 0].item() for i in range(400)])
    assert lams.mean() == pytest.approx(0.5, abs=0.1)
    assert lams.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.15)  # Beta(a, a)
    with pytest.raises(ValueError, match=r"data.mixup needs a mixup_alpha or a cutmix_alpha"):
        BatchMix(4, 0)


def trainer_of(tmp_path, load_tiny, *words):
    config = load_tiny(tmp_path, *words)
    return build_trainer(config, build_data(config), build_accelerator(config))


def test_mixup_is_refused_for_detectors_and_single_images(tmp_path, load_tiny):
    with pytest.raises(ConfigError, match=r"data.mixup"):
        load_tiny(tmp_path, "data.mixup.mixup_alpha=0.8", task="detection")
    words = ("data.mixup={mixup_alpha: 0.8}", "data.batch_size=4", "engine.accumulate=4")
    with pytest.raises(ConfigError, match=r"data.mixup: .*4 images in 4 parts"):
        trainer_of(tmp_path, load_tiny, *words)


def test_the_trainer_mixes_by_its_iteration(tmp_path, load_tiny):
    trainer = trainer_of(tmp_path, load_tiny, "data.mixup={cutmix_alpha: 1.0, prob: 0.9}")
    seen = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    trainer.train()
    batches = trainer_of(tmp_path, load_tiny).batches(0)
    for iteration, inputs in enumerate(seen):
        batch = next(batches)
        expected = trainer.mix(batch.images, batch.targets, iteration)
        assert all(map(torch.equal, inputs, expected))
    assert any(targets.ndim == 2 for _, targets in seen)
