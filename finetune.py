"""Tune a language model to recommend.

python finetune.py --config config/lcrec-ml-100k-cpu.yaml --base_model ckpt/ml-100k/base --output_dir ckpt/try
torchrun --nproc_per_node 8 finetune.py --base_model Qwen/Qwen3-0.6B --dataset Instruments --data_path ../LC-Rec-data \
    --output_dir ckpt/Instruments/lcrec --per_device_batch_size 8 --gradient_accumulation_steps 2 --bf16
"""

import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
import transformers
from torch.nn import functional
from transformers import set_seed
from transformers.utils import is_flash_attn_2_available

from arguments import DataArguments, MethodArguments, ModelArguments, TuningArguments, parse
from data.batches import Batches
from data.collate import Collator, Instructions
from data.dataset import RecDataset, open_dataset, output_folder, read_json, write_json
from data.prompts import PROMPT_FILE, read_prompts
from data.tasks import TASKS, held_out_samples, train_samples
from errors import InputError, exits_cleanly
from metrics import parse_metrics, ranking_metrics
from models.language import extend_vocabulary, index_token_ids, keeps_packed_apart, load_model, load_tokenizer
from recommend import recommend, trie_of
from throughput import in_words
from trainer import RECORD, RecTrainer, newest_checkpoint

EVAL_METRICS = parse_metrics("hit@10,ndcg@10")


@exits_cleanly
def main() -> None:
    # ---- Arguments ----
    model_args, data_args, method_args, training_args = parse(
        [ModelArguments, DataArguments, MethodArguments, TuningArguments], __doc__
    )
    for flag, value in (("--base_model", model_args.base_model), ("--output_dir", training_args.output_dir)):
        if not value:
            raise InputError(f"{flag} is required; see --help")
    if data_args.max_his_len < 1:
        raise InputError(f"--max_his_len {data_args.max_his_len}: should be 1 at least")
    if not 0 <= method_args.embedding_dropout < 1:
        raise InputError(f"--embedding_dropout {method_args.embedding_dropout}: should be from 0 to below 1")
    if training_args.per_device_eval_batch_size < 1 or not 0 <= training_args.seed < 2**32:
        raise InputError("--per_device_eval_batch_size should be 1 at least, --seed from 0 to below 2^32")
    best = training_args.metric_for_best_model
    if training_args.load_best_model_at_end and best not in ("loss", *(f"{name}@{k}" for name, k in EVAL_METRICS)):
        raise InputError(f"--metric_for_best_model {best}: should be hit@10, ndcg@10 or loss")
    started = time.monotonic()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    main_process = training_args.process_index == 0
    log = print if main_process else lambda *_: None
    set_seed(training_args.seed)

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

    # ---- Tokens -> batches ----
    packing = method_args.packing
    if packing and not keeps_packed_apart(model):
        raise InputError(f"{model_args.base_model}: its attention does not keep packed samples apart; omit --packing")
    flash = training_args.device.type == "cuda" and training_args.bf16 and is_flash_attn_2_available()
    flash = packing and flash and model._supports_flash_attn
    attention = model.config._attn_implementation
    order = training_args.train_sampling_strategy
    batches = Batches(
        lengths["train"],
        training_args.per_device_train_batch_size,
        training_args.max_tokens_per_batch,
        packing,
        "random" if packing and order == "group_by_length" else order,
        training_args.seed if training_args.data_seed is None else training_args.data_seed,
        training_args.process_index,
        training_args.world_size,
        now=instructions["train"].lengths,
    )

    most = training_args.max_tokens_per_batch
    size = f"{most:,} tokens" if most else f"{training_args.per_device_train_batch_size} samples"
    log(f"{len(batches):,} batches of at most {size} an epoch and process")

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

    # ---- Train ----
    training_args.disable_tqdm = not sys.stderr.isatty()
    trainer = RecTrainer(
        model=model,
        args=training_args,
        train_dataset=instructions["train"],
        eval_dataset=instructions["valid"],
        data_collator=Collator(tokenizer, packing, one_row=flash),
        processing_class=tokenizer,
        batches=batches,
        max_logits_mb=training_args.max_logits_mb,
        rank=rank,
        record=record,
    )
    if checkpoint:
        log(f"going on from {checkpoint}")
    if flash:
        model.set_attn_implementation("flash_attention_2")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    throughput = trainer.throughput.figures(trainer.accelerator)
    log(f"training itself took {throughput['seconds']:.0f} s: {in_words(throughput)}")

    # ---- Save ----
    model.config.use_cache = True
    trainer.save_model(training_args.output_dir)
    if main_process:
        write_json(
            Path(training_args.output_dir) / "run.json",
            {
                "arguments": asdict(model_args) | asdict(data_args) | asdict(method_args) | training_args.to_dict(),
                "seed": training_args.seed,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "seconds": round(time.monotonic() - started, 1),
                "best_metric": trainer.state.best_metric,
                "best_step": trainer.state.best_global_step,
                "train_loss": result.training_loss,
                "throughput": throughput,
                "log": trainer.state.log_history,
            },
            indent=1,
        )
        best = (
            f", valid {training_args.metric_for_best_model} {trainer.state.best_metric:.4f}"
            if trainer.state.best_metric
            else ""
        )
        log(f"tuned in {time.monotonic() - started:.0f} s{best} -> {training_args.output_dir}/")
    trainer.model_wrapped = model  # what holds on to the process group to the interpreter's end may abort there
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


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


def checkpoint_to_resume(args: TuningArguments, record: dict) -> Path | None:
    """The checkpoint to go on from; InputError if it is of another run, or if an earlier run would be overwritten."""
    output_folder(Path(args.output_dir))
    newest = newest_checkpoint(args.output_dir)
    if args.resume_from_checkpoint is None:
        if newest or (Path(args.output_dir) / "config.json").exists():
            raise InputError(
                f"{args.output_dir}: holds a model of an earlier run; go on with --resume_from_checkpoint auto, "
                "or choose another --output_dir"
            )
        return None
    checkpoint = newest if args.resume_from_checkpoint == "auto" else Path(args.resume_from_checkpoint)
    if checkpoint is None:
        return None
    if not (checkpoint / "trainer_state.json").exists():
        raise InputError(f"{checkpoint}: is not a whole checkpoint to go on from; name a checkpoint-N folder, or auto")
    theirs = read_json(checkpoint / RECORD, "the record of a RecLingua checkpoint")
    if differing := [key for key, value in record.items() if theirs.get(key) != value]:
        raise InputError(f"{checkpoint}: was made with another {differing[0]}; train into another --output_dir")
    return checkpoint


if __name__ == "__main__":
    main()
