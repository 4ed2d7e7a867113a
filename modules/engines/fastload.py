"""Weights to the card at the speed of the bus, through ExLlamaV2's own load code.

The library reads tensor by tensor through pageable memory and waits for the whole
card after each. Here all weights of a model go to the card as a few large copies
into one block, in the order in which the modules are built, and the library's own
`module.load()` finds each tensor already there, as a view. Building the handles of
one layer overlaps with the copy of the next.

The bytes come from a page-locked host copy of the model (`HostCopies`, least
recently used first out) or, for a model that has none, from its files through two
page-locked buffers that several threads fill. Nothing is copied back: the host copy
is made from the files.

This file knows ExLlamaV2's modules, tensors and files. It knows no engine contract,
no request and no preset.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ALIGN = 512
STAGE_BYTES = 64 << 20
READERS = 8
READ_BYTES = 8 << 20
REGISTER_BYTES = 1 << 30  # page-locking takes 0.2 to 0.3 s a GiB by estimate; in pieces it can give way to an answer
RAM_RESERVE_BYTES = 4 << 30
DTYPES = {
    "I32": torch.int32, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One tensor: where it lies in its file and in its section's memory.

    derived names what is computed from EXL2's q_invperm and q_groups instead of read: "perm", "invperm" or "map".
    The library computes them at every load, and waits for the whole card when it does. stored is the type in the file
    of a tensor that is brought to half precision on its way, BF16 or F32; size and dtype are those after it.
    """

    path: str
    name: str
    file_offset: int
    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    derived: str = ""
    stored: torch.dtype | None = None


@dataclass
class Section:
    """The tensors of one module, one after the other. device -1 is host memory. Offsets count from the layout's start.

    private: the library changes these tensors in place, so it gets copies of them.
    """

    device: int
    start: int
    pieces: list[Piece] = field(default_factory=list)
    end: int = 0
    private: bool = False


@dataclass
class Layout:
    """Every tensor of a model in load order. Sizes in bytes; sections[i] belongs to modules[i]."""

    modules: list[Any]
    sections: list[Section]
    pieces: dict[tuple[str, str], tuple[Section, Piece]]
    size: int
    key: tuple[Any, ...]

    @property
    def device_size(self) -> int:
        """Bytes that go to the cards."""
        return sum(s.end - s.start for s in self.sections if s.device >= 0)


