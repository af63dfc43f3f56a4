"""Ask a tuned model for items: the prompts of many users, batch by batch, through the constrained search."""

from collections.abc import Sequence

import datasets
import torch
from torch import distributed
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reclingua.datasets.collators import encode_prompt, prompt_batch
from reclingua.datasets.instructions import InstructionDataset
from reclingua.datasets.prompts import PromptTemplate
from reclingua.decoding.beam_search import ScoredItem, beam_search
from reclingua.decoding.trie import Trie
from reclingua.utils.memory import run_with_oom_retry


def trie_of(token_ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, task: str) -> Trie:
    """The trie of all items. Every path ends with the end token, as answers do, unless they are part of a history."""
    return Trie.build(token_ids, end=None if task == "seqrec_history" else tokenizer.eos_token_id)


def recommend(
    model: PreTrainedModel,
    instructions: InstructionDataset,
    samples: datasets.Dataset,
    template: PromptTemplate,
    trie: Trie,
    num_beams: int,
    batch_size: int,
    excluded: Sequence[Sequence[str]] | None = None,
    score: str = "full",
    split: bool = False,
    show_progress: bool = True,
) -> list[list[ScoredItem]]:
    """For each sample the best `num_beams` items, best first.

    Samples of similar length share a batch, the longest first. If memory runs out the batch is halved and the same
    samples are done again; the number of beams never changes.

    Args:
        instructions: renders the prompts, as in training.
        excluded: for each sample the items that must not be returned.
        score: see `beam_search`.
        split: share the batches out among the processes of the default group; each of them gets all lists. The
            batches are those of a single process, so that the number of processes changes no score (where they run
            with other numbers of threads, the last bits of a float may differ).

    Raises:
        InputError: memory does not suffice for one sample.
    """
    prompts = [encode_prompt(instructions.tokenizer, instructions.prompt(sample, template)) for sample in samples]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if split:
        batches = batches[distributed.get_rank() :: distributed.get_world_size()]
    trie.to(model.device)

    def search(rows: list[int]) -> list[list[ScoredItem]]:
        batch = prompt_batch(instructions.tokenizer, [prompts[i] for i in rows]).to(model.device)
        numbers = trie.item_numbers([excluded[i] for i in rows]) if excluded is not None else None
        return beam_search(model, **batch, trie=trie, num_beams=num_beams, excluded=numbers, score=score)

    found: dict[int, list[ScoredItem]] = {}
    was_training = model.training
    model.eval()
    bar = tqdm(total=sum(map(len, batches)), desc="search", unit="user", disable=None if show_progress else True)
    try:
        for rows, lists in run_with_oom_retry(search, batches, "user", "take fewer beams (--num_beams)"):
            found.update(zip(rows, lists, strict=True))
            bar.update(len(rows))
    finally:
        bar.close()
        model.train(was_training)
    if split:
        return _merge(found, trie, num_beams, len(prompts), model.device)
    return [found[i] for i in range(len(prompts))]


def _merge(
    found: dict[int, list[ScoredItem]], trie: Trie, num_beams: int, samples: int, device: torch.device
) -> list[list[ScoredItem]]:
    """The lists of all processes, each sample from the one that searched for it."""
    items = torch.full((samples, num_beams), -1)
    scores = torch.full((samples, num_beams), -torch.inf)
    times = torch.zeros(samples, dtype=torch.int64)
    for i, ranked in found.items():
        items[i, : len(ranked)] = torch.tensor([trie.item_to_number[r.item] for r in ranked], dtype=torch.int64)
        scores[i, : len(ranked)] = torch.tensor([r.score for r in ranked])
        times[i] += 1
    items, scores, times = items.to(device), scores.to(device), times.to(device)
    for tensor, how in ((items, "MAX"), (scores, "MAX"), (times, "SUM")):
        distributed.all_reduce(tensor, getattr(distributed.ReduceOp, how))
    if (times != 1).any():
        raise RuntimeError(f"sample {int((times != 1).nonzero()[0])} was not measured exactly once")
    return [
        [ScoredItem(trie.items[n], value) for n, value in zip(*row, strict=True) if n >= 0]
        for row in zip(items.tolist(), scores.tolist(), strict=True)
    ]
