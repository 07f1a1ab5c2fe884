"""Compare LoRA, AFA-LoRA and full fine-tuning in reinforcement learning: GRPO with a reward that a program verifies.

    python -m experiments.pretrain --hidden 96 --layers 2 --steps 800 --output outputs/draft
    python -m experiments.warm_up operations                                       the policy before
    python -m experiments.rl --config experiments/configs/rl.yaml
    python -m experiments.rl --config experiments/configs/rl.yaml --tune           choose the learning rates
    torchrun --nproc-per-node 2 -m experiments.rl --config experiments/configs/rl.yaml

The policy knows four operations on digits, but not which of them a sign means: it guesses. The reward is 1 for the
right result. Training is TRL's ``GRPOTrainer``. ``--model`` and ``--data`` (columns ``prompt`` and ``answer``) bring
others. Cells, resuming and ``--tune`` are those of ``sft.py``; a merged model that does not agree with its adapter ends
the command with exit code 1.
"""

import sys

from experiments import sft
from experiments.harness import rl_training
from experiments.harness.rl_task import RLSettings, VerifiedAnswers


def main(argv: list[str] | None = None) -> int:
    return sft.command("rl", argv, __doc__, RLSettings, VerifiedAnswers, rl_training.run)


if __name__ == "__main__":
    sys.exit(main())
