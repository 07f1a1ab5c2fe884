"""The compiled CUDA backend on the PTX machine, as backend ``cuda_ptx``: the wheel's host code, kernels as PTX."""

from dataclasses import replace

from afa_kernels.backend import cuda, registry
from afa_kernels.backend.registry import BackendStatus

NAME = "cuda_ptx"


def register() -> None:
    """Add the backend where the build has it: with nvcc, and with the emulator."""
    try:
        from afa_kernels import _cuda_on_ptx
    except ImportError:
        return
    kernels = cuda._Kernels(_cuda_on_ptx)
    registry.register(
        replace(
            cuda.EMULATED, name=NAME, status=lambda: BackendStatus(True), forward=kernels.forward,
            backward=kernels.backward, launches=kernels.launches,
        )
    )  # fmt: skip
