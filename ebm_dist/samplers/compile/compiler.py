"""Calls torch's compiler, and says when it is missing or fails."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from ebm_dist.core.errors import UserError
from ebm_dist.files.private import own_directory, scratch
from ebm_dist.samplers.compile.recorded_noise import CannotCompile

TURN_S = 300.0
"""The longest wait for another process of this machine that compiles."""

NICENESS = 5
"""Niceness of the C++ compiler beside rounds, over that of the worker. Where all cores are busy it
gets a third of a step's share; with 10 it would get a ninth, and most runs would end before it."""

SWITCH_S = 5e-4
"""A thread that compiles beside rounds hands over Python's interpreter after so long, in place of
Python's 5 ms."""

log = logging.getLogger("ebm_dist")


class CompilerFailed(CannotCompile):
    """The compiler is missing or failed: the fault lies with this machine, not with the steps."""


def missing() -> str | None:
    """Why this machine cannot compile for its CPU; None if it can."""
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
    """Do the compiler's first trace in the calling thread, which must be the one that runs rounds.

    torch's compiler (2.13) traces a function of its own when it is first used in a process, and a
    symbolic trace replaces `Module.__call__` for all threads: an energy that another thread calls
    meanwhile raises NameError (module is not installed as a submodule).
    """
    # If this internal name is missing or has changed, the compiler itself reports the problem.
    with contextlib.suppress(ImportError, AttributeError):
        from torch._inductor.loop_body import InterpreterShim

        InterpreterShim._dummy_gm()


def take_own_cache() -> None:
    """Make torch's compiler cache its code in a directory that only this user can write.

    torch loads and runs cached code again. By default it uses a directory in /tmp with a
    predictable name, whoever created it.

    Raises:
        CompilerFailed: there is no such directory.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Some torch modules set the variable to the default on import; that counts as unset.
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


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait while another process compiles into the same cache.

    The workers of a node compile the same steps at the same moment: the second one then finds
    what the first one made, and two compilers do not share the cores of the node with the steps.
    A process that hangs holds the others up for `TURN_S` at most.
    """
    # Where fcntl is missing the import warns, also in commands that compile nothing.
    from filelock import FileLock, Timeout

    cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    cache.mkdir(parents=True, exist_ok=True)
    turn = FileLock(cache / "ebm_dist.lock")
    try:
        turn.acquire(timeout=TURN_S, poll_interval=0.2)
    except (Timeout, OSError, NotImplementedError) as error:
        log.debug("compiles without a turn: %s", error)
    try:
        yield
    finally:
        turn.release()


_BESIDE = threading.Lock()


@contextlib.contextmanager
def beside_rounds() -> Iterator[None]:
    """Let the steps go first while the calling thread compiles; one thread at a time.

    The C++ compiler runs at a lower priority. The thread keeps its own: it holds the interpreter
    most of the time, so steps in this process would wait for a thread that the kernel does not
    run. Small operations beside a thread of Python, on two busy cores: 150 steps/s, 40 where the
    thread has niceness 10, and 170 where it hands over the interpreter after `SWITCH_S`, which is
    as many as without it.
    """
    with _BESIDE:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            with _low_priority():
                yield
        finally:
            sys.setswitchinterval(usual)


@contextlib.contextmanager
def _low_priority() -> Iterator[None]:
    """Start C++ compilers by `nice`. If torch's internal name has changed, they keep theirs."""
    nice, cpp_builder = shutil.which("nice"), cast(Any, None)
    with contextlib.suppress(ImportError):
        cpp_builder = cast(Any, importlib.import_module("torch._inductor.cpp_builder"))
    run = getattr(cpp_builder, "run_compile_cmd", None)
    if nice is None or run is None:
        yield
        return

    def low(cmd_line: str, cwd: str) -> None:
        # Added here and not to the name of the compiler, which is part of the key of torch's cache.
        run(f"{nice} -n {NICENESS} {cmd_line}", cwd)

    cpp_builder.run_compile_cmd = low
    try:
        yield
    finally:
        cpp_builder.run_compile_cmd = run


def load_source(source: str) -> None:
    """Compile C++ against torch and load it; torch caches the result as in `compile_graph`.

    Raises:
        CompilerFailed: the compiler failed.
    """
    take_own_cache()
    try:
        from torch._inductor.codecache import CppCodeCache

        # torch's default for its own code disables fused multiply-add.
        CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompilerFailed(f"the compiler failed: {line}") from error


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], Any]:
    """A function of a list of tensors like `inputs` that computes `graph`.

    torch caches results on disk (TORCHINDUCTOR_CACHE_DIR), so one machine compiles the same steps
    once. A call checks no guards: the caller guarantees shapes, strides and dtypes.

    Raises:
        CompilerFailed: there is no compiler, or it failed.
    """
    on_cpu = inputs[0].device.type == "cpu"
    if on_cpu and (why := missing()) is not None:
        raise CompilerFailed(why)
    take_own_cache()
    patches: dict[str, Any] = {
        # Compile in this process: a worker has one or two cores, and a pool of compiler processes
        # would outlive it.
        "compile_threads": 1,
        # C++ also for the calls between kernels, which dominate small energies. It halves the
        # compilation time too.
        "cpp_wrapper": on_cpu,
        # These override the environment: `capture` records blocks, and noise drawn by the graph
        # has no fallback.
        "triton.cudagraphs": False,
        "fallback_random": False,
    }
    try:
        import torch._inductor as inductor

        def attempt() -> Any:
            compiled = inductor.standalone_compile(
                graph,
                list(inputs),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": patches},
            )
            compiled(*inputs)
            return compiled

        with one_at_a_time(), torch.no_grad():
            try:
                compiled = attempt()
            except Exception as error:
                if not _drop_torn_library(error):
                    raise
                compiled = attempt()
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CompilerFailed(f"the compiler failed: {line}") from error

    def run(tensors: list[Tensor]) -> Any:
        with torch.no_grad():
            return compiled(*tensors)

    return run


def _drop_torn_library(error: BaseException | None) -> bool:
    """Delete the library in torch's cache that `error` says cannot be loaded, if it is that.

    torch links to the library's last name, so a process that is killed meanwhile leaves an empty
    file, which torch would go on trying to load.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    while error is not None:
        library = Path(error.path) if isinstance(error, ImportError) and error.path else None
        if library is not None and library.is_relative_to(cache_dir()):
            library.unlink(missing_ok=True)
            return True
        error = error.__cause__ or error.__context__
    return False
