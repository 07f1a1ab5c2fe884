"""``make gpu-check``: on a machine with a GPU, everything that cannot run without one.

    python3 -m tools.gpu_check [1|2|3|4 ...] [--only STEPS] [--out FOLDER] [--seconds 540]

In four calls, each of at most nine minutes: is it right, what decides the design, is the model right, which way is the
fastest. They need what is installed (torch, Triton, CMake, ninja, pybind11, nvcc, pytest with pytest-xdist, peft and
transformers) and no network. The first step of each call compiles the kernels for the card.

Every step is a process of its own with its own time, so that one that crashes, hangs or fills the memory ends itself
alone. Its rows are in ``FOLDER/call-N.jsonl`` as soon as they are measured, the tables in ``FOLDER/call-N.md`` after
every step, and printed last.

Exit status: 0 all right, 1 a step failed, 77 torch sees no GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ABSENT = 77  # the status of a step that this machine cannot run
RESULTS = "GPU_CHECK_RESULTS"  # the file for the rows of a step, and the name of the step
CARD = "GPU_CHECK_CARD"  # a module with another card in the place of the machine's (gpu_right.card)
SECONDS = 540  # of a call
_TAIL = 4000  # characters of the output of a step that did not end well, kept


class Step(NamedTuple):
    name: str
    what: str
    seconds: int  # at least so many are its own
    module: str = "tools.gpu_right"


class Call(NamedTuple):
    question: str
    steps: tuple[Step, ...]


def _measured(name: str, what: str, seconds: int) -> Step:
    return Step(name, what, seconds, "tools.gpu_measure")


_FIRST = (
    Step("machine", "the card, the driver and what is installed", 30),
    Step("build", "CMake, ninja and nvcc, for this card alone", 150),
)
CALLS = {
    1: Call(
        "Is it right?",
        (
            *_FIRST,
            Step("self-test", "every backend against float64", 30),
            Step("promises-cuda", "the conformance suite on the CUDA kernels", 60),
            Step("promises-triton", "the conformance suite on the Triton kernels", 90),
            Step("tests", "the tests of operator, layers and adapters on both backends", 60),
            Step("capture-cuda", "a process whose first call is captured in a CUDA graph", 15),
            Step("capture-triton", "the same with the Triton kernels", 15),
            Step("graphs", "replays follow alpha_t and the dropout seed", 15),
            Step("streams", "streams and threads at once give what each gives alone", 15),
            Step("memcheck", "compute-sanitizer: memory of small calls", 30),
            Step("racecheck", "compute-sanitizer: shared memory of small calls", 30),
        ),
    ),
    2: Call(
        "What decides the design?",
        (
            *_FIRST,
            _measured("products", "a product, one that is added in place, and one with a longer K", 60),
            _measured("grouped", "grouped_mm beside one product of as much arithmetic", 60),
            _measured("rates", "reading, writing and copying on some and on all multiprocessors", 60),
            _measured("gaps", "kernels that follow each other, with and without overlap and carveout", 60),
        ),
    ),
    3: Call(
        "Is the model right?",
        (
            *_FIRST,
            _measured("model", "every assumption and figure of bench.model, measured", 150),
            _measured("counters", "Nsight Compute: how busy memory and schedulers are, and what warps wait for", 90),
            _measured("variants", "stages, chunks, overlap and carveout other than the chosen ones", 120),
        ),
    ),
    4: Call(
        "Which way is the fastest?",
        (
            *_FIRST,
            _measured("layers", "a layer's step with every backend, and which is chosen without measuring", 120),
            _measured("block", "a transformer block's step in a CUDA graph, beside PEFT", 60),
            _measured("experts", "both ways to the experts of a layer", 90),
            _measured("tune", "python -m afa_kernels --tune, whose file stays in FOLDER", 90),
        ),
    ),
}


def keep(results: Path, record: dict[str, object]) -> None:
    """Write a record behind the others, so that it is there whatever happens next."""
    with results.open("a") as file:
        file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


# --- In the process of a step

Steps = dict[str, Callable[[Any], Iterator[dict]]]  # from a card to rows


class Absent(Exception):
    """This machine cannot run the step; the message says why."""


def run_step(steps: Steps, card: Callable[[], Any]) -> int:
    """Run the step that the command line names on a card; print its rows, and keep each as soon as it is there.

    A row with a "fault" makes the step fail.
    """
    (name,) = sys.argv[1:]
    results, _, step = os.environ.get(RESULTS, "").rpartition(":")
    rows, faults = 0, []
    try:
        for row in steps[name](card()):
            rows += 1
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if results:
                keep(Path(results), {"kind": "row", "step": step, **row})
            if "fault" in row:
                faults.append(row["fault"])
    except Absent as reason:
        print(reason)
        return ABSENT
    if faults:
        print(f"{len(faults)} of {rows} rows are wrong, the first: {faults[0]}")
    elif rows != 1:
        print(f"{rows} rows")
    return 1 if faults else 0


# --- In the process of the calls


class Outcome(NamedTuple):
    status: str  # ok, failed, absent, died, timeout or left out
    seconds: float
    message: str
    tail: str = ""  # of its output

    @property
    def is_wrong(self) -> bool:
        return self.status not in ("ok", "absent")


def run(step: Step, limit: float, results: Path) -> Outcome:
    """Run a step in a process of its own, and end it and all that it has started after ``limit`` seconds."""
    environment = os.environ | {RESULTS: f"{results}:{step.name}", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", step.module, step.name], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        seconds = round(time.monotonic() - start, 1)
        output.seek(0)
        text = output.read().strip()
    last = text.splitlines()[-1] if text else "no output"
    if status in (0, ABSENT):
        return Outcome("ok" if status == 0 else "absent", seconds, last)
    if status is None:
        said = "timeout", f"stopped after {limit:.0f} s; its last line was: {last}"
    elif status < 0:
        said = "died", f"ended by {signal.Signals(-status).name}; its last line was: {last}"
    else:
        said = "failed", last
    return Outcome(said[0], seconds, said[1], text[-_TAIL:])


def _end(process: subprocess.Popen) -> None:
    """End what is left of a step: its process group has the tools and workers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_call(number: int, folder: Path, only: set[str], seconds: float) -> tuple[bool, str]:
    """Run the steps of a call; return whether all is right and the page with its tables."""
    call, end = CALLS[number], time.monotonic() + seconds
    steps = [step for step in call.steps if not only or step.name in only]
    results, page = folder / f"call-{number}.jsonl", folder / f"call-{number}.md"
    folder.mkdir(parents=True, exist_ok=True)
    results.write_text("")
    outcomes: dict[str, Outcome] = {}
    for place, step in enumerate(steps):
        # What earlier steps did not need, but never what belongs to later ones.
        later = sum(other.seconds for other in steps[place + 1 :])
        limit = max(end - time.monotonic() - later, min(step.seconds, end - time.monotonic()))
        outcome = run(step, limit, results) if limit > 0 else Outcome("left out", 0.0, "the call's time is up")
        outcomes[step.name] = outcome
        keep(results, {"kind": "step", "step": step.name, **outcome._asdict()})
        print(f"{outcome.status:8} {step.name:16} {outcome.seconds:6.1f} s  {outcome.message}", flush=True)
        page.write_text(page_of(number, steps, outcomes, results))
        if step.name == "machine" and outcome.status == "absent":
            raise NoGpu(outcome.message)
    return not any(outcome.is_wrong for outcome in outcomes.values()), page.read_text()


