"""Soft labels of EASE: a slow, obvious version, the temperature, semantic IDs of any shape, bad input."""

import numpy as np
import pytest

from reclingua.baselines import fit_baselines
from reclingua.baselines.teacher import EASETeacher
from reclingua.datasets.interactions import open_interactions
from reclingua.utils.errors import InputError
from tests.helpers.toys import write_toy

# Item -> token ids of its semantic ID, in an order that is not theirs.
TOKEN_IDS = {"0": [50, 61], "1": [51, 60], "2": [50, 60], "3": [52, 62], "4": [50, 62], "5": [51, 61], "6": [52, 60]}
TOKEN_IDS |= {"7": [51, 62], "8": [53, 60]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_interactions(write_toy(tmp_path_factory.mktemp("toys")).parent, "toy")


def probabilities_of_ease(dataset, teacher, history, excludes_seen):
    """Item -> probability after a history: a softmax over standardised scores."""
    scores = fit_baselines(dataset, excludes_seen, ["ease"]).scores("ease", history)
    scores = {item: score for item, score in scores.items() if not excludes_seen or item not in history}
    values = np.array(list(scores.values()))
    odds = np.exp(teacher.sharpness * (values - values.mean()) / values.std())
    return dict(zip(scores, odds / odds.sum(), strict=True))


@pytest.mark.parametrize("excludes_seen", [False, True])
@pytest.mark.parametrize("first", [1, 3])
def test_soft_labels_of_a_slow_version(dataset, excludes_seen, first):
    teacher, history = EASETeacher(dataset, TOKEN_IDS, 0.4, excludes_seen), ["4", "5", "7", "6", "0", "2"]
    labels = teacher.soft_labels(history, first, 6).reshape(6 - first, 2, len(teacher.tokens))
    assert labels.dtype == np.float32 and teacher.tokens.tolist() == [50, 51, 52, 53, 60, 61, 62]
    for row, place in enumerate(range(first, 6)):
        odds = probabilities_of_ease(dataset, teacher, history[:place], excludes_seen)
        target = TOKEN_IDS[history[place]]
        for level in range(2):
            alike = {item: odd for item, odd in odds.items() if TOKEN_IDS[item][:level] == target[:level]}
            expected = np.zeros(len(teacher.tokens))
            for item, odd in alike.items():
                expected[teacher.tokens.tolist().index(TOKEN_IDS[item][level])] += 0.4 * odd / sum(alike.values())
            np.testing.assert_allclose(labels[row, level], expected, atol=1e-5)


def test_a_target_whose_siblings_are_all_seen_has_no_soft_label(dataset):
    teacher = EASETeacher(dataset, TOKEN_IDS, 0.5, excludes_seen=True)
    labels = teacher.soft_labels(["8", "1", "8"], 1, 3)  # the only item that begins with 53, taken again
    assert labels[2].sum() == pytest.approx(0.5) and labels[3].sum() == 0


def test_the_sharpness_is_that_of_the_largest_likelihood_on_valid(dataset):
    teacher = EASETeacher(dataset, TOKEN_IDS, 0.5, False)
    splits, chosen, likelihoods = [dataset.split(user, "valid") for user in dataset.test_users], teacher.sharpness, []
    for teacher.sharpness in (0.8 * chosen, chosen, 1.25 * chosen):
        odds = [probabilities_of_ease(dataset, teacher, history, False)[target] for history, target in splits]
        likelihoods.append(np.log(odds).sum())
    assert 0.1 < chosen < 9 and np.argmax(likelihoods) == 1


def test_semantic_ids_of_several_lengths(dataset):
    with pytest.raises(InputError, match="several lengths"):
        EASETeacher(dataset, TOKEN_IDS | {"8": [53]}, 0.5, False)
