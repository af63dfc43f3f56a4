"""LC-Rec (arXiv 2311.09049): items become tokens of a language model, which learns to generate the next one."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import datasets
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from reclingua.datasets.collators import CausalLMCollator
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import InteractionDataset, open_interactions, read_raw_ids
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, PromptTemplate, read_prompts
from reclingua.datasets.tasks import TASKS, TEXT_TASKS, USER_TASKS, held_out_samples, seqrec_task, train_samples
from reclingua.datasets.training_histories import training_fingerprints
from reclingua.datasets.user_texts import UserTexts, read_user_texts
from reclingua.inference.loading import (
    build_instructions,
    check_context_length,
    check_same_items,
    describe_difference,
    load_base_model,
    load_metadata,
)
from reclingua.inference.recommender import Recommender
from reclingua.methods.setup import Log, TrainingSetup
from reclingua.metrics import parse_metrics, ranking_metrics
from reclingua.models.architecture import supports_packing
from reclingua.models.language import absolute_name, base_fingerprint, check_base_model, load_tokenizer
from reclingua.models.lora import add_lora_adapter, load_lora
from reclingua.models.vocabulary import extend_vocabulary, index_token_ids
from reclingua.training.arguments import Arguments, MethodArguments, YesNoArguments, refuse_flags
from reclingua.training.checkpoints import checkpoint_to_resume
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import METADATA_FILE, CheckpointMetadata
from reclingua.utils.precision import frozen_dtype

EVAL_METRICS = parse_metrics("hit@10,ndcg@10")
# Flags that a resumed training has to share, beside those that a test needs.
TRAINING_KEYS = (
    "train_prompt_sample_num", "train_data_sample_num", "only_train_response", "packing", "embedding_dropout"
)  # fmt: skip
LORA_DEFAULTS = (32, "all-linear")  # alpha and target layers without flags


@dataclass(frozen=True)
class NextItemData:
    """Samples of the training tasks, and of seqrec on valid; `prompts` are the templates of all these tasks.

    `adapter` is the metadata of --init_from, if that holds LoRA weights.
    """

    dataset: InteractionDataset
    prompts: dict[str, list[PromptTemplate]]
    templates_per_sample: dict[str, int]
    train: datasets.Dataset
    valid: datasets.Dataset
    metadata: CheckpointMetadata
    checkpoint: Path | None
    adapter: CheckpointMetadata | None


def check_flags(args: Arguments) -> None:
    """Raise InputError for flags that contradict each other."""
    refuse_flags("lcrec", args.yes_no, [field.name for field in fields(YesNoArguments)])
    if args.data.max_his_len < 1 and args.data.max_his_len != -1:
        raise InputError(f"--max_his_len {args.data.max_his_len}: should be 1 at least, or -1 for all")
    if not 0 <= args.method.embedding_dropout < 1:
        raise InputError(f"--embedding_dropout {args.method.embedding_dropout}: should be from 0 to below 1")
    if args.data.max_text_len < 1:
        raise InputError(f"--max_text_len {args.data.max_text_len}: should be 1 at least")
    initial = load_initial(args)
    if initial and initial.lora:
        flags = [field.name for field in fields(args.lora) if field.name != "lora"]
        refuse_flags("lcrec and the adapter of --init_from, whose LoRA weights are trained further", args.lora, flags)
    elif initial and args.model.base_model:
        raise InputError("--base_model: the checkpoint of --init_from has all weights; leave it out")
    elif not args.lora.lora:
        if args.model.load_in_4bit or args.model.load_in_8bit or args.model.base_dtype:
            raise InputError(
                "--load_in_4bit, --load_in_8bit and --base_dtype are for base models that stay frozen: give --lora"
            )
        flags = [field.name for field in fields(args.lora) if field.name != "lora"]
        refuse_flags("lcrec without --lora", args.lora, flags)
    if args.model.load_in_4bit and args.model.load_in_8bit:
        raise InputError("--load_in_4bit and --load_in_8bit: give one of them")
    metric = args.training.metric_for_best_model
    if args.training.load_best_model_at_end and metric not in ("loss", *(f"{name}@{k}" for name, k in EVAL_METRICS)):
        raise InputError(f"--metric_for_best_model {metric}: should be hit@10, ndcg@10 or loss")


def build_data(args: Arguments, log: Log) -> NextItemData:
    """Open the dataset and make the samples of --tasks; InputError for data that do not suffice for them."""
    seqrec = seqrec_task(args.method.targets)
    templates_per_sample, counts = parse_per_task_counts(args.method)
    tasks = list(templates_per_sample)
    needs = ["index", "items"] if set(TEXT_TASKS) & set(tasks) else ["index"]
    dataset = open_interactions(args.data.data_path, args.data.dataset, needs, args.data.index_file)
    if initial := load_initial(args):
        check_continuation(args, initial, dataset, log)
    texts = read_user_texts(dataset, args.data.user_file) if set(USER_TASKS) & set(tasks) else None
    prompts = read_prompts(
        args.data.prompt_file or LCREC_PROMPT_FILE, {task: FIELDS[task] for task in dict.fromkeys([seqrec, *tasks])}
    )
    max_his_len = args.data.max_his_len
    if max_his_len == -1:
        max_his_len = max(map(len, dataset.histories.values()))
    seed = args.training.seed
    parts = [train_samples(dataset, task, max_his_len, texts, counts[task], seed) for task in tasks]
    train, valid = datasets.concatenate_datasets(parts), held_out_samples(dataset, "valid", seqrec, max_his_len)
    log(
        f"{dataset.name}: {len(dataset.histories):,} users, {len(dataset.item_ids):,} items, "
        f"{len(train):,} training samples, {len(valid):,} valid"
    )
    if len(parts) > 1:
        log("  " + ", ".join(f"{task} {len(part):,}" for task, part in zip(tasks, parts, strict=True)))
    if dataset.too_short:
        log(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out of valid and test")
    for remark in dataset.remarks:
        log(f"  {remark}")
    seen = [dataset.split(user, "valid")[0] for user in dataset.test_users] if args.method.exclude_seen else []
    if seen and all(len(dataset.item_ids) - len({*items}) <= 10 for items in seen):
        log("  no valid user has more than 10 items left with --exclude_seen: hit@10 is the same for every checkpoint")
    adapter = initial if initial and initial.lora else None
    metadata = checkpoint_metadata(args, dataset, texts, prompts, max_his_len, adapter)
    checkpoint = checkpoint_to_resume(args.training, metadata)
    return NextItemData(dataset, prompts, templates_per_sample, train, valid, metadata, checkpoint, adapter)


def load_initial(args: Arguments) -> CheckpointMetadata | None:
    """Return the metadata of --init_from, or None without it; InputError unless it is a checkpoint of lcrec."""
    folder = args.model.init_from
    if not folder:
        return None
    metadata = load_metadata(folder)
    if metadata.method != "lcrec":
        raise InputError(f"--init_from {folder}: was made by {metadata.method!r}; give one of lcrec")
    return metadata


def check_continuation(args: Arguments, initial: CheckpointMetadata, dataset: InteractionDataset, log: Log) -> None:
    """Raise InputError if the dataset contradicts the items or semantic IDs of --init_from; it can have new items."""
    folder = Path(args.model.init_from or "")
    if difference := describe_difference(initial.index, dataset.index):
        path = dataset.file_path(args.data.index_file)
        raise InputError(f"{folder}: was tuned with other semantic IDs than {path} has{difference}")
    check_same_items(folder, initial, dataset)
    log(f"training of {folder} continues; {len(dataset.index.keys() - initial.index.keys()):,} items are new")
    for flag in ("max_his_len", "his_sep", "add_prefix", "max_text_len", "targets"):
        value, before = getattr(args.data, flag, args.method.targets), getattr(initial, flag)
        if value != before and value != -1:
            log(f"  --{flag} was {before!r}, and is {value!r} now")


def build_model(args: Arguments, data: NextItemData, log: Log) -> TrainingSetup:
    """Load the base model, add the tokens of semantic IDs, tokenize the samples; InputError where they don't fit."""
    base_model, adapter = str(data.metadata.base_model), args.model.init_from if data.adapter else None
    tokenizer = load_tokenizer(adapter or base_model)
    model: PreTrainedModel = load_base_model(data.metadata, args.training.device)
    metadata = replace(data.metadata, base_sha256=base_fingerprint(base_model))
    check_same_base(base_model, metadata, data.checkpoint)
    if args.training.use_liger_kernel and not liger_supports(model.config.model_type):
        raise InputError(f"--use_liger_kernel: Liger has no kernels for {model.config.model_type!r}; leave it out")
    index = data.dataset.index
    texts = {item: data.dataset.text(item) for item in index} if data.dataset.items else None
    new_tokens = extend_vocabulary(model, tokenizer, index, texts, args.training.seed)
    model.config.use_cache = False  # training needs none; the beam search asks for it
    log(f"{base_model}: {model.num_parameters():,} parameters, {new_tokens:,} new tokens")
    if not new_tokens and (Path(base_model) / METADATA_FILE).exists():
        known = CheckpointMetadata.load(base_model)
        is_known = known.index and not describe_difference(known.index, index)
        which = "these" if is_known or known.index_sha256 == metadata.index_sha256 else "OTHER"
        log(f"  it was tuned before, on {which} semantic IDs; the embeddings of their codes are trained further")
    if data.adapter:
        check_base_model(base_model, data.adapter.checked_base_sha256, str(adapter))
        model = load_lora(model, tokenizer, str(adapter), is_trainable=True)
    elif metadata.lora:
        token_ids = index_token_ids(tokenizer, index).values()
        model = add_lora_adapter(model, sorted({token for ids in token_ids for token in ids}), **metadata.lora)
    if metadata.lora:
        trained = model.num_parameters(only_trainable=True)
        log(f"  trained are {trained:,}: LoRA weights and the embeddings of semantic-ID tokens")
    if args.method.embedding_dropout:
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: functional.dropout(output, args.method.embedding_dropout, module.training)
        )
    train, valid = tokenize(args, data, tokenizer)
    lengths = train.lengths(longest=True)
    check_context_length(model, max(lengths.max(), valid.lengths(longest=True).max()))
    packing = args.method.packing
    if packing and not supports_packing(model):
        raise InputError(f"{base_model}: its attention does not keep packed samples apart; omit --packing")
    is_half_on_gpu = args.training.device.type == "cuda" and args.training.bf16
    flash = packing and is_half_on_gpu and is_flash_attn_2_available() and model._supports_flash_attn
    return TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        train=train,
        valid=valid,
        collator=CausalLMCollator(tokenizer, packing, flatten=flash),
        lengths=lengths,
        metadata=metadata,
        checkpoint=data.checkpoint,
        max_logits_mb=args.training.max_logits_mb,
        packing=packing,
        flash=flash,
        find_unused_parameters=False if metadata.lora else None,  # DDP ignores frozen weights, the others are used
    )


