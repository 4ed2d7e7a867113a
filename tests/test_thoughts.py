"""The splitter of thought and answer, over every way of cutting the text into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.engines.thoughts import ThoughtSplitter


def split(pieces, opened=False):
    splitter = ThoughtSplitter(opened)
    out = {"text": "", "reasoning": ""}
    for piece in pieces:
        for channel, text in splitter.feed(piece):
            out[channel] += text
    for channel, text in splitter.finish():
        out[channel] += text
    return out["reasoning"], out["text"]


@pytest.mark.parametrize(
    ("raw", "opened", "expected"),
    [
        ("<think>\nhm\n</think>\n\nSeven.", False, ("hm", "Seven.")),
        ("hm\n</think>\n\nSeven.", True, ("hm", "Seven.")),
        ("Seven.", False, ("", "Seven.")),
        ("  indented", False, ("", "  indented")),
        ("Write `<think>` first.", False, ("", "Write `<think>` first.")),
        ("<think></think>\nSeven.", False, ("", "Seven.")),
        ("<think>never closed", False, ("never closed", "")),
        ("<thin", False, ("", "<thin")),
        ("<think>a < b</th", False, ("a < b</th", "")),
        ("", False, ("", "")),
        ("\n\n<think>x</think>y", False, ("x", "y")),
    ],
)
def test_every_cut_gives_the_same(raw, opened, expected):
    for a, b in itertools.combinations_with_replacement(range(len(raw) + 1), 2):
        assert split([raw[:a], raw[a:b], raw[b:]], opened) == expected
    assert split(list(raw), opened) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", " ", "\n", "a", "é"])), st.booleans())
def test_pieces_do_not_matter(pieces, opened):
    assert split(pieces, opened) == split(["".join(pieces)], opened)


def test_text_is_given_out_as_soon_as_it_is_certain():
    splitter = ThoughtSplitter()
    assert splitter.feed("<think>abc") == [("reasoning", "abc")]
    assert splitter.feed(" <") == []
    assert splitter.feed("b") == [("reasoning", " <b")]
