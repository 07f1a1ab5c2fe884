"""The benchmarks are right before they are fast: truth, records, cases and costs."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from bench_rows import ROOF, TINY, example_row
from helpers import eager

from bench import __main__ as command
from bench import cost, problem, suite, timing
from bench import rows as row_fields
from bench.cases import PRESETS, cases
from bench.environment import left_to_container
from bench.optimizer import VARIANTS
from bench.problem import SCALING, Problem, relative_error, truth
from bench.providers import by_default, measured_again, providers
from bench.results import KEY, Writer, read, recorded, validate
from bench.runner import Checker, build
from bench.shapes import DTYPES, LAYERS, layers, transformer

# Keeping freed memory would last for the whole process, and other tests need much of it.
TINY_FLAGS = ["--device", "cpu", "--no-pictures", "--allocator", "system", "--shapes", "24x56", "--ranks", "4"]


def run(folder: Path, *flags: str, rounds: int = 8, status: int = 0) -> list[dict]:
    """Return the records of a run of the command, in so many rounds, however long they take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.measure.__kwdefaults__, "most", rounds)
        # Measuring the machine's roofs takes seconds; a test of the command needs only their shape.
        patch.setattr("bench.environment._GEMM_SIZES", {"cpu": (32, 64), "cuda": (32, 64)})
        patch.setattr("bench.environment._COPY_BYTES", 1 << 16)
        assert command.main([*TINY_FLAGS, "--seconds", "600", "--out", str(folder), *flags]) == status
    records = read(folder / "custom.jsonl")
    for record in records:
        validate(record)
    return records


def of_kind(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


# Truth


@pytest.mark.parametrize("scope", ["layer", "branch"])
@pytest.mark.parametrize("function", ["lora", "afa"])
def test_truth_is_autograd_in_float64(scope, function, monkeypatch):
    monkeypatch.setattr(problem, "_CHUNK", 16)  # weight gradients are summed over three chunks
    p = Problem.of(TINY._replace(scope=scope, dtype="f64", adapter_dtype="f64"))
    x, a, b = (t.clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b))
    frozen = {"weight": p.weight, "bias": p.bias} if scope == "layer" else {"base": p.base}
    alpha_t = TINY.alpha_t if function == "afa" else 0.0
    y = eager(x, a, b, alpha_t, activation="silu", scaling=SCALING, **frozen)
    dx, da, db = torch.autograd.grad(y, (x, a, b), p.dy)
    for name, value in truth(p, function).items():
        expected = {"y": y, "dx": dx, "da": da, "db": db}[name]
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)


def test_truth_compares_a_sample_of_many_rows():
    p = Problem.of(TINY._replace(m=1000))
    rows = problem.checked_rows(1000)
    assert rows[0] == 0 and rows[-1] == 999 and len(set(rows.tolist())) == len(rows) < 1000
    x = p.x[rows].double()
    assert relative_error(truth(p, "frozen")["y"], x @ p.weight.double().T + p.bias) < 1e-12


