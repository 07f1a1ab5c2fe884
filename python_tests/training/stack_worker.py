"""What the tests of other stacks run inside an environment of a stack: it needs what the stack has, and not this
repository.

``python -m stack_worker write`` makes a tiny model and data in the current folder. :class:`Recorder` is a callback that
writes down what a training did. ``python -m stack_worker check BASE ADAPTER`` compares with it what stock PEFT loads.
"""

import json
import sys
from pathlib import Path

import hf_models
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

RECORD = "record.pt"


def write() -> None:
    """Write ``model`` with its tokenizer, and two files of data with the description of LLaMA-Factory."""
    hf_models.llama().save_pretrained("model")
    hf_models.tokenizer().save_pretrained("model")
    sentences = hf_models.sentences(64, 12)
    rows = {
        "data.jsonl": [{"text": text} for text in sentences],
        "instructions.jsonl": [{"instruction": text[:12], "output": text} for text in sentences],
    }
    for name, lines in rows.items():
        Path(name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    columns = {"prompt": "instruction", "response": "output"}
    Path("dataset_info.json").write_text(json.dumps({"mine": {"file_name": "instructions.jsonl", "columns": columns}}))


class Recorder(TrainerCallback):
    """Writes down the losses, alpha_t of the layers before each step, what trained, and what the model computes in the
    end; and whether alpha_t makes a difference to what the model computes on the way."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.alphas, self.difference = [], 0.0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layers = [module for module in model.modules() if hasattr(module, "set_alpha_t")]
        (alpha_t,) = {layer.alpha_t for layer in layers}
        self.alphas.append(alpha_t)
        if state.global_step == 4:
            was_training, on_the_way = model.training, hf_models.logits(model)
            for value in (0.0, alpha_t):
                for layer in layers:
                    layer.set_alpha_t(value)
                if value == 0.0:
                    self.difference = (hf_models.logits(model) - on_the_way).abs().max().item()
            model.train(was_training)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, self.before[name])]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        logged = [entry["alpha_t"] for entry in state.log_history if "loss" in entry]
        record = {"alphas": self.alphas, "difference": self.difference, "trained": self.trained, "changed": changed}
        record |= {"losses": losses, "logged": logged, "logits": hf_models.logits(model)}
        torch.save(record, RECORD)


def check(base: str, adapter: str | None = None) -> None:
    """Check what a model, with an adapter in stock PEFT, computes, and print the rest of the record."""
    model = AutoModelForCausalLM.from_pretrained(base)
    record = torch.load(RECORD)
    if adapter is not None:
        untrained = hf_models.logits(model)
        assert not torch.allclose(record["logits"], untrained, atol=1e-3), "nothing was learned"
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    torch.testing.assert_close(hf_models.logits(model), record.pop("logits"), atol=1e-4, rtol=1e-4)
    assert "afa_kernels" not in sys.modules
    print(json.dumps(record))


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](*sys.argv[2:])
