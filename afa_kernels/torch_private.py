"""All that this package uses of torch that is not public, and what is done in a torch that lacks it.

No name here is needed for a right result: where one is missing, the answer is the one that takes the ordinary path.
"""

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def _find(path: str) -> Any:
    """Return ``torch.<path>``, or None in a torch that has no such name."""
    found = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_autocast_state = _find("_C._is_any_autocast_enabled")
_hooks_of_saved_tensors = _find("_C._autograd._top_saved_tensors_default_hooks")
_dispatch_keys = _find("_C._dispatch_keys")
_driver_version = _find("_C._cuda_getDriverVersion")
_raw_stream = _find("_C._cuda_getCurrentRawStream")
_grouped_mm = _find("nn.functional.grouped_mm") or _find("_grouped_mm")
_library_takes = {
    torch.bfloat16: _find("ops.mkldnn._is_mkldnn_bf16_supported"),
    torch.float16: _find("ops.mkldnn._is_mkldnn_fp16_supported"),
}
_WITHOUT_GEMM = [dtype for dtype, takes in _library_takes.items() if takes is not None and not takes()]
_functorch = _find("_C._are_functorch_transforms_active")
_OF_VMAP = (_find("_C._functorch.is_batchedtensor"), _find("_C._functorch.is_legacy_batchedtensor"))
# Functions that tell whether something may see, record or replace operators: modes, transforms, traces and profilers.
_WATCHERS = (
    _find("_C._len_torch_dispatch_stack"),
    _find("_C._len_torch_function_stack"),
    _functorch,
    _find("_C._get_tracing_state"),
    _find("autograd._profiler_enabled"),
)
# The dispatch keys of an ordinary dense tensor. Any other key stands for work that the dispatcher would do: negate or
# conjugate, fill in zeros, call a subclass, a mode or a transform, or run the fake kernel of the meta device.
_DENSE_KEYS = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def _other_keys() -> int | None:
    """Return the set of all dispatch keys that a dense tensor has not, as a number."""
    key_set, key = _find("_C.DispatchKeySet"), _find("_C.DispatchKey")
    try:
        _dispatch_keys(torch.empty(0)).raw_repr()
        return ~reduce(or_, (key_set(getattr(key, name)) for name in _DENSE_KEYS)).raw_repr()
    except (AttributeError, TypeError):
        return None


_OTHER_KEYS = _other_keys()
_CAN_SKIP = _OTHER_KEYS is not None and None not in _WATCHERS
if _CAN_SKIP:
    _dispatch_modes, _function_modes, _transforms, _trace, _profiler = _WATCHERS


def operators_are_watched() -> bool:
    """Whether something may see, record or replace operators: a compiler, a mode, a transform, a trace, a profiler."""
    return (
        is_compiling()
        or not _CAN_SKIP
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms()
        or _trace() is not None
        or _profiler()
    )


def are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are dense tensors of torch's own types (or None) whose memory holds their values."""
    if not _CAN_SKIP:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _TENSOR_TYPES or _dispatch_keys(t).raw_repr() & _OTHER_KEYS):
            return False
    return True


def apply(function: type[torch.autograd.Function], unwatched: bool, *arguments: Any) -> Any:
    """Return ``function.apply(*arguments)``. Where no operator is watched and the tensors are ordinary, the search for
    transforms, and for what they left behind, is spared."""
    if unwatched:
        return super(torch.autograd.Function, function).apply(*arguments)
    return function.apply(*arguments)


def autocast_may_be_on() -> bool:
    """Whether autocast may be on for some device: False spares asking for the one in question."""
    return True if _autocast_state is None else _autocast_state()


def current_stream(device: int) -> int:
    """Return the address of the current stream of a CUDA device, without an object for it where torch offers that."""
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation may be going on."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def in_transform() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) or forward-mode differentiation may be going on. They see
    through torch's own operators, and not through a Function or an operator of this package. A trace is none."""
    if is_compiling():
        return False
    return in_forward_mode() or (_functorch is not None and _functorch())


def is_batched(t: Tensor | None) -> bool:
    """Whether ``t`` is one of vmap, or of a batch of gradients (is_grads_batched): torch runs no operator on it that
    takes a list of tensors and has no rule of its own."""
    return t is not None and not is_compiling() and any(test is not None and test(t) for test in _OF_VMAP)


def saved_tensor_hooks() -> object:
    """Return the innermost hooks of saved tensors, or None where there are none, in a trace, and where torch (2.6) does
    not tell."""
    if _hooks_of_saved_tensors is None or is_compiling():
        return None
    return _hooks_of_saved_tensors(False)


def driver_version() -> str:
    """Return the version of CUDA that the driver is for, such as "13.0"; an empty string where torch does not tell."""
    version = 0 if _driver_version is None else _driver_version()
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


def has_grouped_mm(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether torch has a product of rows that are sorted by owner (public since 2.10). It takes no float64."""
    return _grouped_mm is not None and dtype != torch.float64


def grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return torch's ``grouped_mm`` of operands of any size: those whose rows lie in one place, or do not begin at
    multiples of 16 bytes, which torch refuses, are copied."""
    return _grouped_mm(_at_16_bytes(left), _at_16_bytes(right), offs=offsets)


def _at_16_bytes(t: Tensor) -> Tensor:
    if t.stride(-1) != 1 and t.stride(-2) == 1:
        return _at_16_bytes(t.mT).mT
    unit, columns = 16 // t.element_size(), t.shape[-1]
    apart = (*t.stride()[:-1], t.storage_offset())
    if t.stride(-1) == 1 and t.stride(-2) >= columns and not any(distance % unit for distance in apart):
        return t
    return F.pad(t, (0, unit - columns % unit))[..., :columns]


def has_fast_gemm(dtype: torch.dtype) -> bool:
    """Whether torch's CPU library has a GEMM in ``dtype`` for this CPU; else torch multiplies in loops of its own,
    which are slow where the columns of the right operand are adjacent. True where torch does not tell."""
    return dtype not in _WITHOUT_GEMM


def is_zero_tensor(t: Tensor) -> bool:
    """Whether ``t`` is one of autograd's zeros without memory."""
    return hasattr(t, "_is_zerotensor") and t._is_zerotensor()


def version_of(t: Tensor) -> object:
    """Return what changes with every write to ``t``."""
    if not hasattr(t, "_version"):
        return object()
    if type(t) not in _TENSOR_TYPES and hasattr(t, "_local_tensor"):
        return t._version, version_of(t._local_tensor)  # a write to the shard of a DTensor is none to the DTensor
    return t._version


def is_view(t: Tensor) -> bool:
    """Whether ``t`` may be a view of another tensor."""
    return t._is_view() if hasattr(t, "_is_view") else True
