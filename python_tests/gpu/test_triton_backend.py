"""The Triton backend beside its kernels: what it refuses, how it is found, tiles."""

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


from afa_kernels.backend.triton import configs, launch, tuning  # noqa: E402
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


DEVICE = Device("sm_90", 132, "Some GPU / 80 GB")


def test_a_context_has_the_tiles_that_it_is_given():
    forced = replace(configs.table_tiles("sm_90", 2, 8), project=Tile(32, 32, 4, 2))
    found = {entry.constants["BLOCK_M"] for entry in Problem(m=64, k=64, n=64).record(DEVICE, tiles=forced)[:1]}
    assert found == {32}
    assert Problem(m=64, k=64, n=64).record(DEVICE)[0].constants["BLOCK_M"] == 64


def test_a_segment_is_a_whole_number_of_tiles():
    for rows in configs.TABLE.values():
        for tiles in rows.values():
            for tile in tuning.candidates(tiles.project):
                for width in (1, 257, 5000):
                    assert launch.segment_columns(width) % tile.cols == 0
