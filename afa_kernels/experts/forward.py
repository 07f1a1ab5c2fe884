"""The forward of an experts module with branches: transformers' ``grouped_mm_experts_forward`` on the operator.

The pairs of a token and an expert are sorted by expert. Under expert parallelism those of other processes come last,
behind the last offset; what is computed there is undefined and masked, as in transformers.
"""

import torch
from torch import Tensor, nn

from afa_kernels.experts.order import Order
from afa_kernels.experts.parameters import BranchCall, local, projections, weight_of
from afa_kernels.ragged import afa_linear_grouped, afa_lora_grouped


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of what the experts of each token compute, ``(tokens, hidden)``.

    Args:
        experts: a module with branches (see :func:`afa_kernels.experts.seam.attach`).
        hidden_states: ``(tokens, hidden)``.
        top_k_index, top_k_weights: ``(tokens, k)``, the experts of each token and their weights. An index of
            ``num_experts`` or more stands for an expert of another process.
    """
    up, down = projections(experts)
    branches = {parameter: experts.afa.branches(parameter) for parameter in (up, down)}
    if not any(branches.values()):
        return _frozen_forward(experts, hidden_states, top_k_index, top_k_weights)
    order = Order(top_k_index)
    offsets = _offsets(order.expert, experts.num_experts)
    elsewhere = (order.expert >= experts.num_experts)[:, None] if experts._is_expert_parallel else None

    def project(rows: Tensor, parameter: str) -> Tensor:
        y = _project(experts, rows, offsets, order.expert, parameter, branches[parameter])
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


def _offsets(expert: Tensor, count: int) -> Tensor:
    """Return where the rows of each expert end, from the sorted experts of the rows, without waiting for the device."""
    # histc as in transformers: bincount cannot be captured in a CUDA graph. It takes no integers on a CPU, and no
    # floats on a GPU when it has to be deterministic.
    values = expert.float() if expert.device.type in ("cpu", "mps") else expert.int()
    rows = torch.histc(values, bins=count, min=0, max=count - 1)
    return torch.cumsum(rows, 0, dtype=torch.int32)


def _project(
    experts: nn.Module, x: Tensor, offsets: Tensor, expert: Tensor, parameter: str, branches: list[BranchCall]
) -> Tensor:
    """Return the frozen product with a fused parameter, with its bias, and the branches beside it."""
    weight = local(weight_of(experts, parameter))
    bias = local(getattr(experts, f"{parameter}_bias")) if experts.has_bias else None
    x = x.to(weight.dtype)  # as transformers does: a grouped product does not take part in autocast
    with torch.autocast(x.device.type, enabled=False):
        if not branches:
            return _frozen_product(x, offsets, expert, weight, bias)
        first, *others = branches
        y = afa_linear_grouped(x, offsets, weight, bias, *_operands(first), **_options(first))
        for branch in others:
            y = afa_lora_grouped(x, offsets, *_operands(branch), base=y, inplace=True, **_options(branch))
    return y


def _operands(branch: BranchCall) -> tuple[Tensor, Tensor, Tensor | float]:
    return local(branch.lora_a), local(branch.lora_b), 0.0 if branch.alpha_t is None else branch.alpha_t


def _options(branch: BranchCall) -> dict[str, object]:
    return {
        "activation": branch.activation,
        "scaling": branch.scaling,
        "dropout_p": branch.dropout_p,
        "save": branch.save,
        "backend": branch.backend,
    }


def _frozen_product(x: Tensor, offsets: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from transformers.integrations.moe import _grouped_mm

    y = _grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    return y if bias is None else y + bias[expert.clamp(max=weight.shape[0] - 1)]
