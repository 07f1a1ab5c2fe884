"""What the tests of litgpt and Lightning run inside an environment that has Lightning and need not have transformers.

``python -m stack_lightning`` makes a tiny model of litgpt and data in the current folder. :class:`Recorder` is the twin
of that of stack_worker.py.
"""

import json
from pathlib import Path

import hf_models
import lightning
import torch
from torch import nn


def write() -> None:
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    torch.manual_seed(0)
    config = Config(
        name="tiny", block_size=64, vocab_size=32, padded_vocab_size=32, n_layer=1, n_head=2, n_query_groups=1,
        n_embd=16, intermediate_size=32, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    folder = Path("model")
    folder.mkdir()
    save_config(config, folder)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    hf_models.vocabulary().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    rows = [{"instruction": text[:12], "output": text} for text in hf_models.sentences(64, 12)]
    Path("data.json").write_text(json.dumps(rows))


class Recorder(lightning.Callback):
    """Writes down the losses, alpha_t of the layers before each step, what trained, and what ``compute`` gives for the
    trained module before anything is merged."""

    def __init__(self, compute):
        self.compute = compute
        self.alphas, self.losses = [], []

    def on_train_start(self, trainer, pl_module):
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.trained = [name for name, p in pl_module.named_parameters() if p.requires_grad]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (alpha_t,) = {module.alpha_t for module in annealed(pl_module)}
        self.alphas.append(alpha_t)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        self.changed = [name for name, p in pl_module.named_parameters() if not torch.equal(p, self.before[name])]
        self.computed = self.compute(pl_module)
        for layer in annealed(pl_module):
            layer.set_alpha_t(1.0)
        self.difference = (self.compute(pl_module) - self.computed).abs().max().item()
        for layer in annealed(pl_module):
            layer.set_alpha_t(0.0)

    def as_json(self) -> str:
        return json.dumps(
            {name: getattr(self, name) for name in ("alphas", "losses", "trained", "changed", "difference")}
        )


def annealed(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if hasattr(layer, "set_alpha_t")]


if __name__ == "__main__":
    write()
