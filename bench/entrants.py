"""Which providers take part in a case: those that can run it, do not raise and are right."""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from bench import rows
from bench.memory import Memory
from bench.providers import Provider
from bench.runner import Check
from bench.shapes import Case


class Entrant(NamedTuple):
    """A provider that passed its check on a case."""

    provider: Provider
    step: Any  # what is timed: forward and backward
    check: Check
    memory: Memory


def who(provider: Provider, case: Case) -> dict[str, object]:
    return {"provider": provider.name, "ours": provider.ours, **case._asdict()}


def enter(
    case: Case,
    providers: dict[str, Provider],
    checked: Callable[[Provider], tuple[Any, Check]],
    memory: Callable[[Any], Memory],
    say: Callable[[str], None],
) -> Generator[dict[str, object], None, dict[str, Entrant]]:
    """Yield the record that says why a provider stays out, and return the entrants that are left, by name.

    ``checked(provider)`` returns what is timed and its check, ``memory(step)`` what that allocates.
    """
    entrants = {}
    for name, provider in providers.items():
        say(f"checking {name}")
        outcome = _enter(case, provider, checked, memory)
        if isinstance(outcome, dict):
            yield {**outcome, **who(provider, case)}
        else:
            entrants[name] = outcome
    return entrants


def _enter(case, provider, checked, memory) -> Entrant | dict[str, object]:
    reason = provider.absent(case)
    if reason is not None:
        return rows.absent(reason)
    try:
        step, check = checked(provider)
    except Exception as error:
        if provider.ours:
            raise
        return rows.failed(error)
    return Entrant(provider, step, check, memory(step)) if check.right else rows.wrong(check)
