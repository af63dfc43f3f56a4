"""Atomic checkpoints: how they are committed and rotated, and which one a run resumes from."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import transformers
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from reclingua.utils.errors import InputError
from reclingua.utils.files import output_folder, sync
from reclingua.utils.metadata import METADATA_FILE, CheckpointMetadata

# Folder in the output folder that holds a checkpoint until all processes have written their part. The Trainer does not
# push folders whose name begins with _ to the hub.
STAGING_DIR = "_unfinished"
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How Rust (safetensors) and C++ (torch.save) report a full disk.
DISK_FULL_MESSAGES = (
    *(f"os error {number}" for number in DISK_FULL_ERRNOS),
    "PytorchStreamWriter",
    "inline_container",
)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    checkpoints = list_checkpoints(Path(output_dir))
    return checkpoints[-1] if checkpoints else None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints, the newest last."""
    checkpoints = [
        folder
        for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.name.rpartition("-")[2].isdecimal() and (folder / "trainer_state.json").exists()
    ]
    return sorted(checkpoints, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_to_resume(args: transformers.TrainingArguments, metadata: CheckpointMetadata) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Raises:
        InputError: the checkpoint is of another run, or this run would overwrite the model of an earlier one.
    """
    assert args.output_dir is not None  # finetune.py requires it
    output_dir = Path(args.output_dir)
    output_folder(output_dir)
    newest = newest_checkpoint(output_dir)
    has_model = any((output_dir / name).exists() for name in (METADATA_FILE, "config.json"))
    if args.resume_from_checkpoint is None:
        if newest or has_model:
            raise InputError(
                f"{output_dir}: holds a model of an earlier run; resume it with --resume_from_checkpoint auto, "
                "or choose another --output_dir"
            )
        return None
    checkpoint = newest if args.resume_from_checkpoint == "auto" else Path(args.resume_from_checkpoint)
    if checkpoint is None:
        if has_model:
            raise InputError(
                f"{output_dir}: holds a model but no checkpoint to resume from; choose another --output_dir"
            )
        return None
    if not (checkpoint / "trainer_state.json").exists():
        raise InputError(f"{checkpoint}: is not a complete checkpoint; name a checkpoint-N folder, or auto")
    if key := _first_difference(metadata, CheckpointMetadata.load(checkpoint)):
        raise InputError(f"{checkpoint}: was made with another {key}; train into another --output_dir")
    check_shards(checkpoint, args)
    return checkpoint


def _first_difference(ours: CheckpointMetadata, theirs: CheckpointMetadata) -> str | None:
    """Return the first key whose values differ, a flag of `training` by its own name; None if all are equal.

    The fingerprint of the base model is skipped where it is not computed yet: this check comes before the model is
    loaded. A training may resume in another precision, as on another machine.
    """
    stored = asdict(theirs)
    for key, value in asdict(ours).items():
        if key == "training":
            if differing := [flag for flag in value | stored[key] if value.get(flag) != stored[key].get(flag)]:
                return differing[0]
        elif value != stored[key] and key != "bf16" and not (key == "base_sha256" and value is None):
            return key
    return None


def check_shards(checkpoint: Path, args: transformers.TrainingArguments) -> None:
    """Raise InputError if the checkpoint was sharded among processes in another way than this run."""
    num_shards = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))
    has_sharded_weights = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
    if bool(num_shards) != bool(args.deepspeed):
        flag = "with" if num_shards else "without"
        raise InputError(f"{checkpoint}: was made {flag} --deepspeed; resume it {flag} --deepspeed")
    if num_shards and has_sharded_weights != args.hf_deepspeed_config.is_zero3():
        stage = 3 if has_sharded_weights else 2
        raise InputError(f"{checkpoint}: was made with ZeRO-{stage}; resume it with the same --deepspeed file")
    if num_shards and num_shards != args.world_size:
        raise InputError(
            f"{checkpoint}: was made by {num_shards} processes, this run has {args.world_size}; resume it with as "
            "many (torchrun --nproc_per_node), or start from its weights: "
            f"python -m convert.zero_to_fp32 {checkpoint} FOLDER"
        )


def rotate_checkpoints(output_dir: Path, limit: int | None, *protected: str) -> None:
    """Delete the oldest checkpoints until `limit` are left; those named in `protected` always stay. None: no limit.

    A checkpoint is moved into the staging folder before it is deleted, so that a half-deleted one is never visible.
    """
    if not limit:
        return
    checkpoints = list_checkpoints(output_dir)
    deletable = [folder for folder in checkpoints if folder.name not in protected]
    excess = max(0, len(checkpoints) - max(limit, len(set(protected))))
    staging_dir = output_dir / STAGING_DIR
    staging_dir.mkdir(exist_ok=True)
    for folder in deletable[:excess]:
        folder.rename(staging_dir / folder.name)
    shutil.rmtree(staging_dir)


def commit_checkpoint(staged: Path, checkpoint: Path) -> None:
    """Rename the complete folder `staged` to `checkpoint`, replacing it if it exists; delete the staging folder.

    Its files are on the disk before: older checkpoints are deleted afterwards, and a power failure could lose both.
    """
    for path in (*staged.rglob("*"), staged):
        sync(path)
    if checkpoint.exists():
        checkpoint.rename(staged.with_name(f"{staged.name}.before"))
    staged.rename(checkpoint)
    sync(checkpoint.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


@contextmanager
def report_disk_full(output_dir: str | Path, staging_dir: Path | None = None) -> Iterator[None]:
    """Turn the error of a full disk into an InputError, and free space by deleting `staging_dir`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        cause = error.__cause__ if isinstance(error, InputError) else error  # an atomic write has named its file
        if cause is None or not _is_disk_full(cause):
            raise
        if staging_dir is not None:
            shutil.rmtree(staging_dir, ignore_errors=True)
        newest = newest_checkpoint(output_dir)
        complete = f"; {newest} is complete" if newest else ""
        free = shutil.disk_usage(output_dir).free / 2**30
        raise InputError(
            f"{output_dir}: a checkpoint could not be written ({free:.1f} GB free){complete}: make room and "
            "resume with --resume_from_checkpoint auto"
        ) from error


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FULL_ERRNOS
    return any(message in str(error) for message in DISK_FULL_MESSAGES)
