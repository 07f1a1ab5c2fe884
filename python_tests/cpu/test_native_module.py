"""The compiled module: what it shares with Python, what it refuses, and a package that has to do without it."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conformance.problems import Problem

import afa_kernels
from afa_kernels.backend import choice, compiled, cpu
from afa_kernels.backend.interface import Call, Rows
from afa_kernels.operator.activation import COMPILED_IDS, IDENTITY
from afa_kernels.operator.dropout import keep_mask
from afa_kernels.operator.options import Spec

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not cpu.BACKEND.status(), reason=cpu.BACKEND.status().reason),
]


def test_dropout_mask_is_the_python_one():
    cases = ((3, 40, 128, 7), (17, 16, 1, -1), (5, 1, 255, 2**63 - 1), (2, 533, 26, -(2**63)))
    for rows, cols, threshold, seed in cases:
        mask = torch.empty(rows, cols, dtype=torch.uint8)
        compiled._C.dropout_mask(mask.data_ptr(), rows, cols, seed, threshold)
        assert torch.equal(mask.bool(), keep_mask(torch.tensor(seed), rows, cols, threshold))


def test_activation_ids_are_the_python_ones(monkeypatch):
    assert compiled._C.activation_ids() == COMPILED_IDS
    monkeypatch.setitem(COMPILED_IDS, "silu", 77)
    module, reason = compiled._load()
    assert module is None and "has other activations" in reason


def test_refusals_say_why():
    call = Call("cpu", torch.float64, 4, 4, 4, 2, "silu")
    assert "float64" in cpu.BACKEND.why_not(call)
    assert cpu.BACKEND.why_not(call._replace(dtype=torch.float32, m=4096, k=1024, n=1024)) is None
    assert "cuda" in cpu.BACKEND.why_not(call._replace(device="cuda"))


def test_a_missing_module_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(compiled, "_C", None)
    monkeypatch.setattr(compiled, "load_error", "no module named _C")
    status = cpu.BACKEND.status()
    assert not status and status.reason == "no module named _C"


def test_cpu_comes_before_torch():
    names = choice.names()
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
    monkeypatch.setattr(compiled, "_C", machine)
    call = Call("cpu", dtype, m, 4096, 4096, r, "silu", dropout)
    choice.forget_choices()
    try:
        chosen, reason = choice.select(call, None)
        assert chosen.name == wanted
        assert ("torch's GEMMs" in reason) == (wanted == "torch"), reason
        assert choice.select(call, "cpu").backend.name == "cpu", "forced, it takes the call"
    finally:
        choice.forget_choices()


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


STALE = """
import sys, types
from importlib import import_module, util
spec = util.find_spec("afa_kernels")
sys.modules["afa_kernels"] = package = types.ModuleType("afa_kernels")
package.__path__ = list(spec.submodule_search_locations)
real = import_module("afa_kernels._C")
del sys.modules["afa_kernels"]
stale = types.ModuleType("afa_kernels._C")
vars(stale).update({name: value for name, value in vars(real).items() if name != MISSING})
sys.modules["afa_kernels._C"] = stale

import torch
import afa_kernels as afa
for name in ("cpu", "cuda"):
    status = afa.backends()[name]
    assert not status and f"(it has no {MISSING}); build it again with `pip install .`" in status.reason, status
layer = afa.AFALinear(torch.nn.Linear(6, 5), r=2)
torch.nn.init.normal_(layer.lora_b)
x = torch.randn(3, 6)
layer(x).sum().backward()
assert layer.lora_a.grad.abs().sum() > 0
afa.afa_lora(x, layer.lora_a, layer.lora_b, torch.tensor(0.5))
assert afa.plan(x, layer.lora_a, layer.lora_b, 0.5).backend == "torch"
from afa_kernels.__main__ import main
main()
"""


@pytest.mark.long
@pytest.mark.parametrize("missing", ["use_torch", "float_at", "cpu_backward"])
def test_a_module_of_another_version_is_reported_and_the_package_works_without_it(missing):
    code = STALE.replace("MISSING", repr(missing))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("cpu  "))
    assert f"not available: {compiled.OTHER_VERSION} (it has no {missing})" in line


def test_the_names_of_the_module_are_those_that_the_package_uses():
    package = Path(afa_kernels.__file__).parent
    sources = {file.name: file.read_text() for file in package.rglob("*.py") if file.name != "torch_private.py"}
    used = {name for text in sources.values() for name in re.findall(r"(?<!torch\.)\b_C\.(\w+)", text)}
    assert used - {"cuda"} | {"use_torch", "activation_ids"} == set(compiled._NAMES)
    cuda = sources["cuda.py"]
    assert set(re.findall(r"\b_?module\.(\w+)", cuda)) == set(compiled._CUDA_NAMES)


# --- rows by owner and layers that share x


def test_ranks_beyond_the_limit_are_refused():
    calls = [Call("cpu", torch.float32, 4, 70, 90, r, "silu") for r in (100, 156)]
    assert cpu.BACKEND.refuses_together(calls) is None
    calls[0] = calls[0]._replace(r=101)
    assert cpu.BACKEND.refuses_together(calls) == "takes ranks up to 256 together, got 257"


WIDTHS, RANKS = (90, 70, 130), (16, 3, 17)


def fields_of(widths, ranks):
    """Return x and a valid tuple for each layer of cpu_shared_forward and of cpu_shared_backward."""
    problem = Problem.of(torch.float32, 7, 70, widths, ranks, weights=torch.float32)
    second = problem.outputs[1]
    second.alpha_t, second.spec = None, second.spec._replace(activation=IDENTITY)
    results, forward, backward = problem.forward(cpu.BACKEND), [], []
    for i, o in enumerate(problem.outputs):
        shared = (o.a, o.b, o.alpha_t, COMPILED_IDS[o.spec.activation], o.spec.scaling)
        forward.append((*shared, o.base, results[f"y{i}"], results[f"z{i}"]))
        backward.append((*shared, o.dy, results[f"z{i}"], torch.empty_like(o.a), torch.empty_like(o.b)))
    return problem.x, forward, backward


def broken(fields, i, value):
    """Return the fields of all members with one of the second member's replaced."""
    return (fields[0], (*fields[1][:i], value, *fields[1][i + 1 :]), *fields[2:])


