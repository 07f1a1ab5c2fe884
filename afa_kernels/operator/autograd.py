"""AFALoRAFunction: what is saved, which gradients are needed, and double backward. It does no arithmetic of its own.

Saved for the backward: x, A, B and z, plus references to the frozen weight, to the scalars alpha_t and seed, and to
whose rows are whose. Never h, act'(z), a mask, a copy of x or y, or a quantized weight in floating point.
"""

import torch

from afa_kernels import torch_private
from afa_kernels.backend import compiled
from afa_kernels.backend.interface import Rows
from afa_kernels.operator import frozen, ops, reference
from afa_kernels.operator.options import Options
from afa_kernels.operator.quantized_weight import QuantizedWeight, dense


class AFALoRAFunction(torch.autograd.Function):
    """``apply(x, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace, direct, *rows)`` on checked
    operands.

    ``x (M, K)``, ``weight (N, K)``, a ``QuantizedWeight`` of that shape or None, ``bias (N,)`` or None,
    ``lora_a (r, K)``, ``lora_b (N, r)``, ``base`` None or ``(M, N)`` (any shape with M * N elements and rows of N where
    ``inplace``); ``alpha_t`` a 0-dim float32 tensor, None at identity; ``options`` as
    :func:`afa_kernels.operator.ops.resolved` returns them; ``direct`` whether the forward may skip torch's dispatcher;
    ``rows`` nothing, or a :class:`~afa_kernels.backend.interface.Rows`, with which the operands have the shapes that
    :func:`afa_kernels.afa_lora` gives.

    Returns the layer's output: ``x @ weight.T + bias + branch`` with a weight, ``base + branch`` without.
    :func:`afa_kernels.afa_lora` and :func:`afa_kernels.afa_linear` are the checked ways to call it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, base, alpha_t, seed, options: Options, inplace, direct, *rows):
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad[:6]
        save_z = need_x or need_a or need_b
        if save_z != options.save_z:
            options = Options(options.spec, save_z, options.backend)
        branch = (x, lora_a, lora_b, alpha_t, seed, options, Rows(*rows) if rows else None)
        if weight is not None:
            y, z = ops.linear_forward(direct, weight if direct else dense(weight, x.dtype), bias, *branch)
        elif inplace:
            z = ops.lora_forward_(direct, base.view(-1, lora_b.shape[-2]), *branch)
            ctx.mark_dirty(base)
            y = base
        else:
            y, z = ops.lora_forward(direct, base, *branch)
        quantized = weight if weight.__class__ is QuantizedWeight else None
        ctx.save_for_backward(
            x if save_z or need_weight else None,
            weight if need_x and quantized is None else None,
            lora_a,
            lora_b,
            z if save_z else None,
            alpha_t,
            seed,
            *rows,
        )
        ctx.options, ctx.direct, ctx.quantized = options, direct, quantized if need_x else None
        if need_weight:
            ctx.weight = weight.shape, weight.dtype
        if need_bias:
            ctx.bias = bias.shape, bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_a, lora_b, z, alpha_t, seed, *rows = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_base = ctx.needs_input_grad[:6]
        owned = Rows(*rows) if rows else None
        dx = dweight = dbias = da = db = None
        dy = grad_output if grad_output.dim() == 2 else grad_output.reshape(-1, lora_b.shape[-2])
        if need_x or need_a or need_b:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                spec = ctx.options.spec
                weight = weight if ctx.quantized is None else ctx.quantized.dense(dy.dtype)
                dx, da, db = _differentiable(dy, x, weight, lora_a, lora_b, alpha_t, seed, spec, owned)
            else:
                saved = (dy, x, lora_a, lora_b, z, alpha_t, seed)
                # A hook on saved tensors may have returned other tensors than the forward saved, subclasses for
                # example.
                direct = ctx.direct and not torch_private.operators_are_watched()
                tensors = (*saved, weight, *rows)
                direct = direct and (compiled.are_plain(*tensors) or torch_private.are_ordinary(tensors))
                if ctx.quantized is not None:
                    weight = ctx.quantized if direct else ctx.quantized.dense(dy.dtype)
                if weight is not None:
                    dx, da, db = ops.linear_backward(direct, weight, *saved, ctx.options, owned, need_a, need_b)
                else:
                    dx, da, db = ops.lora_backward(direct, *saved, ctx.options, owned, need_x, need_a, need_b)
        if need_weight:
            shape, dtype = ctx.weight
            dweight = (dy.T @ x if len(shape) == 2 else _outer(dy, x, owned, shape[0])).to(dtype)
        if need_bias:
            shape, dtype = ctx.bias
            if len(shape) == 1:
                dbias = dy.sum(0).to(dtype)
            else:
                ones = dy.new_ones(dy.shape[0], 8)  # grouped_mm wants rows of 16 bytes
                dbias = _outer(dy, ones, owned, shape[0])[:, :, 0].to(dtype)
        return (
            dx if need_x else None,
            dweight,
            dbias,
            da if need_a else None,
            db if need_b else None,
            grad_output if need_base else None,
            *(None,) * (5 + len(rows)),
        )


def _outer(left, right, rows: Rows, count: int):
    offsets = frozen.ends_of(rows.offsets, count)
    differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return frozen.outer(left, right, offsets) if differentiated else ops.outer(left, right, offsets)


def _differentiable(dy, x, weight, lora_a, lora_b, alpha_t, seed, spec, rows: Rows | None):
    """Return the gradients as plain torch ops, for whoever differentiates them once more."""
    with ops.plain_precision(x):
        if rows is None:
            dx, da, db = reference.backward(dy, x, lora_a, lora_b, alpha_t, seed, spec)
        else:
            dx, da, db = reference.backward_by_owner(dy, x, lora_a, lora_b, alpha_t, seed, spec, rows)
        if weight is None:
            return dx, da, db
        product = dy @ weight if weight.dim() == 2 else reference.product_by_owner(dy, weight, rows)
        return dx + product, da, db
