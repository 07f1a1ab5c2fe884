"""nvcc's PTX of every CUDA kernel, launched by the wheel's own host code and executed by the PTX machine. The numeric
tests of test_numerics.py run on ``cuda_ptx`` as well."""

import re
from collections import Counter

import ptx_cuda
import ptx_problems
import pytest
import torch
from helpers import Problem, relative_error

from afa_kernels.backend import choice
from afa_kernels.operator.options import Spec
from tools import ptx_report

_cuda_on_ptx = pytest.importorskip("afa_kernels._cuda_on_ptx", reason="built with nvcc and the emulator only")

RANKS = (16, 32, 64)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# (M, K, N): one pass over x; the split forward; columns beyond one slab.
SHAPES = ((75, 72, 80), (40, 904, 136), (33, 136, 584))
KERNELS = (
    "forward",
    "project",
    "expand",
    "dy",
    "project_dy",
    "db",
    "x",
)  # with barriers; the others have no shared memory
RESULTS = ("y", "z", "dx", "da", "db")


@pytest.fixture(autouse=True)
def _no_launches_left():
    _cuda_on_ptx.take_launches()
    yield
    _cuda_on_ptx.set_edit(lambda text: text)


def _name(launch) -> str:
    return ptx_report.plain_name(launch["kernel"]).removesuffix("_kernel")


def forward_and_backward(name, problem, spec, *, seed=None, save_z=True):
    backend = choice.get(name)
    alpha_t, y = torch.tensor(0.3), torch.full_like(problem.base, torch.nan)
    operands = (problem.x, problem.lora_a, problem.lora_b)
    z = backend.forward(*operands, alpha_t, seed, spec, base=problem.base, out=y, save_z=save_z)
    gradients = backend.backward(
        problem.dy, *operands, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True
    )
    return dict(zip(RESULTS, (y, z, *gradients), strict=True))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_those_of_the_emulator(dtype, r):
    """Up to the multiplications and additions that nvcc fuses: they turn a rounding here and there. relu, so that no
    approximate instruction is in between; ranks below their class too, and dropout."""
    for shape in SHAPES:
        for rank, dropout in ((r, 0), (r - 3, 77)):
            problem = Problem.random(*shape, rank, DTYPES[dtype])
            arguments = (problem, Spec("relu", 1.5, dropout))
            seed = torch.tensor(5) if dropout else None
            expected = forward_and_backward("cuda_emulated", *arguments, seed=seed)
            got = forward_and_backward("cuda_ptx", *arguments, seed=seed)
            for what in RESULTS:
                error = relative_error(got[what], expected[what])
                assert error <= torch.finfo(DTYPES[dtype]).eps / 4, (shape, rank, what)


def test_every_kernel_runs():
    """All that the build holds, among them the recomputation of z and the primitive check."""
    for dtype in DTYPES.values():
        for r in (16, 20, 40):
            for shape in SHAPES:
                problem = Problem.random(*shape, r, dtype, adapter_dtype=torch.float32)
                forward_and_backward("cuda_ptx", problem, Spec("silu", 1.0), save_z=False)
                forward_and_backward("cuda_ptx", problem, Spec("silu", 1.0))
        matrices, values = torch.randn(32, 16).to(dtype), torch.randn(128)
        out = torch.zeros(608, dtype=torch.int32)
        pointers = (matrices.data_ptr(), values.data_ptr(), out.data_ptr())
        _cuda_on_ptx.primitive_check(int(dtype == torch.float16), *pointers, 0, 0)
    launched = {launch["kernel"] for launch in _cuda_on_ptx.take_launches()}
    assert launched == set(_cuda_on_ptx.kernel_names())


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("arch", ptx_cuda.DEVICES)
def test_random_problems(arch, number):
    """Each dtype with each class of ranks, on the PTX for either architecture."""
    where = ptx_problems.CudaTarget(arch)
    with where.running():
        ptx_problems.RandomProblem(where, number).check()
    assert {launch["device"] for launch in _cuda_on_ptx.take_launches()} == {ptx_cuda.DEVICES[arch]}


@pytest.mark.parametrize("r", [16, 64])
def test_schedules_give_the_same_bits(r):
    problem, spec = Problem.random(70, 136, 584, r, torch.bfloat16), Spec("gelu", 1.5, 50)
    results = []
    for seed in range(6):
        _cuda_on_ptx.set_seed(1000 * seed)
        results.append(forward_and_backward("cuda_ptx", problem, spec, seed=torch.tensor(3)))
    for other in results[1:]:
        for what in RESULTS:
            assert torch.equal(results[0][what], other[what])


def test_traffic_is_one_pass_over_each_large_matrix():
    m, k, n, r = 128, 512, 512, 16
    forward_and_backward("cuda_ptx", Problem.random(m, k, n, r, torch.bfloat16), Spec("silu", 1.5))
    launches = _cuda_on_ptx.take_launches()
    copied = sum(launch["async_copy_bytes"] for launch in launches)
    rows, weights = 2, 2 * (r * k + r * n)  # tiles of 64 rows, each of which reads A and B
    chunks = 2 * 2 * r * k + 2 * r * n  # of 64 rows of x, each of which reads A, and of 128 of dy
    forward, backward = 2 * m * k + rows * weights, 2 * m * (k + n + r) + chunks
    assert copied == forward + backward
    moved = Counter()
    for launch in launches:
        for operand, (read, written) in launch["traffic"].items():
            moved.update({f"{operand} read": read, f"{operand} written": written})
    large = {"dx written": m * k, "dy read": m * n, "base read": m * n, "y written": m * n}
    assert {what: moved[what] for what in large} == {what: 2 * elements for what, elements in large.items()}
    assert moved["x read"] + moved["wide read"] == 2 * 2 * m * k, "x, once forward and once backward"


