"""Makes PyTorch for the CPU believe in NVIDIA cards whose memory is host memory, and counts their bytes.

For tests of code that names "cuda:0" everywhere. A tensor made on or moved to a card
is an ordinary CPU tensor, a copy of its own, whose bytes count as allocated until the
last reference to its storage is gone: so `torch.cuda.memory_allocated()` tells of
every reference that was kept. An allocation beyond TURNTABLE_TEST_VRAM_BYTES (for
each card; 24 GiB unless said) raises torch.OutOfMemoryError. Streams and events do
nothing: what only their order can break is not seen here.
"""

from __future__ import annotations

import contextlib
import os
import types
import weakref
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CARDS = int(os.environ.get("TURNTABLE_TEST_CARDS", "1"))
VRAM = int(os.environ.get("TURNTABLE_TEST_VRAM_BYTES", str(24 << 30)))


class Memory:
    """The bytes of the pretended cards, by the address of each storage."""

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[int, int]] = {}  # address -> (card, bytes)
        self.used = [0] * CARDS
        self.most = [0] * CARDS

    def holds(self, tensor: torch.Tensor) -> int | None:
        found = self.sizes.get(tensor.untyped_storage().data_ptr())
        return None if found is None else found[0]

    def check(self, card: int, size: int) -> None:
        if self.used[card] + size > VRAM:
            used = self.used[card] >> 20
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size >> 20} MiB beside {used} MiB")

    def add(self, tensor: torch.Tensor, card: int) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self.sizes or not size:
            return
        self.check(card, size)
        self.sizes[address] = (card, size)
        self.used[card] += size
        self.most[card] = max(self.most[card], self.used[card])
        # PyTorch keeps the Python object of a storage as long as the storage itself, so this tells of its true end.
        weakref.finalize(storage, self.drop, address)

    def drop(self, address: int) -> None:
        card, size = self.sizes.pop(address, (0, 0))
        self.used[card] -= size


MEMORY = Memory()


def card_of(device: Any) -> int | None:
    """The number of the card that a device argument names; None for the CPU and for no device."""
    if isinstance(device, bool) or device is None:
        return None
    if isinstance(device, int):
        return device
    text = str(device)
    return int(text.partition(":")[2] or 0) if text.startswith("cuda") else None


class PretendCards(TorchFunctionMode):
    """Sends what names a card to the CPU, and counts it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if name in ("to", "cuda"):
            return self._move(func, name, args, kwargs)
        if name == "cpu" and MEMORY.holds(args[0]) is not None:
            return args[0].clone()
        if name in ("pin_memory", "record_stream"):
            return args[0]
        card = card_of(kwargs.get("device"))
        if card is not None:
            kwargs["device"] = "cpu"
            size = _size_of(func, args, kwargs)
            MEMORY.check(card, size)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            if card is None:
                card = next((c for a in _tensors(args) if (c := MEMORY.holds(a)) is not None), None)
            if card is not None and MEMORY.holds(result) is None:
                MEMORY.add(result, card)
        return result

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        kwargs.pop("non_blocking", None)
        given = kwargs.pop("device", None)
        if name == "cuda":
            given = rest.pop(0) if rest else (given if given is not None else 0)
        else:
            for place, value in enumerate(rest):
                if isinstance(value, (str, REAL_DEVICE, int)) and not isinstance(value, bool):
                    given = rest.pop(place)
                    break
        held = MEMORY.holds(tensor)
        converted = tensor if not rest and not kwargs else torch.Tensor.to(tensor, *rest, **kwargs)
        card = card_of(given)
        if given is None:
            card = held
        if card is None:  # to the CPU
            return converted.clone() if held is not None and converted is tensor else converted
        if converted.device.type == "meta" or (held == card and converted is tensor):
            return converted
        MEMORY.check(card, converted.numel() * converted.element_size())
        moved = converted if converted is not tensor and MEMORY.holds(converted) is None else converted.clone()
        MEMORY.add(moved, card)
        return moved


def _size_of(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that a factory function is about to allocate, found with a tensor that has no memory."""
    try:
        like = func(*args, **{**kwargs, "device": "meta"})
        return int(like.numel() * like.element_size())
    except (RuntimeError, TypeError, NotImplementedError):
        return 0


def _tensors(args: Any) -> list[torch.Tensor]:
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [a for a in arg if isinstance(a, torch.Tensor)]
    return found


class Stream:
    """A stream that runs everything at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

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


REAL_DEVICE = torch.device


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


def install() -> None:
    """From here on this thread sees the pretended cards. Once for a process, on the thread that drives the engine."""
    cuda = torch.cuda
    if getattr(cuda, "pretended", False):
        return
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        import coverage  # this environment has none of its start-up hooks

        coverage.process_startup()
    properties = types.SimpleNamespace(
        name="Pretended card", major=8, minor=9, total_memory=VRAM, multi_processor_count=1, warp_size=32,
        shared_memory_per_block=49152, max_threads_per_multi_processor=1536, L2_cache_size=1 << 20, gcnArchName="",
    )  # fmt: skip
    nothing = contextlib.nullcontext

    def runtime() -> Any:
        return types.SimpleNamespace(cudaHostRegister=lambda *a: 0, cudaHostUnregister=lambda *a: 0)

    replaced = {
        "is_available": lambda: True, "device_count": lambda: CARDS, "current_device": lambda: 0, "init": lambda: None,
        "is_initialized": lambda: True, "get_device_properties": lambda d=None: properties,
        "get_device_name": lambda d=None: properties.name, "get_device_capability": lambda d=None: (8, 9),
        "mem_get_info": lambda d=None: (VRAM - MEMORY.used[_index(d)], VRAM),
        "memory_allocated": lambda d=None: MEMORY.used[_index(d)],
        "memory_reserved": lambda d=None: MEMORY.used[_index(d)],
        "max_memory_allocated": lambda d=None: MEMORY.most[_index(d)],
        "reset_peak_memory_stats": lambda d=None: MEMORY.most.__setitem__(_index(d), MEMORY.used[_index(d)]),
        "empty_cache": lambda: None, "synchronize": lambda d=None: None, "set_device": lambda d: None,
        "set_stream": lambda s: None, "current_stream": lambda d=None: Stream(),
        "default_stream": lambda d=None: Stream(), "Stream": Stream, "Event": Event, "stream": lambda s: nothing(),
        "device": lambda d: nothing(), "cudart": runtime,
        "is_bf16_supported": lambda *a, **k: True, "ipc_collect": lambda: None, "get_arch_list": lambda: ["sm_89"],
        "pretended": True,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.device = Device  # type: ignore[misc, assignment]
    PretendCards().__enter__()
