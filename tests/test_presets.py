"""Transforms: RandAugment against torchvision's own and against numbers worked out by hand, the presets in
pixels, mixup and cutmix in shares."""

import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from augment import pixels, randaugment
from augment.randaugment import OPERATIONS, RandAugment
from presets import batch_mix, eval_preset, train_preset

BILINEAR = InterpolationMode.BILINEAR
SIGNED = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
)  # fmt: skip
UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize")
POLICIES = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")
WHITE = (2.2489, 2.4286, 2.6400)  # (1 - mean) / std of ImageNet's red, green, blue
BLACK = (-2.1179, -2.0357, -1.8044)  # -mean / std


def noise(width, height):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def plain_colour(colour, size=(20, 20)):
    return Image.new("RGB", size, colour)


def black_and_white(width, height):
    """The left half black, the right half white."""
    image = plain_colour((0, 0, 0), (width, height))
    image.paste((255, 255, 255), (width // 2, 0, width, height))
    return image


def on(backend, image):
    return pil_to_tensor(image) if backend == "tensor" else image


def as_tensor(image):
    return image if isinstance(image, torch.Tensor) else pil_to_tensor(image)


def seeded(seed, transform, image):
    torch.manual_seed(seed)
    return as_tensor(transform(image))


def first_seed(draws_negative, negative):
    """The first seed after which `draws_negative` says `negative`."""
    for seed in range(100):
        torch.manual_seed(seed)
        if draws_negative() == negative:
            return seed
    raise AssertionError("no such seed")


def v1_draws_negative():
    torch.randint(1, (1,))  # which operation: there is one
    return bool(torch.randint(2, (1,)))


def v2_draws_negative():
    torch.randint(1, ())
    return bool(torch.rand(()) <= 0.5)


V1_SEED = {negative: first_seed(v1_draws_negative, negative) for negative in (False, True)}
V2_SEED = {negative: first_seed(v2_draws_negative, negative) for negative in (False, True)}


@pytest.fixture
def only(monkeypatch):
    """only(name, magnitude, scale): this project's RandAugment with one operation to draw, drawn once."""

    def build(name, magnitude, scale="torchvision", interpolation=BILINEAR):
        monkeypatch.setattr(randaugment, "OPERATIONS", {name: OPERATIONS[name]})
        return RandAugment(magnitude, scale, interpolation, num_ops=1)

    return build


def only_v1(name, magnitude, interpolation=BILINEAR):
    theirs = v1.RandAugment(1, magnitude, interpolation=interpolation)
    space = theirs._augmentation_space
    theirs._augmentation_space = lambda *args: {name: space(*args)[name]}
    return theirs


def only_v2(name, magnitude, interpolation=BILINEAR):
    theirs = v2.RandAugment(1, magnitude, interpolation=interpolation)
    theirs._AUGMENTATION_SPACE = {name: theirs._AUGMENTATION_SPACE[name]}
    return theirs


def both_signs(transform, image):
    """What an operation gives for its positive and for its negative amount."""
    return [seeded(V1_SEED[negative], transform, image) for negative in (False, True)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These images are too small to share between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- RandAugment at torchvision's scale ----


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("size", [(331, 97), (96, 96)], ids=str)
@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_each_operation_equals_torchvision_pixel_for_pixel(only, name, size, backend):
    image = on(backend, noise(*size))
    # torchvision's two versions differ from each other on tensors: v1 rounds on the way. This is then the second.
    rounding = 1 if backend == "tensor" and name in ("Color", "Sharpness") else 0
    for magnitude in (0, 1, 9, 15, 29, 30):
        ours = only(name, magnitude)
        for negative in (False, True) if name in SIGNED else (False,):
            mine = seeded(V1_SEED[negative], ours, image)
            first = seeded(V1_SEED[negative], only_v1(name, magnitude), image)
            assert (mine.int() - first.int()).abs().max() <= rounding, (magnitude, negative)
            assert torch.equal(mine, seeded(V2_SEED[negative], only_v2(name, magnitude), image)), (magnitude, negative)


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("name", ["TranslateX", "TranslateY", "Posterize", "Solarize"])
def test_what_rounds_to_whole_numbers_equals_torchvision_at_every_magnitude(only, name, backend):
    image = on(backend, noise(331, 97))
    for magnitude in range(31):
        for seed in V1_SEED.values():
            mine = seeded(seed, only(name, magnitude), image)
            assert torch.equal(mine, seeded(seed, only_v1(name, magnitude), image)), magnitude


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
@pytest.mark.parametrize("name", SIGNED[:5])
def test_warps_equal_torchvision_in_other_interpolations(only, name, interpolation):
    mode = InterpolationMode(interpolation)
    image = noise(331, 97)
    for seed in V1_SEED.values():
        mine = seeded(seed, only(name, 9, interpolation=mode), image)
        assert torch.equal(mine, seeded(seed, only_v1(name, 9, mode), image))


@pytest.mark.parametrize("name", [*SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize"])
def test_operations_and_their_signs_are_seen_in_the_picture(only, name):
    image = noise(331, 97)
    positive, negative = both_signs(only(name, 15), image)
    assert not torch.equal(positive, pil_to_tensor(image)) or name == "AutoContrast"  # noise has all contrast
    assert torch.equal(positive, negative) == (name in UNSIGNED)


def test_identity_leaves_the_image_alone(only):
    image = noise(31, 17)
    assert torch.equal(seeded(0, only("Identity", 30), image), pil_to_tensor(image))


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("magnitude", [0, 5, 9, 15, 30])
def test_the_policy_equals_torchvision_draw_for_draw(magnitude, backend, monkeypatch):
    image = on(backend, noise(67, 96))
    if backend == "tensor":  # v1's policy on v2's operations: see above
        monkeypatch.setattr(sys.modules[v1.RandAugment.__module__], "F", v2.functional)
    ours = RandAugment(magnitude, "torchvision", BILINEAR)
    theirs = v1.RandAugment(2, magnitude, interpolation=BILINEAR)
    for seed in range(40):
        mine, draws = seeded(seed, ours, image), torch.get_rng_state()
        assert torch.equal(mine, seeded(seed, theirs, image)), seed
        assert torch.equal(draws, torch.get_rng_state()), "not as many draws as torchvision"


def test_the_policy_draws_every_operation_about_equally_often(monkeypatch):
    counts = dict.fromkeys(OPERATIONS, 0)

    def counting(name):
        def apply(image, amount, mode):
            counts[name] += 1
            return image

        return randaugment.Operation(apply)

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: counting(name) for name in OPERATIONS})
    augment, image = RandAugment(9, "torchvision", BILINEAR), noise(4, 4)
    for _ in range(1400):
        augment(image)
    assert len(counts) == 14 and sum(counts.values()) == 2800  # 200 each; four standard deviations are 55
    assert all(145 < count < 255 for count in counts.values()), counts


# ---- RandAugment between the bins, and at the paper's scale ----


@pytest.mark.parametrize(
    ("magnitude", "scale", "degrees"),
    [
        (9, "torchvision", 9), (8.33, "torchvision", 8.33), (11.67, "torchvision", 11.67), (30, "torchvision", 30),
        (5, "paper", 15), (10, "paper", 30), (15, "paper", 45), (2.5, "paper", 7.5), (30, "paper", 90),
    ],
)  # fmt: skip
def test_rotation_in_degrees(only, magnitude, scale, degrees):
    image = noise(97, 61)
    expected = [image.rotate(angle, Image.Resampling.BILINEAR) for angle in (degrees, -degrees)]
    for mine, picture in zip(both_signs(only("Rotate", magnitude, scale), image), expected):
        assert torch.equal(mine, pil_to_tensor(picture))


@pytest.mark.parametrize(
    ("magnitude", "scale", "level"), [(10, "paper", 0.3), (15, "paper", 0.45), (7.5, "torchvision", 0.075)]
)
@pytest.mark.parametrize("axis", ["X", "Y"])
def test_shear_is_pil_s_affine_map_with_that_slope(only, magnitude, scale, level, axis):
    image = noise(97, 61)
    pictures = []
    for slope in (level, -level):  # the paper's code hands PIL (1, level, 0, 0, 1, 0)
        matrix = (1, slope, 0, 0, 1, 0) if axis == "X" else (1, 0, 0, slope, 1, 0)
        pictures.append(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    for mine, picture in zip(both_signs(only(f"Shear{axis}", magnitude, scale), image), pictures):
        difference = mine.int() - pil_to_tensor(picture).int()
        assert difference.abs().max() <= 1  # rounding of tan(atan(slope))
    assert not torch.equal(pil_to_tensor(pictures[0]), pil_to_tensor(image))


@pytest.mark.parametrize(
    ("magnitude", "scale", "side", "pixels"),
    [
        (10, "paper", 100, 45),  # 150/331 of the side is 45.3
        (15, "paper", 100, 67),  # 67.97
        (20, "paper", 100, 75),  # 90.6, but a quarter of the image stays
        (30, "paper", 100, 75),
        (30, "paper", 40, 30),
        (30, "torchvision", 331, 150),
        (1, "torchvision", 331, 5),
        (8.3, "torchvision", 331, 41),  # 41.5
    ],
)
@pytest.mark.parametrize("axis", ["X", "Y"])
@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_translation_in_pixels(only, magnitude, scale, side, pixels, axis, backend):
    row = np.arange(side) % 251 + 1  # not black
    ramp = torch.from_numpy(np.broadcast_to(row, (3, 9, side)).astype(np.uint8).copy())
    black = torch.zeros(3, 9, pixels, dtype=torch.uint8)
    there = torch.cat([black, ramp[..., : side - pixels]], dim=2)
    back = torch.cat([ramp[..., pixels:], black], dim=2)
    if axis == "Y":
        ramp, there, back = (tensor.transpose(1, 2) for tensor in (ramp, there, back))
    image = ramp if backend == "tensor" else v1.functional.to_pil_image(ramp)
    for mine, expected in zip(both_signs(only(f"Translate{axis}", magnitude, scale), image), (there, back)):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize(
    ("name", "magnitude", "colour", "stronger", "weaker"),
    [
        ("Brightness", 10, (100, 50, 10), (190, 95, 19), (10, 5, 1)),  # factors 1.9 and 0.1
        ("Brightness", 5, (100, 20, 200), (145, 29, 255), (55, 11, 110)),  # 1.45 and 0.55
        ("Brightness", 15, (100, 20, 120), (235, 47, 255), (0, 0, 0)),  # 2.35, and -0.35 clipped at 0
        ("Color", 15, (120, 120, 120), (120, 120, 120), (120, 120, 120)),  # grey has no colour
        ("Contrast", 15, (120, 120, 120), (120, 120, 120), (120, 120, 120)),  # nor a plain image contrast
        ("Sharpness", 15, (120, 60, 30), (120, 60, 30), (120, 60, 30)),
    ],
)
def test_enhancement_factors_at_the_paper_s_scale(only, backend, name, magnitude, colour, stronger, weaker):
    image = on(backend, plain_colour(colour))
    for mine, expected in zip(both_signs(only(name, magnitude, "paper"), image), (stronger, weaker)):
        difference = mine.int() - torch.tensor(expected).view(3, 1, 1)
        assert difference.abs().max() <= 1  # the PIL and the tensor backend round differently


@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_colour_and_contrast_end_at_grey_not_at_the_negative(only, backend):
    """Factor 1 - 1.35 is clipped at 0."""
    image = on(backend, plain_colour((200, 100, 50)))
    grey = both_signs(only("Color", 15, "paper"), image)[1].int()
    assert (grey - 124).abs().max() <= 1  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    image = on(backend, black_and_white(20, 20))
    grey = both_signs(only("Contrast", 15, "paper"), image)[1].int()
    assert (grey - 127).abs().max() <= 1  # the mean


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize(
    ("magnitude", "scale", "kept_of_255"),
    [
        (0, "paper", 255), (5, "paper", 252), (10, "paper", 240), (15, "paper", 192),  # 8, 6, 4, 2 bits
        (20, "paper", 128), (30, "paper", 128),  # never less than one bit
        (9, "torchvision", 254), (15, "torchvision", 252), (30, "torchvision", 240), (8.33, "torchvision", 254),
        (11.67, "torchvision", 252), (3.5, "torchvision", 255),
    ],
)  # fmt: skip
def test_posterize_bits(only, backend, magnitude, scale, kept_of_255):
    image = on(backend, plain_colour((255, 255, 255)))
    assert (seeded(0, only("Posterize", magnitude, scale), image) == kept_of_255).all()


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize(
    ("magnitude", "scale", "stays", "turns"),
    [
        (9, "torchvision", 178, 179),  # threshold 178.5
        (10.5, "torchvision", 165, 166),  # 165.75
        (5, "paper", 127, 128),  # 127.5
        (9, "paper", 25, 26),  # 25.5
        (10, "paper", None, 0),  # 0: everything turns
        (15, "paper", None, 0),  # and no further
    ],
)
def test_solarize_threshold(only, backend, magnitude, scale, stays, turns):
    solarize = only("Solarize", magnitude, scale)
    if stays is not None:
        assert (seeded(0, solarize, on(backend, plain_colour((stays,) * 3))) == stays).all()
    assert (seeded(0, solarize, on(backend, plain_colour((turns,) * 3))) == 255 - turns).all()


@pytest.mark.parametrize("backend", ["pil", "tensor"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation_bears_any_magnitude_of_the_paper_s_scale(only, name, backend):
    image = on(backend, noise(33, 20))
    for magnitude in (0.1, 8.33, 14.99, 25, 30):
        for mine in both_signs(only(name, magnitude, "paper"), image):
            assert mine.shape == (3, 20, 33) and mine.dtype == torch.uint8


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