def lay_out(models: Sequence[Any]) -> Layout:
    """Plan the memory of models whose device map is set, in the order in which they will be loaded."""
    modules: list[Any] = []
    sections: list[Section] = []
    pieces: dict[tuple[str, str], tuple[Section, Piece]] = {}
    headers: dict[str, dict[str, Any]] = {}
    position = 0
    files: set[str] = set()
    for model in models:
        keymap, file_map = model.config.arch.keymap, model.config.tensor_file_map
        for path in set(file_map.values()) - set(headers):
            headers[path] = _renamed(path, keymap)
        files |= set(headers)
        owners: dict[str, list[str]] = {}
        for name in file_map:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        for module in model.modules:
            section = Section(module.device_idx, position, private=getattr(model.config, "scale_emb", 1) != 1)
            for key in _keys(module):
                names = sorted(owners.get(key, ()), key=lambda n: headers[file_map[n]][n]["at"])
                for piece in _pieces(key, [(file_map[n], n, headers[file_map[n]][n]) for n in names]):
                    if (piece.path, piece.name) in pieces:
                        continue
                    piece = replace(piece, offset=position)
                    pieces[piece.path, piece.name] = (section, piece)
                    section.pieces.append(piece)
                    position = _aligned(position + piece.size)
            section.end = position
            modules.append(module)
            sections.append(section)
    stamp = tuple(sorted((p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in files))
    return Layout(modules, sections, pieces, position, stamp)


def _pieces(key: str, tensors: list[tuple[str, str, dict[str, Any]]]) -> Iterator[Piece]:
    """The tensors of one weight; for EXL2, what is derived from q_invperm takes its place.

    What load_weight in module.py takes to half precision is F16 here already: the weights and biases that are not
    quantized, as a vision tower's always are, and GPTQ's scales.
    """
    quantized = any(name in (f"{key}.q_weight", f"{key}.qweight") for _, name, _ in tensors)
    for path, name, entry in tensors:
        shape = tuple(entry["shape"])
        if name == f"{key}.q_invperm":
            for derived, count in (("perm", shape[0]), ("invperm", shape[0]), ("map", 2 * shape[0])):
                yield Piece(path, f"{key}.#{derived}", entry["at"], 0, 2 * count, torch.int16, (count,), derived)
            continue
        dtype, size = DTYPES[entry["dtype"]], entry["size"]
        if dtype in (torch.bfloat16, torch.float32) and (not quantized or name == f"{key}.scales"):
            half = 2 * size // dtype.itemsize
            yield Piece(path, name, entry["at"], 0, half, torch.float16, shape, stored=dtype)
        else:
            yield Piece(path, name, entry["at"], 0, size, dtype, shape)


def derive(piece: Piece, invperm: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], rows: int) -> bytes:
    """What the library makes of q_invperm (I32) and q_groups (I16 pairs of bits and first row of q_weight).

    perm and invperm as unsigned 16-bit numbers; map has two for each input: its group, and how many inputs of that
    group are left, itself included. rows is the height of q_weight. Sources: load_weight in module.py,
    make_group_map_py in ext.py.
    """
    if piece.derived == "invperm":
        return bytes(invperm.astype(np.uint16).tobytes())
    if piece.derived == "perm":
        return bytes(np.argsort(invperm, kind="stable").astype(np.uint16).tobytes())
    bits: Any = groups[0::2].astype(np.int64)
    first: Any = groups[1::2].astype(np.uint16).astype(np.int64)
    heights = np.diff(np.append(first, rows)) * 32 // bits
    table: Any = np.empty((int(heights.sum()), 2), np.int64)
    table[:, 0] = np.repeat(np.arange(len(bits)), heights)
    ends = np.cumsum(heights)
    table[:, 1] = np.repeat(ends, heights) - np.arange(len(table))
    return bytes(table.astype(np.uint16).tobytes()[: piece.size])


def _renamed(path: str, keymap: Any) -> dict[str, dict[str, Any]]:
    """The header under the names by which the library asks, with places counted from the file's start."""
    from exllamav2.stloader import STFile

    file = STFile(path, keymap)
    table = {}
    for name, entry in file.get_dict().items():
        begin, end = entry["data_offsets"]
        table[name] = {**entry, "at": file.header_size + begin, "size": end - begin}
    return table


def _keys(module: Any) -> list[str]:
    found = []
    for one in (*module.submodules, module):
        found += [key for key in (one.key, getattr(one, "alt_key", None)) if key]
    return found


def _aligned(position: int) -> int:
    return -(-position // ALIGN) * ALIGN


class Reader:
    """Reads ranges of files into memory with several threads; the GIL is free meanwhile."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    def read(self, section: Section, begin: int, end: int, memory: memoryview) -> None:
        """Fill `memory` with the section's bytes from begin to end. Raises OSError for a file that ends too early."""
        jobs = []
        for piece in section.pieces:
            first, last = max(piece.offset, begin), min(piece.offset + piece.size, end)
            if first >= last:
                continue
            part, skipped = memory[first - begin : last - begin], first - piece.offset
            if piece.derived:
                jobs.append(self._pool.submit(self._derive, piece, skipped, part))
                continue
            for at in range(0, len(part), READ_BYTES):
                if piece.stored is not None:
                    jobs.append(self._pool.submit(_fill_half, piece, skipped + at, part[at : at + READ_BYTES]))
                    continue
                place = piece.file_offset + skipped + at
                jobs.append(self._pool.submit(_fill, piece.path, place, part[at : at + READ_BYTES]))
        for job in jobs:
            job.result()

    def _derive(self, piece: Piece, skipped: int, memory: memoryview) -> None:
        key = piece.name.rpartition(".")[0]
        inputs = piece.shape[0] // (2 if piece.derived == "map" else 1)
        invperm: Any = np.empty(inputs, np.int32)
        _fill(piece.path, piece.file_offset, memoryview(invperm).cast("B"))
        groups: Any = np.empty(0, np.int16)
        rows = 0
        if piece.derived == "map":
            pieces = {p.name: p for _, p in self._layout.pieces.values() if p.name.startswith(f"{key}.q_")}
            table = pieces[f"{key}.q_groups"]
            groups, rows = np.empty(table.shape[0], np.int16), pieces[f"{key}.q_weight"].shape[0]
            _fill(table.path, table.file_offset, memoryview(groups).cast("B"))
        memory[:] = derive(piece, invperm, groups, rows)[skipped : skipped + len(memory)]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True)


