"""The benchmarks are right before they are fast: truth, records, cases and costs."""

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from bench_rows import ROOF, TINY, example_row
from helpers import eager

from bench import __main__ as command
from bench import cost, optimizer, problem, scaling, suite, timing
from bench import rows as row_fields
from bench.cases import PRESETS, cases
from bench.environment import left_to_container
from bench.problem import SCALING, Problem, relative_error, truth
from bench.providers import by_default, measured_again, providers
from bench.results import KEY, Writer, read, recorded, validate
from bench.runner import Checker, build
from bench.shapes import DTYPES, LAYERS, layers, transformer

ROOT = Path(__file__).resolve().parent.parent
TINY_FLAGS = ["--shapes", "24x56", "--tokens", "40", "--ranks", "4", "--seconds", "0.02"]
FEW = ["--providers", "frozen,eager,afa", "--device", "cpu", "--no-pictures"]


@pytest.fixture(autouse=True)
def _memory_is_returned(monkeypatch):
    """Keeping freed memory would last for the whole process, and other tests need much of it."""
    monkeypatch.setattr("bench.allocator.use", lambda name: "system")


@pytest.fixture
def small_roofs(monkeypatch):
    """Measuring the machine's roofs takes seconds; a test of the command needs only their shape."""
    monkeypatch.setattr("bench.environment._GEMM_SIZES", {"cpu": (32, 64), "cuda": (32, 64)})
    monkeypatch.setattr("bench.environment._COPY_BYTES", 1 << 16)


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
    names = []
    for name, provider in providers().items():
        if name == "compiled" or provider.absent(case) is not None:
            continue
        check = checker.check(build(provider, checker.problem), provider.function)
        assert check.right, (name, check)
        names.append(name)
    assert {"eager", "afa", "afa.torch", "afa.identity"} <= set(names)


def test_a_wrong_result_of_ours_is_not_timed_and_fails_the_run(tmp_path, monkeypatch, small_roofs):
    def zeros(case, inplace):
        return lambda x, a, b, base: base + 0 * (x.sum() + a.sum() + b.sum())

    wrong = dataclasses.replace(providers()["afa.torch"], name="afa.wrong", branch=zeros)
    monkeypatch.setattr(command, "providers", lambda: providers() | {"afa.wrong": wrong})
    flags = ["--scopes", "branch", "--providers", "eager,afa.wrong", "--out", str(tmp_path)]
    assert command.main([*TINY_FLAGS, *flags, "--device", "cpu", "--no-pictures"]) == 1
    records = read(tmp_path / "custom.jsonl")
    assert [r["provider"] for r in records if r["kind"] == "wrong"] == ["afa.wrong"]
    assert {r["provider"] for r in records if r["kind"] == "row"} == {"eager"}


# The command and its records


def test_the_command_writes_valid_rows_of_every_scope(tmp_path, small_roofs, capsys):
    scopes = ["--scopes", "layer,branch,model", "--out", str(tmp_path)]
    assert command.main([*TINY_FLAGS, *FEW, *scopes]) == 0
    records = read(tmp_path / "custom.jsonl")
    for record in records:
        validate(record)
    assert [r["kind"] for r in records[:2]] == ["environment", "roof"]
    rows = [r for r in records if r["kind"] == "row"]
    keys = [tuple(row[name] for name in KEY) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {(r["scope"], r["pass"]) for r in rows} == {
        *((scope, step) for scope in ("layer", "branch", "model") for step in ("forward", "backward", "both")),
        *(("model", variant) for variant in optimizer.VARIANTS),
    }
    for row in rows:
        assert row["provider"] not in row["ratio"]
        trained = row["scope"] != "branch" and row["provider"] != "frozen" and row["pass"] not in optimizer.VARIANTS
        assert ("tax" in row) == (trained and row["rounds"] >= 6) == ("tax_interval" in row)
        assert row["ratio_interval"].keys() == row["ratio"].keys()
        for name, (low, high) in row["ratio_interval"].items():
            assert low <= row["ratio"][name] <= high
        if "tax" in row:
            assert row["tax_interval"][0] <= row["tax"] <= row["tax_interval"][1]
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert "p50 ms" in capsys.readouterr().out


def test_decoding_shapes_are_timed_as_inference(tmp_path, small_roofs):
    flags = ["--shapes", "24x56", "--tokens", "1", "--seconds", "0.02", "--out", str(tmp_path)]
    assert command.main([*flags, *FEW]) == 0
    rows = [r for r in read(tmp_path / "custom.jsonl") if r["kind"] == "row"]
    assert {row["pass"] for row in rows} == {"inference"}


def test_a_spent_budget_and_too_large_a_case_are_recorded(tmp_path, small_roofs):
    huge = [*FEW, "--shapes", "24x56", "--tokens", "40,1000000000000", "--out", str(tmp_path)]
    assert command.main([*huge, "--seconds", "0.02"]) == 0
    skipped = [r for r in read(tmp_path / "custom.jsonl") if r["kind"] == "skipped"]
    assert len(skipped) == 1 and "GB" in skipped[0]["reason"]
    assert command.main([*huge, "--budget", "1e-9"]) == 0
    skipped = [r for r in read(tmp_path / "custom.jsonl") if r["kind"] == "skipped"]
    assert [r["m"] for r in skipped] == [40, 1000000000000] and "budget" in skipped[0]["reason"]


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


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.stem)
def test_recorded_results_are_valid(path):
    records = read(path)
    assert records[0]["kind"] == "environment"
    for record in records:
        validate(record)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "rows"}, "kind"),
        ({"p50_ms": "1"}, "p50_ms"),
        ({"p50_ms": float("nan")}, "p50_ms"),
        ({"calls": True}, "calls"),
        ({"speed": 1}, "speed"),
    ],
)
def test_an_invalid_record_is_refused(change, message):
    validate(example_row())
    with pytest.raises(ValueError, match=message):
        validate(example_row() | change)


