"""Fixtures shared by all tests: one ``backend`` runs every numeric test on every backend of this
machine."""

import os
import subprocess

import isolation  # noqa: F401  before torch and transformers: it sets the environment
import pytest
import torch

if os.environ.get("AFA_TEST_SIMULATED_GPU"):
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    # Before triton is imported: its kernels then run in the interpreter, on CPU tensors, and only
    # where asked for by name.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import helpers
import ptx_cuda

import afa_kernels
from afa_kernels.backend import choice, interface
from bench.environment import available_bytes

ptx_cuda.register()

# "sm_80", "sm_90": Triton compiles for this GPU, and the machine in ptx_machine executes the PTX on CPU tensors.
SIMULATED_GPU = os.environ.get("AFA_TEST_SIMULATED_GPU", "")
REQUIRED = {name for name in os.environ.get("AFA_KERNELS_REQUIRE", "").split(",") if name}
if not REQUIRED <= set(choice.names()):
    raise pytest.UsageError(f"AFA_KERNELS_REQUIRE: expected names among {choice.names()}, got {sorted(REQUIRED)}")
# Executed one element or one instruction at a time: right, but thousands of times slower than a
# kernel.
SIMULATED = {ptx_cuda.NAME}
if SIMULATED_GPU or os.environ.get("TRITON_INTERPRET") == "1":
    SIMULATED.add("triton")


def skip_unless_available(name: str) -> None:
    """Skip with the registry's reason, or fail where ``AFA_KERNELS_REQUIRE`` names the backend."""
    status = afa_kernels.backends()[name]
    if status.available:
        return
    reason = f"{name}: {status.reason}"
    if name in REQUIRED:
        pytest.fail(f"AFA_KERNELS_REQUIRE names a backend that cannot run: {reason}")
    pytest.skip(reason)


def skip_unless_taken(name: str, dtype: torch.dtype) -> None:
    """Skip where the backend takes no x of this dtype, with its reason."""
    refused = choice.get(name).why_not(interface.Call(device_of(name).type, dtype, 8, 8, 8, 8, "silu"))
    if refused is not None:
        pytest.skip(refused)


def skip_without_memory(gib: int) -> None:
    free = available_bytes("cpu")
    if free < gib << 30:
        pytest.skip(f"needs {gib} GiB of free memory, has {free / 2**30:.1f}")


def skip_where_torch_reads_past_rows(backend: str, dtype: torch.dtype) -> None:
    """Skip what gives the backend ``torch`` rows with NaN between them, where torch's own product reads those."""
    if backend == "torch" and dtype.itemsize == 2 and helpers.torch_reads_past_rows():
        pytest.skip("torch: a 16-bit product of torch reads what lies between rows on this processor (docs/design.md)")


def device_of(name: str) -> torch.device:
    if name == "cuda" or (name == "triton" and "triton" not in SIMULATED):
        return torch.device("cuda")
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def simulated_gpu():
    """The simulated GPU on which the triton backend runs in this process, or None."""
    if not SIMULATED_GPU:
        yield None
        return
    from ptx_triton_driver import simulated

    with simulated(SIMULATED_GPU) as machine:
        yield machine


def pytest_itemcollected(item) -> None:
    """Mark what runs on a simulated backend, so that ``-m`` can leave it out."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if any(isinstance(value, str) and value in SIMULATED for value in parameters):
        item.add_marker("simulated")


@pytest.hookimpl(trylast=True)  # of those that -m and -k leave
def pytest_collection_modifyitems(items) -> None:
    """Let each process of xdist, which deals out the list in pieces, begin with its share of the tests marked
    ``first``: none is left with a long one when the others are done."""
    first = [item for item in items if item.get_closest_marker("first")]
    others = [item for item in items if not item.get_closest_marker("first")]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    size = -(-len(items) // workers)
    items.clear()
    for worker in range(workers):
        share = first[worker::workers]
        room = max(0, size - len(share)) if worker + 1 < workers else len(others)
        items += share + others[:room]
        del others[:room]


@pytest.fixture(autouse=True)
def _fast_tests_start_no_process(request, monkeypatch):
    """What the marker ``fast`` promises: a test that needs a process has the marker ``long``, which takes it out.
    For a simulated GPU, Triton compiles, and asks its tools for their versions."""
    if not SIMULATED_GPU and request.node.get_closest_marker("fast") and not request.node.get_closest_marker("long"):

        def refuse(*_, **__):
            raise AssertionError("a fast test starts a process: mark it with pytest.mark.long")

        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture
def interpreter():
    """Skip where Triton's kernels do not run in its interpreter."""
    skip_unless_available("triton")
    if "triton" not in SIMULATED:
        pytest.skip("not in the interpreter: TRITON_INTERPRET is not 1")


@pytest.fixture(params=choice.names())
def backend(request) -> str:
    skip_unless_available(request.param)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return device_of(backend)


@pytest.fixture
def widest(backend) -> torch.dtype:
    """float32, or bfloat16 where the backend takes 16 bits only."""
    call = interface.Call(device_of(backend).type, torch.float32, 8, 8, 8, 8, "silu")
    return torch.float32 if choice.get(backend).why_not(call) is None else torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_random_numbers(request):
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(sum(map(ord, request.node.name)))


@pytest.fixture
def poisoned_memory():
    """Fill every uninitialised torch allocation with NaN, so that an element that is not written
    shows."""
    with helpers.poisoned_memory():
        yield
