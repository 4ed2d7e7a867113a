"""Where a variant's files lie, whether they are complete, and whether they are safe to open.

Owns the folder names, the command that downloads a model, and the header checks of
GGUF and safetensors files. Reads headers only, never weights, never a pickle, and
runs nothing that it finds: `*.py` files and `auto_map` entries are as good as absent.
Knows nothing of engines or memory.

Sources of the formats: docs/gguf.md in the repository of ggml, and the README of
huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import struct
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from .errors import ModelFilesDamaged, ModelFilesUnsafe, ModelNotDownloaded
from .presets import EXL_ENGINES, Variant

MANIFEST = ".turntable.json"  # which files of a folder a download put there, and from where
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_MAX_ENTRIES = 10_000  # of one model folder
_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_INDEX_BYTES = 16 * 2**20
_MAX_SAFETENSORS_HEADER_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 16
_MAX_DIMENSION = 2**48

_MAX_KEYS = 4096
_MAX_KEY_BYTES = 1024
_MAX_TENSORS = 65_536
_MAX_TENSOR_NAME_BYTES = 64
_MAX_STRING_BYTES = 16 * 2**20
# The largest vocabularies have about 260,000 tokens and 510,000 merges.
_MAX_STRINGS = 1_500_000
_KEPT_STRING_BYTES = 256
_MAX_CHECKED = 1024

# Windows opens a device under these names, whatever the ending.
DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf|\.safetensors)")


@dataclass(frozen=True)
class Located:
    """A model that is there. model is a GGUF file, or a folder for ExLlama; both paths are absolute."""

    model: Path
    projector: Path | None
    size_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself. context_length is in tokens, 0 where it is not said.

    values holds the numbers, flags and short strings of the metadata, without the lists.
    """

    version: int
    architecture: str
    name: str
    context_length: int
    tensors: int
    alignment: int
    size_bytes: int
    values: Mapping[str, int | float | bool | str] = field(default_factory=dict)


def largest_weights(folder: Path) -> Path | None:
    """The largest file of weights below a folder, for measuring the disk; None where there is none."""
    best, most = None, 0
    for place, _, names in os.walk(folder):  # errors are skipped, as of a folder that is being deleted
        for name in names:
            if name.endswith((".gguf", ".safetensors")):
                path = Path(place, name)
                try:
                    size = path.stat().st_size
                except OSError:
                    continue
                if size > most:
                    best, most = path, size
    return best


