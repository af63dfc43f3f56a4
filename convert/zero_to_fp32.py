"""Make a model folder of a training state of DeepSpeed ZeRO, of which every process wrote a part.

python -m convert.zero_to_fp32 ckpt/D/lcrec ckpt/D/lcrec-fp32
python -m convert.zero_to_fp32 ckpt/D/lcrec/checkpoint-500 ckpt/D/lcrec-500 --dtype bfloat16

The weights are those of the optimizer, float32, whatever dtype training computed in. DeepSpeed's own code puts their
parts together; its files are pickles, so convert only what you, or somebody you trust, have trained.
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

from convert.folders import atomic_folder, copy_rest, model_folder
from convert.shards import Spec, Writer, plan
from reclingua.models.language import DTYPES
from reclingua.utils.errors import InputError, cli_main, one_line_errors


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder by finetune.py --deepspeed, or a checkpoint in it")
    parser.add_argument("output_dir", type=Path, help="where the model goes")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights (default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    checkpoint = model_folder(args.checkpoint)

    weights = gathered(checkpoint)
    dtype = getattr(torch, args.dtype)
    looks = {
        name: Spec(dtype if weight.dtype.is_floating_point else weight.dtype, tuple(weight.shape))
        for name, weight in weights.items()
    }
    with atomic_folder(args.output_dir) as folder:
        copy_rest(checkpoint, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"dtype": args.dtype}, indent=2) + "\n")
        with Writer(folder, plan(looks)) as writer:
            for name, weight in tqdm(weights.items(), desc="weights", disable=None):
                writer.put(name, weight.contiguous())
    parameters = sum(look.numel for look in looks.values())
    print(f"{checkpoint}: {parameters:,} parameters, {args.dtype} -> {args.output_dir}/")


def gathered(checkpoint: Path) -> dict:
    """Name -> weight, which is put together when `contiguous()` is called; what is tied is there once.

    Raises:
        InputError: this is no training state of DeepSpeed, or a part of it is missing or cut short.
    """
    if not (checkpoint / "latest").exists():
        whole = any(checkpoint.glob("*.safetensors"))
        raise InputError(
            f"{checkpoint}: " + ("is a model folder already" if whole else "holds no training state of DeepSpeed")
        )
    if any(checkpoint.glob("adapter_model.*")) or not (checkpoint / "config.json").exists():
        raise InputError(f"{checkpoint}: is an adapter, whose weights are in its folder already")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # what it found
            found = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    except (OSError, ValueError, RuntimeError, AssertionError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{checkpoint}: not a whole training state ({reason[0]}); take another checkpoint") from None
    first: dict[int, str] = {}  # a tied head is the same object as the embeddings, which come before it
    return {name: weight for name, weight in found.items() if first.setdefault(id(weight), name) == name}


if __name__ == "__main__":
    main()
