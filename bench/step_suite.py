"""The rows of the scopes "model" and "experts": forward and backward of each provider, checked against float64 and
timed; of a model the optimizer's step too."""

from collections.abc import Callable, Iterator

from bench import experts, optimizer, rows, transformer
from bench.entrants import Entrant, enter
from bench.providers import Provider
from bench.shapes import Case
from bench.suite import FROZEN, Options
from bench.timing import Work, clock_of, measure, ratio

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
    is_model = case.scope == "model"
    checked = (transformer if is_model else experts).checking(case)
    entrants = yield from enter(case, chosen, checked, lambda step: step.memory(), say)
    del checked  # and the results in float64
    if not entrants:
        return
    works = {
        name: Work(step.prepare, {"forward": step.forward, "backward": step.backward}, "both")
        for name, (_, step, _, _) in entrants.items()
    }
    say(f"timing {', '.join(works)}")
    rounds = measure(works, clock_of(case.device, options.clock), options.seconds, options.precision)
    for name_of_step in next(iter(works.values())).samples:
        for name, (provider, step, check, memory) in entrants.items():
            row = rows.row(case, name_of_step, provider, works, step.least(name_of_step), check, memory, roof)
            row |= {"cache": "hot", "launch": "eager", "rounds": rounds}
            if FROZEN in works and provider.function != FROZEN:
                own, frozen = works[name].samples[name_of_step], works[FROZEN].samples[name_of_step]
                row |= rows.tax(own, frozen)
                if is_model and _PEFT in works and name != _PEFT:
                    row |= rows.peft_share(own, works[_PEFT].samples[name_of_step], frozen)
            yield row
    optimized = {name: entrants[name] for name in _OPTIMIZED if is_model and name in entrants}
    if optimized:
        say("timing AdamW")
        yield from _optimizer_rows(case, optimized, options, roof)


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
