"""Random numbers by key, EMA, the wish to stop, devices, scores, and checkpoints that survive damage."""

import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from torch import nn

import utils
from learning.checkpoint import Checkpoint, previous_checkpoint, undone, write_safely
from learning.ema import EMA, ema_decay
from learning.resume import find_checkpoint
from learning.scores import NonFiniteLoss, Score, TrainingLoss
from learning.state import RunState
from settings.errors import ConfigError
from settings.resolve import resolve
from utils import (
    GOLDEN,
    Runtime,
    Stop,
    drawing_from,
    find_amp_dtype,
    find_device,
    key_to_seed,
    keys_to_seeds,
    scramble,
    scramble_array,
    start_runtime,
)

CPU = Runtime(device=torch.device("cpu"))


class Scalar(nn.Module):
    """One weight, one buffer of each kind; all hold `value`."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.set(value)

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)
            self.mean.fill_(value)
            self.count.fill_(int(value))


def ema_of(model, *flags):
    return EMA(model, resolve(["--model-ema", *flags]))


def held(ema):
    module = ema.module
    return pytest.approx((float(module.weight), float(module.mean), int(module.count)))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def train_a_step(model, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()


def copied(state):
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state)


# ---- random numbers by key ----


def drawn_from(*key):
    with drawing_from(*key):
        return torch.rand(4)


def test_draws_follow_from_their_key_alone():
    first = drawn_from(1, 2, 3)
    torch.rand(17)
    assert torch.equal(first, drawn_from(1, 2, 3))
    with drawing_from(9):
        torch.rand(3)
        assert torch.equal(first, drawn_from(1, 2, 3))


def test_every_part_of_a_key_counts_and_so_does_its_place():
    keys = [(0, 0, 0, 0, 0), (0, 2**32 - 1, 0, 0, 0), (2**32 - 1, 0, 0, 0, 0), (5, 4, 3, 2, 1), (1, 2, 3, 4, 5)]
    keys += [tuple(int(i == place) for i in range(5)) for place in range(5)]
    draws = {tuple(drawn_from(*key).tolist()) for key in keys}
    assert len(draws) == len(keys) == 10
    assert len({utils.SAMPLE, utils.STEP, utils.MIX}) == 3  # the same numbers for another use are another key


def test_neighbouring_keys_give_unrelated_seeds():
    seeds = [key_to_seed(0, 0, index) for index in range(1000)]
    assert len(set(seeds)) == 1000
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 1000  # torch's CPU generator takes the low 32 bits
    ones = sum(bin(seed).count("1") for seed in seeds) / 64_000
    assert ones == pytest.approx(0.5, abs=0.02)


def test_keys_are_hashed_by_splitmix64():
    """The generator's published outputs from the seed 1234567, and by hand: a key of one part is its first output from
    that part, since the number of parts counts steps."""
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    for n, output in enumerate(outputs, 1):
        assert scramble((1234567 + n * GOLDEN) % 2**64) == output
    assert scramble_array(np.array([1234567], np.uint64) + np.uint64(GOLDEN)).tolist() == outputs[:1]
    assert key_to_seed(1234567) == outputs[0]


def test_many_keys_at_once_are_hashed_as_one_at_a_time():
    epochs, indices = np.array([[0], [2**32 - 1]], np.uint64), np.array([0, 1, 2**40], np.uint64)
    together = keys_to_seeds(3, epochs, indices)
    assert together.tolist() == [[key_to_seed(3, int(e), int(i)) for i in indices] for e in epochs[:, 0]]


def test_the_generator_goes_on_afterwards_as_if_nothing_had_been_drawn():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with drawing_from(1):
        torch.rand(100)
    with pytest.raises(KeyError), drawing_from(2):
        torch.rand(7)
        raise KeyError
    assert torch.equal(torch.rand(3), expected)


def test_what_the_model_draws_follows_from_seed_epoch_step_and_rank():
    def drawn(seed, rank, epoch, step):
        Runtime(device=torch.device("cpu"), seed=seed, rank=rank).draw_from(epoch, step)
        return tuple(torch.rand(4).tolist())

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({drawn(*key) for key in keys}) == 5
    assert drawn(*keys[3]) == drawn(*keys[3])


# ---- EMA ----


@pytest.mark.parametrize(
    ("setting", "images_per_step", "steps", "epochs", "decay"),
    [
        (0.99998, 128, 32, 600, 0.99986347),  # 0.00002 * 128 * 32 / 600 is 0.00013653
        (0.99998, 1024, 32, 600, 0.99890773),  # torchvision's own run: 8 GPUs of 128
        (0.99998, 32, 32, 90, 0.99977244),
        (0.9, 1, 1, 1, 0.9),
        (0.9, 100, 32, 1, 0.0),  # no less
        (0.0, 5, 1, 10, 0.5),
    ],
)
def test_decay_per_update(setting, images_per_step, steps, epochs, decay):
    assert ema_decay(setting, images_per_step, steps, epochs) == pytest.approx(decay, abs=1e-8)


def test_the_average_by_hand():
    """Decay 0.9: the first update copies, then 0.9 of the average and 0.1 of the model."""
    model = Scalar(50)
    ema = ema_of(model, "--model-ema-decay", "0.9", "--model-ema-steps", "1", "--epochs", "1")
    ema.begin_epoch(0, images_per_step=1)
    for value, average in ((1, 1.0), (2, 1.1), (3, 1.29), (11, 2.261)):
        model.set(value)
        ema.update(model)
        assert held(ema) == (average, average, value)  # the whole number is copied, not averaged
    assert ema.num_updates == 4 and model.weight.item() == 11


def test_a_smaller_decay_for_larger_batches():
    model = Scalar(1)
    ema = ema_of(model, "--model-ema-decay", "0.9", "--model-ema-steps", "2", "--epochs", "4")
    ema.begin_epoch(0, images_per_step=10)  # 1 - 0.1 * 10 * 2 / 4
    ema.update(model)
    model.set(3)
    ema.update(model)
    assert held(ema) == (2.0, 2.0, 3)


def test_warm_up_copies_and_the_average_begins_after_it():
    flags = ["--model-ema-decay", "0.9", "--model-ema-steps", "1", "--epochs", "10", "--lr-warmup-epochs", "2"]
    model = Scalar(0)
    ema = ema_of(model, *flags)
    for epoch, value in ((0, 1), (0, 2), (1, 5)):
        ema.begin_epoch(epoch, images_per_step=5)  # 0.95
        model.set(value)
        ema.update(model)
        assert held(ema) == (value, value, value)
    ema.begin_epoch(2, images_per_step=5)
    for value, average in ((7, 7.0), (27, 8.0)):
        model.set(value)
        ema.update(model)
        assert held(ema) == (average, average, value)


def test_the_average_is_apart_from_the_model():
    model = small_model().train()
    ema = ema_of(model)
    assert not ema.module.training and model.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = copied(ema.module.state_dict())
    train_a_step(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=1)
    assert_same_bits(dict(ema.module.state_dict()), dict(before))


def test_batch_norm_statistics_are_averaged_and_its_counter_copied():
    model = small_model()
    ema = ema_of(model, "--model-ema-decay", "0.75", "--model-ema-steps", "1", "--epochs", "1")
    ema.begin_epoch(0, images_per_step=1)
    norm, averaged = model[1], ema.module[1]
    for number, value in ((1, 4.0), (2, 8.0)):
        norm.running_mean.fill_(value)
        norm.running_var.fill_(2 * value)
        norm.num_batches_tracked.fill_(number)
        ema.update(model)
    assert averaged.running_mean.tolist() == pytest.approx([5.0] * 6)  # 0.75 * 4 + 0.25 * 8
    assert averaged.running_var.tolist() == pytest.approx([10.0] * 6)
    assert averaged.num_batches_tracked.item() == 2


# ---- the wish to stop ----


def test_nobody_asks_nothing_stops():
    with Stop(CPU) as stop:
        assert not any(stop(step) for step in range(20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_seen_at_the_next_step_and_handlers_come_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop(CPU) as stop:
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert stop(2) and stop(3)
        assert stop.reason == f"signal {number.name}"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers_come_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), Stop(CPU):
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise KeyError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_ctrl_c_twice_ends_it_at_once():
    with Stop(CPU) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop(2)


def test_sigterm_twice_still_saves():
    with Stop(CPU) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(1) and stop.reason == "signal SIGTERM"


@pytest.mark.parametrize(("budget", "lasts", "ends"), [("90s", 89.9, 90.0), ("1.5m", 89.9, 90.1), ("2h", 7199, 7200)])
def test_a_time_budget_counts_from_the_start(monkeypatch, budget, lasts, ends):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Stop(CPU, budget) as stop:
        clock.now += lasts
        assert not stop(1)
        clock.now = 1000.0 + ends
        assert stop(2) and stop.reason == "time budget spent"


def test_several_processes_agree_every_eight_steps():
    asked = []

    def agree(wish):
        asked.append(wish)
        return wish

    with Stop(SimpleNamespace(world_size=2, is_main=False, any=agree)) as stop:
        assert [stop(step) for step in range(1, 9)] == [False] * 8
        assert asked == [False]  # at step 8
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop(step) for step in range(9, 17)] == [False] * 7 + [True]
        assert stop(17) and asked == [False, True]


def test_a_wish_of_another_process_counts():
    with Stop(SimpleNamespace(world_size=2, is_main=True, any=lambda wish: True)) as stop:
        assert not stop(7) and stop(8)


# ---- devices and precision ----


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("name", "local_rank", "device"),
    [("auto", 1, "cuda:1"), ("cuda", 0, "cuda:0"), ("cuda:1", 0, "cuda:1"), ("cpu", 1, "cpu")],
)
def test_devices_of_a_machine_with_two_gpus(two_gpus, name, local_rank, device):
    assert find_device(name, local_rank) == torch.device(device)


def test_more_processes_than_gpus_is_an_error(two_gpus):
    with pytest.raises(ConfigError, match="this machine has 2 CUDA device"):
        find_device("auto", 2)


def test_auto_falls_back_to_the_cpu(no_gpu):
    assert find_device("auto", 0) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device 'tpu' is no device; accepted here: auto, cpu"),
        ("", "device '' is no device; accepted here: auto, cpu"),
        ("cuda", "device cuda is not on this machine; accepted here: auto, cpu"),
        ("cuda:7", "device cuda:7 is not on this machine; accepted here: auto, cpu"),
        ("mps", "device mps is not on this machine; accepted here: auto, cpu"),
        ("meta", "device meta is not on this machine; accepted here: auto, cpu"),
    ],
)
def test_wrong_devices_are_told_what_is_accepted(no_gpu, name, message):
    with pytest.raises(ConfigError) as caught:
        find_device(name, 0)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("auto", (8, 0), torch.bfloat16), ("auto", (7, 5), torch.float16), ("float16", (9, 0), torch.float16),
        ("bfloat16", (9, 0), torch.bfloat16), ("float16", (7, 0), torch.float16),
    ],
)  # fmt: skip
def test_half_precision_of_gpus_of_several_ages(monkeypatch, name, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert find_amp_dtype(name, torch.device("cuda:0")) == dtype


def test_bfloat16_on_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ConfigError, match="Tesla V100 computes in float16 only; use amp_dtype float16"):
        find_amp_dtype("bfloat16", torch.device("cuda:0"))


def test_world_size_that_contradicts_the_launcher_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"world_size 4, but 1 process\(es\) were started; .*--nproc-per-node 4"):
        start_runtime(resolve(["--world-size", "4", "--device", "cpu"]))


def test_a_step_scales_gradients_down_to_the_norm_asked_for():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for clip, expected in ((None, [-3.0, -4.0]), (1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0])):
        weight.data.zero_()
        CPU.backward_and_step((weight * torch.tensor([3.0, 4.0])).sum(), optimizer, [weight], clip)
        assert weight.tolist() == pytest.approx(expected, abs=1e-5)


# ---- scores ----


def test_top1_top5_loss_and_confusions_by_hand():
    """Six classes. The true one comes first, second, fifth and sixth."""
    ranked = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])  # class 0 first, class 5 last
    score = Score(CPU)
    score.add(ranked.repeat(3, 1), torch.tensor([0, 1, 4]), torch.tensor(2.0))
    score.add(ranked.repeat(1, 1), torch.tensor([5]), torch.tensor(6.0))
    score.gather()
    assert (score.top1, score.top5, score.num_images) == (25.0, 75.0, 4)
    assert score.loss == pytest.approx(3.0)  # (3 * 2 + 6) / 4
    expected = torch.zeros(6, 6, dtype=torch.long)
    expected[[0, 1, 4, 5], 0] = 1  # rows true, columns predicted
    assert torch.equal(score.confusion, expected)
    assert str(score) == "top1 25.000, top5 75.000, loss 3.0000 on 4 images"


def test_confusions_of_repeated_pairs_add_up():
    logits = torch.tensor([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    score = Score(CPU)
    for _ in range(3):
        score.add(logits, torch.tensor([0, 0, 0, 1]), torch.tensor(1.0))
    score.gather()
    assert score.confusion.tolist() == [[3, 6], [0, 3]]
    assert score.top1 == 50.0


@pytest.mark.parametrize(("num_classes", "top1"), [(2, 50.0), (3, 50.0), (4, 50.0), (5, 50.0)])
def test_with_five_classes_or_fewer_all_are_among_the_first_five(num_classes, top1):
    logits = torch.zeros(2, num_classes)
    logits[:, 1] = 1.0
    score = Score(CPU)
    score.add(logits, torch.tensor([1, 0]), torch.tensor(0.5))
    score.gather()
    assert (score.top1, score.top5, score.loss) == (top1, 100.0, 0.5)


def test_half_precision_outputs_lose_nothing():
    score = Score(CPU)
    for _ in range(300):
        score.add(torch.eye(10, dtype=torch.bfloat16), torch.arange(10), torch.tensor(1.5, dtype=torch.bfloat16))
    score.gather()
    assert (score.num_images, score.top1, score.top5, score.loss) == (3000, 100.0, 100.0, 1.5)


def test_the_mean_loss_counts_images_not_batches():
    state = RunState()
    losses = TrainingLoss(state, CPU, "epoch 1")
    assert losses.read() == 0.0
    losses.add(torch.tensor(1.0), 6, 0)
    losses.add(torch.tensor(5.0), 2, 1)
    assert losses.read() == pytest.approx(2.0)
    losses.store(state)
    assert (state.loss_sum, state.num_images) == (16.0, 8)
    again = TrainingLoss(state, CPU, "epoch 1")  # a resume
    again.add(torch.tensor(8.0), 2, 2)
    again.store(state)
    assert (state.loss_sum, state.num_images) == (32.0, 10)


def test_what_an_earlier_part_of_the_epoch_summed_goes_on_in_one_process():
    state = RunState(loss_sum=30.0, num_images=10)
    other = TrainingLoss(state, Runtime(device=torch.device("cpu"), rank=1), "epoch 1")
    other.add(torch.tensor(1.0), 4, 5)
    other.store(state)
    assert (state.loss_sum, state.num_images) == (4.0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_its_first_step(bad):
    state = RunState()
    losses = TrainingLoss(state, CPU, "epoch 3/9, stage 1")
    for step, loss in enumerate((1.0, 1.0, 1.0, bad, 1.0, math.nan, 1.0)):
        losses.add(torch.tensor(loss), 4, step)
    for ask in (losses.read, lambda: losses.store(state)):
        with pytest.raises(NonFiniteLoss, match=r"not finite in epoch 3/9, stage 1, step 3; lower lr"):
            ask()
    assert state == RunState()


def test_the_first_step_of_all_can_be_the_bad_one():
    losses = TrainingLoss(RunState(), CPU, "epoch 1")
    losses.add(torch.tensor(math.nan), 4, 0)
    losses.add(torch.tensor(math.nan), 4, 1)
    with pytest.raises(NonFiniteLoss, match="step 0;"):
        losses.read()


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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_no_half_file(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pth"
    checkpoint_of(1).save(str(path))

    def half(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(type(error)):
        checkpoint_of(2).save(str(path))
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


# ---- checkpoints: finding the one to continue from ----


def settings(folder, *flags):
    return resolve(["--output-dir", str(folder), "--epochs", "5", *map(str, flags)])


def leave_checkpoint(folder, path=None, **state):
    checkpoint_of(config=settings(folder).as_dict(), **state).save(str(path or folder / "checkpoint.pth"))


def find(config):
    return find_checkpoint(config, CPU, own=os.path.join(config.output_dir, "checkpoint.pth"))


def test_a_setting_that_an_older_checkpoint_does_not_know_has_its_default(tmp_path, capsys):
    then = settings(tmp_path).as_dict()
    del then["hflip_prob"], then["random_erase"]
    checkpoint_of(2, config=then).save(str(tmp_path / "checkpoint.pth"))
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


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    leave_checkpoint(tmp_path, epoch=2)
    leave_checkpoint(tmp_path, epoch=3)
    newest = tmp_path / "checkpoint.pth"
    if damage == "gone":  # a crash between the two renamings
        newest.unlink()
    else:
        newest.write_bytes(b"half")
    assert find(settings(tmp_path, "--resume", "auto")).state.epoch == 2
    assert "continuing from the one before it" in capsys.readouterr().out


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"checkpoint_previous\.pth is damaged"):
        find(settings(tmp_path, "--resume", "auto"))


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    leave_checkpoint(tmp_path, epoch=2)
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