@pytest.mark.parametrize("scope", ["layer", "branch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_provider_of_this_machine_is_right(scope, dtype):
    case = TINY._replace(scope=scope, dtype=dtype, adapter_dtype=dtype)
    checker = Checker(Problem.of(case))
    here = {name: p for name, p in providers().items() if name != "compiled" and p.absent(case) is None}
    checks = {name: checker.check(build(p, checker.problem), p.function) for name, p in here.items()}
    assert all(check.right for check in checks.values()), checks
    assert {"eager", "afa", "afa.torch", "afa.identity"} <= here.keys()


def test_a_provider_that_cannot_run_says_why():
    reasons = {name: provider.absent(TINY) for name, provider in providers().items()}
    assert all(reason is None or reason for reason in reasons.values()), reasons
    assert "GPU" in reasons["unsloth"]
    if importlib.util.find_spec("torchtune"):  # pyproject.toml lists what it imports: nothing may be missing
        assert reasons["torchtune"] is None
    assert "branch" in providers()["peft"].absent(TINY._replace(scope="branch"))


# The command and its records


def test_the_command_measures_every_scope(tmp_path, capsys):
    flags = ["--scopes", "layer,branch,model", "--tokens", "1,40,1000000000000"]
    records = run(tmp_path, *flags, "--providers", "frozen,eager,afa,afa.again")
    assert [r["kind"] for r in records[:2]] == ["environment", "roof"]
    rows = of_kind(records, "row")
    assert len({tuple(row[name] for name in KEY) for row in rows}) == len(rows)
    trained = ("forward", "backward", "both")
    assert {(r["scope"], r["m"], r["pass"]) for r in rows} == {
        *((scope, 1, "inference") for scope in ("layer", "branch")),  # decoding
        *((scope, 40, step) for scope in ("layer", "branch", "model") for step in trained),
        *(("model", m, step) for m in (1, 40) for step in (*trained, *VARIANTS)),
    }
    for row in rows:
        has_tax = row["scope"] != "branch" and row["provider"] != "frozen" and row["pass"] not in VARIANTS
        assert ("tax" in row) == ("tax_interval" in row) == has_tax
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["provider"] not in row["ratio"] and row["ratio_interval"].keys() == row["ratio"].keys()
        values = [(row["ratio"][name], row["ratio_interval"][name]) for name in row["ratio"]]
        values += [(row["tax"], row["tax_interval"])] if has_tax else []
        assert values or row["pass"] in VARIANTS
        assert all(low <= value <= high for value, (low, high) in values)
    skipped = of_kind(records, "skipped")
    assert [(r["scope"], r["m"]) for r in skipped] == [(scope, 10**12) for scope in ("layer", "branch", "model")]
    assert all("GB" in r["reason"] for r in skipped)
    check = records[-1]
    assert check["kind"] == "self_check" and check["include_one"] <= check["pairs"] == 2 * (1 + 3) + 2 * 3
    assert "self-check" in capsys.readouterr().out


def test_a_wrong_result_of_ours_is_not_timed_and_fails_the_run(tmp_path, monkeypatch):
    def zeros(case, inplace):
        return lambda x, a, b, base: base + 0 * (x.sum() + a.sum() + b.sum())

    wrong = dataclasses.replace(providers()["afa.torch"], name="afa.wrong", branch=zeros)
    monkeypatch.setattr(command, "providers", lambda: providers() | {"afa.wrong": wrong})
    flags = ["--scopes", "branch", "--tokens", "40", "--providers", "eager,afa.wrong"]
    records = run(tmp_path, *flags, status=1)
    assert [r["provider"] for r in of_kind(records, "wrong")] == ["afa.wrong"]
    assert {r["provider"] for r in of_kind(records, "row")} == {"eager"}


def test_too_few_rounds_for_an_interval_give_times_and_no_ratios(tmp_path, capsys):
    flags = ["--scopes", "layer,model", "--tokens", "40", "--providers", "frozen,eager,afa,afa.again"]
    rows = of_kind(run(tmp_path, *flags, rounds=5), "row")
    assert {row["scope"] for row in rows} == {"layer", "model"}
    for row in rows:
        assert row["rounds"] == 5 and row["p50_ms"] > 0 and row["ratio"] == row["ratio_interval"] == {}
        assert not row.keys() & {"tax", "tax_interval", "over_floor", "adamw_ratio"}
    assert "self-check" not in capsys.readouterr().out


def test_a_spent_budget_is_recorded(tmp_path):
    skipped = of_kind(run(tmp_path, "--tokens", "40,80", "--budget", "1e-9"), "skipped")
    assert [r["m"] for r in skipped] == [40, 80] and "budget" in skipped[0]["reason"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--shapes", "gpt5"], "gpt5"),
        (["--dtypes", "f8"], "f8"),
        (["--scopes", "kernel"], "kernel"),
        (["--scopes", "model", "--shapes", "gpt2.up"], "llama-block"),
        (["--providers", "nobody"], "nobody"),
        (["--tokens", "0"], "at least 1"),
    ],
)
def test_a_bad_flag_is_named(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(flags)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_providers_of_a_scope():
    for scope, pairs in (("layer", ["afa"]), ("model", ["frozen", "afa", "afa.peft", "afa.accelerate"])):
        default = by_default("cpu", scope)
        assert [measured_again(name) for name in default if measured_again(name)] == pairs
        assert "afa.cpu" not in default and ("compiled" in default) == (scope == "layer")


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.stem)
def test_recorded_results_are_valid(path):
    records = read(path)
    assert records[0]["kind"] == "environment"
    for record in records:
        validate(record)


@pytest.mark.parametrize(
    "change",
    [{"kind": "rows"}, {"p50_ms": "1"}, {"p50_ms": float("nan")}, {"calls": True}, {"speed": 1}, {"error": None}],
)
def test_an_invalid_record_is_refused(change, tmp_path):
    writer = Writer(tmp_path / "folder" / "rows.jsonl")
    writer.write(example_row() | {"p50_ms": 1.23456789})
    row = {name: value for name, value in (example_row() | change).items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(change))):
        writer.write(row)
    assert [row["p50_ms"] for row in read(writer.path)] == [1.2346]  # no time has more digits


