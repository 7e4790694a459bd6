"""Checkpoints that survive damage, which one a run continues from, and steps that are undone."""

import os
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT
from runs import assert_same_bits
from small_models import CPU, copied, small_model, train_a_step
from torch.serialization import set_crc32_options

from learning.checkpoint import Checkpoint, previous_checkpoint, read_safely, undone, write_safely
from learning.models import build_model
from learning.resume import find_checkpoint
from learning.state import RunState
from learning.weights import read_weights
from reporting.folder import RunFolder
from settings.errors import ConfigError, RunError
from settings.resolve import resolve
from settings.table import BEFORE, DEFAULTS, LAUNCH, PLACE

# ---- checkpoints: writing ----


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoint_of(epoch, config=None, world_size=1, **state):
    """A checkpoint of a model of one weight, which holds `epoch`."""
    return Checkpoint(
        model={"w": torch.full((500,), epoch)}, optimizer={}, scaler={}, state=RunState(epoch=epoch, **state),
        world_size=world_size, config=config or {}, classes=["ant", "bee"], num_images=8,
    )  # fmt: skip


def test_the_checkpoint_before_is_kept(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    for epoch in (1, 2, 3):
        checkpoint_of(epoch).save(path)
        assert Checkpoint.load(path).state.epoch == epoch
    before = Checkpoint.load(str(tmp_path / "checkpoint_previous.pth"))
    assert before.state.epoch == 2 and before.model["w"].tolist() == 500 * [2]
    assert files(tmp_path) == ["checkpoint.pth", "checkpoint_previous.pth"]
    assert previous_checkpoint(path) == str(tmp_path / "checkpoint_previous.pth")


def test_a_checkpoint_reads_back_as_it_was_with_and_without_an_average(tmp_path):
    path = str(tmp_path / "checkpoint.pth")
    plain = checkpoint_of(3, config={"lr": 0.1, "dropout": [0.1, 0.3], "weights": None}, step=7, best_weights="ema")
    averaged = replace(plain, model_ema={"w": torch.ones(2)}, ema_updates=5, store_side=64)
    for checkpoint in (plain, averaged):
        checkpoint.save(path)
        assert_same_bits(Checkpoint.load(path).to_dict(), checkpoint.to_dict())
    plain.save(path)
    assert "model_ema" not in torch.load(path, weights_only=True)  # by which `--weights` knows what to take


def test_without_a_name_to_keep_it_under_the_old_file_is_replaced(tmp_path):
    path = tmp_path / "model_best.pth"
    write_safely(str(path), {"number": 1})
    write_safely(str(path), {"number": 2})
    assert torch.load(path, weights_only=True) == {"number": 2} and files(tmp_path) == ["model_best.pth"]


def test_a_failure_while_writing_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoint_of(1).save(str(path))
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        checkpoint_of(2, config={"bad": Unsaveable()}).save(str(path))
    assert path.read_bytes() == before and files(tmp_path) == ["checkpoint.pth"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_full_disk_or_an_interrupt_leaves_no_half_file(tmp_path, monkeypatch, error, raised):
    path = tmp_path / "checkpoint.pth"
    checkpoint_of(1).save(str(path))

    def half(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(raised) as caught:
        checkpoint_of(2).save(str(path))
    if raised is RunError:
        assert (
            str(caught.value) == f"{path}: No space left on device; free some space there, then --resume auto continues"
        )
    assert files(tmp_path) == ["checkpoint.pth"] and Checkpoint.load(str(path)).state.epoch == 1


# ---- checkpoints: reading ----


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"resume: no file .*gone\.pth"):
        Checkpoint.load(str(tmp_path / "gone.pth"))


def cut(whole):
    return whole[: len(whole) // 2]


def overwritten(whole):
    return whole[:100] + bytes(400) + whole[500:]


@pytest.mark.parametrize(
    "damage",
    [cut, overwritten, lambda whole: b"", lambda whole: b"no checkpoint"],
    ids=["cut", "overwritten", "empty", "text"],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    path = tmp_path / "checkpoint.pth"
    checkpoint_of(1).save(str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"checkpoint\.pth is damaged or no checkpoint") as caught:
        Checkpoint.load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{"weight": torch.zeros(1)}, {"format": 99}, {"model": {}, "epoch": 3}, [1], 7], ids=str
)
def test_a_file_that_is_not_of_this_script_is_told_to_go_to_weights(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(
        ConfigError, match="is not a checkpoint of this script; to start from its weights use --weights"
    ):
        Checkpoint.load(str(tmp_path / "other.pth"))


def test_a_checkpoint_with_python_objects_is_not_unpickled(tmp_path):
    torch.save({"format": 1, "args": SimpleNamespace(lr=0.1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="is damaged or no checkpoint"):
        Checkpoint.load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, seed):
    path, draw = tmp_path / "checkpoint.pth", random.Random(seed)
    checkpoint = replace(checkpoint_of(1), model={"w": torch.randn(3000), "n": torch.arange(7)})
    checkpoint.save(str(path))
    whole, noticed = path.read_bytes(), 0
    for _ in range(50):
        at = draw.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            assert_same_bits(Checkpoint.load(str(path)).to_dict(), checkpoint.to_dict())
        except ConfigError:
            noticed += 1
    assert noticed > 30  # three quarters of the file are weights


def test_a_flipped_bit_of_a_weight_is_noticed_wherever_weights_are_read(tmp_path):
    model = small_model().state_dict()
    for name in ("checkpoint.pth", "weights.pth", "model_best.pth"):
        content = checkpoint_of(1).to_dict() | {"model": model} if name == "checkpoint.pth" else model
        write_safely(str(tmp_path / name), content)
        whole = bytearray((tmp_path / name).read_bytes())
        at = whole.index(model["0.weight"].numpy().tobytes())
        whole[at + 3] ^= 64  # of the exponent
        (tmp_path / name).write_bytes(whole)
        assert "0.weight" in str(torch.load(tmp_path / name, weights_only=True))  # torch does not see it
    with pytest.raises(
        ConfigError, match=r"checkpoint\.pth is damaged .*its part archive/data/\d+ is not what was written"
    ):
        Checkpoint.load(str(tmp_path / "checkpoint.pth"))
    with pytest.raises(ConfigError, match=r"weights: .* is not a file of weights .*is not what was written"):
        read_weights("resnet18", str(tmp_path / "weights.pth"))
    with pytest.raises(RunError, match=r"model_best\.pth is gone or damaged .*; --resume auto goes on without it"):
        RunFolder(str(tmp_path)).best_weights()


def test_files_without_checksums_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "none.pth")
    finally:
        set_crc32_options(True)
    for name in ("old.pth", "none.pth"):
        assert_same_bits(read_safely(str(tmp_path / name)), {"a": torch.ones(2)})


# ---- checkpoints: finding the one to continue from ----


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
    return find_checkpoint(config, CPU, own=os.path.join(config.output_dir, "checkpoint.pth"))


def test_a_setting_that_an_older_checkpoint_does_not_know_has_its_default(tmp_path, capsys):
    then = settings(tmp_path).as_dict()
    del then["hflip_prob"], then["random_erase"]
    whole_of(then, epoch=2).save(str(tmp_path / "checkpoint.pth"))
    (tmp_path / "config.yaml").touch()
    assert find(settings(tmp_path, "--resume", "auto")).state.epoch == 2
    with pytest.raises(ConfigError, match=r"has other settings \(hflip_prob 0\.5 -> 0\.25\)"):
        find(settings(tmp_path, "--resume", "auto", "--hflip-prob", "0.25"))


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
    assert since == {"train_list": None, "val_list": None}


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
        ({"epoch": 5}, "has trained 5 epochs already; epochs 5 must be more"),
        ({"epoch": 2, "step": 4}, "stopped inside epoch 2"),
    ],
)
def test_a_file_by_name_that_cannot_be_continued(tmp_path, state, message):
    file = tmp_path / "mine.pth"
    leave_checkpoint(tmp_path, file, **state)
    with pytest.raises(ConfigError, match=message):
        find(settings(tmp_path / "new", "--resume", file))


# ---- undone ----


@pytest.mark.parametrize("optimizer_kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_what_is_undone_never_happened(optimizer_kind, steps_before):
    def trained(with_excursion):
        model = small_model()
        options = {"momentum": 0.9} if optimizer_kind is torch.optim.SGD else {}
        optimizer = optimizer_kind(model.parameters(), lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(steps_before):
            train_a_step(model, optimizer, seed)
        if with_excursion:
            before = copied((dict(model.state_dict()), optimizer.state_dict(), scaler.state_dict()))
            with undone(model, optimizer, scaler):
                train_a_step(model, optimizer, seed=50)
                optimizer.param_groups[0]["lr"] = 7.0
                scaler.scale(torch.ones(1))  # it sets itself up when first used
                scaler.update(2.0)
                assert not torch.equal(model.state_dict()["0.weight"], before[0]["0.weight"])
            assert_same_bits((dict(model.state_dict()), optimizer.state_dict(), scaler.state_dict()), before)
        train_a_step(model, optimizer, seed=9)
        return dict(model.state_dict())

    assert_same_bits(trained(with_excursion=True), trained(with_excursion=False))


def test_an_error_is_undone_too_and_a_disabled_scaler_does_no_harm():
    model = small_model()
    before = copied(dict(model.state_dict()))
    with pytest.raises(KeyError), undone(model, CPU.scaler):
        model[0].weight.data.zero_()
        raise KeyError
    assert_same_bits(dict(model.state_dict()), before)
