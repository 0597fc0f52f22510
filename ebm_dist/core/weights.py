"""The weights of an energy as one flat float32 array, the form in which actors exchange them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

WireName = Literal["float32", "bfloat16"]

_CACHE_LINE = 64


def check_trainable(module: nn.Module, who: str) -> None:
    """Raise ValueError, which begins with `who`, if a weight of `module` cannot be trained."""
    for name, weight in module.named_parameters():
        if is_lazy(weight):
            raise ValueError(f"{who} has lazy weights ({name}); give their sizes")
        if weight.ndim == 0:  # DeepSpeed cannot broadcast it
            raise ValueError(
                f"{who} has a weight without a dimension ({name}); give it the shape (1,)"
            )
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{who} has weights of {weight.dtype} ({name}), expected float32; "
                "learner.precision: bf16 computes in bfloat16"
            )


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Positions of a module's parameters and floating-point buffers in the flat array.

    It is one array because a state dict of many tensors costs Ray an order of magnitude more
    to send than the same bytes in one piece.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_parameters: int
    """How many leading numbers of the array are parameters; buffers follow."""

    @classmethod
    def of(cls, module: nn.Module) -> FlatLayout:
        """The layout of `module`: parameters, then persistent floating-point buffers.

        Buffers are included because spectral norm keeps its power-iteration vectors there; a
        worker without them would sample another energy.
        """
        tensors = flat_tensors(module)
        return cls(
            tuple(tensors),
            tuple(tuple(t.shape) for t in tensors.values()),
            sum(parameter.numel() for parameter in module.parameters()),
        )

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def pack(self, module: nn.Module) -> Tensor:
        """A new flat (size,) float32 tensor on the CPU with the weights of `module`."""
        tensors = flat_tensors(module)
        flat = torch.empty(self.size, dtype=torch.float32)
        with torch.no_grad():
            for name, view in self.views(flat).items():
                view.copy_(tensors[name])
        return flat

    def load_(self, module: nn.Module, flat: Tensor | np.ndarray) -> None:
        """Copy `flat` (size,), float32 or from `as_sent`, into the tensors of `module`."""
        flat = self._checked(flat)
        tensors = flat_tensors(module)
        with torch.no_grad():
            for name, view in self.views(flat).items():
                tensors[name].copy_(view)

    def bind_(self, module: nn.Module, flat: np.ndarray) -> int:
        """Make the parameters of a frozen `module` views of `flat` (size,), without a copy.

        `flat` is in Ray's shared memory, so all workers of a node share one copy of the weights. It
        may be read-only: writing to a parameter afterwards would crash the process. Some weights
        are copied all the same: buffers; parameters on a GPU or with other strides than the view;
        and views that do not begin on a cache line, since torch's own memory does and kernels may
        round differently otherwise. Weights in bfloat16 are first converted to float32.

        Returns:
            The number of copied numbers.
        """
        tensors = flat_tensors(module)
        device = next(iter(tensors.values())).device if tensors else None
        whole, num_copied = self._checked(flat).to(device), 0  # to a GPU in one piece
        with torch.no_grad():
            for name, view in self.views(whole).items():
                tensor = tensors[name]
                alike = tensor.dtype == view.dtype and tensor.stride() == view.stride()
                ours = isinstance(tensor, nn.Parameter) and tensor.device.type == "cpu"
                if ours and alike and view.data_ptr() % _CACHE_LINE == 0:
                    assert not tensor.requires_grad, f"{name} is trained: it cannot be bound"
                    tensor.data = view
                    continue
                if ours:  # it may still be a view of the previous weights
                    tensor.data = torch.empty_like(tensor)
                tensor.copy_(view)
                num_copied += view.numel()
        return num_copied

    def _checked(self, flat: Tensor | np.ndarray) -> Tensor:
        with warnings.catch_warnings():
            # Arrays of Ray's object store are read-only, and nothing here writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            flat = torch.as_tensor(flat)
        if flat.dtype == torch.uint16:
            flat = flat.view(torch.bfloat16).float()
        if flat.numel() != self.size:
            raise ValueError(
                f"flat weights have {flat.numel()} numbers, the energy has {self.size}; "
                "both must come from the same `energy` section"
            )
        return flat

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> view into `flat`, shaped like the weight."""
        out, offset = {}, 0
        for name, shape in zip(self.names, self.shapes):
            count = int(np.prod(shape))
            out[name] = flat[offset : offset + count].view(shape)
            offset += count
        return out


def as_sent(flat: np.ndarray, wire: WireName) -> np.ndarray:
    """`flat` (N,) float32 in the format for workers: unchanged, or bfloat16 bits as uint16.

    Rounds to the nearest bfloat16, with a relative error of at most 2^-9 per weight.
    """
    if wire == "float32":
        return flat
    return torch.from_numpy(flat).bfloat16().view(torch.uint16).numpy()


def flat_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent floating-point buffers of `module`, by state-dict name.

    Raises:
        ValueError: a persistent buffer is not floating point, which the flat array cannot hold.
    """
    parameters = dict(module.named_parameters())
    tensors: dict[str, Tensor] = dict(parameters)
    persistent = module.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if name in parameters:
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"energy buffer {name!r} is {tensor.dtype}; only floating buffers travel with the "
                "weights: register it with persistent=False or as float32"
            )
        tensors[name] = tensor
    return tensors
