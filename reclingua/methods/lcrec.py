"""LC-Rec (arXiv 2311.09049): items become words of a language model, which learns to say the next one."""

import random
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from datasets import concatenate_datasets
from torch import distributed
from torch.nn import functional
from transformers.utils import is_flash_attn_2_available

from reclingua.datasets.collators import CausalLMCollator
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.interactions import RecDataset, open_dataset
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, PromptTemplate, read_prompts
from reclingua.datasets.tasks import TASKS, TEXT_TASKS, USER_TASKS, held_out_samples, seqrec_task, train_samples
from reclingua.datasets.user_texts import read_users
from reclingua.inference.loading import check_context_length, load_base
from reclingua.inference.recommender import recommend, trie_of
from reclingua.methods import TrainingSetup
from reclingua.metrics import parse_metrics, ranking_metrics
from reclingua.models.language import base_fingerprint, load_tokenizer, supports_packing
from reclingua.models.lora import add_lora_adapter
from reclingua.models.vocabulary import extend_vocabulary, index_token_ids
from reclingua.training.arguments import (
    DataArguments,
    LoraArguments,
    MethodArguments,
    ModelArguments,
    TuningArguments,
    refuse_flags,
)
from reclingua.training.checkpoints import checkpoint_to_resume
from reclingua.utils.errors import InputError

EVAL_METRICS = parse_metrics("hit@10,ndcg@10")
TRAINING_KEYS = (
    "train_prompt_sample_num", "train_data_sample_num", "only_train_response", "packing", "embedding_dropout"
)  # fmt: skip
LORA_DEFAULTS = (32, "all-linear")  # alpha and target layers where the flags say none


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    lora_args: LoraArguments,
    training_args: TuningArguments,
    log: Callable[[str], None],
) -> TrainingSetup:
    """Samples, model and evaluation by search, from the flags; InputError for those that cannot be."""
    check_flags(model_args, data_args, method_args, lora_args, training_args)
    seqrec = seqrec_task(method_args.targets)
    templates, counts = parse_per_task_counts(method_args)

    # ---- Data ----
    needs = ["index", "items"] if set(TEXT_TASKS) & set(templates) else ["index"]
    dataset = open_dataset(data_args.data_path, data_args.dataset, needs, data_args.index_file)
    texts = read_users(dataset, data_args.user_file) if set(USER_TASKS) & set(templates) else None
    prompts = read_prompts(
        data_args.prompt_file or LCREC_PROMPT_FILE,
        {task: FIELDS[task] for task in dict.fromkeys([seqrec, *templates])},
    )
    if data_args.max_his_len == -1:
        data_args.max_his_len = max(map(len, dataset.histories.values()))
    parts = [
        train_samples(dataset, task, data_args.max_his_len, texts, counts[task], training_args.seed)
        for task in templates
    ]
    samples = concatenate_datasets(parts)
    valid = held_out_samples(dataset, "valid", seqrec, data_args.max_his_len)
    log(
        f"{dataset.name}: {len(dataset.histories):,} users, {len(dataset.item_ids):,} items, "
        f"{len(samples):,} training samples, {len(valid):,} valid"
    )
    if len(parts) > 1:
        log("  " + ", ".join(f"{task} {len(part):,}" for task, part in zip(templates, parts, strict=True)))
    if dataset.too_short:
        log(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out of valid and test")

    # ---- Model ----
    record = record_of(dataset, model_args, data_args, method_args, lora_args, prompts)
    record |= {"seed": training_args.seed, "users_sha256": texts.sha256() if texts else None}
    checkpoint = checkpoint_to_resume(training_args, record)
    tokenizer = load_tokenizer(model_args.base_model)
    model = load_base(record, device=training_args.device)
    record["base_sha256"] = base_fingerprint(model)
    about = {item: dataset.text(item) for item in dataset.index} if dataset.items else None
    if training_args.use_liger_kernel and not liger_supports(model.config.model_type):
        raise InputError(f"--use_liger_kernel: Liger has no kernels for {model.config.model_type!r}; leave it out")
    new_tokens = extend_vocabulary(model, tokenizer, dataset.index, about, training_args.seed)
    model.config.use_cache = False  # training needs none; the search asks for it
    token_ids = index_token_ids(tokenizer, dataset.index)
    index_tokens = sorted({token for ids in token_ids.values() for token in ids})
    log(f"{model_args.base_model}: {model.num_parameters():,} parameters, {new_tokens:,} new tokens")
    if lora_args.lora:
        model = add_lora_adapter(model, index_tokens, **record["lora"])
        log(f"  trained are {model.num_parameters(only_trainable=True):,}: LoRA weights and the rows of code tokens")
        if training_args.ddp_find_unused_parameters is None:
            training_args.ddp_find_unused_parameters = False  # what is frozen is none of DDP's, the rest is used
    if method_args.embedding_dropout:
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: functional.dropout(output, method_args.embedding_dropout, module.training)
        )

    # ---- Samples -> tokens ----
    instructions = {
        part: InstructionDataset(
            rows,
            dataset,
            tokenizer,
            prompts,
            index_tokens,
            max_his_len=data_args.max_his_len,
            his_sep=data_args.his_sep,
            max_text_len=data_args.max_text_len,
            add_prefix=data_args.add_prefix,
            only_response=method_args.only_train_response,
            templates_per_sample=templates if part == "train" else None,
            seed=training_args.seed,
        )
        for part, rows in (("train", samples), ("valid", valid))
    }

    lengths = {part: rows.lengths(longest=True) for part, rows in instructions.items()}
    check_context_length(model, max(max(found) for found in lengths.values()))

    # ---- Packing ----
    packing = method_args.packing
    if packing and not supports_packing(model):
        raise InputError(f"{model_args.base_model}: its attention does not keep packed samples apart; omit --packing")
    flash = training_args.device.type == "cuda" and training_args.bf16 and is_flash_attn_2_available()
    flash = packing and flash and model._supports_flash_attn
    attention = model.config._attn_implementation

    # ---- Evaluation: search for the valid item of some users ----
    chosen = range(len(valid))
    if 0 < data_args.max_eval_samples < len(valid):
        chosen = sorted(random.Random(0).sample(chosen, data_args.max_eval_samples))
    trie = trie_of(token_ids, tokenizer, seqrec)
    seen, targets = zip(*(dataset.split(user, "valid") for user in dataset.test_users), strict=True)

    def rank() -> dict[str, float]:
        if flash:  # reads no mask such as the search gives to its beams
            model.set_attn_implementation(attention)
        lists = recommend(
            model,
            instructions["valid"],
            valid.select(chosen),
            prompts[seqrec][0],
            trie,
            num_beams=10,
            batch_size=training_args.per_device_eval_batch_size,
            excluded=[seen[i] for i in chosen] if method_args.exclude_seen else None,
            split=distributed.is_initialized(),
            show_progress=False,
        )
        if flash:
            model.set_attn_implementation("flash_attention_2")
        return ranking_metrics(
            [[r.item for r in found] for found in lists], [targets[i] for i in chosen], EVAL_METRICS
        )

    return TrainingSetup(
        model=model,
        tokenizer=tokenizer,
        train=instructions["train"],
        valid=instructions["valid"],
        collator=CausalLMCollator(tokenizer, packing, flatten=flash),
        lengths=lengths["train"],
        measure=rank,
        record=record,
        max_logits_mb=training_args.max_logits_mb,
        checkpoint=checkpoint,
        packing=packing,
        flash=flash,
    )


