"""``python -m tools.gpu_right STEP``: the steps of gpu_check that are right or wrong. Each is a process of its own.

A step yields rows for its table. A row with a "fault" makes it fail.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.graphs import beside, in_graph, wait
from tools.gpu_check import CARD, RESULTS, ROOT, Absent, Steps, run_step

_WORKERS = 12
_PACKAGES = ("torch", "triton", "pybind11", "ninja", "cmake", "pytest", "pytest-xdist", "numpy", "safetensors", "peft",
             "transformers")  # fmt: skip
_PROGRAMS = ("nvcc", "ncu", "compute-sanitizer")
_SANITIZER_ERROR = 86
# By a part of their names: those of libraries would take most of a tool's time.
_KERNELS = {"cuda": ("3afa",), "triton": ("project_kernel", "phi", "dyb", "_pass", "grouped_gemm", "reduce")}


class Card(NamedTuple):
    """What the steps run on. A stand-in for a card (``CARD`` names its module) has other backends, and small calls."""

    device: str = "cuda"
    cuda: str = "cuda"
    triton: str = "triton"
    architecture: str = ""  # for CMake; empty: that of the card
    small: bool = False
    dtype: torch.dtype = torch.bfloat16
    in_threads: tuple[str, ...] = ("cuda", "triton")  # backends that several threads may call at once
    # Of pytest, by backend: what selects the tests, and variables.
    selects: dict[str, str] = {"cuda": "cuda and not nvcc", "triton": "triton", "tests": "cuda or triton"}
    variables: dict[str, dict[str, str]] = {}

    @property
    def backends(self) -> tuple[str, str]:
        return self.cuda, self.triton


def card() -> Card:
    """Return this machine's card, or the one in its place."""
    if name := os.environ.get(CARD):
        return importlib.import_module(name).CARD
    return Card()


# --- The machine


