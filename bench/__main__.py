"""``python -m bench``: measures cases, prints a table, writes JSON lines and pictures."""

import argparse
import gc
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from bench import allocator, experts, goals, step_suite, suite, table
from bench.cases import PRESETS, cases
from bench.environment import available_bytes, environment, roofs
from bench.providers import Provider, by_default, providers
from bench.results import Writer, read
from bench.shapes import DEFAULT_SHAPES, DTYPES, EXPERTS, LAYERS, MODELS, TRANSFORMERS, Case

_OUTPUT = Path("outputs/bench")
_SECONDS = {"branch": 15.0, "layer": 15.0, "model": 130.0, "experts": 30.0}  # of timing per case
# A model's tax is a difference of long times.
_PRECISION = {"branch": 0.01, "layer": 0.01, "model": 0.002, "experts": 0.01}
_QUICK_SECONDS, _QUICK_BUDGET = 2.0, 75
# torch.compile takes longer than the rest of a quick run.
_NOT_IN_QUICK = ("compiled",)


def _list_of(convert):
    return lambda text: [convert(part) for part in text.split(",") if part]


def _by_scope(values: dict[str, float]) -> str:
    return ", ".join(f"{scope} {value:g}" for scope, value in values.items())


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time the operator, the layer and a training step against their peers. Lists "
        "are separated by commas; every combination of the given axes is measured.",
    )
    add = result.add_argument
    add("--quick", action="store_true", help="a small preset that ends within two minutes")
    add("--preset", choices=[*PRESETS], help="a named set of cases (default: standard)")
    add("--scopes", type=_list_of(str), help=", ".join(DEFAULT_SHAPES))
    add(
        "--shapes",
        type=_list_of(str),
        help=f"KxN, layers or models: {', '.join(MODELS)}; in the scope model {', '.join(TRANSFORMERS)}",
    )
    add("--tokens", type=_list_of(int), help="M, such as 1,16,2048")
    add("--ranks", type=_list_of(int), help="r, such as 8,64")
    add("--dtypes", type=_list_of(str), help=", ".join(DTYPES))
    add("--adapter-dtype", choices=[*DTYPES], help="dtype of A and B (default: as x)")
    add("--alphas", type=_list_of(float), help="alpha_t, such as 1,0.5,0")
    add("--activation", default="silu")
    add("--dropout", type=float, default=0.0)
    add("--providers", type=_list_of(str), help="see --list (default: each that differs)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--inference", action="store_true", help="time inference alone, whatever M is")
    add("--training", action="store_true", help="time training alone, whatever M is")
    add("--cache", choices=["hot", "cold", "both"], help="default: hot on a CPU, both on a GPU")
    add("--launch", choices=["eager", "graph", "both"], help="default: eager, on a GPU both")
    add("--seconds", type=float, help=f"of timing per case, at most (default: {_by_scope(_SECONDS)})")
    add("--precision", type=float, help=f"of the ratios; a case ends at it (default: {_by_scope(_PRECISION)})")
    add("--clock", choices=["wall", "process"], default="wall", help="process: for one thread on a busy machine")
    add("--allocator", choices=allocator.NAMES, default="keep", help="whether freed memory is kept for the next call")
    add("--budget", type=float, help="stop starting cases after this many seconds")
    add("--threads", type=int, help="of torch (default: torch's own)")
    add("--isa", help="instruction set of the cpu backend (AFA_CPU_ISA)")
    add("--out", type=Path, default=_OUTPUT, help=f"folder of the results (default: {_OUTPUT})")
    add("--name", help="of the file of results (default: the preset or 'custom')")
    add("--no-pictures", action="store_true")
    add("--list", action="store_true", help="list shapes and providers, measure nothing")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if a result of ours was wrong, 0 otherwise."""
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.quick:
        arguments.preset = arguments.preset or "quick"
        arguments.seconds = min(arguments.seconds or _QUICK_SECONDS, _QUICK_SECONDS)
        arguments.budget = arguments.budget or _QUICK_BUDGET
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.isa:
        os.environ["AFA_CPU_ISA"] = arguments.isa
    try:
        chosen = _choose(arguments)
        todo = cases(arguments)
        _check_axes(todo)
    except ValueError as error:
        command.error(str(error))
    if arguments.list:
        _list(chosen)
        return 0
    # A peer's deprecation is not the reader's concern, and would break the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    name = arguments.name or arguments.preset or "custom"
    writer = Writer(arguments.out / f"{name}.jsonl")
    options = {"clock": arguments.clock, "allocator": allocator.use(arguments.allocator)}
    record = environment(arguments.device, **options) | {"command": _command(argv)}
    writer.write(record)
    _print_environment(record)
    roof = roofs(arguments.device, list(dict.fromkeys(case.dtype for case in todo)))
    writer.write(roof)
    _print_roof(roof)
    wrong = _run(arguments, todo, chosen, roof, writer)
    rows = [record for record in read(writer.path) if record["kind"] == "row"]
    checked = goals.self_check(rows)
    if checked:
        writer.write(checked)
        print(goals.self_check_text(checked))
    print(f"\nwritten to {writer.path}")
    if not arguments.no_pictures:
        _pictures(writer.path)
    return 1 if wrong else 0


def _choose(arguments: argparse.Namespace) -> dict[str, dict[str, Provider]]:
    """Return the providers of each scope."""
    known = dict.fromkeys(DEFAULT_SHAPES, providers()) | {"experts": experts.providers()}
    if arguments.providers is None:
        left_out = _NOT_IN_QUICK if arguments.quick else ()
        default = {scope: by_default(arguments.device, scope) for scope in known} | {"experts": list(known["experts"])}
        return {
            scope: {name: known[scope][name] for name in names if name not in left_out}
            for scope, names in default.items()
        }
    names = list(dict.fromkeys(name for of_scope in known.values() for name in of_scope))
    unknown = [name for name in arguments.providers if name not in names]
    if unknown:
        raise ValueError(f"--providers: expected some of {', '.join(names)}, got {unknown}")
    return {scope: {n: of_scope[n] for n in arguments.providers if n in of_scope} for scope, of_scope in known.items()}


def _check_axes(todo: list[Case]) -> None:
    for case in todo:
        if case.dtype not in DTYPES:
            raise ValueError(f"--dtypes: expected {', '.join(DTYPES)}, got {case.dtype!r}")
        if case.m < 1 or case.r < 1:
            raise ValueError(f"--tokens, --ranks: expected at least 1, got {case.m}, {case.r}")


def _run(arguments, todo, chosen, roof, writer) -> int:
    """Measure each case and print its rows; return how many results of ours were wrong."""
    start = time.monotonic()
    wrong = 0
    absent: dict[str, str] = {}
    how = ("hot", "eager")
    print(f"\n{len(todo)} cases\n{table.HEADER}")
    for case in todo:
        reason = _why_skip(case, arguments, time.monotonic() - start)
        if reason:
            record = {"kind": "skipped", "reason": reason, **case._asdict()}
            print(f"not measured: {case.layer} M={case.m} {case.dtype}: {reason}")
            writer.write(record)
            continue
        for record in _records(case, arguments, chosen[case.scope], roof):
            writer.write(record)
            if record["kind"] == "row":
                _say("")
                if how != (record["cache"], record["launch"]):
                    how = (record["cache"], record["launch"])
                    print(f"-- caches {how[0]}, launch {how[1]}")
                print(table.line(record), flush=True)
            elif record["kind"] == "absent":
                absent.setdefault(record["provider"], record["reason"])
            else:
                wrong += record["ours"]
                _say("")
                print(
                    f"WRONG, not timed: {record['provider']}, error {record['error']:.2e}, "
                    f"{record['error_ratio']:.1f} times plain torch's"
                )
        print()
        gc.collect()
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    return wrong


def _why_skip(case: Case, arguments: argparse.Namespace, elapsed: float) -> str | None:
    if arguments.budget and elapsed > arguments.budget:
        return f"the budget of {arguments.budget:g} s is spent"
    need, have = case.nbytes(), available_bytes(case.device)
    if need > 0.8 * have:
        return f"needs about {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free"
    return None


def _records(case, arguments, chosen, roof) -> Iterable[dict[str, object]]:
    if case.scope in ("model", "experts"):
        options = suite.Options(*_effort(case, arguments), True, False, clock=arguments.clock)
        yield from step_suite.run_case(case, chosen, options, roof, _say)
        return
    for options in _options(case, arguments):
        yield from suite.run_case(case, chosen, options, roof, _say)


def _options(case: Case, arguments: argparse.Namespace) -> Iterator[suite.Options]:
    """Yield how a case is run: a decoding shape as inference, others as training."""
    on_gpu = torch.device(case.device).type == "cuda"
    decoding = case.m <= 16
    inference = arguments.inference or (decoding and not arguments.training)
    caches = {"both": ("hot", "cold"), None: ("hot", "cold") if on_gpu else ("hot",)}
    launches = {"both": ("eager", "graph"), None: ("eager", "graph") if on_gpu else ("eager",)}
    for cache in caches.get(arguments.cache, (arguments.cache,)):
        for launch in launches.get(arguments.launch, (arguments.launch,)):
            effort = _effort(case, arguments)
            yield suite.Options(*effort, not inference, inference, cache, launch, arguments.clock)


def _effort(case: Case, arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the seconds and the precision at which timing ends."""
    seconds = _SECONDS[case.scope] if arguments.seconds is None else arguments.seconds
    return seconds, _PRECISION[case.scope] if arguments.precision is None else arguments.precision


