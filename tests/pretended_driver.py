"""What of torch asks the driver of a device, answered for the pretended one."""

import contextlib

import torch
import torchvision.transforms.v2._augment as mixing
from pretended_cuda import CUDA, Device, OnDevice, backwards, captures
from pretended_streams import Event, Race, Stream, asker, host, in_order, notes, wait_for
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_leaves
from torchvision.io import decode_jpeg as decode_on_cpu

import images.decode
import learning.learner


class Graph:
    """A CUDA graph. Capturing computes each operation once, where a GPU would compute none until the first replay."""

    def __init__(self, keep_graph=False):
        self.operations = []

    @classmethod
    @contextlib.contextmanager
    def capture(cls, graph, pool=None, stream=None, capture_error_mode="global"):
        waits, side = notes.waits.total(), stream or Stream()
        side.learn(Stream.current[-1])
        captures.append(graph.operations)
        try:
            with on_stream(side):
                yield
        finally:
            captures.pop()
        Stream.current[-1].learn(side)
        if notes.waits.total() > waits:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        notes.kernels["replay of a graph", asker()] += 1
        tensors = [
            leaf for operation in self.operations for leaf in tree_leaves(operation[1:]) if isinstance(leaf, Tensor)
        ]
        in_order("replay of a graph", tensors, tensors, [])
        for operation, args, kwargs, results in self.operations:
            again = [leaf for leaf in tree_leaves(operation(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(results, again):
                if old is not new:
                    old.copy_(new)


@contextlib.contextmanager
def on_stream(stream):
    if stream is None:
        yield
        return
    Stream.current.append(stream)
    try:
        yield
    finally:
        Stream.current.remove(stream)


def pinned(tensor):
    """A copy in pinned memory."""
    copy = tensor.clone()
    copy.pretended_pinned = True
    return copy


def grouped(group):
    """The grouping of tensors by device and type, which C++ does by what it takes for their device."""

    def by_device(lists, with_indices=False):
        groups = group(lists, with_indices).items()
        return {(CUDA if isinstance(value[0][0][0], OnDevice) else key[0], key[1]): value for key, value in groups}

    return by_device


def install_cuda():
    """Replace what of torch.cuda would ask the driver."""
    cuda = torch.cuda
    answers = dict(
        _lazy_init=None, is_available=True, is_bf16_supported=True, current_device=0, device_count=1, set_device=None,
        get_device_name="a pretended GPU", get_device_capability=(9, 0), empty_cache=None, manual_seed_all=None,
        reset_peak_memory_stats=None, max_memory_reserved=2**30, max_memory_allocated=2**30, memory_reserved=2**30,
        memory_allocated=2**30, mem_get_info=(2**36, 2**37), get_sync_debug_mode=0, set_sync_debug_mode=None, graph_pool_handle=(0, 1), is_current_stream_capturing=False,
    )  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.Stream, cuda.Event, cuda.CUDAGraph = Stream, Event, Graph
    cuda.stream, cuda.graph = on_stream, Graph.capture
    cuda.current_stream = lambda device=None: Stream.current[-1]
    cuda.default_stream = lambda device=None: Stream.current[0]
    cuda.synchronize = lambda device=None: wait_for(Stream.current[-1], "torch.cuda.synchronize")
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.set_device_index = lambda device: None
    torch._C._ensureCUDADeviceGuardSet()  # or an operation that names the device asks for a driver


def decode_jpeg(files, mode, device):
    """nvJPEG, which writes in a stream of its own, that waits for no other, into memory freed in the current one."""
    stream = Stream.current[-1]
    if not host.has_seen(stream, stream.known[stream]):
        raise Race(f"nvJPEG is asked at {asker()} while its memory may still be read")
    decoded = [OnDevice(image) for image in decode_on_cpu(files, mode, "cpu")]
    in_order("decode_jpeg", [], [], [image.inner for image in decoded])
    return decoded


def install():
    """Change torch so that there is a CUDA device; operations reach it within the mode that is returned."""
    install_cuda()
    torch.backends.cudnn.enabled = False  # its own operations have no form for a CPU
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes its tensor on the CPU
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Tensor.pin_memory = pinned
    Tensor.backward = backwards.wrap(Tensor.backward)

    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast = Autocast

    one_hot = torch.nn.functional.one_hot  # which in C++ makes its result where it takes the labels to be

    def one_hot_there(labels, num_classes=-1):
        if not isinstance(labels, OnDevice):
            return one_hot(labels, num_classes)
        result = one_hot(labels.inner, num_classes)
        notes.kernels["one_hot", asker()] += 2
        in_order("one_hot", [labels.inner], [], [result])
        return OnDevice(result)

    for module in (torch.nn.functional, mixing, learning.learner):
        module.one_hot = one_hot_there
    images.decode.decode_jpeg = decode_jpeg
    group = grouped(_foreach_utils._group_tensors_by_device_and_dtype)
    for module in (_foreach_utils, clip_grad, optimizer):
        module._group_tensors_by_device_and_dtype = group
    for module in (_foreach_utils, optimizer):
        module._foreach_supported_types.append(OnDevice)
    return Device()
