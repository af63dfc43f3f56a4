"""Ask a tuned model for items: the prompts of many users, batch by batch, through the constrained search."""

from collections.abc import Sequence

import datasets
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.collate import Instructions, prompt_batch
from data.prompts import Phrasing
from decoding.beam import Recommendation, beam_search
from decoding.trie import Trie


def trie_of(token_ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, supervise: str) -> Trie:
    """The trie of all items. Where an answer ends with the end token (`--supervise next`), so does every path."""
    return Trie(token_ids, end=tokenizer.eos_token_id if supervise == "next" else None)


def recommend(
    model: PreTrainedModel,
    instructions: Instructions,
    samples: datasets.Dataset,
    phrasing: Phrasing,
    trie: Trie,
    num_beams: int,
    batch_size: int,
    excluded: Sequence[Sequence[str]] | None = None,
    show_progress: bool = True,
) -> list[list[Recommendation]]:
    """For each sample the best `num_beams` items, best first; samples of similar length share a batch.

    Args:
        instructions: renders the prompts, as in training.
        excluded: for each sample the items that must not be returned.
    """
    prompts = [instructions.prompt(sample, phrasing) for sample in samples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[list[Recommendation]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    with tqdm(total=len(prompts), desc="search", unit="user", disable=None if show_progress else True) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = prompt_batch(instructions.tokenizer, [prompts[i] for i in rows])
            lists = beam_search(
                model,
                batch["input_ids"].to(model.device),
                batch["attention_mask"].to(model.device),
                trie,
                num_beams,
                [excluded[i] for i in rows] if excluded is not None else None,
            )
            for i, items in zip(rows, lists, strict=True):
                found[i] = items
            bar.update(len(rows))
    model.train(was_training)
    return found
