"""The CUDA backend where the driver, the runtime or another kernel is not as it should be: its Python, its binding and
its host code, on a simulated CUDA runtime (python_tests/ptx_machine/cuda) that plays it, with the compiled kernels."""

import re

import ptx_cuda
import ptx_runtime_helpers
import pytest
import torch
from helpers import altered, assert_matches, eager, run_python
from ptx_runtime_helpers import (
    CAPABILITIES,
    RTX_4090,
    cuda_on_ptx,
    failure,
    forward,
    new_device,
    problem,
    runtime,
)

import afa_kernels as afa
from afa_kernels.backend import choice, cuda
from afa_kernels.backend.interface import Call
from afa_kernels.operator.options import Spec

LORA = ("x", "lora_a", "lora_b", "base")
_a_sound_machine, kept_allocations = ptx_runtime_helpers.sound_machine, ptx_runtime_helpers.kept_allocations


# --- Which backend takes a call ---


@pytest.fixture
def on_machine(monkeypatch):
    """Let the backend ``cuda`` itself, with its status and its refusals, take calls on CPU tensors: on a machine that
    has the simulated runtime's device of the given number."""
    monkeypatch.setattr(cuda, "_device_module", lambda: (cuda_on_ptx, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "simulated")
    monkeypatch.setattr(torch.cuda, "get_device_capability", CAPABILITIES.get)
    monkeypatch.setattr(choice, "_BACKENDS", {})
    everything = dict(cuda=cuda.BACKEND)

    def fill(device=0):
        def refuses(call):
            return cuda.BACKEND.refuses(call._replace(device_index=device))

        here = altered(
            everything["cuda"], devices=frozenset({"cpu"}), refuses=refuses,
            forward=ptx_cuda.kernels.forward, backward=ptx_cuda.kernels.backward,
        )  # fmt: skip
        choice._BACKENDS.clear()
        for backend in (here, torch_backend):
            choice.register(backend)
        cuda._refuses_device.cache_clear()

    from afa_kernels.backend.torch import BACKEND as torch_backend

    yield fill
    cuda._refuses_device.cache_clear()
    choice.forget_choices()


def automatic(**tensors):
    return afa.afa_lora(**tensors, alpha_t=0.3, activation="relu", scaling=1.5)


def plain(**tensors):
    return eager(**tensors, alpha_t=0.3, activation="relu", scaling=1.5)


def check_fallback(why: str) -> None:
    """An automatic call has its result from the next backend; a named one says why it cannot run."""
    p = problem()
    assert_matches(automatic, plain, p, LORA)
    assert not cuda_on_ptx.take_launches()
    call = Call("cpu", torch.bfloat16, 75, 136, 264, 16, "relu")
    assert choice.select(call, None) == (choice.get("torch"), f"cuda: {why}")
    with pytest.raises(afa.BackendUnavailable, match=re.escape(why)):
        afa.afa_lora(p.x, p.lora_a, p.lora_b, 0.3, backend="cuda")


def test_an_automatic_call_runs_the_kernels(on_machine):
    on_machine()
    assert_matches(automatic, plain, problem(), LORA)
    assert {launch["device"] for launch in cuda_on_ptx.take_launches()} == {0}


# CUDA of the runtime in a wheel and of the driver, and what a message advises; None: the driver serves it. A driver
# runs every runtime of its major version and of older ones.
DRIVERS = {
    (12080, 12000): None,
    (12080, 12020): None,  # r535
    (12080, 12040): None,
    (12080, 12080): None,
    (12080, 13000): None,
    (13000, 13000): None,
    (13000, 13020): None,
    (13000, 12000): "update the driver, build the package with an nvcc of CUDA 12, or install triton",
    (13000, 12020): "update the driver, build the package with an nvcc of CUDA 12, or install triton",
    (13000, 12080): "update the driver, build the package with an nvcc of CUDA 12, or install triton",
    (12080, 11080): "update the driver, or install triton",
}


@pytest.mark.parametrize("of_runtime, of_driver", DRIVERS)
def test_drivers(on_machine, of_runtime, of_driver):
    advice = DRIVERS[of_runtime, of_driver]
    on_machine()
    runtime.install_runtime(of_runtime)
    runtime.install_driver(of_driver, advice is not None)
    assert afa.backends()["cuda"].available == (advice is None)
    if advice is None:
        assert_matches(automatic, plain, problem(), LORA)
        assert cuda_on_ptx.take_launches()
    else:
        driver, built = (f"CUDA {v // 1000}.{v % 1000 // 10}" for v in (of_driver, of_runtime))
        check_fallback(f"the driver ({driver}) is too old for {built}, which this wheel was built with; {advice}")


def test_a_driver_of_the_same_cuda_that_refuses_all_the_same(on_machine):
    on_machine()
    runtime.install_runtime(13000)
    runtime.install_driver(13000, True)
    check_fallback(
        "the driver (CUDA 13.0) is too old for CUDA 13.0, which this wheel was built with; update the driver, or "
        "install triton"
    )
    assert afa.backends()["cuda"].available


def test_ptx_that_is_newer_than_the_driver(on_machine):
    """A card for which the wheel has no code of its own: the driver would have to translate PTX of a later CUDA."""
    on_machine(1)
    runtime.install_runtime(12080)
    runtime.install_driver(12020, False)
    runtime.fail("cudaFuncGetAttributes", "cudaErrorUnsupportedPtxVersion")
    check_fallback(
        "this build has PTX of CUDA 12.8 for compute capability 9.0, which the driver (CUDA 12.2) cannot translate; "
        "update the driver, or build the package with AFA_CUDA_ARCHITECTURES=90-real"
    )


def test_an_old_driver_that_is_the_first_thing_the_process_meets():
    """Nothing is remembered of a driver yet: not the functions that the launch code asks for either."""
    run_python(
        "from afa_kernels import _cuda_on_ptx as module\n"
        "module.runtime.install_driver(12040, True)\n"
        "name, text = module.kernel_image_failure(0)\n"
        "assert name == 'cudaErrorInsufficientDriver' and 'driver version' in text\n"
        "assert module.runtime.last_error() == 'cudaSuccess'\n"
        "assert module.versions()[0] == 12040 and not module.runtime.contexts()\n"
        "module.runtime.install_driver(module.versions()[1], False)\n"
        "assert module.kernel_image_failure(0) == ('', '')\n"
    )


def test_a_card_without_an_image(on_machine):
    """One that the list of compute capabilities lets pass: the build has images for 8.0 and 9.0 and later."""
    turing = new_device(major=7, minor=5)
    on_machine(turing)
    check_fallback("takes GPUs of compute capability 8.0 and later, got 7.5")
    CAPABILITIES[turing] = (8, 0)  # as a build without sm_80 looks to an A100
    on_machine(turing)
    check_fallback("this build has no kernels for compute capability 8.0")
    assert cuda_on_ptx.kernel_image_failure(turing)[0] == "cudaErrorNoKernelImageForDevice"
    assert runtime.last_error() == "cudaSuccess"
    assert "forward kernel failed: no kernel image is available" in failure(problem(), turing)


def test_a_device_that_the_runtime_cannot_use(on_machine):
    on_machine()
    runtime.fail("cudaSetDevice", "cudaErrorECCUncorrectable")
    check_fallback(
        "the CUDA runtime cannot use this device: uncorrectable ECC error encountered (cudaErrorECCUncorrectable)"
    )


def test_images_that_fit_are_no_failure():
    for device in (0, 1, new_device(**RTX_4090), new_device(major=12, minor=0)):
        assert cuda_on_ptx.kernel_image_failure(device) == ("", "")
    assert cuda_on_ptx.versions()[0] >= cuda_on_ptx.versions()[1]


# --- Calls of the runtime that fail ---


def test_attributes_that_cannot_be_had_are_asked_for_again():
    device, p = new_device(), problem()
    runtime.fail("cudaDeviceGetAttribute", "cudaErrorInvalidValue")
    assert failure(p, device) == "device attribute: invalid argument (cudaErrorInvalidValue)"
    runtime.succeed("cudaDeviceGetAttribute")
    assert torch.equal(forward(p, device)[0], forward(p)[0])


def test_a_refused_grant_of_shared_memory_is_asked_for_again():
    device, p = new_device(), problem()
    runtime.fail("cudaFuncSetAttribute", "cudaErrorInvalidValue")
    message = failure(p, device)
    assert message.startswith("forward kernel failed: invalid argument (cudaErrorInvalidValue) (M=75, K=136, N=264")
    assert not cuda_on_ptx.take_launches() and runtime.last_error() == "cudaSuccess"
    runtime.succeed("cudaFuncSetAttribute")
    assert torch.equal(forward(p, device)[0], forward(p)[0])


def test_attributes_of_a_kernel_are_set_once_per_device():
    def asked(*arguments):
        before = runtime.calls("cudaFuncSetAttribute")
        forward(*arguments)
        return runtime.calls("cudaFuncSetAttribute") - before

    one, other, p = new_device(), new_device(), problem()
    assert asked(p, one) == 2
    assert max(launch["shared_bytes"] for launch in cuda_on_ptx.take_launches()) > 48 << 10
    assert [asked(p, device) for device in (one, one, other, one, other)] == [0, 0, 2, 0, 0]


def test_a_launch_that_fails_is_named_with_its_shape():
    p = problem()
    runtime.fail("cudaLaunchKernelExC", "cudaErrorInvalidValue")
    message = failure(p)
    assert re.match(
        r"forward kernel failed: invalid argument \(cudaErrorInvalidValue\) \(M=75, K=136, N=264, r=16, grid 2 x 1, "
        r"\d+ threads", message
    )  # fmt: skip
    assert "earlier" not in message and runtime.last_error() == "cudaSuccess"
    runtime.succeed("cudaLaunchKernelExC")
    forward(p)


# --- Faults of another kernel ---

EARLIER = "a kernel that was launched earlier failed"


def break_the_forward(monkeypatch) -> None:
    """Let the forward kernel do what hardware punishes, which comes up late unless launches wait."""
    cuda_on_ptx.set_edit(lambda text: re.sub(r"cp\.async\.wait_group \d+;", "", text))
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    runtime.set_asynchronous(True)


def test_a_fault_of_an_earlier_kernel_is_not_blamed_on_the_next(monkeypatch):
    break_the_forward(monkeypatch)
    p = problem()
    forward(p)  # nobody knows yet
    for m in (64, 33):  # it stays
        message = failure(problem(m=m))
        assert message.startswith(EARLIER) and "PTX line" in message
        assert f"the forward kernel only reports it; CUDA_LAUNCH_BLOCKING=1 shows where it happens (M={m}," in (message)
    assert "kernel forward" not in message and "forward kernel failed" not in message
    forward(p, device=1)  # another device is not hit by it
    assert cuda_on_ptx.kernel_image_failure(0)[0] == "cudaErrorLaunchFailure"


def test_a_fault_is_blamed_on_the_kernel_where_launches_wait(monkeypatch):
    break_the_forward(monkeypatch)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    runtime.set_asynchronous(False)
    message = failure(problem())
    assert re.match(r"forward kernel failed: PTX line \d+, \w+\.cuh:\d+", message) and EARLIER not in message


@pytest.mark.parametrize("error", ["cudaErrorIllegalAddress", "cudaErrorECCUncorrectable"])
def test_a_launch_that_reports_what_only_a_running_kernel_does(monkeypatch, error):
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    runtime.fail("cudaLaunchKernelExC", error)
    assert failure(problem()).startswith(EARLIER)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert failure(problem()).startswith("forward kernel failed")


def test_an_error_that_stood_before_the_launch_is_not_its_own():
    p = problem()
    runtime.set_last_error("cudaErrorUnknown")
    runtime.fail("cudaLaunchKernelExC", "cudaErrorUnknown")
    assert failure(p).startswith(EARLIER)
    runtime.restart()
    runtime.set_last_error("cudaErrorInvalidValue")  # somebody else's, which concerns nobody here
    forward(p)


# --- Capturing streams ---


def test_a_captured_call_runs_again_with_new_values(kept_allocations):
    p, other = problem(), problem()
    other.x.mul_(-0.5)
    runtime.begin_capture(7)
    alpha_t, y = torch.tensor(0.3), torch.full_like(p.base, torch.nan)
    spec = Spec("relu", 1.5)
    with ptx_cuda.kernels.on(0, 7):
        operands = (p.x, p.lora_a, p.lora_b)
        z = ptx_cuda.kernels.forward(*operands, alpha_t, None, spec, base=p.base, out=y, save_z=True)
        gradients = ptx_cuda.kernels.backward(
            p.dy, *operands, z, alpha_t, None, spec, need_dx=True, need_da=True, need_db=True
        )  # fmt: skip
    graph = runtime.end_capture()
    assert len(graph) >= 3 and y.isnan().all() and not cuda_on_ptx.take_launches(), "a capture runs nothing"

    def expected():
        direct = torch.full_like(y, torch.nan)
        z = ptx_cuda.kernels.forward(*operands, alpha_t, None, spec, base=p.base, out=direct, save_z=True)
        return direct, *ptx_cuda.kernels.backward(
            p.dy, *operands, z, alpha_t, None, spec, need_dx=True, need_da=True, need_db=True
        )  # fmt: skip

    for x, alpha in ((p.x.clone(), 0.3), (other.x, 0.8)):
        p.x.copy_(x)
        alpha_t.fill_(alpha)
        graph.replay()
        for got, direct in zip((y, *gradients), expected(), strict=True):
            assert torch.equal(got, direct)


def test_a_launch_on_the_default_stream_beside_a_capture_is_named():
    p = problem()
    runtime.begin_capture(7)
    assert failure(p).startswith("forward kernel failed: operation would make the legacy stream depend on a capturing")
    with pytest.raises(RuntimeError, match="invalidated"):
        runtime.end_capture()
    forward(p, stream=8)


# --- Devices ---


def test_two_devices_with_different_limits():
    small, p = new_device(**RTX_4090), problem(n=136, r=32)
    results = [forward(p, device) for device in (0, small, 1, small, 0)]
    for y, z in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(z, results[0][1])
    launches = cuda_on_ptx.take_launches()
    assert [launch["device"] for launch in launches] == [0, small, 1, small, 0]
    shared = {launch["device"]: launch["shared_bytes"] for launch in launches}
    assert len(set(shared.values())) >= 2, "each has a plan of its own"
    for device, model in ((small, RTX_4090),):
        assert cuda_on_ptx.device_limits(device) == tuple(model.values())[2:]
        assert shared[device] <= model["shared_per_block"]


def test_another_device_leaves_no_context_behind():
    runtime.set_current_device(-1)
    forward(problem(), 1)
    assert runtime.current_device() == -1 and runtime.contexts() == {1}


def test_the_device_that_would_be_taken_anyway_leaves_no_context_behind_either():
    runtime.set_current_device(-1)  # cudaGetDevice gives 0 then
    forward(problem(), 0)
    assert runtime.current_device() == -1


def test_the_context_that_was_current_comes_back():
    runtime.set_current_device(0)
    forward(problem(), 1)
    assert runtime.current_device() == 0
    failing = problem()
    runtime.fail("cudaLaunchKernelExC", "cudaErrorInvalidValue")
    failure(failing, 1)
    assert runtime.current_device() == 0


def test_the_current_device_costs_no_switch():
    runtime.set_current_device(1)
    before = runtime.calls("cudaSetDevice")
    forward(problem(), 1)
    assert runtime.current_device() == 1 and runtime.calls("cudaSetDevice") == before


# In a process of its own: the devices that it adds would be in the way of other tests.
MANY_DEVICES = """
import ptx_cuda
import torch
from ptx_runtime_helpers import cuda_on_ptx, forward, new_device, problem, runtime

ptx_cuda.register()
for _ in range(70):
    last = new_device(major=9)
p, results = problem(), []
for _ in range(2):
    before = runtime.calls("cudaFuncSetAttribute")
    results.append(forward(p, last)[0])
    assert runtime.calls("cudaFuncSetAttribute") == before + 2
assert torch.equal(*results) and all(launch["overlaps"] for launch in cuda_on_ptx.take_launches())
"""


def test_devices_past_what_the_launch_code_remembers_are_asked_about_every_time():
    run_python(MANY_DEVICES)
