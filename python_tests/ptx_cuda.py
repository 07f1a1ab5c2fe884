"""The compiled CUDA backend on the PTX machine, as backend ``cuda_ptx``: the wheel's host code, kernels as PTX."""

import contextlib
from collections.abc import Iterator

from afa_kernels.backend import choice, cuda
from afa_kernels.backend.interface import BackendStatus, Call

try:
    from afa_kernels import _cuda_on_ptx
except ImportError:  # built with nvcc, and with the emulator, only
    _cuda_on_ptx = None

NAME = "cuda_ptx"
# The devices that the simulated runtime has from the start, by their numbers.
DEVICES = {"sm_80": 0, "sm_90": 1}


class Kernels(cuda.EmulatedBackend):
    """The backend's kernels on one simulated device and stream. Its tensors are the CPU's."""

    name = NAME

    def __init__(self):
        self.device, self.stream = 0, 0

    def _load(self):
        return _cuda_on_ptx, ""

    def status(self):
        return BackendStatus(True)

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
    choice.register(kernels)
