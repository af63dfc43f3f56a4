"""Reinforcement learning after supervised fine-tuning (SFT): a checkpoint of lcrec, its prompts, its evaluation.

The losses are those of reclingua/training/policy_loss.py; grpo.py calls the three functions below in their order.
"""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from reclingua.datasets.interactions import InteractionDataset
from reclingua.datasets.next_item_prompts import NextItemPrompts, PromptCollator
from reclingua.datasets.tasks import held_out_samples, next_item_samples, seqrec_task
from reclingua.inference.loading import (
    build_instructions,
    check_context_length,
    load_base_model,
    load_language_model,
    load_metadata,
    load_next_item_dataset,
)
from reclingua.inference.policy import CandidatePolicy
from reclingua.inference.recommender import Recommender
from reclingua.methods.lcrec import EVAL_METRICS, LORA_DEFAULTS
from reclingua.methods.setup import Log, TrainingSetup
from reclingua.metrics import ranking_metrics
from reclingua.models.language import absolute_name, base_fingerprint, check_base_model, load_tokenizer
from reclingua.models.lora import add_lora_adapter, load_lora
from reclingua.models.vocabulary import index_token_ids
from reclingua.training.checkpoints import checkpoint_to_resume
from reclingua.training.policy_arguments import PolicyRunArguments
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata
from reclingua.utils.provenance import file_sha256

OTHER_HALF = "other"  # prefix of the metrics on the valid users that do not select the checkpoint


@dataclass(frozen=True)
class PolicyData:
    """The dataset of a checkpoint, what the trained model will state of itself, and where training resumes."""

    folder: Path
    dataset: InteractionDataset
    initial: CheckpointMetadata
    metadata: CheckpointMetadata
    checkpoint: Path | None


def build_data(args: PolicyRunArguments, log: Log) -> PolicyData:
    """Open the checkpoint's dataset; InputError for a checkpoint of another method or of other histories."""
    policy, folder = args.policy, Path(args.policy.ckpt_path or "")
    initial = load_metadata(folder)
    if initial.method != "lcrec":
        raise InputError(f"{folder}: was made by {initial.method!r}, which recommends no items; give one of lcrec")
    if policy.base_model and not initial.lora:
        raise InputError("--base_model: the checkpoint has all weights; leave it out")
    if initial.lora and args.lora.lora:
        raise InputError(
            "--lora has no effect with a LoRA checkpoint, whose weights are trained further; leave it out"
        )
    dataset = load_next_item_dataset(folder, initial, policy.data_path, policy.dataset)
    if dataset.sha256("histories") != initial.histories_sha256:
        path = dataset.folder / f"{dataset.name}.inter.json"
        raise InputError(f"{path}: are not the histories that {folder} was tuned on; restore them, or tune it again")
    if len(dataset.test_users) < 2:
        raise InputError(f"{dataset.folder}: has fewer than two valid users; grpo.py needs two halves of them")
    training: dict[str, object] = {"seed": args.training.seed, "init_from": absolute_name(folder), **policy.shared}
    metadata = replace(initial, dataset=dataset.name, training=training)
    if initial.lora:
        base_model = absolute_name(policy.base_model or initial.base_model or "")
        training["adapter_sha256"] = file_sha256(folder / "adapter_model.safetensors")
        metadata = replace(metadata, base_model=base_model)
    else:
        lora = args.lora.low_rank(*LORA_DEFAULTS) if args.lora.lora else None
        base_model, sha256 = absolute_name(folder), base_fingerprint(folder)
        metadata = replace(metadata, base_model=base_model, base_sha256=sha256, lora=lora)
    checkpoint = checkpoint_to_resume(args.training, metadata)
    log(f"{dataset.name}: {len(dataset.test_users):,} valid users, {len(dataset.index):,} items")
    return PolicyData(folder, dataset, initial, metadata, checkpoint)


