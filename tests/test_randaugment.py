"""RandAugment against torchvision's, between its bins and beyond them."""

import sys

import numpy as np
import pytest
import torch
from pictures import BILINEAR, black_and_white, noise, plain_colour, seeded
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import pil_to_tensor

from augment import randaugment
from augment.randaugment import OPERATIONS, RandAugment

SIGNED = (
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
)  # fmt: skip


UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize")


def on(backend, image):
    return pil_to_tensor(image) if backend == "tensor" else image


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
