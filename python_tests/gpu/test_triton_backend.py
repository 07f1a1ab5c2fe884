"""The Triton backend beside its kernels: what it refuses, how it is found, tiles, autotuning."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SIMULATED

import afa_kernels as afa
from afa_kernels.backend import choice
from afa_kernels.backend.interface import Call
from afa_kernels.backend.triton import backend

triton = pytest.importorskip("triton")

from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure  # noqa: E402
from triton.runtime import errors  # noqa: E402

from afa_kernels.backend.triton import autotune, configs, launch  # noqa: E402
from afa_kernels.backend.triton.configs import Device, Tile  # noqa: E402
from tools.triton_aot import Problem  # noqa: E402

CALL = Call("cpu", torch.float16, 64, 128, 128, 16, "silu")


def python(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh process and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_does_not_import_triton():
    code = "import sys, afa_kernels; afa_kernels.backends(); print('triton' in sys.modules)"
    assert python(code) == "False"


def test_without_a_gpu_the_reason_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status = python("import afa_kernels; s = afa_kernels.backends()['triton']; print(bool(s), s.reason)")
    assert status.startswith("False no GPU")


def test_a_missing_triton_is_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_triton_version", lambda: None)
    assert backend.BACKEND.status().reason == "triton is not installed"


def test_an_old_triton_is_the_reason(monkeypatch):
    monkeypatch.setattr(backend, "_triton_version", lambda: "3.1.0")
    assert backend.BACKEND.status().reason == "needs triton 3.2 or later, got 3.1.0"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": torch.float64}, "float64"),
        ({"r": 129}, "rank 129 is above 128"),
        ({"dtype": torch.float32, "r": 65, "dropout": True}, "float32 with dropout above rank 64"),
    ],
)
def test_refuses_with_the_reason(change, reason):
    assert reason in backend.BACKEND.refuses(CALL._replace(**change))
    assert backend.BACKEND.refuses(CALL) is None


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)


def test_the_interpreter_refuses_bfloat16(interpreter, monkeypatch):
    call = CALL._replace(dtype=torch.bfloat16)
    assert "has no bfloat16: float32 and float16 only" in backend.BACKEND.refuses(call)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert backend.BACKEND.refuses(call) is None


@pytest.mark.parametrize("narrow", ["lora_a", "lora_b"])
def test_the_interpreter_refuses_bfloat16_weights_beside_another_x(narrow):
    if "triton" not in SIMULATED or not backend.INTERPRETED:
        pytest.skip("not in the interpreter: TRITON_INTERPRET is not 1")
    given = {"x": torch.randn(4, 32), "lora_a": torch.randn(8, 32), "lora_b": torch.randn(16, 8)}
    given[narrow] = given[narrow].bfloat16()
    with pytest.raises(afa.BackendUnavailable, match="A and B in bfloat16"):
        afa.afa_lora(**given, alpha_t=0.5, backend="triton")
    for name in ("lora_a", "lora_b"):
        given[name] = given[name].expand(2, -1, -1)
    with pytest.raises(afa.BackendUnavailable, match="A and B in bfloat16"):
        afa.afa_lora(**given, offsets=torch.tensor([1, 4], dtype=torch.int32), alpha_t=0.5, backend="triton")


def test_rank_256_goes_to_torch_and_the_plan_says_why():
    if "triton" not in SIMULATED:
        pytest.skip("needs a backend that accepts CPU tensors")
    x, a, b = torch.randn(4, 32), torch.randn(256, 32), torch.randn(16, 256)
    with pytest.raises(afa.BackendUnavailable, match="rank 256 is above 128"):
        afa.plan(x, a, b, 0.5, backend="triton")


def test_the_interpreter_is_never_chosen_automatically():
    x, a, b = torch.randn(4, 32), torch.randn(8, 32), torch.randn(16, 8)
    assert afa.plan(x, a, b, 0.5).backend != "triton"
    if "triton" in SIMULATED:
        assert afa.plan(x, a, b, 0.5, backend="triton").backend == "triton"


def test_is_registered_before_torch():
    names = choice.names()
    assert names.index("triton") < names.index("torch")


def test_every_architecture_has_a_row_for_every_rank_and_size():
    for arch, rows in configs.TABLE.items():
        assert rows.keys() == {(size, rank) for size in (2, 4) for rank in configs.RANKS}, arch


@pytest.mark.parametrize("r, padded", [(1, 16), (16, 16), (17, 32), (33, 64), (100, 128), (128, 128)])
def test_ranks_are_padded_to_what_a_tensor_core_takes(r, padded):
    assert configs.padded_rank(r) == padded


def test_an_unknown_architecture_has_the_default_row():
    default = configs.TABLE[configs.DEFAULT][2, 16]
    assert configs.table_tiles("gfx1100", 2, 8) is default
    assert configs.table_tiles("sm_90", 2, 8) is not default
    assert configs.table_tiles("sm_103", 2, 8) is configs.table_tiles("sm_100", 2, 8)


@pytest.mark.parametrize(
    "arch, dtype, allowed, precision",
    [
        ("sm_90", torch.float32, False, "ieee"),
        ("sm_90", torch.float32, True, "tf32"),
        ("gfx942", torch.float32, True, "ieee"),  # TF32 is NVIDIA's
        ("sm_90", torch.bfloat16, True, "ieee"),  # one value for a dtype that it does not concern
    ],
)
def test_float32_products_follow_allow_tf32(arch, dtype, allowed, precision):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        launches = Problem(m=64, k=64, n=64, dtype=dtype).record(Device(arch, 100))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    found = {e.constants["PRECISION"] for e in launches if "PRECISION" in e.constants}
    assert found == {precision}


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """Autotuning switched on with a cache of its own, and a timer that prefers wide tiles."""
    timed = []

    def problem_timer(*problem):
        def seconds(name, tiles):
            timed.append(name)
            return 1.0 / getattr(tiles, name).cols

        return seconds

    monkeypatch.setenv(autotune.ENABLE_VARIABLE, "1")
    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(autotune, "problem_timer", problem_timer)
    monkeypatch.setattr(autotune, "_tuned", {})
    return timed


DEVICE = Device("sm_90", 132, "Some GPU / 80 GB")
X, B = torch.empty(100, 256, dtype=torch.bfloat16), torch.empty(128, 8)


def test_without_the_variable_nothing_is_timed(tuning, monkeypatch):
    monkeypatch.delenv(autotune.ENABLE_VARIABLE)
    assert autotune.tiles(DEVICE, X, B) is configs.table_tiles("sm_90", 2, 8)
    assert not tuning and not autotune.cache_file(DEVICE).exists()


def test_tuning_takes_the_fastest_tile_of_each_pass_and_keeps_it(tuning, monkeypatch):
    row = configs.table_tiles("sm_90", 2, 8)
    found = autotune.tiles(DEVICE, X, B)
    for name in ("project", "dy_pass", "x_pass", "x_pass_dropout"):
        widest = max(tile.cols for tile in autotune.candidates(getattr(row, name)))
        assert getattr(found, name).cols == widest > 0
    assert set(tuning) == {"project", "dy_pass", "x_pass", "x_pass_dropout"}

    tuning.clear()
    assert autotune.tiles(DEVICE, X, B) == found, "from this process"
    monkeypatch.setattr(autotune, "_tuned", {})
    assert autotune.tiles(DEVICE, X[:70], B) == found, "from the file, in the same class of M"
    assert not tuning
    autotune.tiles(DEVICE, X[:60], B)
    assert tuning, "another class of M is tuned anew"
    tuning.clear()
    autotune.tiles(DEVICE, X, B.bfloat16())
    assert tuning, "so is another dtype of A and B, which takes another amount of shared memory"


def test_an_unreadable_cache_is_tuned_again(tuning):
    path = autotune.cache_file(DEVICE)
    for content in ("not json", json.dumps({"bfloat16 M=128 K=256 N=128 r=16 weights=float32": {"unknown": 1}})):
        path.write_text(content)
        autotune._tuned.clear()
        assert autotune.tiles(DEVICE, X, B).project.cols > 0
        assert "project" in next(iter(json.loads(path.read_text()).values()))


def test_candidates_stay_within_what_the_kernels_take():
    for rows in configs.TABLE.values():
        for row in rows.values():
            for tile in autotune.candidates(row.project):
                assert 32 <= tile.rows <= configs.MAX_TILE_ROWS and tile.cols >= 32
                assert tile.warps in (4, 8) and tile.stages >= 1


def test_a_context_has_the_tiles_that_it_is_given():
    forced = replace(configs.table_tiles("sm_90", 2, 8), project=Tile(32, 32, 4, 2))
    found = {entry.constants["BLOCK_M"] for entry in Problem(m=64, k=64, n=64).record(DEVICE, tiles=forced)[:1]}
    assert found == {32}
    assert Problem(m=64, k=64, n=64).record(DEVICE)[0].constants["BLOCK_M"] == 64


@pytest.fixture
def timer(monkeypatch):
    """Make a timer of each pass of a small problem, whose clock runs a pass and then does what a test wants."""
    if "triton" not in SIMULATED:
        pytest.skip("not in the interpreter")

    def make(clock):
        def do_bench(function, return_mode):
            function()
            return clock()

        monkeypatch.setattr(triton.testing, "do_bench", do_bench)
        return autotune.problem_timer(torch.device("cpu"), torch.float32, 8, 16, 16, 4, torch.float32)

    return make


ROW = configs.table_tiles(configs.INTERPRETER, 4, 16)


def test_a_timed_pass_runs(timer):
    seconds = timer(lambda: 3.0)
    for name in ("project", "dy_pass", "x_pass", "x_pass_dropout"):
        assert seconds(name, ROW) == pytest.approx(3e-3)


def test_the_timer_runs_the_tiles_that_it_is_given(timer, monkeypatch):
    seconds = timer(lambda: 3.0)
    monkeypatch.setattr(configs, "table_tiles", None)
    launches = []
    monkeypatch.setattr(launch.Launch, "run", lambda entry: launches.append(entry))
    seconds("project", replace(ROW, project=Tile(64, 32, 4, 2)))
    assert [(e.constants["BLOCK_M"], e.constants["BLOCK_L"]) for e in launches if "BLOCK_L" in e.constants] == [
        (64, 32)
    ]


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
def test_a_tile_that_does_not_compile_or_fit_is_never_the_fastest(timer, error):
    def fails():
        raise error

    assert timer(fails)("project", ROW) == float("inf")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), TypeError("a fault of ours")]
)
def test_any_other_error_of_a_timed_pass_is_raised(timer, error):
    def fails():
        raise error

    with pytest.raises(type(error), match=str(error)):
        timer(fails)("project", ROW)


def test_tuning_leaves_the_random_numbers_of_the_caller_alone(timer, monkeypatch, tmp_path):
    """The same dropout whether the tiles are timed or found in the cache."""
    timer(lambda: 3.0)  # all are as fast: the row of the table stays
    monkeypatch.setenv(autotune.ENABLE_VARIABLE, "1")
    monkeypatch.setenv(autotune.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(autotune, "_tuned", {})
    x, a, b = torch.randn(8, 16), torch.randn(4, 16), torch.randn(16, 4)

    def two_calls():
        torch.manual_seed(7)
        return [afa.afa_lora(x, a, b, 0.5, dropout_p=0.5, backend="triton") for _ in range(2)]

    cold = two_calls()
    assert autotune._tuned
    for one, other in zip(cold, two_calls(), strict=True):
        assert torch.equal(one, other)


def test_a_segment_is_a_whole_number_of_tiles():
    for rows in configs.TABLE.values():
        for tiles in rows.values():
            for tile in autotune.candidates(tiles.project):
                for width in (1, 257, 5000):
                    assert launch.segment_columns(width) % tile.cols == 0
