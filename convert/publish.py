"""Make a folder for others of a checkpoint: weights, tokenizer, prompts, semantic IDs, a model card, no local paths.

python -m convert.publish --ckpt_path ckpt/D/lcrec --output_dir D-lcrec
python -m convert.publish --ckpt_path ckpt/D/lcrec --output_dir D-lcrec --push_to_hub me/D-lcrec

It takes what finetune.py and pretrain.py write: full weights, adapters, and the trained weights of Yes/No models.
Adapters and Yes/No models still need their base model, by whose public name the folder refers to it. Paths of this
machine in configs and metadata are replaced by public names.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
import json
import shutil
from pathlib import Path

from convert.folders import copy_rest, model_folder, public_name
from convert.model_card import add_flags, push, validated_metrics, write_card
from reclingua.models.registry import YES_NO_METHODS
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder, read_json, write_json
from reclingua.utils.metadata import CheckpointMetadata

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Configs, and their keys that can have a path of this machine.
CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")
PATH_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path", "base_model", "cf_model", "init_from")


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, metavar="FOLDER", help="written by finetune.py or pretrain.py"
    )
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="folder for others")
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    checkpoint = model_folder(args.ckpt_path)
    metrics, metadata = validated_metrics(args, checkpoint), CheckpointMetadata.load(checkpoint)
    files = [file for pattern in WEIGHTS for file in sorted(checkpoint.glob(pattern))]
    if not files:
        raise InputError(
            f"{checkpoint}: contains no weights as safetensors; for a training state of DeepSpeed see "
            "python -m convert.zero_to_fp32"
        )

    with atomic_folder(args.output_dir) as folder:
        copy_rest(checkpoint, folder)
        for file in files:
            shutil.copyfile(file, folder / file.name)
        for name in CONFIGS:
            if (checkpoint / name).exists():
                content = read_json(checkpoint / name, "a config")
                write_json(folder / name, without_paths(content), indent=2)
        base = public_name(metadata.base_model) if metadata.base_model else None
        name = args.push_to_hub or args.output_dir
        write_card(folder, kind_of(checkpoint, metadata), name, base, metrics, cf_model_name(folder))
    print(f"{checkpoint}: {len(files)} files of weights -> {args.output_dir}/")
    push(args.push_to_hub, args.output_dir)


def kind_of(checkpoint: Path, metadata: CheckpointMetadata) -> str:
    """Return the kind of the model card, one of `convert.model_card.KINDS`."""
    if not metadata.base_model:
        return "collaborative"
    if metadata.method in YES_NO_METHODS:
        config = read_json(checkpoint / "config.json", "the config of a tuned model")
        return "complete" if config.get("base_config") else "adapter"
    return "adapter" if metadata.lora else "complete"


def cf_model_name(folder: Path) -> str | None:
    """Return the public name of the collaborative model that a Yes/No model needs beside its folder; None: none."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return None if "cf_model" in (config.get("saved") or []) else config.get("cf_model")


def without_paths(content: dict) -> dict:
    """Return a config with the public names of models instead of absolute paths, at any depth."""
    return {
        key: without_paths(value)
        if isinstance(value, dict)
        else public_name(value)
        if key in PATH_KEYS and isinstance(value, str) and Path(value).is_absolute()
        else value
        for key, value in content.items()
    }


if __name__ == "__main__":
    main()
