"""MLPs of a model, ``down(act(gate(x)) * up(x))``, found by their structure, whose forward becomes one call.

Such a module gets a class of its own, derived from the one that it has: the forward checks whether all three layers can
be part of one call, and is the module's own where one cannot. The module keeps names and no other state, so that
copies, checkpoints and what replaces a layer need no care.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels.layers.shared_input import is_hooked
from afa_kernels.operator import checks, ops, shared_input_ops
from afa_kernels.operator.functional import as_rows, autocast
from afa_kernels.operator.mlp import GATES, MLPCall, mlp, why_apart
from afa_kernels.operator.plan import Plan
from afa_kernels.torch_private import has_global_module_hooks


class Parts(NamedTuple):
    """How a module computes: the names of its layers, and the activation between them."""

    gate: str
    up: str
    down: str
    activation: str  # of GATES
    child: str | None  # the name of the activation, where it is a module
    up_first: bool


def fuse_mlp(model: nn.Module) -> nn.Module:
    """Let the MLP blocks ``down(act(gate(x)) * up(x))`` of ``model`` run as one call each; return ``model``.

    A block is a module with three linear layers, ``(..., K)`` to ``(..., I)`` twice and back, which are adapted by this
    package (PEFT's too), and SiLU, GELU or GELU with tanh between them. It is found by that, not by its name, and
    tried once: with a small x its own forward has to give what these layers give. The outputs have the same bits as
    before, and the backward keeps x and the outputs of gate and up, where the parts keep the product and act(gate), too
    (docs/memory.md). Names, parameters and checkpoints do not change. :func:`unfuse_mlp` undoes it, and
    :func:`plan_mlp` says what one block does and why.

    Raises:
        ValueError: ``model`` has no such block; the message says what was in the way.

    Warns:
        UserWarning: a module has the layers of a block but was left alone; and once for each reason for which a block
            runs as its parts.
    """
    attach_mlps(mlps_of(model, lambda layer: hasattr(layer, "linear_call")))
    return model


def unfuse_mlp(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_mlp`; return ``model``."""
    for module in model.modules():
        if isinstance(module, FusedMLP):
            _detach(module)
    return model


def plan_mlp(module: nn.Module, x: Tensor) -> Plan:
    """Return what ``module(x)`` would do: the path ``"block"`` for a block of :func:`fuse_mlp`, or ``"parts"`` with the
    reason why the block calls its layers one by one, or why the module is no block.

    Args:
        module: any module; one that is not fused is tried as :func:`fuse_mlp` does it.
        x: ``(..., K)``.
    """
    parts = module.__dict__.get("_afa_mlp")
    if parts is None:
        found = _parts_of(module, lambda layer: hasattr(layer, "linear_call"))
        return Plan("torch", "parts", found if isinstance(found, str) else "fuse_mlp was not asked for")
    call, reason = _call_of(module, parts, (x,), {})
    if call is None:
        return Plan("torch", "parts", reason)
    rows = as_rows(autocast("x", x.detach()))
    pair = [call.gate, call.up]
    identities = [c.alpha_t is None for c in pair]
    chosen = shared_input_ops.resolved(rows, [c.lora_b for c in pair], [c.options for c in pair], identities, True)
    h = rows.new_empty(1, 1).expand(rows.shape[0], call.gate.lora_b.shape[0])
    down = ops.resolved(h, call.down.lora_b, call.down.options, call.down.alpha_t is None, True).backend
    how = "in one pass over x" if chosen.together else "one by one"
    names = " and ".join(dict.fromkeys(o.backend for o in chosen.options))
    return Plan(down, "block", f"gate and up {how} by {names}, down by {down}; h is computed again in the backward")


def mlps_of(model: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> dict[nn.Module, Parts]:
    """Return the blocks of a model all of whose layers are, or are about to be, adapted.

    Raises, Warns:
        As :func:`fuse_mlp`.
    """
    found: dict[nn.Module, Parts] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        parts = module.__dict__.get("_afa_mlp") or _parts_of(module, is_adapted)
        if isinstance(parts, Parts):
            found[module] = parts
        elif len(_linear_children(module)) == 3:
            left.setdefault(parts, name or type(module).__name__)
    reasons = "; ".join(f"{name}: {reason}" for reason, name in left.items())
    if not found:
        detail = reasons or "no module has three linear layers K -> I, K -> I and I -> K"
        raise ValueError(f"fuse_mlp: {type(model).__name__} has no MLP block that can be fused: {detail}")
    if left:
        warnings.warn(f"fuse_mlp: left alone, the first module for each reason: {reasons}", stacklevel=3)
    return found


def attach_mlps(found: dict[nn.Module, Parts]) -> None:
    for module, parts in found.items():
        if not isinstance(module, FusedMLP):
            module.__class__ = fused_class(type(module))
        module._afa_mlp = parts


def detach_mlps(model: nn.Module, kind: type) -> None:
    """Undo :func:`attach_mlps` for the blocks whose layers are of a class."""
    for module in model.modules():
        parts = module.__dict__.get("_afa_mlp")
        if parts is not None and all(isinstance(module._modules.get(name), kind) for name in parts[:3]):
            _detach(module)


def _detach(module: nn.Module) -> None:
    module.__dict__.pop("_afa_mlp", None)
    stock = getattr(type(module), "_afa_stock", None)
    if stock is not None and type(module) is fused_class(stock):  # sharding may have changed the class since
        module.__class__ = stock


# --- the forward


class FusedMLP:
    """Mixed into the class of a module that :func:`fuse_mlp` found."""

    _afa_mlp: Parts | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._afa_mlp is None:
            return super().forward(*args, **kwargs)
        call, reason = _call_of(self, self._afa_mlp, args, kwargs)
        if call is not None:
            return mlp(args[0], call)
        if not torch.compiler.is_compiling():
            _tell(reason)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        stock = type(self)._afa_stock
        _, _, *state = super().__reduce_ex__(2)
        return (_rebuilt, (stock,), *state) if type(self) is fused_class(stock) else super().__reduce_ex__(protocol)


@cache
def fused_class(stock: type[nn.Module]) -> type:
    return type(stock.__name__, (FusedMLP, stock), {"__module__": stock.__module__, "_afa_stock": stock})


def _rebuilt(stock: type[nn.Module]) -> nn.Module:
    cls = fused_class(stock)
    return cls.__new__(cls)


MERGED = "a layer is merged or disabled"
_told: set[str] = {MERGED}  # that is what somebody asked for


def _tell(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"fuse_mlp: an MLP block runs as its parts: {reason}", stacklevel=4)


def _call_of(module: nn.Module, parts: Parts, args: tuple, kwargs: dict) -> tuple[MLPCall | None, str]:
    """Return the call of a block, or None and why its own forward has to run."""
    if len(args) != 1 or kwargs:
        return None, "it was called with other arguments than x alone"
    if type(args[0]) is not Tensor and type(args[0]) is not nn.Parameter:
        return None, f"x is a {type(args[0]).__name__}"
    if has_global_module_hooks():
        return None, "hooks for all modules are on"
    children, calls = module._modules, []
    if parts.child is not None and _is_watched(children[parts.child]):
        return None, f"{parts.child} has hooks or a forward of its own"
    for name in parts[:3]:
        layer = children[name]
        if not hasattr(layer, "linear_call"):
            return None, f"{name} is no adapted layer any more"
        if _is_watched(layer):
            return None, f"{name} has hooks or a forward of its own"
        call = layer.linear_call()
        if call is None:
            merged = getattr(layer, "merged", False) or getattr(layer, "disable_adapters", False)
            return None, MERGED if merged else f"{name} is sharded, or its base layer or adapter has to be called"
        calls.append(call)
    reason = why_apart(args[0], *calls)
    return (MLPCall(*calls, parts.activation, parts.up_first), "") if reason is None else (None, reason)


def _is_watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks) or is_hooked(layer)


# --- what is a block


def _linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the sizes (in, out) of the children that are linear layers, adapted or not."""
    sizes = {n: (getattr(m, "in_features", None), getattr(m, "out_features", None)) for n, m in module._modules.items()}
    return {name: size for name, size in sizes.items() if all(isinstance(n, int) for n in size)}


def _parts_of(module: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> Parts | str:
    """Return how a module computes if it is a block, or why it is none."""
    sizes = _linear_children(module)
    if len(sizes) != 3:
        return f"it has {len(sizes)} linear layers as children, not three"
    downs = [n for n, (i, k) in sizes.items() if all(size == (k, i) for m, size in sizes.items() if m != n)]
    if not downs:
        return "its linear layers are not K -> I, K -> I and I -> K"
    layers = {name: module._modules[name] for name in sizes}
    apart = next((name for name, layer in layers.items() if not is_adapted(layer)), None)
    if apart is not None:
        return f"{apart} is not adapted"
    others = {n: m for n, m in module._modules.items() if n not in sizes and m is not None}
    for name, other in others.items():
        if (
            len(others) > 1
            or isinstance(other, nn.modules.dropout._DropoutNd)
            or next(other.parameters(), None) is not None
        ):
            return f"{name} ({type(other).__name__}) is beside its linear layers and its activation"
    if "forward" in module.__dict__:
        return "something has replaced its forward"
    parameters = list(module.parameters())
    if any(p.is_meta or hasattr(p, "device_mesh") for p in parameters):
        return "its parameters are sharded, or on the meta device"
    return _tried(module, layers, downs, next(iter(others), None))


def _tried(module: nn.Module, layers: dict[str, nn.Module], downs: list[str], child: str | None) -> Parts | str:
    """Call the module's own forward with a small x, and tell from what its layers got and gave what it computes."""
    called: list[tuple[str, tuple, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: called.append((name, args, y)))
        for name, layer in layers.items()
    ]
    inside = {part for layer in layers.values() for part in layer.modules()}
    before = {part: part.training for part in module.modules() if part not in inside}
    first = next(layer for name, layer in layers.items() if [name] != downs[:1])
    weight = getattr(first, "base_layer", first).weight
    dtype = weight.dtype if weight.dtype in checks.FLOATING else next(module.parameters()).dtype
    x = torch.randn(1, 4, first.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            for part in before:
                part.training = True  # so that dropout between the layers shows
            # Where gate is as large as this, the activations differ in 16 bits too.
            x *= torch.nan_to_num(3 / first(x).float().std(), 1.0, 1.0, 1.0).to(dtype)
            called.clear()
            y = type(module).forward(module, x)
    except Exception as error:  # whatever the forward of another kind of module raises
        return f"its forward takes no x alone: {type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
        for part, training in before.items():
            part.training = training
    names = [name for name, _, _ in called]
    if sorted(names) != sorted(layers) or names[2] not in downs or not _all_equal([(y, called[2][2])]):
        return "its forward does not call its layers once each and return what the last one gives"
    (one, (x_one, *_), y_one), (other, (x_other, *_), y_other), (down, (h, *_), _) = called
    if not _all_equal([(x_one, x), (x_other, x)]):
        return "its first two layers do not get x itself"
    pairs = [(one, y_one, other, y_other), (other, y_other, one, y_one)]
    matches = [
        Parts(gate, up, down, name, child, up == one)
        for gate, y_gate, up, y_up in pairs
        for name, act in GATES.items()
        if _all_equal([(act.value(y_gate) * y_up, h)])
    ]
    if len(matches) != 1:
        return "between its layers it does not compute act(gate) * up with one of " + ", ".join(GATES)
    return matches[0]


def _all_equal(pairs: Iterable[tuple[Any, Tensor]]) -> bool:
    return all(isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)
