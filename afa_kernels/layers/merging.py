"""Merging: a branch that becomes part of its frozen weight, and what a state dict says of it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from afa_kernels.alpha_t import Annealed, normal
from afa_kernels.layers.kept import Kept, kept, tell
from afa_kernels.layers.quantized import dense_dtype, dequantized
from afa_kernels.operator import checks

NOT_FINITE = "merge: the merged weight would not be finite; the weight is unchanged"
_MERGED_KEY = "merged"


class Mergeable(Annealed):
    """Base of the layers that can be merged: :class:`afa_kernels.AFALinear` and :class:`afa_kernels.AFAExpertLinear`.

    A subclass has ``weight``, ``scaling``, :meth:`_parts` and :meth:`_brings_weight`.
    """

    kept: Kept | None = None  # of the branch, in the weight, while it is merged
    _quantized: nn.Module | None = None  # the base layer, while a dense one with the sum is in its place

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("_original_weight", None, persistent=False)
        self._merged = False

    @property
    def merged(self) -> bool:
        """Whether the branch is part of the frozen weight."""
        return self._merged

    def set_alpha_t(self, value: float) -> None:
        """Set the blend coefficient, in [0, 1]. Values that float32 cannot hold as normal numbers
        become 0.

        Raises:
            TypeError, ValueError: ``value`` is no number in [0, 1], or is not 0 while the layer is
                merged.
        """
        value = normal(checks.alpha_value(value))
        if self._merged and value != 0.0:
            raise ValueError(f"alpha_t: a merged layer has no branch, got {value}; unmerge() first")
        self.write_alpha_t(value)

    def merge(self, *, keep_original: bool = False, dequantize: bool | torch.dtype = False) -> None:
        """Add ``scaling * lora_b @ lora_a``, of experts that of each, to the weight: afterwards the layer costs what
        the frozen one costs. Merging twice is once.

        The sum is computed in float32 (float64 for float64) and rounded once to the dtype of the
        weight.

        Args:
            keep_original: keep a copy of the weight (as much memory as the weight) for a bit-exact
                :meth:`unmerge`; otherwise unmerge subtracts, which costs no memory and leaves about
                one rounding of the weight's dtype.
            dequantize: put an ``nn.Linear`` with the dequantized weight and the sum into the place of a quantized base
                layer; a dtype: in that one. The quantized layer is kept, and :meth:`unmerge` puts it back as it was.
                Without effect where the weight is dense.

        Raises:
            ValueError: ``alpha_t`` is not 0, the base layer computes its weight, the weight is quantized and
                ``dequantize`` is not given, or the merged weight is not finite.
            RuntimeError: the weight did not take the sum. The layer is then unmerged and its weight what it was.

        Warns:
            UserWarning: less than 0.9 of ``scaling * lora_b @ lora_a`` is in the weight (see
                :func:`afa_kernels.merge_report`).
        """
        check_dequantize(dequantize)
        if not self._merged:
            self.check_merge(dequantize)
        before = self.kept
        self.merge_checked(keep_original, dequantize)
        if self.kept is not before:
            tell(self)

    def check_merge(self, dequantize: bool | torch.dtype = False) -> None:
        """Raise the ValueError that :meth:`merge` would raise."""
        self._check_identity()
        if self.weight.device.type == "meta":
            return
        finite = [torch.isfinite(merged).all() for merged in self._sums()]
        if not all(map(bool, finite)):
            raise ValueError(NOT_FINITE)

    def _sums(self) -> Iterator[Tensor]:
        return (self._plus(*part, self.scaling) for part in self._parts())

    def _check_identity(self) -> None:
        if not self.identity:
            raise ValueError(
                f"merge: alpha_t is {self._alpha_t}, so the branch is not linear in x and no "
                "weight equals it; anneal to alpha_t = 0 first"
            )

    def merge_checked(self, keep_original: bool, dequantize: bool | torch.dtype = False) -> None:
        """Do what :meth:`merge` does after :meth:`check_merge`, but for the warning."""
        if self._merged:
            if keep_original and self._original_weight is None and self._quantized is None:
                raise ValueError("keep_original: the layer is merged already and the original weight is gone")
            return
        original = self.weight.detach().clone() if keep_original else None
        self.kept = self._add(self.scaling)
        self._original_weight, self._merged = original, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: bit for bit if it kept the original or dequantized it, by subtraction otherwise."""
        if not self._merged:
            return
        if self._quantized is not None:
            put_quantized(self)
        elif self._original_weight is not None:
            self.weight.copy_(self._original_weight)
        else:
            self._add(-self.scaling)
        self._original_weight, self._merged, self.kept = None, False, None

    def _add(self, factor: float) -> Kept:
        each = []
        for weight, a, b in self._parts():
            merged = self._plus(weight, a, b, factor)
            if factor == self.scaling:  # what is subtracted is not asked for
                own = (weight.T, merged.T) if self.transposed else (weight, merged)
                each.append(kept(*own, a, b, factor))
            write(weight, merged)
        return Kept.of_all(each) if each else Kept()

    def _plus(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, factor: float) -> Tensor:
        return plus(weight, lora_a, lora_b, factor, transposed=self.transposed)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the weight, or one part of it after the other, with its A and B."""
        raise NotImplementedError

    def _brings_weight(self, state_dict: dict[str, Tensor], prefix: str) -> bool:
        """Whether a state dict that is being loaded has the frozen weight of this layer."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            # The saved weight contains the branch: a layer that loads it must not add the branch
            # again.
            destination[prefix + _MERGED_KEY] = torch.ones((), dtype=torch.bool)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        merged = prefix + _MERGED_KEY in state_dict
        brings_branch = any(prefix + name in state_dict for name in ("lora_a", "lora_b", "alpha_t_buffer"))
        brings_weight = self._brings_weight(state_dict, prefix)
        if (self._merged or merged) and brings_branch and not brings_weight:
            error_msgs.append(f"{prefix}lora_a: a branch of a merged layer cannot be loaded without its weight")
            return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _MERGED_KEY in unexpected_keys:
            unexpected_keys.remove(prefix + _MERGED_KEY)
        if brings_branch and len(error_msgs) == errors:
            self._merged = merged
            self._original_weight = self._quantized = self.kept = None


