"""LC-Rec (arXiv 2311.09049): items become words of a language model, which learns to say the next one."""

import random
from collections.abc import Callable
from dataclasses import asdict

from torch.nn import functional
from transformers.utils import is_flash_attn_2_available

from arguments import DataArguments, MethodArguments, ModelArguments, TuningArguments
from data.collate import Collator, Instructions
from data.dataset import RecDataset, open_dataset
from data.prompts import PROMPT_FILE, read_prompts
from data.tasks import TASKS, held_out_samples, train_samples
from errors import InputError
from methods import Prepared
from metrics import parse_metrics, ranking_metrics
from models.language import extend_vocabulary, index_token_ids, keeps_packed_apart, load_model, load_tokenizer
from recommend import recommend, trie_of
from trainer import checkpoint_to_resume

EVAL_METRICS = parse_metrics("hit@10,ndcg@10")


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    method_args: MethodArguments,
    training_args: TuningArguments,
    log: Callable[[str], None],
) -> Prepared:
    """Samples, model and evaluation by search, from the flags; InputError for those that cannot be."""
    if not 0 <= method_args.embedding_dropout < 1:
        raise InputError(f"--embedding_dropout {method_args.embedding_dropout}: should be from 0 to below 1")
    if model_args.load_in_4bit or model_args.base_dtype:
        raise InputError("--load_in_4bit and --base_dtype are for base models that stay frozen; lcrec tunes all of it")
    best = training_args.metric_for_best_model
    if training_args.load_best_model_at_end and best not in ("loss", *(f"{name}@{k}" for name, k in EVAL_METRICS)):
        raise InputError(f"--metric_for_best_model {best}: should be hit@10, ndcg@10 or loss")

    # ---- Data ----
    dataset = open_dataset(data_args.data_path, data_args.dataset, needs=["index"], index_file=data_args.index_file)
    prompts = read_prompts(data_args.prompt_file or PROMPT_FILE)
    prompt_num, sample_num = per_task(method_args)
    samples = train_samples(dataset, method_args.supervise, data_args.max_his_len, sample_num, training_args.seed)
    valid = held_out_samples(dataset, "valid", method_args.supervise, data_args.max_his_len)
    log(
        f"{dataset.name}: {len(dataset.histories):,} users, {len(dataset.item_ids):,} items, "
        f"{len(samples):,} training samples, {len(valid):,} valid"
    )
    if dataset.too_short:
        log(f"  {len(dataset.too_short):,} users have fewer than 3 interactions: left out of valid and test")

    # ---- Model ----
    record = record_of(dataset, data_args, method_args, prompts)
    record |= {"base_model": model_args.base_model, "seed": training_args.seed}
    checkpoint = checkpoint_to_resume(training_args, record)
    tokenizer = load_tokenizer(model_args.base_model)
    model = load_model(model_args.base_model)
    texts = {item: dataset.text(item) for item in dataset.index} if dataset.items else None
    if training_args.use_liger_kernel and not liger_knows(model.config.model_type):
        raise InputError(f"--use_liger_kernel: Liger has no kernels for {model.config.model_type!r}; leave it out")
    new_tokens = extend_vocabulary(model, tokenizer, dataset.index, texts, training_args.seed)
    model.config.use_cache = False  # training needs none; the search asks for it
    if method_args.embedding_dropout:
        model.get_input_embeddings().register_forward_hook(
            lambda module, _, output: functional.dropout(output, method_args.embedding_dropout, module.training)
        )
    log(f"{model_args.base_model}: {model.num_parameters():,} parameters, {new_tokens:,} new tokens")

    # ---- Samples -> tokens ----
    token_ids = index_token_ids(tokenizer, dataset.index)
    instructions = {
        part: Instructions(
            rows,
            tokenizer,
            prompts,
            index_tokens={token for ids in token_ids.values() for token in ids},
            max_his_len=data_args.max_his_len,
            his_sep=data_args.his_sep,
            add_prefix=data_args.add_prefix,
            only_response=method_args.only_train_response,
            phrasings_per_sample=prompt_num if part == "train" else 1,
            seed=training_args.seed,
        )
        for part, rows in (("train", samples), ("valid", valid))
    }

    lengths = {part: rows.lengths(longest=True) for part, rows in instructions.items()}
    tokens = max(max(found) for found in lengths.values())
    limit = getattr(model.config, "max_position_embeddings", 0)
    if limit and tokens > limit:
        raise InputError(
            f"{model_args.base_model}: reads at most {limit} tokens, a sample has {tokens}; lower --max_his_len"
        )

    # ---- Packing ----
    packing = method_args.packing
    if packing and not keeps_packed_apart(model):
        raise InputError(f"{model_args.base_model}: its attention does not keep packed samples apart; omit --packing")
    flash = training_args.device.type == "cuda" and training_args.bf16 and is_flash_attn_2_available()
    flash = packing and flash and model._supports_flash_attn
    attention = model.config._attn_implementation

    # ---- Evaluation: search for the valid item of some users ----
    chosen = range(len(valid))
    if 0 < method_args.valid_users < len(valid):
        chosen = sorted(random.Random(0).sample(chosen, method_args.valid_users))
    trie = trie_of(token_ids, tokenizer, method_args.supervise)
    seen, targets = zip(*(dataset.split(user, "valid") for user in dataset.test_users), strict=True)

    def rank() -> dict[str, float]:
        if flash:  # reads no mask such as the search gives to its beams
            model.set_attn_implementation(attention)
        lists = recommend(
            model,
            instructions["valid"],
            valid.select(chosen),
            prompts[record["task"]][0],
            trie,
            num_beams=10,
            batch_size=training_args.per_device_eval_batch_size,
            excluded=[seen[i] for i in chosen] if method_args.exclude_seen else None,
            show_progress=False,
        )
        if flash:
            model.set_attn_implementation("flash_attention_2")
        return ranking_metrics(
            [[r.item for r in found] for found in lists], [targets[i] for i in chosen], EVAL_METRICS
        )

    return Prepared(
        model=model,
        tokenizer=tokenizer,
        train=instructions["train"],
        valid=instructions["valid"],
        collator=Collator(tokenizer, packing, one_row=flash),
        lengths=lengths["train"],
        measure=rank,
        record=record,
        max_logits_mb=training_args.max_logits_mb,
        checkpoint=checkpoint,
        packing=packing,
        flash=flash,
    )


