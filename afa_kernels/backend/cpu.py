"""The ``cpu`` backend: the native kernels of csrc/cpu.

The forward passes once over x and once over y, the backward once over dY and once over x; layers that share x share the
passes over it, and rows by owner are one call. Threads follow ``torch.get_num_threads()``, and no result
depends on their number.
"""

import torch

from afa_kernels.backend import compiled
from afa_kernels.backend.interface import Backend, BackendStatus, Call
from afa_kernels.operator.activation import COMPILED_IDS
from afa_kernels.operator.options import Spec

_MAX_RANK = 256  # kMaxRank of csrc/cpu/params.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# From here on torch's GEMMs beat the kernels in bfloat16 on a CPU with vdpbf16ps at full width but without AMX: the
# backward took 1.2 to 1.6 times theirs on a Zen 5. At half the width, on a Zen 4, the kernels are the faster ones.
_GEMM_RANK, _GEMM_ROWS = 64, 256


def _gemms_win() -> bool:
    return compiled._C.cpu_isa() == "avx512bf16" and "avx512_halved" not in compiled._C.cpu_features()


def _packed(like):
    """Return uninitialized memory for a tensor of that shape and dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)  # in half the time of torch.empty


def _memory(x, a, b, z, dx, need_dx, need_da, need_db):
    """Return z as the kernels take it, and what dx, dA and dB are written to; None: not wanted."""
    if not z.is_contiguous():
        z = z.contiguous()
    if need_dx and dx is None:
        dx = _packed(x)
    da = _packed(a) if need_da else None
    db = _packed(b) if need_db else None
    return z, dx, da, db


class CPUBackend(Backend):
    name = "cpu"
    devices = frozenset({"cpu"})
    takes_shared_input = True

    def status(self) -> BackendStatus:
        if compiled._C is None:
            return BackendStatus(False, compiled.load_error)
        try:
            isa = compiled._C.cpu_isa()
        except ValueError as error:
            return BackendStatus(False, str(error))
        details = {"isa": isa, "isas": compiled._C.cpu_isas(), **compiled._C.build_info()}
        return BackendStatus(True, details=details)

    def refuses(self, call: Call) -> str | None:
        if call.dtype not in _DTYPES:
            return f"takes float32, bfloat16 and float16, got {str(call.dtype).removeprefix('torch.')}"
        if call.r > _MAX_RANK:
            return f"takes ranks up to {_MAX_RANK}, got {call.r}"
        return None

    def leaves(self, call: Call) -> tuple[str, str] | None:
        wide = call.r >= _GEMM_RANK and call.m >= _GEMM_ROWS and not call.dropout
        if not wide or call.dtype != torch.bfloat16 or not _gemms_win():
            return None
        return "torch", f"leaves bfloat16 at ranks from {_GEMM_RANK} on to torch's GEMMs on a CPU without AMX"

    def gemm_first(self, spec: Spec, dtype: torch.dtype, backward: bool) -> bool:
        """Whether the frozen GEMM had better run before the branch.

        Forward: oneDNN's bfloat16 GEMM with beta = 1 takes 3 to 9% longer than with beta = 0 (Zen 5, shapes of
        bench.cases), more than the read of y that the other order saves; in float32 the two orders are within 1% of
        each other. Backward: with dropout the mask falls on the branch's part of dx alone, so that part has to be
        written first. In float32 that order is the faster one anyway (by 1 to 2% on the shapes of bench.cases), in 16
        bits the slower one.
        """
        return not backward or not (spec.dropout or dtype == torch.float32)

    def forward(self, x, a, b, alpha_t, seed, spec, rows=None, *, base, out, save_z):
        z = x.new_empty((x.shape[0], a.shape[-2])) if save_z else None
        activation, scaling, dropout = spec
        results = (COMPILED_IDS[activation], dropout, scaling, torch.get_num_threads(), base, out, z)
        if rows is None:
            compiled._C.cpu_forward(x, a, b, alpha_t, seed, *results)
        else:
            compiled._C.cpu_forward_by_owner(x, a, b, rows.offsets, rows.ranks, alpha_t, rows.scaling, seed, *results)
        return z

    def backward(self, dy, x, a, b, z, alpha_t, seed, spec, rows=None, *, need_dx, need_da, need_db, dx=None):
        accumulate_dx = dx is not None
        z, dx, da, db = _memory(x, a, b, z, dx, need_dx, need_da, need_db)
        activation, scaling, dropout = spec
        results = (
            COMPILED_IDS[activation], dropout, scaling, torch.get_num_threads(), dy, z, dx, da, db, accumulate_dx,
        )  # fmt: skip
        if rows is None:
            compiled._C.cpu_backward(x, a, b, alpha_t, seed, *results)
        else:
            compiled._C.cpu_backward_by_owner(x, a, b, rows.offsets, rows.ranks, alpha_t, rows.scaling, seed, *results)
        return dx, da, db

    def refuses_together(self, calls: list[Call]) -> str | None:
        ranks = sum(call.r for call in calls)
        return f"takes ranks up to {_MAX_RANK} together, got {ranks}" if ranks > _MAX_RANK else None

    def forward_shared(self, x, members, *, bases, outs, save_z):
        zs, fields = [], []
        for (a, b, alpha_t, spec), base, out in zip(members, bases, outs, strict=True):
            z = x.new_empty((x.shape[0], a.shape[0])) if save_z else None
            zs.append(z)
            fields.append((a, b, alpha_t, COMPILED_IDS[spec.activation], spec.scaling, base, out, z))
        compiled._C.cpu_shared_forward(x, torch.get_num_threads(), tuple(fields))
        return zs if save_z else None

    def backward_shared(self, dys, x, members, zs, *, need_dx, need_da, need_db, dx=None):
        accumulate_dx = dx is not None
        das, dbs, fields = [], [], []
        for i, (a, b, alpha_t, spec) in enumerate(members):
            z, dx, da, db = _memory(x, a, b, zs[i], dx, need_dx, need_da[i], need_db[i])
            das.append(da)
            dbs.append(db)
            fields.append((a, b, alpha_t, COMPILED_IDS[spec.activation], spec.scaling, dys[i], z, da, db))
        compiled._C.cpu_shared_backward(x, torch.get_num_threads(), tuple(fields), dx, accumulate_dx)
        return dx, das, dbs


BACKEND = CPUBackend()
