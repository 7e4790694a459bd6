"""The decode-once store: the pixels of the files, noticed when they or it change, whole or not there at all."""

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageFilter
from programs import SMALL
from runs import assert_same_bits, checkpoint, make_tree

from images import store, store_build, store_place
from images.datasets import Data, Digits, ImageTree, load_data
from images.store import StoredImages, checksum
from images.store_build import stored_size
from images.store_place import available_memory, room_in_groups, store_side, with_store
from settings.errors import ConfigError, RunError
from settings.resolve import resolve
from train import run
from utils import Runtime

CPU = Runtime(device=torch.device("cpu"))


def config(tree, *flags):
    sizes = ["--train-crop-size", "16", "--val-resize-size", "24", "--val-crop-size", "20"]
    return resolve(["--data-path", str(tree), *sizes, *map(str, flags)])


def stored(tree, *flags):
    settings = config(tree, *flags)
    return with_store(settings, load_data(settings, CPU), CPU)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


@pytest.fixture
def varied(tmp_path):
    """Images of several sizes and modes, none with a short side above 32."""
    root = make_tree(tmp_path / "images", classes=("ant", "bee"), size=(30, 27))
    draw = np.random.default_rng(5)
    for i, size in enumerate([(7, 5), (32, 32), (90, 31), (31, 90), (1, 1), (33, 3)]):
        image = Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        image.save(root / "train" / "ant" / f"varied{i}.png")
    Image.new("L", (20, 10), 77).save(root / "train" / "bee" / "grey.png")
    Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / "train" / "bee" / "photo.jpg")
    return root


# ---- sizes ----


@pytest.mark.parametrize(
    ("flags", "side"),
    [
        ("--train-crop-size 128 --val-resize-size 256 --val-crop-size 224", 256),
        ("--stages 4 --epochs 4 --train-crop-size 128 300 --val-resize-size 384 --val-crop-size 384", 600),
        ("--train-crop-size 64 --val-resize-size 256 --val-crop-size 224", 256),  # evaluation needs more
        ("--train-crop-size 64 --augment-size 160 --val-resize-size 64 --val-crop-size 64", 320),
        ("--train-crop-size 100 --val-resize-size 75 --val-crop-size 25", 300),  # at 100 px it resizes to 300
    ],
)
def test_side_of_a_store(flags, side):
    assert store_side(resolve(flags.split())) == side


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((375, 500), 256, (256, 341)), ((500, 375), 256, (341, 256)), ((375, 500), 600, (375, 500)), ((300, 300), 150, (150, 150))],
)  # fmt: skip
def test_short_side_is_bounded_aspect_ratio_kept_and_nothing_enlarged(size, side, expected):
    assert stored_size(*size, side) == expected


# ---- pixels ----


def test_images_up_to_the_side_are_the_decoded_files(varied, tmp_path):
    plain = load_data(config(varied), CPU)
    kept = stored(varied, "--decode-cache", tmp_path / "cache")
    assert kept.store_side == 32 and len(kept.train) == len(plain.train) == 32 and kept.classes == plain.classes
    for ours, theirs in ((kept.train, plain.train), (kept.val, plain.val)):
        for i in range(len(theirs)):
            picture, target = ours[i]
            expected, its_target = theirs[i]
            assert picture.mode == "RGB" and target == its_target
            assert np.array_equal(np.asarray(picture), np.asarray(expected))
            assert torch.equal(ours.pixels(i), torch.from_numpy(np.array(expected)))


