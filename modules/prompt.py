"""Pure: preset + conversation + token counts -> the messages that fit, and what was left out. No engine, no disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modules.errors import ContextTooLong
from modules.messages import Message

ANSWER_SHARE = 0.25  # of the context is kept for the answer, unless max_tokens asks for less
TEMPLATE_TOKENS = 8  # role names and turn marks of one message
IMAGE_TOKENS = 1300  # upper estimate of one picture at the pixel cap; the demo model takes 16


@dataclass(frozen=True)
class Prompt:
    """What goes to the engine. left_out says in words what did not; empty when all of it fits."""

    messages: tuple[Message, ...]
    tokens: int
    left_out: str = ""


@dataclass(frozen=True)
class Bounds:
    """Limits in tokens, turns and pictures; 0 means no limit for the last three."""

    context: int
    max_tokens: int
    max_turns: int = 0
    max_images: int = 0
    image_tokens: int = IMAGE_TOKENS


def build(
    system: str, history: Sequence[Message], bounds: Bounds, count: Callable[[tuple[str, ...]], tuple[int, ...]]
) -> Prompt:
    """Choose the newest turns that fit; the system prompt and the last message always stay.

    history ends with the message to answer. count gives the tokens of texts, called once.
    Raises ContextTooLong when the system prompt and the last message alone do not fit.
    """
    notes: list[str] = []
    turns = list(history)
    if bounds.max_turns:
        turns = _carry_images(turns, bounds.max_turns, notes)
    if bounds.max_images:
        turns = _limit_images(turns, bounds.max_images, notes)
    head = [Message("system", system)] if system else []
    sizes = count(tuple(m.text for m in [*head, *turns]))
    costs = [
        size + TEMPLATE_TOKENS + len(m.images) * bounds.image_tokens
        for size, m in zip(sizes, [*head, *turns], strict=True)
    ]
    room = bounds.context - min(bounds.max_tokens, int(bounds.context * ANSWER_SHARE))
    total = sum(costs[: len(head)]) + costs[-1]
    if total > room:
        raise ContextTooLong(f"The message takes about {total} tokens, and there is room for {room}.")
    kept, costs = [turns[-1]], costs[len(head) :]
    for message, cost in zip(reversed(turns[:-1]), reversed(costs[:-1]), strict=True):
        if total + cost > room:
            break
        kept.append(message)
        total += cost
    while len(kept) > 1 and kept[-1].role == "assistant":
        kept.pop()  # templates want the conversation to begin with a person's turn
    dropped = len(turns) - len(kept)
    if dropped:
        notes.append(f"The {dropped} oldest messages do not fit the context and were left out.")
    return Prompt((*head, *reversed(kept)), total, " ".join(notes))


def _carry_images(turns: list[Message], max_turns: int, notes: list[str]) -> list[Message]:
    """Keep the last turns only; a question without a picture takes the latest picture of the turns that go."""
    people = [i for i, m in enumerate(turns) if m.role == "user"]
    first = people[-max_turns] if len(people) >= max_turns else 0
    kept, gone = turns[first:], turns[:first]
    if gone and not any(m.images for m in kept):
        latest = next((m.images for m in reversed(gone) if m.images), ())
        kept[-1] = Message(kept[-1].role, kept[-1].text, latest)
    if gone:
        notes.append(
            "This model sees only your last message." if max_turns == 1 else f"This model sees {max_turns} turns."
        )
    return kept


def _limit_images(turns: list[Message], max_images: int, notes: list[str]) -> list[Message]:
    """Keep the newest pictures."""
    left, out, dropped = max_images, [], 0
    for message in reversed(turns):
        images = message.images[len(message.images) - min(left, len(message.images)) :]
        left -= len(images)
        dropped += len(message.images) - len(images)
        out.append(Message(message.role, message.text, images))
    if dropped:
        notes.append(f"This model looks at {max_images} picture{'s' if max_images > 1 else ''}; the newest were used.")
    return out[::-1]
