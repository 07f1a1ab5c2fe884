"""Problems, the plain PyTorch they are compared with, and the one measure of accuracy."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afa_kernels.operator import dropout
from afa_kernels.operator.activation import ACTIVATIONS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
INPUTS = ("x", "weight", "bias", "lora_a", "lora_b", "base")


@dataclass
class Problem:
    """One random call with its incoming gradient. A and B are never 0: with B = 0 any kernel is
    right."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    base: Tensor
    dy: Tensor

    @staticmethod
    def random(m, k, n, r, dtype=torch.float32, device="cpu", *, adapter_dtype=None) -> "Problem":
        def draw(*shape, scale=1.0, to=dtype):
            return (torch.randn(*shape, dtype=torch.float64) * scale).to(device=device, dtype=to)

        adapter_dtype = adapter_dtype or dtype
        return Problem(
            x=draw(m, k),
            weight=draw(n, k, scale=k**-0.5),
            bias=draw(n),
            lora_a=draw(r, k, scale=k**-0.5, to=adapter_dtype),
            lora_b=draw(n, r, scale=r**-0.5, to=adapter_dtype),
            base=draw(m, n),
            dy=draw(m, n),
        )

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return fresh leaves that require grad: the inputs as they are, or all in ``dtype``."""
        return {
            name: getattr(self, name).detach().clone().to(dtype or getattr(self, name).dtype).requires_grad_()
            for name in INPUTS
        }


def eager(
    x,
    lora_a,
    lora_b,
    alpha_t,
    *,
    activation="silu",
    scaling=1.0,
    base=None,
    weight=None,
    bias=None,
    mask=None,
    p=0.0,
):
    """The operator as a user would write it in torch ops, everything in the dtype of x; ``mask`` is
    a keep mask.

    torch gets packed operands and gradients, since its 16-bit products may read what lies between rows
    (:func:`products_that_read_past_rows`)."""
    x, a, b = packed(x), packed(lora_a.to(x.dtype)), packed(lora_b.to(x.dtype))
    x_branch = x if mask is None else x * mask / (1 - p)
    z = torch.nn.functional.linear(x_branch, a)
    h = (1 - alpha_t) * z + alpha_t * ACTIVATIONS[activation].value(z)
    branch = torch.nn.functional.linear(h, b) * scaling
    if weight is not None:
        base = torch.nn.functional.linear(x, packed(weight), bias)
    y = branch if base is None else base + branch
    if y.requires_grad:
        y.register_hook(packed)
    return y


def packed(t: Tensor) -> Tensor:
    """Return a copy that is contiguous: a single row of a wider matrix counts as contiguous where it lies."""
    return t.clone(memory_format=torch.contiguous_format)


def mask_and_p(p: float, seed: int, x: Tensor) -> dict:
    """Return the keep mask and the rounded probability for :func:`eager`."""
    if p == 0.0:
        return {}
    threshold = dropout.threshold_of(p)
    rows = x.numel() // x.shape[-1]
    seed_tensor = torch.tensor(seed, dtype=torch.int64, device=x.device)
    return {
        "mask": dropout.keep_mask(seed_tensor, rows, x.shape[-1], threshold).view(x.shape),
        "p": threshold / 256,
    }


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Return ``‖got - truth‖ / ‖truth‖``."""
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300)).item()


def allowed_error(same_dtype: Tensor, truth: Tensor, rounding: torch.dtype) -> float:
    """Return twice torch's error and one rounding: half a unit in the last place, on average; a whole one of few
    elements."""
    few = truth.count_nonzero() < 256
    return 2 * relative_error(same_dtype, truth) + torch.finfo(rounding).eps / (1 if few else 2)


