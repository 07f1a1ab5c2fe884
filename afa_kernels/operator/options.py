"""What a caller chooses for a call beside its tensors: checked once, then carried whole to the backend."""

from typing import NamedTuple

from afa_kernels.operator.activation import IDENTITY
from afa_kernels.operator.dropout import inverse_keep


class Spec(NamedTuple):
    """What the arithmetic of a call depends on beside its tensors."""

    activation: str
    scaling: float
    dropout: int = 0  # dropped values out of 256

    @property
    def inverse_keep(self) -> float:
        return inverse_keep(self.dropout)


class Options(NamedTuple):
    """The options of a call, made by :func:`afa_kernels.operator.checks.options`.

    ``backend`` is the name that the caller gave or None; from the choice of a backend on
    (:func:`afa_kernels.operator.ops.resolved`) the name of the one that runs forward and backward.
    """

    spec: Spec
    save_z: bool
    backend: str | None


# New tuples, not _replace: torch.compile traces these functions, and torch 2.6 cannot trace _replace.


def at_identity(options: Options) -> Options:
    """Return the options of the same call at ``alpha_t = 0``: no activation. z is saved as before: making it again
    costs more than the activation did."""
    spec = options.spec
    return Options(Spec(IDENTITY, spec.scaling, spec.dropout), options.save_z, options.backend)


def without_dropout(options: Options) -> Options:
    """Return the options of the same call in evaluation."""
    spec = options.spec
    return Options(Spec(spec.activation, spec.scaling, 0), options.save_z, options.backend)
