"""Compile the Triton kernels for a GPU that is not here, and read their machine code.

A stub stands in for Triton's driver and names the target; the recorded launches then go through
Triton's own path of specialisation and compilation up to the point where it would load the result.
So what is examined is what would run.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from afa_kernels.backend.interface import Rows
from afa_kernels.backend.triton import grouped_gemm, launch, passes
from afa_kernels.backend.triton.configs import Device, Tiles
from afa_kernels.backend.triton.launch import Launch
from afa_kernels.operator.options import Spec
from bench.model.gpus import CARDS

_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCOMMA|UTCIMMA)\b")
_ASYNC_COPY = re.compile(r"\b(LDGSTS|UTMALDG|UBLKCP)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_AMD_TENSOR_CORE = re.compile(r"\bv_mfma_\w+")


class _StubDriver:
    """What Triton's compile path asks of a driver. The "device" is the target: each has a kernel
    cache of its own."""

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Make ``arch`` ("sm_90", "gfx942") the target of every compilation inside the ``with``
    block."""
    if arch.startswith("sm_"):
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", arch, 64)
    config = triton.runtime.driver
    before = config.__dict__.copy()
    config.set_active(_StubDriver(target))
    try:
        yield
    finally:
        config.__dict__.update(before)


def compile_launch(entry: Launch) -> Any:
    """Return Triton's compiled kernel of a recorded launch."""
    return entry.kernel.warmup(**entry.arguments, **entry.constants, **entry.options, grid=entry.grid)


@dataclass(frozen=True)
class Problem:
    """A call to record: shape, dtype, and the options that make another kernel of it."""

    m: int = 8192
    k: int = 4096
    n: int = 4096
    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    dropout: int = 0
    base: bool = True
    save_z: bool = True
    weight_dtype: torch.dtype | None = None  # of a and b; None: that of x
    owners: int = 0  # of rows, each with its own a and b, rank, alpha_t and scaling; 0: one owner has all rows
    adds_dx: bool = False  # to a dx that is there
    matrices: int = 0  # of the frozen layer, each for some owners in a row, whose product is part of the call

    def record(
        self, device: Device, *, tiles: Tiles | None = None, forward: bool = True, backward: bool = True
    ) -> list[Launch]:
        """Return the launches of one forward and one backward on ``device``, without running any;
        ``tiles`` in place of those of the table."""

        def meta(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        weight_dtype = self.weight_dtype or self.dtype
        x, dy, z = meta(self.m, self.k), meta(self.m, self.n), meta(self.m, self.r)
        leading = (self.owners,) if self.owners else ()
        a, b = (meta(*leading, *shape, dtype=weight_dtype) for shape in ((self.r, self.k), (self.n, self.r)))
        alpha_t, seed = meta(*leading, dtype=torch.float32), meta(dtype=torch.int64)
        spec = Spec(self.activation, 2.0, self.dropout)
        base = meta(self.n).expand_as(dy) if self.base else None

        rows = None
        if self.owners:
            ends, ranks = (meta(self.owners, dtype=torch.int32) for _ in range(2))
            rows = Rows(ends, ranks, meta(self.owners, dtype=torch.float32))

        def context() -> launch.Context:
            return launch.Context(x, a, b, alpha_t, seed, spec, tiles, rows)

        if self.matrices:
            weight = meta(self.matrices, self.n, self.k)
            with launch.recording(device) as launches:
                if forward:
                    grouped_gemm.forward(context(), weight, meta(self.matrices, self.n), self.save_z)
                if backward:
                    needs = {"need_da": True, "need_db": True}
                    grouped_gemm.backward(context(), weight, dy, z, weight_dtype, weight_dtype, **needs)
            return launches

        with launch.recording(device) as launches:
            if forward:
                passes.forward(context(), base, meta(self.m, self.n), self.save_z)
            if backward:
                passes.backward(
                    context(), dy, z, weight_dtype, weight_dtype, need_dx=True, need_da=True, need_db=True,
                    dx=meta(self.m, self.k) if self.adds_dx else None,
                )  # fmt: skip
        return launches


def device_for(arch: str) -> Device:
    return Device(arch, CARDS[arch].multiprocessors, arch)


class MachineCode(NamedTuple):
    """What the machine code of one kernel uses. ``spills``: loads and stores of local memory."""

    registers: int
    spills: int
    shared: int
    blocks_per_multiprocessor: int
    occupancy: float
    tensor_core: dict[str, int]
    async_copies: int
    plain_loads: int
    barriers: int
    instructions: int


def examine(compiled: Any, arch: str, warps: int) -> MachineCode:
    """Disassemble a compiled NVIDIA kernel and count what matters."""
    sass, usage = _disassemble(compiled.asm["cubin"])
    names = [name for name in _INSTRUCTION.findall(sass)]
    stems = [name.split(".")[0] for name in names]
    registers, shared = int(re.search(r"REG:(\d+)", usage)[1]), int(compiled.metadata.shared)
    threads = 32 * warps
    card = CARDS[arch]
    blocks = card.blocks_per_multiprocessor(threads, registers, shared)
    tensor_core: dict[str, int] = {}
    for stem in stems:
        if _TENSOR_CORE.fullmatch(stem):
            tensor_core[stem] = tensor_core.get(stem, 0) + 1
    return MachineCode(
        registers=registers,
        spills=sum(stem in ("LDL", "STL") for stem in stems),
        shared=shared,
        blocks_per_multiprocessor=blocks,
        occupancy=blocks * threads / card.resident_threads,
        tensor_core=tensor_core,
        async_copies=sum(bool(_ASYNC_COPY.fullmatch(stem)) for stem in stems),
        plain_loads=stems.count("LDG"),
        barriers=sum(stem in ("BAR", "SYNCS") for stem in stems),
        instructions=len(stems),
    )


def examine_amd(compiled: Any) -> MachineCode:
    """Read the assembly that Triton's AMD backend keeps: registers, spills, LDS and matrix
    instructions."""
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    found: dict[str, int] = {}
    for name in _AMD_TENSOR_CORE.findall(text):
        found[name] = found.get(name, 0) + 1
    instructions = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    return MachineCode(
        registers=field("vgpr_count"),
        spills=field("vgpr_spill_count"),
        shared=int(compiled.metadata.shared),
        blocks_per_multiprocessor=0,
        occupancy=0.0,
        tensor_core=found,
        async_copies=0,
        plain_loads=sum(name.startswith(("global_load", "buffer_load")) for name in instructions),
        barriers=instructions.count("s_barrier"),
        instructions=len(instructions),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output(tools / "nvdisasm", "-c", file.name)
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    return sass, usage


def _output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
