"""Files that the device decodes in batches: as workers do, and what becomes of those that it refuses."""

import re

import numpy as np
import pytest
import torch
from loading import loader_of
from pictures import photo
from PIL import Image

from augment.pixels import IMAGENET_STD
from images import decode, loaders
from images.datasets import ImageTree
from images.decode import check_decoder, decode_batch
from images.loaders import augment_on
from images.order import DrawSampler
from images.sources import Files
from presets import BatchPreset
from settings.errors import ConfigError
from settings.resolve import resolve
from utils import Runtime

CPU = torch.device("cpu")
SAVED = (("RGB", "0.jpg"), ("L", "1.jpg"), ("RGB", "2.png"), ("CMYK", "3.jpg"), ("RGB", "4.jpg"))


@pytest.fixture
def mixed_tree(tmp_path):
    """JPEGs in colour, grey and CMYK, and a PNG, of one class."""
    folder = tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    for i, (mode, name) in enumerate(SAVED):
        image = Image.fromarray(photo(60 + 10 * i, 90, seed=i).numpy()).convert(mode)
        image.save(folder / name, **({} if name.endswith("png") else {"quality": 95}))
    return tmp_path / "images"


@pytest.fixture
def by_pil(monkeypatch):
    """The names of the files that PIL has decoded."""
    names, decoded = [], decode.by_pil
    monkeypatch.setattr(decode, "by_pil", lambda file, path: (names.append(path[-5:]), decoded(file, path))[1])
    return names


def refusing_cmyk(monkeypatch):
    """Have the device refuse a batch with a file in CMYK, as nvJPEG does."""
    accept = decode.decode_jpeg

    def decode_jpeg(files, *how):
        if any(bytes(file.numpy()).find(b"Adobe") >= 0 for file in files):
            raise RuntimeError("nvjpegDecode failed: 2\nat some place in C++")
        return accept(files, *how)

    monkeypatch.setattr(decode, "decode_jpeg", decode_jpeg)


def batches(images, epochs=(3,), **how):
    sampler = DrawSampler(len(images), 5, seed=0)
    loader = loader_of(images, BatchPreset(image_size=48), sampler, Runtime(device=CPU), **how)
    for epoch in epochs:
        ((_, pixels, targets),) = loader.epoch(epoch)
    loader.close()
    return pixels * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, targets


def raising(error):
    def decode_jpeg(*_):
        raise error

    return decode_jpeg


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_decoded_on_the_device_are_those_of_workers(mixed_tree, by_pil, workers):
    images = ImageTree(str(mixed_tree))
    (ours, targets), (theirs, same) = batches(images, workers=workers, decode_on_device=True), batches(images)
    assert torch.equal(targets, same) and by_pil == ["2.png"]
    difference = (ours - theirs).abs()  # in grey levels: two decoders, and two ways to resize
    assert difference.mean() < 0.5 and difference.max() < 6


def test_a_batch_of_files_is_a_few_tensors_however_many_files(mixed_tree):
    """Of 253 tensors a batch a worker died at `ulimit -n 1024`."""
    files = Files(ImageTree(str(mixed_tree)))
    joined, lengths, targets, keys = files.__getitems__([(0, index, 0) for index in (4, 0, 1)])
    first = (mixed_tree / "all" / "4.jpg").read_bytes()
    assert bytes(joined.split(lengths.tolist())[0].numpy()) == first and lengths.sum() == len(joined)
    assert targets.tolist() == [0, 0, 0] and keys.tolist() == [[0, 4, 0], [0, 0, 0], [0, 1, 0]]


