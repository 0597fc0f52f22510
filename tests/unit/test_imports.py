"""The folders are the architecture: imports point one way, and each big package has one door."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ebm_dist"

# A module imports only from its own folder and from folders above it.
FOLDERS = [
    "_version",
    "core",
    "files",
    "correlation_time",
    "diagnostics",
    "energies",
    "samplers",
    "objectives",
    "jarzynski",
    "data",
    "metrics",
    "cluster",
    "checkpoint",
    "buffer",
    "learner",
    "evaluation",
    "config",
    "report",
    "actors",
    "controller",
    "export",
    "run",
    "commands",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, name in enumerate(FOLDERS)}

MAX_FILES = 13
"""Of a folder, its `__init__` included: past it the folder holds two ideas."""

# Heavy packages and the only places that may import them.
DOORS = {
    "ray": {"cluster/ray_backend.py", "cluster/ray_host.py", "run/doctor.py"},
    "deepspeed": {"learner/group.py", "run/doctor.py"},
    "webdataset": {"data/"},
    "wandb": {"metrics/sink.py", "metrics/wandb_items.py", "run/doctor.py"},
    "torch.utils.tensorboard": {"metrics/tensorboard.py"},
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


def imports(path: Path, *, every_name: bool = False) -> set[str]:
    """Full names imported anywhere in a file, function bodies included, type checking excluded.

    With `every_name`, what is imported from each module too: it may be a module itself.
    """
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
            if every_name or node.module == "ebm_dist":
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_folders_above(path: Path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in RANK, f"{part} has no place yet: add it to FOLDERS where it belongs"
    for name in imports(path):
        if not name.startswith("ebm_dist."):
            continue
        target = name.split(".")[1]
        if target.startswith("__"):
            continue
        assert target in RANK, f"{part} imports {name}, which is in no folder"
        assert RANK[target] <= RANK[part], f"{part} imports {target}, a folder below it"


def test_no_modules_import_each_other_in_a_circle():
    names = {_module_of(path): path for path in modules()}
    arrows = {name: _modules_in(path, names) for name, path in names.items()}
    sorter = graphlib.TopologicalSorter(arrows)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_a_folder_holds_about_a_dozen_files():
    counts = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in modules())
    assert {folder: n for folder, n in counts.items() if n > MAX_FILES} == {}


def _module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


def _modules_in(path: Path, known: Iterable[str]) -> set[str]:
    """The modules that `path` names in its imports; a package by a name of it is its `__init__`."""
    found = set()
    for name in imports(path, every_name=True):
        while name and name not in known:
            name = name.rpartition(".")[0]
        # The root looks its names up on first use, and each folder's `__init__` may gather names
        # from its own modules, which import from each other.
        if name not in ("", "ebm_dist", _module_of(path)):
            found.add(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_heavy_package_is_imported_through_its_door(path: Path):
    where = path.relative_to(PACKAGE).as_posix()
    for name in imports(path):
        doors = DOORS.get(name) or DOORS.get(name.split(".")[0])
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
    if path.name == "transport.py":  # within the one function that solves an assignment
        allowed |= {"scipy"}
    if path.name == "compiler.py":  # torch's compiler takes its own turns by it
        allowed |= {"filelock"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles(path: Path):
    assert not UNPICKLERS & {name.split(".")[0] for name in imports(path)}
    tree = ast.parse(path.read_text())
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(tree)
        # Of the tensors of a checkpoint alone; torch 2.6 closed the last hole of it.
        if isinstance(node, ast.Call) and "weights_only=True" not in ast.unparse(node)
    }
    assert not UNPICKLING_CALLS & calls


def test_no_test_module_imports_ray_when_it_is_collected():
    """Ray reads how it authenticates when it is imported, and the tests of clusters set that
    first: all of them failed once beside one such import."""
    for path in (PACKAGE.parent / "tests").rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or node.names[0].name for node in top}
        assert not any(name.split(".")[0] == "ray" for name in names), path


PROMISED = {
    "ebm_dist": ["load_energy", "train"],
    "ebm_dist.config": ["RunConfig", "dump", "load", "schema"],
    "ebm_dist.energies": ["make"],
    "ebm_dist.objectives": ["make"],
    "ebm_dist.samplers": ["make", "run_chain", "Engine"],
    "ebm_dist.diagnostics": [
        *("autocorrelation", "effective_sample_size", "split_rhat", "stagnation", "energy_gap"),
        *("self_transition_probability", "basin_masses"),
    ],
    "ebm_dist.evaluation": [
        *("log_partition", "exact_log_partition", "ood_auroc", "frechet_distance"),
        *("robust_accuracy", "long_run_audit"),
    ],
}
"""Public names of the first version; programs that use them go on to work."""


@pytest.mark.parametrize("module", PROMISED)
def test_the_names_of_the_first_version_are_imported_from_where_they_were(module: str):
    for name in PROMISED[module]:
        assert callable(getattr(importlib.import_module(module), name))


def test_the_program_in_the_readme_of_the_first_version_runs():
    import torch

    from ebm_dist import samplers
    from ebm_dist.samplers import run_chain

    chain = run_chain(
        samplers.make("mala", step_size=0.1, temperature=1.0),
        torch.zeros(1000, 2),
        lambda x: 0.5 * x.square().sum(1),
        200,
        torch.Generator().manual_seed(0),
    )
    # The variance of 2000 normal numbers, within four standard errors.
    assert abs(chain.position.var() - 1) < 4 * (2 / 2000) ** 0.5
    assert 0.9 < chain.info["acceptance"].mean() < 1
