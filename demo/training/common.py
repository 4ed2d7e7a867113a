"""The part of the training that all demo models share: tokenizer, optimisers, schedule and the loop for text models.

Steps and seeds are fixed. One thread gives the same weights again on the same processor and versions.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .samples import Sample

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<think>", "</think>"]
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
IGNORED = -100
WARM_UP = 40


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen2's, each digit by itself, padded to a multiple of 32 for Q8_0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator([*texts, *["system\n", "user\n", "assistant\n"] * 50], trainer)
    while tokenizer.get_vocab_size() % 32:
        tokenizer.add_special_tokens([f"<|extra_{tokenizer.get_vocab_size()}|>"])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE)


def corpus(make: Callable[[random.Random], Sample], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    samples = [make(rng) for _ in range(count)]
    return [text for sample in samples for text in (sample.question, sample.answer)]


def prompt(question: str) -> str:
    """The ChatML prompt of a single turn without a system message: what the app sends."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def pad_batch(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens, and labels that are set on the answers only."""
    length = max(len(p) + len(a) for p, a in pairs)
    tokens = torch.zeros(len(pairs), length, dtype=torch.long)
    labels = torch.full((len(pairs), length), IGNORED)
    for row, (p, a) in enumerate(pairs):
        tokens[row, :len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p):len(p) + len(a)] = torch.tensor(a)
    return tokens, labels


class Muon(torch.optim.Optimizer):
    """Muon in float32: torch's own works in bfloat16, which crawls on processors without bfloat16 instructions."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(tuple(sorted(param.shape)), []).append(param)
            for params in by_shape.values():
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.nn.Parameter]) -> None:
        """One orthogonalised update of all the matrices of one shape together."""
        updates = []
        for param in params:
            mean = self.state[param].setdefault("mean", torch.zeros_like(param))
            assert param.grad is not None
            mean.lerp_(param.grad, 1 - group["momentum"])
            update = param.grad.lerp(mean, group["momentum"])
            updates.append(update if update.shape[0] <= update.shape[1] else update.T)
        x = torch.stack(updates)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            square = x @ x.transpose(1, 2)
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
        for param, update in zip(params, x, strict=True):
            param.mul_(1 - group["lr"] * group["decay"])
            turned = update.T if param.shape[0] > param.shape[1] else update
            param.add_(turned, alpha=-group["lr"] * 0.2 * max(param.shape) ** 0.5)


class Schedule:
    """Muon for the matrices, AdamW for the rest; warm-up, constant to half, then linear to zero."""

    def __init__(self, model: torch.nn.Module, steps: int, muon: float, adam: float,
                 extra: list[torch.nn.Parameter] | None = None) -> None:
        matrices: list[torch.nn.Parameter] = []
        others = list(extra or [])
        for name, param in model.named_parameters():
            matrix = param.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if matrix else others).append(param)
        self.params = matrices + others
        self.optimisers = [Muon(matrices, muon), torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0)]
        self.base = [muon, adam]
        self.steps = steps

    def update(self, step: int, loss: torch.Tensor) -> None:
        done = step / self.steps
        factor = min(1.0, (step + 1) / WARM_UP) * (1.0 if done < 0.5 else max(0.0, (1 - done) / 0.5))
        for optimiser, rate in zip(self.optimisers, self.base, strict=True):
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()


def answer_loss(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy on the answer tokens only."""
    target = labels[:, 1:]
    chosen = target != IGNORED
    return functional.cross_entropy(head(hidden[:, :-1][chosen]), target[chosen])


def text_batches(tokenizer: PreTrainedTokenizerFast, make: Callable[[random.Random], Sample], tokens: int,
                 rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches of about `tokens` tokens; samples of similar length go together."""
    while True:
        pool = []
        for _ in range(256):
            sample = make(rng)
            pool.append((encode(tokenizer, prompt(sample.question)), encode(tokenizer, sample.answer + "<|im_end|>\n")))
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if groups[-1] and (len(pair[0]) + len(pair[1])) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            yield pad_batch(group)


def text_model(vocabulary: int, eos: int, layers: int) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, rms_norm_eps=1e-6,
        bos_token_id=0, eos_token_id=eos, pad_token_id=0, use_sliding_window=False, initializer_range=0.04))


class Report:
    """Prints the smoothed loss now and then, and writes result.json at the end."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name, self.loss, self.cpu = out, name, 0.0, time.process_time()

    def add(self, step: int, loss: float) -> None:
        self.loss = loss if step == 0 else 0.97 * self.loss + 0.03 * loss
        if (step + 1) % 100 == 0:
            print(f"{self.name} {step + 1} loss {self.loss:.4f} cpu {time.process_time() - self.cpu:.0f}", flush=True)

    def finish(self, model: Any, tokenizer: PreTrainedTokenizerFast, **numbers: Any) -> None:
        model.eval().save_pretrained(self.out)
        tokenizer.save_pretrained(self.out)
        (self.out / "result.json").write_text(json.dumps(
            {"name": self.name, "loss": round(self.loss, 5), "cpu_seconds": round(time.process_time() - self.cpu),
             "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
             **numbers}, indent=1))


def train_text(name: str, make: Callable[[random.Random], Sample], out: Path, *, steps: int, vocabulary: int,
               batch_tokens: int, seed: int = 1, layers: int = 4, samples: int = 6000, rate: float = 2e-3,
               start: Path | None = None) -> None:
    """Train one text model from nothing, or go on from the checkpoint `start`; saves a Hugging Face directory."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    report = Report(out, name)
    if start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen2ForCausalLM.from_pretrained(start).train()
    else:
        tokenizer = train_tokenizer(corpus(make, samples, seed), vocabulary)
        model = text_model(len(tokenizer), SPECIAL.index("<|im_end|>"), layers).train()
    schedule = Schedule(model, steps, rate, 2 * rate)
    batches = text_batches(tokenizer, make, batch_tokens, random.Random(seed))
    for step in range(steps):
        tokens, labels = next(batches)
        loss = answer_loss(model.lm_head, model.model(input_ids=tokens).last_hidden_state, labels)
        schedule.update(step, loss)
        report.add(step, loss.item())
    report.finish(model, tokenizer, steps=steps, seed=seed, vocabulary=len(tokenizer))
