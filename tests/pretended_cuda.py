"""A CUDA device that is pretended: the program's CUDA code runs as it stands, with real numbers, on a CPU.

A tensor on it says that it lies on cuda:0 and keeps its numbers in the memory of the CPU; to C++ it is a CPU tensor, or
autograd would ask the driver. An operation is refused where a GPU would refuse it (tensors of the CPU among its own),
then computed. Noted is what it would cost: kernels, copies, and what the host waits for, each with the line that asked.

- Streams have clocks: whoever reads or overwrites memory that another stream has not been waited for is told of the race.
- A copy to the host that nothing waited for arrives when it has been waited for; before, the memory holds rubbish.
- A graph is a list of the operations captured, which a replay computes anew, into the same memory.

It shows neither speed, nor the caching allocator, nor cuDNN, nvJPEG, NCCL or compilation. It rests on private names of
torch: `SEEN` are the versions on which it has been seen to work. `install` (pretended_driver.py) changes torch for the rest of
the process.
"""

import torch
from pretended_streams import Stream, asker, in_order, notes, place, under_way, wait_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SEEN = ("2.14",)
CUDA = torch.device("cuda", 0)

# What makes the host wait, besides copies: a number read, or a shape that depends on numbers.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
FACTORIES = {"zeros", "ones", "empty", "full", "scalar_tensor", "empty_strided", "arange"}

captures = []  # of graphs being captured: lists of operations, arguments and results


class Backwards:
    """Whether autograd is at work."""

    depth = 0

    def wrap(self, backward):
        def wrapped(*args, **kwargs):
            self.depth += 1
            try:
                return backward(*args, **kwargs)
            finally:
                self.depth -= 1

        return wrapped


backwards = Backwards()


class OnDevice(Tensor):
    @staticmethod
    def __new__(cls, inner):
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.inner})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            inner = self.inner.clone()
            in_order("deepcopy", [self.inner], [], [inner])
            copy = OnDevice(inner).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def to(self, *args, copy=False, **kwargs):
        args = [CUDA if isinstance(arg, OnDevice) else arg for arg in args]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        dtype, device = dtype or self.dtype, device or CUDA
        same = memory_format is None or self.inner.is_contiguous(memory_format=memory_format)
        if device.type == "cuda" and dtype == self.dtype and same and not copy:
            return self
        how = {} if memory_format is None else {"memory_format": memory_format}
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking, **how)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device=None, non_blocking=False):
        return self

    def get_device(self):
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def pin_memory(self):
        raise RuntimeError("only dense CPU tensors can be pinned")

    def record_stream(self, stream):
        pass


def inner_of(tree):
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, OnDevice) else leaf, tree)


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def convert(operation, args, kwargs):
    """Copy a tensor to another type, layout or device."""
    source, target = args[0], kwargs.get("device")
    here = isinstance(source, OnDevice)
    there = here if target is None or (here and backwards.depth) else is_cuda(target)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    result = operation(inner_of(source), *args[1:], **kwargs)
    if not there:
        return to_host(source, result, kwargs.get("non_blocking")) if here else result
    if not here:
        to_device(source, result, kwargs.get("non_blocking"))
    else:
        launched("_to_copy", (source,), operation, (inner_of(source), *args[1:]), kwargs, result)
    return OnDevice(result)


def to_device(source, result, non_blocking):
    if non_blocking and getattr(source, "pretended_pinned", False):
        in_order("copy to the device", [], [], [result])
        notes.copies["to the device", asker()] += 1
    else:
        in_order("copy to the device", [], [], [result])
        wait_for(Stream.current[-1], "copy to the device")


def to_host(source, result, non_blocking):
    in_order("copy to the host", [source.inner], [], [])
    stream = Stream.current[-1]
    if not non_blocking:
        wait_for(stream, "copy to the host")
        return result
    notes.copies["to the host", asker()] += 1
    arriving = torch.full_like(result, -77)
    under_way.append((arriving, result, stream, stream.known[stream]))
    return arriving


