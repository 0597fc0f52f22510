"""A GPU that is not there: tensors of a CPU build of torch that refuse what CUDA does.

Such a tensor says that it is on cuda:0. Its numbers lie in host memory, in a storage with a mark,
so every operation gives real results. Python's view of it (`device`, `to`, `numpy`, `pin_memory`)
and a mode that sees every operation of torch, also those of a backward, keep the two memories
apart. `torch.cuda` itself is torch's own Python code, arguments and all; what is replaced is the C
library beneath it. So are streams, events and graphs: a graph replays the operations that were
recorded, on their memory.

`insert` changes torch for the whole process: call it in one that does nothing else.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda_library
import torch
import torch._dynamo  # before the card: with it, they would look for more of CUDA than there is
import torch._inductor.inductor_prims
import torch.distributed as dist
from cuda_library import SYNC, recording, state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")

_MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
)
_FACTORIES = ("empty", "zeros", "ones", "full", "arange", "eye", "linspace", "randn", "rand")
_FACTORIES += ("randint", "randperm")

# Operations that take tensors of both memories.
_CROSSING = {"copy_", "_foreach_copy_", "_to_copy", "index", "index_put_", "index_put", "set_"}

_local = threading.local()
_generators: dict[int, torch.device] = {}
_kept: list[Any] = []  # generators, whose addresses stay their own


def place(tensor: Tensor) -> torch.device | None:
    """Where the numbers of `tensor` are; None for one that torch made inside an operation."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor of a tracer has none
        return None
    return getattr(storage, "_place", HOST)


def put(tensor: Tensor, where: torch.device | None) -> Tensor:
    """`tensor` with its storage marked."""
    tensor.untyped_storage()._place = where
    return tensor


