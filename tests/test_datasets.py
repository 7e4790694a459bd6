"""Images of every mode, folders of them, and the data set that needs no download."""

import errno
import gzip
import json
import os
import re
import socket
import tarfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from loading import CPU
from PIL import Image
from runs import make_tree, start

import images.verify
import images.workers
import train
from images import datasets, listing, verify
from images.datasets import Digits, ImageTree, download, load_data
from settings.errors import ConfigError, RunError
from settings.resolve import resolve
from utils import Runtime


def folder_with(tmp_path, image, name="x.png"):
    (tmp_path / "a").mkdir(exist_ok=True)
    image.save(tmp_path / "a" / name)
    return ImageTree(str(tmp_path))


@pytest.fixture(autouse=True)
def own_hub(tmp_path, monkeypatch):
    """What was found out about images is kept in a folder of the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


# ---- images of every mode ----


def palette(transparent):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparent:
        image.info["transparency"] = 0
    return image


def sixteen_bits(value):
    return Image.fromarray(np.full((4, 4), value, dtype=np.uint16))


MODES = [
    ("grey", Image.new("L", (4, 4), 77), "png", (77, 77, 77)),
    ("grey with alpha", Image.new("LA", (4, 4), (77, 255)), "png", (77, 77, 77)),
    ("palette", palette(False), "png", (10, 200, 30)),
    ("palette with transparency", palette(True), "png", (10, 200, 30)),
    ("CMYK", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tiff", (0, 255, 255)),
    ("RGBA", Image.new("RGBA", (4, 4), (10, 200, 30, 255)), "png", (10, 200, 30)),
    ("1 bit, white", Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    ("1 bit, black", Image.new("1", (4, 4), 0), "png", (0, 0, 0)),
    ("16 bits, black", sixteen_bits(0), "png", (0, 0, 0)),
    ("16 bits, white", sixteen_bits(65535), "png", (255, 255, 255)),
    ("RGB", Image.new("RGB", (4, 4), (10, 200, 30)), "bmp", (10, 200, 30)),
]


def test_an_image_that_found_no_memory_once_is_looked_at_again(tmp_path, monkeypatch):
    images = folder_with(tmp_path, Image.new("RGB", (4, 4)))
    with monkeypatch.context() as patch:

        def full(image):
            raise MemoryError

        patch.setattr(verify, "to_rgb", full)
        assert verify.find_bad(images.samples, "looking") == [(0, "MemoryError")]
    assert verify.find_bad(images.samples, "looking") == []


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((4, 4), 200, np.int32), "its pixels are signed, or of 32 bits; save them with 8 or 16 bits, unsigned"),
        (
            np.full((4, 4), 65536, np.int32),
            "its pixels are signed, or of 32 bits; save them with 8 or 16 bits, unsigned",
        ),
        (np.full((4, 4), 0.8, np.float32), "its pixels are floating-point numbers; save them with 8 or 16 bits"),
    ],
)
def test_numbers_of_no_known_range_are_no_image(tmp_path, pixels, words):
    images = folder_with(tmp_path, Image.fromarray(pixels), "x.tiff")
    with pytest.raises(ConfigError, match=rf"x\.tiff cannot be read as an image: {words}; mend or remove it"):
        images[0]


@pytest.mark.parametrize(("image", "ending", "colour"), [row[1:] for row in MODES], ids=[row[0] for row in MODES])
def test_every_mode_becomes_rgb(tmp_path, image, ending, colour):
    picture, target = folder_with(tmp_path, image, f"x.{ending}")[0]
    assert (picture.mode, picture.size, target) == ("RGB", (4, 4), 0)
    assert picture.getcolors() == [(16, colour)]


@pytest.mark.parametrize(("value", "grey"), [(0x4000, 0x40), (0x8000, 0x80), (0xC000, 0xC0)])
def test_grey_of_16_bits_keeps_its_shades(tmp_path, value, grey):
    picture, _ = folder_with(tmp_path, sixteen_bits(value))[0]
    assert picture.getpixel((0, 0)) == pytest.approx((grey, grey, grey), abs=1)


# ---- folders ----


def test_a_tree_has_its_classes_in_order_and_finds_images_at_any_depth(tmp_path):
    tree = make_tree(tmp_path, splits=(("train", 2),), classes=("bee", "ant"))
    (tree / "train" / "ant" / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(tree / "train" / "ant" / "deeper" / "z.JPG")
    (tree / "train" / "ant" / "notes.txt").write_text("not an image")
    images = ImageTree(str(tree / "train"))
    assert images.classes == ["ant", "bee"] and len(images) == 5
    assert [images[i][1] for i in range(5)] == [0, 0, 0, 1, 1]


def test_wordnet_folders_get_their_names(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),), classes=("n01440764", "n03888257"))
    assert ImageTree(str(tmp_path / "train")).classes == ["tench", "parachute"]


def test_a_class_folder_without_images_is_named(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),))
    (tmp_path / "train" / "wasp").mkdir()
    (tmp_path / "train" / "wasp" / "readme.txt").write_text("none yet")
    with pytest.raises(ConfigError, match=r"train: .*wasp") as caught:
        ImageTree(str(tmp_path / "train"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_class_folders_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=f"{tmp_path.name}: .*class folder"):
        ImageTree(str(tmp_path))


# ---- what is no image, and odd names ----


def dangling(path):
    path.symlink_to("nowhere")


def circle(path):
    path.symlink_to(path)


def socket_at(path):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(path.parent, os.O_RDONLY)  # a socket's path may have 107 bytes
        one.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


NO_FILES = [
    (dangling, "it is a link to nothing"), (circle, "Too many levels of symbolic links"), (os.mkfifo, "it is a FIFO, not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"), (socket_at, "it is a socket, not a file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "fault"), NO_FILES, ids=[fault for _, fault in NO_FILES])
def test_what_is_no_file_is_named_or_left_out(tree, make, fault):
    path = tree / "train" / "ant" / "x.jpg"
    make(path)
    with pytest.raises(ConfigError) as caught:
        ImageTree(str(tree / "train"))
    assert str(caught.value) == f"{path} cannot be read as an image: {fault}; mend or remove it"
    images = ImageTree(str(tree / "train"), skip=True)
    assert len(images) == 24 and images.skipped == [(str(path), fault)]


def test_a_fifo_that_comes_later_is_not_waited_for(tree):
    images = ImageTree(str(tree / "train"))
    os.remove(images.samples[3][0])
    os.mkfifo(images.samples[3][0])
    with pytest.raises(ConfigError, match=r"cannot be read as an image: it is a FIFO, not a file"):
        images[3]


@pytest.mark.parametrize(
    ("name", "target", "told"),
    [
        ("loop", "..", "ant/loop is a link to a folder that it lies in; remove it"),
        ("more", "nowhere", "ant/more cannot be read: it is a link to nothing"),
        ("../wasp", "nowhere", "train/wasp cannot be read: it is a link to nothing"),
        ("../wasp.d", "wasp.d", "train/wasp.d cannot be read: Too many levels of symbolic links"),
    ],
)
def test_folders_that_lead_nowhere_are_named(tree, name, target, told):
    (tree / "train" / "ant" / name).symlink_to(target)
    with pytest.raises(ConfigError, match=told):
        ImageTree(str(tree / "train"), skip=True)


def test_a_folder_that_cannot_be_read_is_named(tree, monkeypatch):
    """It was left out in silence. Who runs the tests may be allowed to read everything."""
    (tree / "train" / "ant" / "deep").mkdir()
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ConfigError, match=r"folder .*ant/deep cannot be read: Permission denied; make it readable"):
        ImageTree(str(tree / "train"))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[1m", b"caf\xe9"])
def test_a_class_needs_a_name_that_can_be_shown(tree, name):
    os.mkdir(os.path.join(os.fsencode(tree / "train"), os.fsencode(name)))
    with pytest.raises(ConfigError, match=r"train/(a\\nb|a\\x1b\[1m|caf\\xe9): a class needs a name that can be shown"):
        ImageTree(str(tree / "train"))


def test_files_may_have_any_name(tree):
    names = [b"caf\xe9.png", b"two\nlines.png", b" .png", b"-rf.png", 251 * b"x" + b".png", "猫.PNG".encode()]
    for name in names:
        os.rename(
            tree / "train" / "ant" / f"{names.index(name)}.png", os.fsencode(tree / "train" / "ant") + b"/" + name
        )
    images = ImageTree(str(tree / "train"))
    assert {images.samples.name(i) for i in range(12)} >= {b"ant/" + name for name in names}
    assert all(images[i][0].size == (40, 32) for i in range(24))
    for name, shown in ((names[0], r"ant/caf\xe9.png"), (names[1], r"ant/two\nlines.png")):
        with open(os.fsencode(tree / "train" / "ant") + b"/" + name, "wb"):
            pass
        index = next(i for i in range(24) if images.samples.name(i) == b"ant/" + name)
        with pytest.raises(ConfigError) as caught:
            images[index]
        assert str(caught.value).startswith(f"{tree}/train/{shown} cannot be read as an image: ")
    assert len(ImageTree(str(tree / "train"), skip=True)) == 22


def test_a_class_name_of_markup_or_of_255_bytes_trains_and_reports(tmp_path, capsys):
    """With an image whose name is no UTF-8, kept in a store."""
    markup = "<script>alert('1')<&script>{{ 1 }}%s" + '"'
    tree = make_tree(tmp_path / "images", splits=(("train", 4), ("val", 2)), classes=(markup, 255 * "x"))
    os.rename(tree / "val" / markup / "0.png", os.fsencode(tree / "val" / markup) + b"/\xff\n.png")
    assert start(tree, tmp_path / "run", "--epochs", "1") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>alert" not in page
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"]["count"] == 0


def test_postscript_by_the_name_of_a_jpeg_is_not_run(tree):
    """PIL would hand it to Ghostscript."""
    path = tree / "train" / "ant" / "0.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(hello) print\n%%EOF\n")
    with pytest.raises(ConfigError, match=r"0\.png cannot be read as an image: it is PostScript"):
        ImageTree(str(tree / "train"))[0]


# ---- on_bad_image ----


@pytest.fixture
def dirty(tree):
    """A tree with three training images and a validation image that cannot be read."""
    whole = (tree / "train" / "ant" / "5.png").read_bytes()
    (tree / "train" / "ant" / "5.png").write_bytes(whole[: len(whole) // 2])
    (tree / "train" / "bee" / "0.png").write_bytes(b"")
    (tree / "val" / "bee" / "1.png").write_bytes(b"<html>404</html>")
    os.mkfifo(tree / "train" / "bee" / "pipe.jpg")
    return tree


LEFT_OUT = {"train/ant/5.png", "train/bee/0.png", "train/bee/pipe.jpg", "val/bee/1.png"}


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_runs_leave_out_the_same_images_with_and_without_a_store(dirty, tmp_path, capsys, monkeypatch, cache):
    flags = ["--on-bad-image", "skip", "--decode-cache", cache, "--epochs", "2"]
    assert start(dirty, tmp_path / "run", *flags) == 0
    told = capsys.readouterr().out
    assert "22 training and 9 validation images of 2 classes; 4 left out that cannot be read, first " in told
    skipped = json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_images"]
    assert skipped["count"] == 4 and skipped["train"].keys() | skipped["val"].keys() == {
        f"{dirty}/{n}" for n in LEFT_OUT
    }
    assert skipped["train"][f"{dirty}/train/bee/pipe.jpg"] == "it is a FIFO, not a file"
    monkeypatch.setattr(verify, "inspect", lambda *args: pytest.fail("looked at again"))
    assert start(dirty, tmp_path / "run", *flags, "--overwrite") == 0


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_an_error_names_the_image_with_and_without_a_store(dirty, tmp_path, capsys, cache):
    (dirty / "train" / "bee" / "pipe.jpg").unlink()
    (dirty / "train" / "bee" / "0.png").unlink()
    (dirty / "val" / "bee" / "1.png").unlink()
    assert start(dirty, tmp_path / "run", "--epochs", "1", "--decode-cache", cache) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {dirty}/train/ant/5.png cannot be read as an image: ")
    assert (
        start(
            dirty, tmp_path / "run", "--epochs", "1", "--decode-cache", cache, "--on-bad-image", "skip", "--overwrite"
        )
        == 0
    )


def test_an_image_that_is_mended_is_looked_at_again(dirty):
    root = str(dirty / "train")
    assert len(ImageTree(root, skip=True)) == 22
    Image.new("RGB", (4, 4)).save(dirty / "train" / "bee" / "0.png")
    assert len(ImageTree(root, skip=True)) == 23


def test_what_the_disk_refused_is_looked_at_again(tmp_path, monkeypatch):
    """Its size and date say nothing of it."""
    tree = make_tree(tmp_path)
    refused = str(sorted((tree / "train").rglob("*.png"))[0])

    def refuse(path):
        if path == refused:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    opened = verify.open_image
    with monkeypatch.context() as patch:
        patch.setattr(verify, "open_image", refuse)
        assert [path for path, _ in ImageTree(str(tree / "train"), skip=True).skipped] == [refused]
    assert not ImageTree(str(tree / "train"), skip=True).skipped


@pytest.mark.parametrize(("dataset", "locks"), [("imagenette-160px", True), ("imagewoof", True), ("imagewoof", False)])
def test_a_download_is_there_whole_or_not_at_all(tmp_path, monkeypatch, dataset, locks):
    if not locks:  # some network disks
        monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=NotImplementedError))
    config = resolve(["--data-path", str(tmp_path / "data"), "--dataset", dataset, "--download"])
    name = {"imagenette-160px": "imagenette2-160", "imagewoof": "imagewoof2"}[dataset]
    fetched = []

    def unpack(root, whole):
        fetched.append(root)
        (Path(root) / name / "train").mkdir(parents=True)
        if not whole:
            raise OSError(errno.ENOSPC, "No space left on device")
        (Path(root) / name / "val").mkdir()

    for whole in (False, True, True):
        unpacked = partial(unpack, whole=whole)
        monkeypatch.setattr(datasets, "Imagenette", lambda root, unpacked=unpacked, **how: unpacked(root))
        monkeypatch.setattr(
            datasets, "download_url", lambda url, root: gzip.open(Path(root) / f"{name}.tgz", "w").close()
        )
        monkeypatch.setattr(datasets, "extract_archive", lambda path, root, unpacked=unpacked: unpacked(root))
        if whole:
            download(config)
            assert sorted(os.listdir(tmp_path / "data" / name)) == ["train", "val"]
        else:
            with pytest.raises(ConfigError, match=r"cannot be fetched into .*No space left"):
                download(config)
            assert not (tmp_path / "data" / name).exists()
        assert not list((tmp_path / "data").glob(".download-*"))
    assert len(fetched) == 2  # the third time it was there


def woof(folder, spoil):
    """An archive of Imagewoof as a server may send it."""
    content = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    (folder / "a.jpg").write_bytes(content)
    with tarfile.open(folder / "whole.tgz", "w:gz") as archive:
        archive.add(folder / "a.jpg", "imagewoof2-160/train/a.jpg")
    return spoil((folder / "whole.tgz").read_bytes())


@pytest.mark.parametrize(("spoil", "reason"), [
    (lambda sent: sent[:100_000] + bytes([sent[100_000] ^ 1]) + sent[100_001:], "CRC check failed"),  # where no file ends
    (lambda sent: sent[:100_000], "Compressed file ended"), (lambda sent: b"<html>proxy</html>", "Not a gzipped file"),
    (lambda sent: b"", ""),
])  # fmt: skip
def test_an_archive_that_comes_damaged_is_refused_in_one_line(tmp_path, monkeypatch, spoil, reason):
    sent = woof(tmp_path, spoil)
    monkeypatch.setattr(
        datasets, "download_url", lambda url, root: (Path(root) / url.rsplit("/", 1)[1]).write_bytes(sent)
    )
    config = resolve(["--data-path", str(tmp_path / "data"), "--dataset", "imagewoof-160px", "--download"])
    with pytest.raises(ConfigError, match=rf"imagewoof-160px cannot be fetched into .*{reason}"):
        download(config)
    assert os.listdir(tmp_path / "data") in ([], ["imagewoof2-160.lock"])


def test_a_whole_archive_is_unpacked_and_what_a_killed_download_left_goes(tmp_path, monkeypatch):
    sent = woof(tmp_path, lambda sent: sent)
    monkeypatch.setattr(
        datasets, "download_url", lambda url, root: (Path(root) / url.rsplit("/", 1)[1]).write_bytes(sent)
    )
    for name in (".download-old", ".download-new"):
        (tmp_path / "data" / name).mkdir(parents=True)
    os.utime(tmp_path / "data" / ".download-old", (1, 1))
    download(resolve(["--data-path", str(tmp_path / "data"), "--dataset", "imagewoof-160px", "--download"]))
    assert os.listdir(tmp_path / "data" / "imagewoof2-160" / "train") == ["a.jpg"]
    assert {name for name in os.listdir(tmp_path / "data") if name.startswith(".download")} == {".download-new"}


# ---- faults of the disk ----


def failing(monkeypatch, number, times, path):
    """Have reading of an image end in an error of the system, so many times."""
    left, opened = [times], images.verify.Image.open

    def fail(name, *rest):
        if str(name) == str(path) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(name))
        return opened(name, *rest)

    monkeypatch.setattr(images.verify.Image, "open", fail)


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.EMFILE, "Too many open files; allow more open files"), (errno.EIO, "Input/output error; its disk fails"),
    (errno.ESTALE, "connect its disk again"), (errno.ETIMEDOUT, "see to the disk"),
])  # fmt: skip
def test_a_fault_of_the_machine_is_not_told_as_one_of_the_image(tmp_path, monkeypatch, number, remedy):
    tree = ImageTree(str(make_tree(tmp_path / "images") / "train"))
    failing(monkeypatch, number, 1, tree.samples[3][0])
    with pytest.raises(RunError, match=re.escape(tree.samples[3][0]) + ".*" + remedy):
        tree[3]
    assert tree[3][1] == 0
    failing(monkeypatch, errno.EACCES, 2, tree.samples[3][0])
    with pytest.raises(ConfigError, match="cannot be read as an image: Permission denied"):
        tree[3]


def test_skip_leaves_no_image_out_for_a_fault_that_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(images.workers, "processes_for", lambda number: 0)  # here, where the fault is made
    root = make_tree(tmp_path / "images") / "train"
    one = root / "ant" / "3.png"
    failing(monkeypatch, errno.EIO, 1, one)
    assert ImageTree(str(root), skip=True).skipped == []
    failing(monkeypatch, errno.EIO, 2, one)
    assert ImageTree(str(root), skip=True).skipped == []  # as found, it is kept; a look anew:
    os.utime(one, (1, 1))
    failing(monkeypatch, errno.EIO, 2, one)
    assert [path for path, _ in ImageTree(str(root), skip=True).skipped] == [str(one)]


def test_a_list_that_leaves_a_class_without_images_is_refused(tmp_path):
    tree = make_tree(tmp_path / "images")
    (tmp_path / "some.txt").write_bytes(b"\xef\xbb\xbfant/0.png\r\n./ant/1.png\r\n")  # of Windows
    flags = ["--data-path", str(tree), "--train-list", str(tmp_path / "some.txt")]
    with pytest.raises(ConfigError, match=r"some\.txt lists no image of 1 of 2 classes, such as bee; add some"):
        load_data(resolve(flags), Runtime(device=torch.device("cpu")))
    with open(tmp_path / "some.txt", "a") as file:
        file.write("bee/3.png\n")
    assert len(load_data(resolve(flags), Runtime(device=torch.device("cpu"))).train) == 3


def test_a_class_whose_images_are_all_bad_is_an_error(dirty):
    for path in (dirty / "train" / "bee").iterdir():
        path.unlink()
        path.write_bytes(b"no")
    with pytest.raises(
        ConfigError, match=r"train: no image of class bee can be read; of those left out the first is /.*: "
    ):
        ImageTree(str(dirty / "train"), skip=True)


def test_a_list_of_images_decides_what_is_looked_at(dirty, tmp_path):
    listed = tmp_path / "listed.txt"
    listed.write_text("ant/1.png\nant/2.png\n")  # none of class bee, as one may wish
    assert len(ImageTree(str(dirty / "train"), only=str(listed))) == 2
    listed.write_text("ant/1.png\nant/5.png\nbee/pipe.jpg\nbee/1.png\n")
    with pytest.raises(ConfigError, match=r"bee/pipe\.jpg cannot be read as an image: it is a FIFO"):
        ImageTree(str(dirty / "train"), only=str(listed))
    images = ImageTree(str(dirty / "train"), only=str(listed), skip=True)
    assert len(images) == 2 and {os.path.basename(path) for path, _ in images.skipped} == {"5.png", "pipe.jpg"}
    listed.write_text("ant/1.png\nbee/pipe.jpg\n")
    with pytest.raises(ConfigError, match="no image of class bee can be read"):
        ImageTree(str(dirty / "train"), only=str(listed), skip=True)


def test_one_folder_for_training_and_validation_is_a_warning(tree, tmp_path, capsys):
    load_data(resolve(["--data-path", str(tree)]), CPU)
    assert capsys.readouterr().out == ""
    load_data(resolve(["--data-path", str(tree), "--train-split", "val"]), CPU)
    told = capsys.readouterr().out
    assert told.startswith("warning: 10 of 10 validation images are training images too, ") and told.count("\n") == 1
    for name, lines in (("a", "ant/0.png\nbee/0.png\n"), ("b", "ant/1.png\nbee/1.png\n")):
        (tmp_path / name).write_text(lines)
    lists = ["--train-list", str(tmp_path / "a"), "--val-list", str(tmp_path / "b")]
    load_data(resolve(["--data-path", str(tree), "--train-split", "val", *lists]), CPU)
    assert capsys.readouterr().out == ""  # one folder, two lists: none is in both


def test_missing_images_are_told_before_weights_are_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "read_weights", lambda *args: pytest.fail("fetched"))
    flags = ["--data-path", str(tmp_path), "--weights", "DEFAULT", "--output-dir", str(tmp_path / "run")]
    assert train.run([*flags, "--model", "resnet18", "--clearml", "off"]) == 2
    assert capsys.readouterr().err.startswith(f"error: no folder {tmp_path}/train; ")
    assert train.run([*flags, "--dataset", "imagewoof", "--clearml", "off"]) == 2
    assert "holds no imagewoof2; --download fetches it" in capsys.readouterr().err


def test_a_missing_folder_is_named_with_what_leads_to_it(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),))
    config = resolve(["--data-path", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"no folder .*val; data_path and the names of its splits"):
        load_data(config, CPU)


def test_splits_with_different_classes_are_refused_and_the_odd_ones_named(tmp_path):
    make_tree(tmp_path, splits=(("train", 1),), classes=("ant", "bee"))
    make_tree(tmp_path, splits=(("val", 1),), classes=("bee", "wasp"))
    with pytest.raises(ConfigError, match=r"train and .*val must hold the same class folders; only one has ant, wasp"):
        load_data(resolve(["--data-path", str(tmp_path)]), CPU)


def test_data_tells_what_it_holds(tree):
    whole = load_data(resolve(["--data-path", str(tree)]), CPU)
    assert str(whole) == "24 training and 10 validation images of 2 classes"
    assert whole.classes == ["ant", "bee"]


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"GIF89a, or so it says",
    lambda whole: bytes(20) + whole[20:],
], ids=["cut off", "empty", "other content", "overwritten"])  # fmt: skip
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_damaged_image_is_named(tmp_path, ending, damage):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tree = folder_with(tmp_path, Image.fromarray(pixels), f"broken.{ending}")
    path = tmp_path / "a" / f"broken.{ending}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=rf"a.broken\.{ending} cannot be read as an image"):
        tree[0]


def test_an_image_file_that_claims_to_be_huge_is_named(tmp_path):
    tree = folder_with(tmp_path, Image.new("RGB", (4, 4)), "huge.bmp")
    path = tmp_path / "a" / "huge.bmp"
    whole = bytearray(path.read_bytes())
    whole[18:26] = (60_000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"huge\.bmp cannot be read as an image"):
        tree[0]


# ---- the kept list of an imagefolder ----


@pytest.fixture
def kept(tree, monkeypatch):
    """The training folder of a tree with its list kept, its folders last changed an hour ago."""
    root = tree / "train"
    in_an_hour = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(listing.time, "time_ns", lambda: in_an_hour)
    return root, ImageTree(str(root), keep_list=True)


def forbid_listing(monkeypatch):
    def scan(*args):
        raise AssertionError("listed anew")

    monkeypatch.setattr(datasets, "scan", scan)


def test_the_kept_list_is_read_the_next_time(kept, monkeypatch):
    root, first = kept
    forbid_listing(monkeypatch)
    second = ImageTree(str(root), keep_list=True)
    assert list(second.samples) == list(first.samples) and second.classes == first.classes and len(second) == 24
    with pytest.raises(AssertionError, match="listed anew"):
        ImageTree(str(root))  # unless it is not asked for


@pytest.mark.parametrize("change", ["file added", "file removed", "class added", "list damaged"])
def test_the_list_is_made_anew_after_a_change(kept, change):
    root, first = kept
    expected = {"file added": 25, "file removed": 23, "class added": 25, "list damaged": 24}[change]
    if change == "file added":
        Image.new("RGB", (4, 4)).save(root / "bee" / "new.png")
    elif change == "file removed":
        (root / "bee" / "3.png").unlink()
    elif change == "class added":
        (root / "cat").mkdir()
        Image.new("RGB", (4, 4)).save(root / "cat" / "new.png")
    else:
        with open(listing.list_path(str(root)), "w") as file:
            file.write('{"folders": ["ant"')
    again = ImageTree(str(root), keep_list=True)
    assert len(again) == expected
    assert (list(again.samples) == list(first.samples)) == (change == "list damaged")
    assert ImageTree(str(root), keep_list=True).samples[-1] == again.samples[-1]


def test_a_new_file_in_a_linked_class_folder_is_seen(tree, tmp_path, monkeypatch, kept):
    (tree / "train" / "bee").rename(tmp_path / "bees")
    (tree / "train" / "bee").symlink_to(tmp_path / "bees")
    assert len(ImageTree(str(tree / "train"), keep_list=True)) == 24
    Image.new("RGB", (4, 4)).save(tmp_path / "bees" / "new.png")
    assert len(ImageTree(str(tree / "train"), keep_list=True)) == 25
    forbid_listing(monkeypatch)
    assert len(ImageTree(str(tree / "train"), keep_list=True)) == 25


def test_a_file_added_while_the_folder_is_listed_is_seen_the_next_time(tree, monkeypatch):
    """Also if the disk's clock gives both changes of the folder the same time: so near to one, nothing is kept."""
    walk = listing.walk

    def slow(root, name, *rest):
        yield from walk(root, name, *rest)
        Image.new("RGB", (4, 4)).save(os.path.join(root, name, "late.png"))
        os.utime(os.path.join(root, name), ns=(1, 1))

    monkeypatch.setattr(listing, "walk", slow)
    assert len(ImageTree(str(tree / "train"), keep_list=True)) == 24
    monkeypatch.setattr(listing, "walk", walk)
    assert len(ImageTree(str(tree / "train"), keep_list=True)) == 26
    assert not os.path.exists(listing.list_path(str(tree / "train")))


