"""Tiny random models of several architectures, and tokenizers for them."""

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convert.scratch import train_tokenizer

ROPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


ROPE |= {"num_key_value_heads": 1, "max_position_embeddings": 512}


ARCHITECTURES = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=False, **ROPE)),
    "llama-tied": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, tie_word_embeddings=True, **ROPE)),
    "qwen2": lambda n: Qwen2ForCausalLM(Qwen2Config(vocab_size=n, tie_word_embeddings=True, **ROPE)),
    "qwen3": lambda n: Qwen3ForCausalLM(
        Qwen3Config(vocab_size=n + 40, head_dim=16, tie_word_embeddings=False, **ROPE)
    ),
    "mistral": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=None, **ROPE)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=2, n_positions=512, bos_token_id=1, eos_token_id=2)
    ),
    "gemma": lambda n: GemmaForCausalLM(GemmaConfig(vocab_size=n, head_dim=16, **ROPE)),
}


# Wide enough to be quantised: weights come in blocks of 64.
WIDE = ROPE | {"hidden_size": 128, "intermediate_size": 256}


# Those whose beams cannot always be one query block.
OTHERS = {
    "bloom": lambda n: BloomForCausalLM(BloomConfig(vocab_size=n, hidden_size=32, n_layer=2, n_head=2)),
    "gpt-neo": lambda n: GPTNeoForCausalLM(  # its local layers count places in the cache, which no mask can mend
        GPTNeoConfig(
            vocab_size=n,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=24,
            max_position_embeddings=512,
        )
    ),  # fmt: skip
    "mistral-window": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=6, **ROPE)),
    "gemma3-window": lambda n: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=n, head_dim=16, sliding_window=6, layer_types=["full_attention", "sliding_attention"], **ROPE
        )
    ),
}


def make_tokenizer(bos: bool):
    """A small tokenizer that does or does not put a BOS before a text."""
    texts = ["### Instruction: a user had these items, oldest first. Which comes next? Response:"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=320, max_length=512)
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_model(architecture: str, vocabulary: int, spread: float = 8):
    """A tiny model with random weights, by default spread so wide that its choices are not near-ties."""
    torch.manual_seed(0)
    wide = {"llama-wide": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **WIDE))}
    model = (ARCHITECTURES | OTHERS | wide)[architecture](vocabulary).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(spread)
    return model