def test_a_missing_field_is_refused():
    row = example_row()
    del row["error_ratio"]
    with pytest.raises(ValueError, match="error_ratio"):
        validate(row)


def test_numbers_are_written_with_five_digits(tmp_path):
    writer = Writer(tmp_path / "folder" / "rows.jsonl")
    writer.write(example_row() | {"p50_ms": 1.23456789, "ratio": {"eager": 2 / 3}})
    row = json.loads(writer.path.read_text())
    assert row["p50_ms"] == 1.2346 and row["ratio"] == {"eager": 0.66667}


def test_the_same_provider_twice_is_a_check_of_the_measurement(tmp_path, small_roofs, monkeypatch):
    # Rounds enough for an interval, however long they take, and no more.
    monkeypatch.setitem(timing.measure.__kwdefaults__, "most", 8)
    flags = ["--providers", "eager,afa,afa.again", "--device", "cpu", "--no-pictures", "--out", str(tmp_path)]
    assert command.main([*TINY_FLAGS, *flags, "--seconds", "600"]) == 0
    *_, last = read(tmp_path / "custom.jsonl")
    validate(last)
    assert last["kind"] == "self_check" and last["pairs"] == 3 and 0 <= last["include_one"] <= 3
    for scope, pairs in (("layer", ["afa"]), ("model", ["frozen", "afa", "afa.peft", "afa.accelerate"])):
        default = by_default("cpu", scope)
        assert [measured_again(name) for name in default if measured_again(name)] == pairs
        assert "afa.cpu" not in default and ("compiled" in default) == (scope == "layer")


def test_too_few_rounds_for_an_interval_give_times_and_no_ratios(tmp_path, small_roofs, monkeypatch, capsys):
    monkeypatch.setitem(timing.measure.__kwdefaults__, "most", 5)
    assert command.main([*TINY_FLAGS, *FEW, "--scopes", "layer,model", "--seconds", "60", "--out", str(tmp_path)]) == 0
    rows = [r for r in read(tmp_path / "custom.jsonl") if r["kind"] == "row"]
    assert {row["scope"] for row in rows} == {"layer", "model"}
    for row in rows:
        assert row["rounds"] == 5 and row["p50_ms"] > 0 and row["ratio"] == row["ratio_interval"] == {}
        assert not row.keys() & {"tax", "tax_interval", "over_floor", "adamw_ratio"}
    assert "goals" not in capsys.readouterr().out


# Cases


def test_every_named_shape_and_preset_can_be_chosen():
    assert layers([*LAYERS]) == list(LAYERS.values())
    assert layers(["gpt2", "gpt2.up"]) == [v for k, v in LAYERS.items() if k.startswith("gpt2.")]
    assert layers(["3x5"])[0][1:] == (3, 5, False)
    assert transformer("400x600")[1:] == (1, 400, 600, 1)
    axes = dict.fromkeys(("scopes", "shapes", "tokens", "ranks", "dtypes", "alphas"))
    shared = {"adapter_dtype": None, "activation": "silu", "dropout": 0.0, "device": "cpu"}
    for preset in PRESETS:
        assert cases(argparse.Namespace(preset=preset, **axes, **shared))
    one = argparse.Namespace(preset=None, **(axes | {"ranks": [8, 8]}), **shared)
    assert len(cases(one)) == 1  # a flag alone starts from one case, and each case runs once


