"""Runs the CUDA kernels on the emulator: plain, under ASan + UBSan, and under ThreadSanitizer as a
race checker.

    python csrc/emulator/tests/sanitize.py [--quick] [--only plain,asan,tsan] [--seed S]

The hazards program comes first: it proves that each build notices the faults that it is there for.
Exit status 1 if anything is wrong.
"""

import argparse
import tempfile
import time
from pathlib import Path

import build

CASES = {"plain": 200, "asan": 60, "tsan": 34}
QUICK_CASES = {"plain": 40, "asan": 32, "tsan": 32}  # 32: the fixed ones


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer random shapes")
    parser.add_argument("--only", default="plain,asan,tsan", help="builds to run")
    parser.add_argument("--seed", default="1", help="of shapes, values and schedules")
    options = parser.parse_args()
    cases = QUICK_CASES if options.quick else CASES
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.only.split(","):
            start = time.monotonic()
            objects = build.compile_all(
                kind,
                [*build.core_sources(), build.KERNELS, *build.HOST, build.HAZARDS],
                Path(folder) / kind,
            )
            core = [objects[source] for source in build.core_sources()]
            driver = [objects[source] for source in (build.KERNELS, *build.HOST)]
            for program, parts, arguments in (
                ("hazards", [objects[build.HAZARDS]], ()),
                ("driver", driver, ("--cases", str(cases[kind]), "--seed", options.seed)),
            ):
                content, line = build.run(
                    kind, build.link(kind, core + parts, Path(folder) / kind / program), *arguments
                )
                print(f"{kind:6} {program:8} {'ok' if content else 'WRONG':6} {line}", flush=True)
                wrong += not content
            print(f"{kind:6} {time.monotonic() - start:.1f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
