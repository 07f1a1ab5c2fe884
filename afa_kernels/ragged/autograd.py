"""AFALoRAGroupedFunction: what is saved and which gradients are needed, as in autograd.py, for rows sorted by group."""

import torch

from afa_kernels import _ops, reference, torch_private
from afa_kernels.backend import group_loop
from afa_kernels.backend.registry import Groups
from afa_kernels.options import Options
from afa_kernels.ragged import frozen, ops


class AFALoRAGroupedFunction(torch.autograd.Function):
    """``apply(x, weight, bias, lora_a, lora_b, base, *groups, seed, options, inplace, direct)`` on checked operands.

    Shapes as in :func:`afa_kernels.afa_lora_grouped` and :func:`afa_kernels.afa_linear_grouped`, the checked ways to
    call it; ``groups`` is a :class:`~afa_kernels.backend.registry.Groups`, and the other arguments are those of
    :class:`afa_kernels.AFALoRAFunction`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, base, offsets, ranks, alpha_t, scaling, seed, options, inplace,
                direct):  # fmt: skip
        need_x, need_weight, _, need_a, need_b, _ = ctx.needs_input_grad[:6]
        save_z = options.save_z and (need_x or need_a or need_b)
        options = Options(options.spec, save_z, options.backend)
        groups = (offsets, ranks, alpha_t, scaling)
        branch = (x, lora_a, lora_b, *groups, seed, options)
        if weight is not None:
            y, z = ops.linear_forward(direct, weight, bias, *branch)
        elif inplace:
            z = ops.lora_forward_(direct, base, *branch)
            ctx.mark_dirty(base)
            y = base
        else:
            y, z = ops.lora_forward(direct, base, *branch)
        ctx.save_for_backward(
            x if need_x or need_a or need_b or need_weight else None,
            weight if need_x else None,
            lora_a,
            lora_b,
            z if save_z else None,
            *groups,
            seed,
        )
        ctx.options, ctx.direct = options, direct
        ctx.weight = None if weight is None else (weight.shape, weight.dtype)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, z, *groups, seed = ctx.saved_tensors
        offsets = groups[0]
        need_x, need_weight, need_bias, need_a, need_b, need_base = ctx.needs_input_grad[:6]
        dx = dweight = dbias = da = db = None
        if need_x or need_a or need_b:
            saved = (dy, x, lora_a, lora_b, z, *groups, seed, ctx.options)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dx, da, db = _differentiable(dy, x, weight, lora_a, lora_b, Groups(*groups), seed, ctx.options.spec)
            else:
                direct = ctx.direct and not torch_private.operators_are_watched()
                direct = direct and torch_private.are_ordinary((*saved[:-1], weight))
                if weight is not None:
                    dx, da, db = ops.linear_backward(direct, weight, *saved, need_a, need_b)
                else:
                    dx, da, db = ops.lora_backward(direct, *saved, need_x, need_a, need_b)
        if need_weight:
            shape, dtype = ctx.weight
            dweight = (dy.T @ x if len(shape) == 2 else _outer(dy, x, offsets, shape[0])).to(dtype)
        if need_bias:
            shape, dtype = ctx.bias
            if len(shape) == 1:
                dbias = dy.sum(0).to(dtype)
            else:
                ones = dy.new_ones(dy.shape[0], 8)  # grouped_mm wants rows of 16 bytes
                dbias = _outer(dy, ones, offsets, shape[0])[:, :, 0].to(dtype)
        return (
            dx if need_x else None,
            dweight,
            dbias,
            da if need_a else None,
            db if need_b else None,
            dy if need_base else None,
            *(None,) * 8,
        )


def _outer(left, right, offsets, count):
    offsets = frozen.ends_of(offsets, count)
    differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return frozen.outer(left, right, offsets) if differentiated else ops.outer(left, right, offsets)


def _differentiable(dy, x, weight, lora_a, lora_b, groups: Groups, seed, spec):
    """Return the gradients as plain torch ops, for whoever differentiates them once more. The host reads the offsets,
    and on a GPU waits for them."""
    runs = dict(group_loop.runs(groups.offsets))
    branches = {group: rest for group, *rest in group_loop.branches(groups, lora_a.shape[1], spec)}
    dxs, das, dbs, end = [], [], [], 0
    with _ops.plain_precision(x):
        for group in range(lora_a.shape[0]):
            da, db = torch.zeros_like(lora_a[group]), torch.zeros_like(lora_b[group])
            rows = runs.get(group)
            if rows is not None:
                end = rows.stop
                dx = torch.zeros_like(x[rows])
                if group in branches:
                    _, rank, alpha_t, own = branches[group]
                    a, b = lora_a[group, :rank], lora_b[group, :, :rank]
                    dx, da_g, db_g = reference.backward(dy[rows], x[rows], a, b, alpha_t, seed, own, rows.start)
                    da, db = torch.cat([da_g, da[rank:]]), torch.cat([db_g, db[:, rank:]], 1)
                if weight is not None:
                    dx = dx + dy[rows] @ (
                        weight if weight.dim() == 2 else weight[group * weight.shape[0] // lora_a.shape[0]]
                    )
                dxs.append(dx)
            das.append(da)
            dbs.append(db)
        rest = torch.zeros_like(x[end:])
        if weight is not None and weight.dim() == 2:
            rest = dy[end:] @ weight
        return torch.cat([*dxs, rest]), torch.stack(das), torch.stack(dbs)
