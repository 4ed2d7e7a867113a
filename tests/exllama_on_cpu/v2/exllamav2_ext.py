"""Stands in for ExLlamaV2's compiled extension, in plain PyTorch on the CPU, for tests without a card.

The library takes a module of this name instead of compiling its own. Formats and
results follow the extension's sources; speed, rounding and order of operations do
not. The functions that run on the CPU in the original too give the same results. Paged
caches, XTC, tensor parallel, mixtures of experts and conversion are left out: they raise
NotImplementedError. Importing this installs pretend_cuda.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ext_sampling import Candidates, next_random, penalize
from pretend_cuda import install

install()

HANDLES: dict[int, Any] = {}
NUMBERS = itertools.count(1)


def __getattr__(name: str) -> Any:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the stand-in for ExLlamaV2's extension has no {name}")

    if name.startswith("__"):
        raise AttributeError(name)
    return missing


def _keep(thing: Any) -> int:
    number = next(NUMBERS)
    HANDLES[number] = thing
    return number


def _given(tensor: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None or tensor.device.type == "meta" else tensor


# Weights ------------------------------------------------------------------------------------


class Matrix:
    """Dequantized when it is made, into memory of the host: weight has shape (inputs, outputs)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias


def dequantize_exl2(
    q_weight: torch.Tensor, q_perm: torch.Tensor | None, q_scale: torch.Tensor, q_scale_max: torch.Tensor,
    q_groups: torch.Tensor, inputs: int,
) -> torch.Tensor:  # fmt: skip
    """EXL2 as q_matrix.cu reads it; q_scale_max is already divided by 256. Returns float32."""
    words = q_weight.numpy().view(np.uint32)
    columns = words.shape[1]
    groups = q_groups.numpy().view(np.uint16).reshape(-1, 2).astype(np.int64)
    packed = q_scale.numpy().view(np.uint32)
    shifts = np.arange(8, dtype=np.uint32) * 4
    scales = ((packed[:, :, None] >> shifts) & 15).reshape(packed.shape[0], -1)[:, :columns].astype(np.float32) + 1
    scales = scales**2 * q_scale_max.float().numpy()[:, None]
    out = np.empty((inputs, columns), np.float32)
    row = 0
    for number, (bits, first) in enumerate(groups):
        last = groups[number + 1, 1] if number + 1 < len(groups) else words.shape[0]
        part = words[first:last]
        count = (last - first) * 32 // bits if number + 1 < len(groups) else inputs - row
        position = np.arange(count) * bits
        low = part[position // 32].astype(np.uint64) >> (position % 32).astype(np.uint64)[:, None]
        following = np.minimum(position // 32 + 1, len(part) - 1)
        high = part[following].astype(np.uint64) << (32 - position % 32).astype(np.uint64)[:, None]
        value = ((low | high) & np.uint64((1 << int(bits)) - 1)).astype(np.float32)
        out[row : row + count] = (value - (1 << int(bits - 1))) * scales[number]
        row += count
    if q_perm is not None:
        # Row r of the stored matrix belongs to input q_perm[r].
        natural = np.empty_like(out)
        natural[q_perm.numpy().view(np.uint16).astype(np.int64)] = out
        out = natural
    return torch.from_numpy(out)


def make_q_matrix(
    q_weight: Any, q_perm: Any, q_invperm: Any, q_scale: Any, q_scale_max: Any, q_groups: Any, q_group_map: Any,
    gptq_qzeros: Any, gptq_scales: Any, gptq_g_idx: Any, bias: Any, temp_dq: Any, max_dq_rows: int,
) -> int:  # fmt: skip
    if _given(q_scale) is not None:
        for tensor, kind in ((q_weight, torch.int32), (q_groups, torch.int16), (q_group_map, torch.int16)):
            assert tensor.dtype == kind, "TORCH_CHECK_DTYPE"
        assert _given(q_perm) is None or q_perm.dtype == q_invperm.dtype == torch.int16, "TORCH_CHECK_DTYPE"
        inputs = q_group_map.shape[0] // 2
        weight = dequantize_exl2(q_weight, _given(q_perm), q_scale, q_scale_max, q_groups, inputs)
    else:
        weight = dequantize_gptq(q_weight, gptq_qzeros, gptq_scales, _given(gptq_g_idx))
    assert temp_dq.numel() >= weight.shape[1] * min(max_dq_rows, weight.shape[0]), "Insufficient size of temp_dq buffer"
    # The kernels reorder the bits in place, so the same tensors can be used once; without this a test would not see it.
    q_weight.bitwise_not_()
    return _keep(Matrix(weight, _given(bias)))


def dequantize_gptq(qweight: Any, qzeros: Any, scales: Any, g_idx: Any) -> torch.Tensor:
    """GPTQ with 4 bits; the stored zero is one less than the zero."""
    shift = np.arange(8, dtype=np.uint32) * 4
    words = qweight.numpy().view(np.uint32)
    value = ((words[:, None, :] >> shift[None, :, None]) & 15).reshape(-1, words.shape[1]).astype(np.float32)
    zeros = ((qzeros.numpy().view(np.uint32)[:, :, None] >> shift) & 15).reshape(qzeros.shape[0], -1).astype(np.float32)
    inputs, groups = value.shape[0], zeros.shape[0]
    size = 1
    while size * groups < inputs:
        size *= 2
    index = np.arange(inputs) // size if g_idx is None else g_idx.numpy().astype(np.int64)
    return torch.from_numpy((value - (zeros[index] + 1)) * scales.float().numpy()[index])


def free_q_matrix(handle: int) -> None:
    HANDLES.pop(handle, None)


def reconstruct(handle: int, out: torch.Tensor) -> None:
    out.copy_(HANDLES[handle].weight)


def _multiply(x: torch.Tensor, handle: int) -> torch.Tensor:
    matrix = HANDLES[handle]
    out = x.float() @ matrix.weight
    return out if matrix.bias is None else out + matrix.bias.float()


def gemm_half_q_half(a: torch.Tensor, handle: int, c: torch.Tensor, force_cuda: bool) -> None:
    c.copy_(_multiply(a, handle))


def make_group_map(q_groups: torch.Tensor, num_qrows: int) -> torch.Tensor:
    groups = q_groups.tolist()
    out: list[int] = []
    for i in range(len(groups) // 2):
        last = groups[2 * i + 3] if i < len(groups) // 2 - 1 else num_qrows
        rows = (last - groups[2 * i + 1]) * 32 // groups[2 * i]
        for j in range(rows):
            out += [i, rows - j]
    return torch.tensor(out, dtype=torch.short)


def tensor_remap(tensor: torch.Tensor, index: torch.Tensor) -> None:
    tensor.copy_(tensor[:, index.long()])


def tensor_remap_4bit(tensor: torch.Tensor, index: torch.Tensor) -> None:
    words = tensor.numpy().view(np.uint32)
    shift = np.arange(8, dtype=np.uint32) * 4
    parts = ((words[:, :, None] >> shift) & 15).reshape(words.shape[0], -1)[:, index.numpy()]
    words[:] = (parts.reshape(words.shape[0], -1, 8) << shift).sum(-1, dtype=np.uint32)


def stloader_read(filename: str, offset: int, size: int, target: torch.Tensor) -> None:
    with open(filename, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if size:
        target.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


# Norms, rope, layers --------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, epsilon: float) -> None:
    y.copy_(_rms(x, weight, epsilon))


def _rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, epsilon: float) -> None:
    y.copy_(_layer(x, weight, _given(bias), epsilon))


def _layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    out = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), eps=epsilon) * weight.float()
    return out if bias is None else out + bias.float()


def head_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, epsilon: float, rms: bool
) -> None:
    y.copy_(_rms(x, weight, epsilon) if rms else _layer(x, weight, _given(bias), epsilon))


