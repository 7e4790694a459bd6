"""Which checkpoint a run continues from, and under which settings."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT
from small_models import CPU, checkpoint_of

from images.datasets import load_data
from images.store import StoredImages
from images.store_place import with_store
from learning.checkpoint import Checkpoint, previous_checkpoint
from learning.models import build_model
from learning.resume import check_store, find_checkpoint, most_on_device
from settings.errors import ConfigError
from settings.resolve import resolve
from settings.table import BEFORE, DEFAULTS, LAUNCH, PLACE
from utils import Runtime


def settings(folder, *flags):
    flags = ["--model", "efficientnet_v2_tiny", "--output-dir", folder, "--epochs", "5", *flags]
    return resolve(list(map(str, flags)))


def whole_of(config, **state):
    """A checkpoint of the run that `config` describes, its weights those of its model."""
    torch.manual_seed(0)
    model, _ = build_model(config["model"], 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return replace(
        checkpoint_of(config=config, **state), model=dict(model.state_dict()), optimizer=optimizer.state_dict()
    )


def leave_checkpoint(folder, path=None, **state):
    whole_of(settings(folder).as_dict(), **state).save(str(path or folder / "checkpoint.pth"))


def find(config):
    return find_both(config)[1]


def find_both(config):
    """The settings too, which say what the run began with."""
    return find_checkpoint(config, CPU, own=os.path.join(config.output_dir, "checkpoint.pth"), num_epochs=config.epochs)


def test_a_setting_that_an_older_checkpoint_does_not_know_has_its_default(tmp_path, capsys):
    then = settings(tmp_path).as_dict()
    del then["hflip_prob"], then["random_erase"]
    whole_of(then, epoch=2).save(str(tmp_path / "checkpoint.pth"))
    (tmp_path / "config.yaml").touch()
    assert find(settings(tmp_path, "--resume", "auto")).state.epoch == 2
    with pytest.raises(ConfigError, match=r"has other settings \(hflip_prob 0\.5 -> 0\.25\)"):
        find(settings(tmp_path, "--resume", "auto", "--hflip-prob", "0.25"))


def test_a_run_that_was_moved_goes_on_where_it_lies_now(tmp_path, monkeypatch):
    """Also from inside its folder, which then is no output_dir that was given."""
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.yaml").write_text(f"epochs: 3\noutput_dir: {tmp_path}/run\n")
    monkeypatch.chdir(tmp_path / "copy")
    config = resolve(["--resume", "auto"])
    assert (config.epochs, config.output_dir) == (3, ".")


def test_a_checkpoint_of_another_version_is_one_line(tmp_path):
    content = checkpoint_of(2).to_dict()
    for damage in ({"optimiser": {}}, {"state": {"epoch": 1, "minute": 2}}):
        torch.save(content | damage, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match=r"other\.pth is of another version of this script"):
            Checkpoint.load(str(tmp_path / "other.pth"))


def test_without_resume_or_without_a_run_it_starts_anew(tmp_path):
    assert find(settings(tmp_path, "--resume", "auto")) is None
    leave_checkpoint(tmp_path, epoch=2)
    assert find(settings(tmp_path)) is None


def test_the_run_in_the_folder_is_continued(tmp_path):
    leave_checkpoint(tmp_path, epoch=2, best_top1=50.0)
    state = find(settings(tmp_path, "--resume", "auto", "--workers", "3", "--print-freq", "7")).state
    assert (state.epoch, state.best_top1) == (2, 50.0)


@pytest.mark.parametrize(
    "damage",
    [
        "garbage", "gone", "a weight is missing", "a weight of another shape", "an average of another model",
        "the optimizer of another model", "no optimizer", "no model",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    leave_checkpoint(tmp_path, epoch=2)
    leave_checkpoint(tmp_path, epoch=3)
    newest = tmp_path / "checkpoint.pth"
    if damage == "gone":
        newest.unlink()
    elif damage == "garbage":
        newest.write_bytes(b"half")
    else:  # whole files that hold what was damaged before it was written
        content = torch.load(newest, weights_only=True)
        {
            "a weight is missing": lambda: content["model"].popitem(),
            "a weight of another shape": lambda: content["model"].update({"classifier.1.bias": torch.zeros(3)}),
            "an average of another model": lambda: content.update(model_ema={"w": torch.zeros(1)}, ema_updates=1),
            "the optimizer of another model": lambda: content["optimizer"]["param_groups"][0]["params"].pop(),
            "no optimizer": lambda: content.update(optimizer={}),
            "no model": lambda: content.pop("model"),
        }[damage]()
        torch.save(content, newest)
    checkpoint = find(settings(tmp_path, "--resume", "auto"))
    assert checkpoint.state.epoch == 2 and checkpoint.read_from == str(tmp_path / "checkpoint_previous.pth")
    told = capsys.readouterr().out
    assert "continuing from the one that is before it" in told and told.count("\n") == 1


def test_one_that_was_not_put_in_its_place_is_used_beside_two_damaged_ones(tmp_path, capsys):
    leave_checkpoint(tmp_path, epoch=3)
    (tmp_path / "checkpoint.pth").rename(tmp_path / "checkpoint.pth.tmp")
    assert find(settings(tmp_path, "--resume", "auto")).state.epoch == 3  # nothing else: it died before it was renamed
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"half")
    assert find(settings(tmp_path, "--resume", "auto")).read_from == str(tmp_path / "checkpoint.pth.tmp")
    assert "continuing from the one that was being written" in capsys.readouterr().out


def test_a_first_one_that_was_not_finished_is_none(tmp_path):
    (tmp_path / "checkpoint.pth.tmp").write_bytes(b"half")
    assert find(settings(tmp_path, "--resume", "auto")) is None


def test_the_first_save_after_a_damaged_one_leaves_the_good_one_before(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    for epoch in (1, 2):
        checkpoint_of(epoch).save(path)
    (tmp_path / "checkpoint.pth").write_bytes(b"half")
    checkpoint_of(3).save(path, keep=False)
    assert Checkpoint.load(path).state.epoch == 3 and Checkpoint.load(previous_checkpoint(path)).state.epoch == 1


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"checkpoint_previous\.pth is damaged"):
        find(settings(tmp_path, "--resume", "auto"))


def test_a_default_that_has_changed_is_that_of_then_for_a_run_of_then(tmp_path, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "hflip_prob", 0.25)  # as the table will have it, with before=0.5
    then = settings(tmp_path, "--hflip-prob", "0.5").as_dict()
    del then["hflip_prob"]
    whole_of(then, epoch=2).save(str(tmp_path / "checkpoint.pth"))
    (tmp_path / "config.yaml").write_text("model: efficientnet_v2_tiny\nepochs: 5\n")  # that does not know it either
    config = resolve(["--output-dir", str(tmp_path), "--resume", "auto"])
    assert config.hflip_prob == 0.5 and find(config).state.epoch == 2
    assert settings(tmp_path).hflip_prob == 0.25


def test_settings_that_came_since_the_oldest_run_are_resumed_as_that_run_was(tmp_path):
    """Their values before there were any. A default that changes leaves them as they are: the table's `before`."""
    oldest = torch.load(ROOT / "tests/data/run_of_2026_11/checkpoint.pth", weights_only=True)["config"]
    since = {name: value for name, value in BEFORE.items() if name not in oldest and name not in LAUNCH + PLACE}
    lists = {"train_list": None, "val_list": None}
    hub = {"hub_config": None, "image_column": None, "label_column": None}
    finetune = {"finetune_epochs": 0, "finetune_size": None, "finetune_lr": None}
    compute = {"lr_clock": "epochs", "augment_size": None}
    assert since == lists | hub | finetune | compute | {"class_weights": None}


