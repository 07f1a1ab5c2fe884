"""nvcc's PTX of every CUDA kernel, launched by the wheel's own host code and executed by the PTX machine: what
conformance/ does not ask, the primitives, and what planted faults do."""

import re
from collections import Counter

import ptx_cuda
import pytest
import torch
from helpers import Problem
from ptx_cuda import forward_and_backward, same
from ptx_machine import ptx_report

from afa_kernels.operator.options import Spec

_cuda_on_ptx = pytest.importorskip(
    "afa_kernels._cuda_on_ptx", reason="built with nvcc and AFA_BUILD_PTX_MACHINE=1 only"
)

from ptx_helpers import layout  # noqa: E402

RANKS = (16, 32, 64)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# (M, K, N): one pass over x; the split forward; columns beyond one slab.
SHAPES = ((75, 72, 80), (40, 904, 136), (33, 136, 584))
# With barriers; the others have no shared memory.
KERNELS = ("forward", "project", "expand", "dy", "project_dy", "db", "x")


@pytest.fixture(autouse=True)
def _no_launches_left():
    _cuda_on_ptx.take_launches()
    yield
    _cuda_on_ptx.set_edit(lambda text: text)


def _name(launch) -> str:
    return ptx_report.plain_name(launch["kernel"]).removesuffix("_kernel")


def test_every_kernel_runs():
    """All that the build holds, among them the primitive check."""
    for dtype in DTYPES.values():
        for r in (16, 20, 40):
            for shape in SHAPES:
                problem = Problem.random(*shape, r, dtype, adapter_dtype=torch.float32)
                forward_and_backward(problem)
        matrices, values = torch.randn(32, 16).to(dtype), torch.randn(128)
        out = torch.zeros(608, dtype=torch.int32)
        pointers = (matrices.data_ptr(), values.data_ptr(), out.data_ptr())
        _cuda_on_ptx.primitive_check(int(dtype == torch.float16), *pointers, 0, 0)
    launched = {launch["kernel"] for launch in _cuda_on_ptx.take_launches()}
    assert launched == set(_cuda_on_ptx.kernel_names())


@pytest.mark.parametrize("r", RANKS)
def test_schedules_and_devices_give_the_same_bits(r):
    problem, spec = Problem.random(70, 136, 584, r, torch.bfloat16), Spec("gelu", 1.5, 50)
    results = []
    for seed in range(6):
        _cuda_on_ptx.set_seed(1000 * seed)
        results.append(forward_and_backward(problem, spec=spec, seed=torch.tensor(3)))
    small = _cuda_on_ptx.runtime.add_device(8, 9, 48, 99 << 10, 100 << 10)  # rings of another depth
    with ptx_cuda.kernels.on(small):
        results.append(forward_and_backward(problem, spec=spec, seed=torch.tensor(3)))
    assert all(same(results[0], other) for other in results[1:])


def test_traffic_is_one_pass_over_each_large_matrix():
    m, k, n, r = 128, 512, 512, 16
    forward_and_backward(Problem.random(m, k, n, r, torch.bfloat16))
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
    forward_and_backward(Problem.random(m, k, n, r, torch.bfloat16))
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
    right = forward_and_backward(problem, spec=spec)
    _cuda_on_ptx.set_edit(PLANTED[fault])
    try:
        wrong = forward_and_backward(problem, spec=spec)
    except RuntimeError:
        return
    assert not same(right, wrong)


def test_a_failed_launch_says_what_happened_where(monkeypatch):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")  # the double does not go on while a kernel runs
    problem = Problem.random(75, 72, 80, 16, torch.bfloat16)
    _cuda_on_ptx.set_edit(PLANTED["no wait"])
    with pytest.raises(RuntimeError, match=r"forward kernel(.|\n)*PTX line \d+, \w+\.cuh:\d+, kernel _ZN3afa14forward"):
        forward_and_backward(problem, spec=Spec("relu", 1.5))
    _cuda_on_ptx.set_edit(lambda text: text)
    forward_and_backward(problem, spec=Spec("relu", 1.5))


# --- Primitives, against the layouts that the vendor documents, in another formulation than the machine's ---


