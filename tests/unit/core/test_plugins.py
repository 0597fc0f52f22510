"""Names of a user's own code: which are refused unread, and how an import fails."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from ebm_dist.core.errors import UserError
from ebm_dist.core.plugins import ModuleName, Target, import_plugins, load_target, target_of

NETS = '''
"""A module of a user."""
import functools
import os
from os import system
from subprocess import run
from torch import nn

class Net(nn.Module):
    pass

def make():
    return Net()

instance = Net()
shell = functools.partial(run, shell=True)
kept = functools.lru_cache(make)
number = 3
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `door_pkg` in the working directory, which is not on the path yet."""
    folder = tmp_path / "door_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(NETS)
    (folder / "broken.py").write_text("import math\n\n\nmath.sqrt(-1.0)\n")
    (folder / "untyped.py").write_text("def (\n")
    (folder / "needy.py").write_text("import no_such_module_at_all\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "door_pkg"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "target",
    [
        "os:system",
        "subprocess:run",
        "os.path:join",
        "builtins:eval",
        "my_pkg.nets",
        "my_pkg.nets:Net.inner",
        "my_pkg.nets:Net()",
        "my pkg:Net",
        "../nets:Net",
        ":Net",
        "nets:",
        "nets.py:Net\n",
        "x" * 300 + ":Net",
    ],
)
def test_a_target_of_the_wrong_form_or_of_the_standard_library_is_refused_unread(target: str):
    before = set(sys.modules)
    with pytest.raises(ValidationError):
        TypeAdapter(Target).validate_python(target)
    with pytest.raises(UserError, match=r"^energy.target: "):
        load_target(target, "energy.target")
    assert set(sys.modules) == before


def test_a_target_that_is_only_checked_imports_nothing():
    assert TypeAdapter(Target).validate_python("no_such_pkg.nets:Net") == "no_such_pkg.nets:Net"
    for name in ("os", "os.path", "__main__", "my_pkg:x", "my-pkg"):
        with pytest.raises(ValidationError):
            TypeAdapter(ModuleName).validate_python(name)


def test_a_class_a_function_and_what_wraps_one_are_loaded_from_the_working_directory(package: Path):
    import_plugins([])
    assert load_target("door_pkg.nets:Net", "energy.target").__name__ == "Net"
    assert isinstance(
        load_target("door_pkg.nets:make", "x")(), load_target("door_pkg.nets:Net", "x")
    )
    assert sys.path[-1] == str(package.parent), "a file there must not hide an installed package"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("system", "is defined in posix"),
        ("run", "is defined in subprocess"),
        ("shell", "of type partial"),
        ("instance", "of type Net"),
        ("number", "of type int"),
        ("os", "of type module"),
        ("Nett", "has no 'Nett'; did you mean 'Net'?"),
    ],
)
def test_what_a_module_did_not_define_itself_is_refused(package: Path, name: str, message: str):
    import_plugins([])
    with pytest.raises(UserError) as caught:
        load_target(f"door_pkg.nets:{name}", "energy.target")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_one_line_with_the_node_and_what_to_do():
    for module in ("no_such_pkg", "no_such_pkg.nets", "ebm_dist.no_such_module"):
        with pytest.raises(UserError) as caught:
            load_target(f"{module}:Net", "energy.target")
        line = str(caught.value)
        assert line.startswith(f"energy.target: the module {module} cannot be imported on ")
        assert socket.gethostname() in line
        assert "runtime.working_dir" in line
        assert "\n" not in line
    with pytest.raises(UserError, match=r"^plugins: the module no_such_pkg cannot"):
        import_plugins(["no_such_pkg"])


@pytest.mark.parametrize(
    ("module", "what", "where"),
    [
        ("broken", "ValueError: ", "broken.py:4"),
        ("untyped", "SyntaxError: ", "untyped.py:1"),
        ("needy", "ModuleNotFoundError: No module named 'no_such_module_at_all'", "needy.py:1"),
        ("leaves", "SystemExit: 3", "leaves.py:1"),
    ],
)
def test_a_module_that_raises_is_one_line_with_the_exception_and_its_line(
    package: Path, module: str, what: str, where: str
):
    with pytest.raises(UserError) as caught:
        import_plugins([f"door_pkg.{module}"])
    line = str(caught.value)
    assert line.startswith(f"plugins: the module door_pkg.{module} raises while it is imported: ")
    assert what in line
    assert line.endswith(f"({package / where})")


def test_an_object_given_from_python_records_a_target_that_names_it():
    class Inner:
        pass

    import_plugins([])
    assert target_of(functools.partial(print)) == "__main__:partial"
    assert target_of(Inner()) == target_of(Inner) == "__main__:Inner"
    assert target_of(lambda x: x) == "__main__:<lambda>"
    assert target_of(load_target) == "ebm_dist.core.plugins:load_target"
    assert target_of(UserError("x")) == "ebm_dist.core.errors:UserError"
    TypeAdapter(Target).validate_python("__main__:<lambda>")
    with pytest.raises(UserError, match=r"call ebm_dist.train\(..., energy=...\) again"):
        load_target("__main__:Inner", "energy.target")


def test_an_installed_package_registers_by_its_entry_point(tmp_path: Path):
    site = tmp_path / "site"
    info = site / "door_installed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: door-installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ebm_dist.plugins]\nmine = door_installed\n")
    (site / "door_installed.py").write_text("print('imported')\n")
    code = "from ebm_dist.core.plugins import import_plugins; import_plugins([])"
    program = f"import sys; sys.path.append({str(site)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "imported\n", done.stderr
    (site / "door_installed.py").write_text("1 / 0\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "entry point ebm_dist.plugins of the package door-installed" in done.stderr
