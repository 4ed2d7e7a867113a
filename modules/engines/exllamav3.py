"""ExLlamaV3: EXL3 and FP16 models on NVIDIA cards, several answers at once.

Knows ExLlamaV3 1.6.5, the successor of ExLlamaV2: paged attention of its own, caches of
2 to 8 bits, hybrid models with a recurrent state. It reads neither EXL2 nor GPTQ. Its
loader streams through page-locked buffers by itself, so fastload.py is not used here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exllamav3 import (
    Cache,
    CacheLayer_fp16,
    CacheLayer_quant,
    Config,
    Generator,
    Job,
    LLGuidanceFilter,
    Model,
    Tokenizer,
)
from exllamav3.architecture.architectures import get_architectures
from exllamav3.generator.sampler import ComboSampler
from PIL import Image

from modules.engines.base import Progress
from modules.engines.checkpoint import Rules
from modules.engines.exllama import Answer, ExLlamaEngine, pages_up
from modules.engines.selftest import TOKENS, Report, close_enough
from modules.engines.tiny import write_tiny
from modules.errors import InvalidRequest, LoadError
from modules.messages import Constraint, Loading, Sampling

# Bits of keys and values. Q6 is what it is in ExLlamaV2: 8-bit keys, 4-bit values.
CACHE_BITS = {"Q8": (8, 8), "Q6": (8, 4), "Q4": (4, 4)}
NGRAM_TOKENS = 3  # the shortest repetition from which the n-gram speculation continues
WARM_UP_TOKENS = 8


def _rules() -> Rules:
    names = frozenset(get_architectures())
    return Rules(
        "ExLlamaV3", names, frozenset({"exl3", "fp16"}), vision=names, mends=False,
        instead="EXL2 and GPTQ models need ExLlamaV2; choose another variant on the Models page.",
    )  # fmt: skip


class ExLlamaV3Engine(ExLlamaEngine):
    """The Engine of base.py over ExLlamaV3."""

    rules = _rules()

    def __init__(self) -> None:
        super().__init__()
        self._model: Any = None
        self._tower: Any = None
        self._cache: Any = None
        self._tokenizer: Any = None
        self._draft_model: Any = None
        self._draft_cache: Any = None
        self._generator: Any = None
        self._warmed: set[Any] = set()

    def version(self) -> str:
        return importlib.metadata.version("exllamav3")

    # Loading -----------------------------------------------------------------------------

    def _open(self, folder: Path, progress: Progress) -> None:
        assert self._checkpoint is not None and self._spec is not None
        if not torch.cuda.is_available():
            raise LoadError("No NVIDIA card was found.", hint="`python app.py doctor` says what the driver reports.")
        options, total = self._options, self._checkpoint.size_bytes
        if options.loras:
            raise LoadError("LoRA adapters are for ExLlamaV2.", hint="Leave out loras.")
        config = Config.from_directory(str(folder))
        sees = self._checkpoint.vision and "vision" in config.model_classes
        self._checkpoint = dataclasses.replace(self._checkpoint, vision=sees)
        if sees and (options.draft_model or options.draft):
            raise LoadError("Speculation cannot be used with a model that sees.", hint="Leave out draft.")
        with _measured(progress, total):
            if sees:
                self._tower = Model.from_config(config, component="vision")
                self._tower.load(device="cuda:0", progressbar=False)
            self._model = Model.from_config(config)
            self._cache = self._make_cache(self._model)
            self._load(self._model)
            if options.draft_model:
                self._load_draft(Path(options.draft_model))
        progress(Loading("warming", total, total))
        self._tokenizer = Tokenizer.from_config(config)
        self._generator = self._make_generator()
        if self._spec not in self._warmed:
            self._warm_up()
            self._warmed.add(self._spec)

    def _load(self, model: Any) -> None:
        """On one card, over the cards that were chosen, or over all of them."""
        assert self._spec is not None
        split = self._options.split_gb()
        common = {
            "progressbar": False, "max_chunk_size": self._options.chunk, "max_batch_size": self._spec.parallel,
        }  # fmt: skip
        if self._options.tensor_parallel:
            model.load(tensor_p=True, use_per_device=split, **common)
        elif split or self._options.gpu_split == "auto":
            model.load(use_per_device=split, **common)
        else:
            model.load(device="cuda:0", **common)

    def _load_draft(self, folder: Path) -> None:
        config = Config.from_directory(str(folder))
        self._draft_model = Model.from_config(config)
        self._draft_cache = self._make_cache(self._draft_model)
        self._load(self._draft_model)

    def _make_cache(self, model: Any) -> Any:
        assert self._spec is not None
        tokens = pages_up(self._options.cache) if self._options.cache else self._context * self._spec.parallel
        # A recurrent state for each answer that can run at once: the library's default of 16 takes gigabytes.
        common = {
            "max_num_tokens": max(tokens, self._context), "max_batch_size": self._spec.parallel,
            "max_history": self._extra_tokens(),
        }  # fmt: skip
        if self._spec.cache_mode == "FP16":
            return Cache(model, layer_type=CacheLayer_fp16, **common)
        keys, values = CACHE_BITS[self._spec.cache_mode]
        return Cache(model, layer_type=CacheLayer_quant, k_bits=keys, v_bits=values, **common)

    def _make_generator(self) -> Any:
        assert self._spec is not None
        guess = self._options.draft_tokens if self._extra_tokens() else None
        return Generator(
            model=self._model, cache=self._cache, tokenizer=self._tokenizer, max_batch_size=self._spec.parallel,
            max_chunk_size=self._options.chunk, draft_model=self._draft_model, draft_cache=self._draft_cache,
            num_draft_tokens=guess, ngram_match_min=NGRAM_TOKENS if self._options.draft == "ngram" else 0,
        )  # fmt: skip

    def _warm_up(self) -> None:
        """A long prompt and a few tokens.

        Memory that is too small shows now, and kernels that are compiled at their first use are compiled.
        """
        ids = torch.full((1, min(self._options.chunk, self._context - 64)), 5, dtype=torch.long)
        job = Job(input_ids=ids, max_new_tokens=WARM_UP_TOKENS, sampler=sampler(Sampling(temperature=0.0)))
        self._generator.enqueue(job)
        while self._generator.num_remaining_jobs():
            for result in self._generator.iterate():
                if result["stage"] == "error":
                    raise result["error"]

    def _extra_tokens(self) -> int:
        return self._options.draft_tokens if self._options.draft_model or self._options.draft else 0

    def _close(self) -> None:
        if self._generator is not None:
            self._generator.clear_queue()
            self._generator.close()
        self._generator = None
        for model in (self._draft_model, self._tower, self._model):
            if model is not None:
                with contextlib.suppress(AttributeError, TypeError):  # one whose load failed half way
                    model.unload()
        self._model = self._tower = self._cache = self._tokenizer = self._draft_model = self._draft_cache = None
        gc.collect()

    # Answers -----------------------------------------------------------------------------

    def _encode(self, text: str, pictures: list[Any]) -> Any:
        return self._tokenizer.encode(text, add_bos=False, encode_special_tokens=True, embeddings=pictures)

    def _count(self, text: str) -> int:
        return int(self._tokenizer.encode(text, add_bos=False, encode_special_tokens=False).shape[-1]) if text else 0

    def _embed(self, path: str) -> tuple[Any, int]:
        with Image.open(path) as opened:
            picture = capped(opened.convert("RGB"), self._options.max_pixels)
        embedding = self._tower.get_image_embeddings(
            tokenizer=self._tokenizer, image=picture, text_alias=f"<|picture-{os.urandom(8).hex()}|>"
        )
        held = [t for t in (embedding.embeddings, *(embedding.deepstack_embeddings or ())) if t is not None]
        return embedding, sum(t.element_size() * t.numel() for t in held)

    def _make_job(self, answer: Answer, ids: Any, pictures: list[Any], max_new_tokens: int) -> Any:
        request = answer.request
        assert self._checkpoint is not None
        if request.constraint is not None and request.sampling.stop:
            raise InvalidRequest("An answer that is held to a form cannot have stop texts as well.")
        return Job(
            input_ids=ids, max_new_tokens=max_new_tokens, identifier=request.id, sampler=sampler(request.sampling),
            seed=request.sampling.seed, stop_conditions=self._stop_conditions(request),
            decode_special_tokens=False, filters=[self._filter(request.constraint)] if request.constraint else None,
            embeddings=pictures,
        )  # fmt: skip

    def _filter(self, constraint: Constraint) -> Any:
        from modules.engines.exllama import grammar

        try:
            return LLGuidanceFilter(self._tokenizer, eos_after_completed=True, llg_grammar=grammar(constraint))
        except ValueError as error:
            raise InvalidRequest(f"The {constraint.kind} cannot be used: {str(error)[:300]}") from None

    def _enqueue(self, job: Any) -> None:
        self._generator.enqueue(job)

    def _iterate(self) -> Iterable[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def _cancel_job(self, job: Any) -> None:
        self._generator.cancel(job)

    def _reset(self) -> None:
        with contextlib.suppress(Exception):  # it failed already; what matters is the new one
            self._generator.clear_queue()
            self._generator.close()
        self._generator = None
        gc.collect()
        self._generator = self._make_generator()

    def _is_out_of_memory(self, error: BaseException) -> bool:
        words = str(error)
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "Insufficient VRAM" in words

    def _device_bytes(self) -> int:
        if not torch.cuda.is_available():
            return 0
        return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))

    def _free(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def sampler(sampling: Sampling) -> Any:
    """The library's sampler for our settings; what is not given changes nothing."""
    return ComboSampler(
        rep_p=sampling.repetition_penalty, freq_p=sampling.frequency_penalty, pres_p=sampling.presence_penalty,
        temperature=max(0.0, sampling.temperature), min_p=sampling.min_p, top_k=sampling.top_k, top_p=sampling.top_p,
    )  # fmt: skip


