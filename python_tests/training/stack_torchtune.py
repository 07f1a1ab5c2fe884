"""What the test of torchtune runs inside its environment: a configuration for the model and the data that
stack_worker.py writes, which ``python -m stack_torchtune`` writes down, and a recorder, the twin of its own."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

CONFIG = {
    "output_dir": "./out",
    "model": {
        "_component_": "torchtune.models.llama3.lora_llama3",
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
        "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "vocab_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 16, "max_seq_len": 64,
        "intermediate_dim": 32, "norm_eps": 1e-6, "rope_base": 10000,
    },
    "tokenizer": {"_component_": "stack_torchtune.WordTokenizer", "folder": "./model"},
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": "./model", "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None,
        "output_dir": "${output_dir}", "model_type": "LLAMA3",
    },
    "resume_from_checkpoint": False,
    "save_adapter_weights_only": True,  # as the page says of a CPU
    "dataset": {
        "_component_": "torchtune.datasets.text_completion_dataset",
        "source": "json", "data_files": "data.jsonl", "split": "train",
    },
    "seed": 0,
    "shuffle": True,
    "batch_size": 4,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.02},
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 1,
    },
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "epochs": 2,
    "max_steps_per_epoch": 10,
    "gradient_accumulation_steps": 1,
    "compile": False,
    "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"},
    "device": "cpu",
    "dtype": "fp32",
}  # fmt: skip


class WordTokenizer:
    """torchtune has a tokenizer for each model alone."""

    max_seq_len, pad_id, eos_id = None, 0, 1

    def __init__(self, folder: str):
        self.words = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def encode(self, text: str, add_bos: bool, add_eos: bool) -> list[int]:
        return self.words.encode(text).ids + [self.eos_id] * add_eos


def record(recipe) -> dict:
    """Train with a recipe that has been set up, and return what tests want to know."""
    model, alphas = recipe._model, []
    layers = [module for module in model.modules() if hasattr(module, "set_alpha_t")]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe._optimizer.register_step_pre_hook(lambda *_: alphas.append(layers[0].alpha_t.item()))
    losses, log_dict = [], recipe._metric_logger.log_dict
    recipe._metric_logger.log_dict = lambda values, step: (losses.append(values["loss"].item()), log_dict(values, step))
    recipe.train()
    assert all(layer.alpha_t == 0.0 for layer in layers)
    computed = logits(model)
    for layer in layers:
        layer.set_alpha_t(1.0)
    return {
        "alphas": alphas,
        "losses": losses,
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "changed": [name for name, p in model.named_parameters() if not torch.equal(p, before[name])],
        "logits": computed,
        "difference": (logits(model) - computed).abs().max().item(),
    }


@torch.no_grad()
def logits(model) -> torch.Tensor:
    parts = model(torch.arange(3, 19)[None])
    return torch.cat(parts, dim=1) if isinstance(parts, list) else parts


if __name__ == "__main__":
    Path("config.yaml").write_text(json.dumps(CONFIG))  # which is YAML too
