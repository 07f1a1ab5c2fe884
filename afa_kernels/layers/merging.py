"""Merging: a branch that becomes part of its frozen weight, and what a state dict says of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from afa_kernels.alpha_t import Annealed, normal
from afa_kernels.operator import checks

_MERGED_KEY = "merged"


class Mergeable(Annealed):
    """Base of the layers that can be merged: :class:`afa_kernels.AFALinear` and :class:`afa_kernels.AFAExpertLinear`.

    A subclass has ``weight``, ``scaling``, :meth:`_sums` and :meth:`_brings_weight`.
    """

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

    def merge(self, *, keep_original: bool = False) -> None:
        """Add ``scaling * lora_b @ lora_a``, of experts that of each, to the weight: afterwards the layer costs what
        the frozen one costs. Merging twice is once.

        The sum is computed in float32 (float64 for float64) and rounded once to the dtype of the
        weight.

        Args:
            keep_original: keep a copy of the weight (as much memory as the weight) for a bit-exact
                :meth:`unmerge`; otherwise unmerge subtracts, which costs no memory and leaves about
                one rounding of the weight's dtype.

        Raises:
            ValueError: ``alpha_t`` is not 0, the base layer computes its weight, the weight is quantized, or the
                merged weight is not finite.
            RuntimeError: the weight did not take the sum. The layer is then unmerged and its weight what it was.
        """
        if not self._merged:
            self.check_merge()
        self.merge_checked(keep_original)

    def check_merge(self) -> None:
        """Raise the ValueError that :meth:`merge` would raise."""
        if not self.identity:
            raise ValueError(
                f"merge: alpha_t is {self._alpha_t}, so the branch is not linear in x and no "
                "weight equals it; anneal to alpha_t = 0 first"
            )
        if self.weight.device.type == "meta":
            return
        finite = [torch.isfinite(merged).all() for _, merged in self._sums(self.scaling)]
        if not all(map(bool, finite)):
            raise ValueError("merge: the merged weight would not be finite; the weight is unchanged")

    def merge_checked(self, keep_original: bool) -> None:
        """Do what :meth:`merge` does after :meth:`check_merge`."""
        if self._merged:
            if keep_original and self._original_weight is None:
                raise ValueError("keep_original: the layer is merged already and the original weight is gone")
            return
        original = self.weight.detach().clone() if keep_original else None
        self._add(self.scaling)
        self._original_weight, self._merged = original, True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`: bit for bit if it kept the original, by subtraction otherwise."""
        if not self._merged:
            return
        if self._original_weight is not None:
            self.weight.copy_(self._original_weight)
        else:
            self._add(-self.scaling)
        self._original_weight, self._merged = None, False

    def _add(self, factor: float) -> None:
        for weight, merged in self._sums(factor):
            write(weight, merged)

    def _sums(self, factor: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weight, or one part of it after the other, and its sum with ``factor`` times the branch."""
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
            self._original_weight = None


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
def plus(weight: Tensor, lora_a: Tensor, lora_b: Tensor, factor: float, *, transposed: bool = False) -> Tensor:
    """Return ``weight + factor * lora_b @ lora_a``, rounded once; ``transposed``: the weight is ``(K, N)``."""
    wide = torch.float64 if torch.float64 in (weight.dtype, lora_a.dtype) else torch.float32
    with torch.autocast(weight.device.type, enabled=False):
        product = lora_b.to(wide) @ lora_a.to(wide)
    return torch.add(weight.to(wide), product.T if transposed else product, alpha=factor).to(weight.dtype)
