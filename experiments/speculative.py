"""Train a draft model for speculative decoding by LoRA, AFA-LoRA and full fine-tuning, and decode with it.

    python -m experiments.pretrain --hidden 96 --layers 2 --steps 800 --output outputs/draft     the draft
    python -m experiments.pretrain
    python -m experiments.warm_up english                                                        the target
    python -m experiments.speculative --config experiments/configs/speculative.yaml
    python -m experiments.speculative --config experiments/configs/speculative.yaml --tune    choose the learning rates
    torchrun --nproc-per-node 2 -m experiments.speculative --config experiments/configs/speculative.yaml

The draft, which knows the source of the standard library, learns to continue English text as the target does. What is
compared is measured in real speculative decoding (``generate(assistant_model=...)``) of the merged draft; its texts
have to be those of the target alone, else the command ends with exit code 1, as it does where a merged model does not
agree with its adapter. Cells, resuming and ``--tune`` are those of ``sft.py``.
"""

import sys

from experiments import sft
from experiments.harness.drafting import Drafting, DraftSettings


def main(argv: list[str] | None = None) -> int:
    return sft.command("speculative", argv, __doc__, DraftSettings, Drafting)


if __name__ == "__main__":
    sys.exit(main())
