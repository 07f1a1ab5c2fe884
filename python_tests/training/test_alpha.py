"""alpha_t on its way to a kernel: nothing waits, nothing is copied too late, nothing unread is launched."""

import pytest
import torch
from helpers import Problem
from torch.utils._python_dispatch import TorchDispatchMode

import afa_kernels as afa
from afa_kernels.operator import functional

pytestmark = pytest.mark.fast


class Operators(TorchDispatchMode):
    """Keeps the names of the operators that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scalar", [torch.tensor(0.25), torch.tensor(7)], ids=["alpha_t", "seed"])
def test_a_scalar_on_the_cpu_goes_to_another_device_as_a_fill(scalar):
    """A copy that does not wait might run after the caller wrote the next value (the meta device stands for a GPU)."""
    with Operators() as operators:
        there = functional.on_device(scalar, scalar.dtype, torch.device("meta"))
    assert there.device.type == "meta" and there.dtype == scalar.dtype
    assert "aten::_to_copy" not in operators.names and "aten::copy_" not in operators.names


def test_a_scalar_that_is_there_is_taken_as_it_is():
    alpha_t = torch.tensor(0.25)
    assert functional.on_device(alpha_t, torch.float32, alpha_t.device) is alpha_t


@pytest.mark.parametrize("training", [True, False])
def test_at_identity_nothing_is_made_for_alpha_t(training):
    layer = afa.AFALinear(torch.nn.Linear(24, 20), r=4)
    layer.set_alpha_t(0.0)
    x = Problem.random(5, 24, 20, 4).x.requires_grad_(training)
    for call in (layer, lambda x: afa.afa_lora(x, layer.lora_a, layer.lora_b, 0.0)):
        with Operators() as operators:
            y = call(x)
            if training:
                y.sum().backward()
        made = {"aten::full", "aten::zeros", "aten::fill_", "aten::zero_", "aten::scalar_tensor"}
        assert not made & set(operators.names), operators.names


def test_layers_and_adapters_have_one_kind_of_alpha_t():
    from afa_kernels.alpha_t import Annealed

    layer = afa.AFALinear(torch.nn.Linear(4, 3), r=2)
    assert (
        isinstance(layer, Annealed)
        and list(layer.state_dict())[0] != "alpha_t"
        and "alpha_t_buffer" in layer.state_dict()
    )
    pytest.importorskip("peft")
    from afa_kernels.peft import state as peft_state

    assert issubclass(peft_state.AdapterState, Annealed)


def test_options_of_a_layer_follow_its_attributes():
    layer = afa.AFALinear(torch.nn.Linear(4, 3), r=2, dropout=0.5)
    before = layer.options
    assert layer.options is before, "made once"
    assert layer.eval().options.spec.dropout == 0 and layer.train().options is before
    layer.scaling = 3.0
    assert layer.options.spec.scaling == 3.0 and layer.scaling == 3.0
    with pytest.raises(ValueError, match="activation: expected one of"):
        layer.activation = "swish"
    assert layer.activation == "silu" and layer.options.spec.activation == "silu"
