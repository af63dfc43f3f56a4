"""Train a next-item checkpoint further by reinforcement learning on its own lists (GRPO), or on preferences (S-DPO).

python grpo.py --config config/grpo.yaml --ckpt_path ckpt/ml-100k/lcrec --output_dir ckpt/ml-100k/lcrec-grpo
torchrun --nproc_per_node 8 grpo.py --config config/grpo.yaml --ckpt_path ckpt/D/lcrec --output_dir ckpt/D/lcrec-sdpo \
    --loss sdpo --add_target --bf16
"""

from reclingua.utils.logging import silence_third_party

import time
from contextlib import nullcontext
from pathlib import Path

from transformers import set_seed

from reclingua.methods.grpo import OTHER_HALF, build_data, build_evaluation, build_model, run_flags
from reclingua.training.policy_arguments import PolicyRunArguments, parse_policy_arguments
from reclingua.training.policy_trainer import PolicyTrainer
from reclingua.training.runs import check_ranges, leave_process_group, prepare_device, train_and_save
from reclingua.training.trainer import build_batches
from reclingua.utils.errors import cli_main
from reclingua.utils.files import check_outputs, locked_folder


@cli_main
def main() -> None:
    started = time.monotonic()
    args = parse_policy_arguments(__doc__)
    check_ranges(args.training)
    output_dir = Path(str(args.training.output_dir))
    check_outputs({"--output_dir": output_dir}, {"--ckpt_path": Path(str(args.policy.ckpt_path))})
    silence_third_party()
    set_seed(args.training.seed)
    prepare_device(args.training)
    with locked_folder(output_dir) if args.training.process_index == 0 else nullcontext():
        tune(args, started)


def tune(args: PolicyRunArguments, started: float) -> None:
    """Load checkpoint and data, train, and save the model; `started` is the time at which the run began."""
    training_args, settings = args.training, args.policy
    log = print if training_args.process_index == 0 else lambda *_: None

    # ---- Checkpoint, prompts, evaluation ----
    data = build_data(args, log)
    setup, policy = build_model(args, data, log)
    compute_valid_metrics = build_evaluation(args, data, setup)

    # ---- Prompts -> batches, each for several updates ----
    batches = build_batches(training_args, setup.train, setup.lengths, packing=False)
    log(f"  {len(batches):,} batches an epoch and process, {settings.num_generations} candidates of each prompt")

    # ---- Train and save ----
    training_args.eval_on_start &= setup.checkpoint is None  # a resumed run has the metrics of the beginning
    trainer = PolicyTrainer(
        **setup.trainer_arguments(training_args, settings.patience),
        batches=batches,
        compute_valid_metrics=compute_valid_metrics,
        policy=policy,
        settings=settings,
    )
    if train_and_save(trainer, setup.checkpoint, run_flags(args), started, trainer.finish_model, log):
        for line in trainer.describe_choice(OTHER_HALF):
            log(line)
    leave_process_group(trainer)


if __name__ == "__main__":
    main()
