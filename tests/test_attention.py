"""attention.py against plain arithmetic: no query sees a later key, in every way in which the library calls it."""

from __future__ import annotations

import subprocess

# PyTorch is in the engines' environments only, so the comparison runs in a child that has it.
PROGRAM = """
import itertools, sys, types
import torch
from modules.engines import attention
from modules.engines.attention import SCORES_COPIES, attend

real, most = torch.nn.functional.scaled_dot_product_attention, [0]
def watched(q, k, v, *rest, **named):
    assert q.shape[1] == k.shape[1] or named["enable_gqa"]
    most[0] = max(most[0], SCORES_COPIES * 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
    most.append(named["enable_gqa"])
    return real(q, k, v, *rest, **named)
attention.F = types.SimpleNamespace(scaled_dot_product_attention=watched)  # PyTorch's own knows itself by its name

def plain(q, k, v, scale, causal, window, mask):
    heads, kv = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(heads // kv, 2).transpose(1, 2) for t in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(-1, -2)) * scale
    past = k.shape[2] - q.shape[1]
    for i, j in itertools.product(range(q.shape[1]), range(k.shape[2])):
        ahead = causal and mask is None and j > i + past
        behind = causal and mask is None and window and j <= i + past - window
        if ahead or behind:
            scores[:, :, i, j] = float("-inf")
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)

torch.manual_seed(0)
worst = 0.0
for queries, past, (heads, kv), window, causal in itertools.product(
    (1, 2, 16), (0, 1, 24), ((8, 2), (4, 4)), (0, 1, 8, 64), (True, False)
):
    keys = queries + past
    q, k, v = torch.randn(2, queries, heads, 32), torch.randn(2, keys, kv, 32), torch.randn(2, keys, kv, 32)
    wanted = plain(q, k, v, 0.3, causal, window, None)
    for bound in (0, 1, 12_000, 1 << 30):
        got = attend(q, k, v, scale=0.3, causal=causal, window=window if causal else 0, scores_bytes=bound)
        worst = max(worst, float((got - wanted).abs().max()))
blocks = torch.tensor([0, 0, 0, 1, 1, 2])
mask = torch.where(blocks[:, None] == blocks[None, :], 0.0, -65504.0)
q, k, v = (torch.randn(1, 6, 4, 32) for _ in range(3))
by_head = mask + torch.arange(4.0)[None, :, None, None] * (torch.arange(6) % 2)
for causal, bound, masked in itertools.product((True, False), (0, 1, 300, 1 << 30), (mask, mask[None, None], by_head)):
    got = attend(q, k, v, scale=0.2, mask=masked, causal=causal, scores_bytes=bound)
    worst = max(worst, float((got - plain(q, k, v, 0.2, False, 0, masked)).abs().max()))

# Scores stay within the bound, however long the past is, and no kernel is asked to group heads.
q, k, v = torch.randn(1, 512, 10, 8), torch.randn(1, 2048, 2, 8), torch.randn(1, 2048, 2, 8)
for queries in (512, 1):
    most[:] = [0]
    bounded = attend(q[:, -queries:], k, v, scale=0.3, scores_bytes=1 << 20)
    assert 0 < most[0] <= 1 << 20 and not any(most[1:]), most[:3]
    most[:] = [0]
    whole = attend(q[:, -queries:], k, v, scale=0.3)
    worst = max(worst, float((bounded - whole).abs().max()))
    assert most[0] == SCORES_COPIES * 4 * 10 * queries * 2048
print(worst)
sys.exit(0 if worst < 1e-5 else 1)
"""


def test_attention_equals_plain_arithmetic_in_every_case(exllama_python: str) -> None:
    done = subprocess.run([exllama_python, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
