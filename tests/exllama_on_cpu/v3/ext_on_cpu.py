"""Stands in for ExLlamaV3's compiled extension, in plain PyTorch on the CPU, for tests without a card.

sitecustomize.py hands this out as exllamav3_ext. Formats and results follow the
extension's sources; speed, rounding and order of operations do not, and a seed gives
other random numbers than on a card. EXL3 weights are decoded when they are first used,
with the mul1 codebook only, which is what the converter writes. Hybrid models run without
speculation. Mixtures of experts, tensor parallel and conversion are left out: they raise
NotImplementedError. Importing this installs pretend_cuda.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pretend_cuda import install

install()
# What this library asks of a card beyond what pretend_cuda.py knows: to keep a budget. It is not kept.
torch.cuda.set_per_process_memory_fraction = lambda fraction, device=None: None

FUSED_SAMPLER_MAX_BLOCKS, FUSED_SAMPLER_HIST_STRIDE = 128, 2 * 1024 * 12 + 64
GPTJ, NEOX = 1, 2
PAGE_TOKENS, GROUP = 256, 32


def __getattr__(name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the stand-in for ExLlamaV3's extension has no {name}")

    if name.startswith("__"):
        raise AttributeError(name)
    return missing


# Files ----------------------------------------------------------------------------------------


def stloader_open_file(name: str) -> list[int]:
    return [os.open(name, os.O_RDONLY)]


def stloader_close_file(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


def stloader_read(handles: list[int], offset: int, size: int, target: torch.Tensor) -> None:
    assert target.nbytes == size
    _write(target.data_ptr(), _pread(handles, offset, size))


def stloader_deferred_batch(handles: list[list[int]], loads: torch.Tensor, max_chunk: int) -> None:
    """One row for each tensor: file, offset, bytes, destination, its bytes, flags, card."""
    for file, offset, size, destination, room, flags, _card in loads.tolist():
        data = _pread(handles[file], offset, size)
        if flags & 3:
            kind = torch.bfloat16 if flags & 1 else torch.float32
            half = torch.frombuffer(bytearray(data), dtype=kind).to(torch.float16)
            data = half.numpy().tobytes()
        assert len(data) <= room, "destination too small"
        _write(destination, data)


def _pread(handles: list[int], offset: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.pread(handles[0], size - len(data), offset + len(data))
        if not piece:
            raise RuntimeError("the file ends too early")
        data += piece
    return bytes(data)


def _write(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def cuda_memcpy_async(destination: int, source: int, size: int, kind: int) -> None:
    ctypes.memmove(destination, source, size)


# Layers -----------------------------------------------------------------------------------------


class BC_LinearFP16:
    """A handle for CUDA graphs, which are not made here."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        pass