def test_larger_images_are_reduced_as_pil_would(tmp_path):
    """A smooth picture, as photos are; PIL's bicubic is the judge. JPEGs much larger are halved while decoding."""
    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for split in ("train", "val"):
        folder = tmp_path / "images" / split / "a"
        folder.mkdir(parents=True)
        large = noise.resize((600, 400), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
        large.save(folder / "x.png")
        large.save(folder / "y.jpg", quality=95)
    kept = stored(tmp_path / "images", "--train-crop-size", 25)
    judge = np.asarray(large.resize((75, 50), Image.Resampling.BICUBIC)).astype(int)
    for i in range(2):
        pixels = np.asarray(kept.train[i][0]).astype(int)
        assert pixels.shape == (50, 75, 3)
        assert np.abs(pixels - judge).mean() < 1.5 and np.abs(pixels - judge).max() <= 12


def test_a_worker_maps_the_file_itself(tree):
    images = stored(tree).train
    images.pixels(0)
    assert len(pickle.dumps(images)) < 5000  # not the pixels
    assert torch.equal(pickle.loads(pickle.dumps(images)).pixels(3), images.pixels(3))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's account of mapped memory")
def test_two_maps_of_one_store_share_their_memory(tree):
    images = stored(tree).train
    other = StoredImages(images.path, images.source)
    assert images.flat.sum() == other.flat.sum()
    account = Path("/proc/self/smaps").read_text()
    maps = [part for part in account.split("VmFlags") if images.path in part]
    assert len(maps) >= 2 and all("Private_Dirty:         0 kB" in part for part in maps)


@pytest.mark.parametrize("workers", [0, 2])
def test_many_images_are_decoded_by_processes_that_end(tmp_path, monkeypatch, workers):
    tree = make_tree(tmp_path / "images", splits=(("train", 150), ("val", 2)), size=(12, 10))
    if workers == 0:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    plain, kept = load_data(config(tree), CPU), stored(tree)
    assert all(np.array_equal(kept.train.pixels(i).numpy(), np.asarray(plain.train[i][0])) for i in range(300))
    assert multiprocessing.active_children() == []


# ---- the key ----


def test_a_store_is_built_once(tree, monkeypatch):
    first = stored(tree).train
    monkeypatch.setattr(store_build, "decode", lambda *args: pytest.fail("decoded again"))
    again = stored(tree).train
    assert again.path == first.path and torch.equal(again.pixels(5), first.pixels(5))


@pytest.mark.parametrize("change", ["content", "time", "added", "removed", "side"])
def test_a_store_is_made_anew_when_what_it_was_made_from_changed(tree, change):
    before = stored(tree).train.path
    path, flags = tree / "train" / "ant" / "3.png", []
    if change == "content":
        Image.new("RGB", (40, 32), (1, 2, 3)).save(path)
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "added":
        Image.new("RGB", (40, 32), (1, 2, 3)).save(tree / "train" / "ant" / "new.png")
    elif change == "removed":
        path.unlink()
    else:
        flags = ["--train-crop-size", "10"]
    kept = stored(tree, *flags)
    after = kept.train
    assert after.path != before
    assert len(after) == {"added": 25, "removed": 23}.get(change, 24)
    plain = load_data(config(tree), CPU)
    if change != "side":
        assert all(np.array_equal(after.pixels(i).numpy(), np.asarray(plain.train[i][0])) for i in range(len(after)))
        # The outdated one is gone; validation's, of other files, is not.
        assert files(tree / ".decode_cache") == sorted(os.path.basename(s.path) for s in (after, kept.val))
    else:
        assert len(files(tree / ".decode_cache")) == 4  # both sides serve their own runs
        assert after.pixels(0).shape == (24, 30, 3)


def test_moved_data_keep_their_store(tree, tmp_path, monkeypatch):
    stored(tree)
    tree.rename(tmp_path / "moved")
    monkeypatch.setattr(store_build, "decode", lambda *args: pytest.fail("decoded again"))
    assert len(stored(tmp_path / "moved").train) == 24


def test_two_sets_that_differ_in_pixels_alone_have_two_stores(tmp_path):
    """Of one size, as BMPs are, and of one time, as files of a container's layer are."""
    for name, grey in (("one", 10), ("other", 200)):
        for path in [tmp_path / name / split / label / f"{i}.bmp" for split in ("train", "val") for label in "ab" for i in range(2)]:  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (grey, grey, grey)).save(path)
            os.utime(path, (0, 0))
    cache = tmp_path / "cache"
    one, other = (stored(tmp_path / name, "--decode-cache", cache).train for name in ("one", "other"))
    assert (int(one.pixels(0).max()), int(other.pixels(0).min())) == (10, 200)


# ---- damage ----