# Cases and costs


def test_every_named_shape_and_preset_can_be_chosen():
    assert layers([*LAYERS]) == list(LAYERS.values())
    assert layers(["gpt2", "gpt2.up"]) == [v for k, v in LAYERS.items() if k.startswith("gpt2.")]
    assert layers(["3x5"])[0][1:] == (3, 5, False)
    assert transformer("400x600")[1:] == (1, 400, 600, 1)
    assert len(transformer("llama-8-blocks").linears()) == 56
    for preset in PRESETS:
        assert cases(command.parser().parse_args(["--preset", preset]))
    assert len(cases(command.parser().parse_args(["--ranks", "8,8"]))) == 1  # a flag alone starts from one case


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "300"}, 700),
        ({"memory.max": "max", "memory.current": "300"}, 5000),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "1200"}, 0),
        ({}, 5000),
    ],
)
def test_a_container_has_the_memory_that_its_limit_leaves(tmp_path, files, left):
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert left_to_container(tmp_path, 5000) == left


def test_the_floor_is_arithmetic_or_bytes_whichever_is_longer():
    case = TINY._replace(m=1000, k=100, n=300, r=10, adapter_dtype="f32")
    both = cost.branch(case, "both")
    assert both.flop == 6 * 1000 * 10 * (100 + 300)
    assert both.nbytes == 4 * (1000 * (3 * 100 + 2 * 300)) + 3 * 4 * 10 * 400
    assert both == cost.branch(case, "forward") + cost.branch(case, "backward")
    assert both.milliseconds(gflop_s=1.0, gb_s=1000.0) == pytest.approx(both.flop * 1e-6)
    assert both.milliseconds(gflop_s=1e6, gb_s=0.001) == pytest.approx(both.nbytes * 1e-3)
    assert cost.frozen(case, "both").flop == 4 * 1000 * 100 * 300
    assert cost.whole(case, "forward").flop == 2 * 1000 * (100 * 300 + 10 * 400)


def test_the_tax_is_counted_over_the_frozen_layer():
    floor_ms = cost.branch(TINY, "both").milliseconds(cost.frozen(TINY, "both").flop / 2.0 * 1e-6, ROOF["copy_gb_s"])
    got = suite._against_floor(TINY, "both", [3.0, 3.0, 9.0], [2.0, 1.0, 6.0], ROOF)
    assert got.keys() == {"floor_ms", "floor_tax"}  # three rounds give no interval
    got |= suite._against_floor(TINY, "both", [3.0, 3.0, 9.0] * 2, [2.0, 1.0, 6.0] * 2, ROOF)
    assert got["tax"] == pytest.approx(0.5) and got["tax_interval"] == pytest.approx([0.5, 2.0])
    assert got["floor_tax"] == pytest.approx(floor_ms / 2.0)
    assert got["over_floor"] == pytest.approx(1.0 / floor_ms)


def test_a_tax_is_compared_with_pefts_within_the_round():
    frozen, peft = [100.0, 200.0, 100.0] * 3, [120.0, 240.0, 110.0] * 3
    got = row_fields.peft_share([110.0, 220.0, 106.0] * 3, peft, frozen)
    assert got == {"peft_share": pytest.approx(0.5), "peft_share_interval": [pytest.approx(0.5), pytest.approx(0.6)]}
    assert not row_fields.peft_share(peft[:5], peft[:5], frozen[:5])  # too few rounds
    assert not row_fields.peft_share(peft, frozen, frozen)  # of a tax of 0
