"""The native CPU kernels: instruction sets, threads, strides, memory, and the tables shared with Python."""

import ast
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import skip_without_memory
from helpers import run_on_isa

from afa_kernels import _ops, afa_lora, reference
from afa_kernels.activation import ACTIVATIONS, phi
from afa_kernels.backend import cpu, native, registry, torch_ops
from afa_kernels.backend.registry import Call
from afa_kernels.dropout import keep_mask
from afa_kernels.options import Options, Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = native._C.cpu_isas() if cpu.BACKEND.status() else []
NAN = float("nan")


def problem(m, k, n, r, dtype, *, ab_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, cols, scale=1.0):
        return torch.randn(rows, cols, generator=generator) * scale

    x, dy, base = (draw(m, c).to(dtype) for c in (k, n, n))
    a = draw(r, k, k**-0.5).to(ab_dtype or dtype)
    b = draw(n, r, r**-0.5).to(ab_dtype or dtype)
    return x, a, b, dy, base


def run(x, a, b, dy, base, spec, *, alpha_t=0.3, seed=None, threads=2, recompute=False, backend=cpu):
    """Return y, z, dx, da, db; the output is poisoned first."""
    alpha_t = torch.tensor(alpha_t)
    out = torch.full((x.shape[0], b.shape[0]), NAN, dtype=x.dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        z = backend.forward(x, a, b, alpha_t, seed, spec, base=base, out=out, save_z=True)
        gradients = backend.backward(
            dy, x, a, b, None if recompute else z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return out, z, *gradients


def truth_of(x, a, b, dy, base, spec, *, alpha_t=0.3, seed=None):
    alpha_t = torch.tensor(alpha_t)
    x64, a64, b64 = x.double(), a.to(x.dtype).double(), b.to(x.dtype).double()
    base64 = None if base is None else base.double()
    y, z = reference.forward(x64, a64, b64, alpha_t, seed, spec, base64)
    return y, z, *reference.backward(dy.double(), x64, a64, b64, alpha_t, seed, spec)


def assert_accurate(got, same_dtype, truth, dtype, context=""):
    """No further from float64 than twice what torch in the dtype of x is, plus a rounding of the largest value."""
    for name, value, torch_value, exact in zip(("y", "z", "dx", "da", "db"), got, same_dtype, truth, strict=True):
        assert value.shape == exact.shape and value.dtype == torch_value.dtype, (name, context)
        assert torch.isfinite(value).all(), (name, context)
        floor = torch.finfo(dtype).eps * exact.abs().max().item()
        error = (value.double() - exact).abs().max().item()
        allowed = 2 * (torch_value.double() - exact).abs().max().item() + 2 * floor
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} {context}"


def check(operands, spec, **options):
    got = run(*operands, spec, **options)
    eager = run(*operands, spec, **options, backend=torch_ops)
    options = {key: value for key, value in options.items() if key in ("alpha_t", "seed")}
    assert_accurate(got, eager, truth_of(*operands, spec, **options), operands[0].dtype, (spec, options))


SHAPES = (
    (1, 70, 90, 4),  # one row: slabs of columns
    (5, 1030, 1100, 24),  # few rows, several slabs, ragged tiles; still worth several threads
    (48, 64, 64, 8),  # exactly one block of rows and whole tiles
    (49, 100, 129, 7),  # one row more than a block; odd rank
    (390, 70, 66, 33),  # more rows than a super block
    (19, 130, 140, 256),  # the largest rank
    (6, 640, 130, 20),  # so few rows that A is read where it lies
    (33, 17, 19, 1),  # the smallest rank
)


def accuracy_of_every_shape():
    """Every shape, dtype and activation once: run in this process, and in one process per instruction set."""
    for index, (m, k, n, r) in enumerate(SHAPES):
        for dtype in DTYPES:
            activation = list(ACTIVATIONS)[index % len(ACTIVATIONS)]
            operands = problem(m, k, n, r, dtype, ab_dtype=(None, torch.float32, torch.float64)[index % 3])
            check(operands, Spec(activation, 1.7))
            check(operands, Spec(activation, 0.5, 77), seed=torch.tensor(-12345 - index), recompute=True)
    # Results above the 12 MB from which every machine writes them past the cache; rows end within a tile.
    for dtype in DTYPES:
        check(problem(2000, 3168, 3168, 4, dtype), Spec("silu", 1.7))


def test_accuracy():
    accuracy_of_every_shape()


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    run_on_isa(isa, "import test_native\ntest_native.accuracy_of_every_shape()")


FEATURES = {"generic": set(), "avx2": {"avx2"}, "avx512": {"avx2", "avx512", "avx512_halved"}}
FEATURES["avx512bf16"] = FEATURES["avx512"] | {"avx512_bf16"}
FEATURES["amx"] = FEATURES["avx512bf16"] | {"amx_tile", "amx_bf16"}


@pytest.mark.long
@pytest.mark.parametrize("isa", ISAS)
def test_the_cap_makes_a_machine_of_that_kind(isa):
    best = ISAS.index(isa) + 1
    run_on_isa(
        isa,
        "import afa_kernels\nfrom afa_kernels.backend import native\n"
        f"assert native._C.cpu_isas() == {ISAS[:best]!r}, native._C.cpu_isas()\n"
        "assert afa_kernels.backends()['cpu'].details['isas'] == native._C.cpu_isas()\n"
        "features = set(native._C.cpu_features())\n"
        f"assert features <= {FEATURES[isa]!r}, features\n"
        f"assert {isa!r} in ('generic', 'avx512bf16', 'amx') or {isa!r} in features, features\n",
    )


@pytest.mark.long
@pytest.mark.parametrize("name", ["mmx", "amx"])
def test_impossible_instruction_set_is_an_error(name):
    if name == "amx" and (name in ISAS or os.environ.get("AFA_CPU_ISA")):
        pytest.skip("this machine has it, or a cap hides whether it has")
    script = (
        "from afa_kernels.backend import cpu, native\nstatus = cpu.BACKEND.status()\n"
        f"assert not status and {name!r} in status.reason and 'generic' in status.reason, status\n"
        "try:\n    native._C.cpu_isas()\n"
        f"except ValueError as error:\n    assert {name!r} in str(error), error\n"
        "else:\n    raise AssertionError('no error')\n"
    )
    environment = os.environ | {"AFA_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads_or_on_saved_z(shape, dtype):
    operands = problem(*shape, dtype, ab_dtype=torch.float32)
    spec, seed = Spec("gelu", 2.0, 26), torch.tensor(99)
    first = run(*operands, spec, seed=seed, threads=1)
    for threads in (2, 3, 5):
        for recompute in (False, True):
            again = run(*operands, spec, seed=seed, threads=threads, recompute=recompute)
            for one, other in zip(first, again, strict=True):
                assert torch.equal(one, other), (threads, recompute)


def strided(t, kind):
    """The same values with other strides, and NaN in every gap."""
    if kind == "transposed":
        return t.T.contiguous().T
    rows, cols = (2 * t.shape[0], 3 * t.shape[1]) if kind == "gaps" else (t.shape[0], t.shape[1] + 5)
    memory = torch.full((rows, cols), NAN, dtype=t.dtype)
    view = memory[::2, ::3] if kind == "gaps" else memory[:, 2:-3]
    return view.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["transposed", "gaps", "window"])
def test_strides_change_nothing(kind, dtype):
    for m, k, r in ((3, 130, 6), (3, 640, 8), (70, 130, 6)):
        operands = problem(m, k, 75, r, dtype)
        plain = run(*operands, Spec("silu", 1.5, 30), seed=torch.tensor(4))
        copies = [strided(t, kind) for t in operands]
        kept = [t.clone() for t in copies]
        for one, other in zip(plain, run(*copies, Spec("silu", 1.5, 30), seed=torch.tensor(4)), strict=True):
            assert torch.equal(one, other)
        for before, after in zip(kept, copies, strict=True):
            assert torch.equal(before, after), "an operand was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "gaps", "window"])
def test_base_is_read_and_out_alone_is_written(kind, dtype):
    x, a, b, _, base = problem(50, 40, 75, 6, dtype)
    spec, alpha_t = Spec("relu", 1.0), torch.tensor(0.5)

    def forward(base, out):
        cpu.forward(x, a, b, alpha_t, None, spec, base=base, out=out, save_z=False)
        return out

    expected = forward(base, torch.full_like(base, NAN))
    place = base.clone() if kind == "plain" else strided(base, kind)
    memory = place if kind in ("plain", "transposed") else place._base
    gaps = memory.isnan()
    assert torch.equal(forward(place, place), expected)
    assert torch.equal(memory.isnan(), gaps), "something beside out was written"
    bias = base[0].expand_as(base)
    zero = forward(None, torch.full_like(base, NAN))
    assert torch.equal(forward(torch.zeros_like(base), torch.full_like(base, NAN)), zero)
    assert torch.equal(forward(bias, torch.full_like(base, NAN)), forward(bias.contiguous(), torch.empty_like(base)))


@pytest.mark.parametrize("dropout", [0, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_frozen_gemm_plus_the_branch(dtype, dropout):
    x, a, b, dy, _ = problem(60, 70, 50, 6, dtype, ab_dtype=torch.float32)
    weight = (torch.randn(50, 70) / 8).to(dtype)
    bias = torch.randn(50)
    spec, alpha_t, seed = Spec("silu", 1.5, dropout), torch.tensor(0.4), torch.tensor(8)
    frozen = F.linear(x.double(), weight.double(), bias.to(dtype).double())
    truth = truth_of(x, a, b, dy, frozen, spec, alpha_t=0.4, seed=seed)
    truth = (truth[0], truth[1], truth[2] + dy.double() @ weight.double(), *truth[3:])
    results = []
    for backend in ("cpu", "torch"):
        options = Options(spec, True, backend)
        y, z = _ops.linear_forward(True, weight, bias, x, a, b, alpha_t, seed, options)
        gradients = _ops.linear_backward(True, weight, dy, x, a, b, z, alpha_t, seed, options, True, True)
        results.append((y, z, *gradients))
    assert_accurate(*results, truth, dtype)


def test_expanded_dy():
    x, a, b, dy, base = problem(70, 64, 96, 8, torch.float32)
    for expanded in (dy[:1].expand_as(dy), torch.ones(()).expand_as(dy)):
        operands = (x, a, b, expanded, base)
        dense = (x, a, b, expanded.contiguous(), base)
        for one, other in zip(run(*operands, Spec("tanh", 1.0)), run(*dense, Spec("tanh", 1.0)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_subset_of_gradients_has_the_same_bits(dtype):
    x, a, b, dy, base = problem(100, 80, 70, 5, dtype)
    spec, alpha_t = Spec("gelu_tanh", 1.2), torch.tensor(0.7)
    full = run(x, a, b, dy, base, spec, alpha_t=0.7)
    for subset in range(1, 8):
        needs = [bool(subset & bit) for bit in (1, 2, 4)]
        for z in (None, full[1]):
            got = cpu.backward(
                dy, x, a, b, z, alpha_t, None, spec, need_dx=needs[0], need_da=needs[1], need_db=needs[2]
            )  # fmt: skip
            for needed, one, other in zip(needs, got, full[2:], strict=True):
                assert torch.equal(one, other) if needed else one is None


def test_db_alone_over_many_blocks_of_rows():
    """Without dz a block of rows ends with dB: its h must stay until every thread has read it."""
    x, a, b = torch.randn(3001, 24), torch.randn(16, 24), torch.randn(1536, 16)
    dy, spec, alpha_t = torch.randn(3001, 1536), Spec("silu", 1.0), torch.tensor(0.5)

    def db(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            needs = {"need_dx": False, "need_da": False, "need_db": True}
            return cpu.backward(dy, x, a, b, None, alpha_t, None, spec, **needs)[2]
        finally:
            torch.set_num_threads(before)

    want = db(1)
    for _ in range(10):
        assert torch.equal(db(4), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_go_where_the_sums_go_and_nowhere_else(dtype):
    """No zero of a padding may meet them: infinity times 0 is NaN."""
    x, dy, base = torch.randn(200, 100), torch.randn(200, 70), torch.randn(200, 70)
    x[3, 7], x[150, 2], base[9, 3], dy[20, 4] = float("inf"), float("nan"), float("inf"), float("inf")
    leaves = [
        x.to(dtype).requires_grad_(),
        torch.randn(5, 100, requires_grad=True),
        torch.randn(70, 5, requires_grad=True),
    ]
    found = []
    for backend in ("cpu", "reference"):
        y = afa_lora(*leaves, 0.5, base=base.to(dtype), backend=backend)
        found.append([torch.isfinite(t) for t in (y, *torch.autograd.grad(y, leaves, dy.to(dtype)))])
    for got, wanted in zip(*found, strict=True):
        assert torch.equal(got, wanted)
    assert not found[0][0].all() and found[0][0].sum() > 197 * 69


def test_gradients_of_float32_factors_are_not_rounded_to_the_dtype_of_x():
    x, a, b, dy, base = problem(300, 64, 64, 8, torch.bfloat16, ab_dtype=torch.float32)
    da, db = run(x, a, b, dy, base, Spec("silu", 1.0))[3:]
    assert da.dtype == db.dtype == torch.float32
    assert not torch.equal(da, da.bfloat16().float()) and not torch.equal(db, db.bfloat16().float())


def test_dropout_mask_is_the_python_one():
    cases = ((3, 40, 128, 7), (17, 16, 1, -1), (5, 1, 255, 2**63 - 1), (2, 533, 26, -(2**63)))
    for rows, cols, threshold, seed in cases:
        mask = torch.empty(rows, cols, dtype=torch.uint8)
        native._C.dropout_mask(mask.data_ptr(), rows, cols, seed, threshold)
        assert torch.equal(mask.bool(), keep_mask(torch.tensor(seed), rows, cols, threshold))


def test_activation_ids_are_the_python_ones():
    assert native._C.activation_ids() == {name: activation.id for name, activation in ACTIVATIONS.items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_values_are_the_python_ones(activation):
    # K = 1 and N = 1 with factors 1 make the operator phi itself, and dx its slope.
    z = torch.cat((torch.linspace(-20, 20, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4])))
    one, alpha_t = torch.ones(1, 1), torch.tensor(1.0)
    x = z[:, None].contiguous()
    y = torch.empty_like(x)
    spec = Spec(activation, 1.0)
    cpu.forward(x, one, one, alpha_t, None, spec, base=None, out=y, save_z=False)
    dx, _, _ = cpu.backward(
        torch.ones_like(x), x, one, one, None, alpha_t, None, spec, need_dx=True, need_da=False, need_db=False
    )
    exact = x.double()
    torch.testing.assert_close(y.double(), phi(exact, 1.0, activation), rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(dx.double(), ACTIVATIONS[activation].slope(exact), rtol=2e-6, atol=3e-6)


def test_refusals_say_why():
    call = Call("cpu", torch.float64, 4, 4, 4, 2, "silu")
    assert "float64" in cpu.BACKEND.why_not(call)
    assert cpu.BACKEND.why_not(call._replace(dtype=torch.float32, m=4096, k=1024, n=1024)) is None
    assert "cuda" in cpu.BACKEND.why_not(call._replace(device="cuda"))


def test_a_missing_module_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "load_error", "no module named _C")
    status = cpu.BACKEND.status()
    assert not status and status.reason == "no module named _C"


def test_cpu_comes_before_torch():
    names = registry.names()
    assert names.index("cpu") < names.index("torch")


@pytest.mark.parametrize(
    ("isa", "features", "dtype", "m", "r", "dropout", "wanted"),
    [
        ("avx512bf16", [], torch.bfloat16, 512, 64, False, "torch"),
        ("avx512bf16", ["avx512_halved"], torch.bfloat16, 512, 64, False, "cpu"),
        ("amx", [], torch.bfloat16, 512, 64, False, "cpu"),
        ("avx512bf16", [], torch.float32, 512, 64, False, "cpu"),
        ("avx512bf16", [], torch.bfloat16, 16, 64, False, "cpu"),
        ("avx512bf16", [], torch.bfloat16, 512, 63, False, "cpu"),
        ("avx512bf16", [], torch.bfloat16, 512, 64, True, "cpu"),
    ],
)
def test_what_torch_does_faster_is_left_to_it(monkeypatch, isa, features, dtype, m, r, dropout, wanted):
    machine = SimpleNamespace(cpu_isa=lambda: isa, cpu_isas=list, cpu_features=lambda: features, build_info=dict)
    monkeypatch.setattr(native, "_C", machine)
    call = Call("cpu", dtype, m, 4096, 4096, r, "silu", dropout)
    registry.forget_choices()
    try:
        chosen, reason = registry.select(call, None)
        assert chosen.name == wanted
        assert ("torch's GEMMs" in reason) == (wanted == "torch"), reason
        assert registry.select(call, "cpu").backend.name == "cpu", "forced, it takes the call"
    finally:
        registry.forget_choices()


@pytest.mark.long
def test_one_openmp_runtime():
    """In a process of its own: other packages bring runtimes too."""
    script = (
        "import torch, afa_kernels as afa\n"
        "afa.afa_lora(torch.ones(100, 64), torch.ones(4, 64), torch.ones(64, 4), 0.5, backend='cpu')\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print({line.split()[-1] for line in maps if any(n in line for n in ('libgomp', 'libomp', 'libiomp'))})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    runtimes = ast.literal_eval(done.stdout)
    assert len(runtimes) == 1, runtimes


def test_random_problems():
    draw = random.Random(5)
    for case in range(16):
        m, k, n = (draw.randint(1, high) for high in (100, 300, 300))
        dtype = draw.choice(DTYPES)
        operands = problem(m + 8, k + 16, n + 16, draw.randint(2, 40), dtype, seed=case)
        threshold = draw.choice((0, 0, 64))
        seed = torch.tensor(case) if threshold else None
        spec = Spec(draw.choice(list(ACTIVATIONS)), 1.5, threshold)
        check(operands, spec, seed=seed, alpha_t=draw.choice((0.0, 0.3, 1.0)), recompute=draw.random() < 0.5)


@pytest.mark.slow
def test_more_than_2_31_elements():
    rows, cols, r = 70_000, 32_768, 2  # x has 2.3e9 elements, 4.6 GB
    skip_without_memory(16)
    x = torch.empty(rows, cols, dtype=torch.bfloat16)
    pattern = torch.randn(64, cols).bfloat16()
    for start in range(0, rows, 64):
        x[start : start + 64] = pattern[: min(64, rows - start)]
    a, b = torch.randn(r, cols) / cols**0.5, torch.randn(3, r)
    alpha_t, seed, dy, spec = torch.tensor(0.5), torch.tensor(3), torch.randn(rows, 3).bfloat16(), Spec("silu", 1.0, 26)
    y = torch.empty(rows, 3, dtype=x.dtype)
    z = cpu.forward(x, a, b, alpha_t, seed, spec, base=None, out=y, save_z=True)
    dx, _, _ = cpu.backward(dy, x, a, b, z, alpha_t, seed, spec, need_dx=True, need_da=True, need_db=True)
    tail = slice(rows - 5, rows)  # beyond element 2^31
    mask = torch.empty(rows, cols, dtype=torch.uint8)
    native._C.dropout_mask(mask.data_ptr(), rows, cols, 3, 26)
    expected = spec.inverse_keep * (x[tail].float() * mask[tail]) @ a.bfloat16().float().T
    torch.testing.assert_close(z[tail].float(), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(dx[tail] != 0, mask[tail].bool() & (dx[tail] != 0)) and (dx[tail] != 0).any()