def capped(picture: Image.Image, max_pixels: int) -> Image.Image:
    """The picture, made smaller where it has more than max_pixels; its proportions stay."""
    width, height = picture.size
    if width * height <= max_pixels:
        return picture
    scale = (max_pixels / (width * height)) ** 0.5
    return picture.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)


@contextlib.contextmanager
def _measured(progress: Progress, total: int) -> Iterator[None]:
    """Report the bytes that have arrived on the cards while the block runs: on one card the library tells nothing."""

    def allocated() -> int:
        return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))

    begin, ended, best = allocated(), threading.Event(), 0

    def watch() -> None:
        nonlocal best
        while not ended.wait(0.05):
            now = min(total, max(best, allocated() - begin))
            if now > best:
                best = now
                progress(Loading("reading", best, total))

    progress(Loading("reading", 0, total))
    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    began = time.monotonic()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    print(f"loaded: weights and cache {time.monotonic() - began:.3f} s", flush=True)


# Self-test ---------------------------------------------------------------------------------


def self_test(report: Report, place: Path) -> None:
    """The checks of selftest.py for this library, on a tiny model below `place`."""
    folder = write_tiny(place / "fp16")
    with torch.inference_mode():
        report.check("fp16: logits do not depend on later tokens", partial(_causal, folder))
        report.check("fp16: at once as one by one", partial(_at_once, folder))


