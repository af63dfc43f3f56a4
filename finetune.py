"""Tune a language model to recommend: to say the next item (lcrec), or whether a user will like one (the others).

python finetune.py --config config/lcrec-ml-100k-cpu.yaml --base_model ckpt/ml-100k/base --output_dir ckpt/try
torchrun --nproc_per_node 8 finetune.py --base_model Qwen/Qwen3-0.6B --dataset Instruments --data_path ../LC-Rec-data \
    --output_dir ckpt/Instruments/lcrec --per_device_batch_size 8 --gradient_accumulation_steps 2 --bf16
python finetune.py --config config/tallrec.yaml --base_model Qwen/Qwen3-0.6B --dataset ml-1m --output_dir ckpt/tallrec
python finetune.py --config config/collm-mf.yaml --init_from ckpt/tallrec --cf_model ckpt/ml-1m/mf --dataset ml-1m \
    --output_dir ckpt/collm-mf
"""

from reclingua.utils.logging import silence_third_party

import os
import shlex
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from transformers import EarlyStoppingCallback, set_seed

from reclingua.datasets.samplers import LengthGroupedBatchSampler
from reclingua.methods import lcrec
from reclingua.methods import yes_no as yesno
from reclingua.training.arguments import (
    DataArguments,
    LoraArguments,
    MethodArguments,
    ModelArguments,
    TuningArguments,
    YesNoArguments,
    parse,
    refuse_flags,
)
from reclingua.training.callbacks import Preempted
from reclingua.training.checkpoints import newest_checkpoint, report_disk_full
from reclingua.training.throughput import format_throughput
from reclingua.training.trainer import RecTrainer
from reclingua.training.zero import check_zero3_support, saves_sharded_state, without_zero3_init
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.files import write_json
from reclingua.utils.metadata import run_metadata

SHARED = {"method", "train_data_sample_num"}  # of LC-Rec's flags, what every method takes


@cli_main
def main() -> None:
    # ---- Arguments ----
    model_args, data_args, method_args, lora_args, yesno_args, training_args = parse(
        [ModelArguments, DataArguments, MethodArguments, LoraArguments, YesNoArguments, TuningArguments], __doc__
    )
    generates = method_args.method == "lcrec"
    others = yesno_args if generates else method_args  # what the methods of the other kind listen to
    refuse_flags(method_args.method, others, (field.name for field in fields(others) if field.name not in SHARED))
    needed = {"base_model": model_args.base_model or yesno_args.init_from, "output_dir": training_args.output_dir}
    for flag, value in needed.items():
        if not value:
            raise InputError(f"--{flag} is required; see --help")
    if data_args.max_his_len < 1 and not (generates and data_args.max_his_len == -1):
        raise InputError(f"--max_his_len {data_args.max_his_len}: should be 1 at least")
    if training_args.per_device_eval_batch_size < 1 or not 0 <= training_args.seed < 2**32:
        raise InputError("--per_device_eval_batch_size should be 1 at least, --seed from 0 to below 2^32")
    started = time.monotonic()
    silence_third_party()
    main_process = training_args.process_index == 0
    log = print if main_process else lambda *_: None
    set_seed(training_args.seed)

    # ---- Data and model, as the method has them ----
    with without_zero3_init(training_args):
        if generates:
            prepared = lcrec.prepare(model_args, data_args, method_args, lora_args, training_args, log)
        else:
            prepared = yesno.prepare(model_args, data_args, method_args, lora_args, yesno_args, training_args, log)
    model = prepared.model
    check_zero3_support(model, training_args)

    # ---- Tokens -> batches ----
    order = training_args.train_sampling_strategy
    batches = LengthGroupedBatchSampler(
        prepared.lengths,
        training_args.per_device_train_batch_size,
        training_args.max_tokens_per_batch,
        prepared.packing,
        "random" if prepared.packing and order == "group_by_length" else order,
        training_args.seed if training_args.data_seed is None else training_args.data_seed,
        training_args.process_index,
        training_args.world_size,
        epoch_lengths=prepared.train.lengths,
    )
    most = training_args.max_tokens_per_batch
    size = f"{most:,} tokens" if most else f"{training_args.per_device_train_batch_size} samples"
    log(f"{len(batches):,} batches of at most {size} an epoch and process")

    # ---- Train ----
    training_args.disable_tqdm = not sys.stderr.isatty()
    trainer = RecTrainer(
        model=model,
        args=training_args,
        train_dataset=prepared.train,
        eval_dataset=prepared.valid,
        data_collator=prepared.collator,
        processing_class=prepared.tokenizer,
        batches=batches,
        max_logits_mb=prepared.max_logits_mb,
        measure=prepared.measure,
        record=prepared.record,
        callbacks=[EarlyStoppingCallback(yesno_args.patience)] if yesno_args.patience else None,
    )
    if prepared.checkpoint:
        log(f"going on from {prepared.checkpoint}")
    if prepared.flash:
        model.set_attn_implementation("flash_attention_2")
    try:
        result = trainer.train(resume_from_checkpoint=str(prepared.checkpoint) if prepared.checkpoint else None)
    except Preempted:
        log(f"ended by SIGTERM; {newest_checkpoint(training_args.output_dir)} is written; go on with")
        log(f"  {resume_command()}")
        leave(trainer)
        return
    throughput = trainer.throughput.figures(trainer.accelerator)
    log(f"training itself took {throughput['seconds']:.0f} s: {format_throughput(throughput)}")

    # ---- Save ----
    if generates:
        model.config.use_cache = True
    elif yesno_args.save_base_weights:
        model.include_base_weights()
    with report_disk_full(training_args.output_dir):
        trainer.save_model(training_args.output_dir)
    if main_process:
        given = (model_args, data_args, method_args, lora_args, yesno_args)
        flags = {name: value for group in given for name, value in asdict(group).items()} | training_args.to_dict()
        write_json(
            Path(training_args.output_dir) / "run.json",
            {
                **run_metadata(flags, started),
                "seed": training_args.seed,
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
        if trainer.deepspeed and saves_sharded_state(trainer.deepspeed, model):
            log(f"  its weights are in the parts of {training_args.world_size} processes; for a model folder:")
            log(f"  bash convert/convert.sh {training_args.output_dir}")
    leave(trainer)


def resume_command() -> str:
    """The command of this run, going on from its newest checkpoint."""
    words = [word for word in sys.argv if not word.startswith("--resume_from_checkpoint=")]
    if "--resume_from_checkpoint" in words:
        at = words.index("--resume_from_checkpoint")
        del words[at : at + 2]
    each, all_of_them = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")  # set by torchrun
    start = f"torchrun --nproc_per_node {each}" if each else "python"
    if each != all_of_them:
        start = f"torchrun <as before, on every machine> --nproc_per_node {each}"
    return f"{start} {shlex.join(words)} --resume_from_checkpoint auto"


def leave(trainer: RecTrainer) -> None:
    """Let go of the process group: what holds on to it to the interpreter's end may abort there."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
