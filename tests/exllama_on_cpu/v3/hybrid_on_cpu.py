"""What hybrid models run in Triton: the long convolution and the delta rule of a long prompt, in plain PyTorch.

Stands in for the module exllamav3.vendor.fla too, of which the library takes chunk_gated_delta_rule.
"""

from __future__ import annotations

from typing import Any

import torch
from exllamav3_ext import cuda_causal_conv1d_update, delta_rule


def causal_conv1d_update_slotted_triton(
    x: torch.Tensor, conv_state: torch.Tensor, slots: torch.Tensor, weight: torch.Tensor, bias: Any = None,
    transpose_output: bool = False, history: bool = False, token_major: bool = False, out_dtype: Any = None,
) -> torch.Tensor:  # fmt: skip
    if not token_major:
        batch, channels, tokens = x.shape
    else:
        batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=out_dtype or x.dtype, device=x.device)
    given = x.transpose(1, 2) if token_major else x
    cuda_causal_conv1d_update(given, conv_state, slots, weight, bias, out, True, history, False)
    return out if transpose_output else out.transpose(1, 2).contiguous()


def chunk_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: Any = None,
    initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """For one row of a batch; the state has shape (1, heads, keys, values)."""
    assert q.shape[0] == 1
    assert use_qk_l2norm_in_kernel
    assert scale is None
    out = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    state = torch.zeros((1, v.shape[2], k.shape[3], v.shape[3]), device=q.device)
    if initial_state is not None:
        state.copy_(initial_state)
    done, after = delta_rule(q[0], k[0], v[0], g[0], beta[0], state[0])
    out[0], state[0] = done, after
    return out, state if output_final_state else None
