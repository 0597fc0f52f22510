"""Safetensors files, with clear errors for a full disk and for a damaged file."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebm_dist.core.errors import UserError


def save_tensors(
    entries: Mapping[str, Tensor | np.ndarray],
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `entries` to `path`, in a directory that this process has created.

    Raises:
        OSError: the write failed.
    """
    tensors = {key: _contiguous(value) for key, value in entries.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
        path.chmod(mode)  # safetensors creates files with mode 600
    except SafetensorError as error:
        # safetensors reports a full disk by its own type, with errno in the message.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number.group(1))
        raise OSError(code, os.strerror(code), str(path)) from error


def tensors_or_refuse(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is damaged or of another format."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def _contiguous(value: Tensor | np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
    return tensor.detach().cpu().contiguous()
