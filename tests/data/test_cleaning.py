"""Cleaning of catalogue texts."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cleaning import clean_text, clean_value, natural_title
from reclingua.datasets.item_texts import to_text

TEXTS = {
    "Tom &amp;amp; Jerry": "Tom & Jerry",
    "R&amp;D at Q&A, AT&T": "R&D at Q&A, AT&T",
    "&lt;b&gt;bold&lt;/b&gt;": "bold",
    "one<br/>two<p class='x'>three</p>": "one two three",
    "H<sub>2</sub>O": "H2O",
    "a<script>var x = '<p>';</script>b<style>p {}</style>c": "a b c",
    "x <SCRIPT src='y'>never closed": "x",
    "<!-- no --> yes": "yes",
    "  much\t\n white\u00a0&nbsp;space ": "much white space",
    "I <3 this; 5 < 6 > 4": "I <3 this; 5 < 6 > 4",
    "&#233;&#xe9;&eacute; &bogus; &#0; &#99999999;": "ééé &bogus; \ufffd &#99999999;",
    "": "",
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cleaned(text):
    assert clean_text(text) == TEXTS[text]


@given(st.text(st.sampled_from("<>&;/!-ab #x1script \n"), max_size=200))
def test_cleaned_text_is_clean(text):
    once = clean_text(text)
    assert once == " ".join(once.split())
    assert "<script>" not in once and "&amp;" not in once


@pytest.mark.parametrize("piece", ["<", "<script", "<!--", "&amp;", "&", "<b ", "</script>", "<!"])
def test_cleaning_takes_time_linear_in_the_length(piece):
    def seconds(repetitions: int) -> float:
        text, times = piece * repetitions, []
        for _ in range(3):
            started = time.process_time()
            clean_text(text)
            times.append(time.process_time() - started)
        return min(times)

    short = next(length for length in (10_000 * 4**power for power in range(4)) if seconds(length) > 2e-3)
    assert seconds(4 * short) < 10 * seconds(short)  # quadratic: 16 times


LISTS = {
    "['<!-- .h {} -->', 'Good <b>pen</b>']": "Good pen",
    '["a", null, "b &amp; c"]': "a b & c",
    "[['Office', 'Pens'], ['Ink']]": "Office Pens Ink",
    "[REC]": "[REC]",
    "[1984]": "[1984]",
    "['open": "['open",
    "[]": "",
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_that_are_written_out_are_joined(text):
    assert clean_value(text) == LISTS[text]


def test_titles_read_naturally():
    assert natural_title("Godfather, The (1972)") == "The Godfather (1972)"
    assert natural_title("Me, Myself") == "Me, Myself" and natural_title("") == ""


@pytest.mark.parametrize("text", ["&" + "amp;" * 50_000, "&#38;" + "#38;" * 50_000, "<a " * 50_000, "<!--" * 50_000])
def test_texts_are_cleaned_in_linear_time(text):
    started = time.monotonic()
    clean_text(text)
    assert time.monotonic() - started < 3


def test_nested_lists_have_no_depth_limit():
    value = "pen"
    for _ in range(5000):
        value = [value]
    assert clean_value(value) == to_text(value) == "pen"
    assert clean_value([["a", None], "['b', 'c']", 7], ", ") == "a, b, c, 7"
