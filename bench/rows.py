"""The fields that every row has."""

from bench.cost import Cost
from bench.memory import Memory
from bench.providers import Provider
from bench.runner import Check
from bench.shapes import Case
from bench.timing import Work, quantile, ratio


def row(
    case: Case,
    step: str,
    provider: Provider,
    works: dict[str, Work],
    least: Cost,
    check: Check,
    memory: Memory,
    roof: dict[str, object],
) -> dict[str, object]:
    """Return the row of ``provider`` for one timed step, with its ratio to each other provider that was timed beside
    it, and the interval of that; without the ratios if the rounds were too few for an interval."""
    work = works[provider.name]
    own = work.samples[step]
    p50 = quantile(own, 0.5)
    ratios = {name: ratio(own, other.samples[step]) for name, other in works.items() if name != provider.name}
    gflop_s, gb_s = least.flop / p50 * 1e-6, least.nbytes / p50 * 1e-6
    return {
        "kind": "row",
        **case._asdict(),
        "pass": step,
        "provider": provider.name,
        "ours": provider.ours,
        "function": provider.function,
        "p20_ms": quantile(own, 0.2),
        "p50_ms": p50,
        "p80_ms": quantile(own, 0.8),
        "calls": work.calls,
        "ratio": {name: r.middle for name, r in ratios.items() if r.interval},
        "ratio_interval": {name: [*r.interval] for name, r in ratios.items() if r.interval},
        "gflop_s": gflop_s,
        "gflop_share": gflop_s / roof["gemm_gflop_s"][case.dtype],
        "gb_s": gb_s,
        "gb_share": gb_s / roof["copy_gb_s"],
        "error": check.error,
        "error_ratio": check.ratio,
        "peak_bytes": memory.peak,
        "allocated_bytes": memory.allocated,
        "saved_bytes": memory.saved,
    }


def tax(own: list[float], frozen: list[float]) -> dict[str, object]:
    """Return the fields of the time over the frozen layer's, the tax and its interval; none if the rounds were too few
    for an interval."""
    found = ratio(own, frozen)
    if not found.interval:
        return {}
    return {"tax": found.middle - 1, "tax_interval": [value - 1 for value in found.interval]}


def peft_share(own: list[float], peft: list[float], frozen: list[float]) -> dict[str, object]:
    """Return the fields of the tax over PEFT's: the median of its ratio within the round, which both taxes share the
    frozen model's time of, and its interval; none if that is unknown, or PEFT's tax is not above 0 beyond the error."""
    of_peft = ratio(peft, frozen)
    if not of_peft.interval or of_peft.interval[0] <= 1:
        return {}
    taxes, peft_taxes = ([time - base for time, base in zip(times, frozen, strict=True)] for times in (own, peft))
    found = ratio(taxes, peft_taxes)
    return {"peft_share": found.middle, "peft_share_interval": [*found.interval]}


def absent(reason: str) -> dict[str, object]:
    return {"kind": "absent", "reason": reason}


def failed(error: Exception) -> dict[str, object]:
    """Return the record of a peer that raised: its error is why it is absent."""
    first_line = str(error).strip().partition("\n")[0]
    return absent(f"{type(error).__name__}: {first_line}")


def wrong(check: Check) -> dict[str, object]:
    return {"kind": "wrong", "error": check.error, "error_ratio": check.ratio}