class Library:
    """The models of one folder, and the small bundled ones."""

    def __init__(self, models_dir: Path, bundled_dir: Path) -> None:
        self._models = Path(os.path.abspath(models_dir))
        self._bundled = Path(os.path.abspath(bundled_dir))
        # A header check takes up to half a second for a large vocabulary; every message asks.
        self._checked: dict[tuple[str, int, int, int], GGUFHeader | None] = {}

    @property
    def models_dir(self) -> Path:
        """Where downloaded models are looked for."""
        return self._models

    def folder(self, variant: Variant) -> Path:
        """The folder in which the variant's files lie or will lie."""
        if variant.bundled:
            return self._bundled
        if variant.path:
            own = _own(variant)
            return own if own.is_dir() else own.parent
        name = variant.repo.rpartition("/")[2]
        if variant.revision and not variant.file:
            name = f"{name}-{variant.revision}"
        # The same on every system, so that a models folder can be carried to Windows, which also drops dots at the end.
        if DEVICE.fullmatch(name):
            name = f"_{name}"
        name = f"{name}_" if name.endswith(".") else name
        # Another owner's repository of the same name may have been there first; GGUF files share a folder.
        beside = self._models / f"{variant.repo.partition('/')[0]}--{name}"
        if not variant.file and (beside.is_dir() or _is_of_others(self._models / name, variant.repo)):
            return beside
        return self._models / name

    def locate(self, variant: Variant) -> Located:
        """The variant's files, after every check that needs no weights.

        Raises ModelNotDownloaded with the folder and the file that were looked for,
        ModelFilesDamaged, or ModelFilesUnsafe.
        """
        try:
            if variant.engine in EXL_ENGINES:
                return self._folder_model(variant)
            if variant.engine == "llamacpp" or variant.bundled:
                return self._gguf_model(variant)
            return self._other_model(variant)
        except OSError as error:
            name = Path(error.filename).name if isinstance(error.filename, str) else variant.title
            raise ModelFilesDamaged(f"{name} cannot be read: {error.strerror or error}.") from None

    def download_command(self, variant: Variant) -> str:
        """The command that downloads the variant, quoted for this system's shell; empty for bundled and own files."""
        if not variant.repo:
            return ""
        words = ["hf", "download", variant.repo]
        for name in (variant.file, variant.projector):
            words += _shards(name) if name else []
        if variant.revision:
            words += ["--revision", variant.revision]
        words += ["--local-dir", str(self.folder(variant))]
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)

    # A folder of safetensors ----------------------------------------------------------

    def _folder_model(self, variant: Variant) -> Located:
        folder = self._present_folder(variant)
        names = _names(folder)
        weights = [name for name in names if name.endswith(".safetensors")]
        if not weights:
            self._no_weights(variant, folder, names)
        if "config.json" not in names:
            raise _absent(variant.title, folder, "config.json")
        read_config(folder)
        for name in whole_weights(folder, names, variant.title):
            self._check(folder / name, _check_only)
        return Located(folder, None, sum((folder / name).stat().st_size for name in weights))

    def _present_folder(self, variant: Variant) -> Path:
        folder = self.folder(variant)
        if variant.path and _own(variant).is_file():
            raise ModelFilesDamaged(f"{variant.path} is a file, and {variant.engine} needs a folder of safetensors.")
        if not folder.is_dir():
            raise ModelNotDownloaded(f"{variant.title} is not on this machine: there is no folder {folder}.")
        if not variant.path:
            _inside(folder, self._models)
        return folder

    def _no_weights(self, variant: Variant, folder: Path, names: Iterable[str]) -> None:
        pickled = sorted(name for name in names if name.lower().endswith(PICKLES))
        if pickled:
            raise ModelFilesUnsafe(f"{folder} holds its weights in {pickled[0]}, which can run code when opened.")
        raise ModelNotDownloaded(f"{variant.title} is not complete: there is no *.safetensors in folder {folder}.")

    # A GGUF file ------------------------------------------------------------------------

    def _gguf_model(self, variant: Variant) -> Located:
        folder = self.folder(variant)
        if variant.repo and folder.is_dir():
            _inside(folder, self._models)
        if variant.bundled:
            name, projector = f"{variant.bundled}-q8_0.gguf", f"{variant.bundled}-mmproj-q8_0.gguf"
            projector = projector if (folder / projector).is_file() else ""
        else:
            name, projector = self._model_name(variant, folder), variant.projector
        size_bytes = self._gguf_files(variant, folder, name, "model")
        size_bytes += self._gguf_files(variant, folder, projector, "projector") if projector else 0
        return Located(folder / name, folder / projector if projector else None, size_bytes)

    def _model_name(self, variant: Variant, folder: Path) -> str:
        """The name of the GGUF file. A person's own folder need not name it when it holds just one."""
        if variant.path and not _own(variant).is_dir():
            return _own(variant).name
        if variant.file:
            return variant.file
        names = sorted(name for name in _names(folder) if name.endswith(".gguf"))
        names = [name for name in names if "mmproj" not in name and name == _shards(name)[0]]
        if len(names) != 1:
            found = f"has {len(names)} of them" if names else "has no file that ends in .gguf"
            raise ModelNotDownloaded(f"{variant.title} needs one GGUF file, and folder {folder} {found}.")
        return names[0]

    def _gguf_files(self, variant: Variant, folder: Path, name: str, kind: str) -> int:
        """Check one GGUF with all its parts; its size in bytes."""
        if name.lower().endswith(PICKLES):
            raise ModelFilesUnsafe(f"{name} can run code when opened.")
        size_bytes = 0
        for part in _shards(name):
            path = folder / part
            if not path.is_file():
                raise _absent(variant.title, folder, part)
            if not variant.path:
                _inside(path, folder)
            header = self._check(path, check_gguf)
            size_bytes += path.stat().st_size
            if header and header.architecture and (header.architecture == "clip") != (kind == "projector"):
                raise ModelFilesDamaged(f"{part} is not a {kind}: it is a {header.architecture} file.")
        return size_bytes

    # Another engine's -------------------------------------------------------------------

    def _other_model(self, variant: Variant) -> Located:
        """An engine that is not ours: its files must be there, and what is in them is its own affair."""
        model = _own(variant) if variant.path else self.folder(variant) / variant.file
        if model.name.lower().endswith(PICKLES):
            raise ModelFilesUnsafe(f"{model.name} can run code when opened.")
        projector = self.folder(variant) / variant.projector if variant.projector else None
        for path in (model, projector):
            if path and not path.exists():
                raise _absent(variant.title, path.parent, path.name)
            if path and variant.repo:
                _inside(path, self._models)
        sizes = [path.stat().st_size for path in (model, projector) if path and path.is_file()]
        return Located(model, projector, sum(sizes))

    def _check(self, path: Path, check: Callable[[Path], GGUFHeader | None]) -> GGUFHeader | None:
        info = path.stat()
        key = (str(path), info.st_size, info.st_mtime_ns, info.st_ino)
        if key not in self._checked:
            header = check(path)
            if len(self._checked) >= _MAX_CHECKED:
                self._checked.clear()
            self._checked[key] = header
        return self._checked[key]


