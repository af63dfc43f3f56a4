"""Durations in words."""

import pytest

from reclingua.utils.text import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (12000, "3 h 20 min")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
