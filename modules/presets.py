"""Task presets: strict TOML files in, frozen dataclasses out, and back again.

Owns what a preset may say, the ranges of its values, and the folders that presets
lie in. Knows nothing of model files, engines or memory: whether a variant is
downloaded is library.py's question, whether it fits is asked elsewhere.

A broken file never hides behind a built-in preset of the same name: it is listed
as broken, and asking for it gives its error, because answering with another model
than the one the person wrote down would be a silent fallback.
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import PresetError, PresetInvalid, PresetNotFound
from .messages import Sampling

# Python 3.10 has the same parser under its older name.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

TASKS = ("assistant", "vision", "coding", "reasoning")
EXL_ENGINES = ("exllamav2", "exllamav3")
ENGINES = (*EXL_ENGINES, "llamacpp")
CACHE_MODES = ("FP16", "Q8", "Q6", "Q4")
MAX_FILE_BYTES = 256 * 1024

_SHOWN = 80  # characters of a wrong value that a message repeats
_NAME = r"[a-z0-9][a-z0-9-]*"
# Windows opens a device under these names, whatever the ending.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
_REPO = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
_FILE = r"[A-Za-z0-9][A-Za-z0-9_.+-]*\.gguf"
# tomllib's time grows with the square of a dotted key's parts: 40 KB take 3 s, 256 KB minutes.
_LONG_KEY = re.compile(r"""(?<![A-Za-z0-9_-])(?:(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){16}""")


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its memory.

    kv_layers is how many layers keep a growing cache; 0 means all. Models with
    linear attention keep one in every fourth layer only.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    kv_layers: int = 0


@dataclass(frozen=True)
class Options:
    """What only some engines can do. Sizes in tokens; empty, 0 and False leave the engine's own way.

    chunk_size is how much of a prompt is read at once, cache_size the KV cache for all answers
    together. draft "ngram" guesses ahead from the text itself, draft_model is a folder with a small
    model that guesses. gpu_split is "auto" or gigabytes for each card ("20,24"). loras are "FOLDER" or
    "FOLDER:SCALE". max_pixels caps a picture. force_thought opens the thought where the template does not.
    """

    chunk_size: int = 0
    cache_size: int = 0
    draft: str = ""
    draft_model: str = ""
    draft_tokens: int = 0
    gpu_split: str = ""
    tensor_parallel: bool = False
    loras: tuple[str, ...] = ()
    max_pixels: int = 0
    force_thought: bool = False


@dataclass(frozen=True)
class Variant:
    """One model in one quantization with one cache: what a preset runs on one kind of machine.

    Exactly one of repo, bundled and path is set. size_bytes is what the download
    takes (0: unknown), context is in tokens, max_turns 0 and max_images 0 mean no
    limit, threads 0 leaves it to the engine. sampling, where given, replaces the
    preset's as a whole; system and thinking, where not None, replace the preset's.
    """

    id: str
    title: str
    engine: str
    tier: str = ""
    repo: str = ""
    revision: str = ""
    file: str = ""
    projector: str = ""
    bundled: str = ""
    path: str = ""
    bpw: float | None = None
    cache_mode: str = "FP16"
    context: int = 4096
    max_position_embeddings: int = 0
    size_bytes: int = 0
    licence: str = ""
    shape: Shape | None = None
    system: str | None = None
    max_turns: int = 0
    max_images: int = 0
    parallel: int = 1
    threads: int = 0
    sampling: Sampling | None = None
    thinking: bool | None = None
    options: Options | None = None
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """One task: which interface, which words, which sampling, and the variants, best first."""

    name: str
    title: str
    task: str
    order: int = 100
    about: str = ""
    system: str = ""
    thinking: bool | None = None
    examples: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    variants: tuple[Variant, ...] = ()
    path: Path = Path()
    builtin: bool = False


@dataclass(frozen=True)
class BrokenPreset:
    """A preset file that cannot be used, and why."""

    name: str
    path: Path
    error: PresetInvalid


# Rules: a rule takes a value of the TOML file and gives it back checked, or raises _Bad.


class _Bad(Exception):
    """What is wrong, and the dotted key under which it is wrong."""

    def __init__(self, sentence: str, key: str = "") -> None:
        super().__init__(sentence)
        self.sentence, self.key = sentence, key

    def under(self, key: str) -> _Bad:
        """The same complaint, seen from the table around it."""
        inner = self.key if not self.key or self.key.startswith("[") else "." + self.key
        return _Bad(self.sentence, key + inner)


Rule = Callable[[Any], Any]


def _show(value: Any) -> str:
    """A value in an error message: short, and on one line."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = json.dumps(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _whole(low: int, high: int) -> Rule:
    def rule(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Bad(f"must be a whole number from {low} to {high}, but is {_show(value)}")
        return value

    return rule


def _number(low: float, high: float) -> Rule:
    def rule(value: Any) -> float:
        # The comparison is false for nan, which TOML can write.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise _Bad(f"must be a number from {low:g} to {high:g}, but is {_show(value)}")
        return float(value)

    return rule


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad(f"must be true or false, but is {_show(value)}")
    return value


def _text(longest: int, *, lines: bool = False, filled: bool = False) -> Rule:
    allowed = "\n\r\t" if lines else ""

    def rule(value: Any) -> str:
        if not isinstance(value, str):
            raise _Bad(f"must be text in quotes, but is {_show(value)}")
        if len(value) > longest:
            raise _Bad(f"may have {longest} characters, but has {len(value)}")
        if filled and not value.strip():
            raise _Bad("must not be empty")
        if any((c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff") and c not in allowed for c in value):
            raise _Bad("holds a control character")
        return value

    return rule


def _stop(value: Any) -> str:
    # A line break is a sensible place to stop, so blank is allowed and empty is not.
    text: str = _text(200, lines=True)(value)
    if not text:
        raise _Bad("must not be empty")
    return text


def _matching(pattern: str, longest: int, what: str) -> Rule:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or len(value) > longest or ".." in value or not re.fullmatch(pattern, value):
            raise _Bad(f"must be {what}, but is {_show(value)}")
        return value

    return rule


def _choice(choices: Sequence[str]) -> Rule:
    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            near = _nearest(value, choices) if isinstance(value, str) else ""
            hint = f"; did you mean {near}?" if near else ""
            raise _Bad(f"must be one of {', '.join(choices)}, but is {_show(value)}{hint}")
        return value

    return rule


def _many(most: int, rule_of_one: Rule, *, fewest: int = 0) -> Rule:
    def rule(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            is_now = f"has {len(value)}" if isinstance(value, list) else f"is {_show(value)}"
            raise _Bad(f"must be a list of {fewest} to {most} items, but {is_now}")
        found = []
        for place, item in enumerate(value, 1):
            try:
                found.append(rule_of_one(item))
            except _Bad as bad:
                raise bad.under(f"[{place}]") from None
        return tuple(found)

    return rule


def _own_path(value: Any) -> str:
    text = _text(1000, filled=True)(value)
    whole = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~/")
    # A share of another machine would be asked for with the person's Windows login.
    if not whole or text.startswith(("//", "\\\\")) or ".." in re.split(r"[/\\]", text):
        raise _Bad(f"must be a whole path on this machine or start with ~/, without .., but is {_show(value)}")
    return str(text)


def _table(rules: Mapping[str, Rule], required: Iterable[str] = ()) -> Callable[[Any], dict[str, Any]]:
    def rule(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _Bad(f"must be a table, but is {_show(value)}")
        found = {}
        for key, item in value.items():
            shown = key if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) else _show(key)
            if key not in rules:
                raise _Bad(f"is not a known key; the nearest known one is {_nearest(key, rules)}", shown)
            try:
                found[key] = rules[key](item)
            except _Bad as bad:
                raise bad.under(shown) from None
        for key in required:
            if key not in found:
                raise _Bad("is missing", key)
        return found

    return rule


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word[:60], list(known), n=1, cutoff=0.0)
    return close[0] if close else ""


_SAMPLING: dict[str, Rule] = {
    "temperature": _number(0, 5),
    "top_p": _number(0, 1),
    "top_k": _whole(0, 1_000_000),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.1, 5),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _whole(0, 2**32 - 1),
    "max_tokens": _whole(1, 1_048_576),
    "stop": _many(16, _stop),
}
_SHAPE: dict[str, Rule] = {
    "layers": _whole(1, 1024),
    "hidden": _whole(1, 1_048_576),
    "heads": _whole(1, 4096),
    "kv_heads": _whole(1, 4096),
    "head_dim": _whole(1, 65_536),
    "intermediate": _whole(1, 4_194_304),
    "vocab": _whole(1, 16_777_216),
    "kv_layers": _whole(0, 1024),
}


def _sampling(value: Any) -> Sampling:
    return Sampling(**_table(_SAMPLING)(value))


def _shape(value: Any) -> Shape:
    return Shape(**_table(_SHAPE, [key for key in _SHAPE if key != "kv_layers"])(value))


_OPTIONS: dict[str, Rule] = {
    "chunk_size": _whole(256, 16_384),
    "cache_size": _whole(256, 16_777_216),
    "draft": _choice(("ngram",)),
    "draft_model": _own_path,
    "draft_tokens": _whole(1, 8),
    "gpu_split": _matching(r"auto|\d{1,4}(\.\d+)?(,\d{1,4}(\.\d+)?){0,15}", 200, "auto, or gigabytes such as 20,24"),
    "tensor_parallel": _flag,
    "loras": _many(8, _text(1000, filled=True)),
    "max_pixels": _whole(56 * 56, 16_777_216),
    "force_thought": _flag,
}


def _options(value: Any) -> Options:
    return Options(**_table(_OPTIONS)(value))


def _variant_rules(engines: Sequence[str]) -> dict[str, Rule]:
    return {
        "id": _matching(_NAME, 120, "made of a-z, 0-9 and -"),
        "title": _text(120, filled=True),
        "engine": _choice(engines),
        "tier": _matching(_NAME, 40, "made of a-z, 0-9 and -"),
        "repo": _matching(_REPO, 200, "OWNER/NAME"),
        "revision": _matching(_REVISION, 100, "a branch or commit without / and .."),
        "file": _matching(_FILE, 200, "a plain file name that ends in .gguf, without / or \\ or .."),
        "projector": _matching(_FILE, 200, "a plain file name that ends in .gguf, without / or \\ or .."),
        "bundled": _matching(_NAME, 60, "the name of a bundled model"),
        "path": _own_path,
        "bpw": _number(0.5, 32),
        "cache_mode": _choice(CACHE_MODES),
        "context": _whole(256, 1_048_576),
        "max_position_embeddings": _whole(0, 16_777_216),
        "size_bytes": _whole(0, 2**50),
        "licence": _text(120),
        "shape": _shape,
        "system": _text(100_000, lines=True),
        "max_turns": _whole(0, 1000),
        "max_images": _whole(0, 100),
        "parallel": _whole(1, 64),
        "threads": _whole(0, 1024),
        "sampling": _sampling,
        "thinking": _flag,
        "options": _options,
        "note": _text(500, lines=True),
    }


def _variant(engines: Sequence[str]) -> Rule:
    table = _table(_variant_rules(engines), ("title", "engine"))

    def rule(value: Any) -> Variant:
        found = table(value)
        variant = Variant(**{"id": "", **found})
        _check_source(variant)
        _check_engine(variant)
        if 0 < variant.max_position_embeddings < variant.context:
            most = variant.max_position_embeddings
            raise _Bad(f"is {variant.context}, but the model's max_position_embeddings is {most}", "context")
        return variant

    return rule


def _check_source(variant: Variant) -> None:
    sources = [key for key in ("repo", "bundled", "path") if getattr(variant, key)]
    if len(sources) != 1:
        raise _Bad(f"must have exactly one of repo, bundled and path, but has {' and '.join(sources) or 'none'}")
    source = sources[0]
    if variant.revision and source != "repo":
        raise _Bad(f"belongs to repo and means nothing with {source}", "revision")
    for key in ("file", "projector"):
        if source == "bundled" and getattr(variant, key):
            raise _Bad("means nothing with bundled", key)


def _check_engine(variant: Variant) -> None:
    if variant.engine in EXL_ENGINES:
        if variant.bundled:
            raise _Bad("needs the engine llamacpp, because the bundled models are GGUF files", "bundled")
        if variant.repo and not variant.revision:
            # The main branch of such a repository often holds no weights, and downloads "well" in a second.
            raise _Bad(f"is missing, and {variant.engine} needs it: the weights lie on branches", "revision")
        if variant.options and variant.options.chunk_size % 256:
            raise _Bad(f"is {variant.options.chunk_size}, which is not a multiple of 256", "options.chunk_size")
        for key in ("file", "projector"):
            if getattr(variant, key):
                raise _Bad(f"is for GGUF files and means nothing to {variant.engine}", key)
    elif variant.options is not None and variant.engine in ENGINES:
        raise _Bad(f"are for {' and '.join(EXL_ENGINES)} and mean nothing to {variant.engine}", "options")
    if variant.engine == "llamacpp" and variant.repo and not variant.file:
        raise _Bad("is missing, and llamacpp needs the name of one GGUF file of the repo", "file")


def _slug(variant: Variant) -> str:
    words = f"{variant.tier} {variant.title}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:80].rstrip("-") or "variant"


def _with_ids(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    """Every variant gets the id it names, or one made from tier and title."""
    found: dict[str, Variant] = {}
    for place, variant in enumerate(variants, 1):
        if variant.id in found:
            raise _Bad(f"is {_show(variant.id)}, which another variant has already", f"variants[{place}].id")
        name, again = variant.id or _slug(variant), 2
        while name in found:
            name, again = f"{_slug(variant)}-{again}", again + 1
        values = {f.name: getattr(variant, f.name) for f in fields(Variant)}
        found[name] = Variant(**{**values, "id": name})
    return tuple(found.values())


def _preset_rules(engines: Sequence[str]) -> dict[str, Rule]:
    return {
        "title": _text(80, filled=True),
        "task": _choice(TASKS),
        "order": _whole(-1_000_000, 1_000_000),
        "about": _text(1000, lines=True),
        "system": _text(100_000, lines=True),
        "thinking": _flag,
        "examples": _many(8, _text(1000, lines=True, filled=True)),
        "sampling": _sampling,
        "variants": _many(200, _variant(engines), fewest=1),
    }


def _parse(text: str, engines: Sequence[str]) -> dict[str, Any]:
    """The checked values of a preset file. Raises _Bad."""
    if len(text.encode(errors="replace")) > MAX_FILE_BYTES:
        raise _Bad(f"is larger than {MAX_FILE_BYTES // 1024} KB")
    if _LONG_KEY.search(text):
        raise _Bad("is not a preset: it has a dotted key of more than 16 parts")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Bad(f"is not TOML: {_show_error(error)}") from None
    found = _table(_preset_rules(engines), ("title", "task", "variants"))(data)
    return {**found, "variants": _with_ids(found["variants"])}


def _show_error(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).rstrip(".")[:200]


# Writing ---------------------------------------------------------------------------


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\t": "\\t", "\r": "\\r", "\n": "\\n"}


def _toml_text(value: str) -> str:
    def escape(line: str) -> str:
        return "".join(_ESCAPES.get(c) or (f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c) for c in line)

    if "\n" not in value:
        return f'"{escape(value)}"'
    # A newline right behind the opening quotes is not part of the text.
    return '"""\n' + "\n".join(escape(line) for line in value.split("\n")) + '"""'


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, (Sampling, Shape, Options)):
        inner = ", ".join(f"{key} = {_toml(item)}" for key, item in _said(value).items())
        return "{ " + inner + " }" if inner else "{}"
    return repr(value)


def _said(thing: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, in order."""
    found = {}
    for each in fields(thing):
        value = getattr(thing, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if default is MISSING or value != default:
            found[each.name] = value
    return found


def dumps(preset: Preset) -> str:
    """The preset as TOML; what has its default is left out. Units and ranges as in the file format."""
    own = {key: item for key, item in _said(preset).items() if key not in ("name", "path", "builtin")}
    variants: tuple[Variant, ...] = own.pop("variants", ())
    sampling: Sampling | None = own.pop("sampling", None)
    lines = [f"{key} = {_toml(item)}" for key, item in own.items()]
    if sampling is not None:
        lines += ["", "[sampling]", *(f"{key} = {_toml(item)}" for key, item in _said(sampling).items())]
    for variant in variants:
        said = _said(variant)
        if variant.id in ("", _slug(variant)):
            del said["id"]
        lines += ["", "[[variants]]", *(f"{key} = {_toml(item)}" for key, item in said.items())]
    return "\n".join(lines) + "\n"


# The owner ---------------------------------------------------------------------------


class Presets:
    """The presets of some folders: the first holds the built-in ones, the last the person's own.

    A file of a later folder replaces the one of the same name in an earlier folder.
    Files are read again when their time or size changed. Safe to use from threads.
    """

    def __init__(self, folders: Sequence[Path], extra_engines: Iterable[str] = ()) -> None:
        self._folders = [Path(folder) for folder in folders]
        self._engines = (*ENGINES, *extra_engines)
        self._read: dict[Path, tuple[tuple[int, ...], Preset | BrokenPreset]] = {}
        self._lock = threading.Lock()

    @property
    def own_folder(self) -> Path:
        """Where a person's own files lie."""
        return self._folders[-1]

    def list(self) -> builtins.list[Preset]:
        """The usable presets, by order, then name."""
        found = [entry for entry in self._scan().values() if isinstance(entry, Preset)]
        return sorted(found, key=lambda preset: (preset.order, preset.name))

    def broken(self) -> builtins.list[BrokenPreset]:
        """The files that cannot be used, by name."""
        return [entry for _, entry in sorted(self._scan().items()) if isinstance(entry, BrokenPreset)]

    def get(self, name: str) -> Preset:
        """The preset of this name. Raises PresetNotFound, or PresetInvalid when its file is broken."""
        entries = self._scan()
        entry = entries.get(name)
        if isinstance(entry, BrokenPreset):
            raise PresetInvalid(str(entry.error))
        if entry is None:
            near = _nearest(name, (known for known, e in entries.items() if isinstance(e, Preset)))
            advice = f'the nearest name is "{near}"' if near else "there are no presets at all"
            raise PresetNotFound(f"There is no preset {_show(name)}; {advice}.")
        return entry

    def loads(self, text: str, path: Path) -> Preset:
        """The preset of a TOML text; path gives its name and says whether it is built in. Raises PresetInvalid."""
        try:
            _check_name(path)
            builtin = bool(self._folders) and path.parent == self._folders[0]
            return Preset(name=path.stem, path=path, builtin=builtin, **_parse(text, self._engines))
        except _Bad as bad:
            raise _invalid(path, bad) from None

    def dumps(self, preset: Preset) -> str:
        """The preset as TOML text, which `loads` turns into an equal preset."""
        return dumps(preset)

    def save(self, preset: Preset) -> Preset:
        """Write the preset into the person's own folder, whole or not at all, and return it as read back.

        Raises PresetInvalid for a preset that breaks the rules, and for a file of that
        name that is broken now: the person may want to repair what they wrote. Raises
        PresetError when the disk refuses.
        """
        if len(self._folders) < 2:
            raise PresetError("There is no folder for presets of your own.", hint="Start Turntable with a data folder.")
        target = self._folders[-1] / f"{preset.name}.toml"
        if target.parent != self._folders[-1]:
            raise _invalid(Path(f"{_show(preset.name)}.toml"), _Bad("has a name that is not a preset's"))
        text = dumps(preset)
        saved = self.loads(text, target)
        with self._lock:
            if os.path.lexists(target):
                self._keep_broken(target)
            _write(target, text)
        return saved

    def _keep_broken(self, target: Path) -> None:
        try:
            self._load(target)
        except PresetInvalid as error:
            hint = "Correct the file or give it another name, then save again."
            raise PresetInvalid(f"Not saved over a broken file: {error}", hint=hint) from None

    def _scan(self) -> dict[str, Preset | BrokenPreset]:
        with self._lock:
            seen: dict[Path, tuple[tuple[int, ...], Preset | BrokenPreset]] = {}
            found: dict[str, Preset | BrokenPreset] = {}
            for folder in self._folders:
                for path in _files(folder):
                    stamp = _stamp(path)
                    known = self._read.get(path)
                    seen[path] = known if known and known[0] == stamp else (stamp, self._load_or_broken(path))
                    found[path.stem] = seen[path][1]
            self._read = seen
            return found

    def _load_or_broken(self, path: Path) -> Preset | BrokenPreset:
        try:
            return self._load(path)
        except PresetInvalid as error:
            return BrokenPreset(path.stem, path, error)

    def _load(self, path: Path) -> Preset:
        try:
            # Opening a pipe would wait for ever.
            if not path.is_file():
                raise _Bad("is not a regular file")
            with path.open("rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
            if len(raw) > MAX_FILE_BYTES:
                raise _Bad(f"is larger than {MAX_FILE_BYTES // 1024} KB")
            return self.loads(raw.decode("utf-8"), path)
        except _Bad as bad:
            raise _invalid(path, bad) from None
        except UnicodeDecodeError as error:
            raise _invalid(path, _Bad(f"is not UTF-8 text: byte {error.start + 1} is wrong")) from None
        except OSError as error:
            raise _invalid(path, _Bad(f"cannot be read: {error.strerror or error}")) from None


def _check_name(path: Path) -> None:
    rule = _matching(_NAME, 64, "made of a-z, 0-9 and -, and start with a letter or digit")
    if path.suffix != ".toml":
        raise _Bad("must end in .toml")
    try:
        rule(path.stem)
    except _Bad as bad:
        raise _Bad("has a wrong name: it " + bad.sentence) from None
    if path.stem in _DEVICES:
        raise _Bad("has a wrong name: Windows keeps it for a device")


def _invalid(path: Path, bad: _Bad) -> PresetInvalid:
    where = f"{path.name}: {bad.key}" if bad.key else path.name
    stop = "" if bad.sentence.endswith("?") else "."
    return PresetInvalid(f"{where} {bad.sentence}{stop}")


def _files(folder: Path) -> list[Path]:
    """The preset files of a folder. A folder that is not there yet has none."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".toml" and path.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        info = path.stat()
    except OSError:
        return ()
    return (info.st_mtime_ns, info.st_size, info.st_ino)


def _write(target: Path, text: str) -> None:
    """The whole text under the name, or the old file untouched."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        hint = "Look at the free space and the rights of the data folder."
        raise PresetError(f"{target.name} could not be written: {error.strerror or error}.", hint=hint) from None
