"""Pictures of results.

The adapter tax against tokens, rank and the number of experts, per provider, with the intervals of the medians; a
roofline with the measured points of the branch; and the peak memory of training steps.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import cost
from bench.providers import measured_again
from bench.results import read
from bench.shapes import DTYPES, Case, experts

_STYLE = {
    "peft": ("PEFT LoRA", "tab:orange", "s"),
    "torchtune": ("torchtune LoRA", "tab:brown", "v"),
    "unsloth": ("Unsloth LoRA", "tab:pink", "P"),
    "lorafusion": ("LoRAFusion LoRA", "tab:olive", "X"),
    "grouped_mm": ("LoRA as a pair of grouped_mm", "tab:olive", "v"),
    "baddbmm": ("LoRA as batched products of padded rows", "tab:brown", "P"),
    "afa.loop": ("afa_kernels, expert by expert", "tab:red", "o"),
    "eager": ("AFA-LoRA in PyTorch code", "tab:red", "o"),
    "compiled": ("the same, torch.compile", "tab:purple", "D"),
    "afa.torch": ("afa_kernels, backend torch", "tab:cyan", "^"),
    "afa.triton": ("afa_kernels, backend triton", "tab:green", "*"),
    "afa.cuda": ("afa_kernels, backend cuda", "tab:blue", "*"),
    "afa.cpu": ("afa_kernels, backend cpu", "tab:blue", "*"),
    "afa": ("afa_kernels", "black", "."),
    # The distance between this curve and the one before is the error of the measurement.
    "afa.again": ("afa_kernels, measured again", "black", "x"),
    "afa.identity": ("afa_kernels at alpha_t = 0", "tab:gray", "h"),
}


class _Sweep(NamedTuple):
    """A picture of the adapter tax: rows of ``scope`` that differ in ``variable`` alone."""

    variable: str
    scope: str
    label: str
    title: str
    picture: str
    scale: str = "linear"  # of the tax


_SWEEPS = (
    _Sweep("m", "layer", "tokens M", "K={k}, N={n}, r={r}, {dtype}, {device}", "tax_tokens"),
    _Sweep("r", "layer", "rank r", "K={k}, N={n}, M={m}, {dtype}, {device}", "tax_rank"),
    _Sweep(
        "experts",
        "experts",
        "experts",
        "M={m}, K={k}, N={n}, r={r}, {dtype}, {routing} routing",
        "tax_experts",
        "symlog",
    ),
)


def draw(results: list[Path], folder: Path) -> list[Path]:
    """Write the pictures that the rows in ``results`` allow into ``folder``; return their paths."""
    files = [read(path) for path in results]
    by_file = [[record for record in records if record["kind"] == "row"] for records in files]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sweep in _SWEEPS:
        panels = [panel for rows in by_file for panel in _panels(rows, sweep)]
        if panels:
            written.append(_save(_tax_figure(panels, sweep), folder, sweep.picture))
    for records in files:
        steps = [record for record in records if record["kind"] == "training"]
        if any(step["method"] == "full" for step in steps):
            written.append(_save(_training_memory(steps), folder, "training_memory"))
    points = [row for rows in by_file for row in rows if _on_roofline(row)]
    if points:
        roofs = [record for records in files for record in records if record["kind"] == "roof"]
        written.append(_save(_roofline(_highest(roofs, points[0]["device"]), points), folder, "roofline"))
    return written


def _panels(rows: list[dict], sweep: _Sweep) -> Iterator[tuple[str, dict[str, list[tuple]]]]:
    """Yield a title and each provider's points (the variable, the tax and its interval) where the variable has at
    least three values."""
    groups: dict[tuple, dict[str, dict[int, tuple]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["pass"] != "both" or row["scope"] != sweep.scope or "tax" not in row:
            continue
        named = {name: row[name] for name in (*Case._fields, "cache", "launch")}
        if sweep.scope == "experts":
            shape = experts(named.pop("layer"))
            named |= {"experts": shape.count, "routing": "skewed" if shape.is_skewed else "even"}
        x = named.pop(sweep.variable)
        group = groups[tuple(named.items())]
        group[row["provider"]][x] = (row["tax"], *row["tax_interval"])
        if "floor_tax" in row:
            group["floor"][x] = (row["floor_tax"],) * 3
    for named, group in groups.items():
        if max(map(len, group.values())) >= 3:
            order = sorted(group, key=[*_STYLE, *group].index)
            points = {name: [(x, *y) for x, y in sorted(group[name].items())] for name in order}
            yield sweep.title.format(**dict(named)), points


def _tax_figure(panels: list, sweep: _Sweep):
    width = 5.2 * len(panels) + 2.6
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.4), squeeze=False, layout="constrained")
    for axis, (title, group) in zip(axes[0], panels, strict=True):
        for name, points in group.items():
            x, *values = zip(*points, strict=True)
            middle, low, high = ([100 * value for value in line] for line in values)
            if name == "floor":
                axis.plot(x, middle, color="gray", linestyle=":", label="floor: an estimate of the least tax")
                continue
            legend, color, marker = _STYLE.get(name, (name, None, "."))
            style = "--" if measured_again(name) else "-"
            (line,) = axis.plot(x, middle, color=color, marker=marker, linestyle=style, label=legend)
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale(sweep.scale, **({"linthresh": 10} if sweep.scale == "symlog" else {}))
        axis.set_xticks(x, [str(value) for value in x])
        axis.axhline(0, color="black", linewidth=0.5)
        axis.grid(alpha=0.3)
        axis.set_xlabel(sweep.label)
        axis.set_ylabel("adapter tax, % of the frozen layer's time")
        axis.set_title(f"forward and backward, {title}", fontsize=9)
    _legend_beside(figure, axes[0])
    return figure


def _legend_beside(figure, axes) -> None:
    """Draw one legend for all axes, outside of them, where it covers no point."""
    labels = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right upper", fontsize=8, frameon=False)


def _on_roofline(row: dict) -> bool:
    return row["scope"] == "branch" and row["pass"] in ("both", "inference")


def _highest(roofs: list[dict], device: str) -> dict:
    """Return the highest roofs that any run on ``device`` found: a roof is what is possible."""
    own = [roof for roof in roofs if roof["device"] == device]
    rates: dict[str, float] = {}
    for roof in own:
        for dtype, rate in roof["gemm_gflop_s"].items():
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    return {"device": device, "copy_gb_s": max(roof["copy_gb_s"] for roof in own), "gemm_gflop_s": rates}


def _roofline(roof: dict, rows: list[dict]):
    """Draw GFLOP/s of the branch over its arithmetic intensity, under the measured roofs, a picture per dtype."""
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    width = 4.4 * len(dtypes) + 2.6
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(width, 4.4), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    intensities = [_intensity(row) for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        peak, bandwidth = roof["gemm_gflop_s"][dtype], roof["copy_gb_s"]
        x = sorted({low, min(max(peak / bandwidth, low), high), high})
        axis.plot(x, [min(peak, bandwidth * value) for value in x], color="gray", linewidth=1)
        own = [row for row in rows if row["dtype"] == dtype]
        for name in sorted({row["provider"] for row in own}, key=[*_STYLE, *(row["provider"] for row in own)].index):
            legend, color, marker = _STYLE.get(name, (name, None, "."))
            for step, face in (("both", color), ("inference", "none")):
                points = [(_intensity(r), r["gflop_s"]) for r in own if (r["provider"], r["pass"]) == (name, step)]
                if points:
                    edge = {"facecolors": face, "edgecolors": color} if marker != "x" else {"c": color}
                    label = legend if step == "both" else None
                    axis.scatter(*zip(*points, strict=True), marker=marker, label=label, alpha=0.8, zorder=3, **edge)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_xlabel("arithmetic intensity, FLOP per byte")
        axis.set_title(f"{dtype}: GEMM {peak:.0f} GFLOP/s, copy {bandwidth:.0f} GB/s", fontsize=9)
    axes[0][0].set_ylabel("GFLOP/s")
    title = f"the adapter's branch alone on {roof['device']}: training (filled), decoding (hollow)"
    figure.suptitle(title, fontsize=10)
    _legend_beside(figure, axes[0])
    return figure


_METHODS = {
    "full": ("full fine-tuning", "tab:gray"),
    "peft": ("PEFT LoRA", "tab:orange"),
    "afa": ("afa_kernels", "tab:blue"),
    "afa.block": ("afa_kernels, MLP blocks", "tab:cyan"),
}


def _training_memory(steps: list[dict]):
    """Draw the peak memory of each method beside those of the others, for every kind of step: a group of bars."""
    kinds = list(dict.fromkeys((s["model"], s["base"], s["checkpointing"]) for s in steps))
    width = 0.8 / len(_METHODS)
    figure, axis = plt.subplots(figsize=(2 + 1.1 * len(kinds), 4.0), layout="constrained")
    for place, (method, (legend, color)) in enumerate(_METHODS.items()):
        own = {(s["model"], s["base"], s["checkpointing"]): s["peak_mb"] for s in steps if s["method"] == method}
        bars = [(i + (place - 1.5) * width, own[kind]) for i, kind in enumerate(kinds) if kind in own]
        if bars:
            axis.bar(*zip(*bars, strict=True), width=width, color=color, label=legend)
    names = [f"{model}\n{base}" + ("\ncheckpointing" if kept == "on" else "") for model, base, kept in kinds]
    axis.set_xticks(range(len(kinds)), names, fontsize=8)
    axis.set_ylabel("peak memory of a training step, MB")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    _legend_beside(figure, [axis])
    return figure


def _intensity(row: dict) -> float:
    case = Case(**{name: row[name] for name in Case._fields})
    least = cost.branch(case, row["pass"])
    return least.flop / least.nbytes


def _save(figure, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