def test_every_provider_runs_or_says_why_not():
    for name, provider in providers().items():
        reason = provider.absent(TINY)
        assert reason is None or (isinstance(reason, str) and len(reason) > 5), name
    assert "GPU" in providers()["unsloth"].absent(TINY)
    if importlib.util.find_spec("torchtune"):  # pyproject.toml lists what it imports: nothing may be missing
        assert providers()["torchtune"].absent(TINY) is None
    assert "branch" in providers()["peft"].absent(TINY._replace(scope="branch"))


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


# Costs


def test_the_floor_is_arithmetic_or_bytes_whichever_is_longer():
    case = TINY._replace(m=1000, k=100, n=300, r=10, adapter_dtype="f32")
    both = cost.branch(case, "both")
    assert both.flop == 6 * 1000 * 10 * (100 + 300)
    assert both.nbytes == 4 * (1000 * (3 * 100 + 2 * 300)) + 3 * 4 * 10 * 400
    assert both == cost.branch(case, "forward") + cost.branch(case, "backward")
    gflop_s, gb_s = 1.0, 1000.0
    assert both.milliseconds(gflop_s, gb_s) == pytest.approx(both.flop * 1e-6)
    assert both.milliseconds(1e6, 0.001) == pytest.approx(both.nbytes * 1e-3)
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


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
    values = [8, 16, 64, 128]
    got, residual = scaling.fit(values, [3.0 * v**exponent for v in values])
    assert got == pytest.approx(exponent) and residual < 1e-9
    assert scaling.fit(values, [1.0, 2.0, 8.0, 32.0])[1] > 0.1


def test_the_scaling_command_sweeps_every_variable(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "MODEL", transformer("48x64"))
    sweeps = {name: [8, 16] for name in "mrkn"} | {"layers": [1, 2]}
    monkeypatch.setattr(scaling, "SWEEPS", sweeps)
    monkeypatch.setattr(scaling, "CENTER", {"m": 8, "k": 8, "n": 8, "r": 8})
    flags = ["--providers", "frozen,afa", "--seconds", "0.01", "--out", str(tmp_path)]
    assert scaling.main(flags) == 0
    records = read(tmp_path / "scaling_layer_f32.jsonl")
    for record in records:
        validate(record)
    exponents = [r for r in records if r["kind"] == "exponent"]
    assert [(r["variable"], r["provider"]) for r in exponents] == [
        (variable, provider) for variable in sweeps for provider in ("frozen", "afa")
    ]
    assert all(r["variable"] not in r["at"] and len(r["p50_ms"]) == 2 for r in exponents)


# Modelled cases


def test_modelled_cases_are_labelled_and_add_communication(tmp_path, capsys):
    pytest.importorskip("triton")
    from bench.model import multi_gpu_overhead

    assert multi_gpu_overhead.main(["--ranks", "16", "--out", str(tmp_path)]) == 0
    assert "MODELLED, not measured" in capsys.readouterr().out
    records = read(tmp_path / "modelled.jsonl")
    for record in records:
        validate(record)
    times = {(r["case"], r["implementation"]): r for r in records if r["kind"] == "modelled"}
    implementations = {name for _, name in times}
    for name in implementations:
        single = times["llama-3-8b, single, r=16", name]
        parallel = times["llama-3-8b, data parallel, r=16", name]
        # 7 linear layers in 32 blocks; float32 gradients pass each of 8 GPUs' links 1.75 times.
        parameters = 32 * 16 * sum(count * (k + n) for count, k, n, _ in multi_gpu_overhead.LLAMA_8B.linears())
        sent = 1.75 * 4 * parameters / 450e9 * 1e3
        assert parallel["assumptions"]["adapter_parameters_per_gpu"] == parameters
        assert parallel["milliseconds"] - single["milliseconds"] == pytest.approx(sent, rel=0.1)
        assert times["llama-3-70b, tensor parallel, r=16", name]["gpus"] == 8
    assert len(implementations) > 3


def test_tensor_parallelism_splits_every_layer_of_the_model_once():
    from bench.model.multi_gpu_overhead import LLAMA_70B

    linears = LLAMA_70B.linears()
    weights = sum(count * k * n for count, k, n, _ in linears) * LLAMA_70B.blocks
    assert sum(count for count, *_ in linears) == 7
    assert 68e9 < weights + 2 * 128256 * LLAMA_70B.hidden < 71e9  # with embedding and head: 70B
