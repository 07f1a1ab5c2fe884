"""What holds adapters, behind one interface: linear layers and experts that ``inject`` adapts, and PEFT's layers.

A frozen network (``LinearLayers``, ``Experts``) and a way to adapt it (``Injected``, ``Peft``) make a subject. The
libraries are imported where a subject needs them: the tests marked fast import torch alone.
"""

import contextlib
import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
from helpers import packed
from peft_models import TARGETS, Net, fill_adapters
from torch import Tensor, nn

import afa_kernels as afa
from afa_kernels.alpha_t import places_of
from afa_kernels.model.adapted import named_layers
from afa_kernels.operator.activation import ACTIVATIONS

SAMPLES = 6


class Branch(NamedTuple):
    """One adapter beside one frozen weight, whoever keeps it."""

    where: str  # the layer or the parameter that it stands beside
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float
    activation: str
    state: nn.Module  # has its alpha_t


# --- frozen networks


class LinearLayers:
    """Two linear layers, one of them without a bias, and a head."""

    name = "linear"
    targets = {"target_modules": list(TARGETS)}
    options_of_peft: dict = {}
    release_of_peft = "0.17"

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return Net().to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(SAMPLES, 3, 16, dtype=dtype)

    def beside(self, net: nn.Module, branches: list[Branch]) -> nn.Module:
        """Return ``net`` with ``branches`` in plain torch."""
        for branch in branches:
            setattr(net, branch.where, PlainLinear(getattr(net, branch.where), branch))
        return net


class Conv1DLayers(LinearLayers):
    """The same with transposed weights, as GPT-2 has them."""

    name = "conv1d"
    options_of_peft = {"fan_in_fan_out": True}

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        layer_of = pytest.importorskip("transformers.pytorch_utils").Conv1D
        net = super().base(dtype)
        for name in TARGETS:
            linear = getattr(net, name)
            conv1d = layer_of(linear.out_features, linear.in_features).to(dtype)
            conv1d.weight.data.copy_(linear.weight.T)
            setattr(net, name, conv1d.eval())
        return net


class PlainLinear(nn.Module):
    def __init__(self, base: nn.Module, branch: Branch):
        super().__init__()
        self.base, self.branch = base, branch
        self.lora_a, self.lora_b = branch.lora_a, branch.lora_b

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + plain_branch(x, self.lora_a, self.lora_b, self.branch)


def plain_branch(x: Tensor, lora_a: Tensor, lora_b: Tensor, branch: Branch) -> Tensor:
    alpha_t = branch.state.alpha_t_buffer.item()
    z = packed(x) @ lora_a.T.to(x.dtype)
    h = (1 - alpha_t) * z + alpha_t * ACTIVATIONS[branch.activation].value(z)
    return branch.scaling * (h @ lora_b.T.to(x.dtype))


class Experts:
    """The experts of a model of transformers, with a routing in which one expert meets no token."""

    targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    options_of_peft = {"target_modules": []}
    release_of_peft = "0.19"

    def __init__(self, architecture: str):
        self.architecture = architecture
        self.name = f"experts-{architecture}"

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        from expert_models import mixture  # skips where transformers is missing

        # transformers' grouped_mm has no float64, and no odd sizes in 16 bits.
        model = mixture(self.architecture, experts_implementation="eager")
        return Routed(model.model.layers[1].mlp.experts).to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(SAMPLES, 4, 16, dtype=dtype)

    def beside(self, net: nn.Module, branches: list[Branch]) -> nn.Module:
        net.experts = PlainExperts(net.experts, branches)
        return net


