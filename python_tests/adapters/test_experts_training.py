"""A Qwen3-MoE with adapters on its experts trains in stock Trainer with the callback, injected or through PEFT."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
pytest.importorskip("peft", minversion="0.19")

from expert_models import PARAMETERS, copy_of, mixture
from hf_models import token_rows
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import afa_kernels as afa
from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig


def train(model, folder, **arguments):
    defaults = {
        "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 2e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **(defaults | arguments)),
        train_dataset=token_rows(),
        callbacks=[AnnealCallback(merge=True)],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("through", ["inject", "peft"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trainer(through, dropout, tmp_path):
    base = mixture()
    before = {name: p.clone() for name, p in base.named_parameters()}
    if through == "inject":
        model = afa.inject(copy_of(base), target_parameters=PARAMETERS, r=4, dropout=dropout)
    else:
        options = {"target_parameters": list(PARAMETERS), "target_modules": [], "r": 4, "lora_alpha": 16}
        model = get_peft_model(copy_of(base), AFALoraConfig(lora_dropout=dropout, **options))
    steps = train(model, tmp_path, gradient_checkpointing=bool(dropout))
    assert steps[0]["alpha_t"] > 0.8 and steps[-1]["alpha_t"] == 0.0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    plain = afa.unload(model) if through == "inject" else model.merge_and_unload()
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".experts." in name}
