"""The words that modules, threads and processes say to each other. Standard library only; nothing here does work.

A line on the pipe is `{"kind": "Delta", ...fields}`. Parent to child: Load, Start,
Count, Cancel, Unload, Measure, Keep. Child to parent: Hello, Loading, Ready, Unloaded,
Counted, Measured, Kept, Prefill, Delta, Finished, Failed. The first six events of an
answer (Queued, Loading, Prefill, Delta, Finished, Failed) also form the one
stream that assistant.py gives to the page, the terminal and the API.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class EngineSpec:
    """All that decides which bytes sit in memory. Presets with equal specs share one load.

    model and projector are absolute paths; context is in tokens for one request;
    parallel is how many requests share a batch; options are the engine's own, as
    sorted (name, value) pairs so that the spec can be a dictionary key.
    """

    engine: str
    model: str
    projector: str = ""
    context: int = 4096
    cache_mode: str = "FP16"
    parallel: int = 1
    threads: int = 0
    options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are neutral: None or the value that changes nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn. images are absolute paths of files that images.py has checked and stored."""

    role: str
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Counts:
    """Tokens of one answer; cached are prompt tokens that were not computed again."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second of one answer, as the engine measured them."""

    prompt_s: float = 0.0
    generate_s: float = 0.0
    first_token_s: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Constraint:
    """What an answer must be: kind is "json_schema" or "regex", text the schema as JSON or the expression."""

    kind: str
    text: str


# Parent to child -----------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """copies_bytes is how much may be page-locked for copies of models, this one included; -1 leaves it as it is."""

    spec: EngineSpec
    copies_bytes: int = -1


@dataclass(frozen=True)
class Start:
    """Answer these messages. thinking: None leaves it to the template; constraint: None leaves the answer free.

    full_length writes sampling.max_tokens tokens also where the model wants to end before, to measure its speed.
    """

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    thinking: bool | None = None
    constraint: Constraint | None = None
    full_length: bool = False


@dataclass(frozen=True)
class Count:
    """How many tokens does each of these texts take (template words not included)?"""

    id: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Cancel:
    """Give up an answer, or with an empty id the load under way."""

    id: str


@dataclass(frozen=True)
class Unload:
    pass


@dataclass(frozen=True)
class Measure:
    id: str


@dataclass(frozen=True)
class Keep:
    """Hold at most so many bytes of page-locked copies of models from now on."""

    id: str
    most_bytes: int


# Child to parent -----------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """The child is up and the engine imports. version is the engine library's."""

    engine: str
    version: str
    pid: int


@dataclass(frozen=True)
class Queued:
    """The answer waits for other models' answers; place counts from 1."""

    place: int


@dataclass(frozen=True)
class Loading:
    """A load or swap under way. stage: unloading, reading, warming, restoring."""

    stage: str
    done_bytes: int
    total_bytes: int

    @property
    def fraction(self) -> float:
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


@dataclass(frozen=True)
class Ready:
    """The model answers. context in tokens for one request; image tokens as the engine counts them.

    at_once is how many answers the engine runs side by side; further ones would wait there in silence.
    """

    context: int
    memory_bytes: int
    load_s: float
    at_once: int = 1


@dataclass(frozen=True)
class Unloaded:
    memory_bytes: int


@dataclass(frozen=True)
class Counted:
    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    id: str
    memory_bytes: int


@dataclass(frozen=True)
class Kept:
    """What is held now; more than was allowed only as long as a copy is in use."""

    id: str
    kept_bytes: int


@dataclass(frozen=True)
class Prefill:
    """How much of the prompt has been read, in tokens."""

    id: str
    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """A piece of the answer. channel is "text" or "reasoning"; tokens is how many it took."""

    id: str
    text: str
    channel: str = "text"
    tokens: int = 1


@dataclass(frozen=True)
class Finished:
    """The end of an answer. reason: stop, length or stopped (by a person)."""

    id: str
    reason: str
    counts: Counts = field(default_factory=Counts)
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True)
class Failed:
    """An answer or a load ended in an error of errors.py; id is empty for a load."""

    id: str
    code: str
    message: str
    hint: str = ""


Event = Queued | Loading | Prefill | Delta | Finished | Failed

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Load, Start, Count, Cancel, Unload, Measure, Keep, Kept, Hello, Queued, Loading, Ready,
        Unloaded, Counted, Measured, Prefill, Delta, Finished, Failed,
    )
}  # fmt: skip


def encode(message: Any) -> str:
    """One line for the pipe, newline included."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}, ensure_ascii=True) + "\n"


def decode(line: str) -> Any:
    """The message of one line.

    Raises ValueError for anything that is not a message of ours, so that garbage on
    the pipe is one kind of error. A newer field than this side knows is ignored.
    """
    try:
        data = json.loads(line)
        kind = _KINDS[data.pop("kind")]
        known = {f.name for f in fields(kind)}
        return kind(**{name: _revive(name, value) for name, value in data.items() if name in known})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a message of the engine protocol: {line[:200]!r}") from error


def _revive(name: str, value: Any) -> Any:
    """JSON has neither tuples nor our nested classes."""
    if name == "spec":
        return EngineSpec(**{**value, "options": tuple((k, v) for k, v in value.get("options", ()))})
    if name == "messages":
        return tuple(Message(m["role"], m["text"], tuple(m.get("images", ()))) for m in value)
    if name == "sampling":
        return Sampling(**{**value, "stop": tuple(value.get("stop", ()))})
    if name == "constraint":
        return None if value is None else Constraint(**value)
    if name == "counts":
        return Counts(**value)
    if name == "timings":
        return Timings(**value)
    return tuple(value) if isinstance(value, list) else value