def test_a_run_without_its_settings_file_is_told_those_of_its_checkpoint(tmp_path):
    config = settings(tmp_path, "--lr", "0.2", "--dropout", "0.1", "--clip-grad-norm", "1", "--stages", "2")
    whole_of(config.as_dict(), epoch=2).save(str(tmp_path / "checkpoint.pth"))
    with pytest.raises(ConfigError) as caught:
        find(settings(tmp_path, "--resume", "auto", "--sync-bn", "--dropout", "0.1"))
    told = str(caught.value)
    assert "has lost its config.yaml, its checkpoint has the settings; give them again: " in told
    flags = told.split("again: ")[1].split()
    assert find(settings(tmp_path, "--resume", "auto", "--sync-bn", "--dropout", "0.1", *flags)).state.epoch == 2


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    leave_checkpoint(tmp_path, epoch=2)
    (tmp_path / "config.yaml").touch()
    config = settings(tmp_path, "--resume", "auto", "--lr", "0.2", "--dropout", "0.3")
    with pytest.raises(ConfigError, match=r"has other settings \(dropout None -> 0\.3, lr 0\.1 -> 0\.2\)"):
        find(config)


@pytest.mark.parametrize(("step", "refused"), [(0, False), (7, True)])
def test_inside_an_epoch_as_many_processes_are_needed(tmp_path, step, refused):
    leave_checkpoint(tmp_path, epoch=2, step=step, world_size=2)
    config = settings(tmp_path, "--resume", "auto")
    if refused:
        with pytest.raises(
            ConfigError, match=r"stopped inside an epoch with 2 process\(es\); continue it with as many, not 1"
        ):
            find(config)
    else:
        assert find(config).state.epoch == 2


