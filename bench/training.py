"""``python -m bench.training``: peak memory and time of a training step, of ways to train and of frozen weights.

A step is forward, backward and AdamW of a small model of transformers, on random tokens. Time: all methods of a cell
take turns in one process, as in every benchmark here. Memory: each method runs in a process
of its own, where Linux keeps the peak of the resident set (bench.resident says how). The size of that process before
the model was made is taken off, so weights, adapters, gradients, the optimizer's state and temporary results count.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import nn

import afa_kernels
from bench import allocator, memory, quantize, resident
from bench.environment import environment
from bench.timing import Work, clock_of, measure, quantile, ratio
from bench.transformer import MLP

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
}
MODELS = {"llama": ("Llama", {}), "qwen3": ("Qwen3", {"head_dim": 128})}
RANK = 16
WARM_UP = 2  # steps: the first one makes gradients and the optimizer's state


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _peft(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, target_modules=list(LINEAR)))


def _afa(model: nn.Module) -> nn.Module:
    from peft import get_peft_model

    from afa_kernels.peft import AFALoraConfig

    model = get_peft_model(model, AFALoraConfig(r=RANK, target_modules=list(LINEAR)))
    return afa_kernels.share_inputs(model)  # as callbacks and schedules do


def _block(model: nn.Module) -> nn.Module:
    return afa_kernels.fuse_mlp(_afa(model))


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {"full": _full, "peft": _peft, "afa": _afa, "afa.block": _block}


class Step:
    """A training step of one method."""

    def __init__(self, model: str, base: str, method: str, checkpointing: bool, layers: int, tokens: int):
        import transformers

        torch.manual_seed(0)
        name, options = MODELS[model]
        config = getattr(transformers, f"{name}Config")(**SIZES, **options, num_hidden_layers=layers)
        self.model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).requires_grad_(False)
        quantize.BASES[base](self.model, LINEAR)
        self.model = METHODS[method](self.model).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.tokens = torch.randint(SIZES["vocab_size"], (2, tokens // 2))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)

    def __call__(self, _: object = None) -> None:
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak_bytes(*cell: object) -> int:
    """Return what the steps of a cell take at most, in this process, which has done nothing else."""
    resident.count_exactly()
    import peft  # noqa: F401, not a part of the model
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import afa_kernels.peft  # noqa: F401

    quantize.BASES[cell[1]](nn.Sequential(), ())  # its library
    before = resident.present_bytes()
    step = Step(*cell)
    for _ in range(WARM_UP):
        step()
    return resident.peak_bytes(step) - before


def in_a_process(*cell: object) -> int:
    command = [sys.executable, "-W", "ignore", "-m", "bench.training", "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    for model, base, checkpointing in product(arguments.models, arguments.bases, arguments.checkpointing):
        on, sizes = checkpointing == "on", (arguments.layers, arguments.tokens)
        # A quantized weight cannot be trained.
        cells = {m: (model, base, m, on, *sizes) for m in arguments.methods if base == "dense" or m != "full"}
        peaks = {method: in_a_process(*cell) for method, cell in cells.items()}
        steps = {method: Step(*cell) for method, cell in cells.items()}
        works = {method: Work(lambda: None, {"step": step}) for method, step in steps.items()}
        measure(works, clock_of("cpu"), arguments.seconds, arguments.precision)
        times = {method: work.samples["step"] for method, work in works.items()}
        for method in cells:
            row = {"kind": "training", "model": model, "base": base, "checkpointing": checkpointing, "method": method}
            row |= {"peak_mb": peaks[method] / 1e6, "ms": quantile(times[method], 0.5)}
            if "peft" in times:
                row["of_peft"] = ratio(times[method], times["peft"]).middle
            yield row


def saved() -> str:
    """Return the bytes that an MLP of Llama-3-8B keeps for its backward, of 8192 tokens in bfloat16 and rank 16. All of
    these sizes are measured at an eighth, of which every product is a 64th."""
    from peft import LoraConfig, get_peft_model

    def of_peft(mlp: nn.Module, autocast: bool) -> nn.Module:
        config = LoraConfig(r=RANK // 8, target_modules=list(LINEAR))
        return get_peft_model(mlp, config, autocast_adapter_dtype=autocast)

    names, lines = ["gate_proj", "up_proj", "down_proj"], ["| | GB |", "| --- | --- |"]
    ways = {
        "block": lambda mlp: afa_kernels.inject(nn.Sequential(mlp), names, r=RANK // 8, fuse_mlp=True),
        "its parts": lambda mlp: afa_kernels.inject(mlp, names, r=RANK // 8),
        "PEFT, adapters in bfloat16": lambda mlp: of_peft(mlp, False),
        "PEFT, adapters in float32": lambda mlp: of_peft(mlp, True),
    }
    for name, adapted in ways.items():
        mlp = adapted(MLP(4096 // 8, 14336 // 8).to(torch.bfloat16))
        x = torch.randn(1, 8192 // 8, 4096 // 8, dtype=torch.bfloat16)
        kept = memory.saved_bytes(lambda mlp=mlp, x=x: mlp(x), mlp.parameters())
        lines.append(f"| {name} | {64e-9 * kept:.3f} |")
    return "\n".join(lines)


def markdown(found: list[dict[str, object]]) -> str:
    """Return a table with a row for each cell, and for each method its peak in MB and its time over PEFT's."""
    methods = [name for name in METHODS if any(row["method"] == name for row in found)]
    by_cell: dict[tuple, dict[str, dict]] = {}
    for row in found:
        by_cell.setdefault((row["model"], row["base"], row["checkpointing"]), {})[row["method"]] = row

    def shown(row: dict[str, object] | None) -> str:
        if row is None:
            return "–"
        return f"{row['peak_mb']:.0f} MB, {row['ms']:.0f} ms" + (f" ({row['of_peft']:.2f})" if "of_peft" in row else "")

    head = ["model", "frozen weights", "checkpointing", *methods]
    lines = [head, ["---"] * len(head)]
    lines += [[*cell, *(shown(own.get(method)) for method in methods)] for cell, own in by_cell.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(known) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        wrong = [name for name in names if name not in known]
        if wrong:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {wrong[0]}")
        return names

    return parse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    add = parser.add_argument
    add("--models", type=_listed(MODELS), default=list(MODELS), help=", ".join(MODELS))
    add("--bases", type=_listed(quantize.BASES), default=["dense", "nf4"], help=", ".join(quantize.BASES))
    add("--methods", type=_listed(METHODS), default=list(METHODS), help=", ".join(METHODS))
    add("--checkpointing", type=_listed(("off", "on")), default=["off", "on"])
    add("--layers", type=int, default=4)
    add("--tokens", type=int, default=1024)
    add("--seconds", type=float, default=20.0, help="of timing per cell, at most")
    add("--precision", type=float, default=0.01, help="of the ratios; a cell ends at it")
    add("--saved", action="store_true", help="what an MLP of Llama-3-8B keeps for its backward, and nothing else")
    add("--out", type=Path, help="a file for the results, as lines of JSON")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if arguments.cell:
        print(peak_bytes(*arguments.cell))
        return 0
    if arguments.saved:
        print(saved())
        return 0
    allocator.use("keep")
    command = " ".join(["python -m bench.training", *(sys.argv[1:] if argv is None else argv)])
    records = [environment("cpu", command=command)]
    for row in rows(arguments):
        print(json.dumps(row), file=sys.stderr, flush=True)
        records.append(row)
    if arguments.out:
        arguments.out.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    print(markdown(records[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
