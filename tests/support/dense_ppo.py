"""PPO as the last one of TRL describes it: padded matrices, plain forward passes, SGD; for a rollout that is given."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

PADDED_LOGPROB = 1.0


@dataclass
class DensePPO:
    """Updates a policy and a value model in place; the matrices are (completions, longest completion)."""

    policy: torch.nn.Module
    value_model: torch.nn.Module
    reward_model: torch.nn.Module
    eos: int
    learning_rate: float
    temperature: float = 0.7
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    missing_eos_penalty: float | None = None
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1

    def __post_init__(self) -> None:
        self.reference = copy.deepcopy(self.policy)

    def logprobs(self, model, row):
        """Log-probabilities and entropies of a completion's tokens, padded."""
        prompt, completion = self.rollout[row]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        table = (logits / (self.temperature + 1e-7)).log_softmax(-1)
        chosen = table[torch.arange(len(completion)), torch.tensor(completion)]
        padding = torch.full((self.width - len(completion),), PADDED_LOGPROB)
        return torch.cat((chosen, padding)), -(table.exp() * table).sum(-1)

    def states(self, row):
        """Values before each of the matrix's columns that are of this completion or the first one behind it."""
        prompt, completion = self.rollout[row]
        hidden = self.value_model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state
        values = self.value_model.score(hidden)[0, len(prompt) - 1 :, 0][: self.width]
        return torch.cat((values, torch.zeros(self.width - len(values))))

    def matrix(self, function, rows):
        return torch.stack([function(row) for row in rows])

    @torch.no_grad()
    def collect(self, rollout):
        """Takes prompts and completions; the targets of the update, and TRL's metrics of the rollout."""
        self.rollout = rollout
        lengths = torch.tensor([len(completion) for _, completion in rollout])
        self.width = int(lengths.max())
        rows, places = range(len(rollout)), torch.arange(self.width)
        self.is_token = places < lengths[:, None]
        self.is_state = places <= lengths[:, None]
        self.old = self.matrix(lambda row: self.logprobs(self.policy, row)[0], rows)
        reference = self.matrix(lambda row: self.logprobs(self.reference, row)[0], rows)
        self.old_values = self.matrix(self.states, rows)
        scores = torch.stack([self.reward_model(torch.tensor([p + c])).logits[0, 0] for p, c in rollout])
        if self.missing_eos_penalty is not None:
            scores -= self.missing_eos_penalty * torch.tensor([self.eos not in c for _, c in rollout])
        d = reference - self.old
        kl = -d if self.kl_estimator == "k1" else d.exp() - 1 - d
        rewards = -self.kl_coef * kl
        for row, length in enumerate(lengths.tolist()):
            rewards[row, length if length < self.width else length - 1] += scores[row]
        if self.whiten_rewards:
            rewards = self.whiten(rewards, self.is_state, shift=False) * self.is_state
        self.advantages, running = torch.zeros_like(rewards), 0.0
        for t in reversed(range(self.width)):
            following = self.old_values[:, t + 1] if t + 1 < self.width else 0.0
            running = rewards[:, t] + self.gamma * following - self.old_values[:, t] + self.gamma * self.lam * running
            self.advantages[:, t] = running
        self.returns = self.advantages + self.old_values
        self.advantages = self.whiten(self.advantages, self.is_token) * self.is_token
        penalty = -self.kl_coef * kl.sum(1).mean()
        return {
            "objective/kl": kl.sum(1).mean(),
            "objective/entropy": -(self.old * self.is_token).sum(1).mean(),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + scores.mean(),
            "objective/scores": scores.mean(),
        }

    @staticmethod
    def whiten(values, mask, shift=True):
        mean = values[mask].mean()
        white = (values - mean) / (values[mask].var() + 1e-8).sqrt()
        return white if shift else white + mean

    def update(self, micro_batches):
        """One step of SGD on both models; the loss is the mean over micro-batches. Metrics by micro-batch."""
        weights = [*self.policy.parameters(), *self.value_model.parameters()]
        for weight in weights:
            weight.grad = None
        found = []
        for rows in micro_batches:
            scored = [self.logprobs(self.policy, row) for row in rows]
            new, token, state = torch.stack([s[0] for s in scored]), self.is_token[rows], self.is_state[rows]
            values, old, returns = self.matrix(self.states, rows), self.old_values[rows], self.returns[rows]
            near = torch.max(torch.min(values, old + self.cliprange_value), old - self.cliprange_value)
            errors, clipped = (values - returns) ** 2, (near - returns) ** 2
            value = 0.5 * torch.max(errors, clipped)[state].mean()
            difference = new - self.old[rows]
            ratio, advantages = difference.exp(), self.advantages[rows]
            plain, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - self.cliprange, 1 + self.cliprange)
            policy = torch.max(plain, bounded)[token].mean()
            ((policy + self.vf_coef * value) / len(micro_batches)).backward()
            metrics = {
                "policy/approxkl_avg": 0.5 * (difference[token] ** 2).mean(),
                "policy/clipfrac_avg": (bounded > plain)[token].float().mean(),
                "loss/policy_avg": policy,
                "loss/value_avg": value,
                "val/clipfrac_avg": (clipped > errors)[state].float().mean(),
                "policy/entropy_avg": torch.cat([s[1] for s in scored]).mean(),
                "val/ratio": ratio[token].mean(),
            }
            found.append({name: value.item() for name, value in metrics.items()})
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight -= self.learning_rate * weight.grad
        return found
