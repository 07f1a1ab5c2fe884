"""The branch inside PEFT's LoRA layers: a LoraVariant, and what a layer needs to hold one.

PEFT asks a layer for the variant of an adapter (``resolve_lora_variant``) and hands it the output
of the base layer. ``AFALoraLayer`` answers for :class:`AFALoraConfig`; it is mixed into PEFT's own
layer classes, so quantization, dispatch and merging stay PEFT's.
"""

from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from afa_kernels import torch_private
from afa_kernels.alpha_t import normal
from afa_kernels.layers.base_layer import check_gives_gradient, parameter_of, plain_weight
from afa_kernels.layers.branch import AdapterCall
from afa_kernels.layers.merging import write
from afa_kernels.layers.mixed import BASE, Assignment, mixed_linear, mixed_lora
from afa_kernels.layers.quantized import frozen_weight
from afa_kernels.operator import checks
from afa_kernels.operator.activation import phi
from afa_kernels.operator.functional import LinearCall, linear, lora
from afa_kernels.peft.merging import Merging, stock_class
from afa_kernels.peft.state import AdapterState, add_state, is_annealed
from afa_kernels.schedule import AnnealSchedule

# PEFT's layers whose forward goes through variants. The others (AWQ, AQLM, EETQ, Transformer
# Engine, Megatron) compute the branch themselves and would ignore one.
ROUTED = (
    "Linear",
    "Linear8bitLt",
    "Linear4bit",
    "GPTQLoraLinear",
    "HqqLoraLinear",
    "IncLoraLinear",
    "TorchaoLoraLinear",
)
_PREFIX = "AFALora"
_STATES = "lora_afa"  # where a layer keeps the states of its adapters, among PEFT's own containers


