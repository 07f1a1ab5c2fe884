"""``python -m bench.goals``: the measured tables of the documents and whether the goals are met, from files of results.

The presets "step", "goals" and "decode" measure what the tables need and print this at their end; "tokens" and "ranks"
add to what is known of alpha_t = 0. verdicts.py says what the goals are.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import pages, verdicts
from bench.results import RESULTS, read

_IDENTITY_FILES = tuple(RESULTS / f"{preset}.jsonl" for preset in ("tokens", "ranks"))


def report(rows: list[dict], others: list[dict] = ()) -> Iterator[str]:
    """Yield the lines of the tables, of the verdicts and of the self-check, as far as ``rows`` has them. ``others`` are
    rows that count where alpha_t = 0 is compared with 0.5, and in no table."""
    for page, title, make in pages.TABLES:
        lines = make(rows) if page == pages.PERFORMANCE else []
        if lines:
            yield from ("", f"{title}:", *lines)
    for goal in verdicts.GOALS:
        yield from _with_count(goal.title, list(verdicts.verdicts(rows, goal)))
    yield from _with_count("alpha_t = 0 over 0.5", list(verdicts.identity([*rows, *others])))
    behind = list(verdicts.behind(rows))
    if behind:
        yield from ("", *behind)
    check = verdicts.self_check(rows)
    if check:
        yield from ("", verdicts.self_check_text(check))


def _with_count(title: str, found: list[verdicts.Verdict]) -> Iterator[str]:
    if found:
        met = sum(verdict.met for verdict in found)
        yield from ("", f"goals, {title}: {met} of {len(found)} met")
        yield from (verdict.text for verdict in found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="default: those of bench/results")
    parser.add_argument("--write", action="store_true", help="also write the tables into README.md and docs")
    arguments = parser.parse_args(argv)
    files = arguments.results or [path for path in pages.FILES if path.exists()]
    others = [] if arguments.results else [path for path in _IDENTITY_FILES if path.exists()]
    for text in report(_rows(files), _rows(others)):
        print(text)
    if arguments.write:
        for page, texts in pages.sections(files).items():
            page.write_text(pages.written(page.read_text(), texts))
            print(f"\nwritten into {page.name}")
    return 0


def _rows(files: list[Path]) -> list[dict]:
    return [record for path in files for record in read(path) if record["kind"] == "row"]


if __name__ == "__main__":
    sys.exit(main())