def check_same_base(base_model: str, metadata: CheckpointMetadata, checkpoint: Path | None) -> None:
    """Raise InputError if a training would resume with other weights than it began with, at the same path or not."""
    if checkpoint and CheckpointMetadata.load(checkpoint).base_sha256 != metadata.base_sha256:
        raise InputError(
            f"{checkpoint}: was tuned from another base model than {base_model} is now, its weights are others; "
            "restore it, or train into another --output_dir"
        )


def tokenize(args: Arguments, data: NextItemData, tokenizer) -> tuple[InstructionDataset, InstructionDataset]:
    """Return the samples of train, whose prompts are drawn for each epoch, and of valid."""
    token_ids = index_token_ids(tokenizer, data.dataset.index)
    shared = {"only_response": args.method.only_train_response, "seed": args.training.seed}
    train, valid = (
        build_instructions(
            samples, data.dataset, tokenizer, data.prompts, token_ids, data.metadata,
            templates_per_sample=templates_per_sample, **shared,
        )
        for samples, templates_per_sample in ((data.train, data.templates_per_sample), (data.valid, None))
    )  # fmt: skip
    return train, valid


def build_evaluation(args: Arguments, data: NextItemData, setup: TrainingSetup) -> Callable[[], dict[str, float]]:
    """Return a function that searches for the valid item of --max_eval_samples users and ranks it."""
    model, count = setup.model, args.data.max_eval_samples or 0
    users = list(range(len(data.valid)))
    if 0 < count < len(users):
        users = sorted(random.Random(0).sample(users, count))
    recommender = Recommender(model, setup.tokenizer, data.dataset, setup.metadata)
    prompts = recommender.encode(data.valid.select(users), prompt_id=0)
    splits = [data.dataset.split(user, "valid") for user in data.dataset.test_users]
    seen, targets = zip(*(splits[user] for user in users), strict=True)
    excluded = seen if args.method.exclude_seen else None
    attention = model.config._attn_implementation

    def compute_valid_metrics() -> dict[str, float]:
        if setup.flash:  # it cannot read the masks of the beam search
            model.set_attn_implementation(attention)
        lists = recommender.search(prompts, 10, excluded, args.training.per_device_eval_batch_size)
        if setup.flash:
            model.set_attn_implementation("flash_attention_2")
        return ranking_metrics([[scored.item for scored in ranked] for ranked in lists], list(targets), EVAL_METRICS)

    return compute_valid_metrics


