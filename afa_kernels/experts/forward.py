"""The forward of an experts module with branches, and the seam by which transformers 5 calls it.

It is transformers' ``grouped_mm_experts_forward`` on the operator. The pairs of a token and an expert are sorted by
expert, and those of an expert by adapter. Under expert parallelism those of other processes come last, behind the last
offset; what is computed there is undefined and masked, as in transformers.

The forward of an experts class asks ``config._experts_implementation`` for a function. A module with branches gets a
configuration of its own that names ours, so that no other module is concerned; the rest of its configuration stays the
model's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from afa_kernels.experts.parameters import Branches, local, projections, weight_of
from afa_kernels.layers.branch import AdapterCall
from afa_kernels.layers.mixed import Gather, linear_in_passes, passes_of
from afa_kernels.operator import checks
from afa_kernels.operator.frozen import ends_of

IMPLEMENTATION = "afa_lora"


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of what the experts of each token compute, ``(tokens, hidden)``.

    Args:
        experts: a module with branches (see :func:`attach`).
        hidden_states: ``(tokens, hidden)``.
        top_k_index, top_k_weights: ``(tokens, k)``, the experts of each token and their weights. An index of
            ``num_experts`` or more stands for an expert of another process.
    """
    up, down = projections(experts)
    calls = {parameter: experts.afa.calls(parameter) for parameter in (up, down)}
    assignment = experts.afa.assignment()
    adapters = () if assignment is None else (len(assignment.adapters), assignment.adapter_of_rows(hidden_states))
    if not any(call is not None for beside in calls.values() for together in beside for call in together):
        return _frozen_forward(experts, hidden_states, top_k_index, top_k_weights)
    checks.no_transform("fused experts with branches")
    order = Order(top_k_index, *adapters)
    offsets = order.ends(experts.num_experts)
    elsewhere = (order.expert >= experts.num_experts)[:, None] if experts._is_expert_parallel else None

    def project(rows: Tensor, parameter: str) -> Tensor:
        y = _project(experts, rows, offsets, order, parameter, calls[parameter])
        return y if elsewhere is None else y.masked_fill(elsewhere, 0.0)

    rows = order.by_expert(hidden_states)
    if elsewhere is not None:
        rows = rows.masked_fill(elsewhere, 0.0)  # its backward drops what is undefined there in dx
    rows = project(rows, up)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = project(rows, down)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * order.of_pairs(top_k_weights.reshape(-1, 1))
    return order.sum_by_token(rows).to(hidden_states.dtype)


def _frozen_forward(experts: nn.Module, *args: Tensor) -> Tensor:
    """Return what the implementation that the model is set to computes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    eager = type(experts).forward.__wrapped__
    name = experts.config.of_model._experts_implementation
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)(experts, *args)


def _project(
    experts: nn.Module, x: Tensor, offsets: Tensor, order: "Order", parameter: str,
    calls: list[Sequence[AdapterCall | None]],
) -> Tensor:  # fmt: skip
    """Return the frozen product with a fused parameter, with its bias, and the branches beside it."""
    weight = local(weight_of(experts, parameter))
    bias = local(getattr(experts, f"{parameter}_bias")) if experts.has_bias else None
    x = x.to(weight.dtype)  # as transformers does: grouped_mm takes no part in autocast
    with torch.autocast(x.device.type, enabled=False):
        passes = [each for together in calls for each in passes_of(x, together)]
        if passes:
            return linear_in_passes(x, offsets, weight, bias, passes)
        return _frozen_product(x, ends_of(offsets, weight.shape[0]), order.expert, weight, bias)


def _frozen_product(x: Tensor, offsets: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from transformers.integrations.moe import _grouped_mm

    y = _grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return y if bias is None else y + bias[expert.clamp(max=weight.shape[0] - 1)]


# --- the order of the rows


class Order:
    """The order of the pairs of a token and an expert, sorted by expert, those of an expert by adapter.

    Rows go from the order of tokens to that of experts and back by gathers alone, in their gradients too: indexing
    would add up gradients row by row, with atomics on a GPU, in one thread on a CPU.

    Args:
        top_k_index: ``(tokens, k)``, the experts of each token.
        adapters: the number of adapters.
        adapter: ``(tokens,)``, the adapter of each token, where there are several.

    ``owner`` is that of each row, ``expert * adapters + adapter``.
    """

    def __init__(self, top_k_index: Tensor, adapters: int = 1, adapter: Tensor | None = None):
        self.top_k, self.adapters = top_k_index.shape[1], adapters
        owners = top_k_index if adapter is None else top_k_index * adapters + adapter[:, None]
        self.owner, self.pairs = torch.sort(owners.reshape(-1), stable=True)
        self.places = torch.empty_like(self.pairs)
        self.places[self.pairs] = torch.arange(self.pairs.shape[0], device=self.pairs.device)

    @property
    def expert(self) -> Tensor:
        """The expert of each row."""
        return self.owner if self.adapters == 1 else self.owner // self.adapters

    def ends(self, experts: int) -> Tensor:
        """Return where the rows of each owner end, without waiting for the device."""
        # histc as in transformers: bincount cannot be captured in a CUDA graph. It takes no integers on a CPU, and no
        # floats on a GPU when it has to be deterministic.
        count = experts * self.adapters
        values = self.owner.float() if self.owner.device.type in ("cpu", "mps") else self.owner.int()
        return torch.cumsum(torch.histc(values, bins=count, min=0, max=count - 1), 0, dtype=torch.int32)

    def by_expert(self, tokens: Tensor) -> Tensor:
        """Return the rows of all pairs, ``(tokens * k, n)``, from those of the tokens."""
        return _Spread.apply(tokens, self.pairs, self.places, self.top_k)

    def of_pairs(self, values: Tensor) -> Tensor:
        """Return ``values``, one row for each pair in the order of the tokens, in that of the experts."""
        return Gather.apply(values, self.pairs, self.places)

    def sum_by_token(self, rows: Tensor) -> Tensor:
        """Return the sum of the k rows of each token."""
        return Gather.apply(rows, self.places, self.pairs).unflatten(0, (-1, self.top_k)).sum(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, pairs, places, top_k):
        ctx.save_for_backward(pairs, places)
        ctx.top_k = top_k
        return tokens.index_select(0, pairs // top_k)

    @staticmethod
    def backward(ctx, d_rows):
        pairs, places = ctx.saved_tensors
        return Gather.apply(d_rows, places, pairs).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


# --- the seam


class _OwnImplementation:
    """The configuration of the model, but for the implementation of one experts module."""

    _experts_implementation = IMPLEMENTATION

    def __init__(self, config: Any):
        self.of_model = config

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # whoever unpickles the model may be another process

    def __getattr__(self, name: str) -> Any:
        if name == "of_model" or name.startswith("__"):  # a copy that is being made has no attributes yet
            raise AttributeError(name)
        return getattr(self.of_model, name)


def attach(experts: nn.Module, branches: Branches) -> None:
    """Let ``experts`` compute with ``branches``, which it keeps as ``experts.afa``."""
    _register()
    experts.afa = branches
    experts.config = _OwnImplementation(experts.config)


def detach(experts: nn.Module) -> None:
    """Undo :func:`attach`."""
    del experts.afa
    experts.config = experts.config.of_model


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
