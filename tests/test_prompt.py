"""What goes into a prompt, and what is left out and said so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import ContextTooLong
from modules.messages import Message
from modules.prompt import TEMPLATE_TOKENS, Bounds, build


def count(texts):
    return tuple(len(text.split()) for text in texts)


def talk(*sizes):
    return [Message("user" if i % 2 == 0 else "assistant", "w " * n) for i, n in enumerate(sizes)]


def test_all_of_it_fits():
    turns = talk(3, 4, 5)
    built = build("be kind", turns, Bounds(1000, 100), count)
    assert built.messages == (Message("system", "be kind"), *turns) and built.left_out == ""
    assert built.tokens == 2 + 3 + 4 + 5 + 4 * TEMPLATE_TOKENS


def test_the_oldest_go_first_and_a_prompt_begins_with_a_person():
    built = build("", talk(100, 100, 100, 100, 10), Bounds(400, 100), count)
    assert [m.role for m in built.messages] == ["user", "assistant", "user"]
    assert "2 oldest messages" in built.left_out


def test_the_last_message_must_fit():
    with pytest.raises(ContextTooLong, match=r"508 tokens.*room for 300"):
        build("", talk(500), Bounds(400, 100), count)


def test_a_model_of_one_turn_takes_the_latest_picture_along():
    turns = [
        Message("user", "what is this", ("1.png", "2.png")),
        Message("assistant", "a cat"),
        Message("user", "which colour"),
    ]
    built = build("s", turns, Bounds(1000, 10, max_turns=1, max_images=1, image_tokens=16), count)
    assert built.messages == (Message("system", "s"), Message("user", "which colour", ("2.png",)))
    assert "only your last message" in built.left_out and "1 picture" in built.left_out
    fresh = [*turns[:2], Message("user", "and this", ("3.png",))]
    assert build("", fresh, Bounds(1000, 10, max_turns=1, image_tokens=16), count).messages[0].images == ("3.png",)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(100, 600), st.integers(1, 400))
def test_it_never_exceeds_the_room(sizes, context, max_tokens):
    turns = talk(*sizes)
    if turns[-1].role != "user":
        turns = turns[1:] or turns
    built = build("", turns, Bounds(context, max_tokens), count)
    assert built.tokens <= context - min(max_tokens, int(context * 0.25))
    assert built.messages[-1] == turns[-1] and list(built.messages) == turns[len(turns) - len(built.messages) :]
