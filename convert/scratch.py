"""Make a small Llama with random weights and a tokenizer learned from a dataset's own words.

The base model where there is no GPU: code tokens carry a generative recommender's knowledge, so on a small dataset a
model of this size, trained on every item of every history, beats what a slow machine can tune of a larger one.

python -m convert.scratch --dataset ml-100k --output_dir ckpt/base/scratch-ml-100k
"""

import reclingua.utils.logging  # noqa: F401

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar

from reclingua.datasets.interactions import open_dataset
from reclingua.datasets.prompts import FIELDS, LCREC_PROMPT_FILE, read_prompts
from reclingua.utils.errors import InputError, cli_main, one_line_errors
from reclingua.utils.files import output_folder

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: list[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text can be encoded) with pad, begin and end tokens."""
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
    parser.add_argument(
        "--dataset", default="ml-100k", help="whose titles the tokenizer learns (default: %(default)s)"
    )
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="holds <dataset>/ (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the model")
    parser.add_argument("--vocab_size", type=int, default=512, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--hidden_size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=1024, help="positions (default: %(default)s)")
    parser.add_argument("--attention_dropout", type=float, default=0.2, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    args = one_line_errors(parser).parse_args()
    if args.vocab_size < 300:
        raise InputError(f"--vocab_size {args.vocab_size}: 300 at least, for the 256 bytes and the special tokens")
    if args.heads < 1 or args.layers < 1 or args.hidden_size < 1 or not 0 <= args.attention_dropout < 1:
        raise InputError("--heads, --layers and --hidden_size should be 1 at least, --attention_dropout below 1")
    if args.hidden_size % (2 * args.heads):
        raise InputError(f"--hidden_size {args.hidden_size}: should be a multiple of 2 x --heads ({2 * args.heads})")

    dataset = open_dataset(args.data_path, args.dataset)
    prompts = read_prompts(LCREC_PROMPT_FILE, {task: FIELDS[task] for task in ("seqrec", "seqrec_history")})
    templates = [template for task in prompts.values() for template in task]
    words = [dataset.title(item) for item in dataset.item_ids] + [p.prompt.replace("{history}", "") for p in templates]
    tokenizer = train_tokenizer(words, args.vocab_size, args.max_length)
    set_seed(args.seed)
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
    output_folder(args.output_dir)
    disable_progress_bar()
    tokenizer.save_pretrained(args.output_dir)
    model.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} words -> {args.output_dir}/")


if __name__ == "__main__":
    main()
