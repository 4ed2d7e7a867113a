"""A model's own chat template, rendered in a sandbox with limits: the template is data from a stranger.

Knows jinja2 and nothing of models. Pictures become markers that the engine
replaces; control tokens that a person typed are defused before rendering.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from modules.errors import GenerateError, LoadError
from modules.messages import Message

TIME_LIMIT_S = 1.0
SIZE_LIMIT = 16 << 20  # characters
WIDTH_LIMIT = 1_000_000  # characters of one padded or repeated text, elements of one list with all that lies in it
LARGEST = 1 << 62  # of whole numbers: the time of arithmetic grows with their length
THINK = "<think>"
# What a template writes where a picture belongs; the engine puts the picture's own tokens there.
PICTURE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
PICTURE = re.compile(r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?")


@dataclass(frozen=True)
class Rendered:
    """A prompt. opens_thought: it ends inside a thought, so the answer begins there without a tag of its own."""

    text: str
    opens_thought: bool


class TooMuch(Exception):
    """A template took too long or wrote too much."""


def _concat(pieces: Iterable[Any]) -> str:
    """Joins what a block, a macro or the ~ operator puts together; each can double a text at every step."""
    size, kept = 0, []
    for piece in pieces:
        text = str(piece)
        size += len(text)
        if size > SIZE_LIMIT:
            raise TooMuch("it builds a text that is too long")
        kept.append(text)
    return "".join(kept)


# The classes of the views themselves: asking for the abstract ones takes most of the time of weighing.
GATHERING: tuple[Any, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


def _weigh(value: Any) -> tuple[int, int]:
    """Characters and elements of a value and of all that lies in it, each as often as it lies there.

    A template builds a list of a thousand times the same long text for nothing, and one call that turns it into text
    takes gigabytes. Raises TooMuch as soon as it is too much.
    """
    size = count = 0
    left = [value]
    while left:
        one = left.pop()
        count += 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif isinstance(one, dict):
            left.extend(one.keys())
            left.extend(one.values())
        elif isinstance(one, GATHERING):
            left.extend(one)
        _check_weight(size, count + len(left))
    return size, count


def _check_weight(size: int, count: int) -> None:
    if size > SIZE_LIMIT or count > WIDTH_LIMIT:
        raise TooMuch("it builds something that is too long")


def _bounded(value: Any) -> Any:
    """The value, which is not too large. Nothing can be put into a list later, so what is built is looked at once."""
    _weigh(value)
    return value


def _list(value: Iterable[Any]) -> list[Any]:
    """The list of what an iterator gives, weighed while it grows."""
    kept: list[Any] = []
    size = count = 0
    for item in value:
        more = _weigh(item)
        size, count = size + more[0], count + more[1]
        _check_weight(size, count)
        kept.append(item)
    return kept


def _bounding(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that gathers only what is not too large, and gives back nothing that is."""

    @functools.wraps(filter_)  # jinja2 marks filters by attributes
    def bounding(*args: Any, **more: Any) -> Any:
        given = (_list(arg) if isinstance(arg, Iterator) else arg for arg in args)
        return _bounded(filter_(*given, **more))

    return bounding


class _Namespace(Namespace):
    """The one thing that a template can change; its text is not its contents, which can be anything by then."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generator(CodeGenerator):
    """Compiles the ~ operator to the limited join and bounds lists and tables; neither is open to the sandbox."""

    def visit_List(self, node: Any, frame: Any) -> None:
        self._bound(super().visit_List, node, frame)

    def visit_Dict(self, node: Any, frame: Any) -> None:
        self._bound(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: Any, frame: Any) -> None:
        if node.ctx == "load":
            self._bound(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _bound(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
        self.write("environment.bounded(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%", "+"])
    code_generator_class = _Generator
    concat = staticmethod(_concat)
    bounded = staticmethod(_bounded)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sides = (left, right)
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the {operator} operator is not for templates")
        sized = [len(side) for side in sides if isinstance(side, str | list | tuple)]
        if operator == "*":
            numbers = [abs(side) for side in sides if isinstance(side, int)]
            if (sized and numbers and sized[0] * numbers[0] > WIDTH_LIMIT) or (
                len(numbers) == len(sides) and numbers[0] * numbers[1] > LARGEST
            ):
                raise TooMuch("it multiplies beyond measure")
        if operator == "+" and sum(sized) > (SIZE_LIMIT if isinstance(left, str) else WIDTH_LIMIT):
            raise TooMuch("it builds something that is too long")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # jinja2's own names
        name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if name in ("format", "format_map", "translate", "expandtabs", "encode", "to_bytes"):
            raise SecurityError(f"{name} is not for templates")
        if isinstance(text, str):
            if name in ("center", "ljust", "rjust", "zfill") and any(
                isinstance(a, int) and a > WIDTH_LIMIT for a in (*args, *kwargs.values())
            ):
                raise TooMuch("it pads a text too far")
            if name == "replace":
                _check_replace(text, *args[:2])
            if name == "join":
                return _join(args[0] if args else (), text)
        return _bounded(super().call(__context, __obj, *args, **kwargs))


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str) and len(text) + text.count(old) * len(new) > SIZE_LIMIT:
        raise TooMuch("it builds a text that is too long")


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    _check_replace(str(text), old, new)
    return str(text).replace(old, new, -1 if count is None else count)


def _join(pieces: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    """The join of texts and of the filter, which may name an attribute of the pieces."""
    parts: list[Any] = []
    for piece in pieces:
        if parts:
            parts.append(between)
        parts.append(piece.get(attribute, "") if attribute is not None and isinstance(piece, dict) else piece)
    return _concat(parts)


# Filters that give one element after another, and those that only count or pick: they build nothing.
LAZY = frozenset({
    "map", "select", "selectattr", "reject", "rejectattr", "items", "length", "count", "first", "last", "default", "d",
    "attr", "list", "join",
})  # fmt: skip


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters.update(tojson=_tojson, replace=_replace, join=_join, list=_list)
    # None is used by chat templates, and some reach further than a template should, or write without measure.
    for name in ("center", "format", "xmlattr", "pprint", "random", "urlize", "wordwrap", "indent", "sum"):
        environment.filters.pop(name, None)
    for name, filter_ in environment.filters.items():
        if name not in LAZY:
            environment.filters[name] = _bounding(filter_)
    environment.globals["namespace"] = _Namespace
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(str(form)[:100])
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **unused: Any) -> str:
    """Without the escaping for HTML that jinja2's own filter does: models were trained on plain JSON."""
    encoder = json.JSONEncoder(ensure_ascii=bool(ensure_ascii), indent=min(int(indent), 8) if indent else None)
    return _concat(encoder.iterencode(value))  # piece by piece: the depth multiplies the indentation


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message)[:300])


