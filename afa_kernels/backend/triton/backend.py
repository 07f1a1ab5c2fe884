"""The ``triton`` backend: any GPU that Triton knows, in float32, bfloat16 and float16, up to rank
128.

Triton is imported at the first call that runs here, never before. In a process started with
TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, slowly, and only for
calls that ask for this backend by name.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

from afa_kernels import torch_private
from afa_kernels.backend import measured
from afa_kernels.backend.interface import Backend, BackendStatus, BackendUnavailable, Call
from afa_kernels.backend.triton.configs import MAX_RANK

OLDEST_TRITON = (3, 2)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_NO_BFLOAT16 = (
    "Triton's interpreter (TRITON_INTERPRET=1) computes with numpy, which has no bfloat16: float32 and float16 only"
)
_MAX_RANK_FLOAT32_DROPOUT = 64
_MAX_OWNERS = 65535 // 16 - 1  # in the second dimension of a grid, with 16 parts each in the passes of the backward
_OLDEST_CAPABILITY = (8, 0)


@cache
def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in (
        "triton",
        "pytorch-triton",
        "pytorch-triton-rocm",
        "pytorch-triton-xpu",
        "triton-windows",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "unknown"


@cache
def _device_type() -> str | None:
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():  # NVIDIA and AMD
        return "cuda"
    return "xpu" if torch.xpu.is_available() else None


def _on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the device of ``x`` the current one: that is where Triton launches, on its current
    stream."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    return torch.xpu.device(x.device) if x.device.type == "xpu" else contextlib.nullcontext()


def _context(x, a, b, alpha_t, seed, spec, rows):
    if INTERPRETED and torch.bfloat16 in (a.dtype, b.dtype):  # of which a Call says nothing
        raise BackendUnavailable(f"backend 'triton' cannot take A and B in bfloat16: {_NO_BFLOAT16}")
    # Here and below: these modules import Triton, which a process that never runs it need not have.
    from afa_kernels.backend.triton import launch, tuning

    tiles = tuning.tiles(launch.device_of(x), x, b)
    return launch.Context(x, a, b, alpha_t, seed, spec, tiles, rows)


def _fuses(device: torch.device, dtype: torch.dtype, tf32: bool) -> str | None:
    """Return why the product with the weights of owners is made here, unless something was measured: torch's
    ``grouped_mm`` has kernels for bfloat16 alone, of compute capability 9 and 10 (pytorch issue 186620). Elsewhere it
    waits for the device to read the offsets, and multiplies in a loop."""
    from afa_kernels.backend.triton import configs

    arch = configs.device_of(device).arch
    if arch == configs.INTERPRETER:
        return "Triton's interpreter"
    if not arch.startswith("sm_") or (dtype == torch.float32 and not tf32):
        return None
    if dtype == torch.bfloat16 and arch[3:-1] in ("9", "10") and torch_private.has_grouped_mm():
        return None
    return f"this torch has no grouped_mm for {str(dtype).removeprefix('torch.')} on {arch} that runs without a wait"


class TritonBackend(Backend):
    name = "triton"
    takes_weights = True
    devices = frozenset({"cpu"} if INTERPRETED else {"cuda", "xpu"})
    automatic = not INTERPRETED

    def status(self) -> BackendStatus:
        version = _triton_version()
        if version is None:
            return BackendStatus(False, "triton is not installed")
        details = {"triton": version, "interpreter": INTERPRETED}
        numbers = version.split(".")[:2]
        if version != "unknown" and tuple(int(number) for number in numbers) < OLDEST_TRITON:
            return BackendStatus(
                False,
                f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {version}",
                details,
            )
        device_type = _device_type()
        if device_type is None:
            return BackendStatus(False, "no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)", details)
        return BackendStatus(True, details=details | {"device": device_type})

    def refuses(self, call: Call) -> str | None:
        if call.dtype == torch.float64:
            return "float64 has no tensor-core path here: float32, bfloat16 and float16 only"
        if INTERPRETED and call.dtype == torch.bfloat16:
            return _NO_BFLOAT16
        if call.r > MAX_RANK:
            return f"rank {call.r} is above {MAX_RANK}: compute-bound, which torch's GEMMs do faster"
        if call.dtype == torch.float32 and call.dropout and call.r > _MAX_RANK_FLOAT32_DROPOUT:
            return f"float32 with dropout above rank {_MAX_RANK_FLOAT32_DROPOUT} overflows the registers"
        if call.owners > _MAX_OWNERS:
            return f"{call.owners} owners of rows are above {_MAX_OWNERS}, what a grid has room for"
        if call.device == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(call.device_index)
            if capability < _OLDEST_CAPABILITY:
                return f"needs compute capability 8.0 or later, got {capability[0]}.{capability[1]}"
        return None

    def multiplies(self, x, weight, r):
        if weight.dim() == 2:
            return None  # a GEMM of torch's, which accumulates
        from afa_kernels.backend.triton import grouped_gemm, launch

        if not grouped_gemm.takes(weight):
            return None
        _, n, k = weight.shape
        entry = measured.lookup(x.device, measured.EXPERTS, x.dtype, k, n, r, x.shape[0])
        if entry is not None and entry.fuses is not None:
            return entry.reason if entry.fuses else None
        return _fuses(x.device, x.dtype, x.dtype == torch.float32 and launch.allows_tf32())

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        from afa_kernels.backend.triton import passes

        with _on_device(x):
            return passes.forward(_context(x, a, b, alpha_t, seed, spec, rows), base, out, save_z)

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db, dx=None):
        from afa_kernels.backend.triton import passes

        needs = {"need_dx": need_dx, "need_da": need_da, "need_db": need_db}
        with _on_device(x):
            context = _context(x, a, b, alpha_t, seed, spec, rows)
            return passes.backward(context, dy, z, a.dtype, b.dtype, **needs, dx=dx)

    def linear_forward(self, x, weight, bias, a, b, alpha_t, seed, spec, rows, *, save_z):
        from afa_kernels.backend.triton import grouped_gemm

        with _on_device(x):
            context = _context(x, a, b, alpha_t, seed, spec, rows)
            return grouped_gemm.forward(context, weight, bias, save_z)

    def linear_backward(self, dy, x, weight, a, b, z, alpha_t, seed, spec, rows, *, need_da, need_db):
        from afa_kernels.backend.triton import grouped_gemm

        needs = {"need_da": need_da, "need_db": need_db}
        with _on_device(x):
            context = _context(x, a, b, alpha_t, seed, spec, rows)
            return grouped_gemm.backward(context, weight, dy, z, a.dtype, b.dtype, **needs)


BACKEND = TritonBackend()