def on_card(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and place(tensor) == CARD and not _is_away()


def _is_away() -> bool:
    return getattr(_local, "away", False)


@contextmanager
def away() -> Iterator[None]:
    """Within, this thread sees all as on the CPU: for torch's tracer, which runs below the mode."""
    _local.away = True
    try:
        yield
    finally:
        _local.away = False


class Card(TorchDispatchMode):
    """Sees every operation of its thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_away():
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        wanted = kwargs.get("device")
        pinned = bool(kwargs.pop("pin_memory", False))
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = HOST
        args = tuple(HOST if isinstance(a, torch.device) and a.type == "cuda" else a for a in args)
        _check(func, name, inputs, args, kwargs)
        out = func(*args, **kwargs)
        where = _place_of_results(name, inputs, wanted)
        known = {t.untyped_storage()._cdata for t in inputs}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                put(t, where)
                t.untyped_storage()._pinned = pinned
        if recording() is not None:
            state.capturing.operations.append((func, args, kwargs, out))
        return out


def _check(func: Any, name: str, inputs: list[Tensor], args: Any, kwargs: Any) -> None:
    places = [place(t) for t in inputs]
    card = CARD in places
    apart = [t for t, where in zip(inputs, places) if where == HOST and t.dim() > 0]
    if func.namespace == "c10d":
        if state.backend == "nccl" and HOST in places and name != "barrier":
            raise RuntimeError("No backend type associated with device type cpu")
        return
    if name.startswith("_fused_") and card and HOST in places:
        raise RuntimeError(f"{name}: {_MIXED}")  # counters of steps too, which have no dimension
    if card and apart and name not in _CROSSING:
        raise RuntimeError(f"{func}: {_MIXED}")
    if name in ("index", "index_put_", "index_put") and places[0] == HOST and card:
        raise RuntimeError(
            f"{func}: indices should be either on cpu or on the indexed tensor's device"
        )
    generator = kwargs.get("generator")
    if generator is not None:
        drawn_on = kwargs["device"] if not inputs else places[0]
        at = getattr(_local, "factory", None) or drawn_on
        its = _generators.get(generator._cdata, HOST)
        if at is not None and at.type != its.type:
            raise RuntimeError(f"Expected a '{at}' device type for generator but found '{its}'")
    if recording() is not None:
        if name == "_local_scalar_dense" or name == "nonzero":
            raise RuntimeError(SYNC)
        if card and apart:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        if generator is not None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


def _place_of_results(name: str, inputs: list[Tensor], wanted: Any) -> torch.device | None:
    if wanted is not None and torch.device(wanted).type == "cuda":
        return CARD
    if inputs and (wanted is None or name == "_to_copy"):
        places = {place(t) for t in inputs}
        return CARD if CARD in places else HOST if HOST in places else None
    # torch itself makes tensors within an operation, and says here that they are on the CPU.
    return getattr(_local, "factory", None)


# --- what Python sees of a tensor -------------------------------------------------------------


def _moved(self: Tensor, where: torch.device, *, copy: bool, layout: Any) -> Tensor:
    if not copy and place(self) in (where, None):
        return self
    if layout is None:
        layout = torch.preserve_format
    return put(self.clone(memory_format=layout), where)


def _faces(cls: Any) -> dict[str, Any]:
    own_device = cls.device.__get__
    real = {
        n: getattr(cls, n) for n in ("to", "numpy", "__array__", "__deepcopy__", "record_stream")
    }

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy, layout = kwargs.pop("copy", False), kwargs.pop("memory_format", None)
        kwargs.pop("non_blocking", None)
        args = tuple(a for a in args if not isinstance(a, bool))  # non_blocking, by position
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                device, dtype = value.device, value.dtype
            elif value is not None:
                device = value
        if dtype is not None:
            self = real["to"](self, dtype=dtype)
        if layout is not None:
            self = (
                self.contiguous(memory_format=layout) if layout != torch.preserve_format else self
            )
        if device is None:
            return self.clone() if copy else self
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type == "meta":
            return real["to"](self, device)
        if device.type == "cuda" and (device.index or 0) != 0:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return _moved(self, CARD if device.type == "cuda" else HOST, copy=copy, layout=layout)

    def numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if on_card(self):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        return real["numpy"](self, *args, **kwargs)

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:
        if on_card(self):
            raise RuntimeError(
                "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
            )
        pinned = self.clone()
        pinned.untyped_storage()._pinned = True
        return pinned

    def deepcopy(self: Tensor, memo: Any) -> Tensor:
        return put(real["__deepcopy__"](self, memo), place(self))

    def record_stream(self: Tensor, stream: Any) -> None:
        if not (on_card(self) and isinstance(stream, torch.cuda.Stream)):
            raise TypeError("record_stream: expected a CUDA tensor and a stream")

    return {
        "device": property(lambda self: CARD if on_card(self) else own_device(self)),
        "is_cuda": property(on_card),
        "is_cpu": property(lambda self: not on_card(self)),
        "get_device": lambda self: 0 if on_card(self) else -1,
        "to": to,
        "cpu": lambda self, **layout: to(self, "cpu", **layout),
        "cuda": lambda self, device=None, **more: to(self, "cuda" if device is None else device),
        "new_tensor": lambda self, data, **more: torch.tensor(
            data, **{"dtype": self.dtype, "device": self.device, **more}
        ),
        "numpy": numpy,
        "__array__": lambda self, dtype=None: (
            numpy(self) if dtype is None else numpy(self).astype(dtype)
        ),
        "pin_memory": pin_memory,
        "is_pinned": lambda self, device=None: getattr(self.untyped_storage(), "_pinned", False),
        "__deepcopy__": deepcopy,
        "record_stream": record_stream,
    }


def _factory(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, called from Python: it says truly where."""

    @functools.wraps(real)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        before = getattr(_local, "factory", None)
        device = kwargs.get("device")
        _local.factory = (
            CARD if device is not None and torch.device(device).type == "cuda" else HOST
        )
        try:
            return real(*args, **kwargs)
        finally:
            _local.factory = before

    return make


def _from_data(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(real)
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None:
            return real(data, *args, **kwargs)
        made = real(data, *args, **kwargs).to(device)
        return made.requires_grad_() if kwargs.get("requires_grad") else made

    return make


class Generator(torch._C.Generator):
    """torch.Generator; one of the card draws from the CPU's, with its mark."""

    def __new__(cls, device: Any = "cpu") -> Any:
        self = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            _generators[self._cdata] = CARD
            _kept.append(self)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return _generators.get(self._cdata, HOST)


def insert() -> Card:
    """Put the card into this process, for all of its threads; returns the mode of this one."""
    assert not torch.backends.cuda.is_built(), "this torch knows CUDA: run the tests marked gpu"
    cuda_library.insert()
    for name, value in _faces(Tensor).items():
        setattr(Tensor, name, value)
    for name in _FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _from_data(getattr(torch, name)))
    torch.Generator = Generator  # type: ignore[misc]
    _on_the_cpus_autocast()
    _nccl()
    run = threading.Thread.run

    def seen(self: threading.Thread) -> None:
        with Card():
            run(self)

    threading.Thread.run = seen  # type: ignore[method-assign]
    mode = Card()
    mode.__enter__()
    return mode


def _on_the_cpus_autocast() -> None:
    real = torch.autocast

    class Autocast(real):  # type: ignore[misc, valid-type]
        """The CPU's, whose list of operations is another than CUDA's."""

        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast = torch.amp.autocast = Autocast  # type: ignore[misc]


def _nccl() -> None:
    """NCCL of one process: gloo among one rank, and among more a group that moves nothing."""
    real = dist.init_process_group

    def init(backend: str, *args: Any, **kwargs: Any) -> None:
        if backend == "nccl":
            if state.device is None:
                raise RuntimeError("NCCL: no device was set; every rank would take the first")
            if kwargs.get("world_size", 1) > 1:
                from torch.testing._internal.distributed.fake_pg import FakeStore

                kwargs = {k: v for k, v in kwargs.items() if k != "init_method"}
                kwargs["store"] = FakeStore()
                real("fake", *args, **kwargs)
            else:
                real("gloo", *args, **kwargs)
        else:
            real(backend, *args, **kwargs)
        state.backend = backend

    dist.init_process_group = init
    dist.is_nccl_available = lambda: True
    dist.get_backend = lambda group=None: state.backend
