"""``python -m bench.goals``: the measured tables of the documents and whether the goals are met, from files of results.

The presets "goals" and "decode" measure what is needed and print this at their end. The goals: ``afa`` takes less time
than each other provider on each shape (met if the median ratio is below 1; "within the error" is added where the
interval of the ratio includes 1); its adapter tax is at most 1.5 times the floor on each shape; and over the shapes
the branch is, in the geometric mean, 3 times as fast as eager and 1.5 times as fast as the best composition of torch
ops. Beside these two stands how many times as fast a branch would be that takes no more than the floor.
"""

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.providers import AGAIN
from bench.results import RESULTS, read

_ROOT = Path(__file__).resolve().parent.parent
README, PERFORMANCE = _ROOT / "README.md", _ROOT / "docs" / "performance.md"
FILES = (RESULTS / "goals.jsonl", RESULTS / "decode.jsonl")
OURS = "afa"
_NAMES = {
    "peft": "PEFT LoRA",
    "torchtune": "torchtune LoRA",
    "eager": "eager AFA-LoRA",
    "compiled": "compiled AFA-LoRA",
    "afa.torch": "`torch` backend",
    OURS: "afa_kernels",
}
_DTYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64"}
_TRAINING = ((2048, 2048, 2048, 16), (4096, 1024, 4096, 16), (512, 4096, 4096, 64))
_DECODING = tuple((m, 4096, 4096, 16) for m in (1, 4, 16))


class Goal(NamedTuple):
    """``afa`` is to take less time in one pass of a scope, on some shapes (M, K, N, r), than others do."""

    title: str
    scope: str
    step: str
    shapes: tuple[tuple[int, int, int, int], ...]
    others: tuple[str, ...]
    largest_tax: float = math.inf  # in floors
    mean_ratios: dict[str, float] = {}  # how many times as fast as another, in the geometric mean


LAYER = Goal("adapter tax", "layer", "both", _TRAINING, ("peft", "torchtune", "eager", "compiled", "afa.torch"), 1.5)
BRANCH = Goal(
    "branch alone", "branch", "both", _TRAINING, ("eager", "afa.torch"), mean_ratios={"eager": 3.0, "afa.torch": 1.5}
)
DECODE = Goal("decoding", "branch", "inference", _DECODING, ("eager",))
GOALS = (LAYER, BRANCH, DECODE)

Measured = dict[str, dict[str, object]]  # the rows of one problem by provider


def measured(rows: Iterable[dict], goal: Goal) -> Iterator[tuple[str, Measured]]:
    """Yield a title and the rows of each problem of ``goal`` that was measured at alpha_t = 0.5."""
    found: dict[tuple, Measured] = {}
    for row in rows:
        shape = (row["m"], row["k"], row["n"], row["r"])
        wanted = row["scope"] == goal.scope and row["pass"] == goal.step and shape in goal.shapes
        plain = row["alpha_t"] == 0.5 and not row["dropout"] and row["adapter_dtype"] == row["dtype"]
        if wanted and plain and (row["cache"], row["launch"]) == ("hot", "eager"):
            found.setdefault((row["dtype"], *shape), {})[row["provider"]] = row
    for dtype, name in _DTYPES.items():
        for shape in goal.shapes:
            problem = found.get((dtype, *shape), {})
            if OURS in problem:
                yield " ".join([name, *map(str, shape)]), problem


def self_check(rows: Iterable[dict]) -> dict[str, object] | None:
    """Return how far the same code, measured twice, is from itself: the record that ends a file of results."""
    pairs = [row for row in rows if row["provider"] == AGAIN and row["ratio_interval"].get(OURS)]
    if not pairs:
        return None
    return {
        "kind": "self_check",
        "pairs": len(pairs),
        "include_one": sum(_includes_one(row["ratio_interval"][OURS]) for row in pairs),
        "largest": max(abs(row["ratio"][OURS] - 1) for row in pairs),
    }


def report(rows: list[dict]) -> Iterator[str]:
    """Yield the lines of the tables, of the verdicts and of the self-check, as far as ``rows`` has them."""
    for text, make in ((LAYER.title, _layer_table), (BRANCH.title, _branch_table), (DECODE.title, _decode_table)):
        lines = make(rows)
        if lines:
            yield from ("", f"{text}:", *lines)
    for goal in GOALS:
        verdicts = list(_verdicts(rows, goal))
        if verdicts:
            met = sum(good for good, _ in verdicts)
            yield from ("", f"goals, {goal.title}: {met} of {len(verdicts)} met")
            yield from (text for _, text in verdicts)
    check = self_check(rows)
    if check:
        yield ""
        yield _self_check_text(check)


