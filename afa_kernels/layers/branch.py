"""Branch: A, B, alpha_t and the options of their calls, as a module beside a frozen weight."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels.alpha_t import Annealed
from afa_kernels.operator import checks
from afa_kernels.operator.options import Options, without_dropout


class AdapterCall(NamedTuple):
    """What an adapter computes with: the arguments of :func:`afa_kernels.operator.functional.lora` beside x."""

    lora_a: Tensor  # (r, K), or of all experts (E, r, K)
    lora_b: Tensor  # (N, r) or (E, N, r)
    alpha_t: Tensor | None  # None at identity
    options: Options


@dataclass(frozen=True)
class BranchOptions:
    """What a caller chooses for a branch, checked. :class:`afa_kernels.AFALinear` says what it means.

    Raises:
        TypeError, ValueError: a value does not fit; the message names it, what came and what is wanted.
    """

    r: int = 8
    lora_alpha: float = 16
    activation: str = "silu"
    dropout: float = 0.0
    use_rslora: bool = False
    dtype: torch.dtype | None = None
    backend: str | None = None

    def __post_init__(self):
        _check_number("r", self.r, Integral, "a positive int")
        if self.r < 1:
            raise ValueError(f"r: expected a rank of at least 1, got {self.r}")
        _check_number("lora_alpha", self.lora_alpha, Real, "a number")
        if not math.isfinite(self.lora_alpha):
            raise ValueError(f"lora_alpha: expected a finite number, got {self.lora_alpha}")
        _check_number("dropout", self.dropout, Real, "a float in [0, 1)")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.dtype is not None and self.dtype not in checks.FLOATING:
            raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {self.dtype}")
        checks.options(self.activation, 1.0, 0.0, self.backend)

    @property
    def scaling(self) -> float:
        return float(self.lora_alpha) / (math.sqrt(self.r) if self.use_rslora else self.r)


def _check_number(name: str, value: object, kind: type, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")


def _option(name: str) -> property:
    """Return an attribute of Branch that its calls depend on: setting it makes the branch's options anew."""
    # A property and no descriptor of our own: torch.compile of torch 2.6 sees through properties alone.
    return property(lambda branch: branch._chosen[name], lambda branch, value: branch._choose(**{name: value}))


class Branch(Annealed):
    """The trainable part beside a frozen weight, which it does not keep: the base of :class:`afa_kernels.AFALinear` and
    :class:`afa_kernels.AFAExpertLinear`, and each adapter of a stack.

    Args:
        weight: ``(N, K)``, or of all experts ``(E, N, K)``; A and B are then ``(E, r, K)`` and ``(E, N, r)``.
        transposed: whether the frozen layer keeps that weight as ``(K, N)``.
    """

    activation = _option("activation")
    scaling = _option("scaling")
    dropout = _option("dropout")
    backend = _option("backend")

    def __init__(self, weight: Tensor, options: BranchOptions, *, transposed: bool = False):
        super().__init__()
        *experts, self.out_features, self.in_features = weight.shape
        self.transposed = transposed
        self.r, self.lora_alpha, self.use_rslora = int(options.r), options.lora_alpha, bool(options.use_rslora)
        self._chosen = {}
        self._choose(
            activation=options.activation, scaling=options.scaling, dropout=float(options.dropout),
            backend=options.backend,
        )  # fmt: skip
        dtype = options.dtype
        if dtype is None:
            dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        kind = {"dtype": dtype, "device": weight.device}
        self.lora_a = nn.Parameter(torch.empty(*experts, self.r, self.in_features, **kind))
        self.lora_b = nn.Parameter(torch.empty(*experts, self.out_features, self.r, **kind))
        self.start_alpha_t(1.0, weight.device, persistent=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the branch as PEFT does: ``lora_a`` Kaiming-uniform with a = sqrt(5), that of all experts as one
        matrix, ``lora_b`` zero."""
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.lora_a.flatten(0, -2), a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def merged(self) -> bool:
        """Whether the branch is part of the base layer's weight."""
        return False

    @property
    def options(self) -> Options:
        """The options of a call of this branch: dropout acts in training only."""
        return self._options if self.training else self._options_in_evaluation

    def call(self) -> AdapterCall:
        """Return what a call of this branch takes beside x."""
        return AdapterCall(self.lora_a, self.lora_b, self.coefficient(), self.options)

    def _choose(self, **changes) -> None:
        chosen = {**self._chosen, **changes}
        self._options = checks.options(chosen["activation"], chosen["scaling"], chosen["dropout"], chosen["backend"])
        self._options_in_evaluation = without_dropout(self._options)
        self._chosen = chosen

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, activation={self.activation}, dropout={self.dropout:g}, "
            f"{'merged' if self.merged else f'alpha_t={self._alpha_t:g}'}"
        )
