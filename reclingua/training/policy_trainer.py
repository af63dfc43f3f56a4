"""PolicyTrainer: RecTrainer with rollouts, and the losses of reclingua/training/policy_loss.py over them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from reclingua.datasets.samplers import LengthGroupedBatchSampler, RepeatedBatchSampler
from reclingua.training.policy_arguments import PolicyArguments
from reclingua.training.policy_loss import find_informative, group_advantages, grpo_loss, sdpo_loss
from reclingua.training.rewards import Candidates, parse_rewards, total_reward
from reclingua.training.trainer import RecTrainer


@dataclass
class Rollout:
    """The groups of a batch that are trained on.

    Args:
        input_ids, attention_mask: int64 [groups, length], padded on the left.
        items: int64 [groups, candidates], -1 for none.
        is_target: bool [groups, candidates].
        advantages: float32 [groups, candidates].
        weight: float32 [groups], 0 for a group that is there because a batch cannot be empty.
        reference, old: float32 [groups, candidates, depth], log-probabilities of the SFT model, and of the model
            that made the candidates; `old` is empty until the first update.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    items: torch.Tensor
    is_target: torch.Tensor
    advantages: torch.Tensor
    weight: torch.Tensor
    reference: torch.Tensor
    old: torch.Tensor


class PolicyTrainer(RecTrainer):
    """Trainer of a policy on its own candidates.

    Dropout is off: the ratio of an unchanged policy is 1, and its divergence from the SFT model 0. The loss is the
    mean over all prompts of an update, those that are skipped included.

    Args:
        batches: the batches of this process; each is repeated for --updates_per_rollout.
        policy: a CandidatePolicy around the model.
        settings: the flags of the policy.
    """

    def __init__(
        self, *, args: Any, batches: LengthGroupedBatchSampler, policy: Any, settings: PolicyArguments, **kwargs
    ):
        repeated = RepeatedBatchSampler(batches, args.gradient_accumulation_steps, settings.updates_per_rollout)
        super().__init__(args=args, batches=repeated, max_logits_mb=None, **kwargs)
        self.policy, self.settings = policy, settings
        self.weights = parse_rewards(settings.rewards)
        # Labels are the target items, so that the Trainer counts the prompts of an update over all processes.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.rollouts: list[Rollout] = []  # one for each accumulated batch of the current update
        self.step_of_batches = self.num_batches = -1
        self.figures: dict[str, torch.Tensor] = {}  # name -> [sum, count] since the last log
        self.keeps_sft_weights = False

    # ---- Loss ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of a batch of prompts; its candidates are made at the first of --updates_per_rollout."""
        lengths = inputs.pop("lengths")
        self.throughput.add(inputs["labels"], lengths, inputs["input_ids"].numel())
        self.model.eval()
        rollout = self._current_rollout(inputs)
        log_probs, is_token = self.policy.log_probs(
            rollout.input_ids, rollout.attention_mask, rollout.items, forward=model
        )
        if not rollout.old.numel():
            rollout.old = log_probs.detach()
        shared, beta = (rollout.reference, is_token), self.settings.scale
        if self.settings.loss == "sdpo":
            losses, figures = sdpo_loss(log_probs, *shared, rollout.is_target, beta)
        else:
            clip_range = self.settings.clip_range
            losses, figures = grpo_loss(log_probs, rollout.old, *shared, rollout.advantages, clip_range, beta)
        for name, values in figures.items():
            self._add(name, values * rollout.weight, rollout.weight)
        loss = (losses * rollout.weight).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _current_rollout(self, inputs: dict[str, torch.Tensor]) -> Rollout:
        """Return the rollout of a batch: a new one, or that of the first update with these prompts."""
        step = self.state.global_step
        self.num_batches = self.num_batches + 1 if step == self.step_of_batches else 0
        self.step_of_batches = step
        if step % self.settings.updates_per_rollout:
            return self.rollouts[self.num_batches]
        if self.num_batches == 0:
            self.rollouts = []
        self.rollouts.append(self._roll_out(**inputs))
        return self.rollouts[-1]

    @torch.no_grad()
    def _roll_out(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, excluded: torch.Tensor
    ) -> Rollout:
        """Make candidates for the prompts, reward them, and keep the groups from which something can be learned."""
        items, scores = self.policy.propose(input_ids, attention_mask, excluded, self._generator())
        has_target = (items == labels[:, None]).any(1)
        self._add("hit", has_target)
        self._add("entropy", group_entropy(scores))
        if self.settings.add_target:
            column = (items >= 0).sum(1).clamp(max=items.shape[1] - 1)
            rows = (~has_target).nonzero()[:, 0]
            items[rows, column[rows]] = labels[rows]
            self._add("added", ~has_target)
        exists, is_target = items >= 0, items == labels[:, None]
        candidates = Candidates(is_target, exists, self.policy.shared_codes(items, labels))
        rewards = total_reward(self.weights, candidates)
        self._add("reward", rewards.sum(1) / exists.sum(1).clamp(min=1))
        if self.settings.loss == "sdpo":
            is_used = is_target.any(1) & (exists.sum(1) > 1)
        else:
            is_used = find_informative(rewards, exists)
        self._add("skipped", ~is_used)
        rows = is_used.nonzero()[:, 0]
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.int64, device=items.device)
        start = int(attention_mask[rows].any(0).float().argmax())  # where the longest of these prompts begins
        prompts = (input_ids[rows, start:], attention_mask[rows, start:])
        reference = self.policy.reference_log_probs(*prompts, items[rows])
        advantages = group_advantages(rewards, exists)[rows]
        weight, old = is_used[rows].float(), reference.new_empty(0)
        return Rollout(*prompts, items[rows], is_target[rows], advantages, weight, reference, old)

    def _generator(self) -> torch.Generator:
        """Return a random generator that depends on seed, step, batch and process alone, so that runs can resume."""
        state = (self.args.seed, self.state.global_step, self.num_batches, self.args.process_index)
        seed = int(np.random.SeedSequence(state).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.args.device).manual_seed(seed)

    # ---- Log ----

    def _add(self, name: str, values: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        count = torch.tensor(float(len(values)), device=values.device) if weight is None else weight.sum()
        pair = torch.stack([values.float().sum(), count])
        self.figures[name] = self.figures[name] + pair if name in self.figures else pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the loss the means since the last log, over all processes:

        reward (of a candidate), hit (share of lists with the target), entropy (of the candidates' probabilities,
        normalised within the list, nats), skipped and added (shares of prompts), kl, clipped or accuracy.
        """
        if "loss" in logs and self.figures:
            names = sorted(self.figures)
            sums = self.accelerator.reduce(torch.stack([self.figures[name] for name in names]), "sum").tolist()
            logs |= {name: total / max(count, 1e-9) for name, (total, count) in zip(names, sums, strict=True)}
            self.figures = {}
        super().log(logs, start_time)

    # ---- Checkpoints ----

    @property
    def initial_metric(self) -> float | None:
        """The metric of the SFT model that selects the checkpoint; None if it was not evaluated."""
        name = f"eval_{self.args.metric_for_best_model}"
        return next((entry[name] for entry in self.state.log_history if name in entry and not entry["step"]), None)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, or the SFT weights if none is better than them."""
        initial = self.initial_metric
        self.keeps_sft_weights = initial is not None and float(self.state.best_metric or 0) <= initial
        if self.keeps_sft_weights:
            self.policy.restore()
            self.state.best_metric, self.state.best_global_step = initial, 0
        else:
            super()._load_best_model()

    def finish_model(self) -> None:
        """Switch the KV cache of the tuned model on again."""
        self.model.config.use_cache = True

    def describe_choice(self, other: str) -> list[str]:
        """Return lines on the metric before training and of the model that was chosen, on both halves of valid.

        Args:
            other: prefix of the metrics of the half that selects nothing.
        """
        metric, initial = self.args.metric_for_best_model, self.initial_metric
        if initial is None or not self.args.load_best_model_at_end:
            return []
        if self.keeps_sft_weights:
            return [
                f"  no checkpoint is better than valid {metric} {initial:.4f} of the SFT model: its weights are kept"
            ]
        by_step = {entry["step"]: entry for entry in self.state.log_history if f"eval_{metric}" in entry}
        before, after = by_step[0], by_step[self.state.best_global_step or 0]
        halves = {"that selects": f"eval_{metric}", "that selects nothing": f"eval_{other}_{metric}"}
        return [
            f"  {metric} on the half of valid {half}: {before[name]:.4f} before, {after[name]:.4f} after"
            for half, name in halves.items()
        ]

    def _save_rng_state(self, output_dir: str) -> None:
        """Save this process's rollouts as well if the next update uses them again."""
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.settings.updates_per_rollout:
            names = [field.name for field in fields(Rollout)]
            tensors = {
                f"{index}.{name}": getattr(rollout, name).contiguous()
                for index, rollout in enumerate(self.rollouts)
                for name in names
            }
            save_file(tensors, self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or not self.state.global_step % self.settings.updates_per_rollout:
            return
        tensors = load_file(self._rollout_file(checkpoint), device=str(self.args.device))
        names = [field.name for field in fields(Rollout)]
        count = len(tensors) // len(names)
        self.rollouts = [Rollout(*(tensors[f"{index}.{name}"] for name in names)) for index in range(count)]

    def _rollout_file(self, folder: str) -> Path:
        return Path(folder) / f"rollouts_{self.args.process_index}.safetensors"


def group_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each list's probabilities, normalised within the list, in nats, float32 [lists].

    Args:
        scores: log-probabilities, float32 [lists, candidates], -inf for none.
    """
    log_probs = scores - scores.logsumexp(1, keepdim=True)
    return -(log_probs.exp() * log_probs.masked_fill(scores.isneginf(), 0)).nan_to_num().sum(1)