def _verdicts(rows: list[dict], goal: Goal) -> Iterator[tuple[bool, str]]:
    for title, problem in measured(rows, goal):
        own = problem[OURS]
        for other in goal.others:
            if other in own["ratio"]:
                value, interval = own["ratio"][other], own["ratio_interval"].get(other)
                verdict = "met" if value < 1 else "not met"
                if not interval:
                    verdict += ", without an interval"
                elif _includes_one(interval):
                    verdict += ", within the error"
                text = f"{title:26} afa / {other:10} {value:.3f}{_interval(interval, 1, 3)}: {verdict}"
                yield value < 1, text
        if goal.largest_tax < math.inf and own.get("floor_tax"):
            value = own["tax"] / own["floor_tax"]
            good = value <= goal.largest_tax
            yield (
                good,
                f"{title:26} tax / floor {value:.2f}, at most {goal.largest_tax}: {'met' if good else 'not met'}",
            )
    for other, wanted in goal.mean_ratios.items():
        problems = [problem for _, problem in measured(rows, goal) if other in problem]
        if problems:
            mean = _geometric_mean([problem[other]["ratio"][OURS] for problem in problems])
            verdict = "met" if mean >= wanted else "not met"
            # What no implementation can exceed: every product at the rate of the frozen layer's GEMM, or every byte
            # at the rate of a copy.
            limit = _geometric_mean([problem[other]["p50_ms"] / problem[OURS]["floor_ms"] for problem in problems])
            yield (
                mean >= wanted,
                f"{'geometric mean':26} {other} / afa {mean:.2f}, at least {wanted}: {verdict}; "
                f"{other} / floor {limit:.2f}",
            )


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _layer_table(rows: list[dict]) -> list[str]:
    problems = list(measured(rows, LAYER))
    names = [name for name in _NAMES if any(name in problem for _, problem in problems)]
    lines = []
    for title, problem in problems:
        if "tax" not in problem[OURS]:
            continue
        taxes = {name: problem[name]["tax"] for name in names if name in problem}
        least = min(taxes, key=taxes.get)
        cells = [title, f"{problem['frozen']['p50_ms']:.0f}"]
        for name in names:
            cell = f"{100 * taxes[name]:.1f}" if name in taxes else "-"
            cells.append(f"**{cell}**" if name == least else cell)
        cells[-1] += _interval(problem[OURS].get("tax_interval"), 100, 1)
        lines.append([*cells, f"{100 * problem[OURS]['floor_tax']:.1f}", _error(problem)])
    head = ["dtype M K N r", "frozen ms", *(_NAMES[name] for name in names), "floor", "repeat"]
    return _markdown(head, lines)


def _branch_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, BRANCH, BRANCH.others)


def _decode_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, DECODE, ("eager", "afa.torch"))


def _ratio_table(rows: list[dict], goal: Goal, others: tuple[str, ...]) -> list[str]:
    """Return the time of others over ours, with geometric means."""
    lines = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for title, problem in measured(rows, goal):
        cells = [title, f"{problem[OURS]['p50_ms']:.3g}"]
        for name in others:
            row = problem.get(name)
            cells.append("-" if row is None else _ratio(row))
            ratios[name] += [] if row is None else [row["ratio"][OURS]]
        lines.append([*cells, _error(problem)])
    if lines:
        means = [f"{_geometric_mean(v):.2f}" if v else "-" for v in ratios.values()]
        lines.append(["geometric mean", "", *means, ""])
    return _markdown(["dtype M K N r", "afa_kernels ms", *(_NAMES[name] for name in others), "repeat"], lines)


def _ratio(row: dict) -> str:
    return f"{row['ratio'][OURS]:.2f}{_interval(row['ratio_interval'].get(OURS), 1, 2)}"


def _error(problem: Measured) -> str:
    """Return the distance of ``afa`` from itself and its interval, in percent."""
    again = problem.get(AGAIN)
    if again is None:
        return "-"
    around_zero = [value - 1 for value in again["ratio_interval"].get(OURS, [])]
    return f"{100 * (again['ratio'][OURS] - 1):+.1f}{_interval(around_zero, 100, 1)}"


def _interval(interval: list[float] | None, factor: float, digits: int) -> str:
    if not interval:
        return ""
    low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f" [{low}, {high}]"


def _includes_one(interval: list[float]) -> bool:
    return interval[0] <= 1 <= interval[1]