@torch.no_grad()
def write(weight: Tensor, merged: Tensor) -> None:
    """Write a merged weight, and read it again.

    Raises:
        RuntimeError: the weight holds something else afterwards. It is then what it was.
    """
    original = weight.clone()
    weight.copy_(merged)
    # A sum that is NaN is as it should be: unmerge() takes weights that the caller has changed.
    if weight.device.type != "meta" and not ((weight == merged) | merged.isnan()).all():
        weight.copy_(original)
        raise RuntimeError(
            f"merge: a weight ({type(weight).__name__}) does not hold the sum that was written into it; it is left as "
            "it was. Save the adapter and merge it into a model that is loaded anew"
        )


@torch.no_grad()
def plus(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    factor: float,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``weight + factor * lora_b @ lora_a``, rounded once, by default to the dtype of the weight;
    ``transposed``: the weight is ``(K, N)``."""
    wide = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype) else torch.float32
    with torch.autocast(weight.device.type, enabled=False):
        product = lora_b.to(wide) @ lora_a.to(wide)
    return torch.add(weight.to(wide), product.T if transposed else product, alpha=factor).to(dtype or weight.dtype)


def check_dequantize(value: bool | torch.dtype) -> None:
    if not isinstance(value, bool) and value not in checks.FLOATING:
        raise TypeError(f"dequantize: expected a bool or a floating-point dtype, got {value!r}")


@torch.no_grad()
def dense_sum(
    base: nn.Module, lora_a: Tensor, lora_b: Tensor, factor: float, dequantize: bool | torch.dtype
) -> tuple[nn.Linear, Kept]:
    """Return a dense layer with the weight of a quantized one plus ``factor * lora_b @ lora_a``, and what it kept.

    Raises:
        ValueError: the sum is not finite.
    """
    before = dequantized(base).detach()
    dtype = (dense_dtype(base) or before.dtype) if dequantize is True else dequantize
    weight = plus(before, lora_a, lora_b, factor, dtype=dtype)
    if not torch.isfinite(weight).all():
        raise ValueError(NOT_FINITE)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().to(dtype, copy=True), requires_grad=False)
    return layer.train(base.training), kept(before, weight, lora_a, lora_b, factor)


def put_dense(owner: nn.Module, dense: nn.Linear) -> None:
    """Put a dense layer into the place of the base layer, which is kept in no list of modules: a state dict and what
    walks over the model see the dense one alone."""
    owner.__dict__["_quantized"] = owner.base_layer
    owner.base_layer = dense


def put_quantized(owner: nn.Module) -> None:
    """Undo :func:`put_dense`."""
    owner.base_layer = owner.__dict__.pop("_quantized")
