"""One process of the distributed tests: torchrun starts two of it, over gloo on the CPU.

Every function called ``check_*``, here and in distributed_adapters.py, distributed_experts.py and
distributed_tensor_parallel.py, is one test; test_distributed.py reads what came of each.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import distributed_adapters
import distributed_experts
import distributed_tensor_parallel
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_helpers import (
    assert_alpha_is_the_same_everywhere,
    assert_close,
    assert_parameters,
    data,
    expects,
    full,
    mine,
    model,
    train,
    trained_alone,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import afa_kernels as afa


def check_ddp(_folder: Path) -> None:
    for share_inputs in (False, True):
        made = model(share_inputs=share_inputs)
        train(DistributedDataParallel(made), *map(mine, data()))
        assert_parameters(made, trained_alone())
        assert_alpha_is_the_same_everywhere(made)


def check_ddp_alpha_is_resumed_alike(_folder: Path) -> None:
    made = model()
    schedule = train(made, *data(), steps=3)
    assert schedule.alpha_t == 0.0
    fresh, again = model(), afa.AnnealSchedule(3, end_frac=0.8)
    again.attach(fresh)
    again.load_state_dict(schedule.state_dict())
    assert_alpha_is_the_same_everywhere(fresh)


def sharded(**options) -> nn.Module:
    made = model(**options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        fully_shard(block, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def check_fsdp2(_folder: Path) -> None:
    for share_inputs in (False, True):
        made = sharded(share_inputs=share_inputs)
        assert isinstance(made[0].up_proj.lora_a, DTensor)
        train(made, *map(mine, data()))
        assert_parameters(made, trained_alone())
        assert_alpha_is_the_same_everywhere(made)


def check_fsdp2_around_single_layers(_folder: Path) -> None:
    """Layers that share x are sharded while one of them computes: each has to compute alone."""
    made = model(share_inputs=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        for layer in block.children():
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    train(made, *map(mine, data()))
    assert_parameters(made, trained_alone())


def check_fsdp2_with_a_16_bit_base(_folder: Path) -> None:
    def make():
        made = model()
        for m in made.modules():
            if isinstance(m, nn.Linear):
                m.to(torch.bfloat16)
        return made

    alone, made = make(), make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in made:
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)
    x, target = (t.bfloat16() for t in data())
    for m, inputs in ((alone, (x, target)), (made, (mine(x), mine(target)))):
        nn.functional.mse_loss(m(inputs[0]), inputs[1]).backward()
    for (name, got), want in zip(made.named_parameters(), alone.parameters(), strict=True):
        if want.grad is not None:
            assert got.grad.dtype == torch.float32, name
            assert_close(full(got.grad), want.grad, 0.02, name)


def check_fsdp2_adapters_are_saved_whole_and_loaded_in_parts(folder: Path) -> None:
    made = sharded()
    train(made, *map(mine, data()))
    afa.save_adapter(made, folder / "adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    alone, others = model(), sharded()
    afa.load_adapter(alone, folder / "adapter")
    afa.load_adapter(others, folder / "adapter")
    assert_parameters(made, alone)
    assert_parameters(others, alone)
    assert all(m.alpha_t == 0.0 for m in others.modules() if isinstance(m, afa.AFALinear))


def check_fsdp2_a_save_that_fails_fails_everywhere(folder: Path) -> None:
    """Process 0 writes, and cannot where the folder is a file; the others wait for it."""
    (folder / "occupied").touch()
    error, words = (FileExistsError, "occupied") if dist.get_rank() == 0 else (RuntimeError, "FileExistsError")
    with expects(error, words):
        afa.save_adapter(sharded(), folder / "occupied")


def check_fsdp2_sharded_checkpoint(folder: Path) -> None:
    made = sharded()
    afa.set_alpha_t(made, 0.25)
    dcp.save({"model": get_model_state_dict(made)}, checkpoint_id=folder / "dcp")
    other = sharded()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state["model"])
    assert_parameters(other, model())
    assert all(m.alpha_t == 0.25 for m in other.modules() if isinstance(m, afa.AFALinear))
    x, _ = data()
    torch.testing.assert_close(other(x), made(x))


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        failure = ""
        try:
            CHECKS[name](folder)
        except Exception:
            failure = traceback.format_exc()
        # A failure of one process is one of all: otherwise they would wait for it for ever.
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = "\n".join(f for f in failures if f)
    if dist.get_rank() == 0:
        Path(folder / "results.json").write_text(json.dumps(results))


CHECKS = {
    name: check
    for source in map(
        vars, (distributed_adapters, distributed_experts, distributed_tensor_parallel, sys.modules[__name__])
    )
    for name, check in source.items()
    if name.startswith("check_")
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CHECKS))
    # The process groups are not destroyed: gloo's threads need no orderly end, and torch may wait for one, as torch 2.6
    # does for the groups of a device mesh and torch's exit handlers for those that are left.
    sys.stdout.flush()
    os._exit(0)
