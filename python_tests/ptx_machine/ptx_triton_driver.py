"""Triton on a GPU that is not there: kernels compile for it as for a real one, and their PTX runs on the machine of
``python_tests/ptx_machine``, on CPU tensors.

Everything between ``kernel[grid](...)`` and the driver's launch is Triton's own: specialization, the kernel cache, the
compiler, the order of arguments.
"""

import contextlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from helpers import altered
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase, expand_signature

from afa_kernels import _ptx
from afa_kernels.backend import choice
from afa_kernels.backend.triton import backend, configs
from bench.model.gpus import CARDS

_SCALARS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I",
            "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip


class Loaded:
    """A compiled kernel on a device."""

    def __init__(self, machine: "Machine", name: str, text: str):
        self.machine, self.name, self.text = machine, name, text
        self._module, self._edit = None, None

    def module(self) -> _ptx.Module:
        """Return the kernel, assembled again where another edit holds than before."""
        edit = self.machine.edit
        if self._module is None or edit is not self._edit:
            self._module = _ptx.Module(self.text if edit is None else edit(self.name, self.text))
            self._edit = edit
        return self._module


@dataclass
class Machine:
    """What a simulated device does: the seed of its schedules, and what its launches have done so far."""

    arch: str
    seed: int = 0
    explain: bool = False  # whether launches find the synchronizations that they need
    # The line of a kernel's text whose copies fill up with other numbers than zeros.
    unfilled: tuple[str, int] = ("", 0)
    launched: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    # Changes the PTX of a kernel before it is assembled: (kernel's name, text) -> text.
    edit: Callable[[str, str], str] | None = None

    def counters(self) -> Counter:
        """Return the sum of all counters that are numbers."""
        total: Counter = Counter()
        for _, counters in self.launched:
            total.update({key: value for key, value in counters.items() if isinstance(value, int)})
        return total


def extent(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Launcher:
    """Packs the arguments of one compiled kernel and runs it."""

    def __init__(self, source: Any, metadata: Any):
        self.names = list(source.signature)
        self.types = [t for t in expand_signature(source.signature.values(), None, "nvTmaDesc")]
        self.metadata = metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.num_ctas != 1:
            raise NotImplementedError("scratch memory and clusters")

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        machine, name, module = function.machine, function.name, function.module()
        parameters = module.kernels()[name]["parameters"]
        every = zip(self.names, self.types, arguments, strict=True)
        values = [(n, t, v) for n, t, v in every if t != "constexpr"]
        values += [("global scratch", "*i8", None), ("profiling scratch", "*i8", None)]
        assert len(values) == len(parameters), (name, len(values), len(parameters))
        packed_bytes = bytearray(module.kernels()[name]["parameter_bytes"])
        allocations = []
        for (argument, kind, value), parameter in zip(values, parameters, strict=True):
            if kind.startswith("*"):
                data = struct.pack("Q", 0 if value is None else value.data_ptr())
                if value is not None and value.numel():
                    allocations.append((value.data_ptr(), extent(value), True, argument))
            else:
                data = struct.pack(_SCALARS[kind], value)
            assert len(data) == parameter["bytes"], (name, kind, parameter)
            packed_bytes[parameter["offset"] : parameter["offset"] + len(data)] = data
        machine.seed += 1
        counters = module.launch(
            name, (x, y, z), (32 * self.metadata.num_warps, 1, 1), bytes(packed_bytes), self.metadata.shared,
            allocations, machine.seed, machine.explain,
            machine.unfilled[1] if function.text == machine.unfilled[0] else 0,
        )  # fmt: skip
        machine.launched.append((name, counters | {"text": function.text}))


class _Utils:
    def __init__(self, machine: Machine):
        self.machine = machine

    def get_device_properties(self, device: str) -> dict[str, int]:
        card = CARDS[self.machine.arch]
        return {
            "max_shared_mem": card.shared_per_block,
            "multiprocessor_count": card.multiprocessors,
            "warpSize": 32,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: str):
        return None, Loaded(self.machine, name, cubin.decode()), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class PtxDriver(DriverBase):
    """The interface of triton.backends.driver for one simulated GPU."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.utils = _Utils(machine)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("this driver's launcher is not compiled from C")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.machine.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return f"{self.machine.arch} {id(self.machine)}"  # each machine has a kernel cache of its own

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("a simulated device has no time")


def _keep_ptx(*stage_arguments):
    """Put the PTX where Triton would put ptxas's output: the machine is what assembles it."""
    if not stage_arguments:
        return "ptx machine", "ptx machine"  # part of the keys of Triton's caches
    _, stages, *_ = stage_arguments
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


@contextlib.contextmanager
def simulated(arch: str, seed: int = 0) -> Iterator[Machine]:
    """Let the ``triton`` backend run on CPU tensors, as on a GPU of this architecture. The process must not have
    imported Triton as the interpreter."""
    if backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1: the kernels of this process are interpreted")
    machine = Machine(arch, seed)
    config = triton.runtime.driver
    before, hook = config.__dict__.copy(), triton.knobs.runtime.add_stages_inspection_hook
    record, device_of, device_type = choice.get("triton"), configs.device_of, backend._device_type
    config.set_active(PtxDriver(machine))
    triton.knobs.runtime.add_stages_inspection_hook = _keep_ptx
    configs.device_of = lambda device: configs.Device(arch, CARDS[arch].multiprocessors, f"simulated {arch}")
    backend._device_type = lambda: "cpu"
    choice.register(altered(record, devices=frozenset({"cpu"}), automatic=False))
    try:
        yield machine
    finally:
        choice.register(record)
        backend._device_type, configs.device_of = device_type, device_of
        triton.knobs.runtime.add_stages_inspection_hook = hook
        config.__dict__.update(before)
