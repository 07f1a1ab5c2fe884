"""The compiled module: what it shares with Python, what it refuses, and a package that has to do without it."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import afa_kernels
from afa_kernels.backend import choice, compiled, cpu
from afa_kernels.backend.interface import Call
from afa_kernels.operator.activation import COMPILED_IDS
from afa_kernels.operator.dropout import keep_mask

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
