"""Random numbers by key, devices."""

import os

import numpy as np
import pytest
import torch
from small_models import CPU
from torch import nn

import utils
from settings.errors import ConfigError, process_rank, tell
from settings.machine import cores
from settings.resolve import resolve
from utils import (
    GOLDEN,
    Runtime,
    drawing_from,
    find_amp_dtype,
    find_device,
    key_to_seed,
    keys_to_seeds,
    scramble,
    scramble_array,
    start_runtime,
)

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


def test_one_gpu_by_its_number_is_not_for_several_processes(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="device cuda:0 with 2 processes: each takes one of its own; give cuda"):
        start_runtime(resolve(["--device", "cuda:0"]))


def test_srun_s_number_counts_where_the_run_has_several_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (process_rank(4), process_rank()) == (3, 0)
    monkeypatch.setenv("RANK", "2")
    assert (process_rank(4), process_rank()) == (3, 0)  # a RANK alone is not torchrun's, and makes no group
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (process_rank(4), process_rank()) == (2, 2)


def test_an_error_says_which_of_several_processes_it_is_of(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "3")
    tell("x")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    tell("x")
    assert capsys.readouterr().err == "x\n[rank 3] x\n"


def test_cores_are_those_that_a_quota_leaves(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores() == 6
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")  # joblib's own word for it; it reads a container's quota as well
    assert cores() == 2


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


def test_graphs_that_are_asked_for_need_a_gpu():
    with pytest.raises(ConfigError, match="cuda_graphs on takes a GPU and one process, got cpu and 1; give auto"):
        start_runtime(resolve(["--cuda-graphs", "on", "--device", "cpu"]))


def test_processes_of_srun_that_see_a_gpu_each_take_that(monkeypatch):
    """With --gpus-per-task=1 it is number 0 for all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def find(name, local_rank):
        asked.append(local_rank)
        raise ConfigError("far enough")

    monkeypatch.setattr(utils, "find_device", find)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    config = resolve("--world-size 8 --dist-url tcp://localhost:1 --device cuda".split())
    for visible in (1, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        with pytest.raises(ConfigError, match="far enough"):
            start_runtime(config)
    assert asked == [0, 1]


def test_a_step_scales_gradients_down_to_the_norm_asked_for():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for clip, expected in ((None, [-3.0, -4.0]), (1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0])):
        weight.data.zero_()
        weight.grad = torch.tensor([3.0, 4.0])
        CPU.update(optimizer, [weight], clip)
        assert weight.tolist() == pytest.approx(expected, abs=1e-5)
