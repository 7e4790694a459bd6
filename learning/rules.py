"""The rules by which stages get their sizes, strengths and lengths: arithmetic alone."""

from collections.abc import Sequence


def stage_value(first: float, last: float, index: int, num_stages: int) -> float:
    """Compute a setting's value in stage `index`: `first` in stage 0, `last` in the last stage.

    stage_value(128, 300, 1, 4) == 185.33..., left unrounded for the caller.

    Raises:
        ValueError: fewer than two stages, or an index outside them.
    Source: arXiv:2104.00298, Algorithm 1. Section 5.1 gives the first stage the minimum of
        Table 6. The released TF code does so for all settings but the image size, see
        `released_image_size`.
    """
    if num_stages < 2:
        raise ValueError(f"going from {first} to {last} takes at least 2 stages, got {num_stages}")
    if not 0 <= index < num_stages:
        raise ValueError(f"stage index must be in [0, {num_stages}), got {index}")
    return first + (last - first) * index / (num_stages - 1)


def released_image_size(first: float, last: float, index: int, num_stages: int) -> float:
    """Compute the image size of stage `index` by the rule of the paper's released code.

    It is a step ahead of the paper, never `first` itself (128 to 300 in four stages: 171, 214, 257, 300).

    Source: google/automl, efficientnetv2/main_tf2.py.
    """
    return first + (last - first) * (index + 1) / num_stages


def spread(values: Sequence[float], num_stages: int) -> list[float]:
    """Spread a scheduled setting over the stages, from one value, first and last, or one per stage."""
    if len(values) == num_stages:
        return list(values)
    if len(values) == 1:
        return [values[0]] * num_stages
    first, last = values
    return [stage_value(first, last, i, num_stages) for i in range(num_stages)]


def equal_compute(epochs: int, sizes: Sequence[int]) -> list[int]:
    """Compute the passes of stages that share the compute of `epochs` passes at the last size equally.

    Compute is counted by area: a stage of half the last size sees the images four times as often. Passes are rounded, to 1
    at least. Where they would miss `epochs` by more than half a pass at the last size, those that lie nearest to a half are
    rounded the other way until they do not.

    equal_compute(12, [64, 96, 128]) == [16, 7, 4]: of 16, 7.1 and 4.

    sizes: of the stages, pixels

    Source: arXiv:2405.08768 (EfficientTrain++), which counts compute by area too.
    """
    areas = [(size / sizes[-1]) ** 2 for size in sizes]
    exact = [epochs / len(sizes) / area for area in areas]
    passes = [max(1, round(value)) for value in exact]
    while abs(missed := epochs - sum(count * area for count, area in zip(passes, areas))) > 0.5:
        step = 1 if missed > 0 else -1
        away = {
            i: abs(count + step - exact[i])
            for i, count in enumerate(passes)
            if count + step >= 1 and abs(missed - step * areas[i]) < abs(missed)
        }
        if not away or min(away.values()) >= 1:
            break
        passes[min(away, key=lambda i: away[i])] += step
    return passes