def copy_between(operation, args, kwargs):
    """`copy_` with one end on the device."""
    target, source, *rest = args
    if isinstance(target, OnDevice):
        operation(target.inner, source, *rest)
        to_device(source, target.inner, rest and rest[0])
    else:
        value = operation(torch.empty_like(target), source.inner)
        target.copy_(to_host(source, value, rest and rest[0]))
    return target


def refuse(name, on_host, on_device):
    """Raise what CUDA would, where tensors of the CPU are among the device's; single numbers may be, mostly."""
    strict = name.startswith(("_fused", "_amp", "_foreach")) or name in ("cat", "stack")
    wrong = [tuple(tensor.shape) for tensor in on_host if tensor.ndim > 0 or strict]
    if on_device and wrong and not name.startswith("index"):
        raise RuntimeError(f"{name}: expected all tensors on the same device, found cuda:0 and cpu, {wrong}")
    if on_device and wrong:
        wait_for(Stream.current[-1], "an index of the CPU")


def compute(operation, args, kwargs):
    """Carry out an operation of which some tensor, or the result, is on the device."""
    name = operation._schema.name.removeprefix("aten::")
    leaves = tree_leaves((args, kwargs))
    on_device = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
    on_host = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)]
    if name in ("_to_copy", "to"):
        return convert(operation, args, kwargs)
    if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        return copy_between(operation, args, kwargs)
    refuse(name, on_host, on_device)
    masks = name.startswith("index") and any(leaf.dtype == torch.bool for leaf in on_device[1:])
    if name in READS or (masks and (name == "index" or getattr(args[2], "ndim", 0) > 0)):
        in_order(name, [leaf.inner for leaf in on_device], [], [])
        wait_for(Stream.current[-1], name)
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = inner_of(args), inner_of(kwargs)
    result = operation(*inner_args, **inner_kwargs)
    for leaf in on_device:
        if leaf.shape != leaf.inner.shape:
            raise NotImplementedError(f"{name} changes the shape of a tensor in place")
    if name in READS and not isinstance(result, Tensor | tuple):
        return result
    made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    held = {place(leaf.inner) for leaf in on_device}
    if operation.is_view and all(place(leaf) in held for leaf in made):  # reshape, say, may also copy
        pass
    elif name in NO_KERNEL:
        in_order(name, [], [], made)
    else:
        launched(name, on_device, operation, inner_args, inner_kwargs, result)
    known = {id(leaf.inner): leaf for leaf in on_device}
    return tree_map(
        lambda leaf: (known[id(leaf)] if id(leaf) in known else OnDevice(leaf)) if isinstance(leaf, Tensor) else leaf,
        result,
    )


def launched(name, on_device, operation, args, kwargs, result):
    """Note a kernel: what it costs, its place in the order of streams, and in the graph that is being captured."""
    notes.kernels[name, asker()] += 1
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    changed = {
        id(leaf)
        for argument, value in zip(operation._schema.arguments, args)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value)
    } | {id(leaf) for leaf in results if any(leaf is each.inner for each in on_device)}
    written = [leaf.inner for leaf in on_device if id(leaf.inner) in changed]
    new = [leaf for leaf in results if id(leaf) not in changed]
    in_order(name, [leaf.inner for leaf in on_device], written, new)
    if captures:
        captures[-1].append((operation, args, kwargs, results))


class Device(TorchDispatchMode):
    """The mode in which operations that name the device without having a tensor on it are the device's."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_cuda(kwargs.get("device")) or any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs))):
            return compute(operation, args, kwargs)
        if kwargs.get("pin_memory"):
            result = operation(*args, **kwargs | {"pin_memory": False})
            result.pretended_pinned = True
            return result
        if backwards.depth and operation._schema.name.removeprefix("aten::") in FACTORIES:
            return compute(operation, args, kwargs | {"device": CUDA})  # autograd's formulas ask C++ for the device
        return operation(*args, **kwargs)