def test_of_a_refused_batch_pil_decodes_the_file_that_spoils_it_and_says_so_once(
    mixed_tree, monkeypatch, by_pil, capsys
):
    refusing_cmyk(monkeypatch)
    images = ImageTree(str(mixed_tree))
    ours = batches(images, epochs=(2, 3), decode_on_device=True)[0]
    assert sorted(by_pil) == ["2.png", "2.png", "3.jpg", "3.jpg"]
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and re.search(r"all/3.jpg was refused \(nvjpegDecode failed: 2\); PIL decodes", told[0])
    difference = (ours - batches(images)[0]).abs()
    assert difference.mean() < 0.5 and difference.max() < 6


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_a_device_that_fails_is_not_taken_for_a_file_that_is_refused(mixed_tree, monkeypatch, error):
    monkeypatch.setattr(decode, "decode_jpeg", raising(error))
    with pytest.raises(type(error), match=str(error)):
        batches(ImageTree(str(mixed_tree)), decode_on_device=True)


def test_a_file_that_is_no_image_is_named(mixed_tree):
    (mixed_tree / "all" / "2.png").write_bytes(b"\xff\xd8\xff and then nothing")
    with pytest.raises(ConfigError, match=r"all/2.png cannot be read as an image: .*; mend or remove it"):
        batches(ImageTree(str(mixed_tree)), decode_on_device=True)


# ---- where ----


def test_decoding_on_the_device_needs_one(monkeypatch):
    config = resolve(["--decode-cache", "off", "--decode-on", "device"])
    with pytest.raises(ConfigError, match="needs image files, a CUDA GPU and augment_on device"):
        augment_on(config, Runtime(device=CPU))
    asked = []
    monkeypatch.setattr(loaders, "check_decoder", asked.append)
    assert augment_on(config, Runtime(device=torch.device("cuda"))) == "device"
    assert asked == [torch.device("cuda")]
    for flags, message in (([], "no effect with decode_cache auto"), (["--decode-cache", "off", "--augment-on", "worker"], "leaves no image")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            resolve(["--decode-on", "device", *flags])


def test_a_device_that_decodes_nothing_is_told_before_data_are_read(monkeypatch):
    check_decoder.cache_clear()
    check_decoder(CPU)
    check_decoder.cache_clear()
    monkeypatch.setattr(decode, "decode_jpeg", raising(RuntimeError("built without nvJPEG\nat some place in C++")))
    with pytest.raises(ConfigError, match=r"no JPEG on cpu here \(built without nvJPEG\); leave it out"):
        check_decoder(CPU)


# ---- a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_jpegs_decoded_on_a_gpu_are_those_of_pil(mixed_tree, by_pil):
    check_decoder(torch.device("cuda"))
    files = [mixed_tree / "all" / name for mode, name in SAVED if name.endswith("jpg") and mode != "CMYK"]
    for file in files:
        # Colour at full resolution: from half of it nvJPEG repeats pixels where libjpeg interpolates, which in a picture
        # as motley as this one is 6 grey levels on the mean (an H200, torch 2.11).
        with Image.open(file) as image:
            image.copy().save(file, quality=95, subsampling=0)
    contents = [torch.from_numpy(np.fromfile(file, np.uint8)) for file in files]
    refused = []
    decoded = decode_batch(contents, list(map(str, files)), torch.device("cuda"), lambda *how: refused.append(how))
    assert by_pil == refused == []
    for file, image in zip(files, decoded):
        theirs = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).int()
        assert image.is_cuda and (image.permute(1, 2, 0).cpu().int() - theirs).abs().float().mean() < 2


@pytest.mark.gpu
@needs_gpu
def test_a_batch_with_a_jpeg_that_a_gpu_refuses_is_decoded_all_the_same(mixed_tree, by_pil):
    images = ImageTree(str(mixed_tree))
    contents = [torch.from_numpy(np.fromfile(path, np.uint8)) for path, _ in images.samples]
    decoded = decode_batch(contents, [path for path, _ in images.samples], torch.device("cuda"), lambda *how: None)
    assert [image.shape[1] for image in decoded] == [60, 70, 80, 90, 100] and set(by_pil) <= {"2.png", "3.jpg"}
