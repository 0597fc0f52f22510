"""The one call of torch's compiler, and what may be missing for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ebm_dist.core.errors import UserError
from ebm_dist.files.private import own_directory, scratch
from ebm_dist.samplers.compile.recorded_noise import CannotCompile


class CompilerFailed(CannotCompile):
    """The compiler is missing or failed: a fault of this machine rather than of the steps."""


def missing() -> str | None:
    """Why nothing can be compiled for the CPU of this machine, or None."""
    try:
        from torch._inductor import standalone_compile  # noqa: F401
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return f"torch {torch.__version__} has no standalone compiler; torch 2.8 does"
    try:
        get_cpp_compiler()
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"there is no C++ compiler ({line}); install g++ or name one in CXX"
    return None


def prepare() -> None:
    """Do now what another thread must not do: to be called by the one that runs rounds.

    torch's compiler (2.13) traces a function of its own when it is first used in a process, and a
    symbolic trace replaces `Module.__call__` for all threads: an energy called meanwhile in another
    raises NameError (module is not installed as a submodule).
    """
    # Without these, or where they are called otherwise, the compiler says what is the matter.
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.loop_body import InterpreterShim

        InterpreterShim._dummy_gm()


def take_own_cache() -> None:
    """Have torch keep what it compiles where nobody else can have put it: it loads that again.

    By itself it takes a directory in /tmp, of a name that anybody can know, as it finds it.

    Raises:
        CompilerFailed: there is no such place.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Some of torch's modules set the variable to the default when they are imported.
    usual = Path(default_cache_dir())
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(usual)) not in ("", str(usual)):
        return
    try:
        try:
            own = own_directory(usual)
        except UserError:
            own = scratch() / "torchinductor"
    except UserError as error:
        raise CompilerFailed(str(error)) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)


def load_source(source: str) -> None:
    """Compile C++ against torch and load it, once a machine, as `compile_graph` does.

    Raises:
        CompilerFailed: the compiler failed.
    """
    take_own_cache()
    try:
        from torch._inductor.codecache import CppCodeCache

        # torch has its own code compiled without fused multiplications and additions.
        CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompilerFailed(f"the compiler failed: {line}") from error


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """A function of a list of tensors like `inputs` that computes `graph`.

    Results are kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), so the same steps on the same
    machine are compiled once. No guards are checked at a call: the caller answers for shapes,
    strides and types.

    Raises:
        CompilerFailed: there is no compiler, or it failed.
    """
    on_cpu = inputs[0].device.type == "cpu"
    if on_cpu and (why := missing()) is not None:
        raise CompilerFailed(why)
    take_own_cache()
    patches: dict[str, Any] = {
        # In this process: a worker's share of cores is one or two, and a pool of compiling
        # processes would outlive it.
        "compile_threads": 1,
        # The calls between kernels in C++ as well: small energies consist of them. It also
        # compiles in half of the time.
        "cpp_wrapper": on_cpu,
        # Whatever the environment says: blocks are recorded by `capture`, and noise that the
        # graph draws has no other form.
        "triton.cudagraphs": False,
        "fallback_random": False,
    }
    try:
        import torch._inductor as inductor

        with torch.no_grad():
            compiled = inductor.standalone_compile(
                graph,
                list(inputs),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": patches},
            )
            compiled(*inputs)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompilerFailed(f"the compiler failed: {line}") from error

    def run(tensors: list[Tensor]) -> Any:
        with torch.no_grad():
            return compiled(*tensors)

    return run
