"""Create a small Llama with random weights and a tokenizer trained on the titles of a dataset.

A base model for machines without a GPU, where a pretrained one takes hours: a training step reads about 30 times as
many tokens a second as one of SmolLM2-135M cut to four layers (docs/getting-started.md).

python -m convert.scratch --dataset ml-100k --output_dir ckpt/base/scratch-ml-100k
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, read_prompts
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import atomic_folder
from reclingua.utils.provenance import check_replaceable, fingerprint, write_record

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text, with pad, begin and end tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **SPECIAL)


@cli_main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k", help="dataset with the titles (default: %(default)s)")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), help="parent folder of <dataset>/ (default: %(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument("--vocab_size", type=int, default=512, help="tokens of the tokenizer (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the layers (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="number of layers (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=1024, help="context length (default: %(default)s)")
    parser.add_argument(
        "--attention_dropout", type=float, default=0.2, help="dropout of attention weights (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a model of other titles or settings")
    args = one_line_errors(parser).parse_args()
    if args.vocab_size < 300:
        raise InputError(f"--vocab_size {args.vocab_size}: at least 300, for the 256 bytes and the special tokens")
    if args.heads < 1 or args.layers < 1 or args.hidden_size < 1 or not 0 <= args.attention_dropout < 1:
        raise InputError("--heads, --layers and --hidden_size should be at least 1, --attention_dropout below 1")
    if args.hidden_size % (2 * args.heads):
        raise InputError(f"--hidden_size {args.hidden_size}: should be a multiple of 2 x --heads ({2 * args.heads})")

    dataset = open_interactions(args.data_path, args.dataset)
    prompts = read_prompts(LCREC_PROMPT_FILE, {task: FIELDS[task] for task in ("seqrec", "seqrec_history")})
    templates = [template for task in prompts.values() for template in task]
    texts = [dataset.title(item) for item in dataset.item_ids] + [p.prompt.replace("{history}", "") for p in templates]
    settings = {flag: value for flag, value in vars(args).items() if flag not in ("data_path", "output_dir", "force")}
    made_with = {"texts_sha256": fingerprint(texts), **settings}
    check_replaceable(args.output_dir, made_with, args.force)
    tokenizer = train_tokenizer(texts, args.vocab_size, args.max_length)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=args.max_length,
            attention_dropout=args.attention_dropout,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    disable_progress_bar()
    with atomic_folder(args.output_dir, replaces=True) as folder:
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        write_record(folder, made_with, {})  # no duration: the same settings give the same files
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens -> {args.output_dir}/")


if __name__ == "__main__":
    main()
