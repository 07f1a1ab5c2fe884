"""What a merge keeps: a weight rounds the sum that it is given, and of ``scaling * B @ A`` a part gets lost."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

LEAST_KEPT = 0.9  # a merge that keeps less warns
_told_together: ContextVar[bool] = ContextVar("_told_together", default=False)
_of_unloaded: WeakKeyDictionary[nn.Module, "MergeReport"] = WeakKeyDictionary()


class Kept(NamedTuple):
    """``<change of the weight, wanted>`` and ``<wanted, wanted>``, where ``wanted = scaling * B @ A``."""

    got: float = 0.0
    wanted: float = 0.0

    @classmethod
    def of_all(cls, each: Iterable["Kept"]) -> "Kept":
        return cls(*map(sum, zip(*each, strict=True)))

    @property
    def fraction(self) -> float:
        return self.got / self.wanted if self.wanted else 1.0


@dataclass(frozen=True)
class MergeReport:
    """How much of ``scaling * B @ A`` is in the weights of a merged model: 1 is all of it, 0 nothing.

    It is the projection ``<change of W, scaling * B @ A> / <scaling * B @ A, scaling * B @ A>``. What the rounding adds
    beside that direction is not in it, so it may exceed 1 a little.

    Attributes:
        layers: the fraction of each layer, by its name.
        total: the same for all layers together: both products are summed before they are divided.
    """

    layers: dict[str, float]
    total: float

    def __str__(self) -> str:
        own = "".join(f"\n  {fraction:7.3f}  {name}" for name, fraction in self.layers.items())
        return f"{self.total:.3f} of scaling * B @ A is in the merged weights{own}"

    def warn(self) -> None:
        """Warn of layers that kept less than 0.9, if there are any."""
        lossy = {name: fraction for name, fraction in self.layers.items() if not fraction >= LEAST_KEPT}
        if lossy:
            lowest = min(lossy, key=lossy.get)
            named = lowest or "the layer"
            warnings.warn(
                f"merge: {len(lossy)} of {len(self.layers)} merged layers keep less than {LEAST_KEPT} of "
                f"scaling * B @ A, which their weights round away; {named} keeps {lossy[lowest]:.2f}, all layers "
                f"together {self.total:.2f}. Unmerge, and merge with dequantize=True, which makes quantized layers "
                "dense; or keep the adapter unmerged; or save it and merge it into the model in full precision (where "
                "layers are dense, in a wider dtype)",
                stacklevel=5,
            )


@torch.no_grad()
def kept(before: Tensor, after: Tensor, lora_a: Tensor, lora_b: Tensor, factor: float = 1.0) -> Kept:
    """Return how much of ``factor * lora_b @ lora_a`` is in ``after - before``; of experts, with one dimension more,
    summed over them.

    ``<D, B @ A>`` is ``<B.T @ D, A>``, so no matrix of the size of the weight is made.
    """
    if before.is_meta:
        return Kept()
    if before.dim() == 3:
        return Kept.of_all(kept(*each, factor) for each in zip(before, after, lora_a, lora_b, strict=True))
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype, lora_a.dtype) else torch.float32
    with torch.autocast(before.device.type, enabled=False):
        a, b = lora_a.to(wide), lora_b.to(wide)
        # In blocks of rows, which fit into caches; of a sharded weight all rows at once.
        rows = len(before) if hasattr(before, "device_mesh") else max(1, 2**17 // max(1, before.shape[1]))
        blocks = zip(b.split(rows), before.split(rows), after.split(rows), strict=True)
        got = (sum(own.T @ torch.sub(new.to(wide), old) for own, old, new in blocks) * a).sum()
        wanted = ((b.T @ b) * (a @ a.T)).sum()
    return Kept(factor * float(got), factor**2 * float(wanted))


def tell(layer: nn.Module) -> None:
    """Warn of a layer that was merged and kept too little, unless :func:`told_together` warns of all."""
    if not _told_together.get() and layer.kept is not None:
        _report({type(layer).__name__: layer}).warn()


@contextmanager
def told_together(layers: Iterable[tuple[str, nn.Module]], model: nn.Module | None = None) -> Iterator[None]:
    """Warn once, at the end, of all layers that are merged in the meantime, each with its name; and remember the report
    of ``model``, which may have no layers any more by then."""
    if _told_together.get():
        yield
        return
    named = dict(layers)
    before = {name: layer.kept for name, layer in named.items()}
    token = _told_together.set(True)
    try:
        yield
    finally:
        _told_together.reset(token)
    report = _report(named)
    if model is not None:
        _of_unloaded[model] = report
    if report is not None and any(layer.kept is not before[name] for name, layer in named.items()):
        report.warn()


def report_of(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> MergeReport | None:
    """Return the report of these layers of a model or, where it has none, of those that were taken out of it."""
    named = dict(layers)
    return _report(named) if named else _of_unloaded.get(model)


def _report(layers: dict[str, nn.Module]) -> MergeReport | None:
    own = {name: layer.kept for name, layer in layers.items() if layer.kept is not None}
    total = Kept.of_all(own.values()).fraction if own else 1.0
    return MergeReport({name: each.fraction for name, each in own.items()}, total) if own else None
