"""What lies beneath `torch.cuda`: one device, its streams, events and graphs; see `cuda_card`."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

SYNC = "CUDA error: operation not permitted when stream is capturing"

state = SimpleNamespace(device=None, capturing=None, backend=None, streams=0)
"""`device` is None until somebody has set it; `capturing` is the graph that is being recorded."""

_local = threading.local()


def recording() -> Any:
    """The graph that this thread records, or None."""
    graph = state.capturing
    return graph if graph is not None and graph.thread == threading.get_ident() else None


class _StreamBase:
    def __new__(cls, priority: int = 0, stream_id: int | None = None, **kwargs: Any) -> Any:
        self = object.__new__(cls)
        if stream_id is None:
            state.streams += 1
            stream_id = state.streams
        self.stream_id = self.cuda_stream = stream_id
        self.device_index, self.device_type, self.device = 0, 1, torch.device("cuda", 0)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _refuse_in_capture()

    def __eq__(self, other: Any) -> bool:
        return self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class _EventBase:
    def __new__(
        cls, enable_timing=False, blocking=False, interprocess=False, external=False
    ) -> Any:
        self = object.__new__(cls)
        self.cuda_event, self.timed = 0, enable_timing
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Any) -> None:
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"record: expected a stream, got {type(stream).__name__}")
        self.cuda_event = 1

    def wait(self, stream: Any) -> None:
        if not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"wait: expected a stream, got {type(stream).__name__}")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _refuse_in_capture()

    def elapsed_time(self, end: Any) -> float:
        if not (self.timed and end.timed and self.cuda_event and end.cuda_event):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return 1.0


class _GraphBase:
    def __new__(cls, keep_graph: bool = False) -> Any:
        self = object.__new__(cls)
        self.operations: list[Any] = []
        self.ended = False
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"Unknown capture error mode {capture_error_mode}")
        if current_stream() == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.thread, state.capturing = threading.get_ident(), self

    def capture_end(self) -> None:
        state.capturing, self.ended = None, True

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again)):
                    # Memory of its own, and no view of what came before.
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.operations.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 1)


def _refuse_in_capture() -> None:
    if recording() is not None:
        raise RuntimeError(SYNC)


def current_stream() -> int:
    return getattr(_local, "stream", 0)


def _set_device(index: Any) -> None:
    if not isinstance(index, int) or index != 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    state.device = index


def _exchange_device(index: int) -> int:
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return 0 if index == 0 else -1


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    _local.stream = stream_id


def functions() -> dict[str, Any]:
    memory = {
        f"{pool}.{what}.{when}": 0
        for pool in ("allocated_bytes", "reserved_bytes", "active_bytes")
        for what in ("all", "large_pool", "small_pool")
        for when in ("current", "peak", "allocated", "freed")
    }
    return {
        "_cuda_init": lambda: None,
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": _set_device,
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _exchange_device,
        "_cuda_synchronize": _refuse_in_capture,
        "_cuda_emptyCache": lambda: None,
        "_host_emptyCache": lambda: None,
        "_cuda_getCurrentStream": lambda index: (current_stream(), 0, 1),
        "_cuda_getDefaultStream": lambda index: (0, 0, 1),
        "_cuda_setStream": _set_stream,
        "_cuda_isCurrentStreamCapturing": lambda: state.capturing is not None,
        "_cuda_memoryStats": lambda index: memory,
        "_cuda_memoryStatsAsNestedDict": lambda index: {},
        "_cuda_resetPeakMemoryStats": lambda index: None,
        "_cuda_resetAccumulatedMemoryStats": lambda index: None,
        "_cuda_getCompiledVersion": lambda: 12080,
    }


def insert() -> None:
    """Put it beneath `torch.cuda`."""
    torch.backends.cuda.is_built = lambda: True
    for name, function in functions().items():
        setattr(torch._C, name, function)
    torch.cuda._cudart = object()
    torch.cuda._queued_calls.clear()  # questions of the library's age
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = _exchange_device
    torch.cuda.graphs._cuda_isCurrentStreamCapturing = lambda: state.capturing is not None
    torch.cuda.nccl.version = lambda: (2, 27, 3)
    torch.version.cuda = "12.8"
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=2**34, multi_processor_count=132
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.mem_get_info = lambda device=None: (2**33, 2**34)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *a: 0
    for base, ours in (
        (torch._C._CudaStreamBase, _StreamBase),
        (torch._C._CudaEventBase, _EventBase),
        (torch._C._CUDAGraph, _GraphBase),
    ):
        for name, value in vars(ours).items():
            if name not in ("__dict__", "__weakref__", "__doc__", "__module__"):
                setattr(base, name, value)
