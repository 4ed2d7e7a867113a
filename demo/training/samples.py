"""What the four data generators share: samples, held-out hashing, made-up words and ways to write a question.

Standard library only, so that the generators can be read and tested without torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One question, the exact answer, and what a checker needs to judge another answer."""

    question: str
    answer: str
    facts: Any = None
    kind: str = ""


SYLLABLES = (
    "ba be bi bo da de do fa fi ga go ha jo ka ke ki la le li lo ma me mi mo na ne no pa pe ra re ri ro sa se si "
    "ta te ti to va ve vi wa ya zo chu dri flo gre ny qui shu tra xa zy"
).split()


def held_out(share: float, *key: object) -> bool:
    """True for a fixed share of all keys; those are for tests only and never enter the training."""
    return hashlib.sha256(repr(key).encode()).digest()[0] < share * 256


def made_up_word(rng: random.Random) -> str:
    """A word that no list contains, so that copying is learnt instead of a vocabulary."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def random_letters(rng: random.Random, low: int, high: int) -> str:
    """Letters without any pattern: the hardest thing to copy."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(low, high)))


def cut_word(rng: random.Random, sentences: list[str]) -> str:
    """Pieces of real words stuck together, so that every piece of the vocabulary gets copied now and then."""
    out = ""
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        word = rng.choice(re.findall(r"[a-z]{2,}", rng.choice(sentences).lower()) or ["word"])
        start = rng.choice([0, 0, rng.randrange(len(word))])
        out += word[start:start + rng.randint(2, 9)]
    return out


def vary_writing(rng: random.Random, question: str, *, question_mark: bool = True) -> str:
    """The same words in another letter case or with other punctuation at the end."""
    bare = question.rstrip("?.! ")
    ends = ["", "", ".", "!"] + (["?", "?", "?", " ?"] if question_mark else [])
    text = bare + rng.choice(ends)
    roll = rng.random()
    if roll < 0.5:
        return text[:1].upper() + text[1:]
    if roll < 0.85:
        return text
    return text.lower()


GREETINGS = ["hello", "hi", "hey", "good morning", "good evening", "hi there", "hello there", "hey you", "greetings",
             "good afternoon", "hello friend", "hi, how are you", "how are you", "how are you doing", "yo"]
THANKS = ["thanks", "thank you", "thank you very much", "thanks a lot", "great, thanks", "ok thanks", "many thanks",
          "thx", "cool, thank you", "nice, thanks"]


def small_talk(rng: random.Random, hello: str, welcome: str) -> Sample:
    """A greeting or a word of thanks, with the answer of the model that is being trained."""
    if rng.random() < 0.6:
        return Sample(vary_writing(rng, rng.choice(GREETINGS)), hello, kind="hello")
    return Sample(vary_writing(rng, rng.choice(THANKS)), welcome, kind="thanks")
