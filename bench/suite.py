"""Runs cases: checks, times, counts memory, and makes the rows."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench import cost, rows
from bench.entrants import Entrant, enter, who
from bench.memory import Memory, memory_of
from bench.problem import Problem
from bench.providers import Provider
from bench.runner import Check, Checker, Runner, build
from bench.shapes import Case
from bench.timed_calls import inference_work, training_work
from bench.timing import Work, clock_of, measure, quantile

FROZEN = "frozen"  # the provider that taxes are counted over


class Options(NamedTuple):
    seconds: float  # of timing per case, at most
    precision: float  # of the ratios, at which timing ends
    training: bool  # forward, backward and both; else inference alone
    inference: bool
    cache: str = "hot"  # "cold": caches are overwritten before each call
    launch: str = "eager"  # "graph": replays of a captured CUDA graph
    clock: str = "wall"  # "process": the time of this process alone


def run_case(
    case: Case,
    providers: dict[str, Provider],
    options: Options,
    roof: dict[str, object],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, object]]:
    """Yield the records of one case: a row per provider and step, and why a provider is absent or
    wrong."""
    problem = Problem.of(case)
    # A mask is random and differs between providers: accuracy is that of the call without it.
    plain = dataclasses.replace(problem, case=case._replace(dropout=0.0))
    checker = Checker(plain)

    def checked(provider: Provider) -> tuple[Runner, Check]:
        runner = build(provider, problem)
        return runner, checker.check(build(provider, plain) if case.dropout else runner, provider.function)

    entrants = yield from enter(case, providers, checked, _memory, say)
    for wanted, make in ((options.training, training_work), (options.inference, inference_work)):
        if not wanted:
            continue
        works = {}
        for name, entrant in entrants.items():
            try:
                works[name] = make(entrant.step, options.cache, options.launch)
            except Exception as error:  # a peer may not survive its capture in a CUDA graph
                if entrant.provider.ours:
                    raise
                yield {**rows.failed(error), **who(entrant.provider, case)}
        if not works:
            continue
        say(f"timing {', '.join(works)}")
        rounds = measure(works, clock_of(case.device, options.clock), options.seconds, options.precision)
        for step in next(iter(works.values())).samples:
            for name in works:
                row = _row(case, step, name, entrants[name], works, roof)
                yield row | {"cache": options.cache, "launch": options.launch, "rounds": rounds}


def _memory(runner: Runner) -> Memory:
    base = runner.prepare()
    return memory_of(
        lambda: runner.forward(runner.prepare()),
        lambda: runner.backward(runner.forward(base)),
        runner.operands,
        runner.problem.case.device,
    )


def _row(
    case: Case, step: str, name: str, entrant: Entrant, works: dict[str, Work], roof: dict[str, object]
) -> dict[str, object]:
    provider = entrant.provider
    is_frozen = provider.function == "frozen"
    least = cost.frozen(case, step) if is_frozen else cost.whole(case, step)
    row = rows.row(case, step, provider, works, least, entrant.check, entrant.memory, roof)
    if not is_frozen:
        frozen = works[FROZEN].samples[step] if FROZEN in works else None
        row |= _against_floor(case, step, works[name].samples[step], frozen, roof)
    return row


def _against_floor(case, step, own, frozen, roof) -> dict[str, float]:
    """Return the adapter tax (where the frozen layer was measured too) and the floor under it: the
    branch's arithmetic at the rate of the base GEMM, or its bytes at the copy's bandwidth."""
    branch = cost.branch(case, step)
    if frozen is None:
        floor = branch.milliseconds(roof["gemm_gflop_s"][case.dtype], roof["copy_gb_s"])
        return {"floor_ms": floor, "over_floor": quantile(own, 0.5) / floor}
    base_ms = quantile(frozen, 0.5)
    base_rate = cost.frozen(case, step).flop / base_ms * 1e-6
    floor = branch.milliseconds(base_rate, roof["copy_gb_s"])
    tax = rows.tax(own, frozen)
    floor_tax = floor / base_ms
    over_floor = {"over_floor": tax["tax"] / floor_tax} if tax else {}
    return {"floor_ms": floor, "floor_tax": floor_tax, **tax, **over_floor}