def _say(text: str) -> None:
    """Show progress on a terminal, on a line that the next text replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _command(argv: list[str] | None) -> str:
    return shlex.join(["python", "-m", "bench", *(sys.argv[1:] if argv is None else argv)])


def _print_environment(record: dict[str, object]) -> None:
    changed = " with local changes" if record["dirty"] else ""
    isa = record["isa"]
    print(f"{record['cpu']}, {record['threads']} of {record['cores']} cores")
    print(
        f"torch {record['packages']['torch']} ({isa['torch']}), cpu backend: "
        f"{isa['afa_kernels'] or 'absent'}, commit {record['commit'][:12]}{changed}"
    )
    if record["load"] > 0.5:
        print(f"the machine is busy (load {record['load']}): ratios may hold, times will not")
    if "gpu" in record:
        print(f"{record['gpu']['name']}, CUDA {record['gpu']['cuda']}")


def _print_roof(roof: dict[str, object]) -> None:
    rates = ", ".join(
        f"{name} {rate:.0f} (n = {roof['gemm_size'][name]})" for name, rate in roof["gemm_gflop_s"].items()
    )
    print(f"copy {roof['copy_gb_s']:.1f} GB/s; square GEMM, GFLOP/s: {rates}")


def _list(chosen: dict[str, dict[str, Provider]]) -> None:
    for name, layer in LAYERS.items():
        print(f"{name:20} K={layer.k:<6} N={layer.n:<6} {'bias' if layer.bias else ''}")
    for name, model in TRANSFORMERS.items():
        print(f"{name:20} {model.blocks} blocks, hidden {model.hidden}, intermediate {model.intermediate}, scope model")
    for name, shape in EXPERTS.items():
        print(f"{name:24} {shape.count} experts, K={shape.k}, N={shape.n}, scope experts; also {name}.skewed")
    named = {name: provider for of_scope in chosen.values() for name, provider in of_scope.items()}
    for name, provider in named.items():
        scope = "" if provider.layer else ", scope experts" if provider.experts else ", scope model"
        print(f"{name:20} {provider.about}{scope}")


def _pictures(path: Path) -> None:
    try:
        from bench import plot
    except ImportError as error:
        print(f"no pictures: {error}")
        return
    for picture in plot.draw([path], path.parent):
        print(f"written to {picture}")


if __name__ == "__main__":
    sys.exit(main())