def _is_of_others(folder: Path, repo: str) -> bool:
    """Does the manifest that a download left there name other repositories only? False where there is none."""
    try:
        files = _read_json(folder / MANIFEST, _MAX_CONFIG_BYTES).get("files")
    except (OSError, ModelFilesDamaged):
        return False
    tables = files.values() if isinstance(files, dict) else ()
    owners = {str(table["repo"]).lower() for table in tables if isinstance(table, dict) and "repo" in table}
    return bool(owners) and repo.lower() not in owners


def _own(variant: Variant) -> Path:
    """The person's own path, absolute."""
    try:
        return Path(os.path.abspath(Path(variant.path).expanduser()))
    except RuntimeError:
        raise ModelNotDownloaded(f"{variant.path} cannot be found, because this account has no home folder.") from None


def _absent(title: str, folder: Path, name: str) -> ModelNotDownloaded:
    return ModelNotDownloaded(f"{title} is not on this machine: there is no file {name} in folder {folder}.")


def _names(folder: Path) -> set[str]:
    """The names in a model folder. Raises ModelFilesUnsafe for a link that leads out of it."""
    names: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            names.add(entry.name)
            if len(names) > _MAX_ENTRIES:
                raise ModelFilesDamaged(f"{folder} holds more than {_MAX_ENTRIES} files, so it is no model's folder.")
            if entry.is_symlink():
                _inside(folder / entry.name, folder)
    return names


