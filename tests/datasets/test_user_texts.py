"""D.user.json: what is written is read again, LC-Rec's own shape is read, and what is wrong is refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.user_texts import (
    INTENTIONS,
    PREFERENCES,
    Intention,
    UserTexts,
    intention_context,
    read_user_texts,
    write_user_texts,
)
from reclingua.utils.errors import InputError


@pytest.fixture
def dataset(toy):
    return open_interactions(toy, "toy")  # user 0 has the items 0 to 5, of which 4 and 5 are held out


def texts_of(dataset, users=("0", "1")):
    texts = UserTexts({user: [f"likes ring {user}", "likes walks"] for user in users})
    for part, of_part in texts.intentions.items():
        for user in users:
            history, item = intention_context(dataset, user, part)
            of_part[user] = Intention(item, history, f"user {user} wants it", f"a thing for {part}")
    return texts


def published():
    """A file in the shape of LC-Rec's own: items are numbers, every section is there."""
    record = {"item": 3, "inters": [0, 1, 2], "querys": ["something round", "a ring"]}
    test = {"item": 5, "inters": [0, 1, 2, 3, 4], "querys": ["something square", "a box"]}
    return {PREFERENCES: {"0": ["rings"]}, INTENTIONS: {"train": {"0": record}, "test": {"0": test}}}


def write(dataset, content):
    path = dataset.folder / "toy.user.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_is_written_is_read_again(dataset, tmp_path):
    texts = texts_of(dataset)
    write_user_texts(tmp_path / "elsewhere.json", texts)
    assert read_user_texts(dataset, tmp_path / "elsewhere.json") == texts
    write_user_texts(dataset.folder / "toy.user.json", texts)
    assert read_user_texts(dataset) == texts


def test_the_occasion_of_training_is_the_last_item_that_training_knows(dataset):
    assert intention_context(dataset, "0", "train") == (["0", "1", "2"], "3")
    assert intention_context(dataset, "0", "test") == (["0", "1", "2", "3", "4"], "5")


def test_the_published_shape_is_read(dataset):
    write(dataset, published())
    texts = read_user_texts(dataset)
    assert texts.preferences == {"0": ["rings"]}
    assert texts.intentions["train"] == {"0": Intention("3", ["0", "1", "2"], "something round", "a ring")}
    assert texts.intentions["test"]["0"].item == "5"


def test_a_part_may_be_missing(dataset):
    content = published()
    del content[INTENTIONS]["test"]
    write(dataset, content)
    assert read_user_texts(dataset).intentions["test"] == {}


def change(*keys, to):
    """A change of one place in the published file."""

    def apply(content):
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = to

    return apply


TRAIN, TEST = (INTENTIONS, "train", "0"), (INTENTIONS, "test", "0")
BAD = {
    "no preferences": (lambda c: c.pop(PREFERENCES), "'user_explicit_preference' should exist"),
    "no intentions": (lambda c: c.pop(INTENTIONS), "'user_vague_intention' should exist"),
    "preferences a list": (change(PREFERENCES, to=[]), "'user_explicit_preference' should exist and map users"),
    "part a list": (change(INTENTIONS, "train", to=[]), "'train' should exist and map users"),
    "preference of no user": (change(PREFERENCES, "99", to=["x"]), "user '99' is not in toy.inter.json"),
    "intention of no user": (change(INTENTIONS, "test", "99", to={}), "user '99' is not in toy.inter.json"),
    "preference a text": (change(PREFERENCES, "0", to="rings"), "user '0' should be a list of texts"),
    "no preference": (change(PREFERENCES, "0", to=[]), "user '0' should be a list of texts"),
    "blank preference": (change(PREFERENCES, "0", to=["rings", " "]), "user '0' should be a list of texts"),
    "record a list": (change(*TRAIN, to=[]), "train, user '0' should have an item, inters and two querys"),
    "one query": (change(*TRAIN, "querys", to=["x"]), "train, user '0' should have an item, inters and two querys"),
    "query a number": (change(*TEST, "querys", to=["x", 1]), "test, user '0' should have an item"),
    "no item": (change(*TRAIN, "item", to=None), "train, user '0' should have an item and a list of inters"),
    "inters a text": (change(*TRAIN, "inters", to="0, 1"), "train, user '0' should have an item and a list of inters"),
    "valid item in train": (change(*TRAIN, "item", to=4), "item '4', which is not in the user's training history"),
    "test item in train": (change(*TRAIN, "item", to=5), "item '5', which is not in the user's training history"),
    "told in train": (
        change(*TRAIN, "inters", to=[0, 5]),
        "item '5' among its inters, which the user did not have before",
    ),
    "unknown item": (change(*TEST, "inters", to=[8]), "item '8' among its inters, which the user did not have before"),
    "its own answer": (change(*TEST, "inters", to=[0, 5]), "item '5' among its inters, which the user did not have"),
    "not the last": (change(*TEST, "item", to=4), "item '4', which is not the user's last"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_named(dataset, case):
    apply, message = BAD[case]
    content = published()
    apply(content)
    path = write(dataset, content)
    with pytest.raises(InputError) as raised:
        read_user_texts(dataset)
    assert message in str(raised.value) and str(path) in str(raised.value)


@pytest.mark.parametrize(
    "content, message",
    [("", "not valid JSON"), ("{}", "is empty"), ("[1]", "contains a list"), ('{"a": 1, "a": 2}', "occurs twice")],
)
def test_files_that_are_none_are_refused(dataset, content, message):
    write(dataset, content)
    with pytest.raises(InputError, match=message):
        read_user_texts(dataset)


def test_a_missing_file_says_who_makes_it(dataset):
    with pytest.raises(InputError, match="toy.user.json: no such file.*data.intentions makes it"):
        read_user_texts(dataset)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.sampled_from(["0", "5", "99", "a text", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("0129"), inner, max_size=3),
    max_leaves=8,
)
PLACES = [(PREFERENCES,), (PREFERENCES, "0"), (INTENTIONS,), (INTENTIONS, "train"), TRAIN, TEST]
PLACES += [(*record, key) for record in (TRAIN, TEST) for key in ("item", "inters", "querys")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_whatever_stands_there_is_read_or_refused(dataset, place, value):
    content = published()
    change(*place, to=value)(content)
    write(dataset, content)
    try:
        texts = read_user_texts(dataset)
    except InputError:
        return
    assert all(found.item in dataset.train_history(user) for user, found in texts.intentions["train"].items())
    assert all(found.item == dataset.histories[user][-1] for user, found in texts.intentions["test"].items())
    assert all(isinstance(text, str) and text for given in texts.preferences.values() for text in given)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(0, 400))
def test_a_file_that_is_cut_off_is_refused(dataset, cut):
    whole = json.dumps(published())
    path = dataset.folder / "toy.user.json"
    path.write_text(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(InputError):
        read_user_texts(dataset)
