"""The forward of an experts module with branches: transformers' ``grouped_mm_experts_forward`` on the operator.

The pairs of a token and an expert are sorted by expert, and those of an expert by adapter. Under expert parallelism
those of other processes come last, behind the last offset; what is computed there is undefined and masked, as in
transformers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from afa_kernels import checks
from afa_kernels.backend.frozen import ends_of
from afa_kernels.experts.order import Order
from afa_kernels.experts.parameters import local, projections, weight_of
from afa_kernels.mixed import AdapterCall, linear_in_passes, passes_of


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of what the experts of each token compute, ``(tokens, hidden)``.

    Args:
        experts: a module with branches (see :func:`afa_kernels.experts.seam.attach`).
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
    experts: nn.Module, x: Tensor, offsets: Tensor, order: Order, parameter: str,
    calls: list[Sequence[AdapterCall | None]],
) -> Tensor:  # fmt: skip
    """Return the frozen product with a fused parameter, with its bias, and the branches beside it."""
    weight = local(weight_of(experts, parameter))
    bias = local(getattr(experts, f"{parameter}_bias")) if experts.has_bias else None
    x = x.to(weight.dtype)  # as transformers does: a grouped product does not take part in autocast
    with torch.autocast(x.device.type, enabled=False):
        passes = [each for together in calls for each in passes_of(x, together)]
        if passes:
            return linear_in_passes(x, offsets, weight, bias, passes)
        return _frozen_product(x, ends_of(offsets, weight.shape[0]), order.expert, weight, bias)


def _frozen_product(x: Tensor, offsets: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from transformers.integrations.moe import _grouped_mm

    y = _grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return y if bias is None else y + bias[expert.clamp(max=weight.shape[0] - 1)]
