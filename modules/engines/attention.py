"""Attention for ExLlamaV2 where flash-attn is not installed, over PyTorch's own fused kernels.

ExLlamaV2 0.3.2's fallback (attn.py, `_attn_torch`, since 0.2.9) masks nothing while
a prompt is read: every token attends to those after it, so answers are wrong. This
is the function that takes its place. Its result was compared with a plain causal
reference: prefill, prefill after a past, decode, sliding windows, grouped heads,
and the windows of a vision tower. selftest.py checks on the card that no logit
depends on later tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

# PyTorch's flash kernel begins here. Older cards compute grouped heads with the whole table of scores in single
# precision: 10 GB for a chunk of 2,048 tokens with 40 heads behind 32,768 others.
FLASH_CAPABILITY = (8, 0)
SCORES_BYTES = 128 << 20  # what scores may take there
SCORES_COPIES = 3  # the scores, with the mask, and as probabilities


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None,
    causal: bool = True, window: int = 0, scores_bytes: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot product attention; the queries are the last positions of the keys.

    q has shape (batch, queries, heads, head_dim), k and v (batch, keys, kv_heads,
    head_dim), where heads is a multiple of kv_heads; the result has the shape of q.
    mask is added to the scores and replaces the causal rule; window > 0 lets a query
    see that many positions at most, its own included. scores_bytes > 0 bounds the
    memory of the scores where a kernel keeps them.
    """
    if scores_bytes and mask is None and q.shape[1] == 1:
        return _grouped(q, k, v, scale, window)
    if scores_bytes:
        return _in_blocks(q, k, v, mask, scale=scale, causal=causal, window=window, scores_bytes=scores_bytes)
    queries, heads = q.shape[1], q.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias: Any = mask
    if mask is None and causal:
        if window and k.shape[2] > window:
            kept = min(k.shape[2], window + queries - 1)  # the first query's window is the earliest that is needed
            k, v = k[:, :, -kept:], v[:, :, -kept:]
            bias = _band(queries, kept, window, q.device) if queries > 1 else None
        elif queries > 1:
            bias = causal_lower_right(queries, k.shape[2])  # no mask in memory, and the flash kernel can be used
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=heads != k.shape[1])
    return out.transpose(1, 2)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """One query a sequence: the heads that share a key take the place of queries, so that no key is copied for them."""
    batch, _, heads, dim = q.shape
    shared = q.reshape(batch, k.shape[2], -1, dim).transpose(1, 2)
    if window:
        k, v = k[:, -window:], v[:, -window:]
    out = attend(shared, k, v, scale=scale, causal=False)
    return out.transpose(1, 2).reshape(batch, 1, heads, dim)


def _in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, *, scale: float, causal: bool,
    window: int, scores_bytes: int,
) -> torch.Tensor:  # fmt: skip
    """The heads of one key after the other, and as many queries at once as the memory for scores allows."""
    batch, queries, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    rows = max(1, scores_bytes // (SCORES_COPIES * 4 * batch * group * keys))
    out = torch.empty_like(q)
    for head in range(k.shape[2]):
        taken = slice(head * group, (head + 1) * group)
        for begin in range(0, queries, rows):
            end = min(begin + rows, queries)
            seen = keys - (queries - end) if causal and mask is None else keys
            part = mask
            if part is not None and part.shape[-2] > 1:
                part = part[..., begin:end, :]
            if part is not None and part.dim() > 2 and part.shape[-3] > 1:
                part = part[..., taken, :, :]
            one = [t[:, :seen, head : head + 1].expand(-1, -1, group, -1) for t in (k, v)]
            out[:, begin:end, taken] = attend(
                q[:, begin:end, taken], *one, scale=scale, mask=part, causal=causal, window=window
            )
    return out


def bound_of_scores(device: torch.device) -> int:
    """scores_bytes for a device: 0 where a kernel that keeps no scores can be used."""
    flash = device.type != "cuda" or torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
    return 0 if flash else SCORES_BYTES


def _band(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """True where a query may look: not ahead, and at most `window` positions back."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    return (key <= position) & (key > position - window)


def correct(attention: Any) -> None:
    """Put `attend` into ExLlamaV2Attention.

    Models with capped scores (Gemma 2) keep the stock eager path, which is causal.
    """
    if getattr(attention, "corrected", False):
        return
    stock = attention._attn_torch

    def _attn_torch(self: Any, batch: int, queries: int, *given: Any) -> Any:
        q, k, v, params, config, *more = given
        causal = more[0] if more else True
        if config.attn_logit_softcapping:
            return stock(self, batch, queries, *given)
        mask, window = None, 0
        if self.layer_idx in params.block_diag_layers:  # the windows of Qwen2.5-VL's vision tower
            mask = params.get_block_diag_mask(q.device)
        elif causal and not params.is_causal():
            mask = params.get_attn_mask(q.device)
        else:
            window = int(self.sliding_window or 0)
        bound = bound_of_scores(q.device)
        out = attend(q, k, v, scale=self.scaling, mask=mask, causal=causal, window=window, scores_bytes=bound)
        return out.reshape(batch, queries, -1)

    attention._attn_torch = _attn_torch
    attention.corrected = True


def correct_merger(tower: Any, norm: Any) -> None:
    """Give Qwen2.5-VL's patch merger the RMS norm of the original model; ExLlamaV2 0.3.2 builds a layer norm there.

    norm is ExLlamaV2RMSNorm. Call it before the tower is loaded. Source:
    Qwen2_5_VLPatchMerger.ln_q in transformers.
    """
    if tower.config.vision_model_type != "qwen2.5":
        return
    merger = tower.modules[-1]
    old = merger.pre_layernorm
    new = norm(tower, old.key, archparams=old.archparams)
    merger.pre_layernorm = new
    merger.submodules = [new if module is old else module for module in merger.submodules]
