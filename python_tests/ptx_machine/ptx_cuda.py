"""The compiled CUDA backend on the PTX machine, as backend ``cuda_ptx``: the wheel's host code, kernels as PTX."""

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from afa_kernels.backend import choice, cuda
from afa_kernels.backend.interface import BackendStatus, Call
from afa_kernels.operator.options import Spec

try:
    from afa_kernels import _cuda_on_ptx
except ImportError:
    _cuda_on_ptx = None

NAME = "cuda_ptx"
# The devices that the simulated runtime has from the start, by their numbers.
DEVICES = {"sm_80": 0, "sm_90": 1}


class Kernels(cuda.CUDABackend):
    """The backend's kernels on one simulated device and stream. Its tensors are the CPU's."""

    name = NAME
    devices = frozenset({"cpu"})
    automatic = False

    def __init__(self):
        self.device, self.stream = 0, 0

    @cached_property
    def _module(self):
        _cuda_on_ptx.use_torch(torch)
        return _cuda_on_ptx

    def status(self):
        reason = "" if _cuda_on_ptx else "not part of this build (AFA_BUILD_PTX_MACHINE=1, and an nvcc)"
        return BackendStatus(not reason, reason)

    def refuses(self, call: Call):
        return cuda._refuses_shape(call)

    def _place(self, x):
        return self.device, self.stream

    def launches(self, call: Call):
        return super().launches(call._replace(device_index=self.device))

    @contextlib.contextmanager
    def on(self, device: int, stream: int = 0) -> Iterator[None]:
        before = self.device, self.stream
        self.device, self.stream = device, stream
        try:
            yield
        finally:
            self.device, self.stream = before


kernels = Kernels()


def register() -> None:
    """Add the backend, on the first device."""
    choice.register(kernels)


# --- A call, and what it launches ---


def forward_and_backward(problem, *, seed=None, spec=None, need=(True, True, True), backend=kernels) -> tuple:
    """Call a backend itself, so that no autograd stands between; return (y, z, dx, da, db)."""
    rest = (torch.tensor(0.3), seed, spec or Spec("silu", 1.5))
    operands, y = (problem.x, problem.lora_a, problem.lora_b), torch.full_like(problem.base, torch.nan)
    z = backend.forward(*operands, *rest, base=problem.base, out=y, save_z=True)
    needs = dict(zip(("need_dx", "need_da", "need_db"), need, strict=True))
    return (y, z, *backend.backward(problem.dy, *operands, z, *rest, **needs))


def same(left, right) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(left, right, strict=True)
    )


def launches_of(call: Callable[[], object]) -> list[dict]:
    """Return what a call launches, each with its counters."""
    _cuda_on_ptx.take_launches()
    call()
    return _cuda_on_ptx.take_launches()


def kernel_names(launches: list[dict]) -> list[str]:
    """Return the names of kernels without what the compiler adds to them."""
    mangled = [launch["kernel"].partition("_kernelI")[0] for launch in launches]
    return [name.removeprefix("_ZN3afa").lstrip("0123456789") for name in mangled]


def bytes_moved(launches: list[dict]) -> int:
    """Return the bytes between global memory and the blocks."""
    counters = ("global_read_bytes", "global_write_bytes", "async_copy_bytes")
    return sum(launch[counter] for launch in launches for counter in counters)


@contextlib.contextmanager
def limited(**limits: int) -> Iterator[None]:
    """Let calls be cut into fewer chunks of rows (``chunk_limit``), or more rounds of them (``round_limit``)."""
    _cuda_on_ptx.runtime.set_limits(**limits)
    try:
        yield
    finally:
        _cuda_on_ptx.runtime.set_limits()
