"""attention.py against plain arithmetic: no query sees a later key, in every way in which the library calls it."""

from __future__ import annotations

import subprocess

# PyTorch is in the engines' environments only, so the comparison runs in a child that has it.
PROGRAM = """
import itertools, sys
import torch
from modules.engines.attention import attend

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
    got = attend(q, k, v, scale=0.3, causal=causal, window=window if causal else 0)
    worst = max(worst, float((got - plain(q, k, v, 0.3, causal, window, None)).abs().max()))
blocks = torch.tensor([0, 0, 0, 1, 1, 2])
mask = torch.where(blocks[:, None] == blocks[None, :], 0.0, -65504.0)
q, k, v = (torch.randn(1, 6, 4, 32) for _ in range(3))
for causal in (True, False):
    got = attend(q, k, v, scale=0.2, mask=mask, causal=causal)
    worst = max(worst, float((got - plain(q, k, v, 0.2, False, 0, mask)).abs().max()))
print(worst)
sys.exit(0 if worst < 1e-5 else 1)
"""


def test_attention_equals_plain_arithmetic_in_every_case(exllama_python: str) -> None:
    done = subprocess.run([exllama_python, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
