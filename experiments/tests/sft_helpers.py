"""Tiny models, data and settings for the tests that fine-tune."""

import json
from pathlib import Path

import torch
import transformers
import yaml

from experiments.harness import bytelm, sft_config, sft_training

ROOT = Path(__file__).resolve().parents[2]
RATES = {"lora": 1e-2, "afa_relu": 1e-2, "afa_silu": 1e-2, "afa_gelu": 1e-2, "full_adapted": 1e-3, "full": 1e-3}
STEPS = 10


def byte_llama(folder: Path) -> Path:
    """Write a byte-level Llama of one layer with random weights."""
    bytelm.new_model(32, 1, seed=0).save_pretrained(folder)
    bytelm.tokenizer().save_pretrained(folder)
    return folder


def byte_bert(folder: Path) -> Path:
    """Write a BERT of two layers with random weights that reads bytes."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=bytelm.VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(folder)
    bytelm.tokenizer().save_pretrained(folder)
    return folder


def license_text(folder: Path) -> Path:
    file = folder / "license.txt"
    file.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return file


def rows_of_two_labels(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    rows = [{"text": f"{'ab'[i % 2] * 4} {i}", "label": "ab"[i % 2]} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def tiny_settings(model: Path, folder: Path) -> sft_config.Settings:
    return sft_config.make(
        {
            "model": str(model),
            "data": str(license_text(folder)),
            "steps": STEPS,
            "batch_size": 2,
            "length": 16,
            "evaluate_every": 5,
            "curve_examples": 2,
            "test_examples": 4,
            "checkpoint_every": 3,
            "seeds": 2,
            "learning_rates": RATES,
            "output": str(folder / "out"),
        }
    )


def write_config(settings: sft_config.Settings, file: Path) -> Path:
    entries = {name: value for name, value in settings.as_dict().items() if value is not None}
    file.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return file


def cell(settings: sft_config.Settings, method: str, seed: int = 0) -> sft_training.Cell:
    return sft_training.Cell(method, seed, RATES[method], settings)
