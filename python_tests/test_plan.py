"""``afa_kernels.plan`` is the function, although the module that defines it has the same name."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import torch

import afa_kernels


def check() -> None:
    module = importlib.import_module("afa_kernels.plan")
    assert module is sys.modules["afa_kernels.plan"] and afa_kernels.plan is module.plan
    made = afa_kernels.plan(torch.ones(2, 8), torch.ones(4, 8), torch.ones(8, 4), 0.5, backend="torch")
    assert type(made) is afa_kernels.Plan and made.backend == "torch"
    assert pickle.loads(pickle.dumps(made)) == made


def test_importing_the_module_leaves_the_function_in_place():
    check()


def test_the_module_may_be_the_first_import_of_all():
    folder = str(Path(__file__).parent)
    code = f"import afa_kernels.plan, sys; sys.path.append({folder!r}); import test_plan; test_plan.check()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
