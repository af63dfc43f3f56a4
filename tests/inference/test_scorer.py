"""Scorer: plain histories and dataset parts get the same scores, for Yes/No and for collaborative models."""

import numpy as np
import pytest
import torch

from reclingua import Scorer
from reclingua.datasets.ratings import to_numpy
from reclingua.utils.errors import InputError


@pytest.mark.parametrize("folder", ["tallrec", "mf", "sasrec"])
def test_histories_get_what_a_dataset_part_gets(studio, folder):
    scorer = Scorer.from_pretrained(studio / folder, studio)
    part = scorer.dataset.parts["test"].select(range(0, 200, 9))
    histories = [[str(item) for item in items] for items in part["his"]]
    users, items = ([str(number) for number in to_numpy(part, name)] for name in ("uid", "iid"))
    scores = scorer.score(part)
    assert scores.dtype == np.float32 and scores.std() > 0
    np.testing.assert_allclose(scorer.score(histories, items, users), scores, atol=1e-5)
    probabilities = scorer.probabilities(scores)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert (np.argsort(probabilities) == np.argsort(scores)).all()


def test_what_cannot_be_scored_is_refused(studio, workshop, tuned):
    scorer = Scorer.from_pretrained(studio / "tallrec", studio)
    assert scorer.score([["1", "2"]], ["3"]).shape == (1,)  # of a user who is not in the data
    for histories, items, users, message in (
        ([["1"]], ["3", "4"], None, "1 histories, 2 items"),
        ([["1"]], ["99"], None, "item '99' is not in item.json"),
        ([["x"]], ["3"], None, "item 'x' is not in item.json"),
        ([["1"]], ["3"], ["41"], "user '41' is not in liked"),
        ([["1"]], ["3"], ["nobody"], "user 'nobody' is not in liked"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.score(histories, items, users)
    for options, message in (
        ({"batch_size": -1}, "batch_size -1"),
        ({"prompt_id": 9}, "prompt_id 9: should be from 0"),
    ):
        with pytest.raises(InputError, match=message):
            scorer.score([["1"]], ["3"], **options)
    with pytest.raises(InputError, match="not the text '12'"):
        scorer.score(["12"], ["3"])
    with pytest.raises(InputError, match="reads no prompts"):
        collaborative = Scorer.from_pretrained(studio / "mf", studio)
        collaborative.encode(collaborative.dataset.parts["test"])
    with pytest.raises(InputError, match="use Recommender"):
        Scorer.from_pretrained(tuned, workshop / "datasets")


def test_untuned_is_the_base_model_before_lora(studio):
    scorer = Scorer.from_pretrained(studio / "tallrec", studio)
    rows = scorer.dataset.parts["test"].select(range(40))
    tuned, untuned = scorer.score(rows), scorer.untuned().score(rows)
    assert abs(tuned - untuned).max() > 1e-3
    with torch.no_grad():
        for name, weight in scorer.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    np.testing.assert_allclose(scorer.score(rows), untuned, atol=1e-5)
    with pytest.raises(InputError, match="mf has no base model"):
        Scorer.from_pretrained(studio / "mf", studio).untuned()