def primitive_check(dtype):
    bits = {"bf16": 0, "f16": 1}
    matrices = torch.randn(32, 16).to(DTYPES[dtype])
    values = torch.randn(128) * 3
    out = torch.zeros(608, dtype=torch.int32)
    _cuda_on_ptx.primitive_check(bits[dtype], matrices.data_ptr(), values.data_ptr(), out.data_ptr(), 0, 0)
    return matrices, values, out


# SM80_16x8x16: (thread (4, 8), value (2, 2, 2)) -> column-major offset in A (16 x 16), B (8 x 16)
# and C (16 x 8).
A_LAYOUT = layout((4, 8, 2, 2, 2), (32, 1, 16, 8, 128)).reshape(8, 32).T
B_LAYOUT = layout((4, 8, 2, 2), (16, 1, 8, 64)).reshape(4, 32).T
C_LAYOUT = layout((4, 8, 2, 2), (32, 1, 16, 8)).reshape(4, 32).T


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix_loads_match_the_documented_fragments(dtype):
    matrices, _, out = primitive_check(dtype)
    loaded = out[:128].view(torch.int16).view(32, 8).view(DTYPES[dtype])
    expected = matrices[:16].T.reshape(-1)[torch.from_numpy(A_LAYOUT)]
    assert torch.equal(loaded, expected)
    # Transposed and counted right first, the second matrix (k, n) becomes the A operand (n, k) of
    # its transpose.
    transposed = out[128:256].view(torch.int16).view(32, 8).view(DTYPES[dtype])
    expected = matrices[16:].reshape(-1)[torch.from_numpy(A_LAYOUT)]
    assert torch.equal(transposed, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_add_matches_the_documented_fragments(dtype):
    _, values, out = primitive_check(dtype)
    to_double = lambda words: words.view(torch.int16).view(DTYPES[dtype]).double()  # noqa: E731
    a = torch.zeros(256, dtype=torch.float64)
    a[torch.from_numpy(A_LAYOUT)] = to_double(out[:128].contiguous()).view(32, 8)
    b = torch.zeros(128, dtype=torch.float64)
    b[torch.from_numpy(B_LAYOUT)] = to_double(out[128:256].contiguous()).view(32, 8)[:, :4]
    c = torch.zeros(128, dtype=torch.float64)
    c[torch.from_numpy(C_LAYOUT)] = values.double().view(32, 4)
    # Column-major offsets: the transposes of the views.
    product = c.view(8, 16).T + a.view(16, 16).T @ b.view(16, 8)
    got = out[256:384].view(torch.float32).view(32, 4)
    expected = product.T.reshape(-1)[torch.from_numpy(C_LAYOUT)]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_match_torch(dtype):
    matrices, values, out = primitive_check(dtype)
    assert torch.equal(out[384:416].view(torch.int16).view(DTYPES[dtype]), values[:64].to(DTYPES[dtype]))
    assert torch.equal(out[416:480].view(torch.float32), matrices.view(-1)[:64].float())


@pytest.mark.parametrize("special", [0.0, -0.0, 1e-8, 6e-8, 2**-14, 65504.0, 65519.0, 65520.0, 3e38])
def test_conversion_of_special_values(special):
    for dtype in DTYPES:
        matrices = torch.zeros(32, 16).to(DTYPES[dtype])
        values = torch.full((128,), special) * torch.tensor([1.0, -1.0]).repeat(64)
        out = torch.zeros(608, dtype=torch.int32)
        _cuda_on_ptx.primitive_check(int(dtype == "f16"), matrices.data_ptr(), values.data_ptr(), out.data_ptr(), 0, 0)
        got = out[384:416].view(torch.int16)
        assert torch.equal(got, values[:64].to(DTYPES[dtype]).view(torch.int16)), dtype


def test_asynchronous_copy_fills_with_zeros():
    matrices, _, out = primitive_check("bf16")
    expected = matrices.view(torch.int32).reshape(-1)[:128].view(32, 4).clone()
    expected[::3] = 0
    assert torch.equal(out[480:608].view(32, 4), expected)