def liger_supports(model_type: str) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # there only with a GPU

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def check_flags(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    lora_args: LoraArguments,
    training_args: TuningArguments,
) -> None:
    """InputError for flags that contradict each other."""
    if not 0 <= method_args.embedding_dropout < 1:
        raise InputError(f"--embedding_dropout {method_args.embedding_dropout}: should be from 0 to below 1")
    if data_args.max_text_len < 1:
        raise InputError(f"--max_text_len {data_args.max_text_len}: should be 1 at least")
    if not lora_args.lora:
        if model_args.load_in_4bit or model_args.load_in_8bit or model_args.base_dtype:
            raise InputError(
                "--load_in_4bit, --load_in_8bit and --base_dtype are for base models that stay frozen: give --lora"
            )
        refuse_flags("lcrec without --lora", lora_args, [f.name for f in fields(lora_args) if f.name != "lora"])
    if model_args.load_in_4bit and model_args.load_in_8bit:
        raise InputError("--load_in_4bit and --load_in_8bit: one of them")
    best = training_args.metric_for_best_model
    if training_args.load_best_model_at_end and best not in ("loss", *(f"{name}@{k}" for name, k in EVAL_METRICS)):
        raise InputError(f"--metric_for_best_model {best}: should be hit@10, ndcg@10 or loss")


def parse_per_task_counts(args: MethodArguments) -> tuple[dict[str, int], dict[str, int]]:
    """Task -> phrasings per sample, and task -> number of samples (0: all); InputError for lists that don't match."""
    tasks = [task.strip().lower() for task in args.tasks.split(",")]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"--tasks {unknown[0]!r}: there are {', '.join(TASKS)}")
    if twin := [task for task in tasks if tasks.count(task) > 1]:
        raise InputError(f"--tasks {args.tasks}: has {twin[0]} twice")
    tasks = [seqrec_task(args.targets) if task == "seqrec" else task for task in tasks]
    numbers = []
    for flag, least in (("train_prompt_sample_num", 1), ("train_data_sample_num", 0)):
        given = getattr(args, flag).split(",")
        given = given * len(tasks) if len(given) == 1 else given
        if len(given) != len(tasks) or not all(number.isdecimal() and int(number) >= least for number in given):
            raise InputError(
                f"--{flag} {getattr(args, flag)}: should be one whole number for each of --tasks {args.tasks}, "
                f"or one for all, {least} at least"
            )
        numbers.append(dict(zip(tasks, map(int, given), strict=True)))
    return numbers[0], numbers[1]


def record_of(
    dataset: RecDataset,
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    lora_args: LoraArguments,
    prompts: dict[str, list[PromptTemplate]],
) -> dict:
    """What a test must know to ask the model as it was trained, and to refuse another index."""
    return {
        "method": method_args.method,
        "base_model": str(Path(model_args.base_model).absolute())
        if Path(model_args.base_model).is_dir()
        else model_args.base_model,
        "base_dtype": model_args.base_dtype or "float32",
        "load_in_4bit": bool(model_args.load_in_4bit),
        "load_in_8bit": model_args.load_in_8bit,
        "lora": lora_args.low_rank(*LORA_DEFAULTS) if lora_args.lora else None,
        "dataset": dataset.name,
        "targets": method_args.targets,
        "tasks": list(parse_per_task_counts(method_args)[0]),
        **{flag: getattr(method_args, flag) for flag in TRAINING_KEYS},
        "max_his_len": data_args.max_his_len,
        "his_sep": data_args.his_sep,
        "add_prefix": data_args.add_prefix,
        "max_text_len": data_args.max_text_len,
        "prompts": {task: [asdict(template) for template in templates] for task, templates in prompts.items()},
        "index_sha256": dataset.sha256("index"),
        "histories_sha256": dataset.sha256("histories"),
        "items_sha256": dataset.sha256("items"),
    }
