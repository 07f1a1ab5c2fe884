"""MLPs of a model, ``down(act(gate(x)) * up(x))``, found by their structure, whose forward becomes one call.

Such a module gets a class derived from its own, whose forward checks whether all three layers can be part of one call,
and is the module's own where they cannot. Beside that it keeps names alone: copies, checkpoints and what replaces a
layer need no care.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels.layers.base_layer import has_hooks
from afa_kernels.layers.quantized import dequantized, is_dequantizable
from afa_kernels.operator import checks
from afa_kernels.operator.activation import ACTIVATIONS
from afa_kernels.operator.functional import LinearCall, as_rows, autocast
from afa_kernels.operator.mlp import GATES, choice_of, mlp, why_apart
from afa_kernels.operator.plan import Plan

OTHER_SIZES = "its linear layers are not K -> I, K -> I and I -> K"
MERGED = "a layer is merged or disabled"
GONE = "is no adapted layer any more"  # it was replaced by its base layer, say


class Parts(NamedTuple):
    """The names of a block's layers, in this order, and of the activation among ``GATES`` and its module, if any."""

    gate: str
    up: str
    down: str
    activation: str
    child: str | None
    kind: type  # of that module


def fuse_mlp(model: nn.Module) -> nn.Module:
    """Let the MLP blocks ``down(act(gate(x)) * up(x))`` of ``model`` run as one call each; return ``model``.

    A block is a module with three linear layers, two of K to I features and one back, all adapted by this package
    (PEFT's too), and SiLU, GELU or GELU with tanh between them. It is found by that, not by its name, and tried once:
    its own forward has to compute this for a small x. Outputs keep their bits; what is kept for the backward is x and
    the outputs of gate and up (docs/memory.md). Names, parameters and checkpoints do not change. :func:`unfuse_mlp`
    undoes it, and :func:`plan_mlp` says what one block does and why.

    Raises:
        ValueError: ``model`` has no such block; the message says what was in the way.

    Warns:
        UserWarning: a module has three linear layers and was left alone; and once for each reason for which a block
            runs as its parts.
    """
    return attach_mlps(model, mlps_of(model, nn.Module))


def unfuse_mlp(model: nn.Module, kind: type = nn.Module) -> nn.Module:
    """Undo :func:`fuse_mlp`, for the blocks with layers of the class ``kind``; return ``model``. What fuses by itself
    does so again when it is called again, a schedule that is attached to a model with an ``AFALoraConfig`` say."""
    for module in model.modules():
        parts = module.__dict__.get("_afa_mlp")
        if parts is not None and all(isinstance(module._modules.get(name), kind) for name in parts[:3]):
            del module._afa_mlp
            stock = type(module)._afa_stock
            if type(module) is fused_class(stock):  # sharding may have changed the class since
                module.__class__ = stock
    return model


def plan_mlp(module: nn.Module, x: Tensor) -> Plan:
    """Return what ``module(x)`` would do with x ``(..., K)``: the path ``"block"`` for a block of :func:`fuse_mlp`, or
    ``"parts"`` with the reason why the block calls its layers one by one, or why the module is no block."""
    parts = module.__dict__.get("_afa_mlp")
    if parts is None:
        found = _parts_of(module, lambda layer: hasattr(layer, "linear_call"))
        return Plan("torch", "parts", found if isinstance(found, str) else "nobody asked for fuse_mlp")
    calls, reason = _calls_of(module, parts, x)
    if reason is not None:
        return Plan("torch", "parts", reason)
    choice = choice_of(as_rows(autocast("x", x.detach())), calls, True)
    how = "gate and up in one pass over x" if choice.together else "gate and up one by one"
    return Plan(choice.options[0].backend, "block", f"{how}; act(gate) * up is computed again in the backward")


def mlps_of(model: nn.Module, kind: type, chosen: set[nn.Module] | None = None) -> dict[nn.Module, Parts]:
    """Return the blocks whose layers are adapted and of a class, or about to be adapted and among ``chosen``.

    Raises, Warns:
        As :func:`fuse_mlp`.
    """

    def is_adapted(layer: nn.Module) -> bool:
        adapted = hasattr(layer, "linear_call") or hasattr(layer, "lora_A")
        return adapted and isinstance(layer, kind) if chosen is None else layer in chosen

    found, left = {}, {}
    for name, module in model.named_modules():
        parts = module.__dict__.get("_afa_mlp") or _parts_of(module, is_adapted)
        if isinstance(parts, Parts):
            found[module] = parts
        elif len(_sizes(module)) == 3 and parts != OTHER_SIZES:
            left.setdefault(parts, name or type(module).__name__)
    reasons = "; ".join(f"{name}: {reason}" for reason, name in left.items())
    if not found:
        why = reasons or "no module has three linear layers, K -> I, K -> I and I -> K"
        raise ValueError(f"fuse_mlp: nothing to fuse in {type(model).__name__}: {why}")
    if left:
        warnings.warn(f"fuse_mlp: left alone, the first module for each reason: {reasons}", stacklevel=3)
    return found


def attach_mlps(model: nn.Module, found: dict[nn.Module, Parts]) -> nn.Module:
    for module, parts in found.items():
        if not isinstance(module, FusedMLP):
            module.__class__ = fused_class(type(module))
        module._afa_mlp = parts
    return model


# --- the forward