class ChatTemplate:
    """One model's template, compiled once."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", special: Sequence[str] = ()) -> None:
        """Raises LoadError for a template that is no jinja."""
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        known = sorted({*special, *PICTURE_TOKENS}, key=lambda s: (-len(s), s))
        self._special = re.compile("|".join(map(re.escape, known)))
        self._sees = "image" in source
        try:
            self._template = _limited(lambda: _environment().from_string(source))
        except (jinja2.TemplateError, RecursionError, TooMuch) as error:
            raise LoadError(f"The model's chat template cannot be read: {str(error)[:200]}") from None

    def render(
        self, messages: Sequence[Message], *, thinking: bool | None = None,
        picture: Callable[[str], str] | None = None, force_thought: bool = False,
    ) -> Rendered:  # fmt: skip
        """The prompt for these messages, with the opening of the answer.

        picture turns a picture's path into the text that stands for it. Raises
        GenerateError when the template refuses the messages or breaks its limits.
        """
        nonce = secrets.token_hex(8)
        paths: list[str] = []
        turns = [self._turn(message, nonce, paths) for message in messages]
        extra = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text = _limited(lambda: self._write(turns, extra))
        except TooMuch as error:
            raise GenerateError(
                f"The model's chat template was stopped: {error}.", hint="Take another variant of this model."
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise GenerateError(
                f"The model's chat template refused this conversation: {str(error)[:200]}",
                hint="Some templates want user and assistant in turn, or no system message.",
            ) from None
        if force_thought and not text.rstrip().endswith(THINK) and thinking is not False:
            text += f"{THINK}\n"
        text = self._place(text, nonce, paths, picture)
        return Rendered(text, text.rstrip().endswith(THINK))

    def _write(self, turns: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        size, pieces = 0, []
        for piece in self._template.generate(messages=turns, add_generation_prompt=True, **self._tokens, **extra):
            size += len(piece)
            if size > SIZE_LIMIT:
                raise TooMuch("it writes too much")
            pieces.append(piece)
        return "".join(pieces)

    def _turn(self, message: Message, nonce: str, paths: list[str]) -> dict[str, Any]:
        text = self.defuse(message.text)
        if not message.images:
            return {"role": message.role, "content": text}
        first = len(paths)
        paths += message.images
        if not self._sees:  # a template that knows no pictures: they stand before the text
            marks = "".join(f"[[{nonce}:{n}]]\n" for n in range(first, len(paths)))
            return {"role": message.role, "content": marks + text}
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in message.images]
        return {"role": message.role, "content": [*parts, {"type": "text", "text": text}]}

    def _place(self, text: str, nonce: str, paths: list[str], picture: Callable[[str], str] | None) -> str:
        if not paths:
            return text
        if picture is None:
            raise GenerateError("This model cannot look at pictures.")
        left = list(range(len(paths)))

        def put(found: re.Match[str]) -> str:
            number = int(found[1]) if found.lastindex else (left[0] if left else len(paths))
            if number not in left:
                raise GenerateError("The model's chat template shows a picture more often than it was sent.")
            left.remove(number)
            return picture(paths[number])

        text = re.sub(rf"\[\[{nonce}:(\d+)\]\]", put, text) if not self._sees else PICTURE.sub(put, text)
        if left:
            raise GenerateError("The model's chat template leaves out a picture.")
        return text

    def defuse(self, text: str) -> str:
        """A person's text with the model's control tokens broken up: a typed `<|im_end|>` must not end their turn."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def _limited(work: Callable[[], Any]) -> Any:
    """Run `work` on this thread, and have TooMuch raised in it after TIME_LIMIT_S.

    The exception arrives between two bytecodes, so one long call into C is not cut
    short; the sandbox keeps those small.
    """
    lock = threading.Lock()
    done = False
    me = threading.get_ident()

    def expire() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(me), ctypes.py_object(_Late))

    timer = threading.Timer(TIME_LIMIT_S, expire)
    timer.daemon = True
    timer.start()
    began = time.monotonic()
    try:
        result = work()
    except _Late:
        raise TooMuch(f"it took longer than {TIME_LIMIT_S:g} s") from None
    except MemoryError:
        raise TooMuch("it wanted too much memory") from None
    finally:
        with lock:
            done = True
        timer.cancel()
        _settle(began)
    return result


def _settle(began: float) -> None:
    """Take an exception that was sent at the very last moment: it arrives at the latest in this loop."""
    if time.monotonic() - began < TIME_LIMIT_S * 0.9:
        return
    try:
        for _ in range(100):
            time.sleep(0)
    except _Late:
        return


class _Late(BaseException):
    """Not an Exception, so that nothing in a template's way swallows it."""
