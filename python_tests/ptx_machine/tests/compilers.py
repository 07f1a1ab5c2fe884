"""The kernels of each compiler, with problems that reach them and a way to change their PTX."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = map(str, (TESTS.parent, TESTS, TESTS / "ptx_machine"))

import ptx_cuda  # noqa: E402
from conformance.problems import Problem  # noqa: E402
from conformance.targets import tf32  # noqa: E402
from helpers import poisoned_memory  # noqa: E402
from ptx_cuda import _cuda_on_ptx  # noqa: E402

from afa_kernels.backend import choice  # noqa: E402

Results = list[torch.Tensor]


def nothing() -> dict[str, set[int]]:
    return {"effective": set(), "exact_waits": set()}


def note(needed: dict[str, set[int]], launch: dict) -> None:
    """Add the synchronizations that a launch could not do without."""
    for which, lines in needed.items():
        lines.update(line - 1 for line in launch[which])


@dataclass
class Kernel:
    name: str  # the same for all compilations of one kernel
    text: str  # of the module that holds it
    first: int  # its lines
    last: int
    calls: list[Callable[[], Results]] = field(default_factory=list)  # that reach it
    needed: dict[str, set[int]] = field(default_factory=nothing)  # by list of the machine: lines that they need, from 0

    def results(self) -> Results:
        return [tensor for call in self.calls for tensor in call()]


def call(
    backend: str, shape: tuple[int, int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype, dropout: int
) -> Callable[[], Results]:
    """Return a forward and backward of a backend as a function without arguments."""
    torch.manual_seed(1)
    problem = Problem.of(dtype, *shape, rank, weights=adapter, dropout=dropout)
    return lambda: list(problem.run(choice.get(backend)).values())


def call_by_owner(
    backend: str, sizes: tuple[int, ...], width: tuple[int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype,
    dropout: int,
):  # fmt: skip
    """Return the same of rows by owner, and with a dx that is added to. Under dropout each owner has a rank of its
    own."""
    torch.manual_seed(1)
    ranks = [max(1, rank // (1 + g)) for g in range(len(sizes))] if dropout else None
    given = {"behind": 3, "ranks": ranks, "weights": adapter, "dropout": dropout, "activation": "relu"}
    p = Problem.of_owners(dtype, sizes, *width, rank, alphas=(0.2, 0.7, 0.9), **given)
    old_dx = torch.randn_like(p.x)  # no two elements alike, so that one in another's place shows

    def run() -> Results:
        results = p.run(choice.get(backend))
        with poisoned_memory():
            added = p.backward(choice.get(backend), results, dx=old_dx.clone())
        return [*results.values(), *added.values()]

    return run


def call_with_weights(
    backend: str, sizes: tuple[int, ...], width: tuple[int, int], rank: int, dtype: torch.dtype, adapter: torch.dtype,
    dropout: int,
):  # fmt: skip
    """Return a forward and backward of rows by owner with a frozen matrix and a bias for each. Under dropout two owners
    share each matrix, and each has a rank of its own."""
    torch.manual_seed(1)
    several = 2 if dropout else 1
    sizes = [size // several for size in sizes for _ in range(several)]
    ranks = [max(1, rank // (1 + g)) for g in range(len(sizes))] if dropout else None
    given = {"behind": 3, "ranks": ranks, "weights": adapter, "dropout": dropout, "activation": "relu"}
    p = Problem.of_owners(dtype, sizes, *width, rank, alphas=(0.2, 0.7, 0.9), base="none", **given)
    k, n = width
    p.kind, p.weight = "experts", (torch.randn(len(sizes) // several, n, k) * k**-0.5).to(dtype)
    p.bias = torch.randn(len(p.weight), n).to(dtype)
    return lambda: list(p.run(choice.get(backend)).values())


def shared_call(dtype: torch.dtype, ranks: tuple[int, ...]) -> Callable[[], Results]:
    """Return a forward and backward of layers that share x, on nvcc's kernels."""
    torch.manual_seed(1)
    problem = Problem.of(dtype, 75, 136, (136, 264, 72)[: len(ranks)], ranks)
    return lambda: list(problem.run(ptx_cuda.kernels).values())


