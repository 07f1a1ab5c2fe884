"""The compiled CUDA backend on the PTX machine, as backend ``cuda_ptx``: the wheel's host code, kernels as PTX."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from afa_kernels.backend import cuda, registry
from afa_kernels.backend.registry import BackendStatus, Call

try:
    from afa_kernels import _cuda_on_ptx
except ImportError:  # built with nvcc, and with the emulator, only
    _cuda_on_ptx = None

NAME = "cuda_ptx"
# The devices that the simulated runtime has from the start, by their numbers.
DEVICES = {"sm_80": 0, "sm_90": 1}


class Kernels(cuda._Kernels):
    """The backend's kernels on one simulated device and stream. Its tensors are the CPU's."""

    def __init__(self):
        super().__init__(_cuda_on_ptx)
        self.device, self.stream = 0, 0

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


kernels: Kernels | None = None


def register() -> None:
    """Add the backend, on the first device, where the build has it."""
    global kernels
    if _cuda_on_ptx is None:
        return
    kernels = Kernels()
    registry.register(
        replace(
            cuda.EMULATED, name=NAME, status=lambda: BackendStatus(True), forward=kernels.forward,
            backward=kernels.backward, launches=kernels.launches, group_forward=kernels.group_forward,
            group_backward=kernels.group_backward,
        )
    )  # fmt: skip