def _logits(folder: Path, parts: list[Any]) -> Any:
    """Logits of the last position of each part, shape (parts, vocabulary), of a text that is read in these parts."""
    model = Model.from_config(Config.from_directory(str(folder)))
    cache = Cache(model, max_num_tokens=512)
    try:
        model.load(device="cuda:0", progressbar=False)
        found, past = [], 0
        for part in parts:
            params = {
                "attn_mode": "flash_attn", "cache": cache, "past_len": past, "batch_shape": (1, 512),
                "last_tokens_only": 1,
            }  # fmt: skip
            found.append(model.forward(part, params)[0, -1].float().cpu())
            past += part.shape[-1]
        return torch.stack(found)
    finally:
        model.unload()
        del cache, model
        gc.collect()


def _text() -> Any:
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _causal(folder: Path) -> str:
    """All logits of the first half, with two different second halves after it."""
    text, half = _text(), TOKENS // 2
    model = Model.from_config(Config.from_directory(str(folder)))
    try:
        model.load(device="cuda:0", progressbar=False)
        other = torch.cat([text[:, :half], text[:, half:].flip(1)], dim=1)
        first, second = (
            model.forward(ids, {"attn_mode": "flash_attn_nc"})[0, :half].float().cpu() for ids in (text, other)
        )
        return close_enough(first, second, "with other tokens after them")
    finally:
        model.unload()
        del model
        gc.collect()


def _at_once(folder: Path) -> str:
    text = _text()
    whole = _logits(folder, [text])
    parts = _logits(folder, [text[:, :40], text[:, 40:60], *(text[:, n : n + 1] for n in range(60, TOKENS))])
    return close_enough(parts[-1:], whole, "read in parts")
