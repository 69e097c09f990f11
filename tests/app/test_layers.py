"""Imports go one way: from the commands to the steps, to what is shown, to runs, to data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastvae.app

APP = Path(fastvae.app.__file__).parent
# From the top; a module imports those of its own line and below.
LAYERS = (
    ("cli",),
    ("commands",),
    ("bench", "options", "narrow_help"),
    ("workflow",),
    ("show",),
    ("run",),
    ("data",),
    ("library", "user_errors"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What commands are made of before they import PyTorch.
LIGHT = ("cli", "commands", "options", "narrow_help", "library", "user_errors")
MODULES = sorted(path.relative_to(APP).with_suffix("") for path in APP.rglob("*.py") if path.name != "__init__.py")


def imports(module: Path, *, at_the_top: bool = False) -> set[str]:
    """What a module imports, anywhere or when it is imported itself."""
    tree = ast.parse((APP / module).with_suffix(".py").read_text())
    nodes = tree.body if at_the_top else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{module}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    rooms = {name.split(".")[2] for name in imports(module) if name.startswith("fastvae.app.")}
    higher = {room for room in rooms if LEVEL[room] < LEVEL[module.parts[0]]}
    assert not higher


def test_no_circles_within_a_room() -> None:
    graph = {
        ".".join(["fastvae.app", *module.parts]): imports(module) for module in MODULES if module.parts[0] != "bench"
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in graph and name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_light_modules_import_no_heavy_ones() -> None:
    """Whatever they import, directly or not, is free of PyTorch, NumPy and Matplotlib."""
    free = {"fastvae._files"}  # of the library: what writes files, which imports nothing of it
    seen: set[str] = set()
    left = [f"fastvae.app.{name}" for name in LIGHT]
    while left:
        name = left.pop()
        module = Path(*name.split(".")[2:])
        if name in seen or not (APP / module).with_suffix(".py").is_file():
            continue
        seen.add(name)
        found = imports(module, at_the_top=True)
        heavy = {
            other for other in found if other.split(".")[0] in ("torch", "numpy", "matplotlib", "sklearn", "scipy")
        }
        of_library = {other for other in found if other.startswith("fastvae.") and "app" not in other.split(".")}
        assert not heavy and {other.rpartition(".")[0] if other not in free else other for other in of_library} <= free
        left += found
    assert {"fastvae.app.run.config", "fastvae.app.run.lock", "fastvae.app.data.places"} <= seen
