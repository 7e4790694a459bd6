"""Checkpoints that survive damage, and steps that are undone."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import assert_same_bits
from small_models import CPU, checkpoint_of, copied, small_model, train_a_step
from torch.serialization import set_crc32_options

from learning.checkpoint import Checkpoint, Damaged, previous_checkpoint, read_safely, undone, write_safely
from learning.weights import read_weights
from reporting.folder import RunFolder
from settings.errors import ConfigError, RunError

# ---- checkpoints: writing ----


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_the_bit_that_makes_a_folder_of_a_tensor_is_seen(tmp_path):
    """No CRC covers a zip file's attributes; torch.load reads nothing for such a part, and returns what lay in memory."""
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(100.0)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # of the list at the end
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"its part weights/data/0 is marked as a folder"):
        read_safely(str(path))
