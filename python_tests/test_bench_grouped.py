"""The scope "grouped" of the benchmarks: its shapes, its providers, its rows and its picture."""

import dataclasses

import pytest
from bench_rows import ROOF

from bench import __main__ as command
from bench import grouped, grouped_suite, plot, shapes
from bench.results import read


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
    known = grouped.providers()
    zeros = known["afa"].__class__("zeros", "", "afa", known["afa"].why_not, None, ours=True, grouped=lambda o: (
        lambda x, a, b: known["afa"].grouped(o)(x, a, b) * 0
    ))  # fmt: skip
    monkeypatch.setattr(grouped, "providers", lambda: known | {"zeros": zeros})
    flags = ["--scopes", "grouped", "--device", "cpu", "--tokens", "60", "--ranks", "4", "--seconds", "0.01"]
    flags += ["--shapes", "2x24x16,4x24x16,8x24x16,4x24x16.skewed", "--out", str(tmp_path), "--dtypes", "f32"]
    assert command.main([*flags, "--providers", ",".join([*known, "zeros"])]) == 1
    records = read(tmp_path / "custom.jsonl")
    assert {r["provider"] for r in records if r["kind"] == "wrong"} == {"zeros"}
    rows = [r for r in records if r["kind"] == "row"]
    assert {r["provider"] for r in rows} == set(known)
    assert {r["pass"] for r in rows} == {"forward", "backward", "both"}
    if all("tax" in r for r in rows if r["pass"] == "both" and not r["provider"].startswith("frozen")):
        assert (tmp_path / "tax_experts.png").exists()


def test_peft_stays_out_with_dropout():
    case = next(iter(cases_of("4x24x16")))._replace(dropout=0.1)
    chosen = {name: provider for name, provider in grouped.providers().items() if name in ("frozen", "peft", "afa")}
    options = command.suite.Options(0.01, 0.1, True, False)
    records = list(grouped_suite.run_case(case, chosen, options, ROOF))
    assert [r["provider"] for r in records if r["kind"] == "absent"] == ["peft"]
    assert {r["provider"] for r in records if r["kind"] == "row"} == {"frozen", "afa"}


def test_a_peer_that_raises_stays_out_and_one_of_ours_does_not():
    case = next(iter(cases_of("4x24x16")))

    def raises(o):
        raise RuntimeError("no kernel for this shape")

    known = grouped.providers()
    peer, own = (dataclasses.replace(known[name], grouped=raises) for name in ("grouped_mm", "afa"))
    options = command.suite.Options(0.01, 0.1, True, False)
    records = list(grouped_suite.run_case(case, {"grouped_mm": peer}, options, ROOF))
    if known["grouped_mm"].absent(case) is None:
        assert [r["reason"] for r in records] == ["RuntimeError: no kernel for this shape"]
    with pytest.raises(RuntimeError, match="no kernel for this shape"):
        list(grouped_suite.run_case(case, {"afa": own}, options, ROOF))


def test_the_picture_has_a_panel_for_each_routing():
    rows = []
    for case in [*cases_of("2x24x16,4x24x16,8x24x16"), *cases_of("2x24x16.skewed,4x24x16.skewed,8x24x16.skewed")]:
        rows += [case._asdict() | {"pass": "both", "provider": name, "tax": 0.1, "tax_interval": [0.1, 0.2]}
                 for name in ("afa", "grouped_mm")]  # fmt: skip
    sweeps = list(plot._expert_sweeps(rows))
    assert len(sweeps) == 2 and "even" in sweeps[0][0] and "skewed" in sweeps[1][0]
    assert [x for x, *_ in sweeps[0][1]["afa"]] == [2, 4, 8]


def cases_of(names: str):
    flags = ["--scopes", "grouped", "--shapes", names, "--tokens", "60", "--ranks", "4", "--device", "cpu"]
    return command.cases(command.parser().parse_args(flags))