def test_products_and_barriers_are_as_many_as_the_shape_asks_for():
    """No product is computed twice, whatever the sum over K is split into; ldmatrix has no bank conflict."""
    m, k, n, r = 128, 512, 512, 16
    forward_and_backward("cuda_ptx", Problem.random(m, k, n, r, torch.bfloat16), Spec("silu", 1.5))
    launches = {_name(launch): launch for launch in _cuda_on_ptx.take_launches()}
    of_mma = 16 * 8 * 16
    products = {"dy": 2 * m * n * r, "x": 2 * m * k * r}
    assert {name: launches[name]["multiply_adds"] * of_mma for name in products} == products
    forward = sum(launch["multiply_adds"] for name, launch in launches.items() if name not in products)
    assert forward * of_mma == m * (k + n) * r
    assert launches["x"]["bank_conflicts"] == 0
    for name, launch in launches.items():
        blocks = launch["grid"][0] * launch["grid"][1]
        assert launch["block_barriers"] % blocks == 0 and (launch["block_barriers"] > 0) == (name in KERNELS), name


def test_the_report_adds_up():
    (row,) = [row for row in ptx_report.rows(ptx_report.of_nvcc("sm_80", (64, 512, 64, 16))) if row[0] == "x_kernel"]
    cells = dict(zip(ptx_report.COLUMNS, row, strict=True))
    assert cells["launches"] == "1" and cells["copied"] == f"{2 * (64 * 512 + 16 * 512 + 64 * 16) // 1024}K"
    assert cells["mma"] == str(2 * 64 * 512 * 16 // (16 * 8 * 16))


# --- Faults planted in the PTX ---


def edited(change):
    """Return an edit of the PTX that must change it somewhere."""

    def edit(text: str) -> str:
        lines = text.splitlines()
        return "\n".join(change(lines))

    return edit


def without(pattern: str, step: int = 1):
    def change(lines):
        found = [i for i, line in enumerate(lines) if pattern in line]
        gone = set(found[::step])
        return [line for i, line in enumerate(lines) if i not in gone]

    return edited(change)


def replaced(old: str, new: str):
    return edited(lambda lines: [line.replace(old, new) for line in lines])


PLANTED = {
    "no barrier": without("bar.sync"),
    "every third barrier is missing": without("bar.sync", 3),
    "no wait": without("cp.async.wait_group"),
    "no commit": without("cp.async.commit_group"),
    "waits that let one group too many pass": edited(
        lambda lines: [re.sub(r"wait_group (\d)", lambda m: f"wait_group {int(m[1]) + 1}", line) for line in lines]
    ),
    "loads are not transposed": replaced(".x4.trans.", ".x4."),
    "all loads are transposed": replaced("m8n8.x4.shared", "m8n8.x4.trans.shared"),
    "packed results are truncated": replaced("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"),
    "sizes of copies are constant": edited(
        lambda lines: [
            line.rsplit(",", 1)[0] + ", 16;" if "cp.async.cg.shared.global" in line else line for line in lines
        ]
    ),
    "swapped registers of a fragment": edited(
        lambda lines: [swap_registers(line) if "mma.sync" in line else line for line in lines]
    ),
}


def swap_registers(line: str) -> str:
    """Exchange the second and the third register of A."""
    head, _, rest = line.partition("}, {")
    fragment, _, tail = rest.partition("}")
    a = fragment.split(", ")
    a[1], a[2] = a[2], a[1]
    return head + "}, {" + ", ".join(a) + "}" + tail


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_noticed(fault):
    problem, spec = Problem.random(75, 264, 136, 16, torch.bfloat16), Spec("relu", 1.5)
    right = forward_and_backward("cuda_ptx", problem, spec)
    _cuda_on_ptx.set_edit(PLANTED[fault])
    try:
        wrong = forward_and_backward("cuda_ptx", problem, spec)
    except RuntimeError:
        return
    assert any(not torch.equal(right[what], wrong[what]) for what in RESULTS)


def test_a_failed_launch_says_what_happened_where(monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")  # the double does not go on while a kernel runs
    problem = Problem.random(75, 72, 80, 16, torch.bfloat16)
    _cuda_on_ptx.set_edit(PLANTED["no wait"])
    with pytest.raises(RuntimeError, match=r"forward kernel(.|\n)*PTX line \d+, \w+\.cuh:\d+, kernel _ZN3afa14forward"):
        forward_and_backward("cuda_ptx", problem, Spec("relu", 1.5))
    _cuda_on_ptx.set_edit(lambda text: text)
    forward_and_backward("cuda_ptx", problem, Spec("relu", 1.5))