def test_two_folders_keep_two_lists(kept, tree):
    other = ImageTree(str(tree / "val"), keep_list=True)
    assert len(other) == 10 and len(ImageTree(str(tree / "train"), keep_list=True)) == 24
    assert len(os.listdir(os.path.dirname(listing.list_path(str(tree))))) == 2


# ---- digits ----


def test_digits():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    assert train.classes == val.classes == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert sorted({train[i][1] for i in range(1437)}) == list(range(10))
    counts = np.bincount([val[i][1] for i in range(360)])
    assert counts.min() >= 35 and counts.max() <= 37  # stratified
    image, _ = train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    values = np.stack([np.asarray(train[i][0]) for i in range(200)])
    assert (values.min(), values.max()) == (0, 240)  # white would be solarized at any strength
    assert (values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all()


def test_digits_of_training_and_validation_are_the_same_every_time_and_no_digit_is_in_both():
    whole = [Digits(train=True), Digits(train=False), Digits(train=False)]
    train, val, again = (
        [(image.tobytes(), target) for image, target in map(d.__getitem__, range(len(d)))] for d in whole
    )
    assert val == again
    assert len(train) + len(val) == 1797
    assert len(set(train) & set(val)) <= 2  # a few digits of 8 x 8 pixels may be alike