def _self_check_text(check: dict) -> str:
    return (
        f"self-check: afa measured twice; of {check['pairs']} intervals of its ratio to itself {check['include_one']} "
        f"include 1 (95% are meant to); the largest distance from 1 is {100 * check['largest']:.1f}%"
    )


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    if not lines:
        return []
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _summary(rows: list[dict]) -> str:
    """Return the outcome in a few sentences, which the README begins with; none without rows."""
    layers = [problem for _, problem in measured(rows, LAYER) if problem.keys() >= {"peft", "eager"}]
    branches = [problem for _, problem in measured(rows, BRANCH) if "eager" in problem]
    if not layers or not branches:
        return ""
    peft, eager, ours = (_range([100 * p[name]["tax"] for p in layers], "%") for name in ("peft", "eager", OURS))
    device = "CPU" if layers[0][OURS]["device"] == "cpu" else "GPU"
    faster = _range([p["eager"]["ratio"][OURS] for p in branches], "")
    return textwrap.fill(
        f"On a {device} an AFA-LoRA adapter adds {ours} to the time that its frozen linear layer takes for forward and "
        f"backward. The same adapter in ordinary PyTorch code adds {eager}, and PEFT's plain LoRA adds {peft}. The "
        f"branch alone, without the frozen layer, runs {faster} times as fast as ordinary PyTorch code.",
        120, break_on_hyphens=False,
    )  # fmt: skip


def _range(values: list[float], unit: str) -> str:
    return f"{min(values):.1f}{unit} to {max(values):.1f}{unit}"


def _short_layer_table(rows: list[dict]) -> list[str]:
    """Return the adapter tax without its errors, for the README."""
    names = ("peft", "eager", "compiled", OURS)
    lines = []
    for title, problem in measured(rows, LAYER):
        if "tax" in problem[OURS]:
            taxes = {name: problem[name]["tax"] for name in names if name in problem}
            least = min(taxes, key=taxes.get)
            cells = [f"{100 * taxes[name]:.1f}%" if name in taxes else "-" for name in names]
            cells[names.index(least)] = f"**{cells[names.index(least)]}**"
            floor = f"{100 * problem[OURS]['floor_tax']:.1f}%"
            lines.append([*title.split(), f"{problem['frozen']['p50_ms']:.0f} ms", *cells, floor])
    return _markdown(["dtype", *"MKNr", "frozen layer", *(_NAMES[name] for name in names), "floor"], lines)


def sections(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Return what stands between the marks of each page: the outcome; how it was measured, and a table."""
    result: dict[Path, dict[str, str]] = {README: {}, PERFORMANCE: {}}
    for path in files:
        records = read(path)
        rows = [record for record in records if record["kind"] == "row"]
        environment = records[0]
        isa, torch_version = environment["isa"]["afa_kernels"], environment["packages"]["torch"]
        how = (
            f"Measured by `{environment['command'].partition(' --out')[0]}`, {environment['cpu']}, "
            f"{environment['threads']} threads, {isa}, torch {torch_version}, "
            f"commit {environment['commit'][:7]}."
        )
        summary = _summary(rows)
        if summary:
            result[README]["outcome"] = summary
        for page, title, make in (
            (README, LAYER.title, _short_layer_table),
            (PERFORMANCE, LAYER.title, _layer_table),
            (PERFORMANCE, BRANCH.title, _branch_table),
            (PERFORMANCE, DECODE.title, _decode_table),
        ):
            table = make(rows)
            if table:
                result[page][title] = "\n".join([how, "", *table])
    return result


def written(page: str, texts: dict[str, str]) -> str:
    """Return ``page`` with each text between the marks of its title.

    Raises:
        ValueError: the marks of a title are missing.
    """
    for title, text in texts.items():
        begin, end = f"<!-- {title} -->\n", f"\n<!-- end of {title} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"expected one {begin.strip()} ... {end.strip()} in the page")
        page = pattern.sub(lambda _, new=begin + text + end: new, page)
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.goals", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="default: goals and decode in bench/results")
    parser.add_argument("--write", action="store_true", help="also write the tables into README.md and docs")
    arguments = parser.parse_args(argv)
    files = arguments.results or [path for path in FILES if path.exists()]
    rows = [record for path in files for record in read(path) if record["kind"] == "row"]
    for text in report(rows):
        print(text)
    if arguments.write:
        for page, texts in sections(files).items():
            page.write_text(written(page.read_text(), texts))
            print(f"\nwritten into {page.relative_to(_ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
