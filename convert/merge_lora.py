"""Merge the LoRA weights of an adapter folder into its base model.

python -m convert.merge_lora --ckpt_path ckpt/D/lora --output_dir ckpt/D/merged
python test.py --ckpt_path ckpt/D/merged --dataset D

The product of two low-rank matrices is added to each linear layer, and the trained rows of the semantic-ID tokens
replace those of the embeddings (arXiv 2106.09685). The output is an ordinary model folder. Yes/No models are
supported, too.

An adapter of a base in 4 or 8 bits is merged into the base in full precision. It was trained with the rounded weights,
so the predictions of the merged model differ slightly.

The merge runs in memory, in float32.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from convert.folders import copy_rest, model_folder, public_name, save_public_metadata
from convert.model_card import add_flags, push, validated_metrics, write_card
from reclingua.models.language import DTYPES, check_base_model, load_model, load_tokenizer
from reclingua.models.lora import load_lora
from reclingua.models.registry import YES_NO_METHODS, load_yes_no_model
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder
from reclingua.utils.hub import TRUST_HELP, trust_remote_code
from reclingua.utils.metadata import CheckpointMetadata

# Values in the metadata of a merged model that replace those of the adapter.
MERGED = {"lora": None, "load_in_4bit": False, "load_in_8bit": False, "base_dtype": "float32"}


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", "--adapter", type=Path, required=True, metavar="FOLDER", help="written by finetune.py --lora"
    )
    parser.add_argument("--base_model", help="base model of the adapter, overrides the stored path")
    parser.add_argument("--cf_model", help="collaborative model of the adapter, overrides the stored path")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="folder for the merged model")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="dtype of the merged model (default: %(default)s)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST_HELP)
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    trust_remote_code(args.trust_remote_code)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adapter = model_folder(args.ckpt_path)
    metrics, metadata = validated_metrics(args, adapter), CheckpointMetadata.load(adapter)
    if metadata.load_in_4bit or metadata.load_in_8bit:
        metrics = metrics if args.results_file else {}  # those of the adapter differ
    base_model = args.base_model or metadata.base_model or ""

    model: PreTrainedModel
    with atomic_folder(args.output_dir) as folder:
        if metadata.method == "lcrec":
            model = merge_next_item(adapter, metadata, base_model)
        elif metadata.method in YES_NO_METHODS:
            model = merge_yes_no(adapter, metadata.method, args.base_model, args.cf_model)
        else:
            raise InputError(f"{adapter}: was not tuned by finetune.py, and has no LoRA weights to merge")
        copy_rest(adapter, folder)
        save_public_metadata(replace(metadata, **MERGED), folder)
        model.to(getattr(torch, args.dtype)).save_pretrained(folder)
        write_card(folder, "complete", args.push_to_hub or args.output_dir, public_name(base_model), metrics)
    print(f"{adapter} merged into {base_model} -> {args.output_dir}/")
    push(args.push_to_hub, args.output_dir)


def merge_next_item(adapter: Path, metadata: CheckpointMetadata, base_model: str) -> PreTrainedModel:
    """Merge an adapter into its base model, in float32; InputError if the base is another model."""
    if not metadata.lora:
        raise InputError(f"{adapter}: has no LoRA weights, it is a complete model already")
    if not metadata.base_sha256:
        raise InputError(f"{adapter}: was tuned by another version of finetune.py; tune it again")
    base = load_model(base_model)
    check_base_model(base_model, metadata.checked_base_sha256, adapter)
    return load_lora(base, load_tokenizer(adapter), adapter).merge_and_unload()


def merge_yes_no(adapter: Path, method: str, base_model: str | None, cf_model: str | None) -> YesNoModel:
    """Merge the adapter of a Yes/No model, in float32; the result includes base and collaborative model."""
    full_precision = {"base_dtype": "float32", "load_in_4bit": False}
    model = load_yes_no_model(adapter, method, base_model=base_model, cf_model=cf_model, **full_precision)
    config = model.config
    if not config.lora:
        raise InputError(f"{adapter}: has no LoRA weights to merge")
    for name, module in list(model.language.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.language.set_submodule(name, module.get_base_layer())
    config.lora, config.trained = None, sorted({*config.trained} - {"lora"})
    config.base_model, config.cf_model = (
        public_name(config.base_model),
        config.cf_model and public_name(config.cf_model),
    )
    model.include_base_weights()
    for part in filter(None, (config.base_config, config.cf_config)):
        part.pop("_name_or_path", None)
    return model


if __name__ == "__main__":
    main()
