"""The sampling functions of ExLlamaV2's extension (cpp/sampling.cpp), which run on the CPU there too.

Step by step as the original, in double instead of single precision, so that the same random number gives the same
token but for numbers at the very edge of two, and but for min_p and top_a where every candidate passes: there the
original reads one beyond them. Knows lists and arrays, no tensors.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np

TINY = 1e-8
HEAP_LIMIT = 500


def penalize(
    logits: Any, sequence: Any, penalty: float, sustain: int, decay: int, frequency: float, presence: float
) -> None:
    """Repetition, frequency and presence penalties in place: full for the last `sustain` tokens, then fading."""
    repetition_step = (1 - penalty) / decay if decay else 0.0
    frequency_step, presence_step = (-frequency / decay, -presence / decay) if decay else (0.0, 0.0)
    left = len(sequence) if sustain == -1 else sustain
    seen = set()
    for token in reversed(sequence[max(0, len(sequence) - left - decay) :]):
        if 0 <= token < len(logits):
            if token not in seen:
                seen.add(token)
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
                logits[token] -= presence
            logits[token] -= frequency
        left -= 1
        if left < 0:
            penalty, frequency, presence = (
                penalty + repetition_step, frequency + frequency_step, presence + presence_step
            )  # fmt: skip


class Candidates:
    """Probabilities and their tokens, narrowed by one filter after the other."""

    def __init__(self, logits: Any, kept: Any, temperature: float, exponent: float) -> None:
        values = logits.astype(np.float64)
        if kept is not None:
            values = np.where(kept, values, -np.inf)
        self.best = int(values.argmax())
        below = values - values[self.best]
        with np.errstate(invalid="ignore"):
            below = below if exponent == 1 else -(np.abs(below) ** exponent)
        weights = np.exp(below / temperature)
        self.probs, self.tokens = weights / weights.sum(), np.arange(len(values))

    def _take(self, places: Any, *, normalize: bool = True) -> None:
        self.probs, self.tokens = self.probs[places], self.tokens[places]
        if normalize:
            self.probs = self.probs / self.probs.sum()

    def _sorted(self) -> Any:
        """Places from likely to unlikely, without those of next to no probability."""
        order = np.argsort(-self.probs, kind="stable")
        return order[self.probs[order] >= TINY]

    def top_k(self, count: int) -> None:
        if not 0 < count < len(self.probs):
            return
        if count == 1:
            self._take([self.best])
        elif count <= HEAP_LIMIT:
            # The heap orders pairs: of equal probabilities the greater token comes first, the smaller one stays in.
            kept = np.argsort(-self.probs, kind="stable")[:count]
            self._take(kept[np.lexsort((-self.tokens[kept], -self.probs[kept]))])
        else:
            self._take(np.argsort(-self.probs, kind="stable")[:count])

    def top_p(self, share: float) -> None:
        """The original's way, which can keep a later small candidate in place of the one that crosses the share."""
        if len(self.probs) < 2 or not 0 < share < 1:
            return
        heap: list[tuple[float, int, int]] = []
        total = 0.0
        for place in np.flatnonzero(self.probs >= 1e-6):
            prob = float(self.probs[place])
            if total > share and prob < heap[0][0]:
                continue
            heapq.heappush(heap, (prob, int(self.tokens[place]), int(place)))
            total += prob
            while total > share and len(heap) > 1:
                total -= heapq.heappop(heap)[0]
        self._take([place for _, _, place in sorted(heap, reverse=True)])

    def _at_least(self, threshold: float) -> None:
        """Everything from a threshold on, as the original's swaps leave it: often with one candidate below it."""
        places = list(range(len(self.probs)))
        i, j = 0, len(places) - 1
        while j >= i:
            while j >= i and self.probs[places[i]] >= threshold:
                i += 1
            if i < len(places) and self.probs[places[j]] >= threshold:
                places[i], places[j] = places[j], places[i]
                i += 1
            j -= 1
        self._take(places[:i])

    def top_a(self, factor: float) -> None:
        if len(self.probs) > 1 and factor > 0:
            self._at_least(factor * float(self.probs.max()) ** 2)

    def min_p(self, factor: float) -> None:
        if len(self.probs) > 1 and 0 < factor < 1:
            self._at_least(factor * float(self.probs.max()))

    def tail_free(self, share: float) -> None:
        if len(self.probs) < 3 or not 0 < share < 1:
            return
        order = self._sorted()
        bends = np.abs(np.diff(self.probs[order], 2))
        if not len(bends):
            self._take(order[:1])
            return
        self._take(order[: int((np.cumsum(bends / bends.sum()) <= share).sum()) + 1])

    def typical(self, share: float) -> None:
        if len(self.probs) < 2 or not 0 < share < 1:
            return
        places = np.flatnonzero(self.probs >= TINY)
        probs = self.probs[places]
        surprise = probs + np.log(probs + 1e-10)  # sic: the original adds the probability itself
        order = places[np.argsort(np.abs(surprise - (probs * surprise).sum()), kind="stable")]
        self._take(order[: max(1, int((np.cumsum(self.probs[order]) < share).sum()))])

    def mirostat(self, mu: float, tau: float) -> None:
        if len(self.probs) < 2:
            return
        order = self._sorted()
        self._take(order[: max(1, int((self.probs[order] >= 2.0 ** -(mu or 2 * tau)).sum()))])

    def reshape(self, temperature: float, low: float, high: float, exponent: float) -> None:
        """Temperature after the filters; between low and high by entropy where high is more than low."""
        if len(self.probs) < 2 or (temperature == 1 and high <= low):
            return
        if high > low:
            likely = self.probs[self.probs > 0]
            most = math.log(len(self.probs)) or 1.0
            temperature = low + (high - low) * (float(-(likely * np.log(likely)).sum()) / most) ** exponent
        self.probs = self.probs ** (1 / temperature)
        self.probs = self.probs / self.probs.sum()

    def sort(self) -> None:
        order = np.argsort(-self.probs, kind="stable")
        self._take(order, normalize=False)

    def pick(self, random: float) -> tuple[int, float]:
        place = min(int((np.cumsum(self.probs) < random).sum()), len(self.probs) - 1)
        while place > 0 and self.probs[place] == 0:
            place -= 1
        return int(self.tokens[place]), float(self.probs[place])


def next_random(random: float) -> float:
    """The original's number for the next row of a batch. Single precision, because it is chaotic."""
    value = np.float32(random)
    for _ in range(10):
        value = np.float32(float(value) + (1.337 + float(np.float32(random))))
        value = np.float32(np.fmod(value * value, np.float32(1)))
    return float(value)
