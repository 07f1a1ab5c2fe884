"""``python -m tools.gpu_check``: on a machine with a GPU, everything that could not run without
one.

    python -m tools.gpu_check [--only STEPS] [--rehearse [BACKEND]] [--out FOLDER]

Runs the steps in order, prints one line for each, and writes one file named after the card with
what was checked and measured. The step ``model`` holds bench.model to the card: it fails where a
figure is outside of its modelled range, and writes the table of all as Markdown beside that file.
A step that cannot run (a tool or a peer that is not installed) is listed as absent with the reason,
never passed over. Without a GPU it prints what it would have done. ``--rehearse`` runs the same
code on the CPU, small, with another backend in the place of the device's.

Exit status: 0 all right, 1 a step failed, 77 no GPU.
"""

import argparse
import json
import re
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from bench.environment import environment
from tools import gpu_by_owner, gpu_choice, gpu_figures, gpu_model, gpu_steps
from tools.gpu_steps import Context, Outcome, Step

NO_GPU = 77
_OUTPUT = Path("bench/results")

STEPS: tuple[Step, ...] = (
    *gpu_steps.STEPS,
    *gpu_by_owner.STEPS,
    *gpu_figures.STEPS,
    *gpu_choice.STEPS,
    *gpu_model.STEPS,
)


def run_step(step: Step, context: Context) -> Outcome:
    """Run one step; an exception is a failure of that step and of no other."""
    try:
        return step.run(context)
    except Exception as error:  # noqa: BLE001 - the report must go on
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Outcome.failed(f"{type(error).__name__} at {where}: {error}")


def card_name(context: Context) -> str:
    name = torch.cuda.get_device_name(0) if context.device == "cuda" else "rehearsal-cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def run_all(steps: list[Step], context: Context, folder: Path) -> int:
    records = [environment(context.device)]
    failures = 0
    path = folder / f"gpu-{card_name(context)}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        start = time.monotonic()
        outcome = run_step(step, context)
        seconds = round(time.monotonic() - start, 1)
        failures += outcome.status == "failed"
        print(f"{outcome.status:7} {step.name:12} {seconds:7.1f} s  {outcome.message}", flush=True)
        for row in outcome.rows:
            print("        " + "  ".join(f"{key} {value}" for key, value in row.items()))
        record = {"kind": "gpu_check", "step": step.name, "seconds": seconds}
        records.append(record | asdict(outcome))
        if outcome.page:
            path.with_name(f"{path.stem}-{step.name}.md").write_text(outcome.page)
    path.write_text("".join(json.dumps(record, default=str) + "\n" for record in records))
    print(f"{len(steps)} steps, {failures} failed; results in {path}")
    return int(failures > 0)


def print_plan(steps: list[Step]) -> None:
    print("gpu-check: torch sees no CUDA device. With one, these steps would have run:")
    for number, step in enumerate(steps, 1):
        print(f"{number:3}. {step.name:12} {step.what}")
    print("Nothing was checked. `--rehearse` runs the same code on the CPU.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [step.name for step in STEPS]
    parser.add_argument("--only", help=f"comma-separated steps out of {', '.join(names)}")
    parser.add_argument("--rehearse", nargs="?", const="cpu", metavar="BACKEND", help="run on the CPU (default: cpu)")
    parser.add_argument("--out", type=Path, default=_OUTPUT, help="folder of the results file")
    options = parser.parse_args(argv)
    wanted = options.only.split(",") if options.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    steps = [step for step in STEPS if step.name in wanted]
    if options.rehearse:
        return run_all(steps, Context.rehearsal(options.rehearse), options.out)
    if not torch.cuda.is_available():
        print_plan(steps)
        return NO_GPU
    return run_all(steps, Context.on_gpu(), options.out)


if __name__ == "__main__":
    raise SystemExit(main())
