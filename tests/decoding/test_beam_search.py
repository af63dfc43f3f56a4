"""The search: only items, the best of them, whatever the model, the padding and the exclusions."""

import json
import math

import pytest
import torch

from bench.decode import generate_side
from reclingua.datasets.collators import encode_prompt, prompt_batch
from reclingua.datasets.prompts import LCREC_PROMPT_FILE, read_prompts
from reclingua.decoding import beam_search as beam_search_module
from reclingua.decoding.beam_search import beam_search
from reclingua.decoding.kv_cache import DecoderSelector, ReplicatedCacheDecoder, TreeAttentionDecoder
from reclingua.decoding.trie import Trie
from reclingua.models.language import load_model, load_tokenizer
from reclingua.models.vocabulary import extend_vocabulary, index_token_ids
from reclingua.utils.errors import InputError
from tests.helpers.models import make_model

VOCABULARY = 60
ITEMS = {f"i{n}": [10 + n // 9, 20 + n // 3 % 3, 30 + n % 3] for n in range(27)}


def prompts(lengths=(7, 3, 5), seed=0):
    """Left-padded random prompts: input_ids, attention_mask [batch, longest]."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = (
        torch.zeros(len(lengths), max(lengths), dtype=torch.long),
        torch.zeros(len(lengths), max(lengths)).long(),
    )
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


@torch.no_grad()
def exhaustive(model, prompt, sequences, end=None):
    """All items by their log-probability after one prompt, best first; no cache, no padding, no search."""
    scores = {}
    for item, tokens in sequences.items():
        answer = [*tokens, *([] if end is None else [end])]
        ids = torch.cat([prompt, torch.tensor(answer)])[None]
        log_probs = torch.log_softmax(model(ids).logits[0].float(), -1)
        scores[item] = sum(log_probs[len(prompt) - 1 + at, token].item() for at, token in enumerate(answer))
    return sorted(scores.items(), key=lambda pair: -pair[1])


def check(found, want):
    assert [r.item for r in found] == [item for item, _ in want]
    assert [r.score for r in found] == pytest.approx([score for _, score in want], abs=1e-4)


@pytest.mark.parametrize("end", [None, 2])
def test_a_beam_as_wide_as_the_items_finds_their_exact_order(architecture, end):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts()
    lists = beam_search(model, ids, mask, Trie.build(ITEMS, end), num_beams=27)
    for row, found in enumerate(lists):
        check(found, exhaustive(model, ids[row][mask[row] == 1], ITEMS, end))


@pytest.mark.parametrize("num_beams", [2, 4, 10])
def test_narrow_beams_agree_with_generate(architecture, num_beams):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts()
    lists = beam_search(model, ids, mask, Trie.build(ITEMS, end=2), num_beams)
    theirs = generate_side(model, ITEMS, num_beams, end=2)({"input_ids": ids, "attention_mask": mask})
    for found, want in zip(lists, theirs, strict=True):
        check(found, want)


def test_smollm2_agrees_with_generate_on_real_prompts(shared, smollm2):
    """Twenty beams over all items of Instruments, whose code tokens the model has just got."""
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2).eval()
    folder = shared / "data" / "Instruments"
    index = json.loads((folder / "Instruments.index.json").read_text())
    extend_vocabulary(model, tokenizer, index)
    users = json.loads((folder / "Instruments.inter.json").read_text())
    histories = [users[user][:-1] for user in ("7",)]
    (template, *_) = read_prompts(LCREC_PROMPT_FILE)["seqrec"]
    texts = [
        template.prompt.format(history=", ".join("".join(index[str(item)]) for item in history))
        for history in histories
    ]
    batch = prompt_batch(tokenizer, [encode_prompt(tokenizer, text) for text in texts])
    sequences = {tuple(tokens): item for item, tokens in index_token_ids(tokenizer, index).items()}  # twins: the last
    sequences = {item: list(tokens) for tokens, item in sequences.items()}
    trie = Trie.build(sequences, end=tokenizer.eos_token_id)
    assert len(trie) > 9000
    lists = beam_search(model, **batch, trie=trie, num_beams=20)
    want = generate_side(model, sequences, 20, tokenizer.eos_token_id)(batch)
    for found, theirs in zip(lists, want, strict=True):
        check(found, theirs)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt-neo", "mistral-window", "gemma3-window"])
@pytest.mark.parametrize("end", [None, 2])
def test_rows_with_their_own_cache_find_the_same(architecture, end):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts((7, 3, 5))
    trie = Trie.build(ITEMS, end)
    for num_beams in (3, 27):
        rows = beam_search(model, ids, mask, trie, num_beams, selector=DecoderSelector(model, "replicated"))
        if num_beams == 27:
            for row, found in enumerate(rows):
                check(found, exhaustive(model, ids[row][mask[row] == 1], ITEMS, end))
        if architecture == "llama":
            block = beam_search(model, ids, mask, trie, num_beams, selector=DecoderSelector(model, "tree"))
            for found, same in zip(rows, block, strict=True):
                check(found, [(r.item, r.score) for r in same])


@pytest.mark.parametrize(
    "architecture, length, reason",
    [
        ("bloom", 3, "does not support tree attention"),
        ("gpt-neo", 3, "does not support tree attention"),
        ("mistral-window", 4, "exceed its attention window of 6"),
        ("gemma3-window", 4, "exceed its attention window of 6"),
        ("mistral-window", 3, None),
        ("gemma", 9, None),
    ],
)
def test_the_slower_way_is_taken_where_it_must_be_and_says_so_once(architecture, length, reason, caplog):
    selector, trie = DecoderSelector(make_model(architecture, VOCABULARY)), Trie.build(ITEMS)
    expected = TreeAttentionDecoder if reason is None else ReplicatedCacheDecoder
    for _ in range(2):
        assert isinstance(selector.select(length, trie, 4), expected)
    assert len(caplog.messages) == (reason is not None) and all(reason in text for text in caplog.messages)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_half_precision_takes_the_block_path(architecture, precision):
    """The lists are those of generate() in the same precision; only near-ties may change places."""
    model = make_model(architecture, VOCABULARY, spread=4)
    if precision != "autocast":
        model.to(getattr(torch, precision))
    ids, mask = prompts([3 + n % 5 for n in range(12)])
    selector = DecoderSelector(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        lists = beam_search(model, ids, mask, Trie.build(ITEMS, end=2), 10, selector=selector)
        assert isinstance(selector.select(7, Trie.build(ITEMS, end=2), 10), TreeAttentionDecoder)
        theirs = generate_side(model, ITEMS, 10, end=2)({"input_ids": ids, "attention_mask": mask})
    for found, want in zip(lists, theirs, strict=True):
        assert len({r.item for r in found} & {item for item, _ in want}) >= 9
        for mine, (_, score) in zip(found, want, strict=True):
            assert mine.score == pytest.approx(score, rel=0.03, abs=0.1)


def test_beams_that_see_each_other_are_found_out(monkeypatch):
    """Whatever the weights: those of this model hardly attend to anything."""
    forward = TreeAttentionDecoder._forward

    def leak(self, tokens, ancestors, positions):
        return forward(self, tokens, torch.ones_like(ancestors), positions)

    monkeypatch.setattr(TreeAttentionDecoder, "_forward", leak)
    model = make_model("llama", VOCABULARY, spread=0.1)
    assert isinstance(DecoderSelector(model).select(3, Trie.build(ITEMS), 9), ReplicatedCacheDecoder)


def test_the_trial_of_a_block_fits_small_vocabularies_and_memory(monkeypatch, caplog):
    trie = Trie.build({"a": [1, 2], "b": [3, 2]})
    assert isinstance(DecoderSelector(make_model("llama", 5)).select(3, trie, 20), TreeAttentionDecoder)
    selector = DecoderSelector(make_model("llama", 5))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(TreeAttentionDecoder, "step", full)
        with pytest.raises(torch.OutOfMemoryError):
            selector.select(3, trie, 20)
    # Running out of memory is no verdict on the model.
    assert isinstance(selector.select(3, trie, 20), TreeAttentionDecoder)


def test_the_cache_has_room_for_the_beams_that_there_can_be():
    decoder = DecoderSelector(make_model("llama", VOCABULARY)).select(7, Trie.build(ITEMS, end=2), 2000)
    assert decoder.cache.layers[0].capacity == 7 + 3 + 9 + 27


def test_a_batch_gives_what_its_prompts_give_alone(architecture):
    model = make_model(architecture, VOCABULARY)
    ids, mask = prompts((9, 1, 4, 6))
    together = beam_search(model, ids, mask, Trie.build(ITEMS), 5)
    for row, found in enumerate(together):
        prompt = ids[row][mask[row] == 1][None]
        (alone,) = beam_search(model, prompt, torch.ones_like(prompt), Trie.build(ITEMS), 5)
        check(found, [(r.item, r.score) for r in alone])


def test_words_that_all_prompts_begin_with_are_computed_once():
    model = make_model("llama", VOCABULARY)
    lengths, shared = (50, 41, 42, 60), 40
    ids, mask = prompts(lengths)
    for row, length in enumerate(lengths):
        ids[row, -length : -length + shared or None] = torch.arange(shared) % 50 + 3
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    selector = DecoderSelector(model, "tree")  # which does not probe the model
    lists = beam_search(model, ids, mask, Trie.build(ITEMS, end=2), 27, selector=selector)
    hook.remove()
    assert sizes[:2] == [(1, shared), (4, 20)]
    for row, found in enumerate(lists):
        check(found, exhaustive(model, ids[row][mask[row] == 1], ITEMS, end=2))
    same = ids[:1].expand(3, -1)  # three times one prompt: all but its last word is shared
    for found in beam_search(model, same, mask[:1].expand(3, -1), Trie.build(ITEMS, end=2), 27):
        check(found, [(r.item, r.score) for r in lists[0]])


def test_excluded_items_give_way_to_the_next_best():
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts((5, 5))
    free = [exhaustive(model, prompt, ITEMS) for prompt in ids]
    excluded = [[item for item, _ in free[0][:20]], []]
    trie = Trie.build(ITEMS)
    first, second = beam_search(model, ids, mask, trie, 27, trie.item_numbers(excluded))
    check(first, free[0][20:])
    check(second, free[1])


def test_fewer_items_than_beams_and_none_at_all():
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts((4,))
    few = dict(list(ITEMS.items())[:3])
    (found,) = beam_search(model, ids, mask, Trie.build(few), 20)
    assert sorted(r.item for r in found) == sorted(few)
    assert beam_search(model, ids, mask, Trie.build(few), 20, torch.tensor([[0, 1, 2, 1, -1]])) == [[]]


def test_indices_of_different_length():
    model = make_model("llama", VOCABULARY)
    mixed = {"short": [10], "long": [10, 20, 30], "middle": [11, 21]}
    ids, mask = prompts((4, 6))
    for row, found in enumerate(beam_search(model, ids, mask, Trie.build(mixed, end=2), 20)):
        check(found, exhaustive(model, ids[row][mask[row] == 1], mixed, end=2))


def test_a_complete_item_leaves_the_beam_to_the_others():
    """With one beam the path of the best long item is followed although a short item is complete before."""
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts((4, 6, 8, 5, 7))
    mixed = {"short": [10], **{f"long {n}": [11, 20 + n, 30] for n in range(9)}}
    longs = {item: tokens for item, tokens in mixed.items() if item != "short"}
    lists = beam_search(model, ids, mask, Trie.build(mixed), 1)
    alone = beam_search(model, ids, mask, Trie.build(longs), 1)
    for row, (found, best_long) in enumerate(zip(lists, alone, strict=True)):
        scores = dict(exhaustive(model, ids[row][mask[row] == 1], mixed))
        best = max(("short", best_long[0].item), key=scores.get)
        check(found, [(best, scores[best])])


@pytest.mark.parametrize("num_beams", [2, 5])
def test_a_narrow_beam_with_exclusions_is_one_over_the_items_that_are_left(num_beams):
    model = make_model("qwen3", VOCABULARY)
    ids, mask = prompts((5, 8))
    trie = Trie.build(ITEMS, end=2)
    excluded = [[r.item for r in found] * 2 for found in beam_search(model, ids, mask, trie, 12)]
    lists = beam_search(model, ids, mask, trie, num_beams, trie.item_numbers(excluded))
    for row, found in enumerate(lists):
        left = {item: tokens for item, tokens in ITEMS.items() if item not in excluded[row]}
        (want,) = beam_search(model, ids[row : row + 1], mask[row : row + 1], Trie.build(left, end=2), num_beams)
        check(found, [(r.item, r.score) for r in want])


@pytest.mark.parametrize("end", [None, 2])
def test_legal_scores_are_probabilities_of_the_items(end):
    """Over the legal tokens the probabilities of all items sum to one; a level with one code costs nothing."""
    model = make_model("mistral", VOCABULARY)
    items = {**ITEMS, "alone": [40, 41, 42], "short": [43]}
    ids, mask = prompts()
    trie = Trie.build(items, end=2)
    for row, found in enumerate(beam_search(model, ids, mask, trie, 40, score_over="trie")):
        assert sorted(r.item for r in found) == sorted(items)
        assert sum(math.exp(r.score) for r in found) == pytest.approx(1, abs=1e-4)
        logits = model(ids[row][mask[row] == 1][None]).logits[0, -1]
        first = torch.log_softmax(logits[[10, 11, 12, 40, 43]], -1)
        scores = {r.item: r.score for r in found}
        assert scores["alone"] == pytest.approx(first[3].item(), abs=1e-4)
        assert scores["short"] == pytest.approx(first[4].item(), abs=1e-4)


def test_equal_scores_keep_the_order_of_the_tokens():
    model = make_model("llama", VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ids, mask = prompts()
    mixed = {"e": [12, 5], "b": [11, 7], "a": [11, 3], "d": [11, 9], "c": [10]}
    for found in beam_search(model, ids, mask, Trie.build(mixed), 4):
        assert [r.item for r in found] == ["c", "a", "b", "d"]


def test_a_generation_config_plays_no_part():
    model = make_model("llama", VOCABULARY)
    ids, mask = prompts()
    before = beam_search(model, ids, mask, Trie.build(ITEMS), 5)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=5.0)
    assert beam_search(model, ids, mask, Trie.build(ITEMS), 5) == before


def test_narrow_numbers_give_nearly_the_same():
    """bf16: the scores of float32 within its rounding; the mask has the model's type."""
    model = make_model("qwen2", VOCABULARY, spread=2)
    ids, mask = prompts()
    want = beam_search(model, ids, mask, Trie.build(ITEMS), 27)
    for found, exact in zip(beam_search(model.bfloat16(), ids, mask, Trie.build(ITEMS), 27), want, strict=True):
        exact = {r.item: r.score for r in exact}
        assert {r.item: r.score for r in found} == pytest.approx(exact, abs=0.15)


@pytest.mark.parametrize(
    "score, token, value",
    [("vocabulary", 11, math.nan), ("trie", 11, math.nan), ("trie", 11, math.inf), ("vocabulary", 50, math.inf)],
)
def test_scores_that_are_not_finite(score, token, value):
    model = make_model("llama", VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[token] = value
    with pytest.raises(InputError, match="scores are not finite"):
        beam_search(model, *prompts(), Trie.build(ITEMS), 3, score_over=score)


def test_what_a_programmer_gets_wrong():
    model = make_model("llama", VOCABULARY)
    for options in ({"score_over": "Full"}, {"model": model.train()}):
        with pytest.raises(ValueError, match="should be False, and one of"):
            arguments = {"model": make_model("llama", VOCABULARY), "score_over": "vocabulary"} | options
            input_ids, mask = prompts()
            beam_search(**arguments, input_ids=input_ids, attention_mask=mask, trie=Trie.build(ITEMS), num_beams=3)


@pytest.mark.parametrize("size", [1, 4 * 7 * 3, 2**30])
def test_the_normaliser_is_that_of_all_rows_at_once(monkeypatch, size):
    monkeypatch.setattr(beam_search_module, "NORMALISER_BYTES", size)
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = logits.float().logsumexp(2, keepdim=True)
    assert torch.equal(beam_search_module.log_normaliser(logits), expected)
