"""Decoding, cropping, the presets of training and evaluation, mixup and cutmix."""

import random

import numpy as np
import pytest
import torch
from pictures import BILINEAR, black_and_white, noise, plain_colour, seeded
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

from augment import pixels
from presets import batch_mix, eval_preset, train_preset

POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")


WHITE = (2.2489, 2.4286, 2.6400)  # (1 - mean) / std of ImageNet's red, green, blue


BLACK = (-2.1179, -2.0357, -1.8044)  # -mean / std


# ---- decoding and cropping ----


@pytest.fixture
def jpeg(tmp_path):
    """A smooth picture with edges, as photos are, 500 x 376."""
    draw = np.random.default_rng(3)
    image = Image.fromarray(draw.integers(0, 256, (10, 13, 3), dtype=np.uint8))
    image = image.resize((500, 376), Image.Resampling.BICUBIC)
    image.paste((250, 240, 30), (200, 100, 330, 300))
    image.save(tmp_path / "x.jpg", quality=90)
    return tmp_path / "x.jpg"


@pytest.mark.parametrize(
    ("box", "size", "divisor"),
    [
        ((0, 0, 376, 500), 128, 2),
        ((60, 100, 256, 256), 128, 2),
        ((60, 100, 255, 400), 128, 1),  # 127 rows would be left
        ((0, 0, 376, 500), 64, 4),
        ((8, 16, 360, 480), 40, 8),
        ((8, 16, 300, 310), 40, 4),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(jpeg, box, size, divisor):
    with Image.open(jpeg) as image:
        assert pixels.reduce_decoding(image, box, size) == divisor
        image.load()
        assert image.size == (-(-500 // divisor), -(-376 // divisor))
    with Image.open(jpeg) as image:
        ours = np.asarray(pixels.crop_pil(image, box, size, BILINEAR)).astype(int)
    with Image.open(jpeg) as image:
        theirs = np.asarray(v1.functional.resized_crop(image, *box, [size, size])).astype(int)
    difference = np.abs(ours - theirs)
    if divisor == 1:
        assert difference.max() == 0
    assert difference.mean() < 2 and np.quantile(difference, 0.95) <= 8 and difference.max() <= 70  # that at edges
    assert abs((ours - theirs).mean()) < 0.3  # no brighter, and no edge moved


@pytest.mark.parametrize("shape", [(375, 500), (224, 224), (40, 900), (900, 40), (3, 2)])  # the long ones fit no crop
def test_crops_are_drawn_as_torchvision_draws_them(shape):
    crop, image = pixels.RandomResizedCrop(32), Image.new("RGB", shape[::-1])
    for seed in range(300):
        torch.manual_seed(seed)
        ours, next_of_ours = crop.box(*shape), torch.rand(1)
        torch.manual_seed(seed)
        theirs = v1.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        assert ours == tuple(theirs) and next_of_ours == torch.rand(1)  # as many draws, too


def test_the_training_preset_draws_torchvision_s_crop_before_it_decodes(jpeg):
    ours, theirs = train_preset(image_size=32, hflip_prob=0), v1.RandomResizedCrop(32)
    for seed in range(20):
        with Image.open(jpeg) as image:
            mine = pixels.denormalise(seeded(seed, ours, image)).int()
        with Image.open(jpeg) as image:
            expected = seeded(seed, theirs, image).int()
        assert (mine - expected).abs().float().mean() < 2


@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_nearest_pixels_are_those_of_the_whole_image(jpeg, mode):
    box, interpolation = (0, 0, 376, 500), InterpolationMode(mode)
    with Image.open(jpeg) as image:
        ours = np.asarray(pixels.crop_pil(image, box, 64, interpolation)).astype(int)
    with Image.open(jpeg) as image:
        theirs = np.asarray(v1.functional.resized_crop(image, *box, [64, 64], interpolation)).astype(int)
    assert np.array_equal(ours, theirs) == (mode == "nearest") and np.abs(ours - theirs).mean() < 1.5


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("policy", [None, "ra", "ta_wide"])
def test_crop_and_policy_at_augment_size_are_reduced_before_normalising(backend, policy):
    """The same draws as a preset of that size makes, then torchvision's reduction; other pixels than at the stage's size."""
    image, given = noise(80, 100), dict(auto_augment=policy, ra_magnitude=15, backend=backend)
    ours = train_preset(image_size=24, augment_size=60, **given)
    whole, direct = train_preset(image_size=60, **given), train_preset(image_size=24, **given)
    differ = 0
    for seed in range(8):
        mine = seeded(seed, ours, image)
        assert mine.shape == (3, 24, 24)
        reduced = v1.functional.resize(pixels.denormalise(seeded(seed, whole, image)), [24, 24], antialias=True)
        away = (pixels.denormalise(mine).int() - reduced.int()).abs()
        assert away.max() <= 1  # PIL rounds where torch does not
        differ += (pixels.denormalise(seeded(seed, direct, image)).int() - reduced.int()).abs().float().mean() > 2
    assert differ >= (5 if policy else 1)


def test_normalising_keeps_torchvision_s_bits():
    image = noise(30, 20)
    steps = [v1.PILToTensor(), v1.ConvertImageDtype(torch.float32)]
    steps.append(v1.Normalize(pixels.IMAGENET_MEAN, pixels.IMAGENET_STD))
    assert torch.equal(pixels.ToNormalised()(image), v1.Compose(steps)(image))


# ---- the training preset ----


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("policy", [None, *POLICIES])
def test_every_policy_gives_a_normalised_crop_that_follows_from_torch_s_seed(policy, backend, use_v2):
    transform = train_preset(
        image_size=24, auto_augment=policy, ra_magnitude=9, random_erase=0.5, backend=backend, use_v2=use_v2
    )
    without = train_preset(image_size=24, random_erase=0.5, backend=backend, use_v2=use_v2)
    image, changed = noise(50, 40), 0
    for seed in range(8):
        one = seeded(seed, transform, image)
        assert one.shape == (3, 24, 24) and one.dtype == torch.float32 and one.isfinite().all()
        assert one.min() >= -2.12 and one.max() <= 2.65  # black and white, normalised
        random.seed(seed + 1)  # other generators have no say
        np.random.seed(seed + 1)
        assert torch.equal(one, seeded(seed, transform, image))
        changed += not torch.equal(one, seeded(seed, without, image))
    assert changed == 0 if policy is None else changed >= 4


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_white_and_black_are_normalised_by_imagenet_s_mean_and_deviation(backend, use_v2):
    transform = train_preset(image_size=8, backend=backend, use_v2=use_v2)
    for colour, expected in ((255, WHITE), (0, BLACK)):
        channels = transform(plain_colour((colour,) * 3)).flatten(1)
        assert torch.equal(channels.min(1).values, channels.max(1).values)
        assert channels[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize(("probability", "left"), [(0.0, BLACK), (1.0, WHITE)])
def test_flip_probability_is_seen_in_pixels(backend, use_v2, probability, left):
    transform = train_preset(
        image_size=16, crop_scale=(1.0, 1.0), hflip_prob=probability, backend=backend, use_v2=use_v2
    )
    for seed in range(10):
        picture = seeded(seed, transform, black_and_white(16, 16))
        assert picture[:, 8, 0].tolist() == pytest.approx(left, abs=1e-4)
        assert not torch.equal(picture[:, 8, 0], picture[:, 8, 15])


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_random_erase_zeroes_a_rectangle_after_normalising(use_v2, probability):
    transform = train_preset(image_size=32, random_erase=probability, use_v2=use_v2)
    for seed in range(10):
        erased = (seeded(seed, transform, plain_colour((255, 255, 255), (40, 40))) == 0).all(0)
        if probability == 0:
            assert not erased.any()
            continue
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        height, width = (int(there[-1] - there[0]) + 1 for there in (rows, columns))
        assert erased.sum() == height * width  # one whole rectangle
        assert 0.01 < height * width / 32**2 < 0.36  # torchvision: 2 to 33 % of the image, in whole pixels


def test_crop_scale_bounds_the_share_of_the_image_that_is_seen():
    """The red channel counts the columns: a crop of a tenth of the area shows at most about a third of them."""
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    small = train_preset(image_size=64, crop_scale=(0.1, 0.1), interpolation="nearest")
    large = train_preset(image_size=64, crop_scale=(1.0, 1.0), interpolation="nearest")
    for seed in range(10):
        seen = [int(np.ptp(pixels.denormalise(seeded(seed, t, image))[0].numpy())) for t in (small, large)]
        assert 50 <= seen[0] <= 75  # 200 * sqrt(0.1) is 63, times the aspect of 3/4 to 4/3
        assert seen[1] >= 195


def test_denormalise_gives_back_the_pixels():
    image = noise(16, 16)
    normalised = eval_preset(crop_size=16, resize_size=16)(image)
    assert torch.equal(pixels.denormalise(normalised), pil_to_tensor(image))


# ---- the evaluation preset ----


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_evaluation_takes_the_centre(backend, use_v2):
    """Pixel (row, column) of an image 8 wide and 6 high is 10 * row + column: the middle 2 x 2 are rows 2
    and 3, columns 3 and 4."""
    pixels = np.array([[10 * row + column for column in range(8)] for row in range(6)], dtype=np.uint8)
    image = Image.fromarray(np.stack([pixels] * 3, axis=2))
    transform = eval_preset(crop_size=2, resize_size=6, backend=backend, use_v2=use_v2)
    red, green, _ = transform(image)
    # (23 / 255 - 0.485) / 0.229 and so on
    assert red.flatten().tolist() == pytest.approx([-1.7240, -1.7069, -1.5528, -1.5357], abs=1e-4)
    assert green[0, 0] == pytest.approx(-1.6331, abs=1e-4)


@pytest.mark.parametrize("use_v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("shape", [(32, 16), (16, 32)], ids=str)
def test_evaluation_resizes_the_short_side(backend, use_v2, shape):
    """32 x 16 becomes 16 x 8, and the middle 8 x 8 of that is half black, half white."""
    image = black_and_white(32, 16)
    if shape == (16, 32):
        image = image.transpose(Image.Transpose.TRANSPOSE)
    picture = eval_preset(crop_size=8, resize_size=8, backend=backend, use_v2=use_v2)(image)
    assert picture.shape == (3, 8, 8) and picture.dtype == torch.float32
    if shape == (16, 32):
        picture = picture.transpose(1, 2)
    for column in (0, 1, 2):
        assert picture[:, 5, column].tolist() == pytest.approx(BLACK, abs=1e-4)
        assert picture[:, 5, 7 - column].tolist() == pytest.approx(WHITE, abs=1e-4)


# ---- mixup, cutmix ----


LEVELS = torch.tensor([10.0, 20.0, 40.0, 80.0])  # image i is LEVELS[i] throughout, and of class i


def mixed(mix, seed):
    images = LEVELS.view(4, 1, 1, 1).expand(4, 3, 12, 12).clone()
    torch.manual_seed(seed)
    return mix(images, torch.arange(4))


def test_no_mix_without_an_alpha():
    assert batch_mix(0.0, 0.0, 10) is None


def test_mixup_mixes_an_image_with_its_neighbour_as_the_targets_say():
    shares = set()
    for seed in range(20):
        images, targets = mixed(batch_mix(1.0, 0.0, 4), seed)
        assert targets.shape == (4, 4) and torch.allclose(targets.sum(1), torch.ones(4))
        share = float(targets[0, 0])
        shares.add(share)
        # 10 is mixed with 80, 20 with 10, 40 with 20, 80 with 40.
        expected = [10 * share + 80 * (1 - share), 20 * share + 10 * (1 - share)]
        expected += [40 * share + 20 * (1 - share), 80 * share + 40 * (1 - share)]
        assert torch.allclose(images, torch.tensor(expected).view(4, 1, 1, 1).expand(4, 3, 12, 12), atol=1e-3)
        assert torch.allclose(targets[1], torch.tensor([1 - share, share, 0, 0]))
    assert len(shares) == 20 and min(shares) < 0.25 and max(shares) > 0.75


def test_a_small_alpha_mixes_little():
    shares = [float(mixed(batch_mix(0.05, 0.0, 4), seed)[1][0, 0]) for seed in range(100)]
    assert sum(0.1 < share < 0.9 for share in shares) < 25  # Beta(0.05, 0.05) has a tenth of its mass there


def test_cutmix_shares_of_pixels_are_the_targets():
    for seed in range(20):
        images, targets = mixed(batch_mix(0.0, 1.0, 4), seed)
        assert torch.allclose(targets.sum(1), torch.ones(4))
        for i, own in enumerate(LEVELS):
            neighbour = LEVELS[i - 1]
            assert ((images[i] == own) | (images[i] == neighbour)).all()
            assert float((images[i] == own).float().mean()) == pytest.approx(float(targets[i, i]), abs=1e-5)
            assert float((images[i] == neighbour).float().mean()) == pytest.approx(float(targets[i, i - 1]), abs=1e-5)


def test_with_both_alphas_each_batch_gets_one_of_the_two_about_half_the_time():
    mix, mixups = batch_mix(1.0, 1.0, 4), 0
    for seed in range(200):
        images, _ = mixed(mix, seed)
        mixups += not torch.isin(images, LEVELS).all()  # cutmix makes no new values
    assert 70 < mixups < 130  # four standard deviations about 100
