"""Where problems run: the backends of this process, each with what it takes and what it promises of bits.

A process has one instruction set, and interprets Triton's kernels, compiles them for a card that it has, or compiles
them for a simulated GPU; test_conformance.py starts processes for the others.
"""

import contextlib
import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import ptx_cuda
import torch
from helpers import torch_reads_past_rows

from afa_kernels.backend import choice
from afa_kernels.backend.interface import Backend, Call
from conformance.layouts import OF_OWNERS
from conformance.problems import Problem

_16_BITS = ("bf16", "f16")

# Triton 3.9 pipelines the loop of this kernel so that dz has one buffer too few: the copy for the iteration after
# the next goes where the wgmma of this iteration, which the wait lets pass, may still read. Seen on sm_90 in tf32
# above rank 32 with a pipeline, which the table does not give it, and in 16 bits at rank 64 with the default tiles. The
# products in between make it harmless in time, not by the rules.
RACE = re.compile(r"x_pass_backward_kernel.*writes shared memory.*a wgmma that has not been waited for may still read")


class Target:
    """A backend on one device."""

    dtypes: tuple[str, ...] = ("f32", "bf16", "f16")
    rank_classes: tuple[int, ...] = (16, 32, 64, 128)  # the largest rank of each, of which some problems have one each
    interpreted = False  # by Triton
    exact = True  # a row, and each branch, has the same bits in every call
    tiles_hang_on_r = True  # of all owners, not on the rank of each
    problems, others = 24, 12  # of accuracy, and of each other promise
    owners: tuple[int, ...] = (1, 2, 3, 5, 9)
    wide_weights: tuple[torch.dtype, ...] = (torch.float64,)  # of A and B
    refused: tuple[dict, ...] = ()  # what it does not take of a call

    def __init__(self, backend: str, name: str = "", device: str = "cpu"):
        self.backend_name, self.name, self.device = backend, name or backend, torch.device(device)

    @property
    def backend(self) -> Backend:
        return choice.get(self.backend_name)

    def why_not(self) -> str | None:
        """Return why it cannot run here, or None if it can."""
        status = self.backend.status()
        return None if status.available else f"{self.name}: {status.reason}"

    def kinds(self) -> tuple[str, ...]:
        backend = self.backend
        taken = {
            "lone": True, "owners": backend.takes_owners, "experts": backend.takes_weights,
            "shared": backend.takes_shared_input,
        }  # fmt: skip
        return tuple(kind for kind, takes in taken.items() if takes)

    def count(self, kind: str) -> int:
        """Return how many problems of a kind are solved for their accuracy."""
        return self.problems

    # --- what problems draw

    def width(self, draw: random.Random) -> int:
        return draw.choice((1, 17, 40, 64, 70, 130, 137, draw.randint(1, 300)))

    def rows(self, draw: random.Random) -> int:
        return draw.choice((1, 2, 17, 48, 64, 65, 130, draw.randint(1, 260)))

    def rank(self, draw: random.Random, number: int) -> int:
        """A few problems have all dtypes and all classes of ranks, many have each dtype with each class."""
        dtypes, classes = len(self.dtypes), len(self.rank_classes)
        largest = self.rank_classes[(number + number // math.lcm(dtypes, classes)) % classes]
        if draw.random() < 0.4:
            return largest
        return draw.randint(1 if largest == self.rank_classes[0] else largest // 2 + 1, largest)

    def shared_ranks(self, draw: random.Random, count: int) -> list[int]:
        return [draw.choice((1, 3, 8, 16, 33)) for _ in range(count)]

    def layouts(self, dtype: torch.dtype) -> tuple[str, ...]:
        return tuple(OF_OWNERS)

    def takes(self, dtype: torch.dtype, rank: int, dropout: bool) -> bool:
        """Whether it takes such a problem at all; its refusals are tested apart."""
        return self.backend.refuses(Call(self.device.type, dtype, 8, 8, 8, rank, "silu", dropout)) is None

    # --- what it promises

    def keeps_rows_apart(self, problem: Problem) -> bool:
        """Whether a NaN or an infinity in one row reaches no other row's sums."""
        return True

    def adds_to_dx(self, problem: Problem) -> bool:
        """Whether it takes a dx that it adds to: where a GEMM comes first in the backward."""
        return problem.kind == "owners"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def choices(self, problem: Problem, *, pipelined: bool = True) -> Iterator[None]:
        """What is free to be chosen for a problem beyond its call."""
        yield

    def schedules(self, number: int) -> Iterator[contextlib.AbstractContextManager]:
        """Ways to run one problem that must not show in its bits."""
        return iter([contextlib.nullcontext()] * 2)

    def is_known(self, error: Exception) -> bool:
        """Whether this is a report of the PTX machine that the tests expect."""
        return False


class TorchTarget(Target):
    """torch's own operators, whose bits depend on sizes and strides."""

    exact = False

    def layouts(self, dtype: torch.dtype) -> tuple[str, ...]:
        """On a processor with AMX torch's 16-bit products read what lies between rows (docs/design.md)."""
        return ("packed",) if dtype.itemsize == 2 and torch_reads_past_rows() else tuple(OF_OWNERS)

    def keeps_rows_apart(self, problem: Problem) -> bool:
        """Where torch's 16-bit products read past a row, what lies there is the next one. Which shapes they do it for
        differs from one version and processor to another, so 16 bits are promised nowhere.
        """
        return problem.x.dtype.itemsize != 2


class CpuTarget(Target):
    tiles_hang_on_r = False
    rank_classes = (8, 16, 33, 64, 256)
    problems, others = 90, 30
    refused = ({"r": 257}, {"dtype": torch.float64})

    def width(self, draw: random.Random) -> int:
        return draw.choice((1, 17, 64, 70, 130, 300, 640, draw.randint(1, 600), draw.choice((1030, 1100))))

    def rows(self, draw: random.Random) -> int:
        return draw.choice((1, 2, 3, 6, 17, 48, 49, 64, 65, 130, 390, draw.randint(1, 400)))

    def adds_to_dx(self, problem: Problem) -> bool:
        return not problem.outputs[0].spec.dropout

    def schedules(self, number: int) -> Iterator[contextlib.AbstractContextManager]:
        return map(_threads, (2, 1, 3, 5))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CudaTarget(Target):
    """nvcc's kernels: on a card, or for one architecture on the PTX machine."""

    dtypes, rank_classes = _16_BITS, (16, 32, 64)
    refused = ({"r": 65}, {"dtype": torch.float32}, {"k": 60})

    def __init__(self, arch: str = ""):
        super().__init__(
            ptx_cuda.NAME if arch else "cuda", f"nvcc-{arch}" if arch else "cuda", "cpu" if arch else "cuda"
        )
        self.arch = arch
        if arch:
            self.problems, self.others = 12, 6  # each dtype with each class of ranks

    def width(self, draw: random.Random) -> int:
        return 8 * draw.choice((1, 2, 5, 8, 9, 17, 31, 33, 64, draw.randint(1, 90)))

    def shared_ranks(self, draw: random.Random, count: int) -> list[int]:
        largest = 32 if count < 3 else 16
        return [draw.choice((1, 8, 16, largest, draw.randint(1, largest))) for _ in range(count)]

    def adds_to_dx(self, problem: Problem) -> bool:
        return False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ptx_cuda.kernels.on(ptx_cuda.DEVICES[self.arch]) if self.arch else contextlib.nullcontext():
            yield

    def schedules(self, number: int) -> Iterator[contextlib.AbstractContextManager]:
        for part in (0, 500) if self.arch else ():
            ptx_cuda._cuda_on_ptx.set_seed(1000 * number + part)
            yield contextlib.nullcontext()
        if not self.arch:
            yield from super().schedules(number)

    def take_kernels(self) -> list[str]:
        """Return what was launched since the last call, each compiled kernel under a name of its own."""
        return [launch["kernel"] for launch in ptx_cuda._cuda_on_ptx.take_launches()]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class TritonTarget(Target):
    """Triton's kernels: on a card, in the interpreter, or for one architecture on the PTX machine."""

    refused = ({"r": 129}, {"dtype": torch.float64}, {"owners": 5000})

    def __init__(self, arch: str = "", device: str = "cpu", machine=None):
        super().__init__("triton", f"triton-{arch}" if arch else "triton", device)
        self.arch, self.machine = arch, machine
        self.interpreted = device == "cpu" and not arch
        self.dtypes = (*_16_BITS, "f32", "tf32") if arch else ("f16", "f32") if self.interpreted else Target.dtypes
        if device == "cpu":
            self.problems, self.others, self.owners = 16, 4, (1, 2, 3)
        if arch:
            self.wide_weights = ()  # the PTX machine has no conversion to float64

    def count(self, kind: str) -> int:
        # Beside those of owners, whose other kernels they take: each dtype twice.
        return self.problems // 2 if kind == "experts" and self.device.type == "cpu" else self.problems

    def width(self, draw: random.Random) -> int:
        if self.interpreted:
            return draw.choice((1, 8, 40, 67, draw.randint(1, 90)))
        return draw.choice((8, 40, 64, 72, 130, 137, 264, 512, draw.randint(1, 600)))

    def rows(self, draw: random.Random) -> int:
        return draw.choice((1, 17, 40, 65, draw.randint(1, 90))) if self.interpreted else super().rows(draw)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the PTX machine as the only backend ``triton`` of the process, unless that is simulated already."""
        if not self.arch or self.machine is not None:
            yield
            return
        from ptx_triton_driver import simulated

        with simulated(self.arch) as self.machine:
            yield
        self.machine = None

    @contextlib.contextmanager
    def choices(self, problem: Problem, *, pipelined: bool = True) -> Iterator[None]:
        """The tiles of this architecture or the default ones, few or many chunks of rows."""
        if not self.arch:
            yield
            return
        from afa_kernels.backend.triton import configs, tuning

        draw, rank = random.Random(problem.title), problem.outputs[0].a.shape[-2]
        tiles = configs.table_tiles(draw.choice((self.arch, configs.DEFAULT)), problem.x.itemsize, rank)
        tiles = replace(tiles, chunks=draw.choice((1, 2, tiles.chunks)))
        if not pipelined:
            tiles = replace(tiles, x_pass=replace(tiles.x_pass, stages=1))
        with mock.patch.object(tuning, "tiles", lambda *_: tiles), tf32(problem.tf32):
            yield

    def schedules(self, number: int) -> Iterator[contextlib.AbstractContextManager]:
        """For a device that the rows fill and for one that they do not, and orders of the warps on the PTX machine."""
        if self.device.type != "cpu":
            yield from super().schedules(number)
            return
        from afa_kernels.backend.triton import configs

        device = configs.device_of(torch.device("cpu"))
        for multiprocessors, part in ((1, 0), (108, 500)):
            if self.machine is not None:
                self.machine.seed = 1000 * number + part
            other = replace(device, multiprocessors=multiprocessors)
            yield mock.patch.object(configs, "device_of", lambda _, other=other: other)

    def is_known(self, error: Exception) -> bool:
        return self.arch == "sm_90" and bool(RACE.search(str(error)))

    def take_kernels(self) -> list[str]:
        names = [f"{name} {zlib.crc32(launch['text'].encode()):08x}" for name, launch in self.machine.launched]
        self.machine.launched.clear()
        return names


ON_PTX = {"nvcc": CudaTarget, "triton": TritonTarget}  # by compiler; for each of ptx_cuda.DEVICES


def on_ptx(name: str) -> CudaTarget | TritonTarget:
    """Return the target of a name such as ``nvcc-sm_80``, on the PTX machine."""
    compiler, _, arch = name.partition("-")
    return ON_PTX[compiler](arch)


def of_this_process(simulated_gpu: str, interpreted: bool) -> list[Target]:
    """Return every target of a process, whether it can run there or not; where a GPU is simulated, Triton's alone."""
    if simulated_gpu:
        return [TritonTarget(simulated_gpu)]
    found = [TorchTarget("reference"), TorchTarget("torch"), CpuTarget("cpu"), CudaTarget()]
    found += [CudaTarget(arch) for arch in ptx_cuda.DEVICES]
    return [*found, TritonTarget(device="cpu" if interpreted else "cuda")]