def damage_pixels(path):
    content = bytearray(path.read_bytes())
    content[store.HEADER + 1000] ^= 1
    path.write_bytes(content)


def damage_index(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def blank(path):
    """What a power cut may leave: the right length, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


def swap_index_rows(path):
    """Every number of the index is still there, each image a neighbour's."""
    content = bytearray(path.read_bytes())
    content[-64:] = content[-32:] + content[-64:-32]
    path.write_bytes(content)


def swap_images(path):
    """As by a writer that has mixed up two images: the index fits itself."""
    content, header = path.read_bytes(), json.loads(path.read_bytes()[: store.HEADER])
    at = store.HEADER + header["bytes"]
    index = np.frombuffer(content[at:], store.INDEX)[[1, 0, *range(2, header["images"])]]
    header["index"] = checksum(index)
    header["header"] = store.header_checksum(header)
    path.write_bytes(json.dumps(header).ljust(store.HEADER).encode() + content[store.HEADER : at] + index.tobytes())


def wrong_types(path):
    content = path.read_bytes()
    header = json.loads(content[: store.HEADER]) | {"bytes": "many", "images": [24]}
    path.write_bytes(json.dumps(header).ljust(store.HEADER).encode() + content[store.HEADER :])


def other_size(path):
    """A header that fits the length of the file, and not what is in it."""
    content = path.read_bytes()
    header = json.loads(content[: store.HEADER])
    header |= {"bytes": header["bytes"] - 32, "images": header["images"] + 1}
    path.write_bytes(json.dumps(header).ljust(store.HEADER).encode() + content[store.HEADER :])


def deep(path):
    path.write_bytes(b"[" * 4096 + path.read_bytes()[4096:])


def other_images(path):
    """The store of another folder by this one's name."""
    (other,) = path.parent.glob("val-*.images")
    path.write_bytes(other.read_bytes())


def other_format(path):
    content = path.read_bytes()
    header = json.loads(content[: store.HEADER]) | {"format": 99}
    path.write_bytes(json.dumps(header).ljust(store.HEADER).encode() + content[store.HEADER :])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_pixels, "its pixels are damaged"), (damage_index, "its index is damaged"), (cut, "it has lost its end"),
        (blank, "its header is damaged"), (other_format, "it has another format"), (swap_index_rows, "its index is damaged"),
        (swap_images, "its pixels are damaged"), (wrong_types, "its header is damaged"), (other_size, "its header is damaged"),
        (deep, "its header is damaged"), (other_images, "it is of other images"),
        (lambda path: path.write_bytes(b""), "its header is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_store_is_noticed_and_built_anew(tree, capsys, damage, told):
    images = stored(tree).train
    whole = images.flat.clone()
    path = tree / ".decode_cache" / os.path.basename(images.path)
    damage(path)
    capsys.readouterr()
    again = stored(tree).train
    assert capsys.readouterr().out.startswith(f"decode cache {path} is made anew: {told}\n")
    assert again.path == images.path and sorted(again.index["offset"]) == sorted(images.index["offset"])
    assert torch.equal(again.pixels(7), torch.from_numpy(np.array(again.source[7][0])))
    assert again.flat.numel() == whole.numel() and not again.damaged()


def test_checksum_is_xxh3():
    """Against the vector that its author publishes for nothing at all; it knows the order of bytes, and whose they are."""
    assert checksum(np.zeros(0, np.uint8)) == 0x2D06800538D394C2
    one, swapped = np.array([1, 2, 3], np.uint8), np.array([2, 1, 3], np.uint8)
    assert len({checksum(one), checksum(swapped), checksum(one, 1)}) == 3


def test_a_damaged_image_is_named_and_nothing_is_left(tmp_path):
    tree = make_tree(tmp_path / "images", splits=(("train", 150), ("val", 2)), size=(12, 10))
    broken = tree / "train" / "bee" / "77.png"
    broken.write_bytes(broken.read_bytes()[:150])
    with pytest.raises(ConfigError, match=r"bee.77\.png cannot be read as an image") as caught:
        stored(tree)
    assert "\n" not in str(caught.value)
    assert files(tree / ".decode_cache") == [] and multiprocessing.active_children() == []


# ---- room ----


class FullDisk:
    """A file that takes so many bytes and then finds no space."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(content)
        return self.file.write(content)


@pytest.fixture
def full_disk(monkeypatch):
    write_all, left = store_build.write_all, [20_000]

    def limited(file, content):
        disk = FullDisk(file, left[0])
        write_all(disk, content)
        left[0] = disk.room

    monkeypatch.setattr(store_build, "write_all", limited)


def test_a_full_disk_is_one_line_and_leaves_nothing(tree, tmp_path, full_disk):
    with pytest.raises(
        ConfigError, match=r"decode_cache: no space is left in .*cache; give another folder, or off"
    ) as caught:
        stored(tree, "--decode-cache", tmp_path / "cache")
    assert "\n" not in str(caught.value) and files(tmp_path / "cache") == []


def test_auto_goes_on_without_a_store_when_the_disk_fills_up(tree, full_disk, capsys):
    kept = stored(tree)
    assert kept.store_side is None and isinstance(kept.train, ImageTree)
    assert capsys.readouterr().out.startswith("decode_cache off: ") and not (tree / ".decode_cache").exists()


def test_a_disk_that_takes_no_such_file_counts_as_full(tree, tmp_path, monkeypatch, capsys):
    def refused(file, content):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(store_build, "write_all", refused)
    with pytest.raises(
        ConfigError, match=r"decode_cache: cannot write .*: File too large; give another folder, or off"
    ):
        stored(tree, "--decode-cache", tmp_path / "cache")
    assert stored(tree).store_side is None
    assert capsys.readouterr().out.startswith("decode_cache off: decode_cache: cannot write ")


def test_too_little_room_is_seen_before_decoding(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(store_place, "free_disk", lambda folder: 50_000)  # 24 images of 3,840 bytes and more
    monkeypatch.setattr(store_build, "decode", lambda *args: pytest.fail("decoded"))
    with pytest.raises(ConfigError, match=r"has 0\.0 MiB free, the images need about 0\.1 MiB"):
        stored(tree, "--decode-cache", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("what", "value", "told"),
    [
        ("free_disk", 400_000, "a quarter of what is free is 0.1 MiB"),
        ("available_memory", 200_000, "of memory, half of what is free is 0.1 MiB"),
    ],
)
def test_auto_says_why_it_is_off(tree, monkeypatch, capsys, what, value, told):
    monkeypatch.setattr(store_place, what, lambda *args: value)
    assert stored(tree).store_side is None
    said = capsys.readouterr().out
    assert said.startswith("decode_cache off: it would take 0.1 MiB") and told in said and said.count("\n") == 1
    assert not (tree / ".decode_cache").exists()


def test_the_estimate_is_close(varied):
    images = load_data(config(varied), CPU).train
    header = stored(varied).train.header
    exact = store.HEADER + header["bytes"] + 32 * header["images"]
    assert exact <= store_build.estimate(images, 32) <= 1.1 * exact + 200 * len(images)


def test_off_and_digits_are_left_as_they_are(tree):
    settings = config(tree, "--decode-cache", "off")
    whole = load_data(settings, CPU)
    assert with_store(settings, whole, CPU) is whole and not (tree / ".decode_cache").exists()
    digits = Data(Digits(train=True), Digits(train=False))
    assert with_store(resolve(["--dataset", "digits"]), digits, CPU) is digits


def test_memory_that_is_available_is_a_plausible_number():
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("own", "groups", "room"),
    [  # a job of 4,000 bytes has used 1,500, of which the file cache can give up 500; the slice around it has less left
        ("0::/slice/job\n", {"": ("max", 0, 0), "slice": ("9000", 8500, 300), "slice/job": ("4000", 1500, 500)}, [800, 3000]),
        ("5:cpu:/x\n4:memory:/job\n", {"memory": ("7000", 100, 100), "memory/job": ("4000", 1500, 500)}, [7000, 3000]),
        ("0::/outside/of/here\n", {"": ("4000", 1500, 500)}, [3000]),  # as a container sees itself
        ("0::/\n", {}, []),
    ],
)  # fmt: skip
def test_groups_of_every_depth_bound_the_memory(tmp_path, own, groups, room):
    (tmp_path / "own").write_text(own)
    old = "memory:" in own
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    for place, (limit, used, cached) in groups.items():
        folder = tmp_path / "cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(
            f"anon 1\n{'total_cache' if old else 'file'} {cached + 7}\n{'total_shmem' if old else 'shmem'} 7\n"
        )
    assert list(room_in_groups(str(tmp_path / "own"), str(tmp_path / "cgroup"))) == room


# ---- the folder ----


def test_a_store_lies_beside_the_data_or_where_it_is_told(tree, tmp_path, capsys):
    stored(tree)
    assert len(files(tree / ".decode_cache")) == 2
    assert "images decoded once: 0.1 MiB in " in capsys.readouterr().out
    stored(tree, "--decode-cache", tmp_path / "there" / "deep")
    assert len(files(tmp_path / "there" / "deep")) == 2


def test_data_that_cannot_be_written_to_have_their_store_in_torch_s_folder(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    writable = store_place.writable
    monkeypatch.setattr(store_place, "writable", lambda folder: not folder.startswith(str(tree)) and writable(folder))
    stored(tree)
    assert not (tree / ".decode_cache").exists() and len(files(tmp_path / "hub" / "decode_cache")) == 2
    assert len(stored(tree).train) == 24  # and is found there


def test_a_folder_among_the_images_is_refused(tree):
    with pytest.raises(ConfigError, match="lies among the images; give a folder outside of them"):
        stored(tree, "--decode-cache", tree / "train" / "cache")


def test_auto_never_puts_a_folder_among_the_classes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    flags = ["--data-path", tree / "train", "--train-split", ".", "--val-split", "."]
    assert len(stored(tree, *flags).train) == 24
    assert sorted(os.listdir(tree / "train")) == ["ant", "bee"]


def test_a_folder_that_cannot_be_made_is_one_line(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be written to; give another folder, or off"):
        stored(tree, "--decode-cache", tmp_path / "file")


def test_leftovers_of_a_killed_run_are_removed(tree):
    images = stored(tree).train
    left, building = (
        tree / ".decode_cache" / f"train-32-0123456789abcdef.images.{end}" for end in ("deadbeef", "0ff1ce00")
    )
    left.write_bytes(b"half")
    with open(building, "wb") as file:
        store.hold(file)
        assert stored(tree).train.path == images.path  # at any start, not only when one is built
        assert not left.exists() and building.exists()
    stored(tree)
    assert not building.exists()


def test_another_run_s_store_stays_while_it_is_built_though_its_file_cannot_be_held(tree):
    """As where only readers may hold, and the other machine has not got its hold."""
    stored(tree)
    folder = tree / ".decode_cache"
    building = folder / "train-32-0123456789abcdef.images.deadbeef"
    building.write_bytes(b"half")
    with FileLock(folder / ".lock"):
        stored(tree)
        assert building.exists()
    stored(tree)
    assert not building.exists()


def test_a_store_can_be_read_by_who_builds_it(tree, monkeypatch):
    """NFS gives the hold of readers only to a file that is open to be read."""
    modes = []
    monkeypatch.setattr(store_build, "hold", lambda file: modes.append(file.readable()))
    stored(tree)
    assert modes == [True, True]


def test_nearest_takes_pixels_as_they_are_in_the_files(tree):
    assert not isinstance(stored(tree, "--interpolation", "nearest").train, store.StoredImages)
    assert not (tree / ".decode_cache").exists()


def test_where_files_cannot_be_locked_leftovers_stay_an_hour(tree, monkeypatch):
    monkeypatch.setattr(store, "fcntl", None)
    stored(tree)
    old, new = (tree / ".decode_cache" / f"train-32-0123456789abcdef.images.{end}" for end in ("deadbeef", "0ff1ce00"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    stored(tree)
    assert not old.exists() and new.exists()  # of a run on another machine, perhaps


# ---- a store in use ----


def test_an_outdated_store_that_a_run_uses_stays(tree):
    used = stored(tree).train
    os.utime(tree / "train" / "ant" / "0.png", (1, 1))
    assert stored(tree).train.path != used.path and os.path.exists(used.path)
    del used
    os.utime(tree / "train" / "ant" / "0.png", (2, 2))
    stored(tree)
    assert len(files(tree / ".decode_cache")) == 2  # of training and of validation images


def test_an_outdated_store_of_which_no_one_can_tell_stays(tree, monkeypatch):
    """On NFS another machine may have it in its memory, whose run would end by SIGBUS."""
    used = stored(tree).train.path
    monkeypatch.setattr(store_place, "held", lambda path: None)
    os.utime(tree / "train" / "ant" / "0.png", (1, 1))
    assert stored(tree).train.path != used and os.path.exists(used)


def test_stores_of_an_older_version_are_removed(tree):
    path = Path(stored(tree).train.path)
    old = path.with_name("train-32-0123456789abcdef.images")
    header = json.dumps({"format": 1, "root": json.loads(path.read_bytes()[: store.HEADER])["root"], "bytes": 0})
    old.write_bytes(header.ljust(store.HEADER).encode())
    os.utime(tree / "train" / "ant" / "0.png", (1, 1))
    assert stored(tree).train.path != path and not old.exists() and not path.exists()


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_run_goes_on_when_its_store_is_gone(tree, change):
    """In its process and in forked workers, which share the map; and in others, which open the file by its handle."""
    images = stored(tree).train
    expected = [images.pixels(i).clone() for i in range(3)]
    os.remove(images.path)
    if change == "replaced":  # by another order of the same images, as many cores make it
        Path(images.path).write_bytes(os.urandom(store.HEADER + images.header["bytes"]))
    for one in (images, pickle.loads(pickle.dumps(images))):
        assert all(torch.equal(one.pixels(i), pixels) for i, pixels in enumerate(expected))


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_where_handles_have_no_names_a_store_that_is_gone_is_one_line(tree, monkeypatch, change):
    images = stored(tree).train
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).startswith("/proc"))
    other = pickle.loads(pickle.dumps(images))
    os.rename(images.path, images.path + ".before")  # keeps its number from being given to the new one
    if change == "replaced":
        Path(images.path).write_bytes(bytes(10_000_000))
    with pytest.raises(RunError, match="was removed while it was used; --resume auto makes it anew"):
        other.pixels(0)


def test_a_store_cut_short_while_it_is_used_is_one_line(tree):
    """The system would end the process that reads what is no longer there."""
    images = stored(tree).train
    os.truncate(images.path, store.HEADER + images.header["bytes"] - 1)
    with pytest.raises(RunError, match=r"train-32-.* was cut short while it was used; --resume auto makes it anew"):
        images.pixels(0)
    assert stored(tree).train.pixels(0).shape == (32, 40, 3)


# ---- runs ----


def test_a_run_with_a_store_equals_one_without_where_nothing_is_reduced(tree, tmp_path):
    for name, cache in (("with", "auto"), ("without", "off")):
        flags = ["--epochs", "2", "--auto-augment", "ra", "--decode-cache", cache, "--output-dir", str(tmp_path / name)]
        assert run([*SMALL, "--data-path", str(tree), *flags]) == 0
    assert_same_bits(checkpoint(tmp_path / "with")["model"], checkpoint(tmp_path / "without")["model"])
    assert checkpoint(tmp_path / "with")["store_side"] == 64 and checkpoint(tmp_path / "without")["store_side"] is None


def test_a_run_does_not_go_on_with_other_pixels(tree, tmp_path, capsys):
    flags = [*SMALL, "--data-path", str(tree), "--epochs", "500", "--output-dir", str(tmp_path / "run")]
    assert run([*flags, "--time-budget", "1s"]) == 3
    capsys.readouterr()
    assert run([*flags, "--resume", "auto", "--decode-cache", "off"]) == 2
    told = capsys.readouterr().err
    assert "was trained on images of a decode-once store, now it would see those of the files" in told
    assert told.count("\n") == 1
    elsewhere = ["--decode-cache", str(tmp_path / "other"), "--time-budget", "1s"]
    assert run([*flags, "--resume", "auto", *elsewhere]) == 3  # where it lies makes no difference
