"""The steps of gpu_check that are right or wrong: numerics, graphs, streams, sanitizers."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import afa_kernels as afa
from afa_kernels.backend import choice

ROOT = Path(__file__).resolve().parents[1]
_SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SANITIZER_ERROR = 86


@dataclass
class Outcome:
    status: str  # ok, failed or absent
    message: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    records: list[str] = field(default_factory=list)  # kept in the file, not printed
    page: str = ""  # Markdown, kept in a file of its own

    @staticmethod
    def ok(message: str, rows: list[dict[str, Any]] | None = None) -> "Outcome":
        return Outcome("ok", message, rows or [])

    @staticmethod
    def failed(message: str, rows: list[dict[str, Any]] | None = None) -> "Outcome":
        return Outcome("failed", message, rows or [])

    @staticmethod
    def absent(reason: str) -> "Outcome":
        return Outcome("absent", reason)


@dataclass(frozen=True)
class Context:
    """Where the steps run: on the GPU, or in rehearsal on the CPU."""

    device: str
    backends: tuple[str, ...]
    small: bool  # shapes that a CPU or a simulated device can take

    @staticmethod
    def on_gpu() -> "Context":
        return Context("cuda", ("cuda", "triton"), small=False)

    @staticmethod
    def rehearsal(backend: str) -> "Context":
        return Context("cpu", (backend,), small=True)

    @property
    def native(self):
        """The module with the compiled kernels of the ``cuda`` backend, or of the one in its place."""
        return choice.get(self.backends[0])._module


class Step(NamedTuple):
    name: str
    what: str
    run: Callable[[Context], Outcome]


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
    def random(shape: tuple[int, ...], device: str, dtype=torch.bfloat16, seed: int = 0) -> "Layer":
        m, k, n, r = shape
        generator = torch.Generator().manual_seed(seed)

        def draw(*size, scale=1.0):
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        return Layer(
            x=draw(m, k),
            weight=draw(n, k, scale=k**-0.5),
            a=draw(r, k, scale=k**-0.5),
            b=draw(n, r, scale=r**-0.5),
            dy=draw(m, n),
            alpha_t=torch.tensor(0.3, device=device),
            seed=torch.tensor(11, device=device),
        )

    def step(self, backend: str, dropout_p: float = 0.1) -> tuple[Tensor, ...]:
        """Return y, dx, dA and dB."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.a, self.b)]
        x, a, b = leaves
        options = {"scaling": 1.5, "dropout_p": dropout_p, "dropout_seed": self.seed}
        y = afa.afa_linear(x, self.weight, None, a, b, self.alpha_t, backend=backend, **options)
        return (y.detach(), *torch.autograd.grad(y, leaves, self.dy))

    def to(self, device: str) -> "Layer":
        return Layer(**{name: value.to(device) for name, value in vars(self).items()})


