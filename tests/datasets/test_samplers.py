"""Batches by length and by tokens: every sample once, the limits kept, all processes alike."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reclingua.datasets.collators import CausalLMCollator
from reclingua.datasets.samplers import ORDERS, LengthGroupedBatchSampler
from reclingua.utils.errors import InputError
from tests.datasets.test_instructions import build
from tests.helpers.models import make_tokenizer

LENGTHS = st.lists(st.integers(1, 40), min_size=4, max_size=80)


def cost(lengths, batch, packed):
    return sum(lengths[i] for i in batch) if packed else max(lengths[i] for i in batch) * len(batch)


@given(
    LENGTHS,
    st.integers(1, 4),
    st.sampled_from([(order, packed) for order in ORDERS for packed in (False, True)]),
    st.one_of(st.tuples(st.integers(1, 9), st.just(0)), st.tuples(st.just(1), st.integers(80, 200))),
)
def test_every_sample_once_and_the_limits_kept(lengths, processes, how, limits):
    (order, packed), (size, tokens) = how, limits
    if tokens and not packed and order != "group_by_length":
        return
    counts = set()
    for epoch in range(3):
        shares = []
        for rank in range(processes):
            batches = LengthGroupedBatchSampler(
                lengths, size, tokens, packed, order, seed=1, rank=rank, processes=processes
            )
            batches.set_epoch(epoch)
            shares.append(list(batches))
            counts.add((len(batches), len(shares[-1])))
        taken = [batch for share in shares for batch in share]
        times = Counter(i for batch in taken for i in batch)
        assert sorted(times) == list(range(len(lengths)))
        assert max(times.values()) == 1 or (all(len(batch) == 1 for batch in taken) and len(taken) % processes == 0)
        for batch in taken:
            assert batch
            assert cost(lengths, batch, packed) <= tokens if tokens else len(batch) <= size
    (count,) = counts
    assert count[0] == count[1]  # the same in each epoch and process, and as `len` says


def test_epochs_differ_and_runs_do_not():
    lengths = [5, 5, 5, 9, 9, 9, 9, 2] * 5

    def drawn(epoch, seed=3):
        batches = LengthGroupedBatchSampler(lengths, 4, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=4)
    assert list(LengthGroupedBatchSampler(lengths, 4, order="sequential"))[0] == [0, 1, 2, 3]


def test_batches_by_length_have_less_padding_and_the_longest_first():
    lengths = np.random.default_rng(0).integers(5, 60, 500).tolist()

    def padding(order):
        batches = list(LengthGroupedBatchSampler(lengths, 8, order=order))
        return 1 - sum(lengths) / sum(cost(lengths, batch, packed=False) for batch in batches)

    assert padding("group_by_length") < 0.03 < 0.2 < padding("random")
    assert max(lengths) in [lengths[i] for i in next(iter(LengthGroupedBatchSampler(lengths, 8)))]


def test_processes_take_batches_of_about_the_same_length_at_the_same_time():
    lengths = np.random.default_rng(0).integers(5, 60, 640).tolist()
    first, second = (LengthGroupedBatchSampler(lengths, 8, rank=rank, processes=2) for rank in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert abs(np.mean([lengths[i] for i in ours]) - np.mean([lengths[i] for i in theirs])) < 4


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"max_tokens": 30}, "should be 40 at least"),
        ({"max_tokens": 79, "packed": True, "order": "random"}, "should be 80 at least"),
        ({"max_tokens": 100, "order": "random"}, "needs --packing"),
    ],
)
def test_limits_that_cannot_be_kept(how, says):
    with pytest.raises(InputError, match=says):
        LengthGroupedBatchSampler([40, 7, 3], **how)


@pytest.mark.slow
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("targets", ["last", "all"])
@pytest.mark.parametrize("how", [{}, {"add_prefix": True, "his_sep": " then "}])
def test_lengths_are_those_of_the_samples(toy, targets, bos, how):
    _, instructions = build(toy, targets, bos, templates_per_sample={"seqrec": 2, "seqrec_history": 2}, **how)
    longest, seen = instructions.lengths(longest=True), np.zeros(len(instructions), dtype=int)
    for epoch in range(40):
        instructions.set_epoch(epoch)
        written = [len(instructions[i]["input_ids"]) for i in range(len(instructions))]
        assert instructions.lengths().tolist() == written
        seen = np.maximum(seen, written)
    assert (seen == longest).mean() > 0.9 and (seen <= longest).all()


def test_batches_are_sorted_by_the_lengths_of_the_epoch_within_the_limits_of_all(toy):
    _, instructions = build(toy, "last")
    longest = instructions.lengths(longest=True)
    batches = LengthGroupedBatchSampler(longest, max_tokens=3 * int(longest.max()), epoch_lengths=instructions.lengths)
    counts = set()
    for epoch in range(9):
        instructions.set_epoch(epoch)
        batches.set_epoch(epoch)
        lengths, taken = instructions.lengths(), list(batches)
        assert max(cost(lengths, batch, packed=False) for batch in taken) <= 3 * longest.max()
        spans = sorted((min(lengths[batch]), max(lengths[batch])) for batch in taken)
        assert all(high <= low for (_, high), (low, _) in zip(spans, spans[1:], strict=False))
        counts.add(len(taken))
    assert counts == {len(batches)}


def test_packed_rows_hold_every_token_once():
    tokenizer = make_tokenizer(bos=False)
    samples = [{"input_ids": [100 + i] * n, "labels": [100 + i] * n} for i, n in enumerate([3, 9, 4, 5, 2, 9])]
    batch = CausalLMCollator(tokenizer, packing=True)(samples)
    assert batch["input_ids"].shape == (4, 9)  # 32 tokens in rows of 9
    assert batch["lengths"].sum() == 32 == (batch["input_ids"] != tokenizer.pad_token_id).sum()
    for i, n in enumerate([3, 9, 4, 5, 2, 9]):
        at = batch["input_ids"] == 100 + i
        assert batch["position_ids"][at].tolist() == list(range(n))
        assert (batch["labels"][at] == 100 + i).sum() == n - 1  # all but the first
    row = CausalLMCollator(tokenizer, packing=True, flatten=True)(samples)
    assert row["input_ids"].shape == (1, 32) and (row["position_ids"] == 0).sum() == 6
    assert row["cu_seq_lens_q"].tolist() == (row["position_ids"][0] == 0).nonzero()[:, 0].tolist() + [32]
    assert row["max_length_k"] == 9