def liger_knows(model_type: str) -> bool:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # there only with a GPU

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def per_task(args: MethodArguments) -> tuple[int, int]:
    """(phrasings per sample, number of samples) of the one task there is; InputError for lists that don't match."""
    tasks = args.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"--tasks {unknown[0]!r}: there is {', '.join(TASKS)}")
    numbers = []
    for flag in ("train_prompt_sample_num", "train_data_sample_num"):
        given = getattr(args, flag).split(",")
        if len(given) != len(tasks) or not all(number.isdecimal() for number in given):
            raise InputError(
                f"--{flag} {getattr(args, flag)}: should be one whole number for each of --tasks {args.tasks}"
            )
        numbers.append(int(given[0]))
    return max(1, numbers[0]), numbers[1]


def record_of(dataset: RecDataset, data_args: DataArguments, method_args: MethodArguments, prompts: dict) -> dict:
    """What a test must know to ask the model as it was trained, and to refuse another index."""
    task = "seqrec" if method_args.supervise == "next" else "seqrec_history"
    return {
        "method": method_args.method,
        "dataset": dataset.name,
        "supervise": method_args.supervise,
        "task": task,
        "max_his_len": data_args.max_his_len,
        "his_sep": data_args.his_sep,
        "add_prefix": data_args.add_prefix,
        "prompts": [asdict(phrasing) for phrasing in prompts[task]],
        "index_sha256": dataset.sha256("index"),
        "histories_sha256": dataset.sha256("histories"),
    }
