"""What every run needs: random numbers by key, processes, device and precision."""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from settings.errors import ConfigError
from settings.table import Config

T = TypeVar("T")

# ---- random numbers by key ----

Bits = NDArray[np.uint64]
GOLDEN, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1


def scramble(bits: int) -> int:
    """Mix 64 bits, so that inputs that differ little give outputs that differ much.

    Source: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014); output n of that generator from a seed
        is `scramble(seed + n * GOLDEN)`.
    """
    bits = ((bits ^ (bits >> 30)) * FIRST_FACTOR) & MASK
    bits = ((bits ^ (bits >> 27)) * SECOND_FACTOR) & MASK
    return bits ^ (bits >> 31)


def scramble_array(bits: Bits) -> Bits:
    """Mix each number of an array as `scramble` does; uint64 multiplication wraps by itself."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return bits ^ (bits >> np.uint64(31))


def key_to_seed(*key: int) -> int:
    """Hash a key, whole numbers from 0 on, to a seed of 64 bits; neighbouring keys give unrelated seeds."""
    bits = len(key)
    for part in key:
        bits = scramble((part + bits * GOLDEN) & MASK)
    return bits


def keys_to_seeds(*key: "int | Bits") -> Bits:
    """Hash many keys at once, as `key_to_seed` does.

    key: its parts, each a number, or an array that broadcasts with the others
    """
    bits = np.full(1, len(key), dtype=np.uint64)  # not a scalar, whose products warn of wrapping
    for part in key:
        bits = scramble_array(np.asarray(part, dtype=np.uint64) + bits * np.uint64(GOLDEN))
    return bits


@contextmanager
def drawing_from(*key: int) -> Iterator[None]:
    """Have torch's CPU draws within the block follow from `key` alone.

    Afterwards they go on as if nothing had been drawn.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(key_to_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


# Keys of generators end in what they are for, so that no two share a stream (draws of batches are the hashes themselves):
# (seed, epoch, index, repeat, SAMPLE), (seed, epoch, step, rank, STEP or MIX), (seed, epoch, ORDER), (seed, index, HALF).
SAMPLE, STEP, MIX, ORDER, HALF = range(1, 6)

# ---- processes, device, precision ----


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where the run runs: its processes, device and precision, decided once.

    amp_dtype: of autocast, None for full precision
    scaler: of gradients in float16, else does nothing
    control: group of processes for small host-side messages, None with one process
    patient: the same, for what one process may do for hours while the others wait
    proven: what the rehearsal has found memory for: LARGE_EVALUATION
    """

    device: torch.device
    seed: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    amp_dtype: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    proven: set[str] = field(default_factory=set, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line on rank 0 alone."""
        if self.is_main:
            print(line, flush=True)

    @property
    def precision(self) -> str | None:
        """The name of autocast's type, None for full precision."""
        return None if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{self.world_size} process(es) on {name}, {self.precision or 'full precision'}"

    @cached_property
    def side_stream(self) -> torch.cuda.Stream | None:
        """The stream in which images are prepared, one for all loaders; None without a CUDA device."""
        return torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def aside(self, prepare: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Prepare a batch, on a GPU in the side stream: what is queued already goes on meanwhile."""
        if self.side_stream is None:
            return prepare()
        with torch.cuda.stream(self.side_stream):
            batch = prepare()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.side_stream)
        for tensor in batch:  # their memory is reused only when the current stream is done with it
            tensor.record_stream(current)
        return batch

    def draw_from(self, epoch: int, step: int) -> None:
        """Seed the model's draws in a step (dropout, stochastic depth) by (seed, epoch, step, rank)."""
        torch.manual_seed(key_to_seed(self.seed, epoch, step, self.rank, STEP))

    def autocast(self) -> torch.autocast:
        """Return the context for a forward pass at the run's precision."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def update(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None) -> None:
        """Update the parameters once, from their gradients, which the scaler has scaled.

        clip: the largest norm of the gradients, None for no limit
        """
        if clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, wish: bool) -> bool:
        """Check whether any process has the wish; as `largest`."""
        return bool(self.largest(int(wish)))

    def largest(self, number: int) -> int:
        """Find the largest of the numbers of all processes, without the device; all must ask at the same point."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def from_main(self, value: Any) -> Any:
        """Return the plain value that rank 0 has; all must ask at the same point."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def share(self, make: Callable[[], T]) -> T:
        """Have rank 0 make a value, and hand it to every process; all must call this at the same point.

        Raises:
            Exception: what rank 0 has met, in every process.
        """
        if self.world_size == 1:
            return make()
        made = self.attempt(make) if self.is_main else None
        self.barrier()
        return self.unless_failed([self.from_main(made)])[0]

    def on_each_machine(self, make: Callable[[], T]) -> T:
        """Have one process of each machine make a value, and hand it to the others there; all must call this together.

        Raises:
            Exception: the first that one of them has met, in every process.
        """
        if self.world_size == 1:
            return make()
        own = self.attempt(make) if self.local_rank == 0 else None
        self.barrier()
        made: list[Any] = [None] * self.world_size
        dist.all_gather_object(made, own, group=self.control)
        first = self.rank - self.local_rank  # launchers number the processes of a machine in a row
        return self.unless_failed(made)[first]

    @staticmethod
    def attempt(make: Callable[[], Any]) -> Any:
        """Return what `make` makes, or the error that it raises."""
        try:
            return make()
        except Exception as error:  # the other processes wait for an answer
            return error

    @staticmethod
    def unless_failed(made: list[Any]) -> list[Any]:
        """Raise the first error among the answers of processes; without one return the answers."""
        for answer in made:
            if isinstance(answer, Exception):
                raise answer
        return made

    def barrier(self) -> None:
        """Wait until every process is here, for hours if need be: one of them may decode or fetch all images."""
        if self.world_size > 1:
            dist.barrier(group=self.patient)

    def meet(self, seconds: float) -> None:
        """Wait until every process is here, or until this time has passed."""
        if self.world_size > 1:
            with suppress(RuntimeError):
                dist.monitored_barrier(self.patient, timedelta(seconds=seconds))

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def release_memory(self) -> None:
        """Release cached GPU memory, and forget how much was used at most."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def reserved_memory(self) -> int:
        """Read the most bytes of GPU memory taken since `release_memory`; 0 without a CUDA device."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0

    def free_memory(self) -> int:
        """Read how many bytes of GPU memory are free; 0 without a CUDA device."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def peak_memory_gib(self) -> float | None:
        """Read the most GPU memory that torch held since the last call, GiB, a CUDA graph's too; None without a GPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_reserved(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


RANK_SECONDS = 900.0  # that processes wait for one that does not answer; all do the same, so seconds lie between them


def start_runtime(config: Config) -> Runtime:
    """Join the other processes, if a launcher started several, and take a device.

    torchrun names rank and world size in the environment; srun names the rank, and `--world-size` and
    `--dist-url` the rest.

    Raises:
        ConfigError: the device is not there; world_size contradicts the launcher.
    """
    env = os.environ
    world_size, rank, local_rank = 1, 0, 0
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size, rank, local_rank = int(env["WORLD_SIZE"]), int(env["RANK"]), int(env.get("LOCAL_RANK", "0"))
    elif "SLURM_PROCID" in env and config.world_size > 1:
        if config.dist_url == "env://":
            raise ConfigError("world_size above 1 under srun needs --dist-url tcp://HOST:PORT, the same on all")
        world_size, rank, local_rank = config.world_size, int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", "0"))
    if config.world_size not in (1, world_size):
        raise ConfigError(
            f"world_size {config.world_size}, but {world_size} process(es) were started; "
            f"start them with torchrun --nproc-per-node {config.world_size} train.py and leave world_size out"
        )
    if world_size > 1 and ":" in config.device:
        raise ConfigError(f"device {config.device} with {world_size} processes: each takes one of its own; give cuda")
    # srun may show each of its processes one GPU alone, as number 0.
    device = find_device(config.device, local_rank if "RANK" in env else local_rank % max(1, torch.cuda.device_count()))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.sync_bn and world_size > 1 and device.type != "cuda":
        raise ConfigError(f"sync_bn works on CUDA GPUs, the device is {device.type}; leave it out")
    if config.cuda_graphs == "on" and (device.type, world_size) != ("cuda", 1):
        raise ConfigError(f"cuda_graphs on takes a GPU and one process, got {device.type} and {world_size}; give auto")
    control = patient = None
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=RANK_SECONDS)
        dist.init_process_group(backend, init_method=config.dist_url, world_size=world_size, rank=rank, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    amp_dtype = find_amp_dtype(config.amp_dtype, device) if config.amp else None
    if config.use_deterministic_algorithms:
        env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in this mode
        torch.use_deterministic_algorithms(True)
    # cuDNN's own choice of kernels is as fast (EfficientNetV2-S at 128 px on an H200: 19.4 ms a step, 19.6 after a search),
    # and a search takes half a minute for each size of image and batch.
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(key_to_seed(config.seed))
    return Runtime(
        device=device,
        seed=config.seed,
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        amp_dtype=amp_dtype,
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        control=control,  # type: ignore[arg-type]  # this process belongs to the group, so it is not a number
        patient=patient,  # type: ignore[arg-type]
    )


def find_device(name: str, local_rank: int) -> torch.device:
    """Find the device called `name`; `auto` is cuda, then mps, then cpu.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if name == "auto":
        name = there[0]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is no device; accepted here: auto, {', '.join(there)}") from error
    if device.type == "cuda" and device.index is None and "cuda" in there:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and "cuda" in there and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA device(s), numbered from 0; start no "
            "more processes on it than that"
        )
    if device.type not in there:
        raise ConfigError(f"device {name} is not on this machine; accepted here: auto, {', '.join(there)}")
    return device


def find_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose bfloat16 unless asked otherwise or the GPU is too old for it (before Ampere), else float16.

    Raises:
        ConfigError: bfloat16 is asked for on such a GPU.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and not native:
        raise ConfigError(
            f"amp_dtype bfloat16: {torch.cuda.get_device_name(device)} computes in float16 only; use amp_dtype float16"
        )
    return torch.bfloat16 if native and name != "float16" else torch.float16


def share_buffers(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Copy rank 0's buffers into `model` in every process, and return the model.

    They are batch-norm statistics, which each process gathers alone; so all evaluate what is saved.
    """
    if runtime.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    return model


def share_weights(state: dict[str, Tensor] | None, model: nn.Module, runtime: Runtime) -> nn.Module:
    """Copy `model`, with the weights that rank 0 brings as `state`, the same in every process."""
    model = copy.deepcopy(model)
    if state is not None:
        model.load_state_dict(state)
    if runtime.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    return model
