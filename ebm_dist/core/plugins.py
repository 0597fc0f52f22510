"""Imports a user's own code that a config names, and checks the names.

A config names an object as `my_pkg.nets:Net`, and modules to import as `plugins: [my_pkg.ebm]`.
Checking a name imports nothing. Only `train`, and a command with `--plugin`, import modules. An
import runs the module's code, so training a config with plugins runs the code of its author.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
import socket
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from ebm_dist.core.errors import UserError, named
from ebm_dist.core.section import nearest

ENTRY_POINTS = "ebm_dist.plugins"
"""The entry point group of installed packages whose modules register sections."""

USER_METRICS = "user/"
"""Prefix of the metrics of a user's own objective or sampler."""

IN_SESSION = "__main__"
"""Module of a target that cannot be imported, because its object was given from Python."""

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_TARGET = re.compile(rf"({_MODULE.pattern}):([A-Za-z_]\w*|<lambda>)", re.ASCII)


def _module_name(name: str) -> str:
    if not _MODULE.fullmatch(name) or name == IN_SESSION:
        raise ValueError(f"expected the name of a module, such as my_pkg.ebm, got {name!r:.80}")
    _refuse_standard_library(name)
    return name


def _target(target: str) -> str:
    found = _TARGET.fullmatch(target)
    if found is None:
        raise ValueError(
            "expected MODULE:NAME, such as my_pkg.nets:Net, where NAME is one name that the module "
            f"defines, got {target!r:.80}"
        )
    if found[1] != IN_SESSION:
        _refuse_standard_library(found[1])
    return target


def _refuse_standard_library(module: str) -> None:
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{module} is of Python's standard library; name a module of your own, such as "
            "my_pkg.nets"
        )


ModuleName = Annotated[str, Field(max_length=200), AfterValidator(_module_name)]
"""The name of a module of the user; the standard library is refused. Imports nothing."""

Target = Annotated[str, Field(max_length=200), AfterValidator(_target)]
"""`my_pkg.nets:Net`, a class or function by the module that defines it. Imports nothing."""


def load_target(target: str, key: str, *, instances: bool = False) -> Any:
    """Import the module of `target`, and return the class or function that it names.

    Args:
        key: the key of the target in the config, such as `energy.target`.
        instances: also allow an object that is an instance of a class outside the standard library.

    Raises:
        UserError: in one line; the module cannot be imported on this node, raises while it is
            imported, or does not define a class or function of that name itself.
    """
    try:
        _target(target)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None
    module_name, _, name = target.partition(":")
    if module_name == IN_SESSION:
        raise UserError(
            f"{key}: {name} was given from Python and lies in no module that can be imported; call "
            f"ebm_dist.train(..., {key.partition('.')[0]}=...) again, or move it to a module"
        )
    module = _import(module_name, key)
    found = getattr(module, name, None)
    if found is None:
        close = nearest(name, _own_names(module))
        where = getattr(module, "__file__", None) or "a package without code"
        raise UserError(f"{key}: {module_name} ({where}) has no {name!r}{close}")
    if instances and not hasattr(found, "__qualname__"):
        if type(found).__module__.partition(".")[0] in sys.stdlib_module_names:
            raise UserError(
                f"{key}: {target} is a plain {type(found).__name__}; wrap it in a class"
            )
        return found
    # An instance has no name, and `__module__` is that of its class.
    if not callable(found) or not hasattr(found, "__qualname__"):
        raise UserError(
            f"{key}: expected a class or a function, {target} is of type {type(found).__name__}"
        )
    if found.__module__ != module_name:
        raise UserError(
            f"{key}: {target} is defined in {found.__module__}; name a class or function by the "
            "module that defines it"
        )
    return found


def target_of(given: Any) -> str:
    """The target to record for an object given from Python: the name of its class or function.

    If that cannot be imported (`__main__`, a lambda, a class inside a function), the target begins
    with `__main__:`, which `load_target` refuses in one line.
    """
    named = given if hasattr(given, "__qualname__") else type(given)
    name = named.__qualname__.rpartition(".")[2]
    reached = getattr(sys.modules.get(named.__module__), name, None)
    if reached is not named or named.__module__.partition(".")[0] in sys.stdlib_module_names:
        return f"{IN_SESSION}:{name}"
    return f"{named.__module__}:{name}"


def import_plugins(
    names: Sequence[str], key: str = "plugins", *, directory: str | None = None
) -> None:
    """Import the modules `names` and those of the entry points, which register their sections.

    The working directory is searched last, so that a file in it does not hide an installed package.
    Ray's actors search the same directory.

    Args:
        directory: `runtime.working_dir`, which is searched too.

    Raises:
        UserError: in one line, as in `load_target`.
    """
    folders = [os.getcwd()] + ([directory] if directory else [])
    sys.path += [path for path in map(os.path.abspath, folders) if path not in sys.path]
    for name in names:
        try:
            _module_name(name)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None
        _import(name, key)
    for point in _entry_points():
        owner = point.dist.name if point.dist is not None else point.name
        _import(point.module, f"entry point {ENTRY_POINTS} of the package {owner}")


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=ENTRY_POINTS)


def plugin_hint(names: object) -> str:
    """Advice for a config with a section that a plugin may register: the flags to add.

    Args:
        names: the unchecked value of `plugins` in the config.
    """
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    missing = [
        name
        for name in (*listed, *(point.module for point in _entry_points()))
        if name not in sys.modules
    ]
    if not missing:
        return ""
    flags = " ".join(f"--plugin {name}" for name in missing)
    return f"; a plugin may have it: add {flags}, which imports the module"


def modules_of(section: object) -> Iterator[str]:
    """The modules whose code would run if a section, given as plain values, was built."""
    if isinstance(section, Mapping):
        target = section.get("target")
        if "module" in (section.get("name"), section.get("source")) and isinstance(target, str):
            yield target.partition(":")[0]
        section = list(section.values())
    if isinstance(section, list | tuple):
        for item in section:
            yield from modules_of(item)


def require_named(section: object, plugins: Sequence[str], where: str) -> None:
    """Raise UserError if a section, given as plain values, needs a module that is not in `plugins`.

    Args:
        plugins: the modules that may be imported.
        where: the file and the key of the section.

    Raises:
        UserError: the section names a module that is not in `plugins`.
    """
    for module in modules_of(section):
        if module == IN_SESSION:
            raise UserError(
                f"{where}: was given from Python and lies in no module; pass it again, "
                'ebm_dist.load_energy("PATH", energy=NET)'
            )
        if module not in plugins:
            raise UserError(
                f"{where}: is code of the module {module}, which is not imported unasked; if you "
                f"trust it, add --plugin {module}, in Python plugins=[{module!r}]"
            )


def _import(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(_raised(name, key, error)) from error
        raise UserError(
            f"{key}: the module {name} cannot be imported on {socket.gethostname()} (no module "
            f"named {error.name!r}); install it there, start in the directory that holds it, or "
            "set runtime.working_dir to that directory, which Ray then ships to every node"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(_raised(name, key, error)) from error


def _raised(name: str, key: str, error: BaseException) -> str:
    what = f"raises while it is imported: {named(error)} ({_place(error)})"
    return f"{key}: the module {name} {what}"


def _place(error: BaseException) -> str:
    """The file and line of the user's own code that raised `error`."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    paths = sysconfig.get_paths()
    others = ("<frozen", __file__, paths["stdlib"], paths["purelib"], paths["platlib"])
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    last = (own or list(frames))[-1]
    return f"{last.filename}:{last.lineno}"


def _own_names(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