BAD_MEMBERS = [
    (0, torch.randn(3, 71), ValueError, r"lora_a: expected shape \(3, 70\)"),
    (0, None, TypeError, "lora_a"),
    (1, torch.randn(70, 300), ValueError, "expected N >= 1 and 1 <= r <= 256"),
    (1, torch.randn(70), ValueError, "lora_a|lora_b"),
    (3, 99, ValueError, "activation: unknown id"),
    (3, "silu", (TypeError, RuntimeError), "cast"),
    (3, COMPILED_IDS["silu"], TypeError, "alpha_t"),  # the second member has no alpha_t
    (4, None, (TypeError, RuntimeError), "cast"),
]


@pytest.mark.parametrize(("i", "value", "error", "match"), BAD_MEMBERS, ids=lambda v: None)
def test_a_bad_member_is_an_error(i, value, error, match):
    x, forward, backward = fields_of(WIDTHS, RANKS)
    with pytest.raises(error, match=match):
        compiled._C.cpu_shared_forward(x, 2, broken(forward, i, value))
    with pytest.raises(error, match=match):
        compiled._C.cpu_shared_backward(x, 2, broken(backward, i, value), None, False)


def test_bad_calls_of_several_members_are_errors():
    x, forward, backward = fields_of(WIDTHS, RANKS)
    calls = (
        (lambda: compiled._C.cpu_shared_forward(x, 2, ()), "at least one"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, (forward[0][:7],)), "tuples of 8"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, (7,)), "tuples of 8"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, 7), "incompatible"),
        (lambda: compiled._C.cpu_shared_forward(x.double(), 2, tuple(forward)), "do not take float64"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, broken(forward, 6, None)), "out: expected a torch.Tensor"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, broken(forward, 6, x[:, :3])), r"out: expected shape \(7, 70\)"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, broken(forward, 7, x[:, :3])), "z: expected a contiguous tensor"),
        (lambda: compiled._C.cpu_shared_forward(x, 2, broken(forward, 5, x.double())), "base: expected the dtype"),
        (lambda: compiled._C.cpu_shared_backward(x, 2, broken(backward, 8, x)), r"incompatible"),
        (lambda: compiled._C.cpu_shared_backward(x, 2, broken(backward, 8, x), None, False), r"db: expected shape"),
        (lambda: compiled._C.cpu_shared_backward(x, 2, broken(backward, 5, None), None, False), "dy: expected"),
        (
            lambda: compiled._C.cpu_shared_backward(x, 2, broken(backward, 6, None), None, False),
            "z: expected a torch.Tensor, got None",
        ),
        (
            lambda: compiled._C.cpu_shared_backward(x, 2, tuple(backward), x[:, :3], False),
            r"dx: expected shape \(7, 70\)",
        ),
        (lambda: compiled._C.cpu_shared_backward(x, 2, tuple(backward), x.T.contiguous().T, False), "contiguous"),
    )
    for call, match in calls:
        with pytest.raises((TypeError, ValueError), match=match):
            call()
    wide = fields_of((9, 9), (100, 100))[1]
    with pytest.raises(ValueError, match="ranks of at most 256 together"):
        compiled._C.cpu_shared_forward(x, 2, (*wide, *wide))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": torch.tensor([4, 2, 9]).int()}, "offsets"),
        ({"offsets": torch.tensor([4, 5, 90]).int()}, "offsets"),
        ({"offsets": torch.tensor([-4, 5, 9]).int()}, "offsets"),
        ({"offsets": torch.tensor([4, 5, 9])}, "offsets"),
        ({"ranks": torch.tensor([1, 9, 1]).int()}, "ranks"),
        ({"alpha_t": torch.ones(4)}, "alpha_t"),
        ({"scaling": torch.ones(3).double()}, "scaling"),
    ],
)
def test_the_module_leaves_no_tensor_whoever_calls(change, message):
    x, a, b, out = torch.randn(9, 8), torch.randn(3, 2, 8), torch.randn(3, 5, 2), torch.empty(9, 5)
    given = {
        "offsets": torch.tensor([4, 5, 9]).int(),
        "ranks": None,
        "scaling": None,
        "alpha_t": torch.ones(3),
    } | change
    call = (given.pop("alpha_t"), None, Spec("silu", 1.0), Rows(**given))
    with pytest.raises(ValueError, match=message):
        cpu.BACKEND.forward(x, a, b, *call, base=None, out=out, save_z=False)


def test_all_shapes_are_checked_by_the_module():
    x, a, b, out = torch.randn(9, 8), torch.randn(3, 2, 8), torch.randn(3, 5, 2), torch.empty(9, 5)
    call = (torch.ones(3), None, Spec("silu", 1.0), Rows(torch.tensor([4, 5, 9]).int(), None, None))
    for operands in ((x, a[:2], b), (x, a[:, :1], b), (x, a[..., :7], b), (x, a[0], b), (x, a, b[0])):
        with pytest.raises(ValueError, match="expected"):
            cpu.BACKEND.forward(*operands, *call, base=None, out=out, save_z=False)