class AFALoraVariant(LoraVariant):
    """``result + scaling * phi(dropout(x) @ A.T) @ B.T`` on the kernels of this package."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config=None, target_name: str = "", **_: Any) -> None:
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"AFALoraConfig: {reason}")
        add_state(module, adapter_name, config, target_name)

    @staticmethod
    def forward(module: LoraLayer, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        branch = _branch(module, active_adapter)
        check_gives_gradient(module.get_base_layer(), x, result)
        # PEFT widens x to the dtype of the adapter, typically float32 beside a 16-bit layer.
        x = x.to(result.dtype)
        if branch is None:
            return _composed(module, active_adapter, x, result)
        bias = module.lora_B[active_adapter].bias
        if bias is not None:
            result = result + module.scaling[active_adapter] * bias.to(result.dtype)
        # Written in place where nobody else can have kept it: a hook, or a layer that returns a view of another tensor.
        owned = not torch.compiler.is_compiling() and not module.get_base_layer()._forward_hooks
        return lora(x, *branch, base=result, inplace=owned and not torch_private.is_view(result))

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight + delta).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        write(orig_weight.data, AFALoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta = module.get_delta_weight(active_adapter)
        return (orig_weight - delta).to(orig_weight.dtype)


def _branch(module: LoraLayer, name: str) -> AdapterCall | None:
    """Return A, B, alpha_t and the options of an adapter, or None where its layers have to be called."""
    parts = module._modules  # past nn.Module.__getattr__ and ModuleDict.__getitem__, which a small call would notice
    a, b = plain_weight(parts["lora_A"]._modules[name]), plain_weight(parts["lora_B"]._modules[name])
    state, scaling = parts[_STATES]._modules[name], module.scaling[name]
    # PEFT makes the scaling a tensor where adapters are to be swapped in a compiled model.
    if a is None or b is None or isinstance(scaling, Tensor):
        return None
    # PEFT owns the scaling and the dropout, and may change them between two calls.
    return AdapterCall(a, b, state.coefficient(), state.options(scaling, dropout_of(module, name)))


def dropout_of(module: LoraLayer, name: str) -> float:
    """Return the dropout probability of a call of an adapter."""
    dropout = module._modules["lora_dropout"]._modules[name]
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _composed(module: LoraLayer, name: str, x: Tensor, result: Tensor) -> Tensor:
    """The branch through calls of its two layers, for those whose weights must not be touched."""
    state, lora_a, lora_b = module.lora_afa[name], module.lora_A[name], module.lora_B[name]
    z = lora_a(module.lora_dropout[name](x).to(next(lora_a.parameters()).dtype))
    h = z if state.identity else phi(z, state.alpha_t_buffer, state.activation)
    return result + (lora_b(h) * module.scaling[name]).to(result.dtype)


class AFALoraLayer(Merging):
    """Mixed into PEFT's LoRA layers: the branch of some of their adapters runs on the kernels of
    this package.

    Adapters with an :class:`AFALoraConfig` have an alpha_t; plain LoRA adapters may be on the same
    layer.
    """

    _shared_input = None  # set by shared_input.SharedInput for the time of a call of the block

    def resolve_lora_variant(self, **kwargs: Any) -> LoraVariant | None:
        # From PEFT 0.19 on; the versions before pass no configuration (see model.accelerate).
        if is_annealed(kwargs.get("config")):
            return AFALoraVariant()
        return super().resolve_lora_variant(**kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs:
            if self._shared_input is not None:
                y = self._shared_input.take(self, x)
                if y is not None:
                    return y
            call = self.linear_call(x)
            if call is not None:
                return linear(x, *call)
        check_gives_gradient(self.get_base_layer(), x)
        return super().forward(x, *args, **kwargs)

    def linear_call(self, x: Tensor) -> LinearCall | None:
        """Return what ``linear(x, ...)`` takes beside x, or None where PEFT's forward has to run: it is merged or
        disabled, another number of adapters than one is active, or a layer cannot be left out."""
        parts = self._modules
        adapters, base = parts["lora_A"]._modules, parts["base_layer"]
        names = [name for name in self.active_adapters if name in adapters]
        if len(names) != 1 or self.merged_adapters or self.disable_adapters:
            return None
        name, weight = names[0], frozen_weight(base, x)
        if weight is None or self.lora_variant.get(name).__class__ is not AFALoraVariant:
            return None
        branch = _branch(self, name)
        if branch is None or parameter_of(parts["lora_B"]._modules[name], "bias") is not None:
            return None
        return LinearCall(weight, parameter_of(base, "bias"), *branch)

    @property
    def alpha_t(self) -> float:
        """The blend coefficient of the active adapters; 0 if none of them is annealed."""
        return max((state.alpha_t for state in self.annealed().values()), default=0.0)

    def schedule(self, total_steps: int, adapter: str | None = None) -> AnnealSchedule | None:
        """Return the schedule that the configuration of an adapter, by default of the active one, describes, if it is
        annealed."""
        configs = (state.config for state in self.annealed(adapter).values())
        return next((config.schedule(total_steps) for config in configs), None)

    def annealed(self, adapter: str | None = None) -> dict[str, AdapterState]:
        """Return its active annealed adapters by their names, or the one of that name, active or not."""
        names = self.active_adapters if adapter is None else [adapter]
        states = {name: self.lora_afa[name] for name in self._ours(names)}
        return {name: state for name, state in states.items() if state.config is not None}

    def set_alpha_t(self, value: float, adapter: str | None = None) -> None:
        """Set the blend coefficient of an adapter, by default of the active ones, in [0, 1]. Plain LoRA adapters have
        none and stay as they are.

        Raises:
            TypeError, ValueError: ``value`` is no number in [0, 1], or is not 0 while the adapter
                is merged, or the layer has no such annealed adapter.
        """
        value = normal(checks.alpha_value(value))
        annealed = self.annealed(adapter)
        if adapter is not None and not annealed:
            raise ValueError(f"adapter: {adapter!r} is no annealed adapter of this layer")
        for name in annealed:
            if name in self.merged_adapters and value != 0.0:
                raise ValueError(f"alpha_t: adapter {name!r} is merged, got {value}; unmerge_adapter() first")
        for state in annealed.values():
            state.write_alpha_t(value)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.lora_variant.pop(adapter_name, None)

    def _cast_input_dtype(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        # The operator rounds the adapter to the dtype of x; a wider copy of x would only cost time.
        if all(isinstance(v, AFALoraVariant) for v in self._active_variants()):
            return x
        return super()._cast_input_dtype(x, dtype)

    def _active_variants(self) -> list[LoraVariant | None]:
        return [self.lora_variant.get(n) for n in self.active_adapters if n in self.lora_A]

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if not self._ours(adapter_names):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        kwargs.pop("alora_offsets", None)  # PEFT's, for another variant
        assignment = Assignment(adapter_names)
        calls = {name: self._call_together(name) for name in assignment.adapters}
        weight = None if args or kwargs else plain_weight(self.base_layer)
        if weight is not None:
            result = mixed_linear(x, weight, self.base_layer.bias, assignment, list(calls.values()))
        else:
            base = self.base_layer(x, *args, **kwargs)
            check_gives_gradient(self.base_layer, x, base)
            result = mixed_lora(x.to(base.dtype), base, assignment, list(calls.values()))
        alone = [name for name, call in calls.items() if call is None and name != BASE and name in self.lora_A]
        for name in alone:
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            own = self._alone(name, x[rows], result[rows])
            result = result.index_copy(0, rows, own.to(result.dtype))
        return result

    def _call_together(self, name: str) -> AdapterCall | None:
        """Return the call of an adapter that can be computed together with others, else None."""
        if name not in self.lora_afa or self.lora_B[name].bias is not None:
            return None
        return _branch(self, name)

    def _alone(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """Return ``result`` plus the branch of an adapter that cannot be computed together with others."""
        variant = self.lora_variant.get(name)
        if variant is None:
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            branch = lora_b(lora_a(self.lora_dropout[name](x.to(lora_a.weight.dtype)))) * self.scaling[name]
            return result + branch.to(result.dtype)
        if not isinstance(variant, AFALoraVariant):
            raise ValueError(
                f"adapter_names: {name!r} is a {type(variant).__name__}, which cannot share a "
                "batch with an AFA-LoRA adapter"
            )
        return variant.forward(self, active_adapter=name, x=x, result=result)


def why_not(layer: nn.Module) -> str | None:
    """Return why the branches of a layer's adapters cannot run on this package, or None if they can."""
    stock = stock_class(type(layer))
    if stock.__name__ not in ROUTED or not stock.__module__.startswith("peft.tuners.lora."):
        return (
            f"a {stock.__name__} layer of PEFT has no seam for another branch; expected target "
            f"modules that become one of {', '.join(ROUTED)}"
        )
    return None