class Routed(nn.Module):
    """Experts whose tokens are routed by their position in a sample: rounding changes no expert of any token."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        first = torch.arange(x.shape[1])[:, None]
        index = ((first + torch.tensor([0, 2])) % (self.experts.num_experts - 1)).repeat(x.shape[0], 1)
        return self.experts(rows, index, rows[:, :2].sigmoid()).view(x.shape)


class PlainExperts(nn.Module):
    """The experts as a user would write them, one token and one expert at a time."""

    def __init__(self, experts: nn.Module, branches: list[Branch]):
        super().__init__()
        self.experts = experts
        self.lora = nn.ParameterList(p for branch in branches for p in (branch.lora_a, branch.lora_b))
        self.branches = branches

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        outputs = []
        for row, chosen, factors in zip(rows, index.tolist(), weights, strict=True):
            y = torch.zeros_like(row)
            for expert, factor in zip(chosen, factors, strict=True):
                if expert < self.num_experts:  # else it is in another process
                    gated = self.experts._apply_gate(self.project(row[None], "gate_up_proj", expert))
                    y = y + factor * self.project(gated, "down_proj", expert)[0]
            outputs.append(y)
        return torch.stack(outputs)

    def project(self, row: Tensor, parameter: str, expert: int) -> Tensor:
        weight = getattr(self.experts, parameter)[expert]
        y = row @ (weight if self.experts.is_transposed else weight.T)
        if self.experts.has_bias:
            y = y + getattr(self.experts, f"{parameter}_bias")[expert]
        for number, branch in enumerate(self.branches):
            if branch.where.endswith(parameter):
                lora_a, lora_b = self.lora[2 * number], self.lora[2 * number + 1]
                if lora_a.dim() == 2:  # PEFT keeps the rows of an expert, and the columns of a rank, together
                    lora_a = lora_a.unflatten(0, (self.num_experts, -1))
                    lora_b = lora_b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
                y = y + plain_branch(row, lora_a[expert], lora_b[expert], branch)
        return y


# --- ways to adapt them


class Subject:
    """A frozen network and a way to adapt it. Options are those of AFALinear."""

    def __init__(self, frozen: LinearLayers | Experts, refusals: dict[str, tuple[type[Exception], str]] | None = None):
        self.frozen, self.base, self.inputs = frozen, frozen.base, frozen.inputs
        self.refusals = refusals or {}  # what it does not do: the error of who tries
        self.id = f"{type(self).__name__.lower()}-{frozen.name}"

    def promises(self, what: str):
        """Return the context of a test of ``what``: a subject that does not do it has to refuse."""
        error, message = self.refusals.get(what, (None, ""))
        return contextlib.nullcontext() if error is None else pytest.raises(error, match=message)

    def adapted(self, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        """Return the network with an adapter whose A and B are drawn: with B = 0 any branch is right."""
        return fill_adapters(self.fresh(dtype, **options))

    def fresh(self, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        """Return the network with an adapter as it is made."""
        raise NotImplementedError

    def several(self, adapters: dict[str, dict], alphas: dict[str, float]) -> nn.Module:
        """Return the network with adapters by name, their options and where they stand."""
        raise NotImplementedError

    def branches(self, model: nn.Module, adapter: str | None = None) -> list[Branch]:
        """Return the branches of the adapter without a name, or of the one with it."""
        raise NotImplementedError

    def call(self, model: nn.Module, x: Tensor, names: str | list[str]) -> Tensor:
        """Compute each sample of x with the adapter of its name, or all with one."""
        raise NotImplementedError

    def trained(self, model: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
        """Return A and B of each branch."""
        return [p for branch in self.branches(model, adapter) for p in (branch.lora_a, branch.lora_b)]

    def frozen_parameters(self, model: nn.Module) -> list[Tensor]:
        return [p for name, p in model.named_parameters() if "lora_" not in name]

    def merged(self, model: nn.Module) -> bool:
        states = {place.layer.merged for place in places_of(model)}
        assert len(states) == 1, "all layers or none"
        return states.pop()

    def plain(self, model: nn.Module, adapter: str | None = None) -> nn.Module:
        """Return the model with one of its adapters, without dropout, in plain torch: what it trains is called lora, in
        the order of :meth:`trained`."""
        branches = [
            branch._replace(lora_a=copy.deepcopy(branch.lora_a), lora_b=copy.deepcopy(branch.lora_b))
            for branch in self.branches(model, adapter)
        ]
        return self.frozen.beside(self.base(self.frozen_parameters(model)[0].dtype), branches)


class Injected(Subject):
    """``afa_kernels.inject``: layers of this package."""

    def fresh(self, dtype=torch.float32, **options):
        return afa.inject(self.base(dtype), **self.frozen.targets, **options)

    def several(self, adapters, alphas):
        model = fill_adapters(afa.inject(self.base(), **self.frozen.targets, adapters=adapters))
        for name, value in alphas.items():
            afa.set_alpha_t(model, value, name)
        return model

    def add(self, model, name, **options):
        afa.add_adapter(model, name, **options)

    def delete(self, model, name):
        afa.delete_adapter(model, name)

    def branches(self, model, adapter=None):
        return [
            Branch(name, layer.lora_a, layer.lora_b, layer.scaling, layer.activation, layer)
            for name, layer in named_layers(model, adapter)
        ]

    def call(self, model, x, names):
        with afa.adapters_of(model, names):
            return model(x)

    def merge(self, model, **options):
        afa.merge(model, **options)

    def unmerge(self, model):
        afa.unmerge(model)

    def unload(self, model, *, merge=False):
        return afa.unload(afa.merge(model) if merge else model)

    def save(self, model, folder, adapter=None):
        afa.save_adapter(model, folder, adapter)
        return folder

    def load(self, net, folder):
        return afa.load_adapter(net, folder)

    def load_as(self, model, folder, name):
        assert afa.load_adapter(model, folder, name) is model


class Peft(Subject):
    """PEFT with an ``AFALoraConfig``: its own layers, whose branches run on this package."""

    def peft(self):
        return pytest.importorskip("peft", minversion=self.frozen.release_of_peft)

    def config(self, **options):
        self.peft()
        from afa_kernels.peft import AFALoraConfig

        names = {"dropout": "lora_dropout"}
        options = {"lora_alpha": 16} | {names.get(name, name): value for name, value in options.items()}
        return AFALoraConfig(**self.frozen.targets, **self.frozen.options_of_peft, **options)

    def fresh(self, dtype=torch.float32, **options):
        config = self.config(**options)
        return self.peft().get_peft_model(self.base(dtype), config).eval()

    def several(self, adapters, alphas):
        (first, options), *others = adapters.items()
        config = self.config(**options)
        model = self.peft().get_peft_model(self.base(), config, adapter_name=first)
        for name, own in others:
            self.add(model, name, **own)
        model.base_model.set_adapter(list(adapters))
        for name, value in alphas.items():
            afa.set_alpha_t(model, value, name)
        return fill_adapters(model).eval()

    def add(self, model, name, **options):
        from afa_kernels.peft import install_annealed

        model.add_adapter(name, self.config(**options))
        install_annealed(model)  # PEFT before 0.19 does not tell a layer that exists what its new adapter is

    def delete(self, model, name):
        model.delete_adapter(name)

    def branches(self, model, adapter=None):
        adapter = adapter or "default"
        return [
            Branch(
                getattr(layer, "parameter_name", where.rpartition(".")[2]), layer.lora_A[adapter].weight,
                layer.lora_B[adapter].weight, layer.scaling[adapter], layer.lora_afa[adapter].activation,
                layer.lora_afa[adapter],
            )
            for where, layer in model.named_modules() if adapter in getattr(layer, "lora_afa", ())
        ]  # fmt: skip

    def call(self, model, x, names):
        if not isinstance(names, str):
            return model(x, adapter_names=names)
        with model.disable_adapter() if names == "__base__" else contextlib.nullcontext():
            if names != "__base__":
                model.set_adapter(names)
            return model(x)

    def merge(self, model, **options):
        model.merge_adapter(**options)

    def unmerge(self, model):
        model.unmerge_adapter()

    def unload(self, model, *, merge=False):
        return model.merge_and_unload() if merge else model.unload()

    def save(self, model, folder, adapter=None):
        model.save_pretrained(folder, selected_adapters=None if adapter is None else [adapter])
        return folder if adapter is None else folder / adapter

    def load(self, net, folder):
        config = self.config().from_pretrained(folder)
        return self.peft().PeftModel.from_pretrained(net, folder, config=config).eval()

    def load_as(self, model, folder, name):
        from afa_kernels.peft import load_adapter

        active = model.active_adapters
        assert load_adapter(model, str(folder), name) is model and model.active_adapters == active


_NO_TORCH_FUNC = {"torch.func": (NotImplementedError, "not possible inside a transform of torch.func")}
# PEFT's own error: its wrappers of parameters see tokens, and no samples.
_NO_SAMPLES = {"mixed batches": (ValueError, "does not support mixed adapter batches")}
_LAYERS, _EXPERTS = [LinearLayers(), Conv1DLayers()], [Experts("Qwen3Moe"), Experts("GptOss")]
SUBJECTS = [
    *map(Injected, _LAYERS),
    *(Injected(experts, _NO_TORCH_FUNC) for experts in _EXPERTS),
    *map(Peft, _LAYERS),
    *(Peft(experts, _NO_TORCH_FUNC | _NO_SAMPLES) for experts in _EXPERTS),
]

# Options and alpha_t of several adapters. The name of one must not be found in PEFT's prefix "lora_".
ADAPTERS = {
    "ann": {"r": 4, "lora_alpha": 4},
    "bob": {"r": 3, "lora_alpha": 2, "activation": "tanh", "use_rslora": True},
    "cy": {"r": 2, "lora_alpha": 1, "activation": "relu"},
    "idle": {"r": 5},
}
ALPHAS = {"ann": 0.5, "bob": 0.25, "cy": 0.0, "idle": 1.0}


# --- ways to copy a model


def _reloaded(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy"),
    pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
    pytest.param(_reloaded, id="torch.save"),
]
