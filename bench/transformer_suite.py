"""The rows of the scope "model": forward and backward of a model per provider, and the optimizer's step."""

from collections.abc import Callable, Iterator

from bench import optimizer, rows
from bench.entrants import Entrant, enter
from bench.providers import Provider, providers
from bench.runner import Check
from bench.shapes import Case, transformer
from bench.suite import FROZEN, Options
from bench.timing import Work, clock_of, measure, ratio
from bench.transformer import Checker, Operands, Step

# All providers have the same adapters, so the optimizer is timed for one of ours and one peer.
_PEFT = "peft"
_OPTIMIZED = (_PEFT, "afa")
_OPTIMIZER_SECONDS = 5.0  # at most


def run_case(
    case: Case,
    chosen: dict[str, Provider],
    options: Options,
    roof: dict[str, object],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, object]]:
    """Yield the rows of each provider, and why a provider is absent or wrong."""
    operands = Operands.of(transformer(case.layer), case)
    known = providers()
    checker = Checker(known["eager"], known[FROZEN], case._replace(dropout=0.0), operands)

    def checked(provider: Provider) -> tuple[Step, Check]:
        step = Step(provider, case, operands)
        # A mask is random and differs between providers: accuracy is that of the call without it.
        unmasked = Step(provider, case._replace(dropout=0.0), operands) if case.dropout else step
        return step, checker.check(unmasked, provider.function)

    entrants = yield from enter(case, chosen, checked, Step.memory, say)
    if not entrants:
        return
    works = {name: _training(entrant.step) for name, entrant in entrants.items()}
    say(f"timing {', '.join(works)}")
    rounds = measure(works, clock_of(case.device, options.clock), options.seconds, options.precision)
    for step in next(iter(works.values())).samples:
        for name, (provider, model, check, memory) in entrants.items():
            row = rows.row(case, step, provider, works, model.least(step), check, memory, roof)
            row |= {"cache": "hot", "launch": "eager", "rounds": rounds}
            if FROZEN in works and provider.function != FROZEN:
                own, frozen = works[name].samples[step], works[FROZEN].samples[step]
                row |= rows.tax(own, frozen)
                if _PEFT in works and name != _PEFT:
                    row |= rows.peft_share(own, works[_PEFT].samples[step], frozen)
            yield row
    optimized = {name: entrants[name] for name in _OPTIMIZED if name in entrants}
    if optimized:
        say("timing AdamW")
        yield from _optimizer_rows(case, optimized, options, roof)


def _training(step: Step) -> Work:
    return Work(step.prepare, {"forward": step.forward, "backward": step.backward}, "both")


def _optimizer_rows(
    case: Case, entrants: dict[str, Entrant], options: Options, roof: dict[str, object]
) -> Iterator[dict[str, object]]:
    """Yield the rows of AdamW's variants, each with its ratio to the first one too."""
    made = {name: optimizer.optimizers(entrant.step) for name, entrant in entrants.items()}
    works = {
        (name, variant): optimizer.work(variant, each)
        for name, variants in made.items()
        for variant, each in variants.items()
    }
    memory = {key: optimizer.memory(made[key[0]][key[1]]) for key in works}
    rounds = measure(works, clock_of(case.device, options.clock), min(options.seconds, _OPTIMIZER_SECONDS))
    first = next(iter(optimizer.VARIANTS))
    for variant in optimizer.VARIANTS:
        beside = {name: works[name, variant] for name in entrants}
        for name, (provider, step, check, _) in entrants.items():
            least = optimizer.least(step)
            row = rows.row(case, variant, provider, beside, least, check, memory[name, variant], roof)
            row |= {"cache": "hot", "launch": "eager", "rounds": rounds}
            if variant != first:
                found = ratio(beside[name].samples[variant], works[name, first].samples[first])
                if found.interval:
                    row |= {"adamw_ratio": found.middle, "adamw_ratio_interval": [*found.interval]}
            yield row
