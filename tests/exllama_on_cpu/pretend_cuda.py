"""Makes PyTorch for the CPU believe in NVIDIA cards whose memory is host memory, and counts their bytes.

For tests of code that names "cuda:0" everywhere. A tensor made on or moved to a card is an ordinary CPU tensor, a
copy of its own, that says `device` cuda:0 while the mode is on; what is computed from it is on that card too. Its
bytes count as allocated, in steps of 512 as in PyTorch, until the last reference to its storage is gone: so
`torch.cuda.memory_allocated()` tells of every reference that was kept. What `empty_cache()` has not given back yet
counts in `memory_reserved()` and is missing from `mem_get_info()`. An allocation beyond TURNTABLE_TEST_VRAM_BYTES
(for each of TURNTABLE_TEST_CARDS cards; 24 GiB unless said) raises torch.OutOfMemoryError. The compute capability is
TURNTABLE_TEST_CAPABILITY, 8.9 unless said. The first matrix product on a card leaves a workspace of cuBLAS there, as
in PyTorch, until torch._C._cuda_clearCublasWorkspaces().

Not shown: streams and events do nothing, so what only their order can break is not seen; tensors of different
devices may be mixed; what one PyTorch function allocates inside itself and frees again is not counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CARDS = int(os.environ.get("TURNTABLE_TEST_CARDS", "1"))
VRAM_BYTES = int(os.environ.get("TURNTABLE_TEST_VRAM_BYTES", str(24 << 30)))
CAPABILITY = tuple(map(int, os.environ.get("TURNTABLE_TEST_CAPABILITY", "8.9").split(".")))
STEP_BYTES = 512
WORKSPACE_BYTES = 8519680  # what PyTorch gives cuBLAS on cards before Hopper; pytorch issue 95668
REAL_DEVICE = torch.device
CPU = REAL_DEVICE("cpu")


class Memory:
    """The bytes of the pretended cards, by the identity of each storage."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}  # identity -> (card, bytes)
        self.used = [0] * CARDS
        self.most = [0] * CARDS
        self.reserved = [0] * CARDS
        self.workspaces: set[int] = set()  # cards that have one

    def holds(self, tensor: torch.Tensor) -> int | None:
        """The card of a tensor; None for the CPU."""
        found = self.sizes.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[0]

    def check(self, card: int, size: int) -> None:
        size = -(-size // STEP_BYTES) * STEP_BYTES
        if self.used[card] + size > VRAM_BYTES:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {card} has a total capacity of "
                f"{VRAM_BYTES / 2**30:.2f} GiB of which {(VRAM_BYTES - self.used[card]) / 2**20:.2f} MiB is free."
            )

    def add(self, tensor: torch.Tensor, card: int) -> None:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, -(-storage.nbytes() // STEP_BYTES) * STEP_BYTES
        if identity in self.sizes:
            return
        self.check(card, size)
        self.sizes[identity] = (card, size)
        self._use(card, size)
        # PyTorch keeps the Python object of a storage as long as the storage itself, so this tells of its true end.
        weakref.finalize(storage, self.drop, identity).atexit = False

    def _use(self, card: int, size: int) -> None:
        self.used[card] += size
        self.most[card] = max(self.most[card], self.used[card])
        self.reserved[card] = max(self.reserved[card], self.used[card])

    def drop(self, identity: int) -> None:
        card, size = self.sizes.pop(identity)
        self.used[card] -= size

    def add_workspace(self, card: int) -> None:
        if card not in self.workspaces:
            self.check(card, WORKSPACE_BYTES)
            self.workspaces.add(card)
            self._use(card, WORKSPACE_BYTES)

    def clear_workspaces(self) -> None:
        for card in self.workspaces:
            self.used[card] -= WORKSPACE_BYTES
        self.workspaces.clear()

    def give_back(self) -> None:
        self.reserved = list(self.used)


MEMORY = Memory()


def card_of(device: Any) -> int | None:
    """The number of the card that a device argument names; None for the CPU and for no device."""
    if isinstance(device, bool) or device is None:
        return None
    if isinstance(device, int):
        return device
    text = str(device)
    return int(text.partition(":")[2] or 0) if text.startswith("cuda") else None


def _device(tensor: torch.Tensor) -> torch.device:
    card = MEMORY.holds(tensor)
    return tensor.device if card is None else REAL_DEVICE("cuda", card)


def _numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    card = MEMORY.holds(tensor)
    if card is not None:
        raise TypeError(f"can't convert cuda:{card} device type tensor to numpy. Use Tensor.cpu() to copy it first.")
    return tensor.numpy(*args, **kwargs)


def _same(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    return tensor


def _move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to: always a copy between devices, never on the same one unless the type changes."""
    rest = list(args)
    kwargs.pop("non_blocking", None)
    copy = kwargs.pop("copy", False)
    given, held = kwargs.pop("device", None), MEMORY.holds(tensor)
    for place, value in enumerate(rest):
        if isinstance(value, torch.Tensor):
            rest[place : place + 1] = [_device(value), value.dtype]
            return _move(tensor, *rest, copy=copy, **kwargs)
        if isinstance(value, (str, int, REAL_DEVICE)) and not isinstance(value, bool):
            given = rest.pop(place)
            break
    rest = [value for value in rest if not isinstance(value, bool)]  # non_blocking by place
    card = held if given is None else card_of(given)
    if str(given) == "meta" or tensor.device.type == "meta":
        return tensor.to(given or "meta", *rest, **kwargs)
    if card is not None:
        MEMORY.check(card, 0 if card == held else tensor.numel() * tensor.element_size())
    moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
    if moved is tensor and (card != held or copy):
        moved = tensor.detach().clone() if isinstance(tensor, torch.nn.Parameter) else tensor.clone()
    if card is not None:
        MEMORY.add(moved, card)
    return moved


# Functions that get a meaning of their own. Getters of properties reach a mode like functions.
SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: lambda tensor: MEMORY.holds(tensor) is not None,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: lambda tensor: _device(tensor).type == "cpu",  # type: ignore[attr-defined]
    torch.Tensor.get_device: lambda tensor: -1 if (card := MEMORY.holds(tensor)) is None else card,
    torch.Tensor.numpy: _numpy, torch.Tensor.to: _move, torch.Tensor.cpu: lambda tensor, **k: _move(tensor, "cpu"),
    torch.Tensor.cuda: lambda tensor, device=0, **k: _move(tensor, REAL_DEVICE("cuda", card_of(device) or 0)),
    torch.Tensor.pin_memory: _same, torch.Tensor.record_stream: lambda tensor, stream: None,
    torch.Tensor.is_pinned: lambda tensor, *args: False,
}  # fmt: skip


# Matrix products, by each name under which a mode hears of them.
PRODUCTS = frozenset([
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.nn.functional.linear,
    torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm,
])  # fmt: skip


class PretendCards(TorchFunctionMode):
    """Sends what names a card to the CPU, and counts it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        card = None
        if "device" in kwargs or "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            card = card_of(kwargs.get("device"))
            if card is None and kwargs.get("device") is not None:
                return func(*args, **kwargs)
            if card is not None:
                kwargs["device"] = CPU
                MEMORY.check(card, _size_of(func, args, kwargs))
        elif not MEMORY.sizes:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in PRODUCTS:
            for held in {MEMORY.holds(tensor) for tensor in _tensors(args)} - {None}:
                MEMORY.add_workspace(held)
        if isinstance(result, (torch.Tensor, tuple, list)):
            self._place(result, list(_tensors((args, kwargs))), card)
        return result

    @staticmethod
    def _place(result: Any, given: list[torch.Tensor], card: int | None) -> None:
        """New memory is on the card that was named, or else on that of the first argument that is on one."""
        if card is None:
            card = next((held for tensor in given if (held := MEMORY.holds(tensor)) is not None), None)
        if card is None:
            return
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors((result,)):
            if tensor.device.type == "cpu" and tensor.untyped_storage()._cdata not in known:
                MEMORY.add(tensor, card)


def _size_of(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that a factory function is about to allocate, found with a tensor that has no memory."""
    try:
        like = func(*args, **{**kwargs, "device": "meta"})
        return int(like.numel() * like.element_size())
    except (RuntimeError, TypeError, NotImplementedError):
        return 0  # counted when it is there


def _tensors(things: Any) -> Iterator[torch.Tensor]:
    for thing in things.values() if isinstance(things, dict) else things:
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, (list, tuple, dict)):
            yield from _tensors(thing)


class Stream:
    """A stream that runs everything at once."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.priority = REAL_DEVICE("cuda", card_of(device) or 0), priority

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _DeviceType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], int) and not isinstance(args[0], bool):
            return REAL_DEVICE("cuda", args[0])  # PyTorch for the CPU refuses a bare number
        return REAL_DEVICE(*args, **kwargs)

    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, REAL_DEVICE)


