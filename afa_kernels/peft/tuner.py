"""PEFT's LoraModel with adapters of this package: what concerns all layers together.

PEFT shows a layer its configuration and nothing of the model. What needs more is here: each adapter has a configuration
of its own; adapters are merged all or not at all; nothing that is right for linear branches alone is done to others;
and ``adapter_names`` may be given in training, where layers compute all adapters of a batch in one call
(:mod:`afa_kernels.layers.mixed`).
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from afa_kernels.layers.kept import told_together
from afa_kernels.layers.merging import check_dequantize
from afa_kernels.layers.mixed import BASE, recomputed_within
from afa_kernels.layers.quantized import dense_dtype, is_dequantizable
from afa_kernels.model.adapted import forget_quantization, named_mergeable


class AFALoraModel(LoraModel):
    """PEFT's LoraModel, where layers of this package are in it."""

    def add_weighted_adapter(self, adapters: Sequence[str], *args: Any, **kwargs: Any) -> None:
        self._require_identity("add_weighted_adapter", adapters)
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        dequantize: bool | torch.dtype = False,
    ) -> None:
        """Merge adapters as PEFT does, and warn once where weights keep less than 0.9 of them (see
        :func:`afa_kernels.merge_report`).

        Args:
            dequantize: let dense layers take the places of quantized ones, until ``unmerge_adapter`` puts these back;
                a dtype: in that one.
        """
        check_dequantize(dequantize)
        self._check_merge(adapter_names, dequantize)
        with told_together(named_mergeable(self.model), self.model):
            if dequantize is False:
                super().merge_adapter(adapter_names, safe_merge=safe_merge)
            else:
                self._check_merge_allowed()
                self._merge_dequantized(adapter_names, safe_merge, dequantize)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        """Merge adapters and return the model without PEFT's layers; ``dequantize`` is that of :meth:`merge_adapter`,
        and the dense layers are then those of the model."""
        with warnings.catch_warnings():
            if dequantize is not False:
                self.merge_adapter(adapter_names, safe_merge, dequantize)
                warnings.filterwarnings("ignore", "All adapters are already merged")
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names)
        layers = list(named_mergeable(self.model))
        with told_together(layers, self.model):
            model = super()._unload_and_optionally_merge(merge, *args, adapter_names=adapter_names, **kwargs)
        forget_quantization(model, any(layer._quantized is not None for _, layer in layers))
        return model

    def _merge_dequantized(
        self, adapters: Sequence[str] | None, safe_merge: bool, dequantize: bool | torch.dtype
    ) -> None:
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        done = []
        try:
            # The quantized ones first: they refuse a sum that is not finite, and are put back as they were.
            for layer in sorted(layers, key=lambda layer: not is_dequantizable(layer.get_base_layer())):
                own = {}
                if hasattr(layer, "lora_afa"):
                    of_model = dense_dtype(layer.get_base_layer(), self.model) if dequantize is True else None
                    own = {"dequantize": of_model or dequantize}
                if not layer.merged:
                    done.append(layer)
                with onload_layer(layer):
                    layer.merge(adapter_names=adapters, safe_merge=safe_merge, **own)
        except Exception:
            for layer in done:
                if layer.merged:
                    layer.unmerge()
            raise

    def _check_merge(self, adapters: Sequence[str] | None, dequantize: bool | torch.dtype = False) -> None:
        """Raise where a layer would refuse to be merged, before the first one is changed."""
        adapters = adapters or self.active_adapters
        self._require_identity("merge", adapters)
        for name, layer in self.model.named_modules():
            if hasattr(layer, "lora_afa"):
                layer.check_merge(list(adapters), dequantize)
            elif dequantize is not False and isinstance(layer, BaseTunerLayer):
                if is_dequantizable(layer.get_base_layer()):
                    raise ValueError(f"merge: {name} is a layer of PEFT alone, to which dequantize=True means nothing")

    def _require_identity(self, what: str, adapters: Sequence[str]) -> None:
        for name, layer in self.model.named_modules():
            states = getattr(layer, "lora_afa", {})
            for adapter in adapters:
                if adapter in states and not states[adapter].identity:
                    raise ValueError(f"{what}: {not_linear(adapter, states[adapter].alpha_t)} ({name})")

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


def not_linear(adapter: str, alpha_t: float) -> str:
    return (
        f"alpha_t of adapter {adapter!r} is {alpha_t:g}, so its branch is not linear in x and no weight equals it; "
        "anneal to alpha_t = 0 first"
    )


def own_config(config: Any, adapter: str) -> Any:
    """Return the configuration that belongs to the adapter which PEFT is adding: a copy of ``config``, which others may
    hold, in the model's ``peft_config``."""
    tuner = _tuner_at_work()
    if tuner is None:
        return config
    if type(tuner) is LoraModel:
        tuner.__class__ = AFALoraModel
    if tuner.peft_config[adapter] is config:
        _say_where_it_starts(config, adapter)
        tuner.peft_config[adapter] = config.own_copy()
    return tuner.peft_config[adapter]


def _tuner_at_work() -> BaseTuner | None:
    """Return the model of PEFT that is adding an adapter. It gives itself to no layer, but it is ``self`` in one of the
    calls that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, BaseTuner):
            return caller
        frame = frame.f_back
    return None


def _say_where_it_starts(config: Any, adapter: str) -> None:
    if config.describes_an_adapter and config.alpha_t != config.anneal_start:
        warnings.warn(
            f"alpha_t: the new adapter {adapter!r} starts at {config.alpha_t:g}, where the adapter stands whose "
            f"configuration it is made with; for one that starts at {config.anneal_start:g} use a new AFALoraConfig",
            stacklevel=2,
        )


def adopt_tuners(model: nn.Module) -> None:
    """Make each LoraModel in ``model`` that has layers of this package an :class:`AFALoraModel`; undo that where it has
    none any more."""
    for module in model.modules():
        if type(module) in (LoraModel, AFALoraModel):
            ours = any(hasattr(layer, "lora_afa") for layer in module.modules())
            module.__class__ = AFALoraModel if ours else LoraModel
