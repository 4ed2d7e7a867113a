"""The vision demo model: a small Qwen2.5-VL that is trained from nothing on drawn shapes.

Two linear probes, used in training only, ask for colour, form and place at every image token: one on the
output of the vision tower, one in the middle of the language part, where places become known.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from . import vision as data
from .common import SPECIAL, Report, Schedule, answer_loss, encode, pad_batch, train_tokenizer

WIDTH = 128
IMAGE = SPECIAL.index("<|image_pad|>")
CLASSES = [1 + len(data.COLOURS), 1 + len(data.FORMS), 1 + len(data.PLACES)]
QUESTIONS = 2


def vision_prompt(question: str, gap: str) -> str:
    """As the engine builds it; the app may or may not put a line feed after the image."""
    image = "<|vision_start|>" + "<|image_pad|>" * data.TOKENS + "<|vision_end|>"
    return f"<|im_start|>user\n{image}{gap}{question}<|im_end|>\n<|im_start|>assistant\n"


def build(vocabulary: int, layers: int, depth: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {"vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": SPECIAL.index("<|im_end|>"),
            "pad_token_id": 0, "initializer_range": 0.04}
    # llama.cpp swaps two tensors when the inner size equals the hidden size, so they differ here.
    tower = {"depth": depth, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": 14,
             "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": WIDTH,
             "fullatt_block_indexes": [1, 3], "initializer_range": 0.04}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"), vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        tie_word_embeddings=True))


def positions(start: int, length: int) -> torch.Tensor:
    """Time, row and column of every token, as Qwen2.5-VL counts them."""
    places = torch.zeros(3, length, dtype=torch.long)
    places[:, :start] = torch.arange(start)
    token = torch.arange(data.TOKENS)
    end = start + data.TOKENS
    places[0, start:end], places[1, start:end], places[2, start:end] = start, start + token // 4, start + token % 4
    places[:, end:] = start + 4 + torch.arange(length - end)
    return places


def probe_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of the three cross entropies (colour, form, place)."""
    parts = torch.split(scores, CLASSES, dim=-1)
    losses = [functional.cross_entropy(p.flatten(0, -2), labels[..., i].flatten()) for i, p in enumerate(parts)]
    return torch.stack(losses).sum()


class Step:
    """Computes the loss of one fresh batch."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int,
                 images: int, weights: list[int]) -> None:
        self.model, self.tokenizer, self.images, self.weights = model, tokenizer, images, weights
        self.rng = random.Random(seed)
        self.probes = torch.nn.ModuleList([torch.nn.Linear(WIDTH, sum(CLASSES)) for _ in range(2)])

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        pictures, labels, pairs = [], [], []
        for _ in range(self.images):
            shapes, image = data.training_scene(self.rng)
            pictures.append(data.pixels(image))
            labels.append(data.token_labels(shapes))
            for _ in range(QUESTIONS):
                sample = data.ask(self.rng, shapes, self.weights)
                text = vision_prompt(sample.question, self.rng.choice(["", "\n"]))
                pairs.append((encode(self.tokenizer, text), encode(self.tokenizer, sample.answer + "<|im_end|>\n")))
        return (torch.tensor(np.concatenate(pictures)), torch.tensor(np.stack(labels)), *pad_batch(pairs))

    def loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer loss, and the sum with both probes."""
        pictures, labels, tokens, targets = self.batch()
        grid = torch.tensor([[1, 8, 8]]).repeat(self.images, 1)
        seen = self.model.model.visual(pictures, grid_thw=grid)
        seen = getattr(seen, "pooler_output", seen).reshape(self.images, data.TOKENS, WIDTH)
        language = self.model.model.language_model
        start = tokens[0].tolist().index(IMAGE)
        end = start + data.TOKENS
        embedded = language.embed_tokens(tokens)
        embedded = torch.cat([embedded[:, :start], seen.repeat_interleave(QUESTIONS, 0), embedded[:, end:]], 1)
        where = positions(start, tokens.shape[1])[:, None].expand(3, len(tokens), -1)
        out = language(inputs_embeds=embedded, position_ids=where, use_cache=False, output_hidden_states=True)
        answer = answer_loss(self.model.lm_head, out.last_hidden_state, targets)
        middle = out.hidden_states[len(out.hidden_states) // 2][::QUESTIONS, start:end]
        probes = 0.5 * probe_loss(self.probes[0](seen), labels) + 0.5 * probe_loss(self.probes[1](middle), labels)
        return answer, answer + probes


def new_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    rng = random.Random(seed)
    texts = []
    for _ in range(4000):
        sample = data.ask(rng, data.scene(rng))
        texts += [sample.question, sample.answer]
    return train_tokenizer(texts, 704)


def train_vision(out: Path, *, steps: int, seed: int = 11, layers: int = 4, depth: int = 4, images: int = 24,
                 rate: float = 2e-3, start: Path | None = None) -> None:
    """Train from nothing, or go on from the checkpoint `start`, and save as a Hugging Face directory."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    report = Report(out, "vision")
    if start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start).train()
    else:
        tokenizer = new_tokenizer(seed)
        model = build(len(tokenizer), layers, depth).train()
    step = Step(model, tokenizer, seed, images, data.SECOND_STAGE if start else data.FIRST_STAGE)
    schedule = Schedule(model, steps, rate, 1.25 * rate, list(step.probes.parameters()))
    for number in range(steps):
        answer, total = step.loss()
        schedule.update(number, total)
        report.add(number, answer.item())
    report.finish(model, tokenizer, steps=steps, seed=seed, vocabulary=len(tokenizer))
