"""What CMake makes of the nvcc that it finds: an older one builds less, and says so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC, CMAKE = shutil.which("nvcc"), shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(not NVCC or not CMAKE, reason="needs nvcc and CMake")

# nvcc, but to CMake, which asks the compiler, it is of another version.
OTHER_VERSION = """#!/bin/sh
for argument in "$@"; do
    case "$argument" in *CMakeCUDACompilerId.cu)
        sed -i "s/DEC(__CUDACC_VER_MAJOR__)/DEC({major})/; s/DEC(__CUDACC_VER_MINOR__)/DEC({minor})/" "$argument" ;;
    esac
done
exec {nvcc} "$@"
"""


def configure(folder: Path, version: str, **options: str) -> subprocess.CompletedProcess:
    major, minor = version.split(".")
    compiler = folder / "nvcc"
    compiler.write_text(OTHER_VERSION.format(major=major, minor=minor, nvcc=NVCC))
    compiler.chmod(0o755)
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("AFA_") and k not in ("CUDAARCHS", "CMAKE_GENERATOR")
    }
    return subprocess.run(
        [CMAKE, "-S", ROOT, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"],
        env=kept | {"CUDACXX": str(compiler)} | options, capture_output=True, text=True,
    )  # fmt: skip


SMI = "#!/bin/sh\nprintf '{capabilities}'\n"


@pytest.fixture(autouse=True)
def cards(tmp_path, monkeypatch):
    """Let CMake find the cards of a machine: none, until a test names their compute capabilities."""

    def have(capabilities: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(SMI.format(capabilities=capabilities) if capabilities else "#!/bin/sh\nexit 9\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    have("")
    return have


@pytest.mark.parametrize(
    "capabilities, asked, architectures",
    [
        (r"9.0\n9.0\n", "", "90-real"),
        (r"8.6\n7.5\n9.0\n", "", "86-real;90-real"),  # a card that the kernels do not run on
        (r"9.0\n", "all", "80-real;90-real;100-real;120"),  # a wheel for others
        (r"99.0\n", "", "80-real;90-real;100-real;120"),  # a card that this nvcc does not know
    ],
)
def test_from_source_for_the_cards_of_this_machine(tmp_path, cards, capabilities, asked, architectures):
    cards(capabilities)
    done = configure(tmp_path, "13.0", AFA_CUDA_ARCHITECTURES=asked)
    assert done.returncode == 0, done.stderr
    assert f" for {architectures}\n" in done.stdout


@pytest.mark.parametrize("version, architectures", [("12.7", "80-real;90"), ("12.8", "80-real;90-real;100-real;120")])
def test_every_architecture_that_the_compiler_knows(tmp_path, version, architectures):
    done = configure(tmp_path, version)
    assert done.returncode == 0, done.stderr
    assert f"building the CUDA kernels with nvcc {version}" in done.stdout
    assert done.stdout.rstrip().count(f" for {architectures}\n") == 1
    assert ("does not know sm_100 and sm_120" in done.stdout) == (architectures == "80-real;90")


def test_architectures_that_were_asked_for(tmp_path):
    done = configure(tmp_path, "12.4", AFA_CUDA_ARCHITECTURES="86-real")
    assert done.returncode == 0 and " for 86-real\n" in done.stdout and "does not know" not in done.stdout


def test_a_compiler_that_is_too_old(tmp_path):
    """The package still installs, without the CUDA kernels, unless they were asked for."""
    done = configure(tmp_path, "11.8")
    assert done.returncode == 0, done.stderr
    assert "is too old for the CUDA kernels, which need 12.0 or later" in done.stdout
    assert "building the CPU kernels only" in done.stdout and "building the CUDA kernels" not in done.stdout
    done = configure(tmp_path, "11.8", AFA_BUILD_CUDA="1")
    assert done.returncode != 0 and "is too old for the CUDA kernels" in " ".join(done.stderr.split())
