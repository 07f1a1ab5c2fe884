"""Layers that read the same x (q, k and v of an attention, gate and up of an MLP) in one pass over
it.

The A matrices of a group are stacked, so that the forward reads x once for every z, and the
backward reads it once for every dA; dx of all members is accumulated in one tensor, where separate
layers make one each and autograd adds them up. :class:`AFALinearGroup` says it in code;
:func:`share_inputs` does it for model code that calls the layers one by one.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels import _group_ops, checks
from afa_kernels.activation import IDENTITY
from afa_kernels.backend.registry import requested
from afa_kernels.functional import LinearCall, _as_rows, _like, autocast
from afa_kernels.layer import AFALinear
from afa_kernels.torch_private import (
    are_ordinary,
    in_forward_mode,
    operators_are_watched,
    saved_tensor_hooks,
    version_of,
)

# Children of one module that common transformer code calls with the same tensor.
PATTERNS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


class AFALinearGroup(nn.Module):
    """Several :class:`AFALinear` layers applied to the same x, in one pass over it.

    ``group(x) == tuple(layer(x) for layer in layers)``, with the same gradients. z, dA and dx are
    sums in another order than in separate layers, so they agree to a rounding; given z, all else is
    computed by the same calls. Ranks, scalings, activations, alpha_t and the dtypes of A and B may
    differ from member to member.

    Args:
        layers: two or more AFALinear layers with the same ``in_features``. They keep their own
            parameters and stay usable alone.

    Raises:
        TypeError, ValueError: an element of ``layers`` does not fit; the message says which.

    A member that cannot share makes all of them run one by one: it is merged, drops x (each layer
    has its own mask, so no product is shared), trains its base, has a base that hooks or another
    class change, has another ``save`` or ``backend``, or x is no plain tensor (a DTensor, say).
    """

    def __init__(self, layers: Iterable[AFALinear]):
        super().__init__()
        layers = list(layers)
        _check_layers(layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer: ``(..., K) -> (..., N_i)``."""
        layers = list(self.layers)
        if why_separate(layers, x) is not None:
            return tuple(layer(x) for layer in layers)
        return tuple(_linear(layers, x))


def share_inputs(model: nn.Module) -> nn.Module:
    """Let AFA layers of the common transformer blocks share their input; return ``model``.

    Layers that are children of one module under names such as q_proj, k_proj and v_proj (see
    ``PATTERNS``) and of the same ``in_features`` become a group. The code of the model does not
    change: within one call of that module, the first member that is called computes all of them,
    and the others hand out their part if they are called with the same tensor, unchanged, in the
    same modes (gradients, autocast). Otherwise they compute as ever. Parameters, names and
    checkpoints do not change. Members run separately in the cases that :class:`AFALinearGroup`
    lists, under ``torch.inference_mode``, and where a traced graph records no gradient.

    A block that turns out not to call all its members with the same tensor (cross-attention) goes
    back to separate layers after its first call.

    Raises:
        ValueError: no module of ``model`` has two AFA layers that can share.
    """
    unshare_inputs(model)
    found = False
    for parent in model.modules():
        children = {n: m for n, m in parent._modules.items() if isinstance(m, AFALinear)}
        for names in groups_of({n: m.in_features for n, m in children.items()}):
            SharedInput([children[name] for name in names]).attach(parent)
            found = True
    if not found:
        raise ValueError(nothing_to_share(model))
    return model


def unshare_inputs(model: nn.Module) -> nn.Module:
    """Undo :func:`share_inputs`; return ``model``."""
    for parent in model.modules():
        for hook in list(parent._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SharedInput):
                owner.detach()
    return model


def groups_of(in_features: dict[str, int]) -> Iterator[list[str]]:
    """Yield the names, of the children of one module, that share an input: two or more of a
    pattern."""
    for pattern in PATTERNS:
        by_size: dict[int, list[str]] = {}
        for name in pattern:
            if name in in_features:
                by_size.setdefault(in_features[name], []).append(name)
        yield from (names for names in by_size.values() if len(names) > 1)


def nothing_to_share(model: nn.Module) -> str:
    patterns = "; ".join(", ".join(pattern) for pattern in PATTERNS)
    return f"group: {type(model).__name__} has no module with two AFA layers that share an input ({patterns})"


class _Modes(NamedTuple):
    grad: bool
    autocast: torch.dtype | None


class _Pending(NamedTuple):
    x: Tensor
    version: object
    modes: _Modes
    outputs: dict[int, Tensor]


