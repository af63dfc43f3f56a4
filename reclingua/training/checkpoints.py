"""Checkpoints of a training: complete or invisible, whatever ends the processes; which of them to go on from."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reclingua.utils.errors import InputError
from reclingua.utils.files import output_folder, read_json
from reclingua.utils.metadata import METADATA_FILE

# In the output folder, where a checkpoint is until all processes have written their part; what begins with a _ is left
# out when the Trainer pushes that folder to the hub.
STAGING_DIR = "_unfinished"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What Rust (safetensors) and C++ (torch.save) say then.
SAID_OF_IT = (*(f"os error {number}" for number in NO_SPACE), "PytorchStreamWriter", "inline_container")


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    found = checkpoints_in(Path(output_dir))
    return found[-1] if found else None


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Those that were written to their end, the newest last."""
    found = [
        folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdecimal() and (folder / "trainer_state.json").exists()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(args: transformers.TrainingArguments, record: dict) -> Path | None:
    """The checkpoint to go on from; InputError if it is of another run, or if an earlier run would be overwritten."""
    output_folder(Path(args.output_dir))
    newest = newest_checkpoint(args.output_dir)
    if args.resume_from_checkpoint is None:
        if newest or any((Path(args.output_dir) / name).exists() for name in (METADATA_FILE, "config.json")):
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
    theirs = read_json(checkpoint / METADATA_FILE, "the record of a RecLingua checkpoint")
    if differing := [key for key, value in record.items() if theirs.get(key) != value]:
        raise InputError(f"{checkpoint}: was made with another {differing[0]}; train into another --output_dir")
    check_shards(checkpoint, args)
    return checkpoint


def check_shards(checkpoint: Path, args: transformers.TrainingArguments) -> None:
    """InputError if the training that goes on is shared out in another way than the one that was stopped."""
    shards = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    by_weights = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if bool(shards) != bool(args.deepspeed):
        how = "with" if shards else "without"
        raise InputError(f"{checkpoint}: was made {how} --deepspeed; go on in the same way")
    if shards and by_weights != args.hf_deepspeed_config.is_zero3():
        was = "3" if by_weights else "2"
        raise InputError(f"{checkpoint}: was made with ZeRO-{was}; go on with the same --deepspeed configuration")
    if shards and shards != args.world_size:
        raise InputError(
            f"{checkpoint}: was made by {shards} processes, these are {args.world_size}; go on with as many "
            f"(torchrun --nproc_per_node), or begin anew from its weights: python -m convert.zero_to_fp32 {checkpoint}"
        )


def rotate_checkpoints(output_dir: Path, limit: int | None, *kept: str) -> None:
    """Delete the oldest checkpoints until `limit` are left, those by the names `kept` in any case; none without limit.

    One that is to go is moved out of sight first: no half of it is ever to be seen.
    """
    if not limit:
        return
    found = checkpoints_in(output_dir)
    others = [folder for folder in found if folder.name not in kept]
    too_many = max(0, len(found) - max(limit, len(set(kept))))
    unfinished = output_dir / STAGING_DIR
    unfinished.mkdir(exist_ok=True)
    for folder in others[:too_many]:
        folder.rename(unfinished / folder.name)
    shutil.rmtree(unfinished)


def commit_checkpoint(unfinished: Path, checkpoint: Path) -> None:
    """Give a folder that is complete its name, in place of one that has it by now; where it was is taken away."""
    before = unfinished.with_name(f"{unfinished.name}.before")
    if checkpoint.exists():
        checkpoint.rename(before)
    unfinished.rename(checkpoint)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


@contextmanager
def report_disk_full(output_dir: str | Path, unfinished: Path | None = None) -> Iterator[None]:
    """Turns a disk that is full into an InputError, and makes room by taking `unfinished` away."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _no_space(error):
            raise
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        newest = newest_checkpoint(output_dir)
        kept = f"; {newest} is whole" if newest else ""
        free = shutil.disk_usage(output_dir).free / 2**30
        raise InputError(
            f"{output_dir}: a checkpoint could not be written ({free:.1f} GB free){kept}: make room and go on with "
            "--resume_from_checkpoint auto"
        ) from error


def _no_space(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    return any(words in str(error) for words in SAID_OF_IT)
