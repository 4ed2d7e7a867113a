"""The attention of ExLlamaV3's Triton kernels, in plain PyTorch on the CPU.

Takes what the library's wrappers hand to the launching functions: pages of half
precision or packed numbers, a table of pages, lengths before this pass. Knows causal
masks, windows, soft caps, sinks and packed sequences. Sums in single precision, as the
kernels do; the order of the sums is another.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from exllamav3.modules.attention_fn import triton_paged
from exllamav3_ext import unpack_rows

WITHOUT = torch._C.DisableTorchFunction  # what a kernel keeps in registers is not the card's memory


def paged_attn_triton_decode(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    if q.shape[1] > 16:
        raise ValueError("paged_attn_triton_decode supports q_len <= 16")
    return paged_attn_triton_prefill(q, *rest, **named)


def paged_attn_triton_prefill(
    q: torch.Tensor, k: Any, v: Any, k_cache: Any, v_cache: Any, block_table: Any, cache_seqlens: Any,
    causal: bool = False, softmax_scale: float | None = None, window_size: Any = None, softcap: float = 0.0,
    sinks: Any = None, out: Any = None, max_kv_len: int | None = None, staging_pages: int | None = None,
    qc: Any = None, pre_appended_len: int = 0, n_kv_heads_override: int | None = None, k_new: Any = None,
    v_new: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Attention over pages, with the new keys and values appended first; or over k_new and v_new alone."""
    _on_card(q, k, v, k_cache, v_cache, block_table, cache_seqlens, k_new, v_new)
    if qc is not None:
        triton_paged._get_h32(q.device)  # the kernels take a table that stays on the card
    result = torch.empty_like(q) if out is None else out
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with WITHOUT():
        for row in range(q.shape[0]):
            if k_cache is None:
                keys, values = k_new[row], v_new[row]
            else:
                if k is not None:
                    append(k[row], v[row], k_cache, v_cache, block_table[row], int(cache_seqlens[row]))
                    pre_appended_len = k.shape[1]
                length = int(cache_seqlens[row]) + pre_appended_len
                if max_kv_len is not None and length > max_kv_len + pre_appended_len:
                    raise ValueError(f"{length} keys, and the caller promised at most {max_kv_len + pre_appended_len}")
                keys = _gather(k_cache, block_table[row], length, qc, 0, n_kv_heads_override)
                values = _gather(v_cache, block_table[row], length, qc, 1, n_kv_heads_override)
            visible = _mask(q.shape[1], keys.shape[0], causal, window_size)
            result[row] = _attend(q[row], keys, values, visible, scale, softcap, sinks)
    return result


def varlen_attn_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, causal: bool = False,
    softmax_scale: float | None = None, window_size: Any = None, softcap: float = 0.0, sinks: Any = None,
    sink_key0: bool = False, out: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Sequences that lie behind one another, each of which sees only itself."""
    if sink_key0:
        raise NotImplementedError("the stand-in for ExLlamaV3's attention has no sink on the first key")
    single = q.ndim == 4
    if single:
        q, k, v = q.squeeze(0), k.squeeze(0), v.squeeze(0)
    _on_card(q, k, v, cu_seqlens)
    result = torch.empty_like(q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with WITHOUT():
        places = cu_seqlens.tolist()
        for begin, end in itertools.pairwise(places):
            assert end - begin <= max_seqlen
            part = slice(begin, end)
            visible = _mask(end - begin, end - begin, causal, window_size)
            result[part] = _attend(q[part], k[part], v[part], visible, scale, softcap, sinks)
    return result.unsqueeze(0) if single else result


def append(k: torch.Tensor, v: torch.Tensor, k_cache: Any, v_cache: Any, table: torch.Tensor, past: int) -> None:
    """Write new rows (tokens, heads, dim) into the pages from position `past` on."""
    page, offset = place(table, past, k.shape[0], k_cache.shape[1])
    k_cache[page, offset], v_cache[page, offset] = k, v


def place(table: torch.Tensor, past: int, count: int, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical page and place in it of the positions past to past + count."""
    at = torch.arange(past, past + count)
    if int(at[-1]) // page_tokens >= table.shape[0]:
        raise IndexError(f"position {int(at[-1])} is beyond the table of {table.shape[0]} pages")
    return table.long()[at // page_tokens], at % page_tokens


def _gather(cache: Any, table: torch.Tensor, length: int, qc: Any, which: int, heads: int | None) -> torch.Tensor:
    page, offset = place(table, 0, length, cache.shape[1])
    if qc is None:
        found: torch.Tensor = cache[page, offset]
        return found
    assert heads is not None
    rows = unpack_rows(cache[page, offset], qc[which][page, offset], qc[2 + which])
    return rows.view(length, heads, -1)


def _mask(queries: int, keys: int, causal: bool, window: Any) -> torch.Tensor:
    """True where a query sees a key; the last query stands at the last key."""
    left, right = window if isinstance(window, tuple) else (-1 if window is None else window, 0)
    apart = torch.arange(keys)[None, :] - torch.arange(keys - queries, keys)[:, None]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= apart <= 0
    if left >= 0:
        seen &= apart >= -left
        if right >= 0 and not causal:
            seen &= apart <= right
    return seen


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float, sinks: Any
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, q.shape[0], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def _on_card(*tensors: torch.Tensor | None) -> None:
    """The kernels refuse what is elsewhere, or does not lie in one piece."""
    first = tensors[0]
    assert first is not None
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cuda or tensor.device != first.device:
            raise ValueError("all tensors of an attention must be on the same CUDA device")
        if not tensor.is_contiguous():
            raise ValueError("all tensors of an attention must be contiguous")
