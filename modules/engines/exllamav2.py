"""ExLlamaV2: EXL2, GPTQ and FP16 models on NVIDIA cards.

Knows ExLlamaV2 0.3.2 and what has to be set right in it: attention without
flash-attn, the patch merger's norm, neutral sampling, every stop token, scratch
memory. Reads checkpoints through checkpoint.py and loads them through fastload.py.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

# Before the library is imported: xformers would be preferred to the corrected attention, and ignores vision windows.
os.environ.setdefault("EXLLAMA_NO_XFORMERS", "1")

import torch
from exllamav2 import (
    ExLlamaV2,
    ExLlamaV2Cache,
    ExLlamaV2Cache_Q4,
    ExLlamaV2Cache_Q6,
    ExLlamaV2Cache_Q8,
    ExLlamaV2Cache_TP,
    ExLlamaV2Config,
    ExLlamaV2Lora,
    ExLlamaV2Tokenizer,
    ExLlamaV2VisionTower,
)
from exllamav2 import attn as library_attention
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler
from exllamav2.generator.filters import ExLlamaV2Filter
from exllamav2.rmsnorm import ExLlamaV2RMSNorm
from PIL import Image

from modules.engines.attention import correct, correct_merger
from modules.engines.base import Progress
from modules.engines.checkpoint import Rules
from modules.engines.exllama import Answer, ExLlamaEngine, clear_workspaces, grammar, pages_up, widened
from modules.engines.fastload import Feeder, HostCopies, Layout, lay_out
from modules.engines.selftest import TOKENS, Report, close_enough, nothing_left
from modules.engines.tiny import write_tiny
from modules.errors import InvalidRequest, LoadError, ModelFilesUnsafe
from modules.messages import EngineSpec, Loading, Sampling

CACHES = {"FP16": ExLlamaV2Cache, "Q8": ExLlamaV2Cache_Q8, "Q6": ExLlamaV2Cache_Q6, "Q4": ExLlamaV2Cache_Q4}
# The names in architecture.py. Any other is loaded "as Llama" by the library, with a printed warning.
ARCHITECTURES = (
    "LlamaForCausalLM MistralForCausalLM MixtralForCausalLM YiForCausalLM OrionForCausalLM Qwen2ForCausalLM "
    "Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration "
    "GemmaForCausalLM Gemma2ForCausalLM Gemma3ForConditionalGeneration Starcoder2ForCausalLM GemmoeForCausalLM "
    "CohereForCausalLM Cohere2ForCausalLM DbrxForCausalLM Phi3ForCausalLM GPTBigCodeForCausalLM GPT2LMHeadModel "
    "MiniCPMForCausalLM InternLM2ForCausalLM IndexForCausalLM GraniteForCausalLM Glm4ForCausalLM "
    "LlavaForConditionalGeneration Mistral3ForConditionalGeneration"
).split()
RULES = Rules(
    "ExLlamaV2", frozenset(ARCHITECTURES), frozenset({"exl2", "gptq", "fp16"}),
    vision=frozenset({"Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"}),
    # dynamic scales only beyond max_position_embeddings, and no context is larger than that.
    ropes=frozenset({"default", "linear", "su", "longrope", "yarn", "llama3", "mrope", "dynamic"}),
    processors=frozenset({"Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"}),
    instead="EXL3 models and newer architectures need ExLlamaV3; choose another variant on the Models page.",
)  # fmt: skip
# Elements dequantized at once. The stock 512 Mi make the scratch memory as large as the output head, 1 GiB; the
# largest matrix of a 32B model has 135 Mi, so decoding is not touched. Facts 5.
MAX_DQ_ELEMENTS = 145 << 20
MAX_OUTPUT_TOKENS = 16  # positions with logits at once; prompts need one
WARM_UP_TOKENS = 32  # the matrix product's tuning looks at the first calls of each shape
LEAST_AGREEMENT = 0.5  # of the likeliest tokens with a quantized cache; random weights are the hardest case
IDLE_S = 0.5  # how long no answer may have run before memory is page-locked


class ExLlamaV2Engine(ExLlamaEngine):
    """The Engine of base.py over ExLlamaV2."""

    rules = RULES

    def __init__(self) -> None:
        super().__init__()
        correct(library_attention.ExLlamaV2Attention)
        self._model: Any = None
        self._tower: Any = None
        self._cache: Any = None
        self._tokenizer: Any = None
        self._draft_model: Any = None
        self._draft_cache: Any = None
        self._generator: Any = None
        self._loras: list[Any] = []
        self._blocks: list[Any] = []
        self._mask: Any = None
        self._feeder = Feeder()
        self._copies = HostCopies(int(os.environ.get("TURNTABLE_PINNED_BYTES", "0")))
        self._in_use: list[tuple[Any, ...]] = []
        self._warmed: set[EngineSpec] = set()
        self._busy_s = 0.0

    def version(self) -> str:
        return importlib.metadata.version("exllamav2")

    # Loading -----------------------------------------------------------------------------

    def _open(self, folder: Path, progress: Progress) -> None:
        assert self._checkpoint is not None and self._spec is not None
        if not torch.cuda.is_available():
            raise LoadError("No NVIDIA card was found.", hint="`python app.py doctor` says what the driver reports.")
        began = time.monotonic()
        options, checkpoint = self._options, self._checkpoint
        if any(name.startswith("model.language_model.") for name in checkpoint.tensors):
            raise LoadError(
                f"{checkpoint.folder.name} names its tensors in the newer way, which ExLlamaV2 cannot read.",
                hint="Take an EXL2 model, or one saved with transformers before 4.52.",
            )
        if checkpoint.vision and options.draft_model:
            raise LoadError("A draft model cannot be used with a model that sees.", hint="Leave out draft_model.")
        config = self._configure(folder)
        kind = CACHES[self._spec.cache_mode]
        total = checkpoint.size_bytes
        tell = _steady(progress, total)
        tell(0, 1)
        models = []
        if checkpoint.vision:
            config.vision_max_pixels = min(config.vision_max_pixels, options.max_pixels)
            self._tower = ExLlamaV2VisionTower(config)
            correct_merger(self._tower, ExLlamaV2RMSNorm)
            models.append(self._tower)
        self._model = ExLlamaV2(config)
        models.append(self._model)
        if options.tensor_parallel:
            self._load_parallel(kind, tell)
        elif options.gpu_split == "auto":
            self._load_autosplit(kind, tell)
        else:
            self._load_fast(models, options.split_gb(), tell)
            self._cache = kind(self._model, max_seq_len=self._cache_tokens())
        if self._draft_folder is not None:
            self._load_draft(self._draft_folder, kind)
        weights_s = time.monotonic() - began
        progress(Loading("warming", total, total))
        self._tokenizer = self._tokenizer_of(checkpoint, lambda: ExLlamaV2Tokenizer(config))
        self._load_loras()
        self._generator = self._make_generator()
        if self._spec not in self._warmed:
            # Once for each way to load it: the long prompt takes longer than a swap may.
            self._try_memory(config)
            wanted = WARM_UP_TOKENS + self._extra_tokens()
            self._generator.generate("Once upon a time,", max_new_tokens=wanted, gen_settings=neutral(Sampling()))
            self._generator.reset_page_table()
            self._warmed.add(self._spec)
        self._busy_s = time.monotonic()
        whole_s = self._busy_s - began
        rate = total / max(weights_s, 1e-6) / 1e9
        print(f"loaded: weights and cache {weights_s:.3f} s ({rate:.1f} GB/s), all {whole_s:.3f} s", flush=True)

    def at_once(self) -> int:
        return super().at_once() if self._paged() else 1

    def _cache_tokens(self) -> int:
        """Positions of the KV cache: the context of every answer that can run at once, or what the preset says."""
        whole = self._context * self.at_once()
        return max(pages_up(self._options.cache), self._context) if self._options.cache else whole

    def _paged(self) -> bool:
        return bool(library_attention.has_flash_attn_with_paged)

    def _configure(self, folder: Path) -> Any:
        config = ExLlamaV2Config(str(folder))
        config.arch_compat_overrides(quiet=True)
        config.max_seq_len = self._context  # of one answer; models with a long and a short rope choose by it
        config.max_input_len = min(self._options.chunk, self._context)
        config.max_attention_size = config.max_input_len**2
        config.max_output_len = MAX_OUTPUT_TOKENS
        config.max_dq_size = MAX_DQ_ELEMENTS
        return config

    def _load_fast(self, models: list[Any], split: list[float] | None, tell: Any) -> None:
        rest = split or [99999]
        for model in models:
            rest = model.set_device_map(rest)  # what the tower leaves is for the model
        layout = lay_out(models)
        copy = self._copies.find(layout)
        self._blocks += self._feeder.load(layout, copy, tell)
        for model in models:
            model.set_cache_map()
            model.loaded = True
        self._in_use.append(layout.key)
        if copy is None and layout.size <= self._copies.budget_bytes:
            threading.Thread(target=self._copy_to_host, args=(layout,), name="page-lock", daemon=True).start()

    def _copy_to_host(self, layout: Layout) -> None:
        """On a thread of its own: make the page-locked copy while no answer runs."""
        layout.modules.clear()  # the plan of the bytes is needed, the model is not to be kept alive
        began = time.monotonic()
        try:
            made = self._copies.make(layout, self._give_way, tuple(self._in_use))
            if made is None:
                print("no room for a page-locked copy of this model", flush=True)
            else:
                spent_s = time.monotonic() - began
                print(f"page-locked copy ready: {made.locked_bytes >> 20} MB in {spent_s:.1f} s", flush=True)
        except (OSError, MemoryError, RuntimeError) as error:
            print(f"the page-locked copy of this model failed: {error}", flush=True)

    def _give_way(self) -> None:
        while self._answers or time.monotonic() - self._busy_s < IDLE_S:
            time.sleep(0.05)

    def keep_copies(self, most_bytes: int) -> int:
        return self._copies.limit(most_bytes, tuple(self._in_use))

    def _load_parallel(self, kind: Any, tell: Any) -> None:
        config = self._model.config
        if not config.arch.lm.supports_tp or not self._paged():
            raise LoadError(
                "Tensor parallel works with flash-attn and for Llama, Mistral and Qwen2 and 3 models only.",
                hint="Take gpu_split = auto instead.",
            )
        self._model.load_tp(
            self._options.split_gb(), callback=tell, expect_cache_tokens=self._cache_tokens(), expect_cache_base=kind
        )
        self._cache = ExLlamaV2Cache_TP(self._model, max_seq_len=self._cache_tokens(), base=kind)

    def _load_autosplit(self, kind: Any, tell: Any) -> None:
        if self._tower is not None:
            self._tower.load()
        self._cache = kind(self._model, max_seq_len=self._cache_tokens(), lazy=True)
        self._model.load_autosplit(self._cache, callback=tell)

    def _load_draft(self, folder: Path, kind: Any) -> None:
        config = self._configure(folder)
        self._draft_model = ExLlamaV2(config)
        self._load_fast([self._draft_model], self._options.split_gb(), lambda done, total: None)
        self._draft_cache = kind(self._draft_model, max_seq_len=self._cache_tokens())

    def _load_loras(self) -> None:
        for name, scale in self._options.loras:
            folder = Path(name)
            if not (folder / "adapter_model.safetensors").is_file():
                raise LoadError(f"No LoRA with adapter_model.safetensors lies in {folder}.")
            if (folder / "adapter_model.bin").exists():
                raise ModelFilesUnsafe(
                    f"{folder} also holds adapter_model.bin, a pickle, which the library would open instead.",
                    hint="Delete adapter_model.bin.",
                )
            self._loras.append(ExLlamaV2Lora.from_directory(self._model, str(folder), scale))

    def _make_generator(self) -> Any:
        config = self._model.config
        generator = ExLlamaV2DynamicGenerator(
            model=self._model, cache=self._cache, tokenizer=self._tokenizer, draft_model=self._draft_model,
            draft_cache=self._draft_cache, num_draft_tokens=self._options.draft_tokens,
            use_ngram_draft=self._options.draft == "ngram", max_chunk_size=config.max_input_len, paged=self._paged(),
            max_batch_size=self.at_once(),
        )  # fmt: skip
        if self._loras:
            generator.set_loras(self._loras)
        return generator

    def _try_memory(self, config: Any) -> None:
        """One chunk of a prompt, so that memory that is too small shows now and not in somebody's answer."""
        ids = torch.zeros((1, min(config.max_input_len, self._cache.max_seq_len)), dtype=torch.long)
        self._model.forward(ids, cache=self._cache, preprocess_only=True)
        self._cache.current_seq_len = 0

    def _extra_tokens(self) -> int:
        return self._options.draft_tokens if self._options.draft_model or self._options.draft else 0

    def _close(self) -> None:
        self._generator, self._mask = None, None
        for lora in self._loras:
            lora.unload()
        for model in (self._draft_model, self._model, self._tower):
            for module in model.modules if model is not None else ():
                with contextlib.suppress(AttributeError, TypeError):  # one that was not loaded yet when the load failed
                    module.unload()
            if model is not None:
                model.modules, model.device_context = [], []
                if model.tp_context:
                    model.tp_context.unload()
        self._loras = []
        self._model = self._tower = self._cache = self._tokenizer = self._draft_model = self._draft_cache = None
        self._blocks, self._in_use = [], []
        gc.collect()
        clear_workspaces()

    # Answers -----------------------------------------------------------------------------

    def _encode(self, text: str, pictures: list[Any]) -> Any:
        return self._tokenizer.encode(text, add_bos=False, encode_special_tokens=True, embeddings=pictures)

    def _count(self, text: str) -> int:
        return int(self._tokenizer.encode(text, add_bos=False, encode_special_tokens=False).shape[-1]) if text else 0

    def _embed(self, path: str) -> tuple[Any, int]:
        with Image.open(path) as opened:
            picture = widened(opened.convert("RGB"), self._tower.config.vision_max_pixels)
        embedding = self._tower.get_image_embeddings(
            model=self._model, tokenizer=self._tokenizer, image=picture,
            text_alias=f"<|picture-{os.urandom(8).hex()}|>",
        )  # fmt: skip
        return embedding, int(embedding.get_size_in_bytes())

    def _make_job(self, answer: Answer, ids: Any, pictures: list[Any], max_new_tokens: int) -> Any:
        request = answer.request
        assert self._checkpoint is not None
        if request.constraint is not None and request.sampling.stop:
            raise InvalidRequest("An answer that is held to a form cannot have stop texts as well.")
        filters = [Constrained(self._model, self._tokenizer, grammar(request.constraint))] if request.constraint else []
        return ExLlamaV2DynamicJob(
            input_ids=ids, max_new_tokens=max_new_tokens + self._extra_tokens(), identifier=request.id,
            gen_settings=neutral(request.sampling), seed=request.sampling.seed,
            stop_conditions=self._stop_conditions(request), decode_special_tokens=False,
            filters=filters, embeddings=pictures,
        )  # fmt: skip

    def _enqueue(self, job: Any) -> None:
        self._generator.enqueue(job)

    def _iterate(self) -> Iterable[dict[str, Any]]:
        self._busy_s = time.monotonic()
        results: list[dict[str, Any]] = self._generator.iterate()
        return results

    def _cancel_job(self, job: Any) -> None:
        self._generator.cancel(job)

    def _reset(self) -> None:
        self._generator = None
        gc.collect()
        self._cache.current_seq_len = 0
        self._generator = self._make_generator()

    def _is_out_of_memory(self, error: BaseException) -> bool:
        words = str(error)
        return isinstance(error, torch.OutOfMemoryError) or any(
            part in words for part in ("out of memory", "Insufficient VRAM", "Insufficient space in device allocation")
        )

    def _device_bytes(self) -> int:
        if not torch.cuda.is_available():
            return 0
        return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))

    def _free(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def neutral(sampling: Sampling) -> Any:
    """The library's settings for ours. Its own defaults are not neutral, so every one that matters is given.

    A new object for every job: it keeps the state of the samplers that have one.
    """
    common = {
        "token_repetition_penalty": sampling.repetition_penalty, "token_repetition_range": -1,
        "token_presence_penalty": sampling.presence_penalty, "token_frequency_penalty": sampling.frequency_penalty,
    }  # fmt: skip
    if sampling.temperature <= 0:
        return ExLlamaV2Sampler.Settings.greedy(**common)
    return ExLlamaV2Sampler.Settings(
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, **common
    )


class Constrained(ExLlamaV2Filter):  # type: ignore[misc]  # the library has no types
    """Holds an answer to a grammar of llguidance: in each step only tokens that can still lead to a whole answer."""

    def __init__(self, model: Any, tokenizer: Any, written: str) -> None:
        super().__init__(model, tokenizer)
        from llguidance import LLTokenizer
        from llguidance.torch import allocate_token_bitmask

        kept = getattr(tokenizer, "turntable_ll", None)
        if kept is None:
            kept = LLTokenizer(tokenizer.tokenizer_model.hf_tokenizer.to_str(), eos_token=tokenizer.eos_token_id)
            tokenizer.turntable_ll = kept
        self._ll, self._grammar = kept, written
        self._bits = allocate_token_bitmask(1, kept.vocab_size)
        self._matcher: Any = None

    def clone(self, c: Any = None) -> Constrained:
        return Constrained(self.model, self.tokenizer, self._grammar)

    def begin(self, prefix_str: str) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(self._ll, self._grammar)
        if self._matcher.is_error():
            raise InvalidRequest(f"The form of the answer cannot be used: {self._matcher.get_error()}")

    def feed(self, token: Any) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(int(token.item()))

    def use_background_worker(self) -> bool:
        return True

    def can_mask_logits(self) -> bool:
        return True

    def prepare_logit_mask(self) -> bool:
        from llguidance.torch import fill_next_token_bitmask

        if not self._matcher.is_stopped():
            fill_next_token_bitmask(self._matcher, self._bits)
        return True

    def mask_logits(self, logits: Any) -> Any:
        """logits is one row of floats on the CPU, as wide as the padded vocabulary; what may not follow gets -inf."""
        if self._matcher.is_stopped():
            only_end = torch.full_like(logits, float("-inf"))
            only_end[self.tokenizer.eos_token_id] = 0.0
            return only_end
        words = self._bits[0].to(torch.int64)
        flags = ((words[:, None] >> torch.arange(32)) & 1).flatten()[: logits.shape[-1]].to(torch.bool)
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        allowed[: len(flags)] = flags
        return logits.masked_fill_(~allowed, float("-inf"))


def _steady(progress: Progress, total: int) -> Any:
    """The library's progress as bytes, at most fifty times a second."""
    last = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 0.02 or done >= of:
            last = now
            progress(Loading("reading", total * done // max(of, 1), total))

    return tell


# Self-test ---------------------------------------------------------------------------------


def self_test(report: Report, place: Path) -> None:
    """The checks of selftest.py for this library, on tiny models below `place`."""
    correct(library_attention.ExLlamaV2Attention)
    with torch.inference_mode():
        for quantization in ("fp16", "exl2", "gptq"):
            folder = write_tiny(place / quantization, quantization=quantization)
            report.check(f"{quantization}: logits do not depend on later tokens", partial(_causal, folder))
            report.check(f"{quantization}: at once as one by one", partial(_at_once, folder, ExLlamaV2Cache))
        for name, kind in CACHES.items():
            report.check(f"cache mode {name}", partial(_at_once, place / "exl2", kind, loose=True))
        report.check("memory", partial(nothing_left, partial(_causal, place / "exl2")))


def _logits(folder: Path, kind: Any, parts: list[Any]) -> Any:
    """Logits of every position, shape (tokens, vocabulary), of a text that is read in these parts."""
    config = ExLlamaV2Config(str(folder))
    config.max_seq_len = 512
    config.max_dq_size = MAX_DQ_ELEMENTS
    model = ExLlamaV2(config)
    cache = None
    try:
        model.load()
        cache = kind(model, max_seq_len=512)
        return torch.cat([model.forward(part, cache=cache).float().cpu()[0] for part in parts])
    finally:
        model.unload()
        del cache, model
        gc.collect()
        clear_workspaces()


def _text() -> Any:
    return torch.randint(0, 256, (1, TOKENS), generator=torch.Generator().manual_seed(3))


def _causal(folder: Path) -> str:
    text, half = _text(), TOKENS // 2
    other = torch.cat([text[:, :half], text[:, half:].flip(1)], dim=1)
    first, second = (_logits(folder, ExLlamaV2Cache, [ids])[:half] for ids in (text, other))
    return close_enough(first, second, "with other tokens after them")


def _at_once(folder: Path, kind: Any, loose: bool = False) -> str:
    """In one part, and in one of 40 tokens with the others singly: prefill, prefill with a past, decode."""
    text = _text()
    whole = _logits(folder, ExLlamaV2Cache if loose else kind, [text])
    parts = [text[:, :40], text[:, 40:60], *(text[:, n : n + 1] for n in range(60, TOKENS))]
    stepped = _logits(folder, kind, parts)
    if not loose:
        return close_enough(stepped, whole, "read in parts")
    same = float((stepped.argmax(-1) == whole.argmax(-1)).float().mean())
    if not bool(torch.isfinite(stepped).all()) or same < LEAST_AGREEMENT:
        raise RuntimeError(f"the likeliest token is the same as with FP16 at {same:.0%} of the positions only")
    return f"the likeliest token is the same as with FP16 at {same:.0%} of the positions"
