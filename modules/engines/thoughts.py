"""Splits a model's raw text into thought and answer, once for all engines.

Only a thought at the very beginning counts: a `<think>` later on is text that the
model talks about. Tags may arrive in pieces; text that could still become a tag is
held back until it is decided. Some templates open the thought themselves (the
prompt ends with `<think>`): then the text starts inside it, and `opened` says so.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


class ThoughtSplitter:
    """Feed pieces of text, get (channel, text) pairs; channel is "reasoning" or "text"."""

    def __init__(self, opened: bool = False) -> None:
        self._state = "inside" if opened else "before"
        self._held = ""
        self._fresh = True  # nothing of this channel was given out yet: drop leading blank space

    def feed(self, piece: str) -> list[tuple[str, str]]:
        """Pairs that are certain after this piece."""
        self._held += piece
        return self._drain(final=False)

    def finish(self) -> list[tuple[str, str]]:
        """Whatever was held back, as it stands."""
        return self._drain(final=True)

    def _drain(self, final: bool) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        if self._state == "before":
            stripped = self._held.lstrip()
            if stripped.startswith(OPEN):
                self._state, self._held = "inside", stripped[len(OPEN) :]
            elif OPEN.startswith(stripped) and not final:
                return out
            else:
                self._state = "after"
                self._fresh = False  # an answer without thought keeps its first characters as they are
        if self._state == "inside":
            end = self._held.find(CLOSE)
            if end >= 0:
                self._give(out, "reasoning", self._held[:end].rstrip())
                self._state, self._held, self._fresh = "after", self._held[end + len(CLOSE) :], True
            else:
                keep = 0 if final else _undecided(self._held)
                self._give(out, "reasoning", self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
        if self._state == "after":
            self._give(out, "text", self._held)
            self._held = ""
        return out

    def _give(self, out: list[tuple[str, str]], channel: str, text: str) -> None:
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            out.append((channel, text))


def _undecided(text: str) -> int:
    """Length of the tail that could be the beginning of CLOSE, blank space before it included."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            head = text[:-size]
            return size + len(head) - len(head.rstrip())
    return len(text) - len(text.rstrip())
