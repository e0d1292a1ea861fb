"""Augmentation policies: each does what its paper says, and draws from the sample's numbers."""

from itertools import islice

import pytest
import torch
from torchvision.transforms import v2

from tract_transfer.build.batches import build_transforms
from tract_transfer.config.schema import ConfigError
from tract_transfer.data.augment import AUGMENTATIONS
from tract_transfer.data.digits import load_digits
from tract_transfer.data.loader import train_loader
from tract_transfer.data.sampling import EpochOrder, TrainBatchSampler
from tract_transfer.data.transforms import classification_train

NAMES = sorted(name for name, _ in AUGMENTATIONS)


def noise(height=32, width=32):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def everything(name):
    return classification_train(
        32, "resize_random", 4, (1, 1), 0.5, "bicubic", rotation_deg=15.0,
        augment=AUGMENTATIONS.get(name)(), color_jitter=0.3, erase_prob=0.5,
    )  # fmt: skip


def batches_of(name, num_workers, start_iter=0, count=4):
    dataset = load_digits("train", [0])
    sampler = TrainBatchSampler(EpochOrder(len(dataset), len(dataset) // 2, 3), start_iter)
    loader = train_loader(dataset, everything(name), sampler, seed=3, num_workers=num_workers)
    return list(islice(iter(loader), count))


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_depends_on_seed_epoch_and_sample_alone(name):
    alone, workers, resumed = (
        batches_of(name, 0),
        batches_of(name, 2),
        batches_of(name, 1, start_iter=2, count=2),
    )
    for ours, theirs in zip([*alone, *alone[2:]], [*workers, *resumed], strict=True):
        assert torch.equal(ours.images, theirs.images)
    epochs = [
        {i: x for batch in half for i, x in zip(batch.indices, batch.images, strict=True)}
        for half in (alone[:2], alone[2:])
    ]
    both = epochs[0].keys() & epochs[1].keys()
    changed = sum(not torch.equal(epochs[0][index], epochs[1][index]) for index in both)
    assert changed > 0.9 * len(both) > 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (20, 90), (300, 41)])
def test_shape_and_type_hold(name, size):
    for _ in range(5):
        image = everything(name)(noise(*size))
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def test_three_augment_is_one_of_three_each_as_often():
    image = noise()
    policy = AUGMENTATIONS.get("three_augment")(solarize_threshold=100)
    gray = v2.functional.rgb_to_grayscale(image, 3)
    solarized = v2.functional.solarize(image, 100)
    counts = torch.zeros(3)
    torch.manual_seed(0)
    for _ in range(300):
        result = policy(image)
        kind = 0 if torch.equal(result, gray) else 1 if torch.equal(result, solarized) else 2
        counts[kind] += 1
        if kind == 2:  # a blur keeps the mean
            assert result.float().mean() == pytest.approx(image.float().mean(), abs=2)
    assert (counts - 100).abs().max() < 5 * (300 * 2 / 9) ** 0.5


def test_the_blur_is_as_strong_as_told():
    image = noise(64, 64)
    strong = AUGMENTATIONS.get("three_augment")(blur_sigma_px=[1.5, 1.5])
    expected = v2.functional.gaussian_blur(image, [11, 11], [1.5, 1.5])
    assert any(torch.equal(strong(image), expected) for _ in range(40))


def test_a_policy_s_fill_is_the_colour_of_what_comes_in():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    policy = AUGMENTATIONS.get("rand_augment")(fill=[9, 8, 7], num_ops=3)
    corners = {
        tuple(policy(image)[:, i, j].tolist()) for _ in range(60) for i in (0, -1) for j in (0, -1)
    }
    assert (9, 8, 7) in corners


def test_rand_augment_of_no_strength_and_operations_move_nothing_far():
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    weak = AUGMENTATIONS.get("rand_augment")(magnitude=0, num_ops=1)
    strong = AUGMENTATIONS.get("rand_augment")(magnitude=30, num_ops=4)
    torch.manual_seed(0)
    moved = [sum(p(image).float().sub(100).abs().mean() for _ in range(40)) for p in (weak, strong)]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "svhn"])
