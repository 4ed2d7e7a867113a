"""The stand-in for CUDA tells the truth: what it says of devices, memory, weights, caches and sampling.

Runs in the interpreter that has ExLlamaV2, one child for each test. The adapter's own tests are test_exllamav2.py.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import EXLLAMA_PYTHON, ROOT

STAND_IN = ROOT / "tests" / "exllama_on_cpu"
CORRECTED = """
import torch
import torch.nn.functional as F
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.attn import ExLlamaV2Attention
from torch.nn.attention.bias import causal_lower_right

def attend(self, bsz, q_len, q, k, v, ap, cfg, causal=True):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = causal_lower_right(q_len, k.shape[2]) if q_len > 1 else None
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scaling, enable_gqa=self.num_key_value_groups > 1)
    return out.transpose(1, 2).reshape(bsz, q_len, -1)

ExLlamaV2Attention._attn_torch = attend
config = ExLlamaV2Config(sys.argv[1])
config.max_seq_len = config.max_input_len = 256
model = ExLlamaV2(config)
model.load()
tokenizer = ExLlamaV2Tokenizer(config)
prompt = "<|im_start|>user\\nHow do I add a tab?<|im_end|>\\n<|im_start|>assistant\\n"
ids = tokenizer.encode(prompt, add_bos=False, encode_special_tokens=True)
"""


def child(program: str, *arguments: object, vram_bytes: int = 4 << 30) -> str:
    """Run a program with the stand-in; what it printed. It fails the test by failing."""
    if not Path(EXLLAMA_PYTHON).is_file():
        pytest.skip("no environment with PyTorch and the ExLlama libraries: ./test.sh makes .venv-exllama")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (STAND_IN, STAND_IN / "v2", ROOT))),
        "TURNTABLE_TEST_VRAM_BYTES": str(vram_bytes), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    begin = "import gc, sys, exllamav2_ext, pytest, torch\nimport numpy as np\n"
    run = subprocess.run(
        [EXLLAMA_PYTHON, "-c", begin + program, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if "No module named 'exllamav2'" in run.stderr or "No module named 'transformers'" in run.stderr:
        pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "assistant"
    child("from pathlib import Path; from tests.exllama_on_cpu.models import convert\n"
          "convert('assistant', Path(sys.argv[1]))", folder)
    return folder


def test_memory_counts_as_long_as_a_reference_is_kept() -> None:
    child("""
used = torch.cuda.memory_allocated
card = torch.zeros(1000, device="cuda:0")
assert used() == 4096 and card.device == torch.device("cuda:0") and card.is_cuda
view, host = card[10:20], torch.empty(1000)
del card
host.copy_(torch.ones(1000, device="cuda"))
assert used() == 4096, "the view keeps the block, the copy on the host does not count"
beside = torch.empty(2, device=view.device)
values, places = view.sort()
assert used() == 4096 + 3 * 512
assert view.cpu().device.type == "cpu" and view.cpu().data_ptr() != view.data_ptr()
with pytest.raises(TypeError):
    view.numpy()
del view, beside, values, places
assert used() == 0 and torch.cuda.max_memory_allocated() == 8192
assert torch.cuda.memory_reserved() == 8192
torch.cuda.empty_cache()
assert torch.cuda.mem_get_info() == (4 << 30, 4 << 30)
""")


def test_what_does_not_fit_raises_and_leaves_nothing() -> None:
    child(
        """
import threading
with pytest.raises(torch.cuda.OutOfMemoryError, match="Tried to allocate 8.00 MiB"):
    torch.zeros(2 << 20, device="cuda:0")
with pytest.raises(torch.OutOfMemoryError):
    torch.zeros(2 << 20).to("cuda:0")
