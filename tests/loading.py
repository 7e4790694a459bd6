"""Training loaders as tests make them: images and a transform, the rest of a run left out."""

from images.loaders import TrainLoader
from images.sources import find_source


def loader_of(images, transform, sampler, runtime, *, workers=0, decode_on_device=False, kind=TrainLoader, **how):
    source = find_source(images, transform, sampler.seed, runtime, workers, decode_on_device)
    return kind(source, sampler, runtime, **how)