def _inside(path: Path, folder: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # a circle of links, before Python 3.13
        inside = False
    if not inside:
        hint = "Move the files there, or make a preset whose path names the place where they lie."
        raise ModelFilesUnsafe(f"{path} is a link that leads out of {folder}.", hint=hint)


def _shards(name: str) -> list[str]:
    """All the parts of a model of which this file is one; just the name for a model in one file."""
    found = _SHARD.fullmatch(name)
    if not found or not 0 < int(found[3]) <= _MAX_ENTRIES:
        return [name]
    return [f"{found[1]}-{part:05d}-of-{found[3]}{found[4]}" for part in range(1, int(found[3]) + 1)]


# A folder of safetensors -------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json. Raises ModelFilesDamaged; OSError as the disk gives it."""
    return _read_json(folder / "config.json", _MAX_CONFIG_BYTES)


def whole_weights(folder: Path, names: Collection[str], title: str) -> list[str]:
    """The safetensors files of a folder with these names in it.

    Raises ModelNotDownloaded where there are none, or one is missing that the index or another's name tells of.
    """
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        raise ModelNotDownloaded(f"{title} is not complete: there is no *.safetensors in folder {folder}.")
    needed = {part for name in weights for part in _shards(name)}
    if "model.safetensors.index.json" in names:
        needed.update(_indexed(folder / "model.safetensors.index.json"))
    for name in sorted(needed):
        if name not in names:
            raise _absent(title, folder, name)
    return weights


# safetensors ------------------------------------------------------------------------------


_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def _read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    with path.open("rb") as file:
        raw = file.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise ModelFilesDamaged(f"{path.name} is larger than {limit_bytes // 2**20} MB.")
    return _parse_json(raw, path.name)


def _parse_json(raw: bytes, name: str) -> dict[str, Any]:
    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=no_doubles)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise ModelFilesDamaged(f"{name} is damaged: {reason}.") from None
    if not isinstance(data, dict):
        raise ModelFilesDamaged(f"{name} is damaged: it holds no table.")
    return data


def _indexed(path: Path) -> set[str]:
    """The files that a shard index names. Raises ModelFilesUnsafe for one outside the folder."""
    table = _read_json(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ModelFilesDamaged(f"{path.name} is damaged: it names no files.")
    names = set(table.values())
    for name in sorted(names):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,250}", name) or not name.endswith(".safetensors"):
            raise ModelFilesUnsafe(f"{path.name} names a file outside the model's folder: {json.dumps(name)[:120]}.")
    return names


def _check_only(path: Path) -> None:
    """check_safetensors, for a check whose result is remembered: of the tensors there can be very many."""
    check_safetensors(path)


def check_safetensors(path: Path) -> dict[str, int]:
    """Check the header of a safetensors file against its length, and give bytes by tensor; reads the header only.

    Raises ModelFilesDamaged, or ModelFilesUnsafe for another format under this name.
    """
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if length > min(size_bytes, _MAX_SAFETENSORS_HEADER_BYTES):
            # Only now, because the first two bytes of a pickle are also a header's fair length.
            _refuse_pickle(first, path)
        if len(first) < struct.calcsize("<Q") or length > size_bytes - 8:
            raise ModelFilesDamaged(f"{path.name} is cut off: it ends inside its header.")
        if length > _MAX_SAFETENSORS_HEADER_BYTES:
            raise ModelFilesDamaged(f"{path.name} is damaged: its header has {length} bytes.")
        header = _parse_json(file.read(length), path.name)
    header.pop("__metadata__", None)
    spans = {name: _span(name, entry, path) for name, entry in header.items()}
    end = 0
    for begin, stop in sorted(spans.values()):
        if begin != end:
            raise ModelFilesDamaged(f"{path.name} is damaged: its tensors overlap or have gaps.")
        end = stop
    if end != size_bytes - 8 - length:
        whole = end + 8 + length
        raise ModelFilesDamaged(f"{path.name} is damaged: it has {size_bytes} bytes, and its header says {whole}.")
    return {name: stop - begin for name, (begin, stop) in spans.items()}


def _span(name: str, entry: Any, path: Path) -> tuple[int, int]:
    """Where one tensor's bytes begin and end, after checking that shape and type give that many."""
    bad = ModelFilesDamaged(f"{path.name} is damaged: tensor {json.dumps(name)[:80]} makes no sense.")
    if not isinstance(entry, dict):
        raise bad
    shape: list[int] = _numbers(entry.get("shape"), bad)
    span: list[int] = _numbers(entry.get("data_offsets"), bad)
    if len(shape) > _MAX_DIMENSIONS or len(span) != len(("begin", "end")):
        raise bad
    bits = _DTYPE_BITS.get(str(entry.get("dtype")), 0)
    if span[0] > span[1] or (bits and math.prod(shape) * bits != 8 * (span[1] - span[0])):
        raise bad
    return span[0], span[1]