class SharedInput:
    """The group of one block, open from the start of a call of the block to its end.

    Nothing outlives the call: outputs that nobody took are dropped at its end, also where it ends
    by an exception (an early stop of activation checkpointing is one).
    """

    def __init__(self, layers: list[AFALinear]):
        _check_layers(layers)
        self.layers = tuple(layers)
        self.enabled = True
        self._pending: _Pending | None = None
        self._saved_tensor_hooks: object = None
        self._handles: tuple = ()

    def attach(self, parent: nn.Module) -> None:
        self._handles = (
            parent.register_forward_pre_hook(self.open),
            parent.register_forward_hook(self.close, always_call=True),
        )

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def open(self, _parent: nn.Module, _arguments: tuple) -> None:
        self._pending, self._saved_tensor_hooks = None, saved_tensor_hooks()
        if self.enabled:
            # Set only while the parent is being called, so that a copy or a pickle of a layer does not refer to the
            # others.
            for layer in self.layers:
                layer._shared_input = self

    def close(self, _parent: nn.Module, _arguments: tuple, result: object) -> None:
        pending, self._pending, self._saved_tensor_hooks = self._pending, None, None
        for layer in self.layers:
            layer._shared_input = None
        if pending is not None and pending.outputs and result is not None:
            self.enabled = False  # the members read different tensors, so results were computed that nobody took

    def take(self, layer: AFALinear, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` for ``x``, or None if it has to compute it itself."""
        # A member that is inside a region of activation checkpointing, whose hooks are on, must save its own tensors
        # there.
        if self._saved_tensor_hooks != saved_tensor_hooks():
            return None
        pending = self._pending
        if pending is None:
            layers = list(self.layers)
            if not _may_be_shared(x, layers) or why_separate(layers, x) is not None:
                return None
            version, modes = _version(x), _modes(x)
            outputs = dict(enumerate(_linear(layers, x)))
            # Assigned once it is complete, and emptied by pop, so that another thread in the same block never sees half
            # of it.
            pending = self._pending = _Pending(x, version, modes, outputs)
        elif pending.x is not x or pending.version != _version(x) or pending.modes != _modes(x):
            return None
        for i, member in enumerate(self.layers):
            if member is layer:
                return pending.outputs.pop(i, None)
        return None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pending": None, "_saved_tensor_hooks": None}


def _may_be_shared(x: Tensor, layers: list[AFALinear]) -> bool:
    """Whether a change of ``x`` between two calls would be noticed."""
    if not isinstance(x, Tensor):
        return False
    if torch.compiler.is_compiling():
        # torch.compile cannot read the version of a tensor. Where gradients are recorded that is not needed: every
        # member alone would save x, and autograd reports a change of a saved tensor as an error.
        return torch.is_grad_enabled() and all(layer.lora_a.requires_grad for layer in layers)
    return not x.is_inference()


def _version(x: Tensor) -> object:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else version_of(x)


def _modes(x: Tensor) -> _Modes:
    return _Modes(torch.is_grad_enabled(), _autocast_dtype(x))


def why_separate(layers: list[nn.Module], x: Tensor) -> str | None:
    """Return why ``layers`` cannot compute together on ``x``, or None if they can."""
    return _calls(layers, x)[1]


def _calls(layers: Iterable[nn.Module], x: Tensor) -> tuple[list[LinearCall], str | None]:
    """Return what each layer computes with, and None; or the reason why they compute one by one."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return [], f"x is a {type(x).__name__}"
    calls: list[LinearCall] = []
    for layer in layers:
        call = None if _is_hooked(layer) else layer.linear_call()
        reason = "a member or its base is merged, has hooks or a forward of its own" if call is None else None
        reason = reason or _why_alone(call, x) or (_why_apart(calls[0], call) if calls else None)
        if reason is not None:
            return [], reason
        calls.append(call)
    if x.layout != torch.strided or x.dim() == 0 or x.shape[-1] != calls[0].lora_a.shape[-1]:
        return [], f"x has shape {tuple(x.shape)} and layout {x.layout}"
    if in_forward_mode():
        return [], "forward-mode differentiation"
    return calls, None


def _why_alone(call: LinearCall, x: Tensor) -> str | None:
    weight, bias, lora_a, lora_b, _, options = call
    if options.spec.dropout:
        return "dropout draws one mask for each layer"
    for t in (weight, bias, lora_a, lora_b):
        if t is None:
            continue
        if type(t) is not nn.Parameter and type(t) is not Tensor:
            return f"a parameter is a {type(t).__name__}"
        if t.device != x.device:
            return "a parameter is on another device"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "a base layer trains"
    if weight.dtype != x.dtype and _autocast_dtype(x) is None:
        return "x has another dtype than a weight"
    return None


def _why_apart(first: LinearCall, other: LinearCall) -> str | None:
    same = first.options.save_z == other.options.save_z and first.options.backend == other.options.backend
    return None if same else "save or backend differ"


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_hooked(layer: nn.Module) -> bool:
    """Whether something must run before ``layer`` does (a prefetch of its parameters, say), which
    only a call of the layer itself brings about."""
    return bool(
        "forward" in layer.__dict__ or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _check_layers(layers: list[AFALinear]) -> None:
    for layer in layers:
        if not isinstance(layer, AFALinear):
            raise TypeError(f"layers: expected AFALinear layers, got a {type(layer).__name__}")
    if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"layers: expected two or more different layers, got {len(layers)}")
    sizes = [layer.in_features for layer in layers]
    if len(set(sizes)) > 1:
        raise ValueError(f"layers: expected the same in_features, got {sizes}")


def _linear(layers: list[AFALinear], x: Tensor) -> list[Tensor]:
    """Return the outputs of ``layers`` (``why_separate`` is None) on the same x."""
    x = autocast("x", x)
    rows = _as_rows(x)
    weights = [autocast("weight", m.base_layer.weight.T if m.transposed else m.base_layer.weight) for m in layers]
    direct = all(
        [
            checks.linear(x, weight, layer.base_layer.bias, layer.lora_a, layer.lora_b)
            for layer, weight in zip(layers, weights, strict=True)
        ]
    )
    direct = direct and are_ordinary(m.alpha_t_buffer for m in layers)
    activations = [IDENTITY if m.identity else m.activation for m in layers]
    tensors = [
        *weights,
        *(m.base_layer.bias for m in layers),
        *(m.lora_a for m in layers),
        *(m.lora_b for m in layers),
        *(m.alpha_t_buffer for m in layers),
    ]
    options = (
        activations,
        [m.scaling for m in layers],
        layers[0].save == "z",
        requested(layers[0].backend),  # asked for now: the backward may run outside of use_backend
    )
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if differentiated:
        ys = AFAGroupFunction.apply(rows, *options, direct, *tensors)
    else:
        ys, _ = _group_ops.group_forward(direct, rows, *_split(tensors), *options[:2], False, options[-1])
    return [_like(y, x, y.shape[-1]) for y in ys]


def _split(tensors: Iterable[Tensor | None]) -> list[list[Tensor | None]]:
    """Return weights, biases, A, B and alpha_t of the members."""
    tensors = list(tensors)
    n = len(tensors) // 5
    return [tensors[i * n : (i + 1) * n] for i in range(5)]


class AFAGroupFunction(torch.autograd.Function):
    """``apply(x, activations, scalings, save_z, backend, direct, *tensors)`` on checked operands: ``x (M, K)`` and the
    members' weights, biases, A, B and alpha_t. Returns the members' outputs.

    One node with several outputs: its backward runs once, when the gradients of all are there.
    """

    @staticmethod
    def forward(ctx, x, activations, scalings, save_z, backend, direct, *tensors):
        weights, biases, a, b, alpha_t = _split(tensors)
        ys, zs = _group_ops.group_forward(
            direct, x, weights, biases, a, b, alpha_t, activations, scalings, save_z, backend
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, *a, *b, *alpha_t, *(zs if save_z else ()))
        ctx.options = (activations, scalings, backend)
        ctx.direct = direct
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        x, *rest = ctx.saved_tensors
        n = len(grads)
        weights, a, b, alpha_t, zs = (rest[i * n : (i + 1) * n] for i in range(5))
        activations, scalings, backend = ctx.options
        needs = ctx.needs_input_grad
        need_x, need_a, need_b = needs[0], needs[6 + 2 * n : 6 + 3 * n], needs[6 + 3 * n :][:n]
        given = [dy is not None for dy in grads]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, da, db = _group_ops.differentiable_backward(grads, x, weights, a, b, alpha_t, activations, scalings)
        else:
            # A hook on saved tensors may have returned other tensors than the forward saved.
            direct = ctx.direct and not operators_are_watched() and are_ordinary((*grads, x, *rest))
            dx, da, db = _group_ops.group_backward(
                direct, list(grads), x, weights, a, b, zs or None, alpha_t, activations, scalings, backend,
                need_x, list(need_a), list(need_b),
            )  # fmt: skip
        return (
            dx if need_x and any(given) else None,
            *(None,) * (5 + 2 * n),
            *(t if need and g else None for t, need, g in zip(da, need_a, given, strict=True)),
            *(t if need and g else None for t, need, g in zip(db, need_b, given, strict=True)),
            *(None,) * n,
        )
