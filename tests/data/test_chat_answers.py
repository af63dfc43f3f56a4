"""Answers of a chat model: cleaning, reasons of rejection, and the journal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat_answers import Request, ResponseCache, clean_answer, rejection_reason
from reclingua.utils.errors import InputError

CLEAN = {
    '"A light."': "A light.",
    "Sure! Here it is:\n\n1. A light for work.": "A light for work.",
    "A light.\n\nI hope this helps!": "A light.",
    "<think>Hm.\n\nA lamp?</think>\n\nA light.": "A light.",
    "<think>Hm, a lamp": "",
    "- **A light** for\n  work": "A light for work",
    "": "",
    "Answer:": "",
    "a\ud800b\x00c": "a b c",
}


@pytest.mark.parametrize("answer", CLEAN)
def test_answers_are_cleaned(answer):
    assert clean_answer(answer, is_complete=True) == CLEAN[answer]


def test_an_answer_that_was_cut_off_ends_with_its_last_sentence():
    assert clean_answer("A light. It is for wor", is_complete=False) == "A light."
    assert clean_answer("A light for wor", is_complete=False) == ""
    assert clean_answer("A light for work\n\nIt is ma", is_complete=False) == "A light for work"


LAMP = Request("Product: Acme G7 Lamp (Seven). Bright.\nWhat is it that you see here, in a few words?",
               "Product: {item}\nWhat is it that you see here, in a few words?", "Acme G7 Lamp (Seven)")  # fmt: skip
REASONS = {
    "Something bright for the night.": None,
    "A lamp by somebody.": None,
    "I want the acme g7, lamp.": "names the item",
    "I want the ACME G7 LAMP (SEVEN) now.": "names the item",
    "They call it Seven, I think.": "names the item",
    "I want the Acme G7 Lampshade.": None,
    "": "empty or too short",
    "Hm.": "empty or too short",
    "!!!!!!!!!!!!!!!": "empty or too short",
    "Something br\ufffdght for the night.": "not decodable",
    "bright " * 100: "too long",
    "Well, what is it that you see here, in a hut?": "repeats the prompt",
    "what is it that you see": "repeats the prompt",
    "made with shot made with shot made with shot": "repeats itself",
}


@pytest.mark.parametrize("text", REASONS)
def test_invalid_answers_are_rejected(text):
    assert rejection_reason(text, LAMP) == REASONS[text]


@given(before=st.text(max_size=30), title=st.text(min_size=1, max_size=60), after=st.text(max_size=30))
def test_an_answer_with_the_title_is_always_rejected(before, title, after):
    if any(c.isalnum() for c in title):
        text = clean_answer(f"{before} {title} {after}", is_complete=True)
        if title in text:
            assert rejection_reason(text, Request("prompt", "template", title)) is not None


def test_rejected_answers_are_kept(tmp_path):
    request = Request("prompt", "template")
    for _ in range(2):
        with ResponseCache(tmp_path / "journal", {"model": "m"}) as journal:
            journal.add(request, "", "too long")
    with ResponseCache(tmp_path / "journal", {"model": "m"}) as journal:
        assert journal.num_rejected[request.key] == 2 and journal.reasons == {"too long": 2} and len(journal) == 2
        assert journal.is_done(request, 2) and not journal.is_done(request, 3)


def test_a_journal_is_locked_by_its_run(tmp_path):
    with ResponseCache(tmp_path / "journal", {"model": "m"}):
        with pytest.raises(InputError, match="another run is writing to it"), ResponseCache(tmp_path / "journal", {}):
            pass
    assert list(tmp_path.iterdir()) == []  # an empty journal is deleted


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"model": "other", "seed": 1}\n', "was made with other model; use the same, or delete the file"),
        ("my diary\n", "line 1 is no journal entry"),
        ('{"model": "m", "seed": 1}\n{"request": "x"}\n', "line 2 is no journal entry"),
        ('{"model": "m", "seed": 1}\n{"request": 1, "text": "x"}\n', "line 2 is no journal entry"),
        ('{"model": "m", "seed": 1}\n{"request": "x", "text": "y"}\n\0\0\n', "line 3 is no journal entry"),
    ],
)
def test_other_journals_are_rejected(tmp_path, content, message):
    path = tmp_path / "journal"
    path.write_text(content)
    with pytest.raises(InputError, match=message), ResponseCache(path, {"model": "m", "seed": 1}):
        pass
    assert path.read_text() == content


@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_journal_is_read_or_rejected(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(b'{"model": "m"}\n' + content)
    try:
        with ResponseCache(path, {"model": "m"}) as journal:
            journal.add(Request("prompt", "template"), "text", None)
    except InputError:
        return
    with ResponseCache(path, {"model": "m"}) as reopened:
        assert reopened.texts == journal.texts
