"""The folders are the architecture: imports point one way, and each big package has one door."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ebm_dist"

# A module imports only from its own row and from rows above it.
ROWS = [
    {"paths"},
    {"section", "types", "seeds", "generators", "errors", "weights", "threads", "private"},
    {"strict_yaml", "config_text", "energy_call", "installed", "safe_open", "signals"},
    {"durable", "tensor_file"},
    {"diagnostics", "correlation_time"},
    {"metrics"},
    {"energies"},
    {"samplers"},
    {"objectives"},
    {"buffer"},
    {"data"},
    {"checkpoint"},
    {"learner"},
    {"evaluation"},
    {"actors"},
    {"config", "config_checks"},
    {"report"},
    {"draw", "model_card", "export", "export_reader"},
    {"suites", "preflight", "run_dir", "resume", "assembly", "warm_up"},
    {"run"},
    {"doctor"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

# Heavy packages and the only places that may import them.
DOORS = {
    "ray": {"actors/ray_backend.py", "actors/ray_host.py", "doctor.py"},
    "deepspeed": {"learner/group.py", "doctor.py"},
    "webdataset": {"data/"},
    "wandb": {"metrics/sink.py", "doctor.py"},
    "wandb_workspaces": {"report/dashboard.py"},
}

# Readers that run what they find. Ray's own messages are pickles too; its token guards them.
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load"}

# What runs in a notebook, or on a GPU machine with nothing else installed.
LIGHT = {"energies", "samplers", "objectives", "diagnostics"}
LIGHT_MAY = {"torch", "numpy", "einops", "pydantic", "ebm_dist"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names imported anywhere in a file, function bodies included, type checking excluded."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            if node.module == "ebm_dist":
                found.update(f"ebm_dist.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above(path: Path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no row yet: add it to ROWS where it belongs"
    for name in imports(path):
        if not name.startswith("ebm_dist."):
            continue
        target = name.split(".")[1]
        if target.startswith("__"):
            continue
        assert RANK.get(target, -1) <= RANK[part], f"{part} imports {target}, a row below it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_heavy_package_is_imported_through_its_door(path: Path):
    where = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        if doors is not None:
            inside = any(where.startswith(door) for door in doors if door.endswith("/"))
            assert where in doors or inside, f"{name} is imported in {where}; its door: {doors}"


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if part_of(p) in LIGHT],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_the_mathematics_needs_torch_einops_and_pydantic_alone(path: Path):
    allowed = LIGHT_MAY | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles(path: Path):
    assert not UNPICKLERS & {name.split(".")[0] for name in imports(path)}
    tree = ast.parse(path.read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not UNPICKLING_CALLS & calls