class FusedMLP:
    """Mixed into the class of a module that :func:`fuse_mlp` found."""

    _afa_mlp: Parts | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._afa_mlp is None:
            return super().forward(*args, **kwargs)
        calls, reason = None, "it was called with more than x"
        if len(args) == 1 and not kwargs:
            calls, reason = _calls_of(self, self._afa_mlp, args[0])
        y = mlp(args[0], calls, self._afa_mlp.activation) if reason is None else None
        if y is not None:
            return y
        if not torch.compiler.is_compiling() and reason is not None and reason not in _told:
            if reason.endswith(GONE):
                return unfuse_mlp(self).forward(*args, **kwargs)
            if torch.is_grad_enabled():  # without a gradient a block saves nothing
                _told.add(reason)
                warnings.warn(f"fuse_mlp: an MLP block runs as its parts: {reason}", stacklevel=3)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        _, (cls, *_), *state = super().__reduce_ex__(2)
        stock = cls._afa_stock
        return (_rebuilt, (stock,), *state) if cls is fused_class(stock) else super().__reduce_ex__(protocol)


_told = {MERGED}  # that is what somebody asked for


@cache
def fused_class(stock: type[nn.Module]) -> type:
    return type(stock.__name__, (FusedMLP, stock), {"__module__": stock.__module__, "_afa_stock": stock})


def _rebuilt(stock: type[nn.Module]) -> nn.Module:
    return object.__new__(fused_class(stock))


def _calls_of(module: nn.Module, parts: Parts, x: Tensor) -> tuple[list[LinearCall], str | None]:
    """Return the calls of a block's layers on x, and why its own forward has to run, if it has to."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return [], f"x is a {type(x).__name__}"
    children, calls = module._modules, []
    for name in (parts.gate, parts.up, parts.down, parts.child):
        layer = children.get(name)
        if layer is not None and has_hooks(layer):
            return [], f"{name} has hooks or a forward of its own"
        if name == parts.child:
            if type(layer) is not parts.kind:
                return [], f"{name} was exchanged"
            break
        if not hasattr(layer, "linear_call"):
            return [], f"{name} {GONE}"
        call = layer.linear_call(x)
        if call is None:
            off = getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False)
            return [], MERGED if off else f"{name} is sharded, or its base layer or its adapters have to be called"
        calls.append(call)
    return calls, why_apart(x, *calls)


# --- what is a block


def _sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (in, out) of the children that are linear layers, adapted or not."""
    sizes = {n: (getattr(m, "in_features", None), getattr(m, "out_features", None)) for n, m in module._modules.items()}
    return {name: size for name, size in sizes.items() if all(isinstance(n, int) for n in size)}


def _parts_of(module: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> Parts | str:
    """Return the parts of a module that is a block, or why it is none."""
    sizes, children = _sizes(module), module._modules
    if len(sizes) != 3:
        return f"it has {len(sizes)} linear layers as children, not three"
    downs = [n for n, size in sizes.items() if all(sizes[m] == size[::-1] for m in sizes if m != n)]
    if not downs:
        return OTHER_SIZES
    others = [name for name, child in children.items() if name not in sizes and child is not None]
    for name in others:
        child = children[name]
        if len(others) > 1 or isinstance(child, nn.modules.dropout._DropoutNd) or [*child.parameters()]:
            return f"it has more than an activation beside its linear layers: {name}"
    if "forward" in module.__dict__:
        return "something has replaced its forward"
    if any(p.is_meta or hasattr(p, "device_mesh") for p in module.parameters()):
        return "its parameters are sharded, or on the meta device"
    apart = [name for name in sizes if not is_adapted(children[name])]
    if apart:
        return f"{apart[0]} is not adapted"
    first = children[next(name for name in sizes if [name] != downs)]
    called: list[tuple[str, Any, Tensor]] = []
    handles = [
        children[name].register_forward_hook(lambda _, args, y, name=name: called.append((name, args[0], y)))
        for name in sizes
    ]
    inside = {part for name in sizes for part in children[name].modules()}
    training = {part: part.training for part in module.modules() if part not in inside}
    try:
        for part in training:
            part.training = True  # so that dropout between the layers shows
        x, y = _tried(module, first)
    except Exception as error:  # whatever the forward of another kind of module raises
        return f"its forward does not take x alone: {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
        for part, before in training.items():
            part.training = before
    (one, x_one, y_one), (two, x_two, y_two), (down, h, y_down) = called[1:4] if len(called) == 4 else [("", x, x)] * 3
    if down not in downs or {one, two, down} != {*sizes} or not all(map(_equal, (x_one, x_two, y), (x, x, y_down))):
        return "its forward does not call two layers with x, then the third, and return what that gives"
    pairs = (one, y_one, two, y_two), (two, y_two, one, y_one)
    child = others[0] if others else None
    matches = [
        Parts(gate, up, down, activation, child, type(children.get(child)))
        for gate, y_gate, up, y_up in pairs
        for activation in GATES
        if _equal(ACTIVATIONS[activation].value(y_gate) * y_up, h)
    ]
    return matches[0] if len(matches) == 1 else f"it computes no act(gate) * up with one of {', '.join(GATES)}"


@torch.enable_grad()  # without, bitsandbytes may bring a 4-bit weight into a layout that gives x no gradient
def _tried(module: nn.Module, first: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a small x and what the module's own forward gives for it, after a call of its layer ``first``."""
    base = getattr(first, "base_layer", first)
    weight = dequantized(base) if is_dequantizable(base) else base.weight
    dtype = next((p.dtype for p in (weight, *module.parameters()) if p.dtype in checks.FLOATING), torch.float32)
    x = torch.randn(1, 4, first.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        # Where gate is as large as this, the activations differ in 16 bits, too.
        scale = torch.nan_to_num(3 / first(x.requires_grad_()).detach().float().std(), 1.0, 1.0, 1.0)
        x = (x.detach() * scale.to(dtype)).requires_grad_()
        return x, type(module).forward(module, x)


def _equal(one: Any, other: Any) -> bool:
    return all(isinstance(t, Tensor) for t in (one, other)) and one.dtype == other.dtype and torch.equal(one, other)
