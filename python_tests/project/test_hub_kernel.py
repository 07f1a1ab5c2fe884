"""The kernel for the Hugging Face hub: generated from the sources, loaded as the hub's users load it, in a process that
cannot import the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import hub_kernel

LOAD = """
import sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "afa_kernels":
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, Blocked())
import torch
from kernels import get_local_kernel

first, second = (get_local_kernel(Path(folder)) for folder in sys.argv[1:3])
"""
OPERATORS = """
assert first.__name__ != second.__name__
torch.manual_seed(0)
x, w = torch.randn(33, 24, dtype=torch.float64), torch.randn(20, 24, dtype=torch.float64)
a, b = torch.randn(4, 24, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
z = x @ a.T
expected = x @ w.T + 1.5 * (0.7 * z + 0.3 * torch.nn.functional.silu(z)) @ b.T
alpha_t = torch.tensor(0.3)
for kernel in (first, second):
    y = kernel.afa_linear(x, w, None, a, b, alpha_t, scaling=1.5)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    offsets = torch.tensor([10, 33], dtype=torch.int32)
    pair = [torch.stack([t, t]) for t in (w, a, b)]
    y = kernel.afa_linear(x, pair[0], None, *pair[1:], alpha_t, scaling=1.5, offsets=offsets)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    operators = getattr(torch.ops, kernel.__name__)
    options = (alpha_t, None, None, None, None, "silu", 1.5, 0, True, None)
    torch.library.opcheck(operators.lora_forward.default, (None, x, a, b, *options))
    torch.library.opcheck(operators.linear_forward.default, (w, None, x, a, b, *options))
    inputs = [t.clone().requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda *t: kernel.afa_linear(t[0], w, None, *t[1:], 0.3), inputs)
print("ok")
"""
TRITON = """
torch.manual_seed(0)
x, a, b = torch.randn(17, 48), torch.randn(8, 48), torch.randn(40, 8)
y = first.afa_lora(x, a, b, 0.5, backend="triton")
torch.testing.assert_close(y, first.afa_lora(x, a, b, 0.5, backend="reference"))
print("ok")
"""
LAYER = """
from kernels import LocalLayerRepository, Mode, kernelize, register_kernel_mapping, use_kernel_forward_from_hub


@use_kernel_forward_from_hub("AFALinear")
class Linear(torch.nn.Linear):
    activation, scaling, alpha_t = "gelu", 2.0, 0.25

    def forward(self, x):
        raise AssertionError("the forward of the kernel takes its place")


layer = Linear(12, 10)
layer.lora_a, layer.lora_b = torch.nn.Parameter(torch.randn(3, 12)), torch.nn.Parameter(torch.randn(10, 3))
repository = LocalLayerRepository(Path(sys.argv[1]), layer_name="AFALinear")
register_kernel_mapping({"AFALinear": {"cpu": repository}})
layer = kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
x = torch.randn(5, 12)
expected = second.afa_linear(
    x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, 0.25, activation="gelu", scaling=2.0
)
torch.testing.assert_close(layer(x), expected)
print("ok")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two versions of the kernel."""
    folder = tmp_path_factory.mktemp("hub")
    return [hub_kernel.write(folder / f"version{v}", version=v) for v in (1, 2)]


def run(code: str, folders: list[Path], **environment: str) -> None:
    pytest.importorskip("kernels")
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code, *map(str, folders)], capture_output=True, text=True, cwd=folders[0],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.stdout.strip().endswith("ok"), done.stdout + done.stderr


def test_two_versions_live_in_one_process(folders):
    run(OPERATORS, folders)


def test_its_triton_kernels_run(folders):
    pytest.importorskip("triton")
    run(TRITON, folders, TRITON_INTERPRET="1")


def test_its_layer_takes_the_place_of_a_forward(folders):
    run(LAYER, folders)


def test_no_module_names_the_package(folders):
    for file in folders[0].rglob("*.py"):
        found = re.findall(r"^\s*(?:from|import) afa_kernels\b.*", file.read_text(), re.MULTILINE)
        assert not found, (file, found)
    assert not list(folders[0].rglob("*peft*"))