half = torch.zeros(600 << 10, dtype=torch.uint8, device="cuda")
with pytest.raises(torch.OutOfMemoryError):
    half + half
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.empty(1, device="cuda").device.type))
thread.start(); thread.join()
assert seen == ["cuda"]
del half
assert torch.cuda.memory_allocated() == 0
""",
        vram_bytes=1 << 20,
    )


def test_exl2_weights_are_what_was_packed_and_can_be_used_once() -> None:
    """Numbers are packed here bit by bit, and dequantized by the format's formula."""
    child("""
from exllamav2.ext import make_q_matrix
random = np.random.default_rng(3)
inputs, columns, plan = 256, 64, [(8, 32), (6, 64), (5, 32), (4, 64), (3, 32), (2, 32)]
numbers, words, groups = [], [], []
for bits, rows in plan:
    groups += [bits, sum(map(len, words))]
    block = random.integers(0, 1 << bits, (rows, columns))
    numbers.append(block - (1 << (bits - 1)))
    lines = [[(int(v) >> b) & 1 for v in block[:, c] for b in range(bits)] for c in range(columns)]
    words.append(np.array([[sum(bit << i for i, bit in enumerate(line[at : at + 32])) for line in lines]
                           for at in range(0, rows * bits, 32)], np.uint32))
scale = random.integers(0, 16, (len(plan), columns))
most = random.uniform(0.05, 0.5, len(plan)).astype(np.float16)
order = random.permutation(inputs)
wanted = np.concatenate([n * (scale[g] + 1.0) ** 2 * float(most[g]) for g, n in enumerate(numbers)]) / 256
tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a)).cuda()
weights = {
    "q_weight": tensor(np.concatenate(words).view(np.int32)),
    "q_scale": tensor((scale.reshape(len(plan), -1, 8) << (np.arange(8) * 4)).sum(-1).astype(np.uint32).view(np.int32)),
    "q_scale_max": tensor(most), "q_groups": tensor(np.array(groups, np.int16)),
    "q_invperm": tensor(order.astype(np.int32)), "q_perm": tensor(np.argsort(order).astype(np.int32)),
}
scratch = torch.empty(inputs * columns, dtype=torch.half, device="cuda")
handle = make_q_matrix(weights, scratch, max_dq_rows=inputs)
out = torch.empty((inputs, columns), dtype=torch.half, device="cuda")
exllamav2_ext.reconstruct(handle, out)
np.testing.assert_allclose(out.cpu().float().numpy(), wanted[order], rtol=2e-3, atol=1e-6)
weights["q_scale_max"] *= 256
exllamav2_ext.reconstruct(make_q_matrix(weights, scratch, max_dq_rows=inputs), out)
assert not np.allclose(out.cpu().float().numpy(), wanted[order], rtol=2e-3), "the kernels reorder the bits in place"
""")


def test_gptq_weights_are_what_was_packed() -> None:
    child("""
from exllamav2.ext import make_q_matrix
random = np.random.default_rng(4)
number, zero = random.integers(0, 16, (128, 32)), random.integers(1, 16, (4, 32))
scale, group = random.uniform(0.001, 0.1, (4, 32)).astype(np.float16), random.permutation(np.arange(128) // 32)
shift = np.arange(8) * 4
tensor = lambda a: torch.from_numpy(np.ascontiguousarray(a)).cuda()
weights = {
    "qweight": tensor((number.reshape(16, 8, 32) << shift[:, None]).sum(1).astype(np.uint32).view(np.int32)),
    "qzeros": tensor(((zero - 1).reshape(4, 4, 8) << shift).sum(-1).astype(np.uint32).view(np.int32)),
    "scales": tensor(scale), "g_idx": tensor(group.astype(np.int32)),
}
handle = make_q_matrix(weights, torch.empty(128 * 32, dtype=torch.half, device="cuda"), max_dq_rows=128)
out = torch.empty((128, 32), dtype=torch.half, device="cuda")
exllamav2_ext.reconstruct(handle, out)
wanted = (number - zero[group]) * scale[group].astype(np.float64)
np.testing.assert_allclose(out.cpu().float().numpy(), wanted, rtol=2e-3, atol=1e-6)
""")


@pytest.mark.parametrize(("bits", "key_error", "value_error"), [(4, 0.2, 0.2), (6, 0.012, 0.2), (8, 0.012, 0.012)])
def test_quantized_caches_give_back_what_was_stored_but_for_the_bits(
    bits: int, key_error: float, value_error: float
) -> None:
    """Stored blocks hold the numbers of an explicit Hadamard matrix; a second pass changes next to nothing."""
    child(f"""
bits, limits = {bits}, ({key_error}, {value_error})
generator = torch.Generator().manual_seed(5)
shape = (1, 64, 2, 64)
source = [torch.randn(shape, generator=generator).half().cuda() for _ in "kv"]
back = [torch.zeros(shape, dtype=torch.half, device="cuda") for _ in "kv"]
kinds = exllamav2_ext.CACHE_BITS[bits]
raw = [torch.zeros((1, 64, 2, 64 * b // 8), dtype=torch.uint8, device="cuda") for b in kinds]
scales = [torch.zeros((1, 64, 2, 2), dtype=torch.half, device="cuda") for _ in "kv"]
none = torch.empty((1, 1), device="meta")
exllamav2_ext.fp16_to_q_kv(source[0], raw[0], scales[0], source[1], raw[1], scales[1], 1, 8, 5, 0, none, none, bits)
exllamav2_ext.q_to_fp16_kv(raw[0], back[0], scales[0], raw[1], back[1], scales[1], 1, 0, 16, 0, none, none, bits)
hadamard = torch.ones(1, 1)
while len(hadamard) < 32:
    hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
for before, after, scale, limit, kind in zip(source, back, scales, limits, kinds):
    worst = (before[:, 8:12] - after[:, 8:12]).abs().max().item()
    assert 0 < worst < limit * 2, worst
    assert not after[:, :8].any() and not after[:, 16:].any()
    block = before[0, 8].float().cpu().flatten()[:64].view(32, 2)
    largest = (hadamard @ block).flatten().view(2, 32).abs().amax(-1)
    torch.testing.assert_close(scale[0, 8, 0].float().cpu(), largest / (1 << (kind - 1)), rtol=5e-3, atol=0)
""")


