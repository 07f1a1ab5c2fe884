"""Names of torch that are not public: in one module, and every one of them may be missing."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import Problem

import afa_kernels
from afa_kernels import torch_private

pytestmark = pytest.mark.fast

PACKAGE = Path(afa_kernels.__file__).parent
PRIVATE = (
    "_C._is_any_autocast_enabled",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._cuda_getCurrentRawStream",
    "_C._dispatch_keys",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._are_functorch_transforms_active",
    "_C._get_tracing_state",
    "_C.DispatchKeySet",
    "_C.DispatchKey",
    "autograd._profiler_enabled",
    "autograd.forward_ad._current_level",
)


def hide(path: str, delete) -> None:
    *parents, name = path.split(".")
    owner = torch
    for parent in parents:
        owner = getattr(owner, parent)
    if hasattr(owner, name):
        delete(owner, name)


def loaded_anew():
    spec = importlib.util.spec_from_file_location("torch_private_without_a_name", torch_private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PRIVATE)
def test_without_a_name_the_ordinary_path_is_taken(path, monkeypatch):
    with monkeypatch.context() as patched:
        hide(path, patched.delattr)
        module = loaded_anew()
        watched, ordinary = module.operators_are_watched(), module.are_ordinary([torch.ones(1)])
        forward_mode, hooks, autocast = (
            module.in_forward_mode(),
            module.saved_tensor_hooks(),
            module.autocast_may_be_on(),
        )
    assert hooks is None
    assert watched in (True, False) and ordinary == (not watched)
    about_skipping = path not in (*PRIVATE[:3], PRIVATE[-1])
    assert watched == about_skipping
    assert forward_mode == (path == PRIVATE[-1])
    assert autocast == (path == PRIVATE[0])


@pytest.mark.long
def test_without_all_of_them_the_package_imports_and_trains():
    names = [f"torch.{path}" for path in PRIVATE]
    code = f"""
import torch
hidden = []
for path in {names!r}:
    owner, _, name = path.rpartition(".")
    owner = eval(owner)
    if hasattr(owner, name):
        hidden.append((owner, name, getattr(owner, name)))
        delattr(owner, name)
from afa_kernels import torch_private
for owner, name, value in hidden:  # torch itself needs them
    setattr(owner, name, value)
import afa_kernels as afa
assert torch_private.operators_are_watched()
model = afa.inject(torch.nn.Sequential(torch.nn.Linear(6, 5)), r=2)
with torch.no_grad():
    model[0].lora_b.normal_()
x = torch.randn(3, 6)
model(x).sum().backward()
assert model[0].lora_a.grad.abs().sum() > 0
z = x @ model[0].lora_a.T
want = model[0].base_layer(x) + 8 * torch.nn.functional.silu(z) @ model[0].lora_b.T
torch.testing.assert_close(model(x), want)
shared = afa.AFASharedInput([afa.AFALinear(torch.nn.Linear(6, 4), r=2) for _ in range(2)])
sum(y.sum() for y in shared(x)).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_are_found_in_this_torch():
    """So that the fast path does not go missing in silence when torch renames something."""
    if torch.__version__ >= (2, 7):
        assert torch_private._CAN_SKIP and not torch_private.operators_are_watched()
        assert torch_private.saved_tensor_hooks() is None
        assert None not in torch_private._library_takes.values()


def private_uses(source: str) -> list[str]:
    """Return what ``source`` uses of torch's modules and of tensors under a name that begins with an underscore."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            private_module = any(part.startswith("_") for part in node.module.split("."))
            found += [f"{node.module}.{a.name}" for a in node.names if private_module or a.name.startswith("_")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if ast.unparse(node).startswith("torch.") or node.attr in PRIVATE_OF_TENSORS:
                found.append(ast.unparse(node))
    return found


# Modules have an attribute of that name, too, and it is theirs that the package reads.
PRIVATE_OF_TENSORS = {name for name in dir(torch.Tensor) if name.startswith("_")} - {"_backward_hooks"}


def test_no_other_module_uses_private_names():
    assert private_uses("from torch._C import a\nfrom torch.autograd import _b") == ["torch._C.a", "torch.autograd._b"]
    assert private_uses("torch._C.b()") == ["torch._C"] and private_uses("torch.relu(torch.__version__)") == []
    assert private_uses("x.T._version + x._mine") == ["x.T._version"]
    for file in PACKAGE.rglob("*.py"):
        if file.name != "torch_private.py":
            assert private_uses(file.read_text()) == [], file


def test_tensors_tell_whether_they_are_views_and_were_written():
    x = Problem.random(3, 4, 5, 2).x
    assert torch_private.is_view(x[:1])
    assert not torch_private.is_view(x)
    before = torch_private.version_of(x)
    x.add_(1)
    assert torch_private.version_of(x) != before


def test_the_current_stream_is_torchs_own(monkeypatch):
    """By the number where torch gives it, and by its object where it does not."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=device + 5))
    monkeypatch.setattr(torch_private, "_raw_stream", lambda device: device + 3)
    assert torch_private.current_stream(1) == 4
    monkeypatch.setattr(torch_private, "_raw_stream", None)
    assert torch_private.current_stream(1) == 6
