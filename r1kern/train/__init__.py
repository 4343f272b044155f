"""The GRPO loop, supervised fine-tuning, the policy they update and its checkpoints."""
