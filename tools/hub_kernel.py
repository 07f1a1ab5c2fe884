"""``make hub-kernel``: the Triton and plain torch paths as a kernel of the Hugging Face hub, in build/hub.

Generated from the sources of the package, never edited: the modules that the functions need, with relative imports,
because a hub kernel is loaded from any path, and with a namespace of operators that depends on the contents, because
two versions may live in one process. build/hub has the two forms that the hub knows: ``torch-ext`` with ``build.toml``
for kernel-builder, and ``build/torch-universal``, which ``kernels.get_local_kernel`` and ``get_kernel`` load.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

import afa_kernels

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "tools/hub"
PACKAGE = ROOT / "afa_kernels"
NAME = "afa_kernels"
# What the kernel offers; the modules that these import follow.
ROOTS = ("operator.functional", "operator.plan", "backend.reference", "backend.torch", "backend.triton.backend")
# The name of the module that kernel-builder adds, with the namespace of the operators.
GENERATED = "_ops"
OPERATORS = "operator/ops.py"  # names that namespace


def modules() -> dict[str, Path]:
    """Return the modules of the kernel: their names below the package, and their files."""
    found: dict[str, Path] = {}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in found or file is None:
            continue
        found[name] = file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
                inside = node.module.removeprefix(NAME).lstrip(".")
                waiting += [inside] + [f"{inside}.{alias.name}".lstrip(".") for alias in node.names]
        waiting.append(name.rpartition(".")[0])
    return found


def _file(name: str) -> Path | None:
    if not name:
        return None  # the kernel has an __init__ of its own
    path = PACKAGE.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def sources() -> dict[str, str]:
    """Return the files of the kernel, but for the generated one, by their paths in it."""
    texts = {}
    for file in modules().values():
        path = file.relative_to(PACKAGE)
        texts[str(path)] = _relative(file.read_text(), len(path.parts))
    texts[OPERATORS] = _with_namespace(texts[OPERATORS])
    texts["backend/builtin.py"] = (TEMPLATES / "builtin.py").read_text()
    for name in ("__init__.py", "layers.py"):
        texts[name] = (TEMPLATES / name).read_text()
    return texts


def _relative(text: str, depth: int) -> str:
    """Return a module's text with relative imports; ``depth`` is 1 for a module of the package itself."""
    dots = "." * depth
    text = re.sub(rf"^(\s*)from {NAME}\.", rf"\1from {dots}", text, flags=re.MULTILINE)
    return re.sub(rf"^(\s*)from {NAME} import", rf"\1from {dots} import", text, flags=re.MULTILINE)


def _with_namespace(text: str) -> str:
    fixed = f'NAMESPACE = "{NAME}"\n'
    if text.count(fixed) != 1:
        raise ValueError(f"{OPERATORS}: expected one line {fixed!r}")
    text = text.replace(fixed, 'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n')
    first = re.search(r"^from \.", text, re.MULTILINE).start()
    return f"{text[:first]}from ..{GENERATED} import add_op_namespace_prefix\n{text[first:]}"


def generated(namespace: str) -> str:
    return (
        "import torch\n\n"
        f"ops = torch.ops.{namespace}\n\n\n"
        "def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    return f"{namespace}::{{op_name}}"\n'
    )


def write(folder: Path, version: int = 1) -> Path:
    """Write the kernel into ``folder`` and return the path that ``kernels.get_local_kernel`` takes."""
    shutil.rmtree(folder, ignore_errors=True)
    texts = sources()
    unique = f"{NAME}_{hashlib.sha256(json.dumps([version, texts], sort_keys=True).encode()).hexdigest()[:8]}"
    loadable = folder / "build/torch-universal"
    for path, text in texts.items():
        _write(folder / "torch-ext" / NAME / path, text)
        _write(loadable / path, text)
    _write(loadable / f"{GENERATED}.py", generated(f"_{unique}"))
    metadata = {"id": f"_{unique}", "name": NAME.replace("_", "-"), "version": version, "license": "Apache-2.0"}
    _write(loadable / "metadata.json", json.dumps(metadata | {"python-depends": [], "backend": {"type": "cpu"}}))
    shutil.copy(TEMPLATES / "build.toml", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.hub_kernel", description="generates the hub kernel")
    parser.add_argument("--into", type=Path, default=ROOT / "build/hub", help="its folder (default: build/hub)")
    folder = write(parser.parse_args().into)
    print(f"{folder}: {len(modules())} modules of afa_kernels {afa_kernels.__version__}")


if __name__ == "__main__":
    main()
