"""Calls that skip torch's dispatcher, where it would do nothing but pass them on.

The dispatcher takes a third of what a call costs above its kernels, and several times as long where a large GEMM has
just emptied the caches. What it does for others is kept: compilers, modes, transforms and profilers see operators, and
tensors whose memory does not hold their values are made ordinary before a kernel reads them.
"""

from collections.abc import Callable, Iterable
from functools import reduce, wraps
from operator import or_

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

_TYPES = (Tensor, torch.nn.Parameter)
# The keys of a dense tensor. Any other stands for something that the dispatcher would do: negate or conjugate, fill in
# zeros, call a subclass, a mode or a transform, run the fake kernel on the meta device.
_KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_OTHER_KEYS = ~reduce(or_, (DispatchKeySet(getattr(DispatchKey, key)) for key in _KEYS)).raw_repr()


def direct_or(operator: Callable, implementation: Callable, tensors: int) -> Callable:
    """Return a function that calls ``implementation`` where the dispatcher adds nothing, else ``operator``.

    Args:
        tensors: how many arguments, from the first on, are tensors or None.
    """

    @wraps(implementation)
    def call(*arguments):
        if operators_are_watched() or not are_ordinary(arguments[:tensors]):
            return operator(*arguments)
        return implementation(*arguments)

    call.tensors = tensors
    return call


def operators_are_watched() -> bool:
    """Whether something may see, record or replace operators: a compiler, a mode, a transform, a profiler."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are dense tensors of torch's own types (or None) whose memory holds their values."""
    for t in tensors:
        if t is not None and (type(t) not in _TYPES or _dispatch_keys(t).raw_repr() & _OTHER_KEYS):
            return False
    return True
