"""Flags of grpo.py beside those of the Trainer and of LoRA."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import NamedTuple

from reclingua.training.arguments import LoraArguments, TuningArguments, argument, first_given, parse
from reclingua.training.rewards import REWARDS, parse_rewards
from reclingua.utils.errors import InputError

LOSSES = ("grpo", "sdpo")
DEFAULT_BETA = {"grpo": 0.04, "sdpo": 1.0}  # those of the papers
# Flags that a resumed training need not share.
FREE = ("ckpt_path", "base_model", "dataset", "data_path", "max_eval_samples", "patience")


@dataclass
class PolicyArguments:
    """The checkpoint, its candidates, their rewards, and the loss."""

    _argument_group_name = "policy"

    ckpt_path: str | None = argument(default=None, help="folder written by finetune.py --method lcrec (required)")
    base_model: str | None = argument(
        default=None, help="base model of an adapter checkpoint, overrides the stored path"
    )
    dataset: str | None = argument(default=None, help="name of the dataset; if omitted, that of the checkpoint")
    data_path: str = argument(default="data", help="folder that holds <dataset>/")
    num_generations: int = argument(default=16, help="candidates of a prompt")
    candidates: str = field(
        default="beam",
        metadata={
            "help": "beam: the best items by beam search; sample: items drawn without replacement (stochastic beam "
            "search)",
            "choices": ("beam", "sample"),
        },
    )
    add_target: bool = argument(
        default=False, help="put the target in the last place of a list without it; if omitted, such lists are skipped"
    )
    rewards: str = argument(
        default="rank_penalty", help=f"rewards with weights, such as exact:1,prefix:0.5, of: {', '.join(REWARDS)}"
    )
    loss: str = field(
        default="grpo",
        metadata={
            "help": "grpo: clipped policy gradient; sdpo: the target is preferred to all other candidates, whatever "
            "the rewards",
            "choices": LOSSES,
        },
    )
    beta: float | None = argument(
        default=None, help="grpo: weight of the KL divergence from the checkpoint (0.04); sdpo: scale of margins (1.0)"
    )
    clip_range: float = argument(default=0.2, help="grpo: largest rewarded deviation of the probability ratio from 1")
    updates_per_rollout: int = argument(default=1, help="updates with the same candidates")
    score_over: str = field(
        default="vocabulary",
        metadata={
            "help": "probabilities over the whole vocabulary, or over the tokens that can follow in the trie",
            "choices": ("vocabulary", "trie"),
        },
    )
    exclude_seen: bool = argument(default=False, help="leave the user's own items out of candidates and evaluation")
    max_eval_samples: int = argument(
        default=0, help="valid users searched for at each evaluation, both halves together; 0 = all"
    )
    patience: int = argument(default=0, help="stop after so many evaluations without improvement; 0 = never")

    def check(self) -> None:
        """Raise InputError for values that are out of range."""
        if not self.ckpt_path:
            raise InputError("--ckpt_path is required; see --help")
        if self.num_generations < 2:
            raise InputError(
                f"--num_generations {self.num_generations}: should be 2 at least, since candidates are compared"
            )
        parse_rewards(self.rewards)
        if not math.isfinite(self.scale) or self.scale < 0 or (self.loss == "sdpo" and not self.scale):
            raise InputError(f"--beta {self.beta}: should be 0 at least, and above 0 with --loss sdpo")
        if not 0 < self.clip_range < 1 or self.updates_per_rollout < 1 or self.patience < 0:
            raise InputError(
                "--clip_range should be between 0 and 1, --updates_per_rollout 1 at least, --patience 0 at least"
            )
        if self.max_eval_samples < 0 or self.max_eval_samples == 1:
            raise InputError("--max_eval_samples should be 0 or 2 at least: the users are split in two halves")

    @property
    def scale(self) -> float:
        """`beta`, or its default for this loss."""
        return DEFAULT_BETA[self.loss] if self.beta is None else self.beta

    @property
    def shared(self) -> dict[str, object]:
        """The flags that a resumed training has to share."""
        return {name: value for name, value in asdict(self).items() if name not in FREE} | {"beta": self.scale}


@dataclass
class PolicyTuningArguments(TuningArguments):
    """The flags of the Trainer, with defaults for short runs that are evaluated often."""

    _argument_group_name = "training"

    per_device_train_batch_size: int = argument(
        default=64, aliases=["--per_device_batch_size"], help="prompts per device and step"
    )
    num_train_epochs: float = argument(default=1, aliases=["--epochs"], help="passes over the training prompts")
    learning_rate: float = argument(default=1e-5, help="peak learning rate of AdamW")
    weight_decay: float = argument(default=0.0, help="weight decay of AdamW")
    per_device_eval_batch_size: int = argument(default=64, help="users per device and search")
    eval_strategy: str = argument(default="steps", help="when to evaluate: no, steps, epoch")
    save_strategy: str = argument(default="steps", help="when to save a checkpoint: no, steps, epoch")
    save_steps: float = argument(default=100, help="steps between checkpoints; below 1: share of all steps")
    logging_steps: float = argument(default=10, help="steps between two lines of the training log")
    metric_for_best_model: str | None = argument(
        default="ndcg@10", help="metric on the first half of the valid users that selects the checkpoint"
    )

    def __post_init__(self):
        if self.deepspeed:
            raise ValueError("--deepspeed is not supported here; start several processes with torchrun alone")
        if self.gradient_checkpointing:
            raise ValueError("--gradient_checkpointing has no effect here: candidates are scored without dropout")
        super().__post_init__()
        # The checkpoint itself is the first candidate for the best model.
        self.eval_on_start = self.eval_on_start or self.load_best_model_at_end


class PolicyRunArguments(NamedTuple):
    """All flags of grpo.py, by group."""

    policy: PolicyArguments
    lora: LoraArguments
    training: PolicyTuningArguments


def parse_policy_arguments(description: str) -> PolicyRunArguments:
    """Return the flags of the command line; InputError for values that are out of range."""
    args = PolicyRunArguments(*parse([PolicyArguments, LoraArguments, PolicyTuningArguments], description))
    args.policy.check()
    if not args.training.output_dir:
        raise InputError("--output_dir is required; see --help")
    if args.training.metric_for_best_model not in ("hit@10", "ndcg@10"):
        raise InputError(f"--metric_for_best_model {args.training.metric_for_best_model}: should be hit@10 or ndcg@10")
    flags = [entry.name for entry in fields(args.lora)]
    if not args.lora.lora and (given := first_given(args.lora, flags)):
        raise InputError(f"--{given} has no effect without --lora; leave it out")
    return args
