"""AFALoRAFunction: what is saved, which gradients are needed, and double backward. It does no arithmetic of its own.

Saved for the backward: x, A, B and z (``save="z"``) or x, A and B only (``save="nothing"``; z is recomputed), plus
references to the frozen weight and to the two scalars alpha_t and seed. Never h, act'(z), a mask or a copy of x or y.
"""

import torch

from afa_kernels import _ops, reference, torch_private
from afa_kernels.backend import native
from afa_kernels.options import Options


class AFALoRAFunction(torch.autograd.Function):
    """``apply(x, weight, bias, lora_a, lora_b, base, alpha_t, seed, options, inplace, direct)`` on checked operands.

    ``x (M, K)``, ``weight (N, K)`` or None, ``bias (N,)`` or None, ``lora_a (r, K)``, ``lora_b (N, r)``, ``base`` None
    or ``(M, N)`` (any shape with M * N elements and rows of N where ``inplace``); ``alpha_t`` a 0-dim float32 tensor,
    None at identity; ``options`` as :func:`afa_kernels._ops.resolved` returns them; ``direct`` whether the forward may
    skip torch's dispatcher.

    Returns the layer's output: ``x @ weight.T + bias + branch`` with a weight, ``base + branch`` without.
    :func:`afa_kernels.afa_lora` and :func:`afa_kernels.afa_linear` are the checked ways to call it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, base, alpha_t, seed, options: Options, inplace, direct):
        need_x, need_weight, _, need_a, need_b, _ = ctx.needs_input_grad[:6]
        save_z = options.save_z and (need_x or need_a or need_b)
        if save_z != options.save_z:
            options = Options(options.spec, save_z, options.backend)
        branch = (x, lora_a, lora_b, alpha_t, seed, options)
        if weight is not None:
            y, z = _ops.linear_forward(direct, weight, bias, *branch)
        elif inplace:
            z = _ops.lora_forward_(direct, base.view(-1, lora_b.shape[0]), *branch)
            ctx.mark_dirty(base)
            y = base
        else:
            y, z = _ops.lora_forward(direct, base, *branch)
        ctx.save_for_backward(
            x if need_x or need_a or need_b or need_weight else None,
            weight if need_x else None,
            lora_a,
            lora_b,
            z if save_z else None,
            alpha_t,
            seed,
        )
        ctx.options, ctx.direct = options, direct
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, lora_a, lora_b, z, alpha_t, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, need_base = ctx.needs_input_grad[:6]
        dx = dweight = dbias = da = db = None
        dy = grad_output if grad_output.dim() == 2 else grad_output.reshape(-1, lora_b.shape[0])
        if need_x or need_a or need_b:
            saved = (dy, x, lora_a, lora_b, z, alpha_t, seed, ctx.options)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dx, da, db = _differentiable(dy, x, weight, lora_a, lora_b, alpha_t, seed, ctx.options.spec)
            else:
                # A hook on saved tensors may have returned other tensors than the forward saved, subclasses for
                # example.
                direct = ctx.direct and not torch_private.operators_are_watched()
                tensors = (*saved[:-1], weight)
                direct = direct and (native.are_plain(*tensors) or torch_private.are_ordinary(tensors))
                if weight is not None:
                    dx, da, db = _ops.linear_backward(direct, weight, *saved, need_a, need_b)
                else:
                    dx, da, db = _ops.lora_backward(direct, *saved, need_x, need_a, need_b)
        if need_weight:
            dweight = (dy.T @ x).to(ctx.weight_dtype)
        if need_bias:
            dbias = dy.sum(0).to(ctx.bias_dtype)
        return (
            dx if need_x else None,
            dweight,
            dbias,
            da if need_a else None,
            db if need_b else None,
            grad_output if need_base else None,
            *(None,) * 5,
        )


def _differentiable(dy, x, weight, lora_a, lora_b, alpha_t, seed, spec):
    """Return the gradients as plain torch ops, for whoever differentiates them once more."""
    with _ops.plain_precision(x):
        dx, da, db = reference.backward(dy, x, lora_a, lora_b, alpha_t, seed, spec)
        return (dx if weight is None else dx + dy @ weight), da, db
