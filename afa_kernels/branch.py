"""Branch: A, B, alpha_t and the options of their calls, as a module beside a frozen linear layer."""

import math
from numbers import Integral, Real

import torch
from torch import nn

from afa_kernels import checks
from afa_kernels.alpha import Annealed
from afa_kernels.base_layer import is_conv1d
from afa_kernels.options import Options, without_dropout


def _option(name: str) -> property:
    """Return an attribute of Branch that its calls depend on: setting it makes the branch's options anew."""
    # A property and no descriptor of our own: torch.compile of torch 2.6 sees through properties alone.
    return property(lambda branch: branch._chosen[name], lambda branch, value: branch._choose(**{name: value}))


class Branch(Annealed):
    """The trainable part beside ``base_layer``, which it does not keep: the base of :class:`afa_kernels.AFALinear`, and
    each adapter of an :class:`afa_kernels.AFALinearStack`. Arguments as in AFALinear."""

    activation = _option("activation")
    scaling = _option("scaling")
    dropout = _option("dropout")
    save = _option("save")
    backend = _option("backend")

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        activation: str = "silu",
        dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        dtype: torch.dtype | None = None,
        save: str = "z",
        backend: str | None = None,
    ):
        super().__init__()
        check_options(r, lora_alpha, activation, dropout, save, backend)
        weight = base_layer.weight
        if dtype is None:
            dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        if dtype not in checks.FLOATING:
            raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")

        self.transposed = is_conv1d(base_layer)
        self.out_features, self.in_features = reversed(weight.shape) if self.transposed else weight.shape
        self.r = int(r)
        self.lora_alpha = lora_alpha
        self.use_rslora = bool(use_rslora)
        self._chosen = {}
        scaling = float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
        self._choose(activation=activation, scaling=scaling, dropout=float(dropout), save=save, backend=backend)
        self.lora_a = nn.Parameter(torch.empty(self.r, self.in_features, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, self.r, dtype=dtype, device=weight.device))
        self.start_alpha_t(1.0, weight.device, persistent=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the branch as PEFT does: ``lora_a`` Kaiming-uniform with a = sqrt(5),
        ``lora_b`` zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    @property
    def merged(self) -> bool:
        """Whether the branch is part of the base layer's weight."""
        return False

    @property
    def options(self) -> Options:
        """The options of a call of this branch: dropout acts in training only."""
        return self._options if self.training else self._options_in_evaluation

    def _choose(self, **changes) -> None:
        chosen = {**self._chosen, **changes}
        self._options = checks.options(
            chosen["activation"], chosen["scaling"], chosen["dropout"], chosen["save"], chosen["backend"]
        )
        self._options_in_evaluation = without_dropout(self._options)
        self._chosen = chosen

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, activation={self.activation}, dropout={self.dropout:g}, "
            f"{'merged' if self.merged else f'alpha_t={self._alpha_t:g}'}"
        )


def check_options(r, lora_alpha, activation, dropout, save, backend) -> None:
    if isinstance(r, bool) or not isinstance(r, Integral):
        raise TypeError(f"r: expected a positive int, got {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r: expected a rank of at least 1, got {r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, Real):
        raise TypeError(f"lora_alpha: expected a number, got {type(lora_alpha).__name__}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha}")
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"dropout: expected a float in [0, 1), got {type(dropout).__name__}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    checks.options(activation, 1.0, 0.0, save, backend)
