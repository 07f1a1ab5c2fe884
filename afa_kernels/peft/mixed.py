"""``adapter_names`` in training: PEFT gives each layer the names of a batch in evaluation only.

A LoraModel with layers of this package becomes an :class:`AFALoraModel`. Its layers compute all adapters of a batch in
one call (:mod:`afa_kernels.mixed`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from afa_kernels.mixed import BASE, recomputed_within
from afa_kernels.peft.layer import AFALoraLayer


class AFALoraModel(LoraModel):
    """PEFT's LoraModel, which takes ``adapter_names`` in training too."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or not self.training:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        self._check_names(names)

        @contextmanager
        def named(module: nn.Module) -> Iterator[None]:
            def with_names(_layer: nn.Module, arguments: tuple, options: dict[str, Any]) -> tuple[tuple, dict]:
                return arguments, {**options, "adapter_names": names}

            layers = [m for m in module.modules() if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
            handles = [layer.register_forward_pre_hook(with_names, with_kwargs=True) for layer in layers]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

        with named(self), recomputed_within(self, named):
            yield

    def _check_names(self, names: Sequence[str]) -> None:
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"adapter_names: expected the name of an adapter for each sample, got {names!r}")
        known = self.peft_config
        unknown = [name for name in dict.fromkeys(names) if name != BASE and name not in known]
        if unknown:
            raise ValueError(f"adapter_names: the model has no adapter {unknown[0]!r}; it has {', '.join(known)}")


def take_mixed_batches(model: nn.Module) -> None:
    """Let the PEFT models in ``model`` take ``adapter_names`` in training, where they have layers of this package; undo
    that where they have none any more."""
    for module in model.modules():
        if type(module) in (LoraModel, AFALoraModel):
            ours = any(isinstance(layer, AFALoraLayer) for layer in module.modules())
            module.__class__ = AFALoraModel if ours else LoraModel
