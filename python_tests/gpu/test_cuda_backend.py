"""The ``cuda`` backend as far as a machine without a GPU can see it: status, refusals, choice."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import altered

import afa_kernels as afa
from afa_kernels.backend import choice, cuda
from afa_kernels.backend.interface import Backend, BackendStatus, Call


def call(r=16, k=64, n=64, dtype=torch.bfloat16, m=128, owners=0):
    return Call("cuda", dtype, m, k, n, r, "silu", device_index=0, owners=owners)


def fake_triton(available=True):
    status = BackendStatus(available, "" if available else "triton is not installed")
    return altered(Backend(), name="triton", devices=frozenset({"cuda"}), status=lambda: status)


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(choice, "_BACKENDS", {})
    choice.forget_choices()
    yield
    choice.forget_choices()


@pytest.fixture
def table(monkeypatch, empty_registry):
    """A registry of cuda and triton on a GPU that this machine need not have."""

    def fill(capability, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        available = BackendStatus(True)
        choice.register(altered(cuda.BACKEND, status=lambda: available, refuses=cuda._refuses_shape))
        choice.register(fake_triton(triton))

    return fill


@pytest.fixture
def machine(monkeypatch, empty_registry):
    """A registry of cuda and triton on a machine whose driver and runtime say what a test wants."""
    pytest.importorskip("afa_kernels._C")

    def fill(failure=("", ""), versions=(13000, 13000), device_name=lambda index: "Some GPU"):
        module = SimpleNamespace(kernel_image_failure=lambda index: failure, versions=lambda: versions)
        monkeypatch.setattr(cuda, "_device_module", lambda: (module, ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", device_name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
        choice.register(cuda.BACKEND)
        choice.register(fake_triton())

    cuda._refuses_device.cache_clear()
    yield fill
    cuda._refuses_device.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_it_comes_first_on_every_gpu(table, capability):
    table(capability)
    assert choice.select(call(r=64), None).backend.name == "cuda"


@pytest.mark.parametrize("m", [1, 12288, 1 << 20])
def test_the_choice_does_not_depend_on_the_rows(table, m):
    table((9, 0))
    assert choice.select(call(r=64, m=m), None).backend.name == "cuda"
    assert choice.select(call(r=65, m=m), None).backend.name == "triton"


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"r": 65}, "cuda: takes ranks up to 64, got 65"),
        ({"owners": 4}, "cuda: takes no rows by owner"),
        ({"k": 60}, "cuda: takes K and N that are multiples of 8, got K=60 and N=64"),
        ({"dtype": torch.float32}, "cuda: takes bfloat16 and float16, got float32"),
    ],
)
def test_what_it_refuses_goes_to_triton_with_the_reason(table, changed, reason):
    table((8, 0))
    chosen, told = choice.select(call(**changed), None)
    assert chosen.name == "triton"
    assert told.startswith(reason)


def test_an_old_gpu_is_refused_by_its_capability(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    cuda._refuses_device.cache_clear()
    assert cuda.BACKEND.refuses(call()) == "takes GPUs of compute capability 8.0 and later, got 7.5"
    cuda._refuses_device.cache_clear()


OLD_DRIVER = (
    "the driver (CUDA 12.4) is too old for CUDA 13.0, which this wheel was built with; "
    "update the driver, build the package with an nvcc of CUDA 12, or install triton"
)


def test_on_a_machine_that_can_it_comes_first(machine):
    machine()
    assert choice.select(call(), None).backend.name == "cuda"


@pytest.mark.parametrize("failure", [("", ""), ("cudaErrorInsufficientDriver", "CUDA driver version is insufficient")])
def test_an_old_driver_is_a_reason_and_the_call_falls_back(machine, failure):
    machine(failure, versions=(12040, 13000))
    chosen, reason = choice.select(call(), None)
    assert chosen.name == "triton" and reason == f"cuda: {OLD_DRIVER}"
    with pytest.raises(afa.BackendUnavailable, match=re.escape(OLD_DRIVER)):
        choice.select(call(), "cuda")
    status = afa.backends()["cuda"]
    assert not status.available and status.reason == OLD_DRIVER


def test_a_driver_that_the_runtime_refuses_all_the_same_is_a_reason(machine):
    machine(("cudaErrorInsufficientDriver", "CUDA driver version is insufficient"), versions=(13000, 13010))
    chosen, reason = choice.select(call(), None)
    assert chosen.name == "triton"
    assert reason.startswith("cuda: the driver (CUDA 13.0) is too old for CUDA 13.1")


def test_the_real_runtime_tells_its_error_and_raises_nothing():
    """Without a driver the runtime of this wheel says what it says of an old one."""
    module, reason = cuda._device_module()
    if module is None:
        pytest.skip(reason)
    error, text = module.kernel_image_failure(0)
    if not torch.cuda.is_available():
        assert error in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice") and text
    driver, runtime = module.versions()
    assert driver >= 0 and runtime >= 11000


@pytest.mark.parametrize("error", ["cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"])
def test_a_gpu_without_an_image_is_a_reason(machine, error):
    machine((error, "no kernel image is available"))
    chosen, reason = choice.select(call(), None)
    assert (chosen.name, reason) == ("triton", "cuda: this build has no kernels for compute capability 9.0")


def test_any_other_error_of_the_runtime_is_a_reason(machine):
    machine(("cudaErrorSystemDriverMismatch", "system has unsupported display driver"))
    chosen, reason = choice.select(call(), None)
    assert chosen.name == "triton"
    assert reason == (
        "cuda: the CUDA runtime cannot use this device: system has unsupported display driver "
        "(cudaErrorSystemDriverMismatch)"
    )


def test_a_broken_gpu_beside_the_one_in_use_is_listed_and_no_error(machine):
    def broken(index):
        raise RuntimeError("uncorrectable ECC error")

    machine(device_name=broken)
    assert choice.select(call(), None).backend.name == "cuda"
    assert afa.backends()["cuda"].details["devices"] == ["unknown (uncorrectable ECC error)"]


def test_without_a_device_the_status_says_what_is_missing():
    status = afa.backends()["cuda"]
    if status.available:
        pytest.skip("this machine has a CUDA device")
    assert status.reason
    message = "backend 'cuda' cannot take this call"
    with pytest.raises(afa.BackendUnavailable, match=message):
        afa.afa_lora(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(8, 1), 0.5, backend="cuda")


# --- The source keeps its rules ---

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "kernels"
DEVICE_ONLY = re.compile(r"\basm\b|__shared__|__sync|__ldg|__shfl|threadIdx|blockIdx|blockDim|<<<|cuda_fp16|cuda_bf16")


def test_kernels_reach_the_device_through_the_primitives_alone():
    files = [path for path in KERNELS.glob("*.cuh") if path.name != "prim.cuh"]
    assert len(files) >= 6
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.partition("//")[0]
            assert not DEVICE_ONLY.search(code), f"{path.name}:{number}: {line.strip()}"


def test_kernels_include_kernels_and_what_is_common():
    files = [path for kind in ("cuh", "cu", "h") for path in KERNELS.glob(f"*.{kind}")]
    assert len(files) >= 14
    for path in files:
        included = re.findall(r'#include "(.*)/', path.read_text())
        assert set(included) <= {"common", "cuda/kernels"}, path.name
