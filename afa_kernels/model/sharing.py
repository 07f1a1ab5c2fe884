"""Model code that calls layers that share their input one by one: the first one that is called computes all of them.

Within one call of their block, that is, and for the members that are called with the same tensor. Neither the code of
the model nor its checkpoints change.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afa_kernels.layers.shared_input import calls_of, check_layers, on_shards
from afa_kernels.operator.functional import LinearCall
from afa_kernels.operator.shared_input import autocast_dtype, linear_shared
from afa_kernels.torch_private import saved_tensor_hooks, version_of

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


def share_inputs(model: nn.Module) -> nn.Module:
    """Let the AFA layers of the common transformer blocks share their input, PEFT's with an adapter of this package
    too; return ``model``.

    Layers that are children of one module under names such as q_proj, k_proj and v_proj (see
    ``PATTERNS``) and of the same ``in_features`` are computed together. The code of the model does not
    change: within one call of that module, the first member that is called computes all of them,
    and the others hand out their part if they are called with the same tensor, unchanged, in the
    same modes (gradients, autocast). Otherwise they compute as ever. Parameters, names and
    checkpoints do not change. Members run separately in the cases that :class:`AFASharedInput`
    lists, where no backend takes them together, under ``torch.inference_mode``, and where a traced graph records no
    gradient.

    A block that turns out not to call all its members with the same tensor (cross-attention) goes
    back to separate layers after its first call.

    :func:`afa_kernels.inject` and :func:`afa_kernels.peft.accelerate` do this by themselves, and for a model with an
    :class:`~afa_kernels.peft.AFALoraConfig` the callbacks and :meth:`AnnealSchedule.attach` do.

    Raises:
        ValueError: no module of ``model`` has two AFA layers that can share.
    """
    if not attach_shared_inputs(model, nn.Module):
        raise ValueError(nothing_to_share(model))
    return model


def attach_shared_inputs(model: nn.Module, kind: type) -> bool:
    """Let the layers of a class share their inputs, and leave others as they are; return whether any do."""
    detach_shared_inputs(model, kind)
    found = False
    for parent in model.modules():
        children = {n: m for n, m in parent._modules.items() if isinstance(m, kind) and hasattr(m, "linear_call")}
        for names in siblings_of({n: m.in_features for n, m in children.items()}):
            SharedInput({name: children[name] for name in names}).attach(parent)
            found = True
    return found


def unshare_inputs(model: nn.Module) -> nn.Module:
    """Undo :func:`share_inputs`; return ``model``. What lets layers share by itself does so again when it is
    called again, a schedule that is attached to a PEFT model for example."""
    detach_shared_inputs(model, nn.Module)
    return model


def detach_shared_inputs(model: nn.Module, kind: type) -> None:
    """Let the layers of a class compute on their own."""
    for parent in model.modules():
        for hook in list(parent._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SharedInput) and all(isinstance(layer, kind) for layer in owner.layers):
                owner.detach()


def siblings_of(in_features: dict[str, int]) -> Iterator[list[str]]:
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
    return f"share_inputs: {type(model).__name__} has no module with two AFA layers that share an input ({patterns})"


class _Pending(NamedTuple):
    x: Tensor
    version: object
    modes: tuple[bool, torch.dtype | None]
    outputs: dict[nn.Module, Tensor]


class SharedInput:
    """The layers of one block that share their input, open from the start of a call of the block to its end.

    Nothing outlives the call: outputs that nobody took are dropped at its end, also where it ends
    by an exception (an early stop of activation checkpointing is one).
    """

    def __init__(self, layers: dict[str, nn.Module]):
        check_layers(list(layers.values()))
        self.layers = tuple(layers.values())
        self.names = tuple(layers)  # in the block
        self.enabled = True
        self._pending: _Pending | None = None
        self._separate = False  # for the rest of this call of the block
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

    def open(self, parent: nn.Module, _arguments: tuple) -> None:
        children = parent._modules
        for name, layer in zip(self.names, self.layers, strict=True):
            if children.get(name) is not layer:
                self.detach()  # a member was replaced, by its base layer for example
                return
        self._pending, self._separate, self._saved_tensor_hooks = None, False, saved_tensor_hooks()
        if self.enabled:
            # Set only while the parent is being called, so that a copy or a pickle of a layer does not refer to the
            # others.
            for layer in self.layers:
                _set_shared_input(layer, self)

    def close(self, _parent: nn.Module, _arguments: tuple, result: object) -> None:
        pending, self._pending, self._saved_tensor_hooks = self._pending, None, None
        for layer in self.layers:
            _set_shared_input(layer, None)
        if pending is not None and pending.outputs and result is not None:
            self.enabled = False  # the members read different tensors, so results were computed that nobody took

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Return the output of ``layer`` for ``x``, or None if it has to compute it itself."""
        if self._separate:
            return None
        # A member that is inside a region of activation checkpointing, whose hooks are on, must save its own tensors
        # there.
        if self._saved_tensor_hooks != saved_tensor_hooks():
            return None
        pending = self._pending
        if pending is None:
            # Assigned once it is complete, and emptied by pop, so that another thread in the same block never sees half
            # of it.
            pending = self._pending = self._compute(x)
            if pending is None:
                self._separate = True
                return None
        elif pending.x is not x or pending.version != _version(x) or pending.modes != _modes(x):
            return None
        return pending.outputs.pop(layer, None)

    def _compute(self, x: Tensor) -> _Pending | None:
        if not isinstance(x, Tensor):  # an error, which the layer names
            return None
        calls, _ = calls_of(self.layers, x)
        version, modes = _version(x), _modes(x)
        if calls is None:
            ys = None if x.is_inference() else on_shards(self.layers, x)
        elif not _may_be_shared(x, calls.members):
            return None
        else:
            ys = linear_shared(x, calls)
        return None if ys is None else _Pending(x, version, modes, dict(zip(self.layers, ys, strict=True)))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pending": None, "_saved_tensor_hooks": None}


def _set_shared_input(layer: nn.Module, shared: SharedInput | None) -> None:
    # nn.Module's own __setattr__ asks six times whether the value is a parameter, a module or a buffer.
    object.__setattr__(layer, "_shared_input", shared)


def _may_be_shared(x: Tensor, calls: list[LinearCall]) -> bool:
    """Whether a change of ``x`` between two calls would be noticed."""
    if torch.compiler.is_compiling():
        # torch.compile cannot read the version of a tensor. Where gradients are recorded that is not needed: every
        # member alone would save x, and autograd reports a change of a saved tensor as an error.
        return torch.is_grad_enabled() and all(call.lora_a.requires_grad for call in calls)
    return not x.is_inference()


def _version(x: Tensor) -> object:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else version_of(x)


def _modes(x: Tensor) -> tuple[bool, torch.dtype | None]:
    return torch.is_grad_enabled(), autocast_dtype(x)
