"""``--tune`` on a simulated card, Triton's interpreter, with a clock of the test's own: what is measured, what a file
keeps, and what calls make of it."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import altered

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure  # noqa: E402
from triton.runtime import errors  # noqa: E402

import afa_kernels as afa  # noqa: E402
from afa_kernels import __main__ as command  # noqa: E402
from afa_kernels import tune  # noqa: E402
from afa_kernels.backend import choice, measured  # noqa: E402
from afa_kernels.backend.interface import Call  # noqa: E402
from afa_kernels.backend.measured import EXPERTS, FUSED  # noqa: E402
from afa_kernels.backend.triton import backend as triton_backend  # noqa: E402
from afa_kernels.backend.triton import configs, tuning  # noqa: E402
from afa_kernels.tune import Case, Layer  # noqa: E402

CPU = torch.device("cpu")
NAME = "Some GPU / 80 GB"
PASSES, CANDIDATES = tuning.PASSES, tuning.candidates
LINEAR, MIXTURE = Layer(40, 24), Layer(40, 24, 3)


def card(name: str) -> SimpleNamespace:
    return SimpleNamespace(is_available=lambda: True, device_count=lambda: 1, get_device_name=lambda _: name)


def forget() -> None:
    measured.forget()
    choice.forget_choices()


@pytest.fixture
def a_card(monkeypatch, tmp_path, interpreter):
    """CPU tensors are those of a card; few tiles are compared."""
    monkeypatch.setattr(tuning, "PASSES", ("project", "gemm"))
    monkeypatch.setattr(tuning, "candidates", lambda tile: CANDIDATES(tile)[:: len(CANDIDATES(tile)) - 1])
    monkeypatch.setenv(measured.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(measured, "_CARDS", {"cpu": card(NAME)})
    forget()
    yield CPU
    monkeypatch.undo()
    forget()


def case(layer: Layer, rows: int = 30, r: int = 6) -> Case:
    return Case(layer, r, rows, torch.float16, torch.float16)


def prefers(*best: str):
    """Return a clock by which these are the fastest, in their order, of what is compared."""

    def clock(steps):
        return {name: float(best.index(name) + 1 if name in best else 100 + i) for i, name in enumerate(steps)}

    return clock


def measure(*cases: Case, clock, **options) -> None:
    measured.write(CPU, tune.tune(list(cases), CPU, clock, **options))
    choice.forget_choices()


def plan(layer: Layer, rows: int = 30, r: int = 6) -> afa.Plan:
    p = tune.Problem(case(layer, rows, r), CPU)
    return afa.plan(p.x, p.a, p.b, 0.5, weight=p.weight, **p.rows)


@pytest.mark.parametrize("best", ["triton", "torch", "cpu"])
def test_the_fastest_backend_takes_the_layer(a_card, best, capsys):
    if choice.get("cpu").why_not(Call("cpu", torch.float16, 30, 40, 24, 6, "silu")):
        pytest.skip("no CPU kernels")
    before = plan(LINEAR).backend
    measure(case(LINEAR), clock=prefers(best))
    found = plan(LINEAR)
    assert found.backend == best and found.reason.startswith("measured on this card: ") and best in found.reason
    assert plan(LINEAR, rows=7000).backend == best  # whatever the number of rows
    assert plan(Layer(40, 32)).backend == before  # of another layer nothing is known
    assert plan(LINEAR, r=20).backend == before  # nor of another class of ranks
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:5] == ["40x24", "6", "30", before, best]


@pytest.mark.parametrize("fused", [True, False])
def test_experts_take_the_faster_way(a_card, fused):
    assert not plan(MIXTURE).frozen.startswith("fused")  # the interpreter is chosen by name alone
    measure(case(MIXTURE), clock=prefers(*(("0", FUSED) if fused else ("0", "triton"))))
    assert (
        plan(MIXTURE).backend == "triton" and plan(MIXTURE).frozen.startswith("fused: measured on this card") == fused
    )
    with afa.use_backend("triton"):
        assert plan(MIXTURE).frozen.startswith("fused: measured on this card") == fused


def test_the_fastest_tiles_run(a_card, monkeypatch):
    """Those of each pass: the clock prefers the last candidate, which has another number of stages."""
    monkeypatch.setattr(tuning, "PASSES", PASSES)
    measure(case(MIXTURE), clock=lambda steps: {**prefers(FUSED)(steps), list(steps)[-1]: 0.5})
    (entry,) = measured.read(CPU)[0]
    row = configs.table_tiles(configs.INTERPRETER, 2, 6)
    p = tune.Problem(case(MIXTURE), CPU)
    found = tuning.tiles(configs.device_of(CPU), p.x, p.b)
    for name in tuning.PASSES:
        assert getattr(found, name) == tuning.candidates(getattr(row, name))[-1] != getattr(row, name)
    # A and B of another dtype take another amount of shared memory.
    assert tuning.tiles(configs.device_of(CPU), p.x, p.b.float()) == row
    p.step("triton")


def test_by_tokens_each_number_of_rows_has_its_own(a_card):
    def clock(steps):
        return prefers("triton" if next(iter(steps.values()))()[0].shape[0] < 20 else "torch")(steps)

    measure(case(LINEAR, 10), case(LINEAR, 40), clock=clock, by_tokens=True)
    assert [plan(LINEAR, rows).backend for rows in (1, 10, 11, 40, 500)] == [*["triton"] * 2, *["torch"] * 3]


def test_what_is_less_accurate_than_torch_is_left_out(a_card, monkeypatch, capsys):
    right = choice.get("triton")

    def forward(x, a, b, *rest, out, **options):
        z = right.forward(x, a, b, *rest, out=out, **options)
        out.mul_(1.02)
        return z

    monkeypatch.setitem(choice._BACKENDS, "triton", altered(right, forward=forward))
    measure(case(LINEAR), clock=prefers("triton"))
    assert plan(LINEAR).backend != "triton"
    assert "left out: triton: M=64 K=40 N=24 r=6 float16" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        errors.OutOfResources(300000, 200000, "shared memory"),
        # Triton 3.2 has no such error: there it is one of the two below.
        *([errors.PTXASError("Register allocation failed")] if hasattr(errors, "PTXASError") else []),
        RuntimeError("Internal Triton PTX codegen error\n"),
        RuntimeError("`ptxas` failed with error code 1\n"),
        CompileTimeAssertionFailure(None, None, "BLOCK_M"),
        CompilationError(None, None, "numel (2097152) exceeds triton maximum tensor numel (1048576)"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("AMD LLVM 21: local memory (98304) exceeds limit (65536)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_tiles_that_do_not_compile_or_fit_are_never_the_fastest(error):
    def fails():
        raise error

    assert not tune._runs(fails) and tune._runs(lambda: None)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), TypeError("a fault of ours")]
)
def test_any_other_error_is_raised(error):
    def fails():
        raise error

    with pytest.raises(type(error), match=str(error)):
        tune._runs(fails)


def test_the_random_numbers_of_the_caller_stay_as_they_are(a_card):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    measure(case(LINEAR), clock=prefers("triton"))
    assert torch.equal(torch.get_rng_state(), before)


# --- the file


def changed(**changes) -> None:
    """Change the file of the card."""
    path = measured.file_of(CPU)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    forget()


def test_what_is_measured_later_is_added(a_card):
    measure(case(LINEAR), clock=prefers("triton"))
    measure(case(MIXTURE), clock=prefers("triton"))
    measure(case(LINEAR), clock=prefers("torch"))
    assert len(measured.read(CPU)[0]) == 2 and plan(LINEAR).backend == "torch"
    assert plan(MIXTURE).backend == "triton"
    assert [entry.key.kind for entry in measured.read(CPU)[0]].count(EXPERTS) == 1


@pytest.mark.parametrize("name", ["card", "driver", "torch", "triton", "afa_kernels"])
def test_another_card_or_version_is_ignored_with_a_reason(a_card, name):
    measure(case(LINEAR), clock=prefers("triton"))
    changed(**{name: "another"})
    assert plan(LINEAR).backend != "triton"
    entries, reason = measured.read(CPU)
    assert not entries and f"{name} another, here " in reason and str(measured.file_of(CPU)) in reason
    measure(case(LINEAR), clock=prefers("triton"))  # in its place
    assert plan(LINEAR).backend == "triton"


@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", "null", '{"layers": 3}', "\x00"])
def test_a_broken_file_breaks_no_call(a_card, content):
    before = plan(LINEAR)
    measured.file_of(CPU).write_text(content)
    forget()
    assert plan(LINEAR) == before and measured.read(CPU)[1]
    tune.Problem(case(MIXTURE), CPU).step("triton")
    measure(case(LINEAR), clock=prefers("triton"))
    assert plan(LINEAR).backend == "triton"


def test_what_a_file_holds_of_other_layers_stays_where_an_entry_is_broken(a_card):
    measure(case(LINEAR), case(MIXTURE), clock=prefers("triton"))
    linear, mixture = json.loads(measured.file_of(CPU).read_text())["layers"]
    without = {name: value for name, value in linear.items() if name != "k"}
    wrong = (
        {"us": {}},
        {"us": {"triton": "fast"}},
        {"us": {"triton": -1.0}},
        {"rows": "all"},
        {"tiles": 5},
        {"tiles": {"project": []}},
        {"k": [40]},
    )
    for broken in (None, 3, {}, without, *(linear | each for each in wrong)):
        changed(layers=[broken, mixture])
        assert plan(LINEAR).backend != "triton" and plan(MIXTURE).backend == "triton", broken
    changed(layers=[linear | {"us": {"of the future": 1.0}}, mixture])
    assert plan(LINEAR).backend in choice.names()


@pytest.mark.parametrize("tiles", [{"project": 99}, {"project": -1}, {"chunks": 0}, {"of the future": 0}], ids=str)
def test_tiles_that_are_no_candidates_are_those_of_the_table(a_card, tiles):
    measure(case(LINEAR), clock=prefers("triton"))
    (layer,) = json.loads(measured.file_of(CPU).read_text())["layers"]
    changed(layers=[layer | {"tiles": layer["tiles"] | tiles}])
    p = tune.Problem(case(LINEAR), CPU)
    assert tuning.tiles(configs.device_of(CPU), p.x, p.b) == configs.table_tiles(configs.INTERPRETER, 2, 6)
    p.step("triton")


def test_a_backend_that_cannot_take_the_call_is_passed_over(a_card, monkeypatch):
    before = plan(LINEAR).backend
    measure(case(LINEAR), clock=prefers("triton"))
    monkeypatch.setattr(triton_backend.TritonBackend, "refuses", lambda self, call: "no")
    choice.forget_choices()
    assert plan(LINEAR).backend == before


def test_a_layer_has_one_choice_of_tiles_for_all_numbers_of_rows(a_card):
    """Those of the largest; and the mean of the times decides."""
    sizes = []

    def clock(steps):
        sizes.append(len(next(iter(steps.values()))()[0]))
        fast = "triton" if sizes[-1] == 30 else "torch"
        return {**prefers()(steps), fast: 1.0} if fast in steps else prefers()(steps)

    measure(case(LINEAR, 8), case(LINEAR, 30), clock=clock)
    assert sizes == [30, 30, 8]  # one pass of tiles, then the backends in turn
    (entry,) = measured.read(CPU)[0]
    assert entry.rows is None and entry.us["torch"] == pytest.approx(entry.us["triton"] * 1.01, rel=0.2)


def test_a_folder_that_cannot_be_written_is_told(command_of_a_card, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv(measured.FOLDER_VARIABLE, str(tmp_path / "file"))
    assert command.main(["--tune", "40x24", "--tokens", "8", "--dtype", "float16"]) == 1
    told = capsys.readouterr()
    assert "not kept" in told.err and measured.FOLDER_VARIABLE in told.err and "40x24" in told.out


def test_where_files_are(monkeypatch, tmp_path):
    monkeypatch.delenv(measured.FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(measured.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.folder() == tmp_path / "afa_kernels"
    monkeypatch.setenv(measured.FOLDER_VARIABLE, str(tmp_path / "own"))
    assert measured.folder() == tmp_path / "own"


# --- the command


def test_layers():
    assert tune.layers_of("64x32") == [Layer(64, 32)]
    assert tune.layers_of("64x32,8x64x16") == [Layer(64, 32), Layer(64, 16, 8)]
    for wrong in ("", "64", "64x", "axb", "1x2x3x4", "no/such-model"):
        with pytest.raises(ValueError, match="--tune: expected KxN or ExKxN"):
            tune.layers_of(wrong)


def test_layers_of_a_model(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.Qwen3MoeConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=3, vocab_size=50,
        intermediate_size=64, moe_intermediate_size=16, num_experts=6, mlp_only_layers=[0], decoder_sparse_step=1,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    found = tune.layers_of(str(tmp_path))
    assert {Layer(32, 32), Layer(32, 16), Layer(32, 64), Layer(64, 32), Layer(32, 32, 6), Layer(16, 32, 6)} <= set(
        found
    )
    assert len(found) == len(set(found)) and Layer(32, 50) not in found  # each once, and not the head


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert command.main(["--tune", "64x64"]) == 1
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert command.main([]) == 0
    assert "no card, so device, dtype and rank decide" in capsys.readouterr().out


@pytest.fixture
def command_of_a_card(a_card, monkeypatch):
    monkeypatch.setattr(tune, "_device", lambda: CPU)
    monkeypatch.setattr(tune, "interleaved", lambda device: prefers("triton"))


def test_the_command_measures_and_keeps(command_of_a_card, monkeypatch, capsys):
    given = ["--tune", "40x24", "--ranks", "4,6", "--tokens", "8,30", "--dtype", "float16", "--weights", "float16"]
    assert command.main(given) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 and last == f"kept in {measured.file_of(CPU)}"
    assert plan(LINEAR).backend == "triton"
    monkeypatch.setattr(measured, "_CARDS", {"cpu": card(NAME), "cuda": card(NAME)})
    assert command.main([]) == 0


@pytest.mark.parametrize("wrong", ["0", "-4", "a", "4,", "4.5"])
def test_numbers_that_are_none_are_errors(command_of_a_card, wrong, capsys):
    assert command.main(["--tune", "40x24", f"--ranks={wrong}"]) == 2
    assert f"--ranks: expected positive numbers, several after commas, got {wrong!r}" in capsys.readouterr().err


def test_the_clock_takes_turns(monkeypatch):
    """And times each step between two events of the card, whose queue it waits for."""
    now, order = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            time.sleep(0.002)

        def elapsed_time(self, end):
            return end.at - self.at

    def step(name, milliseconds):
        order.append(name)
        now[0] += milliseconds

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    steps = {"fast": lambda: step("fast", 1.0), "slow": lambda: step("slow", 3.0)}
    assert tune.interleaved(CPU)(steps) == {"fast": 1000.0, "slow": 3000.0}
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]
    assert len(rounds) >= 5 and set(rounds) == {("fast", "slow"), ("slow", "fast")}


def test_candidates_stay_within_what_the_kernels_take():
    for rows in configs.TABLE.values():
        for row in rows.values():
            for tile in (*tuning.candidates(row.project), *tuning.candidates(row.gemm)):
                assert 32 <= tile.rows <= configs.MAX_TILE_ROWS and tile.cols >= 32
                assert tile.warps in (4, 8) and tile.stages >= 1