def machine(card: Card) -> Iterator[dict]:
    if card.device == "cuda":
        if not torch.cuda.is_available():
            raise Absent(f"torch {torch.__version__} sees no GPU")
        properties = torch.cuda.get_device_properties(0)
        yield {"what": "card", "found": f"{properties.name}, {properties.multi_processor_count} multiprocessors"}
        yield {"what": "driver", "found": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")}
    yield {"what": "machine", "found": f"Python {platform.python_version()}, {os.cpu_count()} processors"}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield {"what": name, "found": metadata.version(name)}
            continue
        yield {"what": name, "found": "not installed"}
    for name in _PROGRAMS:
        yield {"what": name, "found": shutil.which(name) or "not on PATH"}


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def program(name: str) -> str:
    """Return the path of CMake or ninja: on PATH, beside this Python, or in the package that brings it."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    if found := shutil.which(name) or beside:
        return found
    if spec := importlib.util.find_spec(name):
        # Of PyPI's cmake, and of its ninja, which has it among the programs of the environment.
        folder = Path(spec.submodule_search_locations[0])
        if found := shutil.which(name, path=f"{folder / 'data/bin'}{os.pathsep}{folder.resolve().parents[3] / 'bin'}"):
            return found
    raise Absent(f"{name} is not installed")


def build(card: Card) -> Iterator[dict]:
    """Compile where the last call left off, if anything."""
    architecture = card.architecture
    if not architecture:
        architecture = "{}{}-real".format(*torch.cuda.get_device_capability())
    folder, cmake = ROOT / "build/gpu-check", program("cmake")
    commands = (
        [cmake, "-S", ".", "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
         f"-DPython_EXECUTABLE={sys.executable}", "-DAFA_BUILD_CUDA=1", "-DAFA_CUDA_VARIANTS=ON",
         f"-DAFA_CUDA_ARCHITECTURES={architecture}"],
        [cmake, "--build", str(folder)],
        [cmake, "--install", str(folder), "--prefix", "."],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode:
            yield {"command": " ".join(command[1:3]), "fault": f"exit status {done.returncode}"}
            return
    yield {"architecture": architecture, "status": "compiled"}


# --- Numbers


def self_test(card: Card) -> Iterator[dict]:
    """As of an installed package, on the processor and on the card."""
    done = subprocess.run(
        [sys.executable, "-m", "afa_kernels", "--self-test"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    said = done.stdout.partition("self-test, ")[2].splitlines()[1:]
    for line in said:
        yield {"said": line}
    tested = {(line.split()[0], line.split()[2].strip(":")) for line in said if " on " in line}
    missing = [name for name in card.backends if card.device == "cuda" and (name, "cuda") not in tested]
    if done.returncode or missing:
        yield {"fault": f"exit status {done.returncode}" if done.returncode else f"{missing[0]} was not tested"}


def promises(card: Card, backend: str) -> Iterator[dict]:
    return _pytest(card, backend, "python_tests/conformance")


def tests(card: Card) -> Iterator[dict]:
    return _pytest(
        card, "tests", "python_tests/operator", "python_tests/shared_input", "python_tests/adapters",
        "python_tests/gpu/test_triton_gpu.py",
    )  # fmt: skip


def _pytest(card: Card, what: str, *paths: str) -> Iterator[dict]:
    """Run tests; yield a row for each that fails as soon as it does, and one for all."""
    required = ",".join(card.backends if what == "tests" else (getattr(card, what),))
    selected = "not slow" if card.small else "not (simulated or slow)"
    command = [
        sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-n",
        str(min(_WORKERS, os.cpu_count() or 1)), "-m", selected, "-k", card.selects[what], *paths,
    ]  # fmt: skip
    variables = {"AFA_KERNELS_REQUIRE": required} | card.variables.get(what, {})
    failed, last = set(), ""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="")
            last = line.strip() or last
            found = re.search(r"\b(?:FAILED|ERROR)\b\s+(\S+::\S+)", line)
            if found and found[1] not in failed:
                failed.add(found[1])
                yield {"test": found[1], "fault": "failed"}
    row = {"test": f"all of {' '.join(paths)}", "result": last.strip("= ")}
    yield row | ({"fault": f"exit status {process.returncode}"} if process.returncode else {})


# --- Graphs, streams, tools


@dataclass
class Layer:
    """A frozen layer with its branch, and a step of training on fixed inputs."""

    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    dy: Tensor
    alpha_t: Tensor
    seed: Tensor

    @staticmethod
    def random(shape: tuple[int, ...], card: Card, seed: int = 0) -> "Layer":
        m, k, n, r = shape
        device = card.device
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(device, card.dtype)

        return Layer(
            draw(m, k), draw(n, k, scale=k**-0.5), draw(r, k, scale=k**-0.5), draw(n, r, scale=r**-0.5), draw(m, n),
            torch.tensor(0.3, device=device), torch.tensor(11, device=device),
        )  # fmt: skip

    def step(self, backend: str, dropout_p: float = 0.1) -> tuple[Tensor, ...]:
        """Return y, dx, dA and dB."""
        import afa_kernels as afa

        leaves = [t.detach().requires_grad_() for t in (self.x, self.a, self.b)]
        x, a, b = leaves
        options = {"scaling": 1.5, "dropout_p": dropout_p, "dropout_seed": self.seed}
        y = afa.afa_linear(x, self.weight, None, a, b, self.alpha_t, backend=backend, **options)
        return (y.detach(), *torch.autograd.grad(y, leaves, self.dy))


def _same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def _size(card: Card) -> tuple[int, int, int, int]:
    return (40, 72, 136, 16) if card.small else (512, 1024, 1024, 16)


def capture(card: Card, backend: str) -> Iterator[dict]:
    """The first call of this process with the backend is captured. torch's own product has run before."""
    layer = Layer.random(_size(card), card)
    layer.x @ layer.weight.T
    wait(card.device)
    results, replay = in_graph(lambda: layer.step(getattr(card, backend)), card.device)
    replay()
    wait(card.device)
    same = _same(results, layer.step(getattr(card, backend)))
    row = {"backend": backend, "first call": "captured"}
    yield row if same else row | {"fault": "the replay differs from a call"}


def graphs(card: Card) -> Iterator[dict]:
    for backend in card.backends:
        layer = Layer.random(_size(card), card)
        with beside(card.device):
            layer.step(backend)
        wait(card.device)
        captured, replay = in_graph(lambda layer=layer, backend=backend: layer.step(backend), card.device)
        for value, seed in ((0.9, 5), (0.0, 6), (0.5, 5)):
            layer.alpha_t.fill_(value)
            layer.seed.fill_(seed)
            replay()
            row = {"backend": backend, "alpha_t": value, "seed": seed}
            same = _same(captured, layer.step(backend))
            yield row if same else row | {"fault": f"{backend}: the replay differs from a call"}


def streams(card: Card) -> Iterator[dict]:
    shape = _size(card) if card.small else (2048, 1024, 1024, 16)
    for backend in card.backends:
        layers = [Layer.random(shape, card, seed) for seed in range(4)]
        alone = [layer.step(backend) for layer in layers]
        wait(card.device)
        for way in (_on_streams, _in_threads)[: 1 + (backend in card.in_threads)]:
            for _ in range(1 if card.small else 5):
                results = way(layers, backend, card.device)
            wait(card.device)
            row = {"backend": backend, "way": way.__name__.strip("_").replace("_", " "), "layers": len(layers)}
            same = all(map(_same, results, alone))
            yield row if same else row | {"fault": f"{backend}: a result differs from that of a call alone"}


def _on_streams(layers: list[Layer], backend: str, device: str) -> list[tuple[Tensor, ...]]:
    results = []
    for layer in layers:
        with beside(device):
            results.append(layer.step(backend))
    return results


def _in_threads(layers: list[Layer], backend: str, device: str) -> list[tuple[Tensor, ...]]:
    results: list[tuple[Tensor, ...]] = [()] * len(layers)  # what a thread leaves that raises

    def work(i: int) -> None:
        with beside(device):
            results[i] = layers[i].step(backend)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def small_calls(card: Card) -> Iterator[dict]:
    """What a sanitizer watches."""
    for backend in card.backends:
        for shape in ((70, 136, 264, 16), (70, 712, 264, 20), (100, 136, 136, 64))[: 1 if card.small else None]:
            Layer.random(shape, card).step(backend)
            wait(card.device)
            yield {"backend": backend, "M, K, N, r": shape}


def sanitizer(card: Card, tool: str) -> Iterator[dict]:
    path = shutil.which("compute-sanitizer")
    if path is None:
        raise Absent("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    parts = [f"kns={part}" for parts in _KERNELS.values() for part in parts]
    command = [path, "--tool", tool, "--error-exitcode", str(_SANITIZER_ERROR)]
    command += [option for part in parts for option in ("--kernel-name", part)]
    command += [sys.executable, "-m", "tools.gpu_right", "small-calls"]
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", RESULTS: ""}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    row = {"tool": tool, "said": said[-1].strip("= ") if said else "nothing"}
    errors = [line.strip("= ") for line in said if re.search(r"Invalid|Error:|hazard|Race reported", line)]
    yield row | ({"fault": (errors or [f"exit status {done.returncode}"])[0]} if done.returncode else {})


STEPS: Steps = {
    "machine": machine,
    "build": build,
    "self-test": self_test,
    "tests": tests,
    "graphs": graphs,
    "streams": streams,
    "small-calls": small_calls,
    **{f"promises-{name}": lambda card, name=name: promises(card, name) for name in ("cuda", "triton")},
    **{f"capture-{name}": lambda card, name=name: capture(card, name) for name in ("cuda", "triton")},
    **{name: lambda card, name=name: sanitizer(card, name) for name in ("memcheck", "racecheck")},
}

if __name__ == "__main__":
    raise SystemExit(run_step(STEPS, card))