def test_sampling_follows_the_probabilities_that_the_filters_leave() -> None:
    child("""
none = torch.empty((1, 1), device="meta")
logits = torch.log(torch.tensor([[[0.4, 0.05, 0.3, 0.15, 0.1] + [1e-12] * 27]]))
def counts(temperature=1.0, top_k=0, top_p=0.0, min_p=0.0, post=1.0, allowed=none):
    found, token, prob = [0] * 32, torch.empty((1, 1), dtype=torch.long), torch.empty((1, 1))
    for step in range(1000):
        exllamav2_ext.sample_basic(logits.clone(), temperature, top_k, top_p, 0.0, min_p, 0.0, 0.0, (step + 0.5) / 1000,
            token, prob, none, none, allowed, False, [], 1.5, 0.1, post, none, 0.0, 0.1, 0.0, 0.0, 1.0, 0.0, 0.0)
        found[int(token)] += 1
    return np.array(found[:5]) / 1000
def near(got, *weights):
    np.testing.assert_allclose(got, np.array(weights) / sum(weights), atol=0.003)
near(counts(temperature=0.0), 1, 0, 0, 0, 0)
near(counts(), 0.4, 0.05, 0.3, 0.15, 0.1)
near(counts(top_k=3), 0.4, 0, 0.3, 0.15, 0)
near(counts(top_k=4, min_p=0.3), 0.4, 0, 0.3, 0.15, 0)
near(counts(temperature=0.5), 0.16, 0.0025, 0.09, 0.0225, 0.01)
near(counts(top_k=3, post=0.5), 0.16, 0, 0.09, 0.0225, 0)
near(counts(top_k=5, top_p=0.75), 0.4, 0, 0.3, 0, 0)
only = torch.zeros((1, 32), dtype=torch.bool)
only[0, [1, 4]] = True
near(counts(allowed=only), 0, 0.05, 0, 0, 0.1)
penalized = torch.tensor([[2.0, -2.0, 1.0]])
exllamav2_ext.apply_rep_penalty(torch.tensor([[2, 0, 1, 1]]), 2.0, 3, 0, 0.25, 0.5, penalized)
assert penalized.tolist() == [[0.25, -5.0, 1.0]]
fading = torch.tensor([[2.0, 2.0, 2.0]])
exllamav2_ext.apply_rep_penalty(torch.tensor([[2, 1, 0]]), 3.0, 1, 2, 0.0, 0.0, fading)
np.testing.assert_allclose(fading[0], [2 / 3, 2 / 3, 1.0], rtol=1e-6)
""")


def test_logits_are_those_of_transformers(assistant: Path) -> None:
    program = CORRECTED + """
got = model.forward(ids, cache=ExLlamaV2Cache(model, max_seq_len=256)).float().cpu()
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
import json
said = json.load(open(sys.argv[1] + "/config.json"))
said["rope_parameters"] = {"rope_type": "default", "rope_theta": said.pop("rope_theta")}
reference = Qwen2ForCausalLM(Qwen2Config(**said)).float().eval()
tensors = {name: value.float() for name, value in load_file(sys.argv[1] + "/model.safetensors").items()}
missing = reference.load_state_dict(tensors, strict=False)
assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
reference.tie_weights()
with torch.no_grad():
    wanted = reference(ids).logits
got = got[..., : wanted.shape[-1]]
assert (got - wanted).abs().max() < 0.02 * wanted.abs().max(), (got - wanted).abs().max()
assert (got.argmax(-1) == wanted.argmax(-1)).all()
"""
    child(program, assistant)


def test_the_generator_answers_and_unloading_leaves_no_byte(assistant: Path) -> None:
    program = CORRECTED + """
from exllamav2.generator import ExLlamaV2DynamicGenerator, ExLlamaV2DynamicJob, ExLlamaV2Sampler
cache = ExLlamaV2Cache(model, max_seq_len=256)
loaded = torch.cuda.memory_allocated()
assert loaded > 1 << 20, loaded
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=tokenizer, paged=False)
generator.enqueue(ExLlamaV2DynamicJob(input_ids=ids, max_new_tokens=64, stop_conditions=[tokenizer.eos_token_id],
                                      gen_settings=ExLlamaV2Sampler.Settings.greedy()))
results = []
while generator.num_remaining_jobs():
    results += generator.iterate()
print(results[-1]["full_completion"])
del results, generator, cache
model.unload()
del model
gc.collect()
import pretend_cuda
assert torch.cuda.memory_allocated() == pretend_cuda.WORKSPACE_BYTES, "cuBLAS keeps it until it is told"
torch._C._cuda_clearCublasWorkspaces()
assert torch.cuda.memory_allocated() == 0, torch.cuda.memory_allocated()
"""
    answer = child(program, assistant)
    assert "presets" in answer and "tab" in answer, answer


def test_what_has_no_stand_in_says_its_name() -> None:
    child("""
with pytest.raises(NotImplementedError, match="make_q_moe_mlp"):
    exllamav2_ext.make_q_moe_mlp()
""")
