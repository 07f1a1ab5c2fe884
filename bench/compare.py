"""``python -m bench.compare OLD NEW``: what moved between two commits, or two files of results.

Two commits: each is checked out into a folder of its own and its kernels are built there; then the
pytest benchmarks of *this* checkout run on both, in turn (old, new, old, new, ...), so that a
slow minute of the machine hits both. Two files: rows of the same key are compared.

A row has moved if its medians differ by more than ``--threshold`` and its ranges (of the rounds, or
p20 to p80) do not overlap.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from bench.results import key, read
from bench.timing import quantile

ROOT = Path(__file__).resolve().parent.parent


class Range(NamedTuple):
    low: float
    middle: float
    high: float


def moved(old: Range, new: Range, threshold: float) -> float | None:
    """Return ``new / old`` of the medians where they moved, else None."""
    ratio = new.middle / old.middle
    apart = new.low > old.high or new.high < old.low
    return ratio if apart and abs(ratio - 1) > threshold else None


def report(old: dict[str, Range], new: dict[str, Range], threshold: float) -> list[str]:
    """Return a line for each name that moved, the worst first, and one for each that only one side
    has."""
    lines = []
    for name in old.keys() & new.keys():
        ratio = moved(old[name], new[name], threshold)
        if ratio is not None:
            word = "slower" if ratio > 1 else "faster"
            lines.append((ratio, f"{ratio:6.2f}x  {word}  {name}"))
    result = [line for _, line in sorted(lines, reverse=True)]
    result += [f"   gone    {name}" for name in sorted(old.keys() - new.keys())]
    return result + [f"    new    {name}" for name in sorted(new.keys() - old.keys())]


def from_results(path: Path) -> dict[str, Range]:
    return {
        " ".join(str(value) for value in key(row)): Range(row["p20_ms"], row["p50_ms"], row["p80_ms"])
        for row in read(path)
        if row["kind"] == "row"
    }


def check_out(commit: str, folder: Path) -> None:
    """Check ``commit`` out into ``folder`` and build its kernels there.

    Raises:
        subprocess.CalledProcessError: the commit is unknown, or does not build.
    """
    _run("git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(folder), commit)
    if not (folder / "CMakeLists.txt").exists():
        return
    python = f"-DPython_EXECUTABLE={sys.executable}"
    configure = ["cmake", "-S", ".", "-B", "build", "-DAFA_INPLACE=ON", python]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    _run(*configure, cwd=folder)
    _run("cmake", "--build", "build", cwd=folder)


def run_pytest(folder: Path, output: Path, arguments: list[str]) -> dict[str, float]:
    """Run the pytest benchmarks of this checkout on the package in ``folder``; return medians in seconds."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-only", *arguments]
    command += [f"--benchmark-json={output}"]
    # In the folder, because python -m puts the working directory before any installed package.
    shutil.rmtree(folder / "bench", ignore_errors=True)
    shutil.copytree(ROOT / "bench", folder / "bench")
    _run(*command, cwd=folder)
    return {bench["fullname"]: bench["stats"]["median"] for bench in json.loads(output.read_text())["benchmarks"]}


def _run(*command: str, **options) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)


def compare_commits(
    commits: tuple[str, str], rounds: int, arguments: list[str]
) -> tuple[dict[str, Range], dict[str, Range]]:
    """Return each benchmark's range of medians over ``rounds`` for the two commits."""
    medians: tuple[dict, dict] = (defaultdict(list), defaultdict(list))
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / side for side in ("old", "new")]
        try:
            for commit, folder in zip(commits, folders, strict=True):
                check_out(commit, folder)
            for _ in range(rounds):
                for side, folder in enumerate(folders):
                    output = Path(temporary) / "benchmark.json"
                    for name, median in run_pytest(folder, output, arguments).items():
                        medians[side][name].append(median)
        finally:
            for folder in folders:
                if folder.exists():
                    remove = ["worktree", "remove", "--force", str(folder)]
                    _run("git", "-C", str(ROOT), *remove)
    old, new = ({name: Range(min(v), quantile(v, 0.5), max(v)) for name, v in side.items()} for side in medians)
    return old, new


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("old", help="a commit, or a file of results (.jsonl)")
    add("new", help="likewise")
    add("--threshold", type=float, default=0.05, help="smallest change that counts (0.05: 5%%)")
    add("--rounds", type=int, default=3, help="runs of the pytest benchmarks on each commit")
    add("--pytest", nargs=argparse.REMAINDER, default=[], help="the rest goes to pytest")
    arguments = parser.parse_args(argv)
    files = [name.endswith(".jsonl") for name in (arguments.old, arguments.new)]
    if any(files) and not all(files):
        parser.error("expected two commits or two files of results, got one of each")
    if all(files):
        old, new = (from_results(Path(name)) for name in (arguments.old, arguments.new))
    else:
        commits = (arguments.old, arguments.new)
        try:
            old, new = compare_commits(commits, arguments.rounds, arguments.pytest)
        except subprocess.CalledProcessError as error:
            parser.error(f"{' '.join(error.cmd)} failed with exit status {error.returncode}")
    lines = report(old, new, arguments.threshold)
    for line in lines:
        print(line)
    compared = len(old.keys() & new.keys())
    print(f"{compared} compared, {len(lines)} moved by more than {arguments.threshold:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