class Nvcc:
    """Of its dtype and class of ranks in one pass and split, with a mask and without, with full tiles and with none,
    and of layers that share x."""

    shapes = (((64, 72, 80), 0), ((75, 136, 264), 77), ((64, 904, 136), 0), ((200, 520, 328), 0))

    def __init__(self, arch: str):
        self.arch, self.edit = arch, None
        self.texts: set[str] = set()

    def __enter__(self):
        ptx_cuda.register()
        self.device = ptx_cuda.kernels.on(ptx_cuda.DEVICES[self.arch])
        self.device.__enter__()
        return self

    def __exit__(self, *_):
        self.device.__exit__(None, None, None)

    def kernels(self) -> list[Kernel]:
        _cuda_on_ptx.set_edit(lambda text: self.texts.add(text) or text)
        _cuda_on_ptx.set_explain(True)
        calls = []
        for dtype in (torch.bfloat16, torch.float16):
            for rank in (16, 32, 64):
                # Full ranks and one that is padded, weights as they are and rounded from float32.
                full, padded = (rank, dtype, dtype), (rank - 3, dtype, torch.float32)
                for *shape, dropout in self.shapes:
                    calls.append(call(ptx_cuda.NAME, *shape, *(padded if dropout else full), dropout))
            calls += [shared_call(dtype, ranks) for ranks in ((16, 7), (16, 16, 13))]
        _cuda_on_ptx.take_launches()
        reached: dict[str, list] = {}
        needed: dict[str, dict[str, set[int]]] = {}
        for one in calls:
            one()
            for launch in _cuda_on_ptx.take_launches():
                name = launch["kernel"]
                of_kernel = reached.setdefault(name, [])
                if one not in of_kernel and len(of_kernel) < 4:
                    of_kernel.append(one)
                if one in of_kernel:
                    note(needed.setdefault(name, nothing()), launch)
        _cuda_on_ptx.set_explain(False)
        texts = [text for text in self.texts if f".target {self.arch}" in text]
        found = [
            Kernel(name, text, first, last, reached.get(name, []), needed.get(name, nothing()))
            for text in texts for name, first, last in entries(text)
        ]  # fmt: skip
        return [kernel for kernel in found if "primitive_check" not in kernel.name]

    def install(self, kernel: Kernel | None, text: str = "") -> None:
        if kernel is None:
            _cuda_on_ptx.set_edit(lambda text: text)
        else:
            _cuda_on_ptx.set_edit(lambda old: text if old == kernel.text else old)

    def leave_unfilled(self, kernel: Kernel, place: int | None) -> None:
        _cuda_on_ptx.leave_unfilled(kernel.name, 0 if place is None else place + 1)


class Triton:
    """16 bits and tf32, in the tiles of the architecture: loops of several steps in one chunk of rows, full tiles and
    others, for a device that the rows fill and for one that they do not.
    A tile that an owner does not fill has rows in each 16 of 64, the step of a product: a step with none is all zeros,
    and no fault in it shows.

    Where Triton's pipeline has a race (conformance/targets.py), no kernel is sound, and no such tiles are taken.
    """

    shapes = (((64, 256, 256), 0), ((330, 528, 272), 0), ((75, 137, 200), 77))
    by_owner = (((64, 0, 100), (264, 272), 0), ((55, 35), (137, 200), 77))
    types = (
        ("bf16", torch.bfloat16, 16), ("f16", torch.float16, 64), ("bf16", torch.bfloat16, 128),
        ("tf32", torch.float32, 32),
    )  # fmt: skip

    def __init__(self, arch: str):
        self.arch = arch

    def __enter__(self):
        from ptx_triton_driver import simulated

        self.simulation = simulated(self.arch)
        self.machine = self.simulation.__enter__()
        return self

    def __exit__(self, *exception):
        self.simulation.__exit__(*exception)

    def _in_tiles(
        self, run: Callable[[], Results], on_tensor_cores: bool, rank: int, itemsize: int, multiprocessors: int
    ):
        from afa_kernels.backend.triton import configs, tuning

        tiles = replace(configs.table_tiles(self.arch, itemsize, rank), chunks=1)
        device = replace(configs.device_of(torch.device("cpu")), multiprocessors=multiprocessors)

        def in_tiles() -> Results:
            with (
                mock.patch.object(tuning, "tiles", lambda *_: tiles),
                mock.patch.object(configs, "device_of", lambda _: device),
                tf32(on_tensor_cores),
            ):
                return run()

        return in_tiles

    def kernels(self) -> list[Kernel]:
        self.machine.explain = True
        found: dict[str, Kernel] = {}
        uses = [(call, *shape) for shape in self.shapes] + [(call_by_owner, *shape) for shape in self.by_owner]
        uses += [(call_with_weights, *shape) for shape in self.by_owner]
        for name, dtype, rank in self.types:
            for make, *shape, dropout in uses:
                for multiprocessors in (1, 108):
                    padded = dropout > 0
                    run = make(
                        "triton", *shape, rank - 3 if padded else rank, dtype, torch.float32 if padded else dtype,
                        dropout,
                    )  # fmt: skip
                    one = self._in_tiles(run, name == "tf32", rank, dtype.itemsize, multiprocessors)
                    self.machine.launched.clear()
                    one()
                    for kernel_name, launch in self.machine.launched:
                        text = launch["text"]
                        if text not in found:
                            ((_, first, last),) = entries(text)
                            owners = " by owner" if "ends_ptr" in launch["traffic"] else ""
                            found[text] = Kernel(kernel_name + owners, text, first, last)
                        kernel = found[text]
                        if one not in kernel.calls and len(kernel.calls) < 2:
                            kernel.calls.append(one)
                            note(kernel.needed, launch)
        self.machine.explain = False
        return list(found.values())

    def install(self, kernel: Kernel | None, text: str = "") -> None:
        if kernel is None:
            self.machine.edit = None
        else:
            self.machine.edit = lambda name, old: text if old == kernel.text else old

    def leave_unfilled(self, kernel: Kernel, place: int | None) -> None:
        self.machine.unfilled = (kernel.text, 0 if place is None else place + 1)


def entries(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield each kernel's name and the range of its lines."""
    start, name = None, ""
    for number, line in enumerate(text.splitlines()):
        found = re.search(r"\.entry (\w+)", line)
        if found:
            name, start = found[1], number
        if line.startswith("}") and start is not None:
            yield name, start, number
            start = None


def compiler(target: str) -> Nvcc | Triton:
    name, _, arch = target.partition("-")
    return {"nvcc": Nvcc, "triton": Triton}[name](arch)
