"""Imports inside the package go one way: no module needs itself, not even through an import inside a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "afa_kernels"


def modules(package: Path) -> dict[str, Path]:
    """Return the file of every module by its dotted name; a package has its ``__init__.py``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def runs(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is in ``node`` and ever runs: not what stands under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from runs(child)


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Return the modules of ``known`` that the module ``name`` imports, wherever in its file."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in runs(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*outer, *([node.module] if node.module else [])])
            # What a package gives away is a module of its own, or a name of its __init__.
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in known else source)
    return (found & known) - {name}


def graph(package: Path) -> dict[str, set[str]]:
    found = modules(package)
    return {name: imports(name, path, set(found)) for name, path in found.items()}


def cycle_through(start: str, edges: dict[str, set[str]]) -> list[str] | None:
    """Return the shortest way from a module back to itself, or None."""
    ways, seen = [[start]], set()
    while ways:
        way = ways.pop(0)
        for target in sorted(edges[way[-1]]):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return None


def test_no_module_imports_itself_by_a_detour():
    edges = graph(PACKAGE)
    assert edges["afa_kernels.backend.triton.passes"], "its imports are seen"
    cycles = {tuple(way) for name in edges if (way := cycle_through(name, edges))}
    assert not cycles, "\n".join(" -> ".join(way) for way in sorted(cycles))


def test_a_detour_is_found_wherever_the_import_stands(tmp_path):
    package = tmp_path / "house"
    (package / "rooms").mkdir(parents=True)
    files = {
        "__init__": "from house import door",
        "door": "import os\nfrom house.rooms import kitchen",
        "rooms/__init__": "",
        "rooms/kitchen": "def cook():\n    from . import stove\n",
        "rooms/stove": "from .. import wall\nif TYPE_CHECKING:\n    from house import door",
        "wall": "def lean():\n    import house.rooms.kitchen",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    edges = graph(package)
    assert edges["house.rooms.stove"] == {"house.wall"}
    assert cycle_through("house.rooms.kitchen", edges) == [
        "house.rooms.kitchen", "house.rooms.stove", "house.wall", "house.rooms.kitchen"
    ]  # fmt: skip
    assert cycle_through("house.door", edges) is None
