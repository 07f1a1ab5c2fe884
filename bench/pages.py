"""``python -m bench.pages``: the measured tables of the documents, and how the project stands beside its goals.

Made from files of results. ``--write`` writes the tables and the outcome into README.md, docs/performance.md and
docs/memory.md, and draws the pictures of bench/results again.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from bench import training
from bench.goals import (
    BRANCH,
    DECODE,
    DTYPE_NAMES,
    LAYER,
    OURS,
    STEP,
    Measured,
    Table,
    geometric_mean,
    measured,
    self_check,
    self_check_text,
    standing,
)
from bench.providers import measured_again
from bench.results import RESULTS, read, recorded

_ROOT = Path(__file__).resolve().parent.parent
README, PERFORMANCE, MEMORY = _ROOT / "README.md", _ROOT / "docs" / "performance.md", _ROOT / "docs" / "memory.md"
# What bench.training wrote: by the name of the file, the page and the title.
TRAINING = {"training": (README, "training step"), "formats": (MEMORY, "formats")}
FILES = tuple(RESULTS / f"{name}.jsonl" for name in ("step", "goals", "decode", *TRAINING))
_PLAIN = {"peft": "PEFT LoRA", "torchtune": "torchtune LoRA", "eager": "eager AFA-LoRA"}
_NAMES = _PLAIN | {"compiled": "compiled AFA-LoRA", "afa.torch": "`torch` backend", OURS: "afa_kernels"}
# In a training step of a model: this package by what its users call.
_STEP_NAMES = _PLAIN | {
    "afa.torch": "`torch` backend",
    "afa.separate": "`share_inputs=False`",
    OURS: "`inject`",
    "afa.peft": "`AFALoraConfig`",
    "afa.accelerate": "`accelerate`",
}


def step_table(rows: list[dict]) -> list[str]:
    problems = _taxed(rows, STEP)
    names = _present(_STEP_NAMES, problems)
    lines = []
    for _, problem in problems:
        own, pairs = problem[OURS], [row for name, row in problem.items() if measured_again(name) in row["ratio"]]
        distances = [100 * abs(row["ratio"][measured_again(row["provider"])] - 1) for row in pairs]
        cells = [DTYPE_NAMES[own["dtype"]], f"{own['alpha_t']:g}", f"{problem['frozen']['p50_ms']:.0f}"]
        cells += _tax_cells(problem, names, intervals=names)
        lines.append([*cells, f"{max(distances):.1f}" if distances else "-"])
    return _markdown(["dtype", "alpha_t", "frozen ms", *map(_STEP_NAMES.get, names), "repeat"], lines)


def layer_table(rows: list[dict]) -> list[str]:
    problems = _taxed(rows, LAYER)
    names = _present(_NAMES, problems)
    lines = []
    for title, problem in problems:
        cells = [title, f"{problem['frozen']['p50_ms']:.0f}", *_tax_cells(problem, names, intervals=[OURS])]
        lines.append([*cells, f"{100 * problem[OURS]['floor_tax']:.1f}", _error(problem)])
    return _markdown(["dtype M K N r", "frozen ms", *map(_NAMES.get, names), "floor", "repeat"], lines)


def _taxed(rows: list[dict], table: Table) -> list[tuple[str, Measured]]:
    return [(title, problem) for title, problem in measured(rows, table) if "tax" in problem[OURS]]


def _present(names: Iterable[str], problems: list[tuple[str, Measured]]) -> list[str]:
    return [name for name in names if any(name in problem for _, problem in problems)]


def _tax_cells(problem: Measured, names: Iterable[str], intervals: Iterable[str] = ()) -> list[str]:
    """Return the taxes of a line in percent, the least one bold, those of ``intervals`` with theirs."""
    taxes = {name: problem[name]["tax"] for name in names if "tax" in problem.get(name, {})}
    least = min(taxes, key=taxes.get)
    cells = []
    for name in names:
        cell = f"{100 * taxes[name]:.1f}" if name in taxes else "-"
        cell = f"**{cell}**" if name == least else cell
        shown = name in intervals and name in taxes
        cells.append(cell + (_interval(problem[name]["tax_interval"], 100, 1) if shown else ""))
    return cells


def branch_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, BRANCH)


def decode_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, DECODE)


def _ratio_table(rows: list[dict], table: Table) -> list[str]:
    """Return the time of others over ours, with geometric means."""
    lines, ratios = [], {name: [] for name in table.others}
    for title, problem in measured(rows, table):
        cells = [title, f"{problem[OURS]['p50_ms']:.3g}"]
        for name, values in ratios.items():
            row = problem.get(name, {"ratio": {}})
            cell = "-"
            if OURS in row["ratio"]:
                values.append(row["ratio"][OURS])
                cell = f"{values[-1]:.2f}{_interval(row['ratio_interval'][OURS], 1, 2)}"
            cells.append(cell)
        lines.append([*cells, _error(problem)])
    if lines:
        means = [f"{geometric_mean(values):.2f}" if values else "-" for values in ratios.values()]
        lines.append(["geometric mean", "", *means, ""])
    return _markdown(["dtype M K N r", "afa_kernels ms", *map(_NAMES.get, table.others), "repeat"], lines)


def _error(problem: Measured) -> str:
    """Return the distance of ``afa`` from itself and its interval, in percent."""
    again = next((row for name, row in problem.items() if measured_again(name) == OURS and OURS in row["ratio"]), None)
    if again is None:
        return "-"
    around_zero = [value - 1 for value in again["ratio_interval"][OURS]]
    return f"{100 * (again['ratio'][OURS] - 1):+.1f}{_interval(around_zero, 100, 1)}"


def _interval(interval: list[float], factor: float, digits: int) -> str:
    low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f" [{low}, {high}]"


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)] if lines else []


def outcome(rows: list[dict]) -> str:
    """Return the outcome in a few sentences, which the README begins with; empty unless ``rows`` has all of it."""
    steps = [p for _, p in measured(rows, STEP) if all("tax" in p.get(name, {}) for name in (OURS, "peft", "eager"))]
    layers = [problem for _, problem in _taxed(rows, LAYER) if problem.keys() >= {"peft", "eager"}]
    faster = [problem["eager"]["ratio"][OURS] for _, problem in measured(rows, BRANCH) if "eager" in problem]
    if not (steps and layers and faster):
        return ""

    def taxes(problems: list[Measured], name: str) -> str:
        values = [100 * problem[name]["tax"] for problem in problems]
        return f"{min(values):.1f}% to {max(values):.1f}%"

    own = steps[0][OURS]
    device = "CPU" if own["device"] == "cpu" else "GPU"
    text = (
        f"On a {device} a training step of a Llama block (forward and backward, hidden size {own['k']}, {own['m']} "
        f"tokens, rank {own['r']}) takes {taxes(steps, OURS)} longer with AFA-LoRA adapters in all linear layers than "
        f"the frozen block does. PEFT's plain LoRA takes {taxes(steps, 'peft')} longer, and AFA-LoRA in ordinary "
        f"PyTorch code {taxes(steps, 'eager')}. On a {device} an AFA-LoRA adapter adds {taxes(layers, OURS)} to the "
        f"time that its frozen linear layer takes for forward and backward. The same adapter in ordinary PyTorch code "
        f"adds {taxes(layers, 'eager')}, and PEFT's plain LoRA adds {taxes(layers, 'peft')}. The branch alone, without "
        f"the frozen layer, runs {min(faster):.1f} to {max(faster):.1f} times as fast as ordinary PyTorch code."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False)


SECTIONS = (
    (PERFORMANCE, STEP.title, step_table),
    (PERFORMANCE, LAYER.title, layer_table),
    (PERFORMANCE, BRANCH.title, branch_table),
    (PERFORMANCE, DECODE.title, decode_table),
)


def sections(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Return what stands between the marks of each page: the outcome; how it was measured, and a table."""
    result: dict[Path, dict[str, str]] = {README: {}, PERFORMANCE: {}, MEMORY: {}}
    everything = []
    for path in files:
        environment, rows = read(path)[0], _rows([path])
        everything += rows
        how = (
            f"Measured by `{environment['command'].partition(' --out')[0]}`, {environment['cpu']}, "
            f"{environment['threads']} threads, {environment['isa']['afa_kernels']}, "
            f"torch {environment['packages']['torch']}, commit {environment['commit'][:7]}."
        )
        if path.stem in TRAINING:
            page, title = TRAINING[path.stem]
            result[page][title] = "\n".join([how, "", training.markdown(read(path)[1:])])
        for page, title, make in SECTIONS:
            table = make(rows)
            if table:
                result[page][title] = "\n".join([how, "", *table])
    if outcome(everything):
        result[README]["outcome"] = outcome(everything)
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


def _rows(files: Iterable[Path]) -> list[dict]:
    return [record for path in files for record in read(path) if record["kind"] == "row"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="default: those of bench/results")
    parser.add_argument("--write", action="store_true", help="also write the tables and draw the pictures again")
    arguments = parser.parse_args(argv)
    files = arguments.results or FILES
    found = sections(files)
    for title, text in found[PERFORMANCE].items():
        print(f"{title}: {text}\n")
    rows = _rows(files)
    print(*standing(rows), sep="\n")
    check = self_check(rows)
    if check:
        print(self_check_text(check))
    if arguments.write:
        from bench import plot

        for page, texts in found.items():
            page.write_text(written(page.read_text(), texts))
        for path in (*found, *plot.draw(recorded(), RESULTS)):
            print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
