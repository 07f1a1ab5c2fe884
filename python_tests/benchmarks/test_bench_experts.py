"""The scope "experts" of the benchmarks: its shapes, its providers, and its rows."""

import dataclasses
import importlib.util
from collections.abc import Iterator

import pytest
from bench_rows import ROOF

from bench import __main__ as command
from bench import experts, shapes, step_suite, timing
from bench.results import read
from bench.shapes import Case


def test_rows_are_shared_out_to_the_last():
    even, skewed = shapes.experts("8x64x48").rows(100), shapes.experts("8x64x48.skewed").rows(100)
    assert sum(even) == sum(skewed) == 100
    assert max(even) - min(even) <= 1
    assert skewed == sorted(skewed, reverse=True) and skewed[0] > 3 * skewed[-1]
    assert shapes.experts("mixtral.down.skewed")[1:] == (8, 3584, 1024)
    for name in ("64x64", "x8x8", "qwen3", "8x64x48.steep"):
        with pytest.raises(ValueError, match="ExKxN"):
            shapes.experts(name)


def test_every_provider_is_right_and_a_wrong_one_is_not_timed(monkeypatch, tmp_path):
    known = experts.providers()
    here = {name for name, provider in known.items() if provider.absent(next(cases_of("2x24x16"))) is None}

    def zeros(o):
        call = known["afa"].experts(o)
        return lambda *operands: call(*operands) * 0

    wrong = {"zeros": dataclasses.replace(known["afa"], name="zeros", experts=zeros)}
    monkeypatch.setattr(experts, "providers", lambda: known | wrong)
    # Rounds enough for an interval, however long they take, and no more.
    monkeypatch.setitem(timing.measure.__kwdefaults__, "most", 8)
    flags = ["--scopes", "experts", "--device", "cpu", "--tokens", "60", "--ranks", "4", "--seconds", "600"]
    flags += ["--shapes", "2x24x16,4x24x16,8x24x16,4x24x16.skewed", "--out", str(tmp_path), "--allocator", "system"]
    assert command.main([*flags, "--providers", ",".join([*known, "zeros"])]) == 1
    records = read(tmp_path / "custom.jsonl")
    assert {r["provider"] for r in records if r["kind"] == "wrong"} == {"zeros"}
    rows = [r for r in records if r["kind"] == "row"]
    assert {(r["provider"], r["pass"]) for r in rows} == {
        (name, step) for name in here for step in ("forward", "backward", "both")
    }
    taxed = {r["provider"] for r in rows if "tax" in r}
    assert taxed == (here - {"frozen", "frozen.again"} if "frozen" in here else set())
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "tax_experts.png").exists() == bool(taxed)


def test_peft_stays_out_with_dropout():
    case = next(cases_of("4x24x16"))._replace(dropout=0.1)
    chosen = {name: provider for name, provider in experts.providers().items() if name in ("frozen", "peft", "afa")}
    options = command.suite.Options(0.01, 0.1, True, False)
    records = list(step_suite.run_case(case, chosen, options, ROOF))
    assert [r["provider"] for r in records if r["kind"] == "absent"] == ["peft"]
    assert {r["provider"] for r in records if r["kind"] == "row"} == {"frozen", "afa"}


def test_a_peer_that_raises_stays_out_and_one_of_ours_does_not():
    case = next(cases_of("4x24x16"))

    def raises(o):
        raise RuntimeError("no kernel for this shape")

    known = experts.providers()
    peer, own = (dataclasses.replace(known[name], experts=raises) for name in ("grouped_mm", "afa"))
    options = command.suite.Options(0.01, 0.1, True, False)
    records = list(step_suite.run_case(case, {"grouped_mm": peer}, options, ROOF))
    if known["grouped_mm"].absent(case) is None:
        assert [r["reason"] for r in records] == ["RuntimeError: no kernel for this shape"]
    with pytest.raises(RuntimeError, match="no kernel for this shape"):
        list(step_suite.run_case(case, {"afa": own}, options, ROOF))


def cases_of(names: str) -> Iterator[Case]:
    flags = ["--scopes", "experts", "--shapes", names, "--tokens", "60", "--ranks", "4", "--device", "cpu"]
    yield from command.cases(command.parser().parse_args(flags))
