"""What the documents quote from files of results: the tables, and the outcome in a few sentences."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from bench.providers import measured_again
from bench.results import RESULTS, read
from bench.verdicts import (
    BRANCH,
    DECODE,
    DTYPE_NAMES,
    LAYER,
    OURS,
    STEP,
    Goal,
    Measured,
    geometric_mean,
    interval_text,
    measured,
)

_ROOT = Path(__file__).resolve().parent.parent
README, PERFORMANCE = _ROOT / "README.md", _ROOT / "docs" / "performance.md"
FILES = tuple(RESULTS / f"{preset}.jsonl" for preset in ("step", "goals", "decode"))
_NAMES = {
    "peft": "PEFT LoRA",
    "torchtune": "torchtune LoRA",
    "eager": "eager AFA-LoRA",
    "compiled": "compiled AFA-LoRA",
    "afa.torch": "`torch` backend",
    OURS: "afa_kernels",
}
# In a training step of a model: this package by what its users call.
_STEP_NAMES = {
    "peft": "PEFT LoRA",
    "torchtune": "torchtune LoRA",
    "eager": "eager AFA-LoRA",
    "afa.torch": "`torch` backend",
    "afa.separate": "`group=False`",
    OURS: "`inject`",
    "afa.peft": "`AFALoraConfig`",
    "afa.accelerate": "`accelerate`",
}


def step_table(rows: list[dict]) -> list[str]:
    problems = [(title, problem) for title, problem in measured(rows, STEP) if "tax" in problem[OURS]]
    names = [name for name in _STEP_NAMES if any(name in problem for _, problem in problems)]
    lines = []
    for _, problem in problems:
        own = problem[OURS]
        taxes = {name: problem[name]["tax"] for name in names if "tax" in problem.get(name, {})}
        least = min(taxes, key=taxes.get)
        cells = [DTYPE_NAMES[own["dtype"]], f"{own['alpha_t']:g}", f"{problem['frozen']['p50_ms']:.0f}"]
        for name in names:
            cell = _percent(taxes.get(name), 1)
            interval = problem[name]["tax_interval"] if name in taxes else None
            cells.append((f"**{cell}**" if name == least else cell) + interval_text(interval, 100, 1))
        lines.append([*cells, _largest_error(problem)])
    head = ["dtype", "alpha_t", "frozen ms", *(_STEP_NAMES[name] for name in names), "repeat"]
    return _markdown(head, lines)


def _largest_error(problem: Measured) -> str:
    """Return the largest distance of a provider that was measured twice from itself, in percent."""
    pairs = [row for name, row in problem.items() if measured_again(name) in row["ratio"]]
    if not pairs:
        return "-"
    return f"{max(100 * abs(row['ratio'][measured_again(row['provider'])] - 1) for row in pairs):.1f}"


def layer_table(rows: list[dict]) -> list[str]:
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
            cell = _percent(taxes.get(name), 1)
            cells.append(f"**{cell}**" if name == least else cell)
        cells[-1] += interval_text(problem[OURS]["tax_interval"], 100, 1)
        lines.append([*cells, f"{100 * problem[OURS]['floor_tax']:.1f}", _error(problem)])
    head = ["dtype M K N r", "frozen ms", *(_NAMES[name] for name in names), "floor", "repeat"]
    return _markdown(head, lines)


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def branch_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, BRANCH, BRANCH.others)


def decode_table(rows: list[dict]) -> list[str]:
    return _ratio_table(rows, DECODE, ("eager", "afa.torch"))


def _ratio_table(rows: list[dict], goal: Goal, others: tuple[str, ...]) -> list[str]:
    """Return the time of others over ours, with geometric means."""
    lines = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for title, problem in measured(rows, goal):
        cells = [title, f"{problem[OURS]['p50_ms']:.3g}"]
        for name in others:
            row = problem.get(name)
            known = row is not None and OURS in row["ratio"]
            cells.append(_ratio(row) if known else "-")
            ratios[name] += [row["ratio"][OURS]] if known else []
        lines.append([*cells, _error(problem)])
    if lines:
        means = [f"{geometric_mean(v):.2f}" if v else "-" for v in ratios.values()]
        lines.append(["geometric mean", "", *means, ""])
    return _markdown(["dtype M K N r", "afa_kernels ms", *(_NAMES[name] for name in others), "repeat"], lines)


def _ratio(row: dict) -> str:
    return f"{row['ratio'][OURS]:.2f}{interval_text(row['ratio_interval'][OURS], 1, 2)}"


def _error(problem: Measured) -> str:
    """Return the distance of ``afa`` from itself and its interval, in percent."""
    again = next((row for name, row in problem.items() if measured_again(name) == OURS and OURS in row["ratio"]), None)
    if again is None:
        return "-"
    around_zero = [value - 1 for value in again["ratio_interval"][OURS]]
    return f"{100 * (again['ratio'][OURS] - 1):+.1f}{interval_text(around_zero, 100, 1)}"


def _markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    if not lines:
        return []
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def summary(rows: list[dict]) -> str:
    """Return the outcome in a few sentences, which the README begins with: as much of it as ``rows`` has."""
    return textwrap.fill(" ".join([*_step_summary(rows), *_layer_summary(rows)]), 120, break_on_hyphens=False)


def _step_summary(rows: list[dict]) -> list[str]:
    steps = [p for _, p in measured(rows, STEP) if all("tax" in p.get(name, {}) for name in (OURS, "peft", "eager"))]
    if not steps:
        return []
    own = steps[0][OURS]
    peft, eager, ours = (_taxes(steps, name) for name in ("peft", "eager", OURS))
    return [
        f"On a {_device(own)} a training step of a Llama block (forward and backward, hidden size {own['k']}, "
        f"{own['m']} tokens, rank {own['r']}) takes {ours} longer with AFA-LoRA adapters in all linear layers than the "
        f"frozen block does. PEFT's plain LoRA takes {peft} longer, and AFA-LoRA in ordinary PyTorch code {eager}."
    ]


def _layer_summary(rows: list[dict]) -> list[str]:
    layers = [problem for _, problem in measured(rows, LAYER) if problem.keys() >= {"peft", "eager"}]
    branches = [problem for _, problem in measured(rows, BRANCH) if "eager" in problem]
    if not layers or not branches:
        return []
    peft, eager, ours = (_taxes(layers, name) for name in ("peft", "eager", OURS))
    faster = _range([p["eager"]["ratio"][OURS] for p in branches], "")
    return [
        f"On a {_device(layers[0][OURS])} an AFA-LoRA adapter adds {ours} to the time that its frozen linear layer "
        f"takes for forward and backward. The same adapter in ordinary PyTorch code adds {eager}, and PEFT's plain "
        f"LoRA adds {peft}. The branch alone, without the frozen layer, runs {faster} times as fast as ordinary "
        "PyTorch code."
    ]


def _device(row: dict) -> str:
    return "CPU" if row["device"] == "cpu" else "GPU"


def _taxes(problems: list[Measured], name: str) -> str:
    return _range([100 * problem[name]["tax"] for problem in problems], "%")


def _range(values: list[float], unit: str) -> str:
    return f"{min(values):.1f}{unit} to {max(values):.1f}{unit}"


def short_layer_table(rows: list[dict]) -> list[str]:
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


TABLES = (
    (PERFORMANCE, STEP.title, step_table),
    (README, LAYER.title, short_layer_table),
    (PERFORMANCE, LAYER.title, layer_table),
    (PERFORMANCE, BRANCH.title, branch_table),
    (PERFORMANCE, DECODE.title, decode_table),
)


def sections(files: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """Return what stands between the marks of each page: the outcome; how it was measured, and a table."""
    result: dict[Path, dict[str, str]] = {README: {}, PERFORMANCE: {}}
    everything = []
    for path in files:
        records = read(path)
        rows = [record for record in records if record["kind"] == "row"]
        everything += rows
        environment = records[0]
        isa, torch_version = environment["isa"]["afa_kernels"], environment["packages"]["torch"]
        how = (
            f"Measured by `{environment['command'].partition(' --out')[0]}`, {environment['cpu']}, "
            f"{environment['threads']} threads, {isa}, torch {torch_version}, "
            f"commit {environment['commit'][:7]}."
        )
        for page, title, make in TABLES:
            table = make(rows)
            if table:
                result[page][title] = "\n".join([how, "", *table])
    outcome = summary(everything)
    if outcome:
        result[README]["outcome"] = outcome
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
