"""Two processes under torchrun, over gloo on the CPU: DDP, FSDP2 and tensor parallelism compute
what one process computes. The checks themselves are in distributed_worker.py and distributed_tensor_parallel.py."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "python_tests" / "distributed" / "distributed_worker.py"
TIMEOUT = 1800  # seconds: ends a deadlock; a busy machine takes minutes
CHECKS = [
    node.name
    for file in (
        WORKER,
        *(WORKER.with_name(f"distributed_{name}.py") for name in ("tensor_parallel", "experts", "adapters")),
    )
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# Seen with plain nn.Linear layers, too: torch 2.6 raises, and 2.7 and 2.8 return the sum of the gradients.
_NEEDS_FSDP2 = pytest.mark.skip(reason="FSDP2 of torch before 2.9 does not average gradients on the CPU")
_NEEDS_ZEROS = pytest.mark.skip(reason="FSDP2 of this torch reduces no zeros for parameters without a gradient")
_HAS_ZEROS = False
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

    _HAS_ZEROS = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
_TRANSFORMERS = (0, 0)
if importlib.util.find_spec("transformers") is not None:
    _TRANSFORMERS = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
_NEEDS_TRANSFORMERS = pytest.mark.skip(reason="needs the fused experts and the expert parallelism of transformers 5.24")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch was built without gloo",
)


def launch(*command: object, **variables: str) -> str:
    paths = [str(ROOT), str(ROOT / "python_tests"), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | own | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[str, str]:
    """Run all checks that were selected in one launch."""
    here = [i for i in request.session.items if i.getparent(pytest.Module) is request.node and hasattr(i, "callspec")]
    names = [i.callspec.params["check"] for i in here if not i.get_closest_marker("skip")]
    folder = tmp_path_factory.mktemp("distributed")
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", 2, WORKER, folder, *names)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _parameters():
    for name in CHECKS:
        marks = [_NEEDS_FSDP2] if "fsdp2" in name and _TORCH < (2, 9) else []
        marks += [_NEEDS_ZEROS] if "some_processes_lack" in name and not _HAS_ZEROS else []
        marks += [_NEEDS_TRANSFORMERS] if "expert" in name and _TRANSFORMERS < (5, 24) else []
        yield pytest.param(name, id=name.removeprefix("check_"), marks=marks)


@pytest.mark.parametrize("check", list(_parameters()))
def test_two_processes(results, check):
    assert not results[check], results[check]


def test_the_example_of_accelerate_runs_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    printed = launch(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
        "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no",
        ROOT / "examples" / "accelerate_ddp.py", "--steps", 20, "--output", tmp_path,
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    first, last = re.findall(r"loss ([\d.]+)", printed)
    assert float(last) < float(first), printed
    assert "step 20 alpha_t 0.000" in printed and "2 processes" in printed, printed
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_configuration_for_deepspeed_is_one():
    deepspeed = pytest.importorskip("accelerate.utils.deepspeed")
    config = deepspeed.HfDeepSpeedConfig(str(ROOT / "examples" / "deepspeed_zero2.json"))
    assert config.is_zero2() and not config.is_offload()