def worst_difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference (norms) of corresponding tensors."""
    return max(
        ((g.double().cpu() - e.double().cpu()).norm() / e.double().cpu().norm()).item()
        for g, e in zip(got, expected, strict=True)
    )


def equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def shapes(context: Context) -> list[tuple[int, int, int, int]]:
    if context.small:
        return [(40, 72, 136, 16), (33, 136, 72, 64)]
    return [(1000, 1024, 2048, r) for r in (8, 16, 32, 64)] + [(8192, 1024, 1024, 16)]


def check_backends(context: Context) -> Outcome:
    status = afa.backends()
    rows = [{"backend": name, "available": bool(s), "reason": s.reason} for name, s in status.items()]
    missing = [name for name in context.backends if not status[name].available]
    if missing:
        reasons = "; ".join(f"{name}: {status[name].reason}" for name in missing)
        return Outcome.failed(reasons, rows)
    return Outcome.ok(f"{', '.join(context.backends)} available", rows)


def check_kernels(context: Context) -> Outcome:
    """Compare every backend with torch and with itself."""
    rows = []
    for shape in shapes(context):
        layer = Layer.random(shape, context.device)
        expected = layer.step("torch")
        for backend in context.backends:
            first = layer.step(backend)
            rows.append(
                {
                    "shape": shape,
                    "backend": backend,
                    "difference": float(f"{worst_difference(first, expected):.2e}"),
                    "same bits twice": equal(first, layer.step(backend)),
                }
            )
    wrong = [row for row in rows if row["difference"] > 2e-2 or not row["same bits twice"]]
    message = f"{len(rows) - len(wrong)} of {len(rows)} agree and repeat"
    return Outcome.failed(message, wrong) if wrong else Outcome.ok(message, rows)


def check_tests(context: Context) -> Outcome:
    """Run the tests with the backends of the device required, so that none of them is skipped."""
    names = ",".join(context.backends)
    select = f"{names} and test_shapes and bf16" if context.small else "cuda or triton"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "python_tests", "-k", select]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"AFA_KERNELS_REQUIRE": names, "PYTHONPATH": str(ROOT)},
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    rows = [{"line": line} for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return (Outcome.failed if done.returncode else Outcome.ok)(lines[-1], rows)


def check_graphs(context: Context) -> Outcome:
    """Capture a step; a replay must follow alpha_t and the seed as they change in place."""
    if context.device != "cuda":
        return Outcome.absent("CUDA graphs need a CUDA device")
    for backend in context.backends:
        layer = Layer.random((512, 1024, 1024, 16), "cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                layer.step(backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.step(backend)
        for value, seed in ((0.9, 5), (0.0, 6), (0.5, 5)):
            layer.alpha_t.fill_(value)
            layer.seed.fill_(seed)
            graph.replay()
            if not equal(captured, layer.step(backend)):
                return Outcome.failed(f"{backend}: a replay with alpha_t={value} differs from the call")
    return Outcome.ok("replays follow alpha_t and the dropout seed")


def check_streams(context: Context) -> Outcome:
    """Run steps on several streams at once; each must give what it gives alone."""
    if context.device != "cuda":
        return Outcome.absent("streams need a CUDA device")
    for backend in context.backends:
        layers = [Layer.random((2048, 1024, 1024, 16), "cuda", seed=i) for i in range(4)]
        alone = [layer.step(backend) for layer in layers]
        streams = [torch.cuda.Stream() for _ in layers]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        results = []
        for _ in range(5):
            results = []
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer.step(backend))
        torch.cuda.synchronize()
        if not all(equal(a, b) for a, b in zip(results, alone, strict=True)):
            return Outcome.failed(f"{backend}: a stream changed the result of another")
    return Outcome.ok("4 streams at once give what each gives alone")


def check_devices(context: Context) -> Outcome:
    """Run on the last device while another one is current."""
    if context.device != "cuda" or torch.cuda.device_count() < 2:
        return Outcome.absent("needs two CUDA devices")
    other = f"cuda:{torch.cuda.device_count() - 1}"
    for backend in context.backends:
        layer = Layer.random((300, 512, 512, 16), "cuda:0")
        if worst_difference(layer.to(other).step(backend), layer.step(backend)) > 1e-2:
            return Outcome.failed(f"{backend}: another result on {other}")
    return Outcome.ok(f"{other} while cuda:0 is current")


_ONCE = """
import torch
from tools.gpu_steps import Layer
for shape in ((70, 136, 264, 16), (70, 712, 264, 20), (100, 136, 136, 64)):
    Layer.random(shape, "cuda").step("cuda")
torch.cuda.synchronize()
"""


def check_sanitizer(context: Context) -> Outcome:
    """Run each kernel once under compute-sanitizer's tools."""
    tool = shutil.which("compute-sanitizer")
    if context.device != "cuda":
        return Outcome.absent("compute-sanitizer needs a CUDA device")
    if tool is None:
        return Outcome.absent("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    rows = []
    for name in _SANITIZER_TOOLS:
        with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
            script.write(_ONCE)
            script.flush()
            done = subprocess.run(
                [tool, "--tool", name, "--error-exitcode", str(_SANITIZER_ERROR), sys.executable, script.name],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        rows.append({"tool": name, "status": done.returncode, "last line": lines[-1]})
    wrong = [row for row in rows if row["status"]]
    return (Outcome.failed if wrong else Outcome.ok)(f"{len(rows) - len(wrong)} of {len(rows)} tools content", rows)


STEPS = (
    Step("backends", "cuda and triton are available on this machine", check_backends),
    Step("kernels", "every kernel against torch, twice for the same bits", check_kernels),
    Step("tests", "all numeric tests on the real cuda and triton backends, none skipped", check_tests),
    Step("graphs", "CUDA-graph capture: replays follow alpha_t and the dropout seed", check_graphs),
    Step("streams", "several streams at once", check_streams),
    Step("devices", "a device that is not the current one", check_devices),
    Step("sanitizer", "compute-sanitizer: memcheck, racecheck, synccheck, initcheck", check_sanitizer),
)
