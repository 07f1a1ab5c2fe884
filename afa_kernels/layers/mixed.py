"""One batch for many adapters: its samples sorted by adapter, the A and B of those present stacked, one call with
rows by owner.

The stack is small: the copy of A and B, and autograd's way back through it, cost as much memory as the adapters that
are present. An adapter that is not present is no part of the call, so it gets no gradient.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from afa_kernels.layers.branch import AdapterCall
from afa_kernels.operator import checks
from afa_kernels.operator.functional import afa_linear, afa_lora, on_device

BASE = "__base__"  # PEFT's name for "no adapter"
_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers keeps its function of activation checkpointing


class Assignment:
    """Which adapter computes what of a batch.

    Args:
        names: a name for each sample (or for each row of x), or one name for all.
    """

    def __init__(self, names: str | Sequence[str]):
        self.for_all = isinstance(names, str)
        if not self.for_all and not isinstance(names, Iterable):
            raise TypeError(f"names: expected a name for each sample, or one name for all, got {names!r}")
        names = (names,) if self.for_all else tuple(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names: expected names of adapters, got {name!r}")
        self.names = names
        self.adapters = tuple(dict.fromkeys(names))
        number = {name: i for i, name in enumerate(self.adapters)}
        self._numbers = tuple(number[name] for name in names)
        samples = range(len(names))
        order = tuple(sorted(samples, key=self._numbers.__getitem__))  # stable: samples keep their order
        self.order = None if order == tuple(samples) else order
        self._back = tuple(sorted(samples, key=order.__getitem__))
        counts = Counter(names)
        self._ends = tuple(accumulate(counts[name] for name in self.adapters))

    def offsets(self, x: Tensor) -> Tensor:
        """Return where the rows of each adapter end, once the rows of x are sorted.

        Raises:
            ValueError: there is no name for each sample of x, nor for each of its rows.
        """
        each = self.rows_of_a_name(x)
        return constant(tuple(end * each for end in self._ends), torch.int32, x.device)

    def rows_of_a_name(self, x: Tensor) -> int:
        """Return how many rows of x each name stands for. Raises as :meth:`offsets` does."""
        checks.input_tensor(x)
        rows, given = _rows(x), len(self.names)
        samples = len(x) if x.dim() > 1 else 1
        if not self.for_all and given not in (samples, rows):
            wanted = f"{samples} samples" if samples == rows else f"{samples} samples, or of the {rows} rows,"
            raise ValueError(f"names: expected one for each of the {wanted} of x {tuple(x.shape)}, got {given}")
        return rows // given if given else 0

    def adapter_of_rows(self, tokens: Tensor) -> Tensor | None:
        """Return, for each row of ``tokens (T, n)``, which of ``adapters`` computes it, or None if one computes all.
        Tokens have no samples any more: those of each sample stand together, equally many.

        Raises:
            ValueError: the rows cannot be split so.
        """
        rows, given = tokens.shape[0], len(self.names)
        if rows if given == 0 else rows % given and not self.for_all:
            raise ValueError(f"names: expected one for each sample, equally long, of {rows} tokens, got {given}")
        if len(self.adapters) < 2:
            return None
        numbers = constant(self._numbers, torch.int64, tokens.device)
        return numbers[:, None].expand(given, rows // given).reshape(rows)

    def sort(self, x: Tensor) -> Tensor:
        """Return the rows of x, those of each adapter together. Without a pass over x if they are so already."""
        return x.reshape(_rows(x), x.shape[-1]) if self.order is None else self._permuted(x, self.order)

    def restore(self, rows: Tensor, x: Tensor) -> Tensor:
        """Undo :meth:`sort` for a result with as many rows as x."""
        if self.order is not None:
            rows = self._permuted(rows, self._back)
        return rows.view(*x.shape[:-1], rows.shape[-1])

    def _permuted(self, t: Tensor, order: tuple[int, ...]) -> Tensor:
        checks.no_transform("samples of several adapters")
        rows, columns = _rows(t), t.shape[-1]
        samples = t.reshape(len(order), rows // len(order), columns)
        return Gather.apply(samples, constant(order, torch.int64, t.device)).view(rows, columns)


class Gather(torch.autograd.Function):
    """``t[order]`` of a permutation. The gradient of indexing is a sum into zeros, in two passes; of a permutation it
    is one too, by its inverse, which is computed where it is not given."""

    @staticmethod
    def forward(ctx, t, order, inverse=None):
        ctx.save_for_backward(order, inverse)
        return t.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        order, inverse = ctx.saved_tensors
        return Gather.apply(dy, order.argsort() if inverse is None else inverse, order), None, None


def mixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, assignment: Assignment, calls: Sequence[AdapterCall | None]
) -> Tensor:
    """Return ``x @ weight.T + bias`` plus, for the samples of each of ``assignment.adapters``, the branch of its call;
    None is no branch."""
    offsets = assignment.offsets(x)
    passes = passes_of(x, calls)
    if not passes:
        return F.linear(x, weight, bias)
    return assignment.restore(linear_in_passes(assignment.sort(x), offsets, weight, bias, passes), x)


def mixed_lora(x: Tensor, base: Tensor, assignment: Assignment, calls: Sequence[AdapterCall | None]) -> Tensor:
    """Return ``base`` plus the branches, as in :func:`mixed_linear`; ``base`` is only read."""
    offsets = assignment.offsets(x)
    rows = assignment.sort(x)
    y = None if assignment.order is not None else base.reshape(rows.shape[0], base.shape[-1])
    for i, each in enumerate(passes_of(x, calls)):
        y = afa_lora(rows, offsets=offsets, base=y, inplace=i > 0, **each)
    if y is None:
        return base
    y = assignment.restore(y, x)
    return y if assignment.order is None else base + y


def linear_in_passes(
    rows: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, passes: list[dict[str, Any]]
) -> Tensor:
    """Return the frozen product of sorted rows plus the branches of all passes, of which there is at least one."""
    y = afa_linear(rows, weight, bias, offsets=offsets, **passes[0])
    for each in passes[1:]:
        y = afa_lora(rows, offsets=offsets, base=y, inplace=True, **each)
    return y


def passes_of(x: Tensor, calls: Sequence[AdapterCall | None]) -> list[dict[str, Any]]:
    """Return the arguments of the calls whose owners of rows are the adapters of ``calls`` or, where these are calls of
    all experts, the pairs of an expert and an adapter, those of an expert together.

    Adapters that differ in activation or dropout, of which a call has one, need a call each: over the same rows, where
    those of the other adapters have rank 0."""
    some = [call for call in calls if call is not None]
    if not some:
        return []
    r = max(call.lora_a.shape[-2] for call in some)
    operands = {
        "lora_a": _stack([None if call is None else call.lora_a for call in calls], -2, r),
        "lora_b": _stack([None if call is None else call.lora_b for call in calls], -1, r),
    }
    # Not operands | ...: Dynamo of torch 2.6 has no union of dicts.
    return [{**operands, **_of_owners(x, own, r)} for own in _by_setting(x, calls)]


def _stack(matrices: list[Tensor | None], dimension: int, r: int) -> Tensor:
    """Return ``(G, .., ..)``, those of all owners with r columns or rows; one adapter alone is not copied."""
    if len(matrices) == 1:
        return matrices[0].unsqueeze(-3).flatten(0, -3)
    some = next(t for t in matrices if t is not None)
    none = some.detach().narrow(dimension, 0, 0)  # of rank 0
    of_rank_r = []
    for t in matrices:
        t = none if t is None else t
        missing = r - t.shape[dimension]
        of_rank_r.append(F.pad(t, (0, 0, 0, missing) if dimension == -2 else (0, missing)) if missing else t)
    return torch.stack(of_rank_r, -3).flatten(0, -3)


def _by_setting(x: Tensor, calls: Sequence[AdapterCall | None]) -> list[list[AdapterCall | None]]:
    """Return, for each call, ``calls`` with None for the adapters that it does not take."""
    settings = [None if call is None else _setting(x, call) for call in calls]
    # At alpha_t = 0 every activation is the identity: such an adapter joins any call, so that reaching 0 costs none.
    annealed = {s[:-1]: s for s in settings if s is not None and s[-1] is not None}
    settings = [annealed.get(s[:-1], s) if s is not None and s[-1] is None else s for s in settings]
    different = dict.fromkeys(s for s in settings if s is not None)
    return [[call if s == each else None for call, s in zip(calls, settings, strict=True)] for each in different]


def _setting(x: Tensor, call: AdapterCall) -> tuple:
    """Return what the adapters of one call have in common, the activation (None at identity) last."""
    spec, _, backend = call.options
    # The scaling of each owner is a float32, which is not exact enough for float64.
    scaling = spec.scaling if x.dtype == torch.float64 else None
    return spec.dropout, backend, scaling, None if call.alpha_t is None else spec.activation


def _of_owners(x: Tensor, own: list[AdapterCall | None], r: int) -> dict[str, Any]:
    """Return the arguments in which calls over the same rows differ; an owner whose call is None has rank 0."""
    some = [call for call in own if call is not None]
    experts = math.prod(some[0].lora_a.shape[:-2])
    annealed = [call for call in some if call.alpha_t is not None]
    spec, _, backend = (annealed or some)[0].options
    alpha_t = 0.0
    if annealed:
        zero = constant((0.0,), torch.float32, x.device)[0]
        values = [zero if call is None or call.alpha_t is None else call.alpha_t for call in own]
        values = [on_device(value, torch.float32, x.device) for value in values]
        alpha_t = values[0] if len(values) == 1 else torch.stack(values).expand(experts, -1).reshape(-1)
    scalings = [spec.scaling if call is None else call.options.spec.scaling for call in own]
    same_scaling = all(scaling == spec.scaling for scaling in scalings)
    ranks = [0 if call is None else call.lora_a.shape[-2] for call in own]
    return {
        "alpha_t": alpha_t,
        **({"activation": spec.activation} if annealed else {}),
        "scaling": spec.scaling if same_scaling else constant(tuple(scalings) * experts, torch.float32, x.device),
        "dropout_p": spec.dropout / 256,
        "backend": backend,
        "ranks": None if min(ranks) == r else constant(tuple(ranks) * experts, torch.int32, x.device),
    }


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


_constants: dict[tuple, Tensor] = {}
_of_graphs: dict[tuple, Tensor] = {}  # read by captured CUDA graphs, whose end nobody tells


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, which nobody may write. On a GPU, where making one waits for the device, it is the
    same tensor each time. One that is asked for during the capture of a CUDA graph, which then reads its memory, is
    kept for ever."""
    if device.type == "cpu" or is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    key = (values, dtype, device)
    if key not in _constants:
        with torch.inference_mode(False):  # a tensor of inference mode could not be saved for a backward later
            made = torch.tensor(values, dtype=dtype, device=device)
        if type(made) is not Tensor:  # a fake one, of whoever traces
            return made
        if len(_constants) >= 4096:
            _constants.clear()
            _constants.update(_of_graphs)
        _constants[key] = made
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _of_graphs[key] = _constants[key]
    return _constants[key]


@contextmanager
def recomputed_within(model: nn.Module, context: Callable[[nn.Module], AbstractContextManager]) -> Iterator[None]:
    """Let what transformers' activation checkpointing of a module computes again in the backward run in
    ``context(module)``, as in the forward, which is over by then."""

    def checkpoint(module: nn.Module, original: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        def within(*args: Any, **kwargs: Any) -> Any:
            with context(module):
                return function(*args, **kwargs)

        return original(within, *args, **kwargs)

    originals = [(m, m.__dict__[_CHECKPOINT]) for m in model.modules() if _CHECKPOINT in m.__dict__]
    for module, original in originals:
        setattr(module, _CHECKPOINT, partial(checkpoint, module, original))
    try:
        yield
    finally:
        for module, original in originals:
            setattr(module, _CHECKPOINT, original)
