"""Studies that compare AFA-LoRA with LoRA and full fine-tuning; README.md has the commands."""