@cache
def afa_class(stock: type[LoraLayer]) -> type:
    """Return PEFT's layer class with :class:`AFALoraLayer` mixed in."""
    body = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} of PEFT whose branch runs on the kernels of this package.",
        "adapter_layer_names": (*stock.adapter_layer_names, _STATES),
    }
    return type(_PREFIX + stock.__name__, (AFALoraLayer, stock), body)


def adopt(layer: LoraLayer) -> None:
    """Make a layer of PEFT able to hold adapters of this package; its parameters stay as they
    are."""
    if not isinstance(layer, AFALoraLayer):
        layer.__class__ = afa_class(type(layer))
        layer.lora_afa = nn.ModuleDict()
        own = layer.__dict__.get("adapter_layer_names")  # a layer with DoRA has its own
        if own is not None:
            layer.adapter_layer_names = (*own, _STATES)


def release(layer: LoraLayer) -> None:
    """Undo :func:`adopt`.

    Raises:
        ValueError: something else (sharding, say) has changed the class of the layer since.
    """
    stock = stock_class(type(layer))
    if type(layer) is not afa_class(stock):
        raise ValueError(
            f"restore: the layer is a {type(layer).__name__} by now; restore a model before it is sharded or wrapped"
        )
    del layer.lora_afa
    layer.__class__ = stock
    own = layer.__dict__.get("adapter_layer_names")
    if own is not None:
        layer.adapter_layer_names = tuple(name for name in own if name != _STATES)


def install(layer: LoraLayer, adapter_name: str, config, layer_name: str = "") -> None:
    """Let this package compute the branch of an adapter that the layer has already.

    Raises:
        ValueError: it cannot; the message says why.
    """
    reason = why_not(layer)
    if reason is not None:
        raise ValueError(f"AFALoraConfig: {reason}")
    adopt(layer)
    layer.lora_variant[adapter_name] = AFALoraVariant()
    AFALoraVariant.init(layer, adapter_name, config, layer_name)


def __getattr__(name: str) -> type:
    # For pickle, which looks the mixed classes up by their name.
    if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in ROUTED:
        return afa_class(_routed_class(name.removeprefix(_PREFIX)))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _routed_class(name: str) -> type[LoraLayer]:
    from peft.tuners import lora

    for module in ("layer", "bnb", "gptq", "hqq", "inc", "torchao"):
        found = getattr(getattr(lora, module, None), name, None)
        if found is not None:
            return found
    raise AttributeError(f"PEFT has no {name} here; is its quantization library installed?")
