"""Tune a language model to recommend: to generate the next item (lcrec), or to answer whether a user will like one.

python finetune.py --config config/lcrec-ml-100k-cpu.yaml --base_model ckpt/ml-100k/base --output_dir ckpt/try
torchrun --nproc_per_node 8 finetune.py --base_model Qwen/Qwen3-0.6B --dataset Instruments --data_path ~/datasets \
    --output_dir ckpt/Instruments/lcrec --per_device_batch_size 8 --gradient_accumulation_steps 2 --bf16
python finetune.py --config config/tallrec.yaml --base_model Qwen/Qwen3-0.6B --dataset ml-1m --output_dir ckpt/tallrec
python finetune.py --config config/collm.yaml --init_from ckpt/tallrec --cf_model ckpt/ml-1m/mf --dataset ml-1m \
    --output_dir ckpt/collm-mf
"""

from reclingua.utils.logging import silence_third_party

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from transformers import set_seed

from reclingua.methods import METHODS
from reclingua.training.arguments import Arguments, parse_arguments
from reclingua.training.runs import check_ranges, leave_process_group, prepare_device, train_and_save
from reclingua.training.trainer import RecTrainer, build_batches
from reclingua.training.zero import check_zero3_support, saves_sharded_state, without_zero3_init
from reclingua.utils.errors import InputError, cli_main
from reclingua.utils.files import check_outputs, locked_folder
from reclingua.utils.hub import trust_remote_code


@cli_main
def main() -> None:
    started = time.monotonic()
    args = parse_arguments(__doc__)
    check_required(args)
    METHODS[args.method.method].check_flags(args)
    silence_third_party()
    trust_remote_code(args.model.trust_remote_code)
    set_seed(args.training.seed)
    prepare_device(args.training)
    output_dir = Path(args.training.output_dir)
    with locked_folder(output_dir) if args.training.process_index == 0 else nullcontext():
        tune(args, started)


def tune(args: Arguments, started: float) -> None:
    """Build data and model, train, and save the tuned model; `started` is the time at which the run began."""
    method, training_args = METHODS[args.method.method], args.training
    main_process = training_args.process_index == 0
    log = print if main_process else lambda *_: None

    # ---- Data and model of the method ----
    with without_zero3_init(training_args):
        data = method.build_data(args, log)
        setup = method.build_model(args, data, log)
        compute_valid_metrics = method.build_evaluation(args, data, setup)
    model = setup.model
    check_zero3_support(model, training_args)

    # ---- Samples -> batches ----
    batches = build_batches(training_args, setup.train, setup.lengths, setup.packing)
    max_tokens = training_args.max_tokens_per_batch
    limit = f"{max_tokens:,} tokens" if max_tokens else f"{training_args.per_device_train_batch_size} samples"
    log(f"{len(batches):,} batches of at most {limit} an epoch and process")

    # ---- Train ----
    trainer = RecTrainer(
        **setup.trainer_arguments(training_args, args.yes_no.patience),
        batches=batches,
        max_logits_mb=setup.max_logits_mb,
        compute_valid_metrics=compute_valid_metrics,
    )
    if setup.flash:
        model.set_attn_implementation("flash_attention_2")
    flags = {name: value for group in args[:-1] for name, value in asdict(group).items()}
    has_ended = train_and_save(
        trainer, setup.checkpoint, flags, started, lambda: method.finish_model(args, model), log
    )
    if has_ended and trainer.deepspeed and saves_sharded_state(trainer.deepspeed, model):
        log(f"  its weights are in the parts of {training_args.world_size} processes; for a model folder:")
        log(f"  bash convert/convert.sh {training_args.output_dir}")
    leave_process_group(trainer)


def check_required(args: Arguments) -> None:
    """Raise InputError for flags that every method needs."""
    required = {"base_model": args.model.base_model or args.model.init_from, "output_dir": args.training.output_dir}
    for flag, value in required.items():
        if not value:
            raise InputError(f"--{flag} is required; see --help")
    sources = {"--base_model": args.model.base_model, "--init_from": args.model.init_from}
    sources |= {"--cf_model": args.yes_no.cf_model}
    paths = {flag: Path(path) for flag, path in sources.items() if path}
    check_outputs({"--output_dir": Path(args.training.output_dir)}, paths)
    check_ranges(args.training)
    if (args.data.max_eval_samples or 0) < 0:
        raise InputError("--max_eval_samples should be 0 at least")


if __name__ == "__main__":
    main()
