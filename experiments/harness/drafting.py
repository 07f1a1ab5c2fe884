"""The task of ``speculative.py``: a draft model learns to continue a text as a larger target would."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import afa_kernels as afa
from experiments.harness import speculative
from experiments.harness.sft_config import Settings, _setting
from experiments.harness.sft_tasks import LanguageModelling, _device, _digest, _weights
from experiments.harness.speculative import Decoded

TARGET_FOLDER = Path("outputs/target")
DRAFT_FOLDER = Path("outputs/draft")
PARTS = ("train", "validation", "test")
_GENERATED_AT_ONCE = 64


@dataclass(frozen=True)
class DraftSettings(Settings):
    """Everything that a run of ``speculative.py`` depends on; ``model`` is the target."""

    model: str | None = _setting(None, "target: Hugging Face id or folder; default: the byte model of warm_up.py")
    draft: str | None = _setting(None, "draft, which is trained; default: a small byte model of pretrain.py")
    prompt_length: int = _setting(32, "tokens of a sample that are text; the target continues them to --length tokens")
    train_prompts: int = _setting(1024, "prompts that the target continues to train on")
    validation_prompts: int = _setting(128, "prompts to choose learning rates on")
    test_examples: int | None = _setting(32, "prompts of the final score")
    draft_tokens: int = _setting(5, "tokens that the draft proposes for each call of the target")
    output: str = _setting("outputs/speculative", "folder of all results")

    def __post_init__(self):
        super().__post_init__()
        if self.task != "lm":
            raise ValueError(f"task: expected lm, got {self.task!r}")
        for name in ("prompt_length", "train_prompts", "validation_prompts", "draft_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)!r}")
        if self.prompt_length >= self.length:
            raise ValueError(f"prompt_length: expected less than length={self.length}, got {self.prompt_length}")


class Drafting(LanguageModelling):
    """Distillation on the target's own continuations: the loss is the draft's on the target's greedy tokens.

    A score of the validation part comes from one forward of the draft, the test score from real speculative decoding
    of the merged draft, whose texts are checked against the target's own.
    """

    metric = "tokens per target call"
    higher_is_better = (metric, "accepted draft tokens per call")

    def __init__(self, settings: DraftSettings):
        self.settings = settings
        self.target_path = settings.model or TARGET_FOLDER
        path = settings.draft or DRAFT_FOLDER
        for folder, given in ((self.target_path, settings.model), (path, settings.draft)):
            if given is None and not (folder / "config.json").is_file():
                raise SystemExit(f"no model in {folder}: experiments/README.md says how it is made")
        super().__init__(replace(settings, model=str(path)))
        self.metric = Drafting.metric  # not the loss of the language model
        # In bfloat16, rounding chooses another of two like tokens at times when several are checked in one call.
        self.target = AutoModelForCausalLM.from_pretrained(self.target_path, dtype=torch.float32)
        self.target.requires_grad_(False)
        if torch.cuda.is_available():
            self.target.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
        speculative.prepare_for_greedy(self.target)
        sizes = [AutoConfig.from_pretrained(p).get_text_config().vocab_size for p in (self.target_path, path)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"draft: expected the target's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
        self.prompts = {part: self._prompts_of(part) for part in PARTS}
        self.continuations = self._stored("continuations", self._continue_all)
        # One at a time, as in speculative decoding: in a batch, rounding may choose another of two like tokens.
        self.expected = self._stored("expected", self._continue_test_prompts)["test"]

    def _prompts_of(self, part: str) -> Tensor:
        settings, ids = self.settings, self.parts[part]
        limit = {
            "train": settings.train_prompts,
            "validation": settings.validation_prompts,
            "test": settings.test_examples or DraftSettings.test_examples,
        }[part]
        starts = torch.linspace(0, len(ids) - settings.prompt_length, limit).round().long()
        return ids[starts.unsqueeze(1) + torch.arange(settings.prompt_length)]

    def _continue_all(self) -> dict[str, Tensor]:
        new = self.settings.length - self.settings.prompt_length
        result = {}
        for part, prompts in self.prompts.items():
            pieces = prompts.split(_GENERATED_AT_ONCE)
            bar = tqdm(pieces, desc=f"target continues ({part})", unit="batch")
            result[part] = torch.cat([speculative.greedy(self.target, piece, new) for piece in bar])
        return result

    def _continue_test_prompts(self) -> dict[str, Tensor]:
        new = self.settings.length - self.settings.prompt_length
        rows = [speculative.greedy(self.target, prompt.unsqueeze(0), new) for prompt in self.prompts["test"]]
        return {"test": torch.cat(rows)}

    def _stored(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return what ``make`` gives, from its file if it was made before."""
        digest = _digest(repr((self.fingerprint(), self.settings.length)).encode())
        file = Path(self.settings.output) / f"{name}-{digest}.pt"
        if not file.is_file():
            made = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{torch.randint(2**31, ()).item()}.tmp")  # other processes make it too
            torch.save(made, temporary)
            temporary.replace(file)
        return torch.load(file, weights_only=True)

    def fingerprint(self) -> dict[str, Any]:
        prompts = _digest(*(self.prompts[part].numpy().tobytes() for part in PARTS))
        return super().fingerprint() | {"target": _weights(self.target_path), "prompts": prompts}

    def batch(self, size: int, seed: int, step: int) -> Tensor:
        """Return prompts with their continuations, ``(size, length)``; none is repeated before all were used."""
        count = len(self.prompts["train"])
        places = torch.arange(step * size, (step + 1) * size)
        rows = []
        for place in places.tolist():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + place // count)
            rows.append(torch.randperm(count, generator=generator)[place % count])
        chosen = torch.stack(rows)
        return torch.cat([self.prompts["train"][chosen], self.continuations["train"][chosen]], dim=1)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of the target's tokens."""
        tokens = batch.to(_device(model))
        first = self.settings.prompt_length
        logits = model(input_ids=tokens, use_cache=False).logits[:, first - 1 : -1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, first:].flatten())

    def score(self, model: nn.Module, part: str, limit: int | None = None) -> dict[str, float]:
        training = model.training
        if part == "test":
            decoded = self._decode(model)
        else:
            decoded = speculative.expected_decoding(
                model, self.prompts[part][:limit], self.continuations[part][:limit], self.settings.draft_tokens
            )
        model.train(training)
        return _scores(decoded)

    def _decode(self, model: nn.Module) -> Decoded:
        merged = copy.deepcopy(model)
        if any(isinstance(m, afa.AFALinear) for m in merged.modules()):
            afa.unload(afa.merge(merged))
        device = _device(self.target)
        merged.to(device, torch.float32)
        speculative.prepare_for_greedy(merged)
        with torch.autocast(device.type, enabled=False):
            return speculative.decode(
                self.target, merged, self.prompts["test"], self.expected, self.settings.draft_tokens
            )


def _scores(decoded: Decoded) -> dict[str, float]:
    return {
        "tokens per target call": decoded.tokens_per_target_call,
        "accepted draft tokens per call": decoded.accepted_per_call,
        "target calls": decoded.target_calls,
        "prompts with the target's own text": decoded.prompts,
    }