def assert_as_accurate_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor, what: str, rounding: torch.dtype):
    """Fail unless ``got`` is at most twice as far from the float64 ``truth`` as plain torch, plus
    one rounding."""
    assert got.shape == truth.shape, (what, got.shape, truth.shape)
    assert got.dtype == same_dtype.dtype, (what, got.dtype, same_dtype.dtype)
    assert torch.isfinite(got).all(), f"{what}: not finite"
    allowed = allowed_error(same_dtype, truth, rounding)
    error = relative_error(got, truth)
    assert math.isfinite(allowed) and error <= allowed, f"{what}: relative error {error:.3e}, allowed {allowed:.3e}"


def run(
    function, problem: Problem, names: tuple[str, ...], dtype=None, *, needed: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Call ``function(**leaves)``, run its backward on ``dy`` and return the output and every
    gradient by name; with ``needed``, only those leaves require one."""
    leaves = problem.leaves(dtype)
    needed = names if needed is None else needed
    y = function(**{name: leaves[name].requires_grad_(name in needed) for name in names})
    y.backward(problem.dy.to(y.dtype).view(y.shape))
    return {"y": y.detach()} | {f"d{name}": leaves[name].grad for name in needed}


def assert_matches(
    function, plain, problem: Problem, names: tuple[str, ...], *, reorder: bool = True,
    needed: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Compare output and gradients of ``function`` with ``plain`` in the same dtype and in float64.

    ``reorder`` is not for a ``plain`` that holds tensors of its own, such as a mask. Returns what ``function`` gave.
    """
    got = run(function, problem, names, needed=needed)
    truth = run(plain, problem, names, torch.float64, needed=needed)

    def in_order(order):
        return run(_in_order(plain, *order), problem, names, needed=needed)

    assert_accurate(got, truth, in_order, problem.x.dtype, orders=ORDERS if reorder else ORDERS[:1])
    return got


def _order(reverse: bool, eighths: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return how an operand is turned in every dimension, and the way back."""

    def rolled(t: Tensor, sign: int) -> Tensor:
        return t.roll([sign * (size * eighths // 8) for size in t.shape], tuple(range(t.dim())))

    def reversed_(t: Tensor) -> Tensor:
        return t.flip(tuple(range(t.dim()))) if reverse else t

    return lambda t: rolled(reversed_(t), 1), lambda t: reversed_(rolled(t, -1))


# For sums of 203 products that nearly cancel, torch without vector instructions is off by 3.8e-7, 2.9e-7, 5.8e-7 and
# 1.3e-6 in the first four. Each is tried only if those before it do not do, as in results of a few such sums alone.
ORDERS = tuple(_order(reverse, eighths) for eighths in (0, 4, 1, 2, 3, 5, 6, 7) for reverse in (False, True))


def assert_accurate(
    got: dict[str, Tensor], truth: dict[str, Tensor], in_order: Callable, dtype: torch.dtype, context: str = "",
    *, orders=ORDERS,
) -> None:  # fmt: skip
    """Fail unless each result is at most twice as far from float64 as torch, plus one rounding to ``dtype``; and no
    element is wrong: the worst is off by at most four times as much as torch's worst, plus four roundings of the
    largest, since the largest of many errors scatters more than their norm.

    Where terms cancel, torch's error depends on its order of summation, which differs between machines: the yardstick
    is the largest error of several orders. ``in_order`` returns torch's results in one of them.
    """
    seen = []
    for what, value in got.items():
        exact = truth[what]
        for number, order in enumerate(orders):
            if number == len(seen):
                seen.append(in_order(order))
            same = [one[what] for one in seen]
            worst = max(same, key=lambda t: relative_error(t, exact))
            peak = max(_largest_error(t, exact) for t in same)
            allowed_peak = 4 * (peak + torch.finfo(dtype).eps * exact.abs().max().item()) if exact.numel() else 0.0
            if relative_error(value, exact) <= allowed_error(worst, exact, dtype):
                if _largest_error(value, exact) <= allowed_peak:
                    break
        assert_as_accurate_as_torch(value, worst, exact, f"{context} {what}", dtype)
        error = _largest_error(value, exact)
        assert error <= allowed_peak, f"{context} {what}: an element is off by {error:.3e}, allowed {allowed_peak:.3e}"


def _largest_error(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth.double()).abs().max().item() if got.numel() else 0.0


def _in_order(plain, there, back):
    return lambda **tensors: back(plain(**{name: there(t) for name, t in tensors.items()}))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised torch allocation with NaN, so that an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def products_that_read_past_rows() -> Iterator[None]:
    """Let torch's 16-bit products on the CPU read up to 64 elements past the end of a row.

    This is a fault of oneDNN, and so of torch up to 2.15, on a processor with AMX: with ``x = buffer[:, :200]`` of 17
    or more rows, a NaN in ``buffer[:, 200:]`` makes ``x @ w.T`` NaN; and where ``x`` is packed, a NaN or an infinity at
    the head of a row makes the row before it NaN (https://github.com/uxlfoundation/oneDNN/issues/5717). Here every such
    product has it, at all sizes and on any processor.
    """
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    def spoiled(y: Tensor, *operands: Tensor) -> Tensor:
        return y.fill_(math.nan) if any(map(_no_number_lies_behind_a_row, operands)) else y

    def product(out: Callable, left: Tensor, right: Tensor) -> Tensor:
        return spoiled(out(left, right, out=left.new_empty(*left.shape[:-1], right.shape[-1])), left, right)

    def addmm(c: Tensor, left: Tensor, right: Tensor, *, beta=1, alpha=1, out: Tensor | None = None) -> Tensor:
        out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        return spoiled(aten.addmm.out(c, left, right, beta=beta, alpha=alpha, out=out), left, right)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its own kernels are replaced
        library.impl("mm", lambda *operands: product(aten.mm.out, *operands), "CPU")
        library.impl("bmm", lambda *operands: product(aten.bmm.out, *operands), "CPU")
        library.impl("addmm", addmm, "CPU")
        library.impl("addmm_", lambda c, *operands, **factors: addmm(c, *operands, **factors, out=c), "CPU")
    try:
        yield
    finally:
        library._destroy()


def _no_number_lies_behind_a_row(t: Tensor) -> bool:
    """Whether a NaN or an infinity follows a row of the 16-bit ``t``: between this and the next row, or in the next."""
    t = t if t.stride(-1) == 1 else t.mT
    if t.itemsize != 2 or t.stride(-1) != 1 or t.stride(-2) < t.shape[-1] or t.numel() == 0:
        return False
    if t.stride(-2) == t.shape[-1]:
        return not t[..., 1:, :64].isfinite().all()
    elements = t.untyped_storage().nbytes() // t.itemsize
    last = t.storage_offset() + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    beyond = min(64, t.stride(-2) - t.shape[-1], elements - 1 - last)
    longer = t.as_strided((*t.shape[:-1], t.shape[-1] + beyond), t.stride())
    return not longer[..., t.shape[-1] :].isfinite().all()


def torch_reads_past_rows() -> bool:
    """Whether a 16-bit product of this torch on this processor is NaN where only what lies behind its rows is."""
    buffer = torch.ones(32, 256, dtype=torch.bfloat16)
    buffer[:, 200:] = math.nan
    return bool((buffer[:, :200] @ torch.ones(200, 8, dtype=torch.bfloat16)).isnan().any())


def run_python(script: str, **environment: str) -> None:
    """Run ``script`` in a process of its own that finds this package and the tests' modules; fail if it fails."""
    here = Path(__file__).parent
    path = os.pathsep.join((str(here), str(here / "ptx_machine"), str(here.parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_on_isa(isa: str, script: str) -> None:
    """Run ``script`` in a process of its own whose CPU is believed to have ``isa`` at best; fail if it fails."""
    check = f"from afa_kernels.backend import compiled\nassert compiled._C.cpu_isa() == {isa!r}\n"
    run_python(check + script, AFA_CPU_ISA=isa)


def altered(backend, **changes):
    """Return a backend like ``backend`` but for some attributes and methods; these take no ``self``."""
    other = copy.copy(backend)
    vars(other).update(changes)
    return other
