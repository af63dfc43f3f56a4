"""Convert a sharded training state of DeepSpeed ZeRO to a model folder.

python -m convert.zero_to_fp32 ckpt/D/lcrec ckpt/D/lcrec-fp32
python -m convert.zero_to_fp32 ckpt/D/lcrec/checkpoint-500 ckpt/D/lcrec-500 --dtype bfloat16

The weights are the float32 master weights of the optimizer, whatever the dtype of training. DeepSpeed's own code
gathers the shards; its files are pickles, so convert only checkpoints of people you trust.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import contextlib
import io
import json
import pickle
from pathlib import Path

import torch
from tqdm import tqdm

from convert.folders import copy_rest, model_folder
from convert.shards import Spec, Writer, plan_shards
from reclingua.models.language import DTYPES
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="output folder of finetune.py --deepspeed, or a checkpoint in it"
    )
    parser.add_argument("output_dir", type=Path, help="folder for the model")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of the weights (default: %(default)s)"
    )
    args = one_line_errors(parser).parse_args()
    checkpoint = model_folder(args.checkpoint)

    weights = gather_weights(checkpoint)
    dtype = getattr(torch, args.dtype)
    specs = {
        name: Spec(dtype if weight.dtype.is_floating_point else weight.dtype, tuple(weight.shape))
        for name, weight in weights.items()
    }
    with atomic_folder(args.output_dir) as folder:
        copy_rest(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"dtype": args.dtype}, indent=2) + "\n")
        with Writer(folder, plan_shards(specs)) as writer:
            for name, weight in tqdm(weights.items(), desc="weights", disable=None):
                writer.put(name, weight.contiguous())
    num_parameters = sum(spec.numel for spec in specs.values())
    print(f"{checkpoint}: {num_parameters:,} parameters, {args.dtype} -> {args.output_dir}/")


def gather_weights(checkpoint: Path) -> dict:
    """Return name -> weight, lazily: `contiguous()` gathers the shards; tied weights are included once.

    Raises:
        InputError: the folder is no training state of DeepSpeed, or is incomplete.
    """
    if not (checkpoint / "latest").exists():
        has_weights = any(checkpoint.glob("*.safetensors"))
        raise InputError(
            f"{checkpoint}: "
            + ("is a model folder already" if has_weights else "contains no training state of DeepSpeed")
        )
    if any(checkpoint.glob("adapter_model.*")) or not (checkpoint / "config.json").exists():
        raise InputError(f"{checkpoint}: is an adapter, whose folder contains its weights already")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # progress messages
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    except (OSError, ValueError, RuntimeError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{checkpoint}: not a complete training state ({reason[0]}); use another checkpoint"
        ) from None
    first_name: dict[int, str] = {}  # a tied head is the same object as the embeddings, which come first
    return {name: weight for name, weight in weights.items() if first_name.setdefault(id(weight), name) == name}


if __name__ == "__main__":
    main()