def hgemm(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    c.copy_(a.float() @ b.float())


hgemm_recon = hgemm


class BC_LinearEXL3:
    """One EXL3 matrix. The files' bytes arrive after it is made, so it is decoded at its first product."""

    def __init__(
        self, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, bits: float, bias: torch.Tensor | None,
        mcg: bool, mul1: bool, scratch: torch.Tensor,
    ) -> None:  # fmt: skip
        self.parts, self.bias = (trellis, bits, mcg, mul1), bias
        self.suh, self.svh = suh, svh
        self.weight: torch.Tensor | None = None

    def run_alloc(self, x: torch.Tensor, outputs: int, single: bool) -> torch.Tensor:
        y = torch.empty((*x.shape[:-1], outputs), dtype=torch.float if single else torch.half, device=x.device)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self.weight is None:
                self.weight = decode_exl3(*self.parts)
            turned = turn_128(x.float() * self.suh.float()).half()
            result = turn_128(turned.float() @ self.weight) * self.svh.float()
            y.copy_(result if self.bias is None else result + self.bias.float())
        return y


class BC_GatedMLP:
    """The gated layer for few tokens, from the three matrices' own handles."""

    def __init__(self, *parts: Any) -> None:
        self.silu, self.gate, self.up, self.down = parts[10], *parts[13:16]
        if parts[4] is not None or not self.silu or parts[16]:
            raise NotImplementedError("the stand-in for ExLlamaV3's extension has separate matrices and SiLU only")

    def run_bszN(self, x: torch.Tensor, out: torch.Tensor) -> None:
        width = self.up.svh.shape[0]
        gate, up = self.gate.run_alloc(x, width, True), self.up.run_alloc(x, width, True)
        with torch._C.DisableTorchFunction():
            inner = (torch.nn.functional.silu(gate) * up).half()
        out.copy_(self.down.run_alloc(inner, out.shape[-1], True))


@functools.cache
def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def turn_128(rows: torch.Tensor) -> torch.Tensor:
    """Each 128 values of a row through a Hadamard matrix of length 1."""
    return (rows.view(*rows.shape[:-1], -1, 128) @ _sylvester(128)).view(rows.shape)


def decode_exl3(trellis: torch.Tensor, bits: float, mcg: bool, mul1: bool) -> torch.Tensor:
    """The matrix in its turned form, shape (inputs, outputs), from tiles of 16 by 16 weights.

    Each weight is read from 16 bits of its tile's ring of bits, and the next weight's begin `bits` later. The codebook
    multiplies them and adds up the product's bytes, which gives nearly a normal distribution.
    """
    if mcg or not mul1 or bits != int(bits):
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has whole bits and the mul1 codebook only")
    high, wide, length = trellis.shape[0], trellis.shape[1], 256 * int(bits)
    halves = trellis.numpy().view(np.uint16).reshape(high, wide, -1, 2)
    words = (halves[..., 0].astype(np.uint32) | halves[..., 1].astype(np.uint32) << 16).astype(">u4")
    ring = np.unpackbits(words.view(np.uint8), axis=-1)
    first = np.arange(256) * int(bits) + int(bits) - 16
    taken = ring[..., (first[:, None] + np.arange(16)) % length]
    codes = (taken.astype(np.uint32) << np.arange(15, -1, -1, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    product = (codes.astype(np.uint64) * 0x83DCD12D).astype(np.uint32)
    total = sum((product >> shift) & 255 for shift in (0, 8, 16, 24)).astype(np.float32) + 1024
    scale, shift = (np.frombuffer(np.uint16(n).tobytes(), np.float16).astype(np.float32) for n in (0x1EEE, 0xC931))
    values = (total * scale + shift).astype(np.float16).astype(np.float32)
    tiles = np.empty((high, wide, 256), np.float32)
    tiles[..., _places()] = values
    return torch.from_numpy(tiles.reshape(high, wide, 16, 16).swapaxes(1, 2).reshape(high * 16, wide * 16).copy())


@functools.cache
def _places() -> Any:
    """Where in a tile, row by row, the weights stand that lie one after the other in the ring: by tensor core lanes."""
    lane, number = np.divmod(np.arange(256), 8)
    row = lane % 4 * 2 + number % 2 + (number // 2 % 2) * 8
    return row * 16 + lane // 4 + (number // 4) * 8


def had_r_128(x: torch.Tensor, out: torch.Tensor, before: Any, after: Any, scale: float) -> None:
    values = turn_128(x.float() if before is None else x.float() * before.float()) * scale
    out.copy_(values if after is None else values * after.float())


def reconstruct(out: torch.Tensor, trellis: torch.Tensor, bits: float, mcg: bool, mul1: bool) -> None:
    out.copy_(decode_exl3(trellis, bits, mcg, mul1))


def reconstruct_slice(out: torch.Tensor, trellis: torch.Tensor, bits: float, mcg: bool, mul1: bool, first: int) -> None:
    out.copy_(decode_exl3(trellis, bits, mcg, mul1)[:, first : first + out.shape[1]])


def reconstruct_had_slice(
    out: torch.Tensor, trellis: torch.Tensor, suh: torch.Tensor, svh: torch.Tensor, bits: float, mcg: bool, mul1: bool,
    first: int,
) -> None:  # fmt: skip
    """The matrix as it was before it was turned."""
    weight = decode_exl3(trellis, bits, mcg, mul1)[:, first : first + out.shape[1]].contiguous()
    weight = turn_128(weight.T.contiguous()).T * suh.float()[:, None]
    out.copy_(turn_128(weight.contiguous()) * svh.float()[None, : out.shape[1]])


def silu_mul(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, limit: float) -> None:
    _gated(torch.nn.functional.silu, x, y, z, limit)


def gelu_mul(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, limit: float) -> None:
    _gated(functools.partial(torch.nn.functional.gelu, approximate="tanh"), x, y, z, limit)


def _gated(act: Callable[[torch.Tensor], torch.Tensor], x: Any, y: Any, z: Any, limit: float) -> None:
    if limit:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has no limit for activations")
    z.copy_(act(x.float()) * y.float())


def rms_norm(
    x: torch.Tensor, w: torch.Tensor | None, y: torch.Tensor, epsilon: float, bias: float, scale: float,
    span_heads: bool = False, add: bool = False, groups: int = 1,
) -> None:  # fmt: skip
    if span_heads:
        x, y = x.flatten(-2), y.flatten(-2)
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * scale
    if w is not None:
        weight = w.float().view(groups, -1) + bias
        values = values * weight.repeat(values.shape[0] // groups, 1) if groups > 1 else values * weight[0]
    y.copy_(values + y.float() if add else values)


def rms_norm_res_in(
    x: torch.Tensor, w: torch.Tensor | None, y: torch.Tensor, r: torch.Tensor, epsilon: float, bias: float, scale: float
) -> None:
    r.add_(x)
    rms_norm(r, w, y, epsilon, bias, scale)


def rope(
    q: torch.Tensor, out_q: torch.Tensor, k: Any, out_k: Any, inv_freq: torch.Tensor, position: int, positions: Any,
    position_ids: Any, style: int, factor: float, q_norm: Any, k_norm: Any, norm_eps: float, norm_bias: float,
    llama_4_beta: float, llama_4_original: int, rotate_dims: int, rotate_offset: int,
) -> None:  # fmt: skip
    """inv_freq: frequencies of shape (half,), or finished angles of shape ([batch,] positions, half)."""
    if llama_4_beta or rotate_dims != 1:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has one rotation and no Llama 4 scaling")
    batch, length = q.shape[:2]
    at = torch.arange(length)[None, :] + position
    if positions is not None:
        at = torch.arange(length)[None, :] + positions.long()[:, None]
    elif position_ids is not None:
        at = position_ids.long().view(batch, length)
    at = at.expand(batch, length)
    if inv_freq.dim() == 1:
        angles = at[..., None].float() * inv_freq.float()
    else:
        table = inv_freq if inv_freq.dim() == 3 else inv_freq[None]
        angles = torch.stack([table[row, at[row]] for row in range(batch)])
    sin, cos = (angles.sin() * factor)[:, :, None], (angles.cos() * factor)[:, :, None]
    for source, out, norm in ((q, out_q, q_norm), (k, out_k, k_norm)):
        if source is not None:
            heads = source.float()
            if norm is not None:
                heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm_eps)
                heads = (heads.half() * (norm + norm_bias).to(norm.dtype)).float()
            out.copy_(_rotated(heads, sin, cos, style, rotate_offset))


def _rotated(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, style: int, offset: int) -> torch.Tensor:
    half = sin.shape[-1]
    x = x.clone()
    part = x[..., offset : offset + 2 * half]
    if style == NEOX:
        first, second = part[..., :half].clone(), part[..., half:].clone()
        part[..., :half], part[..., half:] = first * cos - second * sin, second * cos + first * sin
    else:
        assert style == GPTJ
        first, second = part[..., 0::2].clone(), part[..., 1::2].clone()
        part[..., 0::2], part[..., 1::2] = first * cos - second * sin, second * cos + first * sin
    return x


def gen_mrope_pos_ids(
    out: torch.Tensor, ids: torch.Tensor, merge: int, spans: list[tuple[int, int]], grids: list[tuple[int, int, int]]
) -> int:
    """Positions in time, height and width: a picture's tokens count along its grid, text along one line."""
    base = following = 0
    for place in range(out.shape[1]):
        token = int(ids[place]) if place < ids.shape[0] else -1
        for (begin, end), (times, high, wide) in zip(spans, grids, strict=True):
            if begin <= token < end:
                rows, columns, number = high // merge, wide // merge, token - begin
                here = (number // columns // rows % times, number // columns % rows, number % columns)
                out[:, place] = torch.tensor([base + part for part in here])
                following = max(following, *(base + part + 1 for part in here))
                break
        else:
            base = following
            out[:, place] = base
            base += 1
            following = base
    return following


# Hybrid models ------------------------------------------------------------------------------------


class BC_GatedRMSNorm:
    """A handle for CUDA graphs, which are not made here."""

    def __init__(self, *parts: Any) -> None:
        pass


def gated_rms_norm(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, epsilon: float, bias: float, groups: int,
    gate_first: bool, sigmoid: int,
) -> None:  # fmt: skip
    if groups != 1 or gate_first or sigmoid:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has the gated norm of Qwen only")
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * (w.float() + bias)
    y.copy_(values * torch.nn.functional.silu(gate.float()).view(values.shape))


def deinterleave_qg(both: torch.Tensor, q: torch.Tensor, gate: torch.Tensor, width: int) -> None:
    """Each head's query and gate lie behind one another."""
    parts = both.reshape(*q.shape[:2], -1, 2 * width)
    q.copy_(parts[..., :width])
    gate.copy_(parts[..., width:].reshape(gate.shape))


def mul_sigmoid_(x: torch.Tensor, gate: torch.Tensor) -> None:
    x.copy_(x.float() * torch.sigmoid(gate.float()).view(x.shape))


def gated_delta_net_fused_op_2(
    b: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor, a_log: torch.Tensor, beta: torch.Tensor, g: torch.Tensor,
    beta_scale: float,
) -> None:  # fmt: skip
    beta.copy_(torch.sigmoid(b.float()) * beta_scale)
    g.copy_(-torch.nn.functional.softplus(a.float() + dt_bias.float()) * a_log.float().exp())


def cuda_causal_conv1d_update(
    x: torch.Tensor, state: torch.Tensor, slots: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, activation: bool, history: bool, incremental: bool,
) -> None:  # fmt: skip
    """x has shape (batch, channels, tokens), out (batch, tokens, channels); the state keeps the last inputs."""
    if history or incremental or not activation:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has no convolution with a history")
    size = weight.shape[-1]
    for row in range(x.shape[0]):
        slot = row if slots is None else int(slots[row])
        both = torch.cat([state[slot, :, :size].float(), x[row].float()], dim=-1)
        state[slot, :, :size] = both[:, -size:]
        filters = weight.float().unsqueeze(1)
        given = None if bias is None else bias.float()
        done = torch.nn.functional.conv1d(both[None], filters, given, groups=x.shape[1])[0, :, -x.shape[-1] :]
        out[row] = torch.nn.functional.silu(done).T


def cuda_recurrent_gated_delta_rule(
    mixed: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor, out: torch.Tensor, k_heads: int,
    v_heads: int, k_width: int, v_width: int, slots: torch.Tensor | None, history: bool, slots_in: Any,
) -> None:  # fmt: skip
    if history or slots_in is not None:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension has no delta rule with a history")
    q, k, v = mixed.split([k_heads * k_width, k_heads * k_width, v_heads * v_width], dim=-1)
    batch, tokens = mixed.shape[:2]
    for row in range(batch):
        slot = row if slots is None else int(slots[row])
        shape = (tokens, k_heads, k_width)
        done, after = delta_rule(
            q[row].reshape(shape), k[row].reshape(shape), v[row].reshape(tokens, v_heads, v_width), g[row], beta[row],
            state[slot, 0],
        )  # fmt: skip
        out[row], state[slot, 0] = done, after


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule token by token, queries and keys made to length 1; returns outputs and the last state."""
    group = v.shape[1] // k.shape[1]
    q, k = (t.float() * torch.rsqrt(t.float().square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = q.repeat_interleave(group, 1) * q.shape[-1] ** -0.5, k.repeat_interleave(group, 1)
    held, out = state.float().clone(), torch.empty(v.shape)
    v, beta, decay = v.float(), beta.float()[..., None], g.float().exp()[..., None, None]
    for token in range(v.shape[0]):
        held *= decay[token]
        known = torch.bmm(k[token][:, None], held)[:, 0]
        held += k[token][:, :, None] * ((v[token] - known) * beta[token])[:, None]
        out[token] = torch.bmm(q[token][:, None], held)[:, 0]
    return out, held


# Caches -------------------------------------------------------------------------------------------


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_rows(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, values) as words (n, values / 32 * bits) and scales (n, values / 32): rotated, scaled, in bit planes."""
    turned = rows.float().view(-1, GROUP) @ _sylvester(GROUP)
    scales = turned.abs().amax(-1, keepdim=True) + 1e-10
    middle = 1 << (bits - 1)
    numbers = (turned / scales * middle + middle).floor().clamp(0, (1 << bits) - 1).to(torch.int64).numpy()
    words, left = [], bits
    for width in _planes(bits):
        left -= width
        field = ((numbers >> left) & ((1 << width) - 1)).reshape(-1, width, GROUP // width)
        shifts = np.arange(GROUP // width) * width
        words.append((field << shifts).sum(-1))
    packed = np.concatenate(words, 1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(packed).view(rows.shape[0], -1), scales.half().view(rows.shape[0], -1)


def unpack_rows(words: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """What pack_rows has packed, in half precision."""
    count = words.shape[0]
    packed = words.reshape(-1, bits).numpy().view(np.uint32).astype(np.int64)
    numbers, begin = np.zeros((packed.shape[0], GROUP), np.int64), 0
    for width in _planes(bits):
        plane = packed[:, begin : begin + width, None]
        field = (plane >> (np.arange(GROUP // width) * width)) & ((1 << width) - 1)
        numbers = (numbers << width) | field.reshape(-1, GROUP)
        begin += width
    values = (2 * torch.from_numpy(numbers).float() + 1) / (1 << bits) - 1
    turned = values * scales.float().reshape(-1, 1)
    return (turned @ _sylvester(GROUP)).half().view(count, -1)


def quant_cache_paged(
    k: torch.Tensor, k_out: torch.Tensor, k_scales: torch.Tensor, v: torch.Tensor, v_out: torch.Tensor,
    v_scales: torch.Tensor, seqlens: torch.Tensor, table: torch.Tensor, page_tokens: int, length: int, compand: float,
    contiguous: bool,
) -> None:  # fmt: skip
    if compand or not contiguous:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension packs new rows only, without companding")
    for row in range(table.shape[0]):
        at = torch.arange(length) + int(seqlens[row])
        page, offset = table[row].long()[at // page_tokens], at % page_tokens
        for source, words, scales in ((k, k_out, k_scales), (v, v_out, v_scales)):
            bits = words.shape[-1] // scales.shape[-1]
            words[page, offset], scales[page, offset] = pack_rows(source[row].reshape(length, -1), bits)


def paged_kv_cache_update(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor,
    seqlens: torch.Tensor,
) -> None:  # fmt: skip
    for row in range(table.shape[0]):
        at = torch.arange(k.shape[1]) + int(seqlens[row])
        page, offset = table[row].long()[at // PAGE_TOKENS], at % PAGE_TOKENS
        k_cache[page, offset], v_cache[page, offset] = k[row], v[row]


def cache_rotate(cache: torch.Tensor, order: torch.Tensor, spare: torch.Tensor) -> None:
    for target, source in order.view(-1, 2).tolist():
        (cache[target] if target >= 0 else spare).copy_(cache[source] if source >= 0 else spare)


# Generator ----------------------------------------------------------------------------------------


def generator_stage_decode(
    arena: torch.Tensor, width: int, tables: list[torch.Tensor], places: list[int], rope_offsets: list[int],
    batch_ids: torch.Tensor | None, ids: list[torch.Tensor], pages: list[torch.Tensor], page_places: list[int],
) -> None:  # fmt: skip
    """Tables of pages, lengths and positions behind one another, and each row's next token."""
    rows = len(tables)
    index = arena[: rows * width].view(rows, width)
    index.zero_()
    for row, table in enumerate(tables):
        count = min(table.numel(), width)
        index[row, :count] = table.view(-1)[:count]
        arena[rows * width + row] = places[row]
        if rope_offsets:
            arena[rows * width + rows + row] = places[row] + rope_offsets[row]
        if ids:
            assert batch_ids is not None
            token = ids[row].view(-1)[places[row]]
            batch_ids[row, 0] = token
            pages[row].view(-1)[page_places[row]] = token


def partial_strings_match(match: Any, offsets: Any, strings: Any) -> int:
    """Place of the earliest string; -2 when one may begin before it at the end; -1 for nothing."""
    text = bytes(match).decode("utf-32-le", "surrogatepass")
    places = np.frombuffer(bytes(offsets), np.uint32)
    full = partial = len(text) + 1
    for begin, end in itertools.pairwise(places):
        wanted = bytes(strings)[begin:end].decode("utf-32-le", "surrogatepass")
        for start in range(min(len(text), full, partial)):
            tail = text[start : start + len(wanted)]
            if tail == wanted:
                full = start
                break
            if start + len(tail) == len(text) and wanted.startswith(tail):
                partial = start
                break
    if partial < full:
        return -2
    return full if full <= len(text) else -1


def count_match_tensor(a: torch.Tensor, b: torch.Tensor, max_a: int) -> int:
    size = min(max_a, b.shape[1], a.numel())
    different = (a.view(-1)[:size] != b.view(-1)[:size]).nonzero()
    return int(different[0]) if len(different) else size


class BC_SAM:
    """Finds where the longest end of a text stood before; by trying, not with an automaton."""

    def accept_tensor(self, tokens: torch.Tensor) -> tuple[int, int]:
        ids = tokens.view(-1).tolist()
        best = (0, 0)
        for end in range(1, len(ids)):
            size = 0
            while size < end and ids[end - 1 - size] == ids[-1 - size]:
                size += 1
            if size > best[1] - best[0]:
                best = (end - size, end)
        return best


# Sampling -----------------------------------------------------------------------------------------


def _noise(shape: torch.Size, random: int) -> torch.Tensor:
    """Gumbel noise; the same number gives the same noise."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(random), dtype=torch.float64)
    return -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-12)))


def fused_sampler(
    logits: torch.Tensor, mask: Any, mask_bits: Any, sample: torch.Tensor, workspace: torch.Tensor, size: int,
    inverse_temperature: float, minp_log: float, random: int, mode: int, filters: int, top_k: int, top_p: float,
    inverse_filter_temperature: float, histogram: Any,
) -> None:  # fmt: skip
    """Modes: greedy, sample, sample with min_p, sample with top_k, top_p and min_p."""
    values = logits[:, :size].double().clone()
    if mask is not None:
        values += mask[:, :size].double()
    if mask_bits is not None:
        values.masked_fill_(~_bits(mask_bits, size), -torch.inf)
    if mode >= 2:
        for row in values:
            _narrow(row, mode, minp_log, filters, top_k, top_p, inverse_filter_temperature)
    if mode > 0:
        values = values * inverse_temperature + _noise(values.shape, random)
    sample[:, 0] = values.argmax(-1)


def _narrow(
    row: torch.Tensor, mode: int, minp_log: float, filters: int, top_k: int, top_p: float, inverse_temperature: float
) -> None:
    """Set to -inf, in place, what the filters leave out."""
    if mode == 2 or filters & 4:
        row[row < row.max() + minp_log] = -torch.inf
    if mode == 3 and filters & 1 and top_k < row.numel():
        row[row < row.topk(top_k).values[-1]] = -torch.inf
    if mode == 3 and filters & 2:
        ordered, places = row.sort(descending=True, stable=True)
        mass = torch.softmax(ordered * inverse_temperature, -1).cumsum(-1)
        row[places[1:][mass[:-1] >= top_p]] = -torch.inf


def _bits(words: torch.Tensor, size: int) -> torch.Tensor:
    bits = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(bits[:, :size].astype(bool))


def apply_logit_bitmask(logits: torch.Tensor, out: torch.Tensor, words: torch.Tensor) -> None:
    out.fill_(-torch.inf)
    size = min(logits.shape[-1], words.shape[-1] * 32)
    out[:, :size] = logits[:, :size].masked_fill(~_bits(words, size), -torch.inf)


def apply_rep_pens(
    logits: torch.Tensor, out: torch.Tensor, past: torch.Tensor, penalty: float, sustain: int, decay: int
) -> None:
    values = logits.float()
    least, _ = _seen(past, values.shape[-1], sustain, decay)
    punished = torch.where(values > 0, values / penalty, values * penalty)
    out.copy_(torch.where(least > 0, values * (1 - least) + punished * least, values))


def apply_pres_freq_pens(
    logits: torch.Tensor, out: torch.Tensor, past: torch.Tensor, presence: float, frequency: float, sustain: int,
    decay: int,
) -> None:  # fmt: skip
    most, total = _seen(past, logits.shape[-1], sustain, decay)
    out.copy_(logits.float() - total * frequency - most * presence)


def _seen(past: torch.Tensor, size: int, sustain: int, decay: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token: the greatest factor with which it stands in the text, and the sum of them."""
    if decay or sustain < past.shape[-1]:
        raise NotImplementedError("the stand-in for ExLlamaV3's extension penalizes the whole text only")
    count = torch.bincount(past.view(-1)[past.view(-1) < size], minlength=size).float()
    return (count > 0).float(), count


def _uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels have no memory of their own, so what their stand-ins make on the way does not count as the card's."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            return function(*args)

    return call


# Also the functions here that call one another then find the wrapped ones, which changes nothing.
for _name, _function in list(globals().items()):
    own = getattr(_function, "__module__", "") == __name__ and not isinstance(_function, type)
    if own and not _name.startswith("_"):
        globals()[_name] = _uncounted(_function)
BC_SAM.accept_tensor = _uncounted(BC_SAM.accept_tensor)  # type: ignore[method-assign]
