"""``python -m bench.plot``: pictures of results, as PNG and SVG.

The adapter tax against tokens and against rank, per provider; and a roofline with the measured
points of the branch.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import cost
from bench.results import RESULTS, read, recorded
from bench.shapes import Case

_FEWEST_ROUNDS = 3  # a tax is a small difference: that of one or two samples is noise
_STYLE = {
    "peft": ("PEFT LoRA", "tab:orange", "s"),
    "torchtune": ("torchtune LoRA", "tab:brown", "v"),
    "unsloth": ("Unsloth LoRA", "tab:pink", "P"),
    "lorafusion": ("LoRAFusion LoRA", "tab:olive", "X"),
    "eager": ("eager AFA", "tab:red", "o"),
    "compiled": ("torch.compile AFA", "tab:purple", "D"),
    "afa.torch": ("afa_kernels, torch ops", "tab:cyan", "^"),
    "afa.triton": ("afa_kernels, Triton", "tab:green", "*"),
    "afa.cuda": ("afa_kernels, CUDA", "tab:blue", "*"),
    "afa.cpu": ("afa_kernels, CPU kernels", "tab:blue", "*"),
    "afa": ("afa_kernels", "black", "."),
}


def draw(results: list[Path], folder: Path) -> list[Path]:
    """Write the pictures that the rows in ``results`` allow into ``folder``; return their paths."""
    files = [read(path) for path in results]
    rows = [record for records in files for record in records if record["kind"] == "row"]
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.fonttype"] = "none"
    plt.rcParams["svg.hashsalt"] = "afa_kernels"  # the same rows give the same file
    written = []
    for variable, label in (("m", "tokens M"), ("r", "rank r")):
        sweeps = list(_sweeps(rows, variable))
        if sweeps:
            figure = _tax_figure(sweeps, variable, label)
            written += _save(figure, folder, f"tax_{'tokens' if variable == 'm' else 'rank'}")
    for records in files:
        roof = next((r for r in records if r["kind"] == "roof"), None)
        points = [r for r in records if r["kind"] == "row" and _on_roofline(r)]
        if roof and points:
            written += _save(_roofline(roof, points), folder, "roofline")
            break
    return written


def _sweeps(rows: list[dict], variable: str) -> Iterator[tuple[str, dict[str, list[tuple]]]]:
    """Yield a title and each provider's points where a set of rows differs in ``variable`` alone,
    in at least three values."""
    fixed = [name for name in Case._fields if name != variable] + ["cache", "launch"]
    groups: dict[tuple, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        measured = row["pass"] == "both" and row["scope"] == "layer" and "tax" in row
        if measured and row["rounds"] >= _FEWEST_ROUNDS:
            group = groups[tuple(row[name] for name in fixed)]
            group[row["provider"]][row[variable]] = row["tax"]
            group["floor"][row[variable]] = row["floor_tax"]
    for values, group in groups.items():
        if len(group["floor"]) >= 3:
            named = dict(zip(fixed, values, strict=True))
            free = "".join(f", {n}={named[n]}" for n in ("m", "r") if n != variable)
            title = f"{named['layer']} (K={named['k']}, N={named['n']}{free.upper()}), "
            title += f"{named['dtype']}, {named['device']}"
            yield title, {name: sorted(points.items()) for name, points in group.items()}


def _tax_figure(sweeps: list, variable: str, label: str):
    width = 6.4 * len(sweeps)
    figure, axes = plt.subplots(1, len(sweeps), figsize=(width, 4.4), squeeze=False)
    for axis, (title, group) in zip(axes[0], sweeps, strict=True):
        for name, points in group.items():
            x, y = zip(*points, strict=True)
            percent = [100 * value for value in y]
            if name == "floor":
                axis.plot(x, percent, color="gray", linestyle=":", label="floor")
            else:
                legend, color, marker = _STYLE.get(name, (name, None, "."))
                axis.plot(x, percent, color=color, marker=marker, label=legend)
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(value) for value in x])
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel(label)
        axis.set_ylabel("adapter tax, % of the frozen layer (forward + backward)")
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _on_roofline(row: dict) -> bool:
    return row["scope"] == "branch" and row["pass"] in ("both", "inference")


def _roofline(roof: dict, rows: list[dict]):
    """Draw GFLOP/s of the branch over its arithmetic intensity, under the measured roofs."""
    figure, axis = plt.subplots(figsize=(7, 4.6))
    bandwidth = roof["copy_gb_s"]
    dtypes = sorted({row["dtype"] for row in rows})
    intensities = [_intensity(row) for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 4
    for dtype in dtypes:
        peak = roof["gemm_gflop_s"][dtype]
        ridge = peak / bandwidth
        x = sorted({low, min(max(ridge, low), high), high})
        axis.plot(x, [min(peak, bandwidth * value) for value in x], color="gray", linewidth=1)
        axis.annotate(f"GEMM {dtype}", (high, peak), fontsize=8, ha="right", va="bottom")
    axis.annotate(f"copy {bandwidth:.0f} GB/s", (low, bandwidth * low), fontsize=8, va="top")
    for name in dict.fromkeys(row["provider"] for row in rows):
        legend, color, marker = _STYLE.get(name, (name, None, "."))
        own = [(_intensity(row), row["gflop_s"]) for row in rows if row["provider"] == name]
        x, y = zip(*own, strict=True)
        axis.scatter(x, y, color=color, marker=marker, label=legend, alpha=0.8, zorder=3)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("arithmetic intensity of the branch, FLOP per byte that must move")
    axis.set_ylabel("GFLOP/s")
    axis.set_title(f"the branch alone, {roof['device']}", fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _intensity(row: dict) -> float:
    case = Case(**{name: row[name] for name in Case._fields})
    least = cost.branch(case, row["pass"])
    return least.flop / least.nbytes


def _save(figure, folder: Path, name: str) -> list[Path]:
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, nargs="*", help="default: all in bench/results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pictures")
    arguments = parser.parse_args(argv)
    paths = arguments.results or recorded()
    if not paths:
        parser.error(f"no results in {RESULTS}")
    for path in draw(paths, arguments.out):
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
