"""What a subject gives, against plain torch in the same dtype and in float64; and where its adapters stand."""

import torch
from helpers import allowed_error, relative_error
from peft_models import assert_same

from afa_kernels.alpha_t import places_of


def results(compute, trained, x, dy):
    """Return the output, dx and the gradient of each parameter in ``trained``, None where it has none."""
    x = x.detach().clone().requires_grad_()
    for parameter in trained:
        parameter.grad = None
    y = compute(x)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), "dx": x.grad} | {f"gradient {i}": p.grad for i, p in enumerate(trained)}


def in_plain_torch(subject, model, x, dy, adapter=None):
    """Return the results of plain torch in the dtype of x and in float64."""
    for dtype in (x.dtype, torch.float64):
        plain = subject.plain(model, adapter).to(dtype)
        trained = [p for name, p in plain.named_parameters() if "lora" in name]
        yield results(plain, trained, x.to(dtype), dy.to(dtype))


def assert_accurate(got, same, truth, dtype):
    """All of them come through the same chain of products, whose error depends on the order of sums."""
    assert got.keys() == truth.keys()
    allowed = max(allowed_error(same[name], truth[name], dtype) for name in got)
    for name, value in got.items():
        assert value.shape == truth[name].shape and relative_error(value, truth[name]) <= allowed, name


def close(got, wanted):
    """Fail unless they differ in the order of sums only."""
    assert_same({"": got}, {"": wanted})


def alphas_of(model):
    return {place.state.alpha_t for place in places_of(model)}
