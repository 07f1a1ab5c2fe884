"""The wheel, and fresh environments to install it in."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, **options) -> str:
    """Return what a command prints; raise what it printed where it fails. Nothing of this checkout is on its path."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AFA_KERNELS_BACKEND")}
    environment = {"AFA_BUILD_CUDA": "0"} | inherited | options.pop("env", {})
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def the_wheel(folder: Path) -> Path:
    """Return the wheel that ``AFA_WHEEL`` names, or one that is built into ``folder``."""
    given = os.environ.get("AFA_WHEEL")
    if given:
        return Path(given).resolve()
    pytest.importorskip("ziglang")
    pytest.importorskip("auditwheel")
    run(sys.executable, "-m", "tools.portable_wheel", "--into", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@contextmanager
def environment(folder: Path, *requirements: str, required: bool = False) -> Iterator[Path]:
    """Make an environment with what ``requirements`` name and nothing of ours, give its interpreter, and remove it.

    Skips, unless it is required, where something cannot be installed.
    """
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    try:
        try:
            run(interpreter, "-m", "pip", "install", *requirements)
        except AssertionError as error:
            if required:
                raise
            pytest.skip(f"{' '.join(requirements)} cannot be installed here: {error}")
        yield interpreter
    finally:
        shutil.rmtree(folder)  # gigabytes, which pytest would keep for three runs
