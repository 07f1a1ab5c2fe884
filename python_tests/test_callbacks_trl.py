"""The trainers of TRL, each run for a few steps and merged."""

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

import torch
import trl
from datasets import Dataset
from hf_models import WORDS, assert_merges, llama, sentences, tokenizer
from test_callbacks import Recorder

from afa_kernels.callbacks import AnnealCallback
from afa_kernels.peft import AFALoraConfig, AFALoraLayer

COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def sft(model, folder, **shared):
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=folder, **COMMON),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        **shared,
    )


def dpo(model, folder, **shared):
    pairs = {"prompt": sentences(8, 3), "chosen": [" w5 w6"] * 8, "rejected": [" w7 w8"] * 8}
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=folder, **COMMON),
        train_dataset=Dataset.from_dict(pairs),
        **shared,
    )


def grpo(model, folder, **shared):
    def low_words(completions, **_):
        return [float(sum(word in WORDS[:9] for word in c.split())) for c in completions]

    arguments = COMMON | {"per_device_train_batch_size": 8, "beta": 0.1}
    return trl.GRPOTrainer(
        model,
        reward_funcs=low_words,
        args=trl.GRPOConfig(output_dir=folder, num_generations=4, max_completion_length=6, **arguments),
        train_dataset=Dataset.from_dict({"prompt": sentences(8, 3)}),
        **shared,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_a_trainer_anneals_and_its_model_merges(make, tmp_path):
    recorder = Recorder()
    trainer = make(
        llama(),
        str(tmp_path),
        processing_class=tokenizer(),
        peft_config=AFALoraConfig(target_modules="all-linear", r=4, anneal_end_frac=0.5, task_type="CAUSAL_LM"),
        callbacks=[AnnealCallback(), recorder],
    )
    trainer.train()
    assert recorder.in_steps == [1.0, 0.5, 0.0, 0.0]
    layers = [m for m in trainer.model.modules() if isinstance(m, AFALoraLayer)]
    assert len(layers) == 7 and all(layer.alpha_t == 0.0 for layer in layers)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert_merges(trainer.model, llama())
