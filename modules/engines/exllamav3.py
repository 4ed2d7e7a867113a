"""ExLlamaV3: EXL3 and FP16 models on NVIDIA cards, several answers at once.

Knows ExLlamaV3 1.6.5, the successor of ExLlamaV2: paged attention of its own, caches of
2 to 8 bits, hybrid models with a recurrent state. It reads neither EXL2 nor GPTQ. Its
loader streams through page-locked buffers by itself, so fastload.py is not used here.
What of the library this rests on, file by file: docs/exllamav3.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
from exllamav3.cache import recurrent_util
from exllamav3.generator.sampler import ComboSampler
from exllamav3.modules import attn as library_attention
from exllamav3.modules.attention_fn import triton_paged
from exllamav3.util.tensor import g_tensor_cache
from PIL import Image

from modules.engines.base import Progress
from modules.engines.checkpoint import Rules
from modules.engines.exllama import Answer, ExLlamaEngine, clear_workspaces, grammar, pages_up, widened
from modules.engines.selftest import TOKENS, Report, close_enough, nothing_left
from modules.engines.tiny import VOCAB, write_safetensors, write_tiny
from modules.errors import InvalidRequest, LoadError
from modules.messages import Constraint, Loading, Sampling

# Bits of keys and values. Q6 is what it is in ExLlamaV2: 8-bit keys, 4-bit values.
CACHE_BITS = {"Q8": (8, 8), "Q6": (8, 4), "Q4": (4, 4)}
NGRAM_TOKENS = 3  # the shortest repetition from which the n-gram speculation continues
WARM_UP_TOKENS = 8
LEAST_AGREEMENT = 0.5  # of the likeliest tokens with a quantized cache; random weights are the hardest case
MUL1 = 0x83DCD12D  # marks the codebook that the converter uses


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
        gc.freeze()  # what is imported never becomes garbage, and the collections of each swap would walk through it

    def version(self) -> str:
        return importlib.metadata.version("exllamav3")

    # Loading -----------------------------------------------------------------------------

    def _open(self, folder: Path, progress: Progress) -> None:
        assert self._checkpoint is not None and self._spec is not None
        if not torch.cuda.is_available():
            raise LoadError("No NVIDIA card was found.", hint="`python app.py doctor` says what the driver reports.")
        options, total, read = self._options, self._checkpoint.size_bytes, self._checkpoint
        if options.loras:
            raise LoadError("LoRA adapters are for ExLlamaV2.", hint="Leave out loras.")
        config = Config.from_directory(str(folder))
        sees = self._checkpoint.vision and "vision" in config.model_classes
        self._checkpoint = dataclasses.replace(self._checkpoint, vision=sees)
        if sees and (options.draft_model or options.draft):
            raise LoadError("Speculation cannot be used with a model that sees.", hint="Leave out draft.")
        with _measured(progress, total) as tell:
            _before_each_module(config, tell)
            if sees:
                self._tower = Model.from_config(config, component="vision")
                self._tower.load(device="cuda:0", progressbar=False)
            self._model = Model.from_config(config)
            self._cache = self._make_cache(self._model)
            self._load(self._model)
            if self._draft_folder is not None:
                self._load_draft(self._draft_folder)
        progress(Loading("warming", total, total))
        self._tokenizer = self._tokenizer_of(read, lambda: Tokenizer.from_config(config))
        self._generator = self._make_generator()
        if self._spec not in self._warmed:
            self._warm_up()
            self._warmed.add(self._spec)

    def _load(self, model: Any) -> None:
        """On one card, over the cards that were chosen, or over all of them."""
        assert self._spec is not None
        split = self._options.split_gb()
        # Loading over several cards tries a chunk in the cache, so it has to fit there.
        chunk = min(self._options.chunk, self._cache.max_num_tokens)
        common = {"progressbar": False, "max_chunk_size": chunk, "max_batch_size": self._spec.parallel}
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
        return new_cache(
            model, self._spec.cache_mode, max(tokens, self._context), max_batch_size=self._spec.parallel,
            max_history=self._draft_tokens(),
        )  # fmt: skip

    def _make_generator(self) -> Any:
        assert self._spec is not None
        guess = self._draft_tokens() or None
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

    def _draft_tokens(self) -> int:
        return self._options.draft_tokens if self._options.draft_model or self._options.draft else 0

    def _extra_tokens(self) -> int:
        return 1 + self._draft_tokens()  # the generator asks for a place behind the last token and the guesses

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
        release_leftovers()

    # Answers -----------------------------------------------------------------------------

    def _encode(self, text: str, pictures: list[Any]) -> Any:
        return self._tokenizer.encode(text, add_bos=False, encode_special_tokens=True, embeddings=pictures)

    def _count(self, text: str) -> int:
        return int(self._tokenizer.encode(text, add_bos=False, encode_special_tokens=False).shape[-1]) if text else 0

    def _embed(self, path: str) -> tuple[Any, int]:
        with Image.open(path) as opened:
            picture = capped(widened(opened.convert("RGB"), self._max_pixels()), self._options.max_pixels)
        embedding = self._tower.get_image_embeddings(
            tokenizer=self._tokenizer, image=picture, text_alias=f"<|picture-{os.urandom(8).hex()}|>"
        )
        held = [t for t in (embedding.embeddings, *(embedding.deepstack_embeddings or ())) if t is not None]
        return embedding, sum(t.element_size() * t.numel() for t in held)

    def _max_pixels(self) -> int:
        """Pixels of a picture: the preset's limit, or the model's where that is lower."""
        assert self._checkpoint is not None
        said = self._checkpoint.preprocessor
        size = said.get("size")
        own = [said.get("max_pixels"), size.get("longest_edge") if isinstance(size, dict) else None]
        return min([self._options.max_pixels, *(pixels for pixels in own if isinstance(pixels, int) and pixels > 0)])

    def _make_job(self, answer: Answer, ids: Any, pictures: list[Any], max_new_tokens: int) -> Any:
        request = answer.request
        assert self._checkpoint is not None
        return Job(
            input_ids=ids, max_new_tokens=max_new_tokens, identifier=request.id, sampler=sampler(request.sampling),
            seed=request.sampling.seed, stop_conditions=self._stop_conditions(request),
            decode_special_tokens=False, filters=[self._filter(request.constraint)] if request.constraint else None,
            embeddings=pictures,
        )  # fmt: skip

    def _filter(self, constraint: Constraint) -> Any:
        try:
            return LLGuidanceFilter(self._tokenizer, eos_after_completed=True, llg_grammar=grammar(constraint))
        except ValueError as error:
            raise InvalidRequest(f"The {constraint.kind} cannot be used: {str(error)[:300]}") from None

    def _enqueue(self, job: Any) -> None:
        self._generator.enqueue(job)

    def _iterate(self) -> Iterable[dict[str, Any]]:
        results: list[dict[str, Any]] = self._generator.iterate()
        for result in results:
            stop = result.get("eos_triggering_string")
            if stop:
                # Where broken characters were held, the library decodes the held tokens anew, the stop text included.
                result["text"] = result.get("text", "").partition(stop)[0]
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


def new_cache(model: Any, mode: str, tokens: int, **more: int) -> Any:
    """A cache of this many tokens; it has to be made before its model is loaded, which allocates it."""
    if mode == "FP16":
        return Cache(model, max_num_tokens=tokens, layer_type=CacheLayer_fp16, **more)
    keys, values = CACHE_BITS[mode]
    return Cache(
        model, max_num_tokens=tokens, layer_type=CacheLayer_quant, k_bits=keys, v_bits=values, **more
    )  # fmt: skip


def release_leftovers() -> None:
    """Let go of what the library keeps on the cards for the life of the process. Only while no model is loaded."""
    g_tensor_cache.drop_all()
    library_attention._block_tables.clear()
    triton_paged._h32_cache.clear()
    recurrent_util._slot_tensors.clear()
    clear_workspaces()


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
def _measured(progress: Progress, total: int) -> Iterator[Callable[[], None]]:
    """Report the bytes that have arrived on the cards while the block runs: on one card the library tells nothing.

    Gives the function that reports. The thread that loads calls it too, because only there a cancel can be raised.
    """

    def allocated() -> int:
        return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))

    begin, ended, best, one = allocated(), threading.Event(), 0, threading.Lock()

    def tell() -> None:
        nonlocal best
        with one:
            best = min(total, max(best, allocated() - begin))
            progress(Loading("reading", best, total))

    def watch() -> None:
        while not ended.wait(0.05):
            if min(total, allocated() - begin) > best:
                tell()

    tell()
    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    began = time.monotonic()
    try:
        yield tell
    finally:
        ended.set()
        watcher.join()
    print(f"loaded: weights and cache {time.monotonic() - began:.3f} s", flush=True)


def _before_each_module(config: Any, work: Callable[[], None]) -> None:
    """Have `work` called on the loading thread: on one card the library has no callback."""
    begin = config.stc.begin_deferred_load

    def begin_deferred_load(*args: Any, **kwargs: Any) -> Any:
        work()
        return begin(*args, **kwargs)

    config.stc.begin_deferred_load = begin_deferred_load


# Self-test ---------------------------------------------------------------------------------


def self_test(report: Report, place: Path) -> None:
    """The checks of selftest.py for this library, on tiny models below `place`."""
    folders = {"fp16": write_tiny(place / "fp16"), "exl3": write_exl3(place / "exl3")}
    with torch.inference_mode():
        for quantization, folder in folders.items():
            report.check(f"{quantization}: logits do not depend on later tokens", partial(_causal, folder))
            report.check(f"{quantization}: at once as one by one", partial(_at_once, folder, "FP16"))
        for mode in CACHE_BITS:
            report.check(f"cache mode {mode}", partial(_at_once, folders["exl3"], mode, loose=True))
        report.check("memory", partial(nothing_left, partial(_causal, folders["exl3"])))


def write_exl3(folder: Path, *, bits: int = 4, seed: int = 1) -> Path:
    """The tiny model of tiny.py with EXL3 weights. Random bits decode to weights that are nearly normal. The folder."""
    write_tiny(folder, seed=seed)
    path, random = folder / "model.safetensors", np.random.default_rng(seed)
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    tensors: dict[str, tuple[str, Any]] = {}
    for name, entry in json.loads(raw[8:begin]).items():
        first, last = entry["data_offsets"]
        values = np.frombuffer(raw[begin + first : begin + last], np.float16).reshape(entry["shape"])
        key = name.removesuffix(".weight")
        if not key.endswith("_proj") and key != "lm_head":
            tensors[name] = ("F16", values)
            continue
        outputs, inputs = (-(-size // 128) * 128 for size in values.shape)
        tiles = random.integers(-(1 << 15), 1 << 15, (inputs // 16, outputs // 16, 16 * bits))
        tensors[f"{key}.trellis"] = ("I16", tiles)
        tensors[f"{key}.suh"] = ("F16", random.choice([-1.0, 1.0], inputs))
        tensors[f"{key}.svh"] = ("F16", random.choice([-0.05, 0.05], outputs))
        tensors[f"{key}.mul1"] = ("I32", np.array(MUL1, np.uint32).view(np.int32))
    write_safetensors(path, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl3", "version": "1.6.5", "bits": bits, "head_bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _logits(folder: Path, parts: list[Any], mode: str) -> Any:
    """Logits of every position, shape (tokens, vocabulary), of a text that is read in these parts."""
    model = Model.from_config(Config.from_directory(str(folder)))
    cache = new_cache(model, mode, 512)
    try:
        model.load(device="cuda:0", progressbar=False)
        found, past = [], 0
        for part in parts:
            params = {
                "attn_mode": "flash_attn", "cache": cache, "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
                "cache_seqlens": torch.tensor([past], dtype=torch.int32),
            }  # fmt: skip
            found.append(model.forward(part, params)[0, :, :VOCAB].float().cpu())
            past += part.shape[-1]
        return torch.cat(found)
    finally:
        model.unload()
        del cache, model
        gc.collect()
        release_leftovers()


def _text() -> Any:
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _causal(folder: Path) -> str:
    """All logits of the first half, with two different second halves after it."""
    text, half = _text(), TOKENS // 2
    other = torch.cat([text[:, :half], text[:, half:].flip(1)], dim=1)
    first, second = (_logits(folder, [ids], "FP16")[:half] for ids in (text, other))
    return close_enough(first, second, "with other tokens after them")


def _at_once(folder: Path, mode: str, loose: bool = False) -> str:
    """In one part, and in one of 40 tokens with the others singly: prefill, prefill with a past, decode."""
    text = _text()
    whole = _logits(folder, [text], "FP16")
    parts = [text[:, :40], text[:, 40:60], *(text[:, n : n + 1] for n in range(60, TOKENS))]
    stepped = _logits(folder, parts, mode)
    if not loose:
        return close_enough(stepped, whole, "read in parts")
    same = float((stepped.argmax(-1) == whole.argmax(-1)).float().mean())
    if not bool(torch.isfinite(stepped).all()) or same < LEAST_AGREEMENT:
        raise RuntimeError(f"the likeliest token is the same as with FP16 at {same:.0%} of the positions only")
    return f"the likeliest token is the same as with FP16 at {same:.0%} of the positions"