def test_auto_augment_is_torchvision_s_policy_of_that_name(name):
    image = noise()
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy[name.upper()])
    ours = AUGMENTATIONS.get(f"auto_augment_{name}")()
    for seed in range(10):
        torch.manual_seed(seed)
        expected = theirs(image)
        torch.manual_seed(seed)
        assert torch.equal(ours(image), expected)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("augment: randaugment", r"data.transforms.augment: .* Did you mean 'rand_augment'"),
        ("augment: rand_augment, augment_args: {strength: 3}",
            r"data.transforms.augment_args.strength: unknown. .*rand_augment takes \['num_ops'"),
        ("augment: rand_augment, augment_args: {magnitude: 31}",
            r"augment_args.magnitude: must lie in 0..num_magnitude_bins - 1 = 30, got 31"),
        ("augment: rand_augment, augment_args: {num_ops: 0}", r"augment_args.num_ops: must be 1"),
        ("augment: rand_augment, augment_args: {num_ops: two}", r"num_ops: .*valid integer"),
        ("augment: trivial_augment, augment_args: {num_magnitude_bins: 1}", r"bins: must be 2"),
        ("augment: trivial_augment, augment_args: {magnitude: 1}", r"magnitude: unknown"),
        ("augment: auto_augment_svhn, augment_args: {policy: svhn}", r"policy: unknown"),
        ("augment: auto_augment_svhn, augment_args: {fill: [0, 0, 256]}", r"args.fill: must be th"),
        ("augment: auto_augment_svhn, augment_args: {interpolation: cubic}",
            r"augment_args.interpolation: must be one of"),
        ("augment: three_augment, augment_args: {blur_sigma_px: [2.0, 1.0]}", r"blur_sigma_px: m"),
    ],
)  # fmt: skip
def test_wrong_arguments_name_their_key(tmp_path, load_tiny, words, says):
    config = load_tiny(tmp_path, f"data.transforms={{size_px: 16, {words}}}")
    with pytest.raises(ConfigError, match=says):
        build_transforms(config)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("augment_args: {num_ops: 1}", "augment_args has no use here: augment is null"),
        ("crop: random_resized, pad_px: 4", "pad_px is for crop: pad or resize_random, and crop"),
        ("crop: resize_random, scale: [0.1, 1]", "scale is for crop: random_resized"),
        ("erase_prob: 1.5", "data.transforms.erase_prob: "),
        ("rotation_deg: -1", "data.transforms.rotation_deg: "),
    ],
)
def test_what_has_no_use_is_refused(tmp_path, load_tiny, words, says):
    with pytest.raises(ConfigError) as error:
        load_tiny(tmp_path, f"data.transforms={{size_px: 16, {words}}}")
    assert says in str(error.value)


def test_the_config_reaches_the_transform(tmp_path, load_tiny):
    words = (
        "{size_px: 16, augment: three_augment, augment_args: {solarize_threshold: 0}, "
        "rotation_deg: 5, color_jitter: 0.3, erase_prob: 0.1}"
    )
    train, evaluation = build_transforms(load_tiny(tmp_path, f"data.transforms={words}"))
    kinds = [type(step).__name__ for step in train.transforms]
    assert kinds == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "RandomRotation", "RandomChoice",
        "ColorJitter", "RandomErasing",
    ]  # fmt: skip
    assert len(evaluation.transforms) == 2


def test_the_copies_of_an_image_in_a_batch_are_augmented_each_in_its_way():
    dataset = load_digits("train", [0])
    sampler = TrainBatchSampler(EpochOrder(len(dataset), 30, 3, repeats=3))
    loader = train_loader(dataset, everything("three_augment"), sampler, seed=3, num_workers=0)
    batch = next(iter(loader))
    assert len(set(batch.indices)) == 10
    copies = batch.images.view(3, 10, 3, 32, 32)
    assert batch.indices[:10] == batch.indices[10:20] == batch.indices[20:]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        differ = (copies[one] != copies[other]).flatten(1).any(dim=1)
        assert differ.sum() >= 9
