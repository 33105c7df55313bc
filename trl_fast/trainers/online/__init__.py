"""Parts of the trainers that sample completions: GRPO, RLOO and, where it is alike, PPO."""