def build_model(args: PolicyRunArguments, data: PolicyData, log: Log) -> tuple[TrainingSetup, CandidatePolicy]:
    """Load the model and write the training items' prompts; the policy keeps a copy of the trained weights."""
    tokenizer = load_tokenizer(data.folder)
    token_ids = index_token_ids(tokenizer, data.dataset.index)
    if data.initial.lora:
        model = load_base_model(data.metadata, args.training.device)
        check_base_model(data.metadata.base_model or "", data.initial.checked_base_sha256, data.folder)
        model = load_lora(model, tokenizer, data.folder, is_trainable=True)
    else:
        model, _ = load_language_model(data.folder, data.initial, args.training.device)
        if data.metadata.lora:
            tokens = sorted({token for ids in token_ids.values() for token in ids})
            model = add_lora_adapter(model, tokens, **data.metadata.lora)
    model.to(args.training.device).eval()  # type: ignore[arg-type]  # a PreTrainedModel's own annotation
    model.config.use_cache = False  # training needs none; the search asks for it
    log(f"{data.folder}: {model.num_parameters(only_trainable=True):,} trained parameters")
    recommender = Recommender(model, tokenizer, data.dataset, data.metadata)
    settings = args.policy
    policy = CandidatePolicy(
        recommender,
        settings.num_generations,
        settings.candidates,  # type: ignore[arg-type]  # one of the choices
        settings.score_over,
    )
    samples = next_item_samples(data.dataset, recommender.task, data.metadata.max_his_len)
    prompts = {recommender.task: [recommender.templates[number] for number in recommender.prompt_ids]}
    instructions = build_instructions(
        samples, data.dataset, tokenizer, prompts, token_ids, data.metadata, seed=args.training.seed
    )
    train = NextItemPrompts(instructions, recommender.trie.item_to_number, settings.exclude_seen)
    lengths = train.lengths(longest=True)
    check_context_length(model, int(lengths.max()))
    valid = held_out_samples(data.dataset, "valid", seqrec_task(data.metadata.targets or "last"), 1)
    log(f"  {len(train):,} training prompts")
    setup = TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        train=train,
        valid=valid,
        collator=PromptCollator(tokenizer),
        lengths=lengths,
        metadata=data.metadata,
        checkpoint=data.checkpoint,
        find_unused_parameters=False,
    )
    return setup, policy


def build_evaluation(args: PolicyRunArguments, data: PolicyData, setup: TrainingSetup) -> Callable[[], dict]:
    """Return a function that computes hit@10 and ndcg@10 on each half of the valid users.

    The first half selects the checkpoint. The metrics of the other half, `other_ndcg@10`, select nothing, so that they
    show whether a gain on the first half is one on users that were not looked at.
    """
    dataset, count = data.dataset, args.policy.max_eval_samples
    users = random.Random(0).sample(dataset.test_users, len(dataset.test_users))[: count or None]
    recommender = Recommender(setup.model, setup.tokenizer, dataset, setup.metadata)
    seen, targets = zip(*(dataset.split(user, "valid") for user in users), strict=True)
    prompts = recommender.encode(recommender.encode_histories(seen), recommender.prompt_ids[0])
    excluded = seen if args.policy.exclude_seen else None
    middle = (len(users) + 1) // 2

    def compute_valid_metrics() -> dict[str, float]:
        lists = recommender.search(prompts, 10, excluded, args.training.per_device_eval_batch_size)
        ranked = [[scored.item for scored in entries] for entries in lists]
        first, other = (
            ranking_metrics(ranked[part], list(targets[part]), EVAL_METRICS)
            for part in (slice(middle), slice(middle, None))
        )
        return first | {f"{OTHER_HALF}_{name}": value for name, value in other.items()}

    return compute_valid_metrics


def run_flags(args: PolicyRunArguments) -> dict[str, object]:
    """Return the flags that are written beside the tuned model, without those of the Trainer."""
    return asdict(args.policy) | asdict(args.lora)