def _numbers(value: Any, bad: ModelFilesDamaged) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= _MAX_DIMENSION for n in value):
        raise bad
    return value


def _refuse_pickle(first: bytes, path: Path) -> None:
    """torch.save writes a zip or a bare pickle; both run code when loaded."""
    if first.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ModelFilesUnsafe(f"{path.name} is a pickle or an archive under another name.")


# GGUF -----------------------------------------------------------------------------------------

_STRING, _LIST = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SIZES = {kind: struct.calcsize(layout) for kind, layout in _SCALARS.items()}
# Tensor type: elements in a block, bytes of a block (ggml.h). A newer type is not checked for its size.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
_MAX_TENSOR_TYPE = 255
_GGML_DIMENSIONS = 4


class _Reader:
    """A GGUF file read from its start, never past its end; every complaint names the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.size_bytes = os.fstat(file.fileno()).st_size
        self.at = 0
        self._strings_left = _MAX_STRINGS

    def bad(self, why: str) -> ModelFilesDamaged:
        return ModelFilesDamaged(f"{self._path.name} is damaged: {why}.")

    def take(self, count: int) -> bytes:
        if count > self.size_bytes - self.at:
            raise ModelFilesDamaged(f"{self._path.name} is cut off: it ends inside its header.")
        data = self._file.read(count)
        if len(data) != count:
            raise ModelFilesDamaged(f"{self._path.name} is cut off: it became shorter while it was read.")
        self.at += count
        return data

    def skip(self, count: int) -> None:
        if count > self.size_bytes - self.at:
            raise ModelFilesDamaged(f"{self._path.name} is cut off: it ends inside its header.")
        self._file.seek(count, os.SEEK_CUR)
        self.at += count

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self, most: int) -> bytes:
        length: int = self.number("<Q")
        if length > most:
            raise self.bad(f"a string of {length} bytes, where {most} is the limit")
        return self.take(length)

    def name(self, most: int) -> str:
        try:
            return self.string(most).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("a name that is not UTF-8") from None

    def value(self) -> int | float | bool | str | None:
        """A value of the metadata; None for lists and long strings, which are walked over."""
        kind = self.number("<I")
        if kind in _SCALARS:
            found: int | float | bool = self.number(_SCALARS[kind])
            return found
        if kind == _STRING:
            raw = self.string(_MAX_STRING_BYTES)
            return raw.decode("utf-8", "replace") if len(raw) <= _KEPT_STRING_BYTES else None
        if kind == _LIST:
            self._list()
            return None
        raise self.bad(f"a value of the unknown type {kind}")

    def _list(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in _SIZES:
            self.skip(_SIZES[kind] * count)
        elif kind == _STRING:
            self._strings_left -= count
            if self._strings_left < 0:
                raise self.bad(f"a list of {count} strings")
            for _ in range(count):
                self._skip_string()
        else:
            raise self.bad(f"a list of the unknown type {kind}")

    def _skip_string(self) -> None:
        # Half a million of these in a large vocabulary, so without the general helpers.
        head = self._file.read(8)
        length = int.from_bytes(head, "little")
        self.at += 8
        if length > _MAX_STRING_BYTES or self.at + length > self.size_bytes:
            raise self.bad(f"a string of {length} bytes in a list")
        if length < _KEPT_STRING_BYTES:
            self._file.read(length)
        else:
            self._file.seek(length, os.SEEK_CUR)
        self.at += length


def check_gguf(path: Path) -> GGUFHeader:
    """Check a GGUF file's header against its length. Reads the header only, in bounded memory.

    Raises ModelFilesDamaged, or ModelFilesUnsafe for another format under this name.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        magic = file.read(4)
        _refuse_pickle(magic, path)
        if magic != b"GGUF":
            raise reader.bad("it does not begin like a GGUF file")
        reader.at = len(magic)
        version = reader.number("<I")
        if version not in (2, 3):
            raise reader.bad(f"its version is {version}, and this reads 2 and 3 in little-endian order")
        tensors, keys = reader.number("<Q"), reader.number("<Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise reader.bad(f"it claims {tensors} tensors and {keys} keys")
        values = _metadata(reader, keys)
        alignment = _alignment(reader, values)
        _check_tensors(reader, tensors, alignment)
        return _header(reader, version, tensors, alignment, values)


def _metadata(reader: _Reader, keys: int) -> dict[str, int | float | bool | str]:
    seen: set[str] = set()
    values: dict[str, int | float | bool | str] = {}
    for _ in range(keys):
        key = reader.name(_MAX_KEY_BYTES)
        if key in seen:
            raise reader.bad(f"the key {json.dumps(key)[:80]} occurs twice")
        seen.add(key)
        value = reader.value()
        if value is not None:
            values[key] = value
    return values


def _alignment(reader: _Reader, values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise reader.bad(f"its alignment is {alignment}, which is not a power of two")
    return alignment


def _check_tensors(reader: _Reader, tensors: int, alignment: int) -> None:
    names: set[str] = set()
    spans: list[tuple[int, int]] = []
    for _ in range(tensors):
        name = reader.name(_MAX_TENSOR_NAME_BYTES)
        if name in names:
            raise reader.bad(f"the tensor {json.dumps(name)[:80]} occurs twice")
        names.add(name)
        spans.append(_tensor(reader, name, alignment))
    room = reader.size_bytes - _aligned(reader.at, alignment)
    end = 0
    for begin, stop in sorted(spans):
        if begin < end:
            raise reader.bad("its tensors overlap")
        end = max(end, stop)
    if end > room:
        raise reader.bad(f"it is cut off: its tensors need {end - room} more bytes")


def _tensor(reader: _Reader, name: str, alignment: int) -> tuple[int, int]:
    """Where a tensor's data begins and ends, counted from the start of the data."""
    shown = json.dumps(name)[:80]
    dimensions = reader.number("<I")
    if dimensions > _GGML_DIMENSIONS:
        raise reader.bad(f"the tensor {shown} has {dimensions} dimensions")
    shape = [reader.number("<Q") for _ in range(dimensions)]
    kind, begin = reader.number("<I"), reader.number("<Q")
    if kind > _MAX_TENSOR_TYPE or begin % alignment or any(n > _MAX_DIMENSION for n in shape):
        raise reader.bad(f"the tensor {shown} makes no sense")
    # A type that is newer than this table still takes at least one byte.
    elements, block_bytes = _BLOCKS.get(kind, (0, 0))
    if not elements:
        return begin, begin + 1
    if shape and shape[0] % elements:
        raise reader.bad(f"the rows of the tensor {shown} are not whole blocks")
    return begin, begin + math.prod(shape) // elements * block_bytes


def _aligned(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment


def _header(
    reader: _Reader, version: int, tensors: int, alignment: int, values: dict[str, int | float | bool | str]
) -> GGUFHeader:
    architecture = values.get("general.architecture")
    # The later parts of a split model carry no architecture, and its first may carry no tensors.
    split = bool(values.get("split.count"))
    if not isinstance(architecture, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", architecture):
        if not split:
            raise reader.bad("it names no architecture")
        architecture = ""
    if not tensors and not split:
        raise reader.bad("it has no tensors")
    length = values.get(f"{architecture}.context_length", 0)
    name = values.get("general.name", "")
    return GGUFHeader(
        version=version,
        architecture=architecture,
        name=name if isinstance(name, str) else "",
        context_length=max(0, length) if type(length) is int else 0,
        tensors=tensors,
        alignment=alignment,
        size_bytes=reader.size_bytes,
        values=MappingProxyType(values),
    )
