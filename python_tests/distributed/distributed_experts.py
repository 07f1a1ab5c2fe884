"""Experts in one process of the distributed tests: distributed_worker.py runs the checks."""

from pathlib import Path

import torch
import torch.distributed as dist
from distributed_helpers import assert_close, assert_parameters, expects, full
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import afa_kernels as afa

STEPS = 4


def made(architecture: str = "Qwen3Moe", **options) -> nn.Module:
    """Return a model with branches on all experts, the same in every process."""
    return adapted(bare(architecture), **options)


def bare(architecture: str) -> nn.Module:
    from expert_models import mixture  # pytest and transformers are needed here only

    return mixture(architecture, **({"num_experts": 4} if architecture == "Qwen3Moe" else {}))


def adapted(model: nn.Module, **options) -> nn.Module:
    from expert_models import PARAMETERS

    torch.manual_seed(3)
    afa.inject(model, target_parameters=PARAMETERS, r=3, **options)
    generator = torch.Generator().manual_seed(4)
    for layer in layers_of(model):
        for parameter in (layer.lora_a, layer.lora_b):
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            with torch.no_grad():
                parameter.copy_(_as(parameter, values))
    return model


def _as(parameter: Tensor, values: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, parameter.device_mesh, parameter.placements)


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, afa.AFAExpertLinear)]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(1, 32, (4, 6)), torch.randn(4, 6, 32)


def mine(t: Tensor) -> Tensor:
    return t.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, ids: Tensor, target: Tensor, annealed: nn.Module | None = None) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = afa.AnnealSchedule(STEPS, end_frac=0.8).attach(annealed or model)
    for _ in range(STEPS):
        nn.functional.mse_loss(model(ids, use_cache=False).logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def trained_alone(architecture: str = "Qwen3Moe") -> nn.Module:
    alone = made(architecture)
    before = {name: p.clone() for name, p in alone.named_parameters()}
    train(alone, *batch())
    for name, p in alone.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    return alone


def check_experts_ddp(_folder: Path) -> None:
    model = made()
    train(DistributedDataParallel(model), *map(mine, batch()))
    assert_parameters(model, trained_alone())


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer.mlp.experts, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_experts_fsdp2(folder: Path) -> None:
    """The experts are sharded on their first dimension, A and B with them."""
    model = sharded(made())
    layer = layers_of(model)[0]
    assert layer.lora_a.to_local().shape[0] == layer.lora_b.to_local().shape[0] == 2
    train(model, *map(mine, batch()))
    alone = trained_alone()
    assert_parameters(model, alone)
    afa.save_adapter(model, folder / "experts_fsdp2")
    assert_parameters(afa.load_adapter(made(), folder / "experts_fsdp2"), alone)
    afa.load_adapter(model, folder / "experts_fsdp2")
    assert_parameters(model, alone)
    afa.merge(model)
    afa.merge(alone)
    ids, _ = batch()
    torch.testing.assert_close(model(ids).logits, alone(ids).logits)


def stacked() -> nn.Module:
    from expert_models import PARAMETERS, fill

    adapters = {"a": {"r": 3}, "b": {"r": 2, "activation": "tanh"}, "idle": {}}
    return fill(afa.inject(bare("Qwen3Moe"), target_parameters=PARAMETERS, adapters=adapters))


def train_by_name(model: nn.Module, of_this: nn.Module, part, batches: list[list[str]], weight_decay=0.1) -> None:
    ids, target = map(part, batch())
    trained = [p for p in of_this.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=weight_decay)
    for names in batches:
        with afa.adapters_of(of_this, part(names)):
            nn.functional.mse_loss(model(ids, use_cache=False).logits, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def my_part(t):
    return mine(t) if isinstance(t, Tensor) else t[dist.get_rank() * 2 :][:2]


# In the second step "b" is in one process only.
SOME_LACK_B = [["a", "b", "b", "a"], ["a", "a", "b", "a"], ["a"] * 4]


def check_experts_with_adapters_ddp(_folder: Path) -> None:
    alone, model = stacked(), stacked()
    train_by_name(alone, alone, lambda t: t, SOME_LACK_B)
    train_by_name(DistributedDataParallel(model, find_unused_parameters=True), model, my_part, SOME_LACK_B)
    assert_parameters(model, alone)


def check_experts_with_adapters_that_some_processes_lack_fsdp2(_folder: Path) -> None:
    """Where no process has "b" its gradient is zeros, so that weight decay would not leave it alone."""
    alone, model = stacked(), sharded(stacked())
    model.set_reduce_scatter_unused_params(True)
    train_by_name(alone, alone, lambda t: t, SOME_LACK_B, weight_decay=0.0)
    train_by_name(model, model, my_part, SOME_LACK_B, weight_decay=0.0)
    assert_parameters(model, alone)


def check_experts_with_adapters_fsdp2(folder: Path) -> None:
    batches = [["a", "b", "b", "a"], ["a"] * 4]
    alone, model = stacked(), sharded(stacked())
    train_by_name(alone, alone, lambda t: t, batches)
    train_by_name(model, model, my_part, batches)
    assert_parameters(model, alone)
    afa.set_alpha_t(model, 0.0)
    afa.save_adapter(model, folder / "adapters_fsdp2", "b")
    other = afa.load_adapter(stacked(), folder / "adapters_fsdp2", "again")
    for got, want in zip(_of(other, "again"), _of(alone, "b"), strict=True):
        assert_close(got, want, 1e-5, "b")


def _of(model: nn.Module, adapter: str) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if f".{adapter}." in name]


def expert_parallel(architecture: str, implementation: str) -> nn.Module:
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    model = bare(architecture)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):  # what the plans of transformers' own configurations say
            plan |= {f"{name}.{parameter}": "grouped_gemm" for parameter, _ in module.named_parameters(recurse=False)}
            plan[name] = "ep_dispatch_experts"
    apply_expert_parallelism(model, mesh, mesh, plan, ep_implementation=implementation)
    return model


