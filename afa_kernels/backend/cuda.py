"""The ``cuda`` backend: compiled kernels for NVIDIA GPUs.

This file allocates results and scratch memory; csrc/python/cuda_ops.cpp turns tensors into pointers and strides, and
csrc/cuda/host/ops.cpp decides what is launched. What the kernels cannot read in place (columns that are not adjacent,
rows that do not start at 16 bytes) is copied.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from afa_kernels.backend import compiled
from afa_kernels.backend.cuda_operands import (
    VECTOR,
    readable,
    readable_base,
    readable_out,
    readable_weight,
    readable_z,
)
from afa_kernels.backend.interface import Backend, BackendStatus, Call, Member
from afa_kernels.operator.activation import COMPILED_IDS
from afa_kernels.torch_private import current_stream

_MAX_RANK = 64
_RANK_UNIT = 16  # to a multiple of which the rank of each of several layers is padded
# Of layers that share x: how many, and the rank of each (beyond it the pass over dy is two kernels, one layer each).
_MAX_MEMBERS = 3
_MAX_MEMBER_RANK = 32
_MIN_CAPABILITY = (8, 0)
_OLDEST_RUNTIME = 12000  # CUDA of the oldest nvcc that builds the kernels
_ELEMENT_BYTES = 2
_DTYPES = (torch.bfloat16, torch.float16)


def _readable_members(x: Tensor, members: list[Member]) -> list[Member]:
    return [Member(readable_weight(a, x), readable_weight(b, x), *rest) for a, b, *rest in members]


def _refuses_shape(call: Call) -> str | None:
    if call.dtype not in _DTYPES:
        return f"takes bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
    if call.r > _MAX_RANK:
        return f"takes ranks up to {_MAX_RANK}, got {call.r}"
    if call.k % VECTOR or call.n % VECTOR:
        return f"takes K and N that are multiples of {VECTOR}, got K={call.k} and N={call.n}"
    return None


@lru_cache(maxsize=1)
def _device_module() -> tuple[ModuleType | None, str]:
    """Return the module with the CUDA kernels, or None and the reason."""
    if compiled._C is None:
        return None, compiled.load_error
    if not hasattr(compiled._C, "cuda"):
        return None, "this build has no CUDA kernels (no nvcc was found, or AFA_BUILD_CUDA=0)"
    return compiled._C.cuda, ""


def _old_driver(driver: int, runtime: int) -> str:
    """Return what to do about a driver; versions are 1000 * major + 10 * minor."""
    can_build = _OLDEST_RUNTIME <= driver and driver // 1000 < runtime // 1000
    builds = f", build the package with an nvcc of CUDA {driver // 1000}" if can_build else ""
    return (
        f"the driver ({_cuda(driver)}) is too old for {_cuda(runtime)}, which this wheel was built with; update the "
        f"driver{builds}, or install triton"
    )


def _cuda(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _device_name(index: int) -> str:
    try:
        return torch.cuda.get_device_name(index)
    except RuntimeError as error:  # a call on another device need not fail because of this one
        return f"unknown ({error})"


@lru_cache(maxsize=64)
def _refuses_device(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        return f"takes GPUs of compute capability 8.0 and later, got {capability[0]}.{capability[1]}"
    module = _device_module()[0]
    error, text = module.kernel_image_failure(index)
    if error == "cudaErrorInsufficientDriver":
        return _old_driver(*module.versions())
    if error == "cudaErrorUnsupportedPtxVersion":  # code for this card is translated by the driver, unlike cubins
        driver, runtime = map(_cuda, module.versions())
        return (
            f"this build has PTX of {runtime} for compute capability {capability[0]}.{capability[1]}, which the driver "
            f"({driver}) cannot translate; update the driver, or build the package with "
            f"AFA_CUDA_ARCHITECTURES={capability[0]}{capability[1]}-real"
        )
    if error in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        return f"this build has no kernels for compute capability {capability[0]}.{capability[1]}"
    return f"the CUDA runtime cannot use this device: {text} ({error})" if error else None


class CUDABackend(Backend):
    """The kernels of ``afa_kernels._C.cuda``.

    A lone layer is a list of one member, in a form of its own that costs a third less. The module reads tensors itself,
    because Python takes longer for their attributes than the module for all the rest. Where it finds one that the
    kernels cannot read, it returns False, and the call starts again with copies.
    """

    name = "cuda"
    devices = frozenset({"cuda"})
    takes_owners = False
    takes_shared_input = True

    @cached_property
    def _module(self) -> ModuleType:
        module, _ = _device_module()
        module.use_torch(torch)
        return module

    @cached_property
    def _forward_workspace(self) -> Callable[[tuple], int]:
        return lru_cache(maxsize=1024)(self._module.forward_workspace)

    @cached_property
    def _backward_workspace(self) -> Callable[[tuple], int]:
        return lru_cache(maxsize=1024)(self._module.backward_workspace)

    def status(self) -> BackendStatus:
        module, reason = _device_module()
        if module is None:
            return BackendStatus(False, reason)
        info = compiled._C.build_info()
        details = {
            "nvcc": info["cuda"],
            "architectures": info["cuda_architectures"],
            "max_rank": _MAX_RANK,
        }
        if torch.version.hip is not None:
            return BackendStatus(False, "the kernels are for NVIDIA GPUs, and this torch is built for AMD", details)
        if not torch.cuda.is_available():
            return BackendStatus(False, "torch sees no CUDA device", details)
        driver, runtime = module.versions()
        if driver // 1000 < runtime // 1000:  # a driver runs every runtime of its own major version
            return BackendStatus(False, _old_driver(driver, runtime), details)
        details["devices"] = [_device_name(i) for i in range(torch.cuda.device_count())]
        return BackendStatus(True, details=details)

    def refuses(self, call: Call) -> str | None:
        return _refuses_shape(call) or _refuses_device(call.device_index or 0)

    def refuses_together(self, calls: list[Call]) -> str | None:
        if len(calls) > _MAX_MEMBERS:
            return f"takes up to {_MAX_MEMBERS} layers that share x, got {len(calls)}"
        largest = max(call.r for call in calls)
        if largest > _MAX_MEMBER_RANK:
            return f"takes ranks up to {_MAX_MEMBER_RANK} of layers that share x, got {largest}"
        together = sum(-(-call.r // _RANK_UNIT) * _RANK_UNIT for call in calls)
        if len(calls) > 1 and together > _MAX_RANK:
            return (
                f"takes ranks of layers that share x up to {_MAX_RANK} together, each rounded up to a multiple of "
                f"{_RANK_UNIT}, got {together}"
            )
        return None

    def _place(self, x: Tensor) -> tuple[int, int]:
        """Return the device and the stream to launch on."""
        device = x.device.index
        return device, current_stream(device)

    # new_empty takes half the time of torch.empty, and naming another dtype as much again.

    def _forward_scratch(self, x: Tensor, sizes: tuple) -> Tensor:
        return x.new_empty(self._forward_workspace(sizes) // _ELEMENT_BYTES)

    def _backward_scratch(self, x: Tensor, sizes: tuple) -> Tensor:
        return x.new_empty(self._backward_workspace(sizes) // _ELEMENT_BYTES)

    def _forward(self, x, members, seed, dropout, bases, outs, save_z) -> list[Tensor | None]:
        m, k = x.shape
        described, results, zs, widths, ranks = [], [], [], (), ()
        for (a, b, alpha_t, spec), base, out in zip(members, bases, outs, strict=True):
            n, r = b.shape
            z = x.new_empty(m, r) if save_z else None
            described.append((a, b, alpha_t, COMPILED_IDS[spec.activation], spec.scaling))
            results.append((base, out, z))
            zs.append(z)
            widths, ranks = (*widths, n), (*ranks, r)
        workspace = self._forward_scratch(x, (m, k, widths, ranks))
        if self._module.forward(x, described, results, seed, dropout, workspace, *self._place(x)):
            return zs
        return self._forward_of_copies(x, members, seed, dropout, bases, outs, save_z)

    def _forward_of_copies(self, x, members, seed, dropout, bases, outs, save_z) -> list[Tensor | None]:
        ys = [readable_out(out) for out in outs]
        bases = [readable_base(*one) for one in zip(bases, outs, ys, strict=True)]
        zs = self._forward(readable(x), _readable_members(x, members), seed, dropout, bases, ys, save_z)
        for out, y in zip(outs, ys, strict=True):
            if y is not out:
                out.copy_(y)
        return zs

    def _backward(self, dys, x, members, zs, seed, dropout, need_dx, need_da, need_db):
        m, k = x.shape
        dx = x.new_empty(m, k) if need_dx else None
        described, gradients, das, dbs, widths, ranks = [], [], [], [], (), ()
        for (a, b, alpha_t, spec), dy, z, needs_a, needs_b in zip(members, dys, zs, need_da, need_db, strict=True):
            n, r = b.shape
            da = a.new_empty(r, k) if needs_a else None
            db = b.new_empty(n, r) if needs_b else None
            described.append((a, b, alpha_t, COMPILED_IDS[spec.activation], spec.scaling))
            gradients.append((dy, z, da, db))
            das.append(da)
            dbs.append(db)
            widths, ranks = (*widths, n), (*ranks, r)
        workspace = self._backward_scratch(x, (m, k, widths, ranks))
        if self._module.backward(x, described, dx, gradients, seed, dropout, workspace, *self._place(x)):
            return dx, das, dbs
        return self._backward_of_copies(dys, x, members, zs, seed, dropout, need_dx, need_da, need_db)

    def _backward_of_copies(self, dys, x, members, zs, seed, dropout, *needs):
        zs = [readable_z(z) for z in zs]
        dys, own = [readable(dy) for dy in dys], _readable_members(x, members)
        dx, das, dbs = self._backward(dys, readable(x), own, zs, seed, dropout, *needs)
        das = [None if da is None else da.to(member.a.dtype) for da, member in zip(das, members, strict=True)]
        dbs = [None if db is None else db.to(member.b.dtype) for db, member in zip(dbs, members, strict=True)]
        return dx, das, dbs

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        (m, k), (n, r) = x.shape, b.shape
        activation, scaling, dropout = spec
        z = x.new_empty(m, r) if save_z else None
        workspace = self._forward_scratch(x, (m, k, n, r))
        member = (a, b, alpha_t, COMPILED_IDS[activation], scaling)
        if self._module.forward(x, [member], [(base, out, z)], seed, dropout, workspace, *self._place(x)):
            return z
        members = [Member(a, b, alpha_t, spec)]
        (z,) = self._forward_of_copies(x, members, seed, dropout, [base], [out], save_z)
        return z

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db):
        (m, k), (n, r) = x.shape, b.shape
        activation, scaling, dropout = spec
        dx = x.new_empty(m, k) if need_dx else None
        da = a.new_empty(r, k) if need_da else None
        db = b.new_empty(n, r) if need_db else None
        workspace = self._backward_scratch(x, (m, k, n, r))
        member = (a, b, alpha_t, COMPILED_IDS[activation], scaling)
        if self._module.backward(x, [member], dx, [(dy, z, da, db)], seed, dropout, workspace, *self._place(x)):
            return dx, da, db
        members, needs = [Member(a, b, alpha_t, spec)], (need_dx, [need_da], [need_db])
        dx, (da,), (db,) = self._backward_of_copies([dy], x, members, [z], seed, dropout, *needs)
        return dx, da, db

    def forward_shared(self, x, members, *, bases, outs, save_z):
        zs = self._forward(x, members, None, 0, bases, outs, save_z)
        return zs if save_z else None

    def backward_shared(self, dys, x, members, zs, *, need_dx, need_da, need_db):
        return self._backward(dys, x, members, zs, None, 0, need_dx, need_da, need_db)

    def launches(self, call: Call) -> list[dict[str, Any]]:
        """Return the kernels of a forward and a backward, with their launch parameters, for
        ``plan``."""
        limits = self._module.device_limits(call.device_index or 0)
        return self._module.launch_plan((call.m, call.k, call.n, call.r), *limits)


BACKEND = CUDABackend()
