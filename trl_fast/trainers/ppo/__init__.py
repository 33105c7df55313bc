"""Parts of PPO: config, trainer, critic, rollouts."""
