"""Compare LoRA, AFA-LoRA and full fine-tuning in reinforcement learning: GRPO with a reward that a program verifies.

    python examples/pretrain.py --hidden 96 --layers 2 --steps 800 --output outputs/draft
    python examples/warm_up.py operations                                    the policy before
    python examples/rl.py --config examples/configs/rl.yaml
    python examples/rl.py --config examples/configs/rl.yaml --tune           choose the learning rates
    torchrun --nproc-per-node 2 examples/rl.py --config examples/configs/rl.yaml

The policy knows four operations on digits, but not which of them a sign means: it guesses. The reward is 1 for the
right result. Training is TRL's ``GRPOTrainer``. ``--model`` and ``--data`` (columns ``prompt`` and ``answer``) bring
others. Cells, resuming and ``--tune`` are those of ``sft.py``; a merged model that does not agree with its adapter ends
the command with exit code 1.
"""

import sys

import sft
from afa_examples import rl_training
from afa_examples.rl_task import RLSettings, VerifiedAnswers


def main(argv: list[str] | None = None) -> int:
    return sft.command("rl", argv, __doc__, RLSettings, VerifiedAnswers, rl_training.run)


if __name__ == "__main__":
    sys.exit(main())
