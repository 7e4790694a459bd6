"""A look at a data set before a long run."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from runs import make_tree

from images import check
from settings.errors import RunError


@pytest.fixture
def clean(tmp_path):
    return make_tree(tmp_path / "images", splits=(("train", 3), ("val", 2)))


def test_a_sound_data_set_is_told_so(clean, capsys):
    assert check.main([str(clean)]) == 0
    assert capsys.readouterr().out == "train 6 in 2 classes, val 4 in 2 classes: nothing found\n"
    assert check.main([str(clean / "train")]) == 0  # the class folders alone
    assert capsys.readouterr().out == "train 6 in 2 classes: nothing found\n"


def test_a_split_that_is_not_there_is_not_passed_over(clean, capsys):
    for flags, message in (
        (["--val-split", "valdiation"], f"--val-split valdiation: no such folder in {clean}; give the name"),
        (["--train-split", "trian", "--val-split", "val"], f"--train-split trian: no such folder in {clean}"),
    ):
        assert check.main([str(clean), *flags]) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(clean / "val")
    assert check.main([str(clean)]) == 0
    assert capsys.readouterr().out == (
        f"only train was looked at: {clean} has no other split of the names given\ntrain 6 in 2 classes: nothing found\n"
    )


def test_what_people_do_not_see_and_what_training_does_not(clean, capsys):
    train = clean / "train"
    for folder, copy in ((".ipynb_checkpoints", "0-checkpoint.png"), ("@eaDir", "0.png")):
        (train / "ant" / folder).mkdir()
        Image.fromarray(np.random.default_rng(len(folder)).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            train / "ant" / folder / copy
        )
    (train / "bee" / "photo.HEIC").touch()
    (train / "bee" / "notes.txt").touch()
    (clean / "other").mkdir()
    (clean / "other" / "linked.gif").touch()
    (train / "bee" / "more").symlink_to(clean / "other")
    assert check.main([str(clean / "train")]) == 1
    assert (
        capsys.readouterr().out
        == f"""\
train: hidden, or made by a program, and taken for images: 2
  {train}/ant/.ipynb_checkpoints/0-checkpoint.png
  {train}/ant/@eaDir/0.png
train: pictures of a kind that is left out: 2
  {train}/bee/photo.HEIC
  {train}/bee/more/linked.gif
train 8 in 2 classes: 4 findings
"""
    )


def test_everything_is_found_and_counted(clean, capsys, monkeypatch):
    monkeypatch.setattr(check, "HUGE", 70 * 60 - 1)
    draw = np.random.default_rng(1)
    train, val = clean / "train", clean / "val"
    (train / "ant" / "0.png").write_bytes(b"no image")
    os.mkfifo(train / "ant" / "pipe.jpg")
    Image.fromarray(draw.integers(0, 256, (60, 70, 3), dtype=np.uint8)).save(train / "ant" / "huge.png")
    Image.fromarray(draw.integers(0, 256, (40, 31, 3), dtype=np.uint8)).save(val / "bee" / "tiny.png")
    shutil.copy(train / "ant" / "1.png", train / "bee" / "same.png")
    shutil.copy(train / "bee" / "2.png", val / "bee" / "two\nlines.png")
    (train / "cat").mkdir()
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(train / "cat" / "only.png")
    assert check.main([str(clean)]) == 1
    assert (
        capsys.readouterr().out
        == f"""\
train: cannot be read: 2
  {train}/ant/pipe.jpg: it is a FIFO, not a file
  {train}/ant/0.png: it is no image of a known format
train: huge, above 4,199 px: 1
  {train}/ant/huge.png: 70x60
train: classes of a single image, or none that can be read: 1
  cat
train: one image in two classes: 1
  {train}/ant/1.png = {train}/bee/same.png
val: tiny, a side below 32 px: 1
  {val}/bee/tiny.png: 31x40
classes that only one of train and val has: 1
  cat
equal files in train and val: 1
  {train}/bee/2.png = {val}/bee/two\\nlines.png
train 9 in 3 classes, val 6 in 2 classes: 8 findings
"""
    )


def test_long_lists_are_cut_unless_asked_for(tmp_path, capsys):
    tree = make_tree(tmp_path / "images", splits=(("train", 12),), size=(8, 8))
    assert check.main([str(tree)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[1] == "train: tiny, a side below 32 px: 24" and told[-2] == "  and 4 more (--all lists them)"
    assert check.main([str(tree), "--all"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 27


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_what_is_no_data_set_is_one_line(tmp_path, capsys, make):
    make(tmp_path / "data")
    assert check.main([str(tmp_path / "data")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1


def test_a_look_that_was_cut_off_is_no_finding(clean, monkeypatch, capsys):
    def killed(*args, **kwargs):
        raise RunError("worker 7 was killed; where no one did that, memory has run out: lower --workers")
        yield

    monkeypatch.setattr(check, "inspect", killed)
    assert check.main([str(clean)]) == 3
    assert capsys.readouterr().err.startswith("error: worker 7 was killed")