class Device(metaclass=_DeviceType):
    """torch.device, with bare numbers as cards."""


def _index(device: Any = None) -> int:
    return card_of(device) or 0


def _on_every_thread() -> None:
    """A mode holds for one thread; let those that begin from here on have it too."""
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def bootstrap(thread: threading.Thread) -> None:
        with PretendCards():
            begin(thread)

    threading.Thread._bootstrap_inner = bootstrap  # type: ignore[attr-defined]


def install() -> None:
    """From here on this thread, and those begun later, see the pretended cards. Once for a process."""
    cuda = torch.cuda
    if getattr(cuda, "pretended", False):
        return
    properties = types.SimpleNamespace(
        name="Pretended card", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=VRAM_BYTES,
        multi_processor_count=1, warp_size=32,
        shared_memory_per_block=49152, max_threads_per_multi_processor=1536, L2_cache_size=1 << 20, gcnArchName="",
        is_integrated=False,
    )  # fmt: skip
    each = [types.SimpleNamespace(**vars(properties), uuid=f"pretended-{index}") for index in range(CARDS)]
    nothing = contextlib.nullcontext

    def runtime() -> Any:
        return types.SimpleNamespace(cudaHostRegister=lambda *a: 0, cudaHostUnregister=lambda *a: 0)

    replaced = {
        "is_available": lambda: True, "device_count": lambda: CARDS, "current_device": lambda: 0, "init": lambda: None,
        "is_initialized": lambda: True, "get_device_properties": lambda d=None: each[_index(d)],
        "get_device_name": lambda d=None: properties.name, "get_device_capability": lambda d=None: CAPABILITY,
        "mem_get_info": lambda d=None: (VRAM_BYTES - MEMORY.reserved[_index(d)], VRAM_BYTES),
        "memory_allocated": lambda d=None: MEMORY.used[_index(d)],
        "memory_reserved": lambda d=None: MEMORY.reserved[_index(d)],
        "max_memory_allocated": lambda d=None: MEMORY.most[_index(d)],
        "reset_peak_memory_stats": lambda d=None: MEMORY.most.__setitem__(_index(d), MEMORY.used[_index(d)]),
        "empty_cache": MEMORY.give_back, "synchronize": lambda d=None: None, "set_device": lambda d: None,
        "set_stream": lambda s: None, "current_stream": lambda d=None: Stream(d),
        "default_stream": lambda d=None: Stream(d), "Stream": Stream, "Event": Event, "stream": lambda s: nothing(),
        "device": lambda d: nothing(), "cudart": runtime,
        "is_bf16_supported": lambda *a, **k: True, "ipc_collect": lambda: None, "get_arch_list": lambda: ["sm_89"],
        "pretended": True,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch._C._cuda_clearCublasWorkspaces = MEMORY.clear_workspaces
    torch.device = Device  # type: ignore[misc, assignment]
    PretendCards().__enter__()
    _on_every_thread()
