"""The rows of the scope "model": one training step of a tiny transformer per provider."""

from collections.abc import Callable, Iterator

from bench import rows
from bench.providers import Provider, providers
from bench.shapes import Case
from bench.suite import FROZEN, Options
from bench.timing import Work, clock_of, measure
from bench.transformer import Checker, Step


def run_case(
    case: Case,
    chosen: dict[str, Provider],
    options: Options,
    roof: dict[str, object],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, object]]:
    """Yield a row per provider, and why a provider is absent or wrong."""
    checker = Checker(providers()["eager"], case)
    entrants = {}
    for name, provider in chosen.items():
        say(f"checking {name}")
        outcome = _enter(provider, checker, case)
        if isinstance(outcome, dict):
            yield {**outcome, "provider": name, "ours": provider.ours, **case._asdict()}
        else:
            entrants[name] = outcome
    if not entrants:
        return
    works = {name: Work(lambda: None, {"step": step}) for name, (step, _, _) in entrants.items()}
    say(f"timing {', '.join(works)}")
    rounds = measure(works, clock_of(case.device, options.clock), options.seconds, options.precision)
    for name, (step, checked, memory) in entrants.items():
        row = rows.row(case, "step", chosen[name], works, step.least(), checked, memory, roof)
        row |= {"cache": "hot", "launch": "eager", "rounds": rounds}
        if FROZEN in works and name != FROZEN:
            row |= rows.tax(works[name].samples["step"], works[FROZEN].samples["step"])
        yield row


def _enter(provider: Provider, checker: Checker, case: Case):
    """Return the step, its check and its memory, or the record that says why it stays out."""
    reason = provider.absent(case)
    if reason is not None:
        return rows.absent(reason)
    try:
        step = Step(provider, case)
        checked = checker.check(step, provider.function)
    except Exception as error:
        if provider.ours:
            raise
        return rows.failed(error)
    if not checked.right:
        return rows.wrong(checked)
    return step, checked, step.memory()
