"""What Triton compiles, without a GPU: how often, and what the machine-code report would refuse.

Compilation needs a process in which Triton is not the interpreter. Where this one is the other
kind, the first test runs the rest of the file in a process of its own.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from afa_kernels.backend.interface import Rows  # noqa: E402
from afa_kernels.backend.triton import backend, configs, launch, passes  # noqa: E402
from afa_kernels.operator.options import Spec  # noqa: E402
from tools import triton_aot, triton_report  # noqa: E402
from tools.triton_aot import Problem, compile_launch, compiling_for, device_for  # noqa: E402

compiles = pytest.mark.skipif(backend.INTERPRETED, reason="run by test_in_a_process_that_compiles")


@pytest.mark.skipif(not backend.INTERPRETED, reason="this process compiles")
def test_in_a_process_that_compiles():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout


def compiled_kernels(x, a, b, dy, alpha_t, seed, spec) -> list[tuple[str, int]]:
    """Return name and identity of the compiled kernel of each launch of a forward and backward."""
    out = torch.empty_like(dy)
    with launch.recording(device_for("sm_90")) as launches:
        z = passes.forward(launch.Context(x, a, b, alpha_t, seed, spec), None, out, True)
        passes.backward(
            launch.Context(x, a, b, alpha_t, seed, spec), dy, z, a.dtype, b.dtype,
            need_dx=True, need_da=True, need_db=True,
        )  # fmt: skip
    with compiling_for("sm_90"):
        return [(entry.name, id(compile_launch(entry))) for entry in launches]


@compiles
def test_one_compilation_for_every_alpha_seed_scaling_and_m():
    k, n, r = 512, 64, 16
    a, b = torch.zeros(r, k), torch.zeros(n, r)
    # Elements of one tensor: their addresses are aligned to 4 and 8 bytes, as buffers may be.
    alphas, seeds = torch.linspace(0, 1, 100), torch.arange(100)
    kernels = set()
    for step in range(100):
        m = 1 + step  # odd, even, divisible by 16 and 1
        x, dy = torch.zeros(m, k), torch.zeros(m, n)
        spec = Spec("silu", 1.0 + step / 7, 1 + step)
        kernels.update(compiled_kernels(x, a, b, dy, alphas[step], seeds[step], spec))
    names = [name for name, _ in kernels]
    assert len(names) == len(set(names)) == 6, sorted(names)


@compiles
def test_one_compilation_for_every_number_of_owners_and_rows():
    """And any offsets, ranks, alpha_t and scalings, which no host reads; one alpha_t for all owners has a stride of 0,
    and that of every other owner one of 2."""
    k, n, r = 512, 64, 16
    offsets, numbers, seeds = torch.arange(64, dtype=torch.int32), torch.linspace(0, 1, 64), torch.arange(64)
    kernels = set()
    for step in range(48):
        m, count = 1 + step, 1 + step % 17
        x, dy = torch.zeros(m, k), torch.zeros(m, n)
        a, b = torch.zeros(count, r, k), torch.zeros(count, n, r)
        alpha_t = (numbers[step].expand(count), numbers[:count], numbers[: 2 * count : 2])[step % 3]
        rows = Rows(offsets[:count], offsets[step : step + 1].expand(count), numbers[:count])
        with launch.recording(device_for("sm_90")) as launches:
            for backward in (False, True):
                context = launch.Context(x, a, b, alpha_t, seeds[step], Spec("silu", 1.0, 1 + step), rows=rows)
                if backward:
                    needs = {"need_dx": True, "need_da": True, "need_db": True}
                    passes.backward(context, dy, torch.zeros(m, r), a.dtype, b.dtype, **needs)
                else:
                    passes.forward(context, None, torch.empty_like(dy), True)
        with compiling_for("sm_90"):
            kernels.update((entry.name, id(compile_launch(entry))) for entry in launches)
    names = [name for name, _ in kernels]
    assert len(names) == len(set(names)) == 6, sorted(names)


@compiles
def test_another_activation_is_another_kernel():
    x, a, b, dy = torch.zeros(8, 512), torch.zeros(16, 512), torch.zeros(64, 16), torch.zeros(8, 64)
    alpha_t = torch.tensor(0.5)
    silu, gelu = (
        dict(compiled_kernels(x, a, b, dy, alpha_t, None, Spec(activation, 1.0))) for activation in ("silu", "gelu")
    )
    assert silu["phi_hb_forward_kernel"] != gelu["phi_hb_forward_kernel"]
    assert silu["x_pass_backward_kernel"] == gelu["x_pass_backward_kernel"]


@compiles
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "leaky_relu", "tanh", "sin"])
def test_every_activation_compiles(activation):
    problem = Problem(m=512, r=16, activation=activation)
    launches = [e for e in problem.record(device_for("sm_90")) if "ACT" in e.constants]
    assert len(launches) == 3
    for entry in launches:
        with compiling_for("sm_90"):
            assert compile_launch(entry).asm["cubin"]


@compiles
def test_unaligned_rows_compile():
    """K and N that are no multiple of 8 lose vector loads, not correctness."""
    for entry in Problem(m=512, k=1001, n=333, r=16).record(device_for("sm_90")):
        with compiling_for("sm_90"):
            code = triton_aot.examine(compile_launch(entry), "sm_90", entry.warps)
        assert code.registers <= 255


@compiles
@pytest.mark.parametrize("owners", [0, 8], ids=["lone", "owners"])
def test_machine_code_of_one_row(owners):
    variant = triton_report.Variant("sm_80", "sm_80", "bf16", 16, 0, 16384, owners)
    found = {}
    for entry in variant.record():
        with compiling_for("sm_80"):
            code = triton_aot.examine(compile_launch(entry), "sm_80", entry.warps)
        # How registers are allocated changes with Triton's version: spills are the report's matter.
        assert triton_report.faults(variant, entry, code._replace(spills=0)) == []
        found[entry.name] = code
    for name in ("xa_phi_hb_forward_kernel", "dy_pass_backward_kernel", "x_pass_backward_kernel"):
        code = found[name]
        assert code.tensor_core["HMMA"] > 0 and code.async_copies > 0, name
        assert 0 < code.registers <= 255 and code.instructions > 100
    assert found["weight_gradients_kernel"].tensor_core == {}


def test_the_report_finds_faults():
    variant = triton_report.Variant("sm_80", "sm_80", "bf16", 16, 0, 16384)
    with_product = variant.record()[0]
    good = triton_aot.MachineCode(64, 0, 1024, 2, 0.5, {"HMMA": 8}, 8, 0, 4, 500)
    assert triton_report.faults(variant, with_product, good) == []
    assert triton_report.faults(variant, with_product, good._replace(spills=3)) == ["3 spills"]
    assert triton_report.faults(variant, with_product, good._replace(tensor_core={})) == ["no tensor-core instruction"]
    too_much = good._replace(shared=200 * 1024)
    assert "shared memory" in triton_report.faults(variant, with_product, too_much)[0]
    assert triton_report.faults(variant._replace(arch="sm_90", row="sm_90"), with_product, too_much) == []
    default = variant._replace(row="default")
    assert triton_report.faults(default, with_product, good._replace(shared=70 * 1024))


@compiles  # the interpreter takes no bfloat16
def test_quick_report_is_a_subset_and_the_full_one_has_every_row():
    full = set(triton_report.variants(triton_report.NVIDIA + triton_report.AMD))
    quick = set(triton_report.variants(triton_report.NVIDIA + triton_report.AMD, quick=True))
    assert quick < full
    assert {v.arch for v in quick} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    dtypes = ("bf16", "fp16", "fp32", "tf32")
    rows = {(v.row, v.dtype, v.rank) for v in full}
    assert rows == set(itertools.product(configs.TABLE.keys() - {configs.INTERPRETER}, dtypes, configs.RANKS))
