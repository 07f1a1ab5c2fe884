"""Mutation proof: plants faults in the real kernels and shows that the emulator notices each one.

    python csrc/emulator/tests/mutation.py [--quick] [--list]

A mutant (mutants.py) is a textual change to a copy of csrc. The driver runs it in the plain build and, where
that one is content, under ThreadSanitizer: a race whose numbers came out right is a fault all the
same. Prints caught/planted; exit status 1 if one escapes, or if a change no longer fits the source.
"""

import argparse
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant

import build

CASES = "32"
QUICK = 7  # every so many mutants in the quick form


def apply(mutant: Mutant, csrc: Path) -> None:
    """Change the copy in ``csrc``."""
    path = csrc / "cuda" / "kernels" / mutant.file
    text = path.read_text()
    # The formatter may break a line anywhere: white space stands for any white space.
    pattern = r"\s+".join(re.escape(word) for word in mutant.old.split())
    places = list(re.finditer(pattern, text))
    if mutant.nth >= len(places):
        raise LookupError(f"{mutant.file}: no longer contains, {mutant.nth + 1} times, {mutant.old!r}")
    place = places[mutant.nth]
    path.write_text(text[: place.start()] + mutant.new + text[place.end() :])


def host_objects(kind: str, folder: Path) -> list[Path]:
    return list(build.compile_all(kind, [*build.core_sources(), *build.HOST], folder / kind).values())


def caught_by(mutant: Mutant | None, objects: dict[str, list[Path]], folder: Path) -> tuple[str, str]:
    """Return the build that notices the mutant and what it says, or two empty strings."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc)
    if mutant is not None:
        apply(mutant, csrc)
    verdict = "", ""
    for kind, others in objects.items():
        kernels = build.compile_source(kind, build.KERNELS, folder / f"kernels-{kind}.o", csrc)
        program = build.link(kind, [*others, kernels], folder / f"driver-{kind}")
        content, line = build.run(kind, program, "--cases", CASES, timeout=300)
        if not content:
            verdict = kind, line
            break
    shutil.rmtree(folder)
    return verdict


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th mutant only")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    mutants = MUTANTS[::QUICK] if options.quick else MUTANTS
    if options.list:
        print("\n".join(f"{m.kind}: {m.what} ({m.file})" for m in mutants))
        return 0
    caught = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        objects = {kind: host_objects(kind, folder) for kind in ("plain", "tsan")}
        kind, line = caught_by(None, objects, folder / "unchanged")
        if kind:
            print(f"the unchanged kernels fail already ({kind}): {line}")
            return 1
        verdicts = pool.map(
            lambda number: caught_by(mutants[number], objects, folder / str(number)),
            range(len(mutants)),
        )
        for mutant, (kind, line) in zip(mutants, verdicts, strict=True):
            caught += bool(kind)
            print(f"{kind or 'ESCAPED':8} {mutant.kind:28} {mutant.what:42} {line[:140]}", flush=True)
    kinds, seconds = len({m.kind for m in mutants}), time.monotonic() - start
    print(f"caught/planted: {caught}/{len(mutants)} ({kinds} kinds) in {seconds:.0f} s")
    return int(caught < len(mutants))


if __name__ == "__main__":
    raise SystemExit(main())
