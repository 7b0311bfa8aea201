"""The CPU adapter: Megatron-Core, unedited, on torch's CPU device over gloo.

Call `install()` before anything imports `megatron`. With a CUDA device it does nothing. It replaces names in
`torch.cuda`, `torch` and `torch.distributed`, so only entry points of a run may call it, never an import.
What Megatron-Core itself needs after its import is in `cpu_megatron.py`.

Every replaced name gets a function object of its own: torch._dynamo refuses one object under two names.
"""

import contextlib
import functools
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch.distributed import distributed_c10d
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

# Factories that Megatron-Core calls with device="cuda" literals or pin_memory=True.
FACTORIES = (
    "tensor empty zeros ones full arange rand randn randint randperm empty_like zeros_like ones_like full_like "
    "as_tensor linspace empty_strided"
).split()

_state = {"installed": False}


def uses_cpu() -> bool:
    """Whether this machine trains on the CPU platform (no CUDA device is visible)."""
    return not torch.cuda.is_available()


def install() -> bool:
    """Make Megatron-Core runnable on the CPU. Idempotent; returns whether the adapter is in place.

    Raises:
        AssertionError: `megatron.core` was imported before, so that patches of its imports would be missed.
    """
    if not uses_cpu():
        return False
    if _state["installed"]:
        return True
    assert "megatron.core.tensor_parallel" not in sys.modules, "install() must run before megatron is imported"
    _replace_runtime()
    _replace_random()
    _replace_devices()
    _replace_type_names()
    _replace_backends()
    _disable_jit()
    from megavlm.platform import cpu_megatron

    cpu_megatron.apply()
    _state["installed"] = True
    return True


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


def _no_operation(name: str) -> Callable[..., None]:
    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    nothing.__name__ = name
    return nothing


class _Event(torch.cpu.Event):
    """An event that measures host time: on the CPU every call is already synchronous."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()
        self.time_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return (end.time_s - self.time_s) * 1e3


class _Stream(torch.cpu.Stream):
    """A stream with nothing to wait for."""

    def __init__(self, device: Any = None, priority: int = 0, **_kwargs: Any) -> None:
        super().__init__()

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:  # type: ignore[override]
        return event or _Event()


def _replace_runtime() -> None:
    """torch.cuda's device, stream and profiler-range calls."""
    cuda: Any = torch.cuda
    default_stream = _Stream()
    current = [default_stream]

    @contextlib.contextmanager
    def stream(new: _Stream | None) -> Iterator[None]:
        before, current[0] = current[0], new or current[0]
        try:
            yield
        finally:
            current[0] = before

    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _no_operation(name))
    cuda.current_device = lambda: CPU  # for the many `device=torch.cuda.current_device()`
    cuda.device_count = lambda: 1  # a checkpoint worker asks for `rank % device_count()`
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, stream
    cuda.current_stream = lambda device=None: current[0]
    cuda.default_stream = lambda device=None: default_stream
    cuda.nvtx.range_push = _no_operation("range_push")
    cuda.nvtx.range_pop = _no_operation("range_pop")
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()
    torch.Tensor.record_stream = _no_operation("record_stream")  # type: ignore[method-assign]


class _Generators(dict):
    """`torch.cuda.default_generators[device]` is the one CPU generator, whatever the device."""

    def __missing__(self, key: Any) -> torch.Generator:
        return torch.default_generator


def _replace_random() -> None:
    """CUDA's random state is the CPU generator's: Megatron-Core's tracker forks and restores that."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = cuda.random.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda.default_generators = _Generators()
    # Megatron-Core warns when the CPU state moves inside a CUDA fork; here they are the same state.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _replace_devices() -> None:
    """Everything that says 'cuda' in a call makes or keeps a CPU tensor."""
    # `with torch.device("meta")` knows the factories by identity, from a list made at its first use. Make it now, or
    # it would hold the wrappers while it is handed the originals, and models would not be built on meta.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    to = tensor.to

    def move(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    tensor.to = move


class _TypeName(str):
    """'torch.FloatTensor' that also equals 'torch.cuda.FloatTensor', for Megatron-Core's type checks."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, str(other).replace("torch.cuda.", "torch.", 1))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _replace_type_names() -> None:
    tensor: Any = torch.Tensor
    type_of = tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    tensor.type = type_name


def _with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if isinstance(a, str) and "nccl" in a else a for a in args)
        if isinstance(kwargs.get("backend"), str) and "nccl" in kwargs["backend"]:
            kwargs["backend"] = "gloo"
        kwargs.pop("device_id", None)
        kwargs.pop("device_ids", None)
        return function(*args, **kwargs)

    return call


def _ragged_all_gather(equal_all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """gloo gathers equal sizes only; unequal first dimensions (expert parallel) are padded and cut."""

    def all_gather(outputs: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        sizes = [output.shape[0] if output.dim() else 0 for output in outputs]
        if len(set(sizes)) <= 1:
            return equal_all_gather(outputs, tensor, group=group, async_op=async_op)
        assert not async_op, "a ragged all_gather is synchronous on gloo"
        longest = max(sizes)
        buffers = [tensor.new_empty(longest, *tensor.shape[1:]) for _ in sizes]
        padding = tensor.new_zeros(longest - tensor.shape[0], *tensor.shape[1:])
        equal_all_gather(buffers, torch.cat([tensor, padding]), group=group)
        for output, buffer in zip(outputs, buffers, strict=True):
            output.copy_(buffer[: output.shape[0]])
        return None

    return all_gather


def _ragged_reduce_scatter(equal_reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        output: torch.Tensor,
        inputs: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [tensor.shape[0] for tensor in inputs]
        if len(set(sizes)) <= 1:
            return equal_reduce_scatter(output, inputs, op=op, group=group, async_op=async_op)
        assert not async_op, "a ragged reduce_scatter is synchronous on gloo"
        whole = torch.cat(list(inputs))
        torch.distributed.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(sizes)[torch.distributed.get_rank(group)])
        return None

    return reduce_scatter


def _replace_backends() -> None:
    """'nccl' literals become gloo; NCCL-only arguments are dropped; ragged collectives work."""
    replacements: dict[str, Callable[..., Any]] = {
        "all_gather": _ragged_all_gather(distributed_c10d.all_gather),
        "reduce_scatter": _ragged_reduce_scatter(distributed_c10d.reduce_scatter),
    }
    for name in ("init_process_group", "new_group", "new_subgroups_by_enumeration", "barrier"):
        replacements[name] = _with_gloo(getattr(distributed_c10d, name))
    for name, function in replacements.items():
        setattr(distributed_c10d, name, function)
        setattr(torch.distributed, name, function)


def _disable_jit() -> None:
    """Megatron-Core's jit_fuser is torch.compile, which builds C++ at the first call; use its own no-op instead."""
    module: Any = types.ModuleType("megatron.core.jit")
    module.noop_decorator = module.jit_fuser = lambda function: function
    module.enable_jit_fuser = module.disable_jit_fuser = _no_operation("jit_fuser_switch")
    sys.modules["megatron.core.jit"] = module
