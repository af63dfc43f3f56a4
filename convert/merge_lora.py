"""Put the LoRA weights of an adapter folder into its base model: an ordinary model folder.

python -m convert.merge_lora --ckpt_path ckpt/D/lora --output_dir ckpt/D/merged
python test.py --ckpt_path ckpt/D/merged --dataset D

A product of two small matrices is added to each linear layer, and the trained rows of the code tokens replace those of
the embeddings (arXiv 2106.09685). Folders of the methods that answer Yes or No are merged, too.

An adapter that was tuned over a base in 4 or 8 bits is merged into the base in full precision: it has learned to go
with the rounded weights, so that the merged model answers a little differently from the one that was tuned.

The model is in memory, in float32.
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from convert.folders import atomic_folder, copy_rest, model_folder, public_name, read_metadata, write_metadata
from convert.publish import add_flags, push, validated_metrics, write_card
from reclingua.models.language import DTYPES, base_fingerprint, load_model, load_tokenizer
from reclingua.models.lora import load_lora
from reclingua.models.registry import YES_NO_METHODS, load_yes_no_model
from reclingua.models.yes_no import YesNoModel
from reclingua.utils.errors import InputError, cli_main, one_line_errors

OF_RECORD = {"base_model", "base_dtype", "base_sha256", "load_in_4bit", "load_in_8bit"}
# What a test, or who tunes on, reads in the record of a folder without an adapter.
NO_LORA = {"lora": None, "load_in_4bit": False, "load_in_8bit": False, "base_dtype": "float32"}


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ckpt_path", "--adapter", type=Path, required=True, metavar="FOLDER", help="written by finetune.py --lora"
    )
    parser.add_argument("--base_model", help="where its base model is now, if it has moved")
    parser.add_argument("--cf_model", help="where its collaborative model is now, if it has one that has moved")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="FOLDER", help="where the merged model goes")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of what is written (default: %(default)s)")
    add_flags(parser)
    args = one_line_errors(parser).parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adapter = model_folder(args.ckpt_path)
    metrics, record = validated_metrics(args, adapter), read_metadata(adapter)
    if record.get("load_in_4bit") or record.get("load_in_8bit"):
        metrics = metrics if args.results_file else {}  # the adapter's are not those of the merged model

    with atomic_folder(args.output_dir) as folder:
        if record.get("method") == "lcrec":
            model = merged_lcrec(adapter, record, args.base_model)
        elif record.get("method") in YES_NO_METHODS:
            model = merged_yesno(adapter, record["method"], args.base_model, args.cf_model)
        else:
            raise InputError(f"{adapter}: was not tuned by finetune.py, so it has no LoRA weights to be merged")
        copy_rest(adapter, folder)
        write_metadata(folder, record | NO_LORA)
        model.to(getattr(torch, args.dtype)).save_pretrained(folder)
        base = args.base_model or str(record.get("base_model"))
        write_card(folder, "merged", args.push_to_hub or args.output_dir, public_name(base), metrics)
    print(f"{adapter} merged into {base} -> {args.output_dir}/")
    push(args.push_to_hub, args.output_dir)


def merged_lcrec(adapter: Path, record: dict, base_model: str | None) -> PreTrainedModel:
    """The base model, float32, with the adapter's weights in its own; InputError if it is another base."""
    if not record.get("lora"):
        raise InputError(f"{adapter}: has no LoRA weights: it is a whole model already")
    if not OF_RECORD <= record.keys():
        raise InputError(f"{adapter}: was tuned by another version of finetune.py; tune it again")
    path = base_model or record["base_model"]
    base = load_model(path, getattr(torch, record["base_dtype"]), record["load_in_4bit"], record["load_in_8bit"])
    if base_fingerprint(base) != record["base_sha256"]:
        raise InputError(f"{path}: is not the base model that {adapter} was tuned on; see --base_model")
    if record["load_in_4bit"] or record["load_in_8bit"] or record["base_dtype"] != "float32":
        del base
        base = load_model(path)
    return load_lora(base, load_tokenizer(adapter), adapter).merge_and_unload()


def merged_yesno(adapter: Path, method: str, base_model: str | None, cf_model: str | None) -> YesNoModel:
    """The model, float32, whose folder will hold all that it points to.

    An adapter folder of these methods has no fingerprint of its base: another one of the same shape is not noticed.
    """
    in_full = {"base_dtype": "float32", "load_in_4bit": False}
    model = load_yes_no_model(adapter, method, base_model=base_model, cf_model=cf_model, **in_full)
    config = model.config
    if not config.lora:
        raise InputError(f"{adapter}: has no LoRA weights to be merged")
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