def finish_model(args: Arguments, model: PreTrainedModel) -> None:
    """Switch the KV cache of the tuned model on again."""
    model.config.use_cache = True


def liger_supports(model_type: str) -> bool:
    """Return whether Liger has kernels for the type of model."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # installed only with a GPU

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def parse_per_task_counts(args: MethodArguments) -> tuple[dict[str, int], dict[str, int]]:
    """Return task -> prompts per sample, and task -> number of samples (0: all).

    Raises:
        InputError: an unknown task, a task that is given twice, lists of different lengths.
    """
    tasks = [task.strip().lower() for task in args.tasks.split(",")]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"--tasks {unknown[0]!r}: should be of {', '.join(TASKS)}")
    if duplicates := [task for task in tasks if tasks.count(task) > 1]:
        raise InputError(f"--tasks {args.tasks}: has {duplicates[0]} twice")
    tasks = [seqrec_task(args.targets) if task == "seqrec" else task for task in tasks]
    counts = []
    for flag, least in (("train_prompt_sample_num", 1), ("train_data_sample_num", 0)):
        numbers = getattr(args, flag).split(",")
        numbers = numbers * len(tasks) if len(numbers) == 1 else numbers
        if len(numbers) != len(tasks) or not all(number.isdecimal() and int(number) >= least for number in numbers):
            raise InputError(
                f"--{flag} {getattr(args, flag)}: should be one whole number for each of --tasks {args.tasks}, "
                f"or one for all, {least} at least"
            )
        counts.append(dict(zip(tasks, map(int, numbers), strict=True)))
    return counts[0], counts[1]


def describe_items(dataset: InteractionDataset) -> dict[str, dict[str, str]]:
    """Return item -> {"title": ..., "raw_id": ...}, without what the dataset does not know; {} if it knows neither."""
    raw_ids = read_raw_ids(dataset)
    items: dict[str, dict[str, str]] = {item: {} for item in dataset.index}
    for item, known in items.items():
        known |= {"title": dataset.title(item)} if dataset.items else {}
        known |= {"raw_id": raw_ids[item]} if item in raw_ids else {}
    return items if raw_ids or dataset.items else {}


def checkpoint_metadata(
    args: Arguments,
    dataset: InteractionDataset,
    texts: UserTexts | None,
    prompts: dict[str, list[PromptTemplate]],
    max_his_len: int,
    adapter: CheckpointMetadata | None,
) -> CheckpointMetadata:
    """Return what a test must know to ask the model as it was trained, and to refuse other semantic IDs.

    Args:
        adapter: metadata of --init_from, if that holds LoRA weights: what these were trained over.
    """
    model = args.model
    training: dict[str, object] = {"seed": args.training.seed}
    if model.init_from:
        training["init_from"] = absolute_name(model.init_from)
    lora = args.lora.low_rank(*LORA_DEFAULTS) if args.lora.lora else None
    is_half = args.training.bf16
    dtype = frozen_dtype(args.training.device.type, is_half, bool(model.load_in_4bit)) if lora else "float32"
    base = adapter or CheckpointMetadata("", "", base_model=model.init_from, base_dtype=dtype, lora=lora)
    in_4bit = base.load_in_4bit if model.load_in_4bit is None else model.load_in_4bit
    return CheckpointMetadata(
        method=args.method.method,
        dataset=dataset.name,
        base_model=absolute_name(str(model.base_model or base.base_model)),
        base_dtype=model.base_dtype or base.base_dtype,
        load_in_4bit=in_4bit,
        load_in_8bit=model.load_in_8bit or base.load_in_8bit,
        bf16=is_half,
        lora=base.lora,
        prompts={task: [asdict(template) for template in templates] for task, templates in prompts.items()},
        max_his_len=max_his_len,
        his_sep=args.data.his_sep,
        add_prefix=args.data.add_prefix,
        max_text_len=args.data.max_text_len,
        targets=args.method.targets,
        tasks=list(parse_per_task_counts(args.method)[0]),
        index_sha256=dataset.sha256("index"),
        histories_sha256=dataset.sha256("histories"),
        items_sha256=dataset.sha256("items"),
        users_sha256=texts.sha256() if texts else None,
        training=training | {flag: getattr(args.method, flag) for flag in TRAINING_KEYS},
        index=dataset.index,
        items=describe_items(dataset),
        training_histories=training_fingerprints(dataset),
    )
