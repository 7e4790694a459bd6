"""predict.py: what it says of images, what it does with damaged ones, and how it ends.

The runs are folders that were written here, with weights of which the answers are known.
"""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise, plain_colour
from programs import ROOT, environment
from runs import start, write_run
from torchvision import models
from torchvision import transforms as v1

from augment.pixels import IMAGENET_MEAN, IMAGENET_STD
from inference import program
from inference.gradcam import GradCam, last_feature_map
from inference.inputs import below, names_of, names_on
from inference.options import read_options
from inference.predictions import Prediction, check_size, predict
from inference.rows import opened
from inference.sorting import Sorter, folder_names, give_name, names_like
from inference.trained import open_run
from learning.models import build_model
from predict import run
from reporting.folder import RunFolder
from settings.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two classes: 0.75 and 0.25."""
    return write_run(tmp_path_factory.mktemp("runs") / "two", ["ant", "bee"])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run whose answers depend on the image, and its model."""
    torch.manual_seed(3)
    model = models.mobilenet_v3_small(num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # an average
    with torch.no_grad():
        for size in (32, 64, 64):  # or all that is left of an image behind so many random layers is 0
            model(torch.randn(8, 3, size, size))
        # So that no class is the answer to all images of make_images, whatever the version of torch draws
        colours = torch.tensor([colour(number) for number in range(6)]) / 255 - torch.tensor(IMAGENET_MEAN)
        plain = (colours / torch.tensor(IMAGENET_STD))[:, :, None, None].expand(-1, -1, 32, 32)
        model.classifier[-1].bias -= model.eval()(plain).mean(0)
    folder = write_run(tmp_path_factory.mktemp("runs") / "real", ["a", "b", "c"], "--model", "mobilenet_v3_small", model=model)  # fmt: skip
    return folder, model.eval()


def colour(number):
    return 40 * number % 256, 80, 200


def make_images(folder, names):
    for number, name in enumerate(names):
        os.makedirs(os.path.dirname(folder / name), exist_ok=True)
        plain_colour(colour(number), (50, 40)).save(folder / name)
    return folder


def call(*words):
    return run([*map(str, words), "--device", "cpu", "--workers", "0"])


def table(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


# ---- what it says ----


def test_rows_by_hand(two, tmp_path, capfd):
    images = make_images(tmp_path, ["b/2.png", "b/10.PNG", "a.jpg", "b/notes.txt.png/1.png"])
    (images / "notes.txt").write_text("no image, and not called one")
    assert call(two, images) == 0
    told = capfd.readouterr()
    assert told.out == "image,class_1,probability_1,class_2,probability_2,error\n" + "".join(
        f"{images}/{name},ant,0.75,bee,0.25,\n" for name in ("a.jpg", "b/10.PNG", "b/2.png", "b/notes.txt.png/1.png")
    )
    assert told.err.splitlines()[0] == (
        f"{two}: efficientnet_v2_tiny, best weights, of a run that is not finished; 2 classes, 32 px"
    )
    assert told.err.splitlines()[1].startswith("4 images in ")


def test_the_temperature_of_the_run_is_used(two, tmp_path, capfd):
    hot = tmp_path / "run"
    shutil.copytree(two, hot)
    (hot / "summary.json").write_text(json.dumps({"calibration": {"temperature": 2.0}}))
    image = make_images(tmp_path, ["a.png"]) / "a.png"
    assert call(hot, image, "--format", "jsonl", "--top", 1) == 0
    # sqrt(3) : 1
    assert json.loads(capfd.readouterr().out) == {
        "image": str(image), "predictions": [{"class": "ant", "probability": 0.633975}],
    }  # fmt: skip


@pytest.mark.parametrize(("flags", "resize", "crop"), [([], 40, 32), (["--image-size", "64"], 80, 64)])
def test_answers_are_those_of_plain_torchvision(real, tmp_path, capfd, flags, resize, crop):
    folder, model = real
    pictures = [noise(90, 60), noise(33, 70).convert("L"), noise(50, 50).convert("RGBA"), plain_colour((9, 200, 30))]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    assert call(folder, *sorted(tmp_path.glob("*.png")), "--format", "jsonl", *flags) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    normalise = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    prepare = v1.Compose([v1.Resize(resize), v1.CenterCrop(crop), v1.ToTensor(), normalise])
    for row, picture in zip(rows, pictures, strict=True):
        with torch.inference_mode():
            wanted = model(prepare(picture.convert("RGB"))[None])[0].softmax(0)
        found = {entry["class"]: entry["probability"] for entry in row["predictions"]}
        assert [found[name] for name in "abc"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len({row["predictions"][0]["probability"] for row in rows}) == 4


def test_of_its_validation_images_it_says_what_the_run_s_own_evaluation_said(images, tmp_path, capfd):
    assert start(images, tmp_path / "run", *"--epochs 5 --lr 0.1 --val-resize-size 40 --decode-cache off".split()) == 0
    capfd.readouterr()
    assert call(tmp_path / "run", images / "val", "--top", 1) == 0
    confusion = np.zeros((2, 2), int)
    for row in table(capfd.readouterr().out):
        true = ["ant", "bee"].index(os.path.basename(os.path.dirname(row["image"])))
        confusion[true, ["ant", "bee"].index(row["class_1"])] += 1
    assert (
        confusion.sum() == 10
        and confusion.sum(0).all()
        and np.array_equal(confusion, RunFolder(str(tmp_path / "run")).confusion("best")[1])
    )


def test_names_of_any_bytes(two, tmp_path, capfd):
    images = make_images(tmp_path / "images", ['comma, "quote".png', "two\nlines.png", "re\rturn.png"])
    shutil.copy(images / "re\rturn.png", os.fsencode(images) + b"/caf\xe9.png")
    assert call(two, images) == 0
    text = capfd.readouterr().out
    assert call(two, images, "--format", "jsonl", "--output", tmp_path / "rows") == 0
    wanted = [path for path, _ in below(str(images))]
    assert len(wanted) == 4 and any("caf\udce9" in path for path in wanted)
    assert [json.loads(line)["image"] for line in (tmp_path / "rows").read_text().splitlines()] == wanted
    assert call(two, images, "--output", tmp_path / "table") == 0
    with open(tmp_path / "table", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == wanted
    assert text.count("ant") == 4


# ---- damaged images ----


def make_damage(folder):
    """Every kind of file that is none of an image, in the order of their names."""
    make_images(folder, ["good.png", "z/good.png", "folder.jpg/inside.png"])
    noise(64, 64).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "nothing.gif.png").symlink_to(folder / "gone")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "none.pgm").write_bytes(b"P5 0 7 255\n")
    os.mkfifo(folder / "pipe.png")
    (folder / "z" / "circle").symlink_to(folder)
    return folder


def bomb():
    """A PNG that says it is of 20,000 x 20,000 pixels."""
    file = io.BytesIO()
    plain_colour((1, 2, 3), (1, 1)).save(file, "PNG")
    head = bytearray(file.getvalue())
    head[16:24] = (20_000).to_bytes(4, "big") * 2
    head[29:33] = __import__("zlib").crc32(head[12:29]).to_bytes(4, "big")
    return bytes(head)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_are_rows(two, tmp_path, capfd, workers):
    folder = make_damage(tmp_path)
    assert run([str(two), str(folder), "--device", "cpu", "--workers", str(workers), "--batch-size", "3"]) == 1
    told = capfd.readouterr()
    rows = {os.path.relpath(row["image"], folder): row for row in table(told.out)}
    assert list(rows) == [
        "bomb.png", "cut.jpg", "empty.png", "good.png", "itself.png", "none.pgm", "nothing.gif.png", "pipe.png",
        "script.png", "text.png", "folder.jpg/inside.png", "z/good.png", "z/circle",
    ]  # fmt: skip
    assert {name for name, row in rows.items() if not row["error"]} == {
        "good.png",
        "folder.jpg/inside.png",
        "z/good.png",
    }
    for name, fault in {
        "bomb.png": "exceeds limit", "cut.jpg": "truncated", "empty.png": "no image", "text.png": "no image",
        "itself.png": "Too many levels", "nothing.gif.png": "No such file", "pipe.png": "it is a FIFO",
        "script.png": "PostScript", "z/circle": "it is a link to a folder that it lies in",
    }.items():  # fmt: skip
        assert fault in rows[name]["error"] and rows[name]["class_1"] == "", name
    assert told.err.splitlines()[1].startswith(f"error: 10 of 13 images could not be read, first {folder}/bomb.png: ")
    assert len(told.err.splitlines()) == 2


def test_where_no_image_can_be_read_the_status_is_2(two, tmp_path, capfd):
    (tmp_path / "text.jpg").write_text("no image")
    assert call(two, tmp_path / "text.jpg") == 2
    told = capfd.readouterr()
    assert [row["error"] for row in table(told.out)] == ["it is no image of a known format"]
    assert "error: 1 of 1 images could not be read" in told.err


def test_outputs_that_are_no_numbers_are_told(two, tmp_path, capfd, monkeypatch):
    opened = open_run(str(two), device="cpu")
    opened.model.classifier[-1].bias.data.fill_(math.nan)
    monkeypatch.setattr(program, "open_run", lambda *args, **kwargs: opened)
    assert call(two, make_images(tmp_path, ["a.png"]) / "a.png") == 2
    assert "the model's output is not finite" in capfd.readouterr().out


# ---- names as they come, memory ----


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_come_while_the_pipe_of_names_is_open(two, tmp_path, workers):
    images = make_images(tmp_path, [f"{i}.png" for i in range(5)])
    read, write = socket.socketpair()  # which can be ended though a worker has it, too
    names = names_of(["-"], b"\n", read.fileno())
    rows = iter(predict(open_run(str(two), device="cpu"), names, top=1, batch_size=4, workers=workers))

    def following():
        return [prediction.path for prediction in next(rows)]

    write.sendall(f"{images}/0.png\n{images}/1.png\n\n{images}".encode())
    assert following() == [f"{images}/0.png", f"{images}/1.png"]  # the third is not whole yet
    write.sendall(b"/2.png\r\n")
    assert following() == [f"{images}/2.png"]
    write.sendall(f"{images}/3.png".encode())
    write.shutdown(socket.SHUT_WR)
    assert following() == [f"{images}/3.png"]
    assert next(rows, None) is None
    read.close()
    write.close()


def test_names_that_end_in_zero_bytes_and_names_that_are_none(tmp_path):
    for text, separator, wanted in (
        (b"a\nb\0c\r\0", b"\0", ["a\nb", "c\r"]),
        (b"\n\na", b"\n", ["a"]),
        (
            b"\xef\xbb\xbfa\r\n\xef\xbb\xbfb\r\n",
            b"\n",
            ["a", "\ufeffb"],
        ),  # of Windows: the first mark is none of a name
        (b"\xef\xbb\xbfa\0", b"\0", ["\ufeffa"]),
        (b"", b"\n", []),
    ):
        (tmp_path / "names").write_bytes(text)
        with open(tmp_path / "names", "rb") as file:
            assert list(names_on(file.fileno(), separator)) == wanted
    (tmp_path / "names").write_bytes(b"x" * 200_000)
    with open(tmp_path / "names", "rb") as file, pytest.raises(ConfigError, match="no list of names"):
        list(names_on(file.fileno(), b"\n"))
    (tmp_path / "names").write_bytes(b"a.png\0b.png\0")
    with open(tmp_path / "names", "rb") as file, pytest.raises(ConfigError, match=r"zero bytes; .* add --null \(-0\)"):
        list(names_on(file.fileno(), b"\n"))


@pytest.mark.parametrize("workers", [0, 2])
def test_few_images_are_under_way_at_once(two, tmp_path, workers):
    """Of names without end."""
    image = str(make_images(tmp_path, ["a.png"]) / "a.png")
    predicting = predict(
        open_run(str(two), device="cpu"), ((image, "") for _ in count()), top=1, batch_size=4, workers=workers
    )
    rows, most = 0, 0
    for predictions in islice(predicting, 40):
        most = max(most, predicting.batches.under_way)
        rows += len(predictions)
    assert rows >= 120 and predicting.total is None
    assert most <= 4 * (2 * workers + 1)  # two batches a worker, and that which is predicted


# ---- where it goes ----


def test_a_file_of_rows_is_whole_or_not_there(two, tmp_path, capfd, monkeypatch):
    images, file = make_images(tmp_path / "images", ["a.png", "b.png", "c.png"]), tmp_path / "rows.csv"
    add = program.Tally.add

    def interrupt(tally, prediction):
        add(tally, prediction)
        if tally.count == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(program.Tally, "add", interrupt)
        assert call(two, images, "--output", file) == 3
        (beside,) = tmp_path.glob("rows.csv.*.tmp")
        assert capfd.readouterr().err.endswith(f"stopped: signal SIGINT; the rows written so far lie in {beside}\n")
        assert len(table(beside.read_text())) == 2
        beside.unlink()
        assert call(two, images) == 3
        told = capfd.readouterr()
        assert told.err.endswith("stopped: signal SIGINT; the rows written so far are whole\n")
        assert len(table(told.out)) == 2
    assert call(two, images, "--output", file) == 0
    assert len(table(file.read_text())) == 3 and capfd.readouterr().out == ""
    before = file.read_bytes()
    assert call(two, images / "a.png", "--output", file) == 2
    assert f"--output {file} is there already" in capfd.readouterr().err and file.read_bytes() == before
    assert call(two, images / "a.png", "--output", file, "--overwrite") == 0
    assert len(table(file.read_text())) == 1
    assert sorted(os.listdir(tmp_path)) == ["images", "rows.csv"]


def test_rows_stay_where_something_else_ends_the_program(two, tmp_path, capfd, monkeypatch):
    images, file = make_images(tmp_path / "images", ["a.png", "b.png", "c.png"]), tmp_path / "rows.csv"

    def full(sorter, prediction, number):
        if number == 3:
            raise OSError(28, "No space left on device", "sorted/ant/c.png")

    monkeypatch.setattr(program.Sorter, "put", full)
    assert call(two, images, "--output", file, "--sort", tmp_path / "sorted") == 1
    (beside,) = tmp_path.glob("rows.csv.*.tmp")
    assert capfd.readouterr().err.splitlines()[1:] == [
        f"the rows written so far lie in {beside}", "error: sorted/ant/c.png: No space left on device",
    ]  # fmt: skip
    assert [row["image"] for row in table(beside.read_text())] == [str(images / f"{name}.png") for name in "abc"]


def test_of_rows_that_cannot_be_written_nothing_stays(tmp_path):
    """The system ends files at 100 bytes here; rows are told of at the row that finds no room."""
    code = (
        "import resource, signal, sys\nfrom inference.rows import opened\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "with opened(sys.argv[1], parts='the rows') as output:\n    for _ in range(9):\n        output.write('x' * 39 + chr(10))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "RunError" in done.stderr and "allow larger files there" in done.stderr and "lie in" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_gallery_that_is_interrupted_leaves_nothing_and_the_rows_are_whole(two, tmp_path, capfd, monkeypatch):
    images, file = make_images(tmp_path / "images", ["a.png", "b.png"]), tmp_path / "rows.csv"

    def interrupted(gallery):
        yield from ()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(program.Gallery, "cards", interrupted)
    assert call(two, images, "--output", file, "--gallery", tmp_path / "page.html") == 3
    assert capfd.readouterr().err.endswith("stopped: signal SIGINT\n")
    assert sorted(os.listdir(tmp_path)) == ["images", "rows.csv"] and len(table(file.read_text())) == 2


def test_two_that_write_the_same_file_leave_each_whole(tmp_path):
    path = tmp_path / "rows.csv"
    (tmp_path / "rows.csv.tmp").write_text("someone's own")
    message = r"rows\.csv has come meanwhile, and stays; what was written lies in "
    with pytest.raises(RunError, match=message) as refused, opened(str(path)) as first:
        first.write("first\n")
        with opened(str(path)) as second:
            second.write("second\n" * 9)
        first.write("to its end\n")
    assert path.read_text() == "second\n" * 9
    assert Path(str(refused.value).rsplit(" ", 1)[1]).read_text() == "first\nto its end\n"
    with opened(str(path), overwrite=True) as third:
        third.write("third\n")
    assert path.read_text() == "third\n" and (tmp_path / "rows.csv.tmp").read_text() == "someone's own"


def test_places_that_cannot_be_written_to_are_told_at_the_start(two, tmp_path, capfd, monkeypatch):
    images = make_images(tmp_path / "images", ["a.png"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    for flag in ("--output", "--gallery", "--sort"):
        assert run([str(two), str(images), flag, str(tmp_path / "new"), "--device", "cpu"]) == 2
        told = one_line(capfd)
        assert flag in told and re.search("(cannot|can) be written to", told)


@pytest.mark.parametrize("by", ["copy", "link"])
def test_sorted_into_folders(real, tmp_path, capfd, by):
    folder, _ = real
    images = make_images(tmp_path / "images", [f"{name}/{i}.png" for i in range(3) for name in ("x", "y")])
    (images / "x" / "9.png").write_text("no image")
    assert call(folder, images, "--sort", tmp_path / "sorted", "--sort-by", by) == 1
    rows = table(capfd.readouterr().out)
    assert len(rows) == 7 == len(list(images.rglob("*.png")))
    found = [path for path in (tmp_path / "sorted").rglob("*") if not path.is_dir()]
    assert len({path.parent for path in found}) > 1
    wanted = sorted((row["class_1"], (images / row["image"]).read_bytes()) for row in rows if not row["error"])
    assert sorted((path.parent.name, path.read_bytes()) for path in found) == wanted
    assert all(path.is_symlink() == (by == "link") for path in found)


def test_images_of_one_name_and_class_are_kept_apart(two, tmp_path, capfd):
    images = make_images(tmp_path / "images", ["x/0.png", "y/0.png", "z/0.png"])
    assert call(two, images, "--sort", tmp_path / "sorted") == 0
    assert sorted(os.listdir(tmp_path / "sorted" / "ant")) == ["0-2.png", "0-3.png", "0.png"]
    assert len({path.read_bytes() for path in (tmp_path / "sorted").rglob("*.png")}) == 3


def test_two_programs_that_fill_one_folder_lose_no_image(two, tmp_path):
    folders = [make_images(tmp_path / name, ["x.png"]) for name in ("one", "other")]
    sorters = [Sorter(str(tmp_path / "sorted"), ["ant", "bee"], "copy") for _ in folders]
    predictions = [Prediction(str(folder / "x.png"), classes=(0,), probabilities=(1.0,)) for folder in folders]
    place = tmp_path / "sorted" / "ant"
    place.mkdir(parents=True)
    with sorters[0].whole(predictions[0].path, str(place), 1) as copy:  # as far as one is when the other begins
        assert sorters[1].put(predictions[1], 1)
        with pytest.raises(FileExistsError):
            give_name(copy, str(place / "x.png"), link=False)
    assert sorters[0].put(predictions[0], 1)
    assert sorted(os.listdir(place)) == ["x-1.png", "x.png"]
    assert (place / "x.png").read_bytes() == (folders[1] / "x.png").read_bytes()
    assert (place / "x-1.png").read_bytes() == (folders[0] / "x.png").read_bytes()


def test_where_a_file_has_one_name_only_images_are_sorted_all_the_same(two, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    images = make_images(tmp_path / "images", ["x/0.png", "y/0.png"])
    assert call(two, images, "--sort", tmp_path / "sorted") == 0
    assert sorted(os.listdir(tmp_path / "sorted" / "ant")) == ["0-2.png", "0.png"]


def test_names_as_long_as_a_file_system_takes_them_are_cut(two, tmp_path, capfd):
    assert (
        list(islice(names_like("x." + "j" * 252, 12345), 2))[1] == "-12345." + "j" * 248
    )  # all but a letter is ending
    name = "é" * 125 + ".png"  # 254 bytes of at most 255
    images = make_images(tmp_path / "images", [f"x/{name}", f"y/{name}"])
    assert call(two, images, "--sort", tmp_path / "sorted") == 0
    assert sorted(os.listdir(tmp_path / "sorted" / "ant")) == sorted(["é" * 124 + "-2.png", name])


def test_an_image_that_goes_before_it_is_sorted_costs_itself_alone(two, tmp_path, capfd, monkeypatch):
    images = make_images(tmp_path / "images", ["0.png", "1.png"])
    copy = shutil.copy2

    def late(source, target):
        (images / "0.png").unlink(missing_ok=True)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copy2", late)
    assert call(two, images, "--sort", tmp_path / "sorted") == 1
    rows, told = capfd.readouterr()
    assert len(table(rows)) == 2 and "error: 1 of 2 images were gone before they were sorted, first" in told
    assert os.listdir(tmp_path / "sorted" / "ant") == ["1.png"]


def test_folders_are_named_as_any_system_takes_them():
    assert folder_names(["ant", "bee"]) == ["ant", "bee"]
    assert folder_names(["a/b", "..", "c:d"]) == ["a_b", "_", "c_d"]
    assert folder_names(["Ant", "ant", "b"]) == ["0 Ant", "1 ant", "2 b"]


# ---- the gallery ----


def test_the_gallery_shows_the_least_certain_first(real, tmp_path, capfd):
    folder, _ = real
    for i in range(12):
        noise(80, 50).point(lambda value, i=i: value * i // 12).save(tmp_path / f"<b>{i}.png")
    (tmp_path / "a.png").write_text("no image")
    page = tmp_path / "page.html"
    assert call(folder, tmp_path, "--gallery", page, "--gallery-size", 4) == 1
    rows = [row for row in table(capfd.readouterr().out) if not row["error"]]
    least = sorted(rows, key=lambda row: float(row["probability_1"]))[:4]
    text = page.read_text()
    shown = re.findall(r"<figcaption>([^<]*)</figcaption>", text)
    assert shown == [row["image"].replace("<", "&lt;").replace(">", "&gt;") for row in least]
    assert text.count("data:image/jpeg;base64,") == 4 and "<b>" not in text
    assert "http" not in text and "<script" not in text and len(text) < 100_000
    assert "1 could not be read" in text and "it is no image of a known format" in text
    assert [f"{100 * float(row['probability_1']):.1f} %" for row in least] == re.findall(
        r"<div class=pictures>.*?([\d.]+ %)", text, re.S
    )


def test_gradcam_in_the_gallery(real, tmp_path, capfd):
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    folder, _ = real
    make_images(tmp_path, ["a.png", "b.png"])
    page = tmp_path / "page.html"
    assert call(folder, tmp_path, "--gallery", page, "--gradcam", "--image-size", 64) == 0
    assert page.read_text().count("data:image/jpeg;base64,") == 4
    assert page.read_text().count("where the model saw") == 2


def test_gradcam_looks_where_the_class_is(tmp_path):
    """A model that answers by the mean of its last feature map's channels, of which each sees one colour."""
    pytest.importorskip("pytorch_grad_cam", exc_type=ImportError)
    opened = open_run(str(write_run(tmp_path, ["red", "blue"])), device="cpu", image_size=64)
    sees = torch.nn.Conv2d(3, 2, 1, bias=False)
    sees.weight.data = torch.tensor([[1.0, 0, -1], [-1.0, 0, 1]]).view(2, 3, 1, 1)
    body = torch.nn.Sequential(torch.nn.AvgPool2d(8), sees, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # fmt: skip
    opened = replace(opened, model=body.eval())
    picture = plain_colour((255, 0, 0), (64, 64))
    picture.paste((0, 0, 255), (32, 0, 64, 64))  # red on the left
    tensor = opened.transform(picture)
    red, blue = GradCam(opened).overlays([tensor, tensor], [0, 1])
    left, right = (slice(None), slice(0, 24)), (slice(None), slice(40, 64))
    # The map's colours go from blue to red, so that each has more red than the other where it saw its class.
    shares = [overlay.astype(float) / overlay.sum(2, keepdims=True) for overlay in (red, blue)]
    assert shares[0][left][..., 0].mean() > shares[1][left][..., 0].mean() + 0.1
    assert shares[1][right][..., 0].mean() > shares[0][right][..., 0].mean() + 0.1


@pytest.mark.parametrize(
    ("name", "layer"),
    [("resnet18", "layer4"), ("efficientnet_v2_b0", "features"), ("mobilenet_v3_small", "features"),
     ("densenet121", "features"), ("regnet_y_400mf", "trunk_output"), ("swin_t", "permute")],
)  # fmt: skip
def test_the_last_feature_map_is_found(two, name, layer):
    model = build_model(name, 2)[0].eval()
    opened = replace(open_run(str(two), device="cpu"), model=model, image_size=64)
    assert last_feature_map(opened) is model.get_submodule(layer)


def test_a_transformer_has_no_feature_map_and_one_size(two):
    model = models.VisionTransformer(
        image_size=96, patch_size=32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=2
    )
    opened = replace(open_run(str(two), device="cpu"), model=model.eval(), image_size=96)
    with pytest.raises(ConfigError, match=r"--gradcam: .* ends in no feature map at 96 px"):
        last_feature_map(opened)
    check_size(opened)
    with pytest.raises(ConfigError, match=r"--image-size 64: .* cannot take images of that size .*height"):
        check_size(replace(opened, image_size=64))


# ---- mistakes ----


def one_line(capfd):
    told = capfd.readouterr()
    assert told.out == "" and told.err.startswith("error: ") and told.err.count("\n") == 1, told
    return told.err


def test_standard_streams_that_are_closed(two, tmp_path, capfd, monkeypatch):
    images = make_images(tmp_path / "images", ["a.png"])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert call(two, images) == 2
        assert capfd.readouterr().err.endswith(
            "error: standard output is closed, where the rows would go; open it, or give --output FILE\n"
        )
    monkeypatch.setattr(sys, "stderr", None)
    assert call(two, images, "--output", tmp_path / "rows.csv") == 0
    assert len(table((tmp_path / "rows.csv").read_text())) == 1


def test_mistakes_are_one_line(two, tmp_path, capfd):
    images = make_images(tmp_path / "images", ["a.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "rows.csv")
    for words, message in [
        (["RUN"], "the following arguments are required: IMAGES"),
        ([tmp_path, images], "holds no run: it has no config.yaml"),
        ([two, tmp_path / "none.jpg"], "no file or folder"),
        ([two, tmp_path / "empty"], "no images in it or below"),
        ([two, images, "--top", "3"], "has 2 classes"),
        ([two, images, "--top", "0"], "must be a whole number from 1 to"),
        ([two, images, "--tpo", "1"], "unknown flag --tpo; did you mean --top?"),
        ([two, images, "--format", "xml"], "invalid choice: 'xml'"),
        ([two, images, "--image-size", "x"], "must be a whole number from 1 to 8192, got 'x'"),
        ([two, images, "--device", "cuda:77"], "device cuda:77"),
        ([two, images, "--weights", "last"], "is not there: it has model_best.pth alone"),
        ([two, images, "--gradcam"], "--gradcam has no effect without --gallery"),
        ([two, images, "--sort-by", "link"], "--sort-by has no effect without --sort"),
        ([two, images, "--null"], "--null has no effect without -"),
        ([two, "-", "-"], "give it once"),
        ([two, images, "--output", tmp_path / "none" / "x.csv"], "is in no folder that is there"),
        ([two, images, "--gallery", tmp_path, "--overwrite"], "is no file"),
        ([two, images, "--output", "/dev/null", "--overwrite"], "is no file"),
        ([two, images, "--output", tmp_path / "nowhere"], "is there already"),
        ([two, images / "a.png", "--output", images / "a.png", "--overwrite"], "is one of the images"),
        (
            [two, images / "a.png", "--gallery", tmp_path / "images" / ".." / "images" / "a.png", "--overwrite"],
            "is one of the images",
        ),
        ([two, images, "--sort", tmp_path / "full"], "new or empty"),
        ([two, images, "--sort", images / "sorted"], "lies in"),
        ([two, images, "--output", ""], "--output was given an empty name"),
        ([two, images, "--gallery", ""], "--gallery was given an empty name"),
        ([two, images, "--sort", ""], "--sort was given an empty name"),
    ]:
        assert run([*map(str, words), *([] if "--device" in words else ["--device", "cpu"])]) == 2, words
        assert message in one_line(capfd), words
    assert not (images / "sorted").exists()


def test_gradcam_without_its_package(two, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(two, tmp_path, "--gallery", tmp_path / "page.html", "--gradcam") == 2
    assert "--gradcam needs the package grad-cam" in one_line(capfd)


def test_no_names_at_all(two, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(program, "names_of", lambda *arguments: iter([]))
    assert call(two, "-", "--output", tmp_path / "rows.csv") == 2
    assert "no names came on standard input" in capfd.readouterr().err
    assert not os.listdir(tmp_path)


# ---- as a user starts it ----


@pytest.mark.parametrize("words", [["--help"], ["run"], ["run", "images", "--tpo", "3"]])
def test_help_and_mistakes_do_without_torch(words):
    code = (
        "import runpy, sys\ntry:\n    runpy.run_path('predict.py', run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'numpy', 'torchvision'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if words == ["--help"] else 2) and "Traceback" not in done.stderr
    assert "predict.py" in done.stdout if words == ["--help"] else done.stderr.startswith("error: ")


def test_names_through_a_pipe_then_ctrl_c(real, tmp_path):
    folder, _ = real
    image = make_images(tmp_path, ["a.png"]) / "a.png"
    command = [sys.executable, "predict.py", str(folder), "-", "--device", "cpu", "--workers", "1", "--top", "1"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes) as process:
        try:
            process.stdin.write(f"{image}\n".encode())
            process.stdin.flush()
            assert process.stdout.readline() == b"image,class_1,probability_1,error\n"
            assert process.stdout.readline().startswith(f"{image},".encode())
            os.killpg(process.pid, signal.SIGINT)  # workers get it too, as from a terminal
            assert process.wait(60) == 3
            assert process.stdout.read() == b""
            assert process.stderr.read().decode().splitlines()[1:] == [
                "stopped: signal SIGINT; the rows written so far are whole"
            ]
        finally:
            process.kill()


def test_a_pipe_that_is_closed_ends_it_silently(real, tmp_path):
    folder, _ = real
    images = make_images(tmp_path, [f"{i:03}.png" for i in range(300)])
    command = f"{sys.executable} predict.py {folder} {images} --device cpu --workers 0 --batch-size 4 --top 1 | head -n 2; echo ${{PIPESTATUS[0]}}"  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert len(done.stdout.splitlines()) == 3 and done.stdout.splitlines()[2] == "3"
    assert len(done.stderr.splitlines()) == 1  # of the run


def test_commands_in_the_docs_are_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where none of them has been run: what is there is not replaced
    pages = [ROOT / "README.md", ROOT / "predict.py", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    found = re.findall(r"^[^`#\n]*?python predict\.py ([^#|>\n]*)", text, re.M)
    assert len(found) >= 4
    for words in found:
        read_options(words.split())