def check_expert_parallelism_of_transformers(folder: Path) -> None:
    """All processes have the whole batch, and each has half of the experts, their A and their B."""
    for architecture in ("Qwen3Moe", "GptOss"):
        alone = trained_alone(architecture)
        ids, target = batch()
        for implementation in ("all_reduce", "all_to_all"):
            model = adapted(expert_parallel(architecture, implementation))
            layer = layers_of(model)[0]
            assert layer.lora_a.to_local().shape[0] == layer.experts.num_experts == 2
            fresh = made(architecture)
            logits = [m(ids, use_cache=False).logits for m in (model, fresh)]
            assert_close(*logits, 1e-5, "logits")
            for y in logits:
                nn.functional.mse_loss(y, target).backward()
            for got, want in zip(layers_of(model), layers_of(fresh), strict=True):
                assert_close(full(got.lora_a.grad), want.lora_a.grad, 1e-5, "lora_a")
                assert_close(full(got.lora_b.grad), want.lora_b.grad, 1e-5, "lora_b")
            model.zero_grad()
            train(model, ids, target)
            assert_parameters(model, alone)
            where = folder / f"{architecture}_{implementation}"
            afa.save_adapter(model, where)
            assert_parameters(afa.load_adapter(made(architecture), where), alone)
            want = model(ids).logits.detach()
            afa.merge(model)
            torch.testing.assert_close(model(ids).logits.detach(), want)
            afa.unmerge(model)
            torch.testing.assert_close(afa.unload(afa.merge(model))(ids).logits.detach(), want)


def check_experts_that_are_split_are_refused_in_peft(_folder: Path) -> None:
    from expert_models import PARAMETERS
    from peft import get_peft_model

    from afa_kernels.peft import AFALoraConfig

    model = expert_parallel("Qwen3Moe", "auto")
    with expects(ValueError, "it is sharded, and PEFT keeps whole adapters; use afa_kernels.inject"):
        get_peft_model(model, AFALoraConfig(target_parameters=list(PARAMETERS), target_modules=[]))
