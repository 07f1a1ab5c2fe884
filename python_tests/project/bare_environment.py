"""A Python environment with some packages of this one and what they need, and nothing else: links, no copies."""

import re
import subprocess
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def make(folder: Path, packages: list[str]) -> Path:
    """Make the environment in ``folder``; return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python3"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    for name in needed(packages):
        for top in _tops(metadata.distribution(name)):
            link = Path(where) / top.name
            if not link.exists():
                link.symlink_to(top)
    return python


def needed(packages: list[str]) -> list[str]:
    """Return packages with all that they need here; extras and other systems' are left out."""
    found: dict[str, None] = {}
    left = list(packages)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a requirement that another build of a package has
        found[name] = None
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return list(found)


def _tops(distribution: metadata.Distribution) -> set[Path]:
    """Return the folders and files of a distribution right in site-packages; namespace packages are linked as one."""
    root = Path(distribution.locate_file("")).resolve()
    names = {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}
    return {root / name for name in names if name != "__pycache__" and (root / name).exists()}