class NoGpu(Exception):
    """torch sees no GPU."""


def page_of(number: int, steps: list[Step], outcomes: dict[str, Outcome], results: Path) -> str:
    """Return the tables of a call in Markdown: its steps, then the rows of each."""
    lines = [f"# {number}. {CALLS[number].question}", ""]
    table = [
        {"step": name, "status": outcome.status, "s": outcome.seconds, "": outcome.message}
        for name, outcome in outcomes.items()
    ]
    lines += _table(table)
    rows: dict[str, list[dict]] = {}
    for record in map(json.loads, results.read_text().splitlines()):
        if record["kind"] == "row":
            rows.setdefault(record.pop("step"), []).append(record)
    for step in steps:
        if step.name in rows:
            lines += ["", f"## {step.name}: {step.what}", "", *_table(rows[step.name])]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict]) -> Iterator[str]:
    """Yield the lines of a Markdown table; what a row has not stays empty."""
    head = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
    for line in (head, ["---"] * len(head), *([row.get(key, "") for key in head] for row in rows)):
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = dict.fromkeys(step.name for call in CALLS.values() for step in call.steps)
    parser.add_argument("calls", nargs="*", type=int, metavar="CALL", help="1, 2, 3 or 4 (default: all)")
    parser.add_argument("--only", help=f"comma-separated steps out of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-check"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a call")
    options = parser.parse_args(argv)
    if unknown := set(options.calls) - CALLS.keys():
        parser.error(f"CALL: expected some of 1, 2, 3, 4, got {', '.join(map(str, sorted(unknown)))}")
    only = set(options.only.split(",")) if options.only else set()
    if unknown := only - names.keys():
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    right, pages = True, []
    for number in options.calls or CALLS:
        print(f"-- {number}. {CALLS[number].question}", flush=True)
        try:
            all_right, page = run_call(number, options.out.resolve(), only, options.seconds)
        except NoGpu as reason:
            print(f"Nothing was checked: {reason}.")
            return ABSENT
        right = right and all_right
        pages.append(page)
    print("\n" + "\n".join(pages))
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
