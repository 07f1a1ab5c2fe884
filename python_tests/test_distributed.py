"""Two processes under torchrun, over gloo on the CPU: DDP, FSDP2 and tensor parallelism compute
what one process computes. The checks themselves are in distributed_worker.py."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
TIMEOUT = 300
CHECKS = [
    node.name
    for node in ast.parse(WORKER.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
_TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
_NEEDS_FSDP2 = pytest.mark.skip(reason="FSDP2 of torch 2.6 does not run on the CPU")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch was built without gloo",
)


def torchrun(*arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[str, str]:
    """Run all checks that were selected in one launch."""
    module = request.node
    names = [i.callspec.params["check"] for i in request.session.items if i.getparent(type(module)) is module]
    folder = tmp_path_factory.mktemp("distributed")
    torchrun(WORKER, folder, *names)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _parameters():
    for name in CHECKS:
        marks = [_NEEDS_FSDP2] if "fsdp2" in name and _TORCH < (2, 7) else []
        yield pytest.param(name, id=name.removeprefix("check_"), marks=marks)


@pytest.mark.parametrize("check", list(_parameters()))
def test_two_processes(results, check):
    assert not results[check], results[check]
