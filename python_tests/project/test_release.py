"""What a release publishes is made of the sources alone: the same bytes again, from another folder at another time."""

import os
import re
import shutil
import sys
import tarfile
import time
from pathlib import Path

import pytest
from wheel_helpers import ROOT, run

pytest.importorskip("build")
pytest.importorskip("scikit_build_core")

EPOCH = {"SOURCE_DATE_EPOCH": "1700000000"}
NO_SOURCES = (".git", ".venv*", "build", "dist", "outputs", "*.egg-info", "*.so", "__pycache__", ".*_cache")


@pytest.fixture
def checkouts(tmp_path) -> list[Path]:
    """The sources twice, with other dates and other permissions."""
    folders = [tmp_path / "one", tmp_path / "another" / "place"]
    for folder in folders:
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NO_SOURCES))
    for file in folders[1].rglob("*.py"):
        os.utime(file, (time.time() + 60,) * 2)
        file.chmod(0o664)
    return folders


def sdist_command() -> list[str]:
    """Return the release's own command, with the build tools that are here."""
    (command,) = re.findall(r"run: pipx run (build .*)", (ROOT / ".github/workflows/release.yml").read_text())
    return [sys.executable, "-m", *command.split(), "--no-isolation"]


def test_two_source_distributions_are_the_same_bytes(checkouts):
    made = []
    for folder in checkouts:
        run(*sdist_command(), cwd=folder, env=EPOCH)
        (archive,) = (folder / "dist").glob("afa_kernels-*.tar.gz")
        made.append(archive)
    assert made[0].name == made[1].name
    assert made[0].read_bytes() == made[1].read_bytes()
    with tarfile.open(made[0]) as archive:
        entries = archive.getmembers()
    assert {entry.mtime for entry in entries} == {int(EPOCH["SOURCE_DATE_EPOCH"])}
    names = {entry.name.partition("/")[2] for entry in entries}
    wanted = {"CMakeLists.txt", "LICENSE", "README.md", "csrc/cuda/kernels/forward.cuh", "afa_kernels/__init__.py"}
    tests = {"project/test_release.py", "cpu_kernels/driver.cpp", "cpu_kernels/aarch64.cmake"}
    tests |= {
        "ptx_machine/CMakeLists.txt",
        "ptx_machine/machine.h",
        "ptx_machine/cuda/runtime.cpp",
        "ptx_machine/tests/check.py",
    }
    assert wanted | {f"python_tests/{name}" for name in tests} <= names


@pytest.mark.slow
def test_two_wheels_are_the_same_bytes(checkouts):
    """Each of the source distribution, which therefore builds into a wheel."""
    pytest.importorskip("ziglang")
    pytest.importorskip("auditwheel")
    made = []
    for folder in checkouts:
        run(sys.executable, "-m", "tools.portable_wheel", cwd=folder, env=EPOCH)
        (wheel,) = (folder / "dist").glob("*.whl")
        made.append(wheel)
    assert made[0].name == made[1].name
    assert made[0].read_bytes() == made[1].read_bytes()