def test_a_file_by_name_starts_a_run_of_its_own(tmp_path, capsys):
    file = tmp_path / "mine.pth"
    leave_checkpoint(tmp_path, file, epoch=2, best_top1=50.0, best_epoch=1)
    state = find(settings(tmp_path / "new", "--resume", file, "--lr", "0.2")).state
    assert (state.epoch, state.best_top1, state.best_epoch) == (2, -1.0, -1)
    assert "lr 0.1 -> 0.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 5}, "has trained 5 epochs already; the 5 of this run must be more"),
        ({"epoch": 2, "step": 4}, "stopped inside epoch 2"),
    ],
)
def test_a_file_by_name_that_cannot_be_continued(tmp_path, state, message):
    file = tmp_path / "mine.pth"
    leave_checkpoint(tmp_path, file, **state)
    with pytest.raises(ConfigError, match=message):
        find(settings(tmp_path / "new", "--resume", file))


def test_a_run_that_began_with_a_file_and_has_saved_nothing_begins_with_it_again(tmp_path, capsys):
    """Not from random weights, which --resume auto means where there is no run."""
    file, folder = tmp_path / "mine.pth", tmp_path / "new"
    leave_checkpoint(tmp_path, file, epoch=2, best_top1=50.0, best_epoch=1)
    folder.mkdir()
    (folder / "config.yaml").write_text(f"model: efficientnet_v2_tiny\nepochs: 5\nresume: {file}\n")
    for flags in (["--resume", "auto", "--output-dir", str(folder)], ["--config", str(folder / "config.yaml"), "--resume", "auto", "--output-dir", str(folder)]):  # fmt: skip
        config, found = find_both(resolve(flags))
        assert (found.state.epoch, found.state.first_epoch, found.state.best_epoch) == (2, 2, -1)
        assert config.resume == str(file)
        assert f"has no checkpoint yet: it begins with {file} again" in capsys.readouterr().out
    file.unlink()
    with pytest.raises(ConfigError, match=r"resume: no file .*mine\.pth"):
        find(resolve(flags))


def test_a_run_begun_with_a_file_has_the_weights_that_one_began_with(tmp_path):
    """GoogLeNet and Inception take images as those weights want them."""
    file = tmp_path / "mine.pth"
    whole_of(settings(tmp_path).as_dict() | {"weights": "DEFAULT"}, epoch=2).save(str(file))
    config, _ = find_both(settings(tmp_path / "new", "--resume", file))
    assert config.weights == "DEFAULT"
    state = {"epoch": 3, "first_epoch": 2}
    leaves = settings(tmp_path / "new").as_dict() | {"weights": "DEFAULT"}
    (tmp_path / "new").mkdir()
    whole_of(leaves, **state).save(str(tmp_path / "new" / "checkpoint.pth"))
    again, found = find_both(settings(tmp_path / "new", "--resume", "auto"))  # with the flags as they were
    assert (again.weights, found.state.epoch) == ("DEFAULT", 3)
    with pytest.raises(ConfigError, match=r"weights other has no effect with resume .*, whose run began with DEFAULT"):
        find(settings(tmp_path / "new", "--resume", file, "--weights", "other"))


def test_images_stay_where_they_lay_on_the_gpu_or_a_line_says_that_they_do_not(tmp_path, capsys):
    """A crop there differs from one by workers; a run that went on would see other pixels."""
    auto, file = settings(tmp_path, "--resume", "auto"), settings(tmp_path)
    older, none, all_of_them = (replace(checkpoint_of(1), on_device=sets) for sets in (None, 0, 2))
    assert [most_on_device(one, auto) for one in (None, older, none, all_of_them)] == [2, 2, 0, 2]
    assert most_on_device(none, file) == 2
    by_name = settings(tmp_path, "--resume", __file__)
    check_store(all_of_them, by_name, SimpleNamespace(store_side=None, on_device=0), CPU)
    assert capsys.readouterr().out == ""  # a run of its own
    for before, now, said in ((all_of_them, 2, False), (all_of_them, 1, True), (none, 0, False), (older, 0, False)):
        check_store(before, auto, SimpleNamespace(store_side=None, on_device=now), CPU)
        assert ("find no room there now" in capsys.readouterr().out) is said


def test_no_more_images_are_placed_on_the_gpu_than_may_be(tree, monkeypatch):
    gpu = replace(CPU, device=torch.device("cuda"))
    monkeypatch.setattr(Runtime, "free_memory", lambda runtime: 2**40)
    monkeypatch.setattr(StoredImages, "place_on", lambda stored, device: setattr(stored, "resident", device))
    config = resolve(["--data-path", str(tree), "--decode-cache", str(tree / "store")])
    data = load_data(config, CPU)
    assert [with_store(config, data, gpu, 0, most).on_device for most in (0, 1, 2)] == [0, 1, 2]
    assert with_store(config, data, CPU).on_device == 0