def softcap_(x: torch.Tensor, cap: float) -> None:
    x.copy_(torch.tanh(x.float() / cap) * cap)


def rope_(
    x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, past_len: int, num_heads: int, head_dim: int,
    offsets: torch.Tensor, neox: bool,
) -> None:  # fmt: skip
    """x has shape (batch, tokens, heads * head_dim) or (batch, tokens, heads, head_dim); changed in place."""
    view = x.view(x.shape[0], x.shape[1], num_heads, head_dim)
    width = sin.shape[-1]
    given = _given(offsets)
    sin, cos = sin.reshape(-1, width).float(), cos.reshape(-1, width).float()
    for batch in range(view.shape[0]):
        start = (0 if past_len == -1 else past_len) + (int(given.flatten()[batch]) if given is not None else 0)
        # Positions before the start of the text are held at 0, as the kernel does.
        place = torch.arange(start, start + view.shape[1]).clamp(min=0)
        s, c = sin[place][:, None, :], cos[place][:, None, :]
        part = view[batch, :, :, :width].float()
        if neox:
            half = width // 2
            turned = torch.cat((-part[..., half:], part[..., :half]), -1)
        else:
            turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
        view[batch, :, :, :width] = (part * c + turned * s).to(x.dtype)


def gen_mrope_pos_ids(out: torch.Tensor, ids: torch.Tensor, merge: int, spans: Any, grids: Any) -> int:
    base = following = 0
    for i in range(out.shape[1]):
        number = int(ids[i]) if i < ids.shape[0] else -1
        found = next((j for j, (a, b) in enumerate(spans) if a <= number < b), None)
        if found is None:
            base = following
            out[:, i] = base
            base += 1
            following = base
            continue
        k, (t, h, w) = number - spans[found][0], grids[found]
        h, w = h // merge, w // merge
        place = (base + (k // w // h) % t, base + (k // w) % h, base + k % w)
        out[:, i] = torch.tensor(place)
        following = max(following, *(p + 1 for p in place))
    return following


def make_q_attn(
    norm: Any, norm_bias: Any, is_rms: bool, head_rms: bool, epsilon: float, q: int, k: int, v: int, o: int,
    temp_state: Any, temp_dq: Any, max_rows: int, hidden: int, heads: int, kv_heads: int, head_dim: int, max_seq: int,
    residual: bool, rope_style: int, sincos: int, q_norm: Any, k_norm: Any, post_norm: Any, post_bias: Any,
    residual_fp32: bool, graphs: bool,
) -> int:  # fmt: skip
    return _keep({
        "norm": _given(norm), "norm_bias": _given(norm_bias), "is_rms": is_rms, "head_rms": head_rms, "eps": epsilon,
        "q": q, "k": k, "v": v, "o": o, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "residual": residual, "rope_style": rope_style, "q_norm": _given(q_norm), "k_norm": _given(k_norm),
        "post_norm": _given(post_norm), "post_bias": _given(post_bias), "loras": {},
    })  # fmt: skip


def free_q_attn(handle: int) -> None:
    HANDLES.pop(handle, None)


def _normed(layer: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    if layer["norm"] is None:
        return x.float()
    if layer["is_rms"]:
        return _rms(x, layer["norm"], layer["eps"]).half().float()
    return _layer(x, layer["norm"], layer["norm_bias"], layer["eps"]).half().float()


def _post(layer: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    if layer["post_norm"] is None:
        return x
    if layer["is_rms"]:
        return _rms(x.half(), layer["post_norm"], layer["eps"])
    return _layer(x.half(), layer["post_norm"], layer["post_bias"], layer["eps"])


def q_attn_forward_1(
    handle: int, x: torch.Tensor, batch: int, q_len: int, past_len: int, past_lens: torch.Tensor, q: torch.Tensor,
    k: torch.Tensor, v: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, loras: Any, temp: Any,
) -> None:  # fmt: skip
    layer = HANDLES[handle]
    state = _normed(layer, x.view(-1, x.shape[-1]))
    for name, target in (("q", q), ("k", k), ("v", v)):
        target.copy_((_multiply(state, layer[name]) + _lora(layer, name, state, loras)).half().view(target.shape))
    for target, heads, norm in ((q, layer["heads"], "q_norm"), (k, layer["kv_heads"], "k_norm")):
        view = target.view(batch, q_len, heads, layer["head_dim"])
        if layer[norm] is not None:
            each = _rms if layer["head_rms"] else functools.partial(_layer, bias=None)
            view.copy_(each(view, layer[norm].view(-1, layer["head_dim"]), epsilon=layer["eps"]))
        if layer["rope_style"]:
            rope_(view, sin, cos, past_len, heads, layer["head_dim"], past_lens, layer["rope_style"] == 2)


def q_attn_forward_2(
    handle: int, x: torch.Tensor, attn_output: torch.Tensor, batch: int, q_len: int, loras: Any, temp: Any
) -> None:
    layer = HANDLES[handle]
    state = attn_output.reshape(-1, attn_output.shape[-1]).half().float()
    out = _post(layer, _multiply(state, layer["o"]) + _lora(layer, "o", state, loras)).view(x.shape)
    x.copy_((out + x.float()) if layer["residual"] else out)


def make_q_mlp(
    norm: Any, norm_bias: Any, is_rms: bool, epsilon: float, gate: int, up: int, down: int, temp_state: Any,
    temp_a: Any, temp_b: Any, temp_dq: Any, max_rows: int, gelu: bool, residual: bool, post_norm: Any, post_bias: Any,
    residual_fp32: bool, graphs: bool,
) -> int:  # fmt: skip
    return _keep({
        "norm": _given(norm), "norm_bias": _given(norm_bias), "is_rms": is_rms, "eps": epsilon, "gate": gate, "up": up,
        "down": down, "gelu": gelu, "residual": residual, "post_norm": _given(post_norm),
        "post_bias": _given(post_bias), "loras": {},
    })  # fmt: skip


def free_q_mlp(handle: int) -> None:
    HANDLES.pop(handle, None)


def q_mlp_forward_(handle: int, x: torch.Tensor, loras: Any, temp: Any) -> None:
    layer = HANDLES[handle]
    state = _normed(layer, x.view(-1, x.shape[-1]))
    act = torch.nn.functional.gelu if layer["gelu"] else torch.nn.functional.silu
    up = _multiply(state, layer["up"]) + _lora(layer, "up", state, loras)
    gate = act(_multiply(state, layer["gate"]) + _lora(layer, "gate", state, loras)) if layer["gate"] else None
    up = (act(up) if gate is None else gate * up).half().float()
    out = _post(layer, _multiply(up, layer["down"]) + _lora(layer, "down", up, loras)).view(x.shape)
    x.copy_((out + x.float()) if layer["residual"] else out)


def _lora(layer: dict[str, Any], name: str, state: torch.Tensor, loras: Any) -> Any:
    total: Any = 0.0
    for number in loras:
        pair = layer["loras"].get((name, number))
        if pair is not None:
            total = total + (state @ pair[0].float()) @ pair[1].float()
    return total


def _set_loras(handle: int, names: str, tables: tuple[Any, ...]) -> int:
    layer, widest = HANDLES[handle], 0
    layer["loras"] = {}
    for name, a, b in zip(names.split(), tables[0::2], tables[1::2], strict=True):
        for number in a:
            layer["loras"][name, number] = (a[number], b[number])
            widest = max(widest, a[number].shape[-1])
    return widest


def q_attn_set_loras(handle: int, *tables: Any) -> int:
    return _set_loras(handle, "q k v o", tables)


def q_mlp_set_loras(handle: int, *tables: Any) -> int:
    return _set_loras(handle, "gate up down", tables)


# The quantized cache ---------------------------------------------------------------------------

CACHE_BITS = {4: (4, 4), 6: (8, 4), 8: (8, 8)}


Q_BLOCK = 512  # values that one block of the kernel takes together


def _rotated(pairs: torch.Tensor) -> torch.Tensor:
    """The kernel's Hadamard transform over 32 threads of two values each, without its scale. Shape (..., 32, 2)."""
    for step in (1, 2, 4, 8, 16):
        halves = pairs.unflatten(-2, (-1, 2, step))
        a, b = halves[..., 0, :, :], halves[..., 1, :, :]
        pairs = torch.stack((a + b, a - b), -3).flatten(-4, -2)
    return pairs


def _pack(values: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP16 values in blocks of 512 -> bytes and the FP16 scale of every 32, as fp16_to_q in cache_q.cuh."""
    turned = _rotated(values.view(-1, 32, 2)).view(-1, 32)
    half = 1 << (bits - 1)
    most = turned.abs().amax(-1, keepdim=True)
    numbers = (turned / most).float().mul(half).add(half).half().float().nan_to_num(0).round()
    numbers = numbers.clamp(0, 2 * half - 1).to(torch.uint8).flatten()
    if bits == 4:
        numbers = numbers[0::2] | (numbers[1::2] << 4)
    return numbers, (most / half).flatten()


def _unpack(raw: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 4:
        raw = torch.stack((raw & 15, raw >> 4), -1).flatten()
    signed = (raw.short() - (1 << (bits - 1))).half().view(-1, 32) * scales.view(-1, 1)
    return (_rotated(signed.view(-1, 32, 2)) * (1 / 32)).flatten()


def _range(shape: torch.Size, offset: int, width: int) -> tuple[int, int]:
    """First and last value of each row of a batch: whole blocks, so more tokens than asked for with narrow models."""
    dim = shape[2] * shape[3]
    while (offset * dim) % Q_BLOCK:
        offset -= 1
    while (width * dim) % Q_BLOCK:
        width += 1
    return offset * dim, (offset + width) * dim


def _unpaged(page_size: int) -> None:
    if page_size:
        raise NotImplementedError("the stand-in for ExLlamaV2's extension has no paged cache")


def fp16_to_q_kv(
    k_in: Any, k_out: Any, k_scale: Any, v_in: Any, v_out: Any, v_scale: Any, batch: int, offset: int, width: int,
    page_size: int, cache_seqlens: Any, block_table: Any, wbits: int,
) -> None:  # fmt: skip
    _unpaged(page_size)
    first, last = _range(k_in.shape, offset, width)
    for source, target, scales, bits in zip(
        (k_in, v_in), (k_out, v_out), (k_scale, v_scale), CACHE_BITS[wbits], strict=True
    ):
        for row in range(batch):
            numbers, scale = _pack(source[row].view(-1)[first:last], bits)
            target[row].view(-1)[first * bits // 8 : last * bits // 8] = numbers
            scales[row].view(-1)[first // 32 : last // 32] = scale


def q_to_fp16_kv(
    k_in: Any, k_out: Any, k_scale: Any, v_in: Any, v_out: Any, v_scale: Any, batch: int, offset: int, width: int,
    page_size: int, cache_seqlens: Any, block_table: Any, wbits: int,
) -> None:  # fmt: skip
    _unpaged(page_size)
    first, last = _range(k_out.shape, offset, width)
    for source, target, scales, bits in zip(
        (k_in, v_in), (k_out, v_out), (k_scale, v_scale), CACHE_BITS[wbits], strict=True
    ):
        for row in range(batch):
            raw = source[row].view(-1)[first * bits // 8 : last * bits // 8]
            target[row].view(-1)[first:last] = _unpack(raw, scales[row].view(-1)[first // 32 : last // 32], bits)


# Sampling and text --------------------------------------------------------------------------------


def count_match(a: torch.Tensor, b: torch.Tensor, max_a: int) -> int:
    size = min(max_a, b.shape[1])
    different = (a[0, :size] != b[0, :size]).nonzero()
    return int(different[0]) if len(different) else size


def partial_strings_match(match: Any, offsets: Any, strings: Any) -> int:
    text = bytes(match).decode("utf-32-le", "surrogatepass")
    places = np.frombuffer(bytes(offsets), np.int32)
    for begin, end in itertools.pairwise(places):
        wanted = bytes(strings)[begin:end].decode("utf-32-le", "surrogatepass")
        for start in range(len(text)):
            tail = text[start : start + len(wanted)]
            if tail == wanted:
                return start
            if start + len(tail) == len(text) and wanted.startswith(tail):
                return -2
    return -1


def fast_fill_cpu_ones_bool(tensor: torch.Tensor) -> None:
    tensor.fill_(True)


def fast_fadd_cpu(a: torch.Tensor, b: torch.Tensor) -> None:
    a.add_(b)


def fast_copy_cpu(a: torch.Tensor, b: torch.Tensor) -> None:
    a.copy_(b)


def logit_filter_exclusive(filter: torch.Tensor, exclusive: list[list[int]]) -> None:
    for row, ids in enumerate(exclusive):
        kept = torch.zeros(filter.shape[-1], dtype=torch.bool)
        kept[torch.tensor(ids, dtype=torch.long)] = True
        filter[row] &= kept


def apply_rep_penalty(
    sequence: torch.Tensor, penalty: float, sustain: int, decay: int, frequency: float, presence: float,
    logits: torch.Tensor,
) -> None:  # fmt: skip
    for row in range(sequence.shape[0]):
        penalize(logits[row].view(-1).numpy(), sequence[row].tolist(), penalty, sustain, decay, frequency, presence)


def sample_basic(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, top_a: float, min_p: float, tfs: float,
    typical: float, random: float, output_tokens: torch.Tensor, output_probs: torch.Tensor, output_kprobs: torch.Tensor,
    output_ktokens: torch.Tensor, logit_filter: torch.Tensor, mirostat: bool, mirostat_mu: Any, mirostat_tau: float,
    mirostat_eta: float, post_temperature: float, xtc_mask: Any, xtc_probability: float, xtc_threshold: float,
    min_temp: float, max_temp: float, temp_exponent: float, smoothing: float, skew: float,
) -> list[float]:  # fmt: skip
    if xtc_probability > 0:
        raise NotImplementedError("the stand-in for ExLlamaV2's extension has no XTC")
    mu, kept = list(mirostat_mu), _given(logit_filter)
    if temperature < 0.01:
        temperature, top_k = 1.0, 1
    for row in range(logits.shape[0]):
        temperature = temperature / smoothing if smoothing > 0 else temperature
        values = logits[row].view(-1).numpy()
        allowed = None if kept is None else kept[row].view(-1).numpy()
        left = Candidates(values, allowed, temperature, 2.0 if smoothing > 0 else 1.0)
        left.top_k(top_k)
        left.top_p(top_p)
        left.top_a(top_a)
        left.min_p(min_p)
        left.tail_free(tfs)
        left.typical(typical)
        if mirostat:
            left.mirostat(mu[row], mirostat_tau)
        left.reshape(post_temperature, min_temp, max_temp, temp_exponent)
        if _given(output_ktokens) is not None:
            left.sort()
            _most_likely(left, output_ktokens[row, 0], output_kprobs[row, 0])
        elif skew:
            left.sort()
        token, prob = left.pick((random ** np.exp(-skew) if skew else random) * 0.9998)
        output_tokens[row, 0], output_probs[row, 0] = token, prob
        if mirostat:
            mu[row] = (mu[row] or 2 * mirostat_tau) + mirostat_eta * (mirostat_tau + float(np.log2(prob)))
        if logits.shape[0] > 1:
            random = next_random(random)
    return mu


def _most_likely(left: Candidates, tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """The most likely candidates; where there are too few, other tokens with probability 0."""
    wide = min(len(tokens), int((left.probs > 0).sum()))
    taken = set(left.tokens.tolist())
    others = (token for token in itertools.count() if token not in taken)
    for place in range(len(tokens)):
        tokens[place] = int(left.tokens[place]) if place < wide else next(others)
        probs[place] = float(left.probs[place]) if place < wide else 0.0


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