def _fill(path: str, place: int, memory: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(place)
        done = 0
        while done < len(memory):
            size = file.readinto(memory[done:])
            if not size:
                raise OSError(f"{Path(path).name} ended while it was read")
            done += size


def _fill_half(piece: Piece, skipped: int, memory: memoryview) -> None:
    """Part of a BF16 or F32 tensor in half precision, as Tensor.half() gives it: what is too large becomes infinite."""
    assert piece.stored is not None
    width = piece.stored.itemsize
    raw = bytearray(len(memory) // 2 * width)
    _fill(piece.path, piece.file_offset + skipped // 2 * width, memoryview(raw))
    torch.frombuffer(memory, dtype=torch.float16).copy_(torch.frombuffer(raw, dtype=piece.stored))


class HostCopy:
    """All tensors of one model in one anonymous mapping, page-locked where that works."""

    def __init__(self, layout: Layout) -> None:
        self.size = max(layout.size, 1)
        self.key = layout.key
        self.ready = False
        self.locked_bytes = 0
        # Private memory: Python's default is a shared mapping, which the kernel counts against another limit.
        kind = {} if os.name == "nt" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        self._map = mmap.mmap(-1, self.size, **kind)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def fill(self, layout: Layout, reader: Reader, pause: Callable[[], None]) -> None:
        """Read the files in and page-lock the memory; `pause` is called between the pieces and may wait."""
        view = memoryview(self._map)
        for section in layout.sections:
            pause()
            reader.read(section, section.start, section.end, view[section.start : section.end])
        view.release()
        if torch.cuda.is_available():
            runtime = torch.cuda.cudart()
            for begin in range(0, self.size, REGISTER_BYTES):
                pause()
                size = min(REGISTER_BYTES, self.size - begin)
                if int(runtime.cudaHostRegister(self.memory.data_ptr() + begin, size, 1)) != 0:
                    print(f"page-locking stopped after {begin >> 20} MB; the rest is copied more slowly", flush=True)
                    break
                self.locked_bytes += size
        self.ready = True

    def release(self) -> None:
        """Unlock the pages. The mapping goes when the last view of it goes."""
        if self.locked_bytes:
            runtime = torch.cuda.cudart()
            for begin in range(0, self.locked_bytes, REGISTER_BYTES):
                runtime.cudaHostUnregister(self.memory.data_ptr() + begin)
        self.locked_bytes, self.ready = 0, False


class HostCopies:
    """The page-locked copies of recently used models, within a budget; the least recently used goes first."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._copies: OrderedDict[tuple[Any, ...], HostCopy] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, layout: Layout) -> HostCopy | None:
        """The finished copy of this model, now the most recently used."""
        with self._lock:
            copy = self._copies.get(layout.key)
            if copy is None or not copy.ready:
                return None
            self._copies.move_to_end(layout.key)
            return copy

    def used_bytes(self) -> int:
        """Bytes of all copies."""
        with self._lock:
            return sum(copy.size for copy in self._copies.values())

    def limit(self, budget_bytes: int, keep: Sequence[tuple[Any, ...]] = ()) -> int:
        """Set the budget and let go of what is over it, the least recently used first. Returns the bytes of all copies.

        Copies in use (keep) and one that is being made stay, so that may be more than the budget.
        """
        with self._lock:
            self.budget_bytes = budget_bytes
            self._make_room(0, keep)
            return sum(copy.size for copy in self._copies.values())

    def _make_room(self, size: int, keep: Sequence[tuple[Any, ...]]) -> bool:
        while self._copies and sum(c.size for c in self._copies.values()) + size > self.budget_bytes:
            oldest = next((key for key in self._copies if key not in keep and self._copies[key].ready), None)
            if oldest is None:
                return False
            self._copies.pop(oldest).release()
        return size <= self.budget_bytes

    def make(self, layout: Layout, pause: Callable[[], None], keep: Sequence[tuple[Any, ...]] = ()) -> HostCopy | None:
        """Copy a model into host memory; None when it does not fit into the budget or the machine's free memory.

        keep names copies that are in use and must stay (the embedding of a loaded model lies in its copy).
        """
        with self._lock:
            if layout.key in self._copies:
                return self._copies[layout.key]
            if layout.size > self.budget_bytes or not self._make_room(layout.size, keep):
                return None
            if _available_bytes() < layout.size + RAM_RESERVE_BYTES:
                return None
            copy = HostCopy(layout)
            self._copies[layout.key] = copy
        reader = Reader(layout)
        try:
            copy.fill(layout, reader, pause)
        except BaseException:
            with self._lock:
                self._copies.pop(layout.key, None)
            copy.release()
            raise
        finally:
            reader.close()
        return copy

    def clear(self) -> None:
        """Give everything back."""
        with self._lock:
            for copy in self._copies.values():
                copy.release()
            self._copies.clear()


def _available_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62  # not Linux: the mapping itself fails when there is no memory


# Feeding the library -----------------------------------------------------------------------


class Feeder:
    """Stands in for the library's tensor reader while a model is loaded, and builds its modules in order."""

    def __init__(self) -> None:
        self._tensors: Callable[[str, str, str], torch.Tensor | None] | None = None
        self._installed = False

    def install(self) -> None:
        """Wrap the library's reading of tensors, and its permuting of columns on the CPU. Once for a process."""
        if self._installed:
            return
        self._installed = True
        import exllamav2.linear as linear
        from exllamav2.module import ExLlamaV2Module
        from exllamav2.stloader import STFile

        get_stock, load_stock = STFile.get_tensor, ExLlamaV2Module.load_weight

        def get_tensor(file: Any, key: str, device: Any, out_dtype: Any = None) -> Any:
            found = self._tensors(file.filename, key, str(device)) if self._tensors else None
            if found is None:
                return get_stock(file, key, device, out_dtype)
            return found.to(out_dtype) if out_dtype else found

        def load_weight(module: Any, override_key: str | None = None, cpu: bool = False) -> Any:
            found = self._quantized(module, override_key) if self._tensors else None
            return load_stock(module, override_key, cpu) if found is None else found

        STFile.get_tensor = get_tensor
        ExLlamaV2Module.load_weight = load_weight
        linear.ext_c = _Remapping(linear.ext_c)

    def _quantized(self, module: Any, override_key: str | None) -> dict[str, torch.Tensor] | None:
        """The tensors of an EXL2 weight with what is derived from them, so that the library computes nothing."""
        assert self._tensors is not None
        files = module.model.config.tensor_file_map
        for key in (override_key,) if override_key else (module.key, module.alt_key):
            if key is None or f"{key}.q_weight" not in files:
                continue
            names = {name: name for name in ("q_weight", "q_scale", "q_scale_max", "q_groups", "bias")}
            names |= {"q_perm": "#perm", "q_invperm": "#invperm", "q_group_map": "#map"}
            tensors = {}
            for name, kept in names.items():
                origin = f"{key}.q_invperm" if kept.startswith("#") else f"{key}.{kept}"
                if origin in files:
                    found = self._tensors(files[origin], f"{key}.{kept}", module.device())
                    if found is None:
                        return None
                    tensors[name] = found
            return tensors
        return None

    def load(
        self, layout: Layout, copy: HostCopy | None, progress: Callable[[int, int], None]
    ) -> list[torch.Tensor]:
        """Bring the weights to the cards and build every module of the layout.

        progress gets bytes done and the total. Returns the blocks that hold the
        weights; the modules' tensors are views of them. Raises what the library or
        CUDA raises, out of memory among it; what was built then has to be unloaded.
        """
        self.install()
        sizes: dict[int, int] = {}
        where: dict[int, int] = {}  # id of a section -> its start in its device's block
        for section in layout.sections:
            where[id(section)] = sizes.get(section.device, 0)
            sizes[section.device] = sizes.get(section.device, 0) + section.end - section.start
        blocks = {
            device: torch.empty(max(size, 1), dtype=torch.uint8, device=f"cuda:{device}")
            for device, size in sizes.items() if device >= 0
        }  # fmt: skip
        if copy is None and sizes.get(-1):
            blocks[-1] = torch.empty(sizes[-1], dtype=torch.uint8)

        def tensor(path: str, name: str, device: str) -> torch.Tensor | None:
            found = layout.pieces.get((path, name))
            if found is None:
                return None
            section, piece = found
            if section.device < 0 and copy is not None:
                flat = copy.memory[piece.offset : piece.offset + piece.size]
            else:
                # Also where the library asks for the CPU, to permute columns there: that is done on the card instead.
                begin = where[id(section)] + piece.offset - section.start
                flat = blocks[section.device][begin : begin + piece.size]
            if section.private:
                flat = flat.clone()
            if section.device < 0 and device != "cpu":
                flat = flat.to(device)  # the output head of a model that shares it with the embedding
            return flat.view(piece.dtype).view(piece.shape)

        source = _Copied(layout, copy, blocks, where) if copy is not None else _Read(layout, blocks, where)
        self._tensors = tensor
        total, done = max(layout.size, 1), 0
        try:
            with torch.inference_mode(), _default_streams(blocks):
                for module, section in zip(layout.modules, layout.sections, strict=True):
                    source.wait(section)
                    module.load()
                    done += section.end - section.start
                    progress(done, total)
                for device in blocks:
                    if device >= 0:
                        torch.cuda.synchronize(device)
        finally:
            self._tensors = None
            source.close()
        return list(blocks.values())


@contextlib.contextmanager
def _default_streams(blocks: dict[int, torch.Tensor]) -> Iterator[None]:
    """Build handles on the default stream.

    On any other the extension waits for the whole card, and with it for the copies of all later layers.
    """
    with contextlib.ExitStack() as stack:
        for device in blocks:
            if device >= 0:
                stack.enter_context(torch.cuda.stream(torch.cuda.default_stream(device)))
        yield


class _Copied:
    """Sections from page-locked memory: every copy is queued at once, and waited for when its module is built."""

    def __init__(
        self, layout: Layout, copy: HostCopy, blocks: dict[int, torch.Tensor], where: dict[int, int]
    ) -> None:
        self._events: dict[int, Any] = {}
        streams = {device: torch.cuda.Stream(device) for device in blocks if device >= 0}
        for section in layout.sections:
            if section.device < 0 or section.start == section.end:
                continue
            with torch.cuda.stream(streams[section.device]):
                # One copy must not cross from one page-locked range into the next.
                for begin, end in _stretches(section, REGISTER_BYTES, aligned=True):
                    at = where[id(section)] + begin - section.start
                    target = blocks[section.device][at : at + end - begin]
                    target.copy_(copy.memory[begin:end], non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._events[id(section)] = event

    def wait(self, section: Section) -> None:
        event = self._events.get(id(section))
        if event is not None:
            event.synchronize()

    def close(self) -> None:
        for event in self._events.values():
            event.synchronize()  # nobody may reuse the block while copies into it are under way


class _Read:
    """Sections from files: threads fill page-locked buffers while the one before is copied to the card."""

    def __init__(self, layout: Layout, blocks: dict[int, torch.Tensor], where: dict[int, int]) -> None:
        self._layout, self._blocks, self._where = layout, blocks, where
        self._reader = Reader(layout)
        self._stages = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._ready = {id(section): threading.Event() for section in layout.sections}
        self._events: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._streams = {device: torch.cuda.Stream(device) for device in blocks if device >= 0}
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def wait(self, section: Section) -> None:
        self._ready[id(section)].wait()
        if self._error is not None:
            raise self._error
        event = self._events.get(id(section))
        if event is not None:
            event.synchronize()

    def close(self) -> None:
        self._stopped = True
        self._thread.join()
        self._reader.close()
        for event in self._events.values():
            event.synchronize()
        self._stages = []

    def _run(self) -> None:
        try:
            turn = 0
            used: list[Any] = [None, None]
            for section in self._layout.sections:
                for begin, end in _stretches(section, STAGE_BYTES):
                    if self._stopped:
                        return
                    if section.device < 0:
                        self._read_to_host(section, begin, end)
                        continue
                    if used[turn] is not None:
                        used[turn].synchronize()
                    stage = self._stages[turn]
                    self._reader.read(section, begin, end, memoryview(stage.numpy()))
                    used[turn] = self._send(section, stage, begin, end)
                    turn = 1 - turn
                self._ready[id(section)].set()
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        finally:
            for event in self._ready.values():
                event.set()

    def _send(self, section: Section, stage: torch.Tensor, begin: int, end: int) -> Any:
        at = self._where[id(section)] + begin - section.start
        with torch.inference_mode(), torch.cuda.stream(self._streams[section.device]):
            self._blocks[section.device][at : at + end - begin].copy_(stage[: end - begin], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._events[id(section)] = event
        return event

    def _read_to_host(self, section: Section, begin: int, end: int) -> None:
        at = self._where[id(section)] + begin - section.start
        self._reader.read(section, begin, end, memoryview(self._blocks[-1][at : at + end - begin].numpy()))


def _stretches(section: Section, size: int, aligned: bool = False) -> Iterator[tuple[int, int]]:
    """Parts of the section of at most `size` bytes; aligned ones end at whole multiples of it."""
    begin = section.start
    while begin < section.end:
        end = (begin // size + 1) * size if aligned else begin + size
        yield begin, min(end, section.end)
        begin = end


class _Remapping:
    """The extension, with its column permutations also for tensors on a card.

    The library permutes the columns of gate and up projections on one CPU thread at
    about 3.5 GB/s, which for a 32B model is longer than all the copying.
    """

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def tensor_remap(self, tensor: torch.Tensor, index: torch.Tensor) -> None:
        """Columns of an (rows, columns) I32 tensor, in place: new[:, c] = old[:, index[c]]."""
        remap(tensor, index)

    def tensor_remap_4bit(self, tensor: torch.Tensor, index: torch.Tensor) -> None:
        """The same for columns of 4 bits, eight to an I32, lowest first."""
        remap_4bit(tensor, index)


def remap(tensor: torch.Tensor, index: torch.Tensor) -> None:
    """new[:, c] = old[:, index[c]], in place, on whatever device the tensor is; the index may be unsigned 16-bit."""
    tensor.copy_(tensor.index_select(1, _unsigned(index, tensor)))


def _unsigned(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    wide = index.to(like.device, torch.int64)
    return wide & 0xFFFF if index.dtype == torch.int16 else wide


def remap_4bit(tensor: torch.Tensor, index: torch.Tensor) -> None:
    """The same for columns of 4 bits, eight to an I32 word, lowest bits first."""
    index = _unsigned(index, tensor)
    shift = torch.arange(0, 32, 4, device=tensor.device, dtype=torch.int32)
    nibbles = ((tensor[:, :, None] >> shift) & 15).flatten(1).index_select(1, index)
    words = nibbles.view(tensor.shape[0], tensor.shape[1], 8).to(torch.int64) << shift.to(torch.int64)
    total = words.sum(-1)
    tensor.copy_(torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32))


def time_link(device: int, size: int = 1 << 30, times: int = 4) -> float:
    """The host-to-device link in bytes per second: large copies from page-locked memory, the best of several."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    block = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    best = 0.0
    for _ in range(times):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        block.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, size / (time.perf_counter() - began))
    return best


__all__ = ["Feeder", "HostCopies", "HostCopy", "Layout", "derive", "lay_out", "remap", "remap_4bit", "time_link"]
