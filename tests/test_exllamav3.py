"""The ExLlamaV3 adapter with the real library and no card: tests/exllama_on_cpu stands in for CUDA at the lowest level.

The library's own Triton kernels, run by Triton's interpreter, are the measure of the
stand-in's attention and caches. What only a card can show (speed, CUDA graphs, fused
launches, the kernels of hybrid models) is in tests/gpu.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modules.errors import ContextTooLong, DoesNotFit, InvalidRequest, LoadError, TurntableError
from modules.messages import Constraint, Delta, EngineSpec, Message, Sampling, Start
from modules.process import EngineKind, EngineProcess, Limits

from .conftest import DEMO, EXLLAMA_PYTHON, LLAMA, ROOT
from .contract import GREEDY, SCHEMA, Contract, Subject, ask
from .demo_answers import ASKS, answers, expected
from .gpu import scenarios
from .gpu.scenarios import Rig, Scenarios

STAND_IN = ROOT / "tests" / "exllama_on_cpu"
ADAPTER = ROOT / "modules" / "engines" / "exllamav3.py"
BEGIN = """
import importlib.machinery, sys, types
stub = types.ModuleType("exllamav3_ext")
stub.__spec__ = importlib.machinery.ModuleSpec("exllamav3_ext", object(), origin="exllamav3_ext.so")
def missing(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *a, **k: None
stub.__getattr__ = missing
sys.modules["exllamav3_ext"] = stub
import exllamav3
"""
# Each call of the adapter by the end of its name, and what is called.
CALLS = {
    "Config.from_directory": "exllamav3.Config.from_directory", "Model.from_config": "exllamav3.Model.from_config",
    "model.load": "exllamav3.Model.load_gen", "_tower.load": "exllamav3.Model.load_gen", "Cache": "exllamav3.Cache",
    "model.unload": "exllamav3.Model.unload", "model.forward": "exllamav3.Model.forward",
    "Tokenizer.from_config": "exllamav3.Tokenizer.from_config", "_tokenizer.encode": "exllamav3.Tokenizer.encode",
    "Generator": "exllamav3.Generator", "_generator.enqueue": "exllamav3.Generator.enqueue",
    "_generator.iterate": "exllamav3.Generator.iterate", "_generator.cancel": "exllamav3.Generator.cancel",
    "_generator.close": "exllamav3.Generator.close", "_generator.clear_queue": "exllamav3.Generator.clear_queue",
    "_generator.num_remaining_jobs": "exllamav3.Generator.num_remaining_jobs", "Job": "exllamav3.Job",
    "LLGuidanceFilter": "exllamav3.LLGuidanceFilter",
    "ComboSampler": "exllamav3.generator.sampler.ComboSampler",
    "_tower.get_image_embeddings": "exllamav3.architecture.qwen2_5_vl.Qwen2_5VLVisionModel.get_image_embeddings",
}  # fmt: skip
BIND = """
import importlib, inspect, json
def find(dotted):
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for part in parts[n:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(dotted)
for where, dotted, count, names, spread in json.loads(sys.argv[1]):
    thing = find(dotted)
    signature = inspect.signature(thing)
    bare = "." in dotted.removeprefix("exllamav3.") and not inspect.isclass(thing) and "self" in signature.parameters
    values = [None] * (count + bare)
    known = set(signature.parameters)
    # **kwargs of the library swallow misspelt names, so they are held against the named parameters.
    unknown = [n for n in names if n not in known and not dotted.endswith(".Cache")]
    assert not unknown, f"{where} {dotted} has no {unknown}"
    if not spread:
        try:
            signature.bind(*values, **dict.fromkeys(names))
        except TypeError as error:
            raise AssertionError(f"{where} {dotted}: {error}") from None
layer = inspect.signature(exllamav3.CacheLayer_quant.__init__).parameters
assert {"k_bits", "v_bits"} <= set(layer)
print("bound")
"""
PURE = """
from PIL import Image
from modules.engines import exllamav3 as adapter
from modules.messages import Sampling, EngineSpec
from modules.errors import LoadError, TurntableError
from modules.engines.tiny import write_tiny
from pathlib import Path

assert adapter.capped(Image.new("RGB", (100, 50)), 5000).size == (100, 50)
small = adapter.capped(Image.new("RGB", (4000, 2000)), 1280 * 28 * 28).size
assert small[0] * small[1] <= 1280 * 28 * 28 and abs(small[0] / small[1] - 2) < 0.01
from exllamav3.generator.sampler.custom import SS_Fused
def only(steps):
    assert len(steps) == 1 and isinstance(steps[0], SS_Fused), steps
    return steps[0]
plain = only(adapter.sampler(Sampling()).steps)  # the library drops the steps that change nothing
assert (plain.mode, plain.filters) == (SS_Fused.MODE_SAMPLE, 0), vars(plain)
assert only(adapter.sampler(Sampling(temperature=0.0)).steps).mode == SS_Fused.MODE_GREEDY
full = adapter.sampler(Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)).steps
assert len(full) > 1 and full[-1].filters == SS_Fused.F_TOPK | SS_Fused.F_TOPP
assert "Qwen3_5ForConditionalGeneration" in adapter.ExLlamaV3Engine.rules.architectures

place = Path(sys.argv[1])
engine = adapter.ExLlamaV3Engine()
assert engine.version() == "1.6.5"
def refused(words, **more):
    spec = EngineSpec("exllamav3", **{"model": str(place / "fp16"), "context": 1024, **more})
    try:
        engine.load(spec, lambda event: None)
    except TurntableError as error:
        assert words in f"{error} {error.hint}", error
    else:
        raise AssertionError(words)
write_tiny(place / "fp16")
write_tiny(place / "exl2", quantization="exl2")
adapter.write_exl3(place / "exl3")
assert {p.name for p in (place / "exl3").iterdir()} == {p.name for p in (place / "fp16").iterdir()}
refused("EXL2 format, which ExLlamaV3 cannot read", model=str(place / "exl2"))
refused("is not there", model=str(place / "gone"))
refused("was made for 2048", context=4096)
refused("No NVIDIA card")
refused("No NVIDIA card", model=str(place / "exl3"))
refused("no option", options=(("x", "1"),))
print("pure")
"""

# The tiny model as FP16 and EXL3, a hybrid one, and the demo models.
MAKE_MODELS = """
import sys
from pathlib import Path
from modules.engines.exllamav3 import write_exl3, write_tiny
from tests.exllama_on_cpu import models
from tests.exllama_on_cpu.v3.hybrid_model import write_hybrid
place = Path(sys.argv[1])
write_tiny(place / "fp16"); write_exl3(place / "exl3"); write_hybrid(place / "hybrid")
for name in ("assistant", "coding", "reasoning", "vision"):
    models.convert(name, place / name, "exllamav3")
"""


def on_cpu(vram_bytes: int = 4 << 30, **environment: str) -> EngineKind:
    given = {
        "PYTHONPATH": os.pathsep.join((str(STAND_IN), str(STAND_IN / "v3"))),
        "TURNTABLE_TEST_VRAM_BYTES": str(vram_bytes), "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    return EngineKind(
        "exllamav3", EXLLAMA_PYTHON, keeps_process=True, memory="vram", environment=tuple(sorted(given.items()))
    )


def with_stand_in(program: str, *arguments: object, **environment: str) -> str:
    """Run a program in the engine's environment; what it printed. It fails the test by failing."""
    given = {**os.environ, **dict(on_cpu(**environment).environment)}
    given["PYTHONPATH"] += os.pathsep + str(ROOT)
    run = subprocess.run(
        [EXLLAMA_PYTHON, "-c", program, *map(str, arguments)], cwd=ROOT, env=given, capture_output=True, text=True,
        timeout=110, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, as FP16 and as EXL3, a hybrid one, and the bundled demo models as FP16."""
    if not Path(EXLLAMA_PYTHON).is_file():
        pytest.skip("no environment with PyTorch and the ExLlama libraries: ./test.sh makes .venv-exllama")
    place = tmp_path_factory.mktemp("models-v3")
    with_stand_in(MAKE_MODELS, place)
    return place


def spec_of(folder: Path, **more: object) -> EngineSpec:
    return dataclasses.replace(EngineSpec("exllamav3", str(folder), context=1024), **more)  # type: ignore[arg-type]


def quiet(event: object) -> None:
    pass


class TestFP16(Contract):
    """An FP16 checkpoint, three answers at once."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        return Subject(on_cpu(), spec_of(models / "fp16", parallel=3), unload_leaves_bytes=0)


class TestEXL3(Contract):
    """An EXL3 checkpoint with 8-bit keys and 4-bit values, one answer at a time."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        return Subject(on_cpu(), spec_of(models / "exl3", cache_mode="Q6"), unload_leaves_bytes=0)


@pytest.fixture
def begin() -> Iterator[Callable[..., EngineProcess]]:
    made: list[EngineProcess] = []

    def make(kind: EngineKind | None = None) -> EngineProcess:
        made.append(EngineProcess(kind or on_cpu(), Limits(load_s=60, stall_s=60)))
        return made[-1]

    yield make
    for process in made:
        process.stop()


@pytest.fixture(scope="module")
def shared(models: Path) -> Iterator[EngineProcess]:
    """One child for all the tests that need nothing special of it."""
    process = EngineProcess(on_cpu(), Limits(load_s=60, stall_s=60))
    yield process
    process.stop()


@pytest.fixture
def opened(shared: EngineProcess) -> Callable[[EngineSpec], EngineProcess]:
    """The shared child with another model in it."""

    def load(spec: EngineSpec) -> EngineProcess:
        shared.unload()
        shared.load(spec, quiet)
        return shared

    return load


# The stand-in against the library --------------------------------------------------------------

KERNELS_AGREE = """
import itertools
import torch
from triton.runtime import interpreter
plain = interpreter._LangPatchScope.set_attr
def with_newer_numpy(scope, thing, name, value):  # which turns no array of one number into an index
    plain(scope, thing, name, (lambda t: int(t.handle.data.reshape(-1)[0])) if name == "__index__" else value)
interpreter._LangPatchScope.set_attr = with_newer_numpy
import exllamav3
import exllamav3_ext as ext
from exllamav3.modules.attention_fn import triton_paged as kernels
kernels.pick_config = lambda device, name, key, candidates, cost: candidates[0]
torch.manual_seed(0)
heads, kv, dim = 4, 2, 64
wide = kv * dim // 32
table = torch.tensor([[3, 1, 5], [0, 4, 2]], dtype=torch.int32).cuda()
lengths = torch.tensor([300, 17], dtype=torch.int32).cuda()
half = lambda *shape: torch.randn(*shape).half().cuda()
worst = 0.0
def compare(name, given, caches, **named):
    global worst
    both = [[t if named.get("qc") else t.clone() for t in caches] for _ in range(2)]
    rest = [] if name.startswith("varlen") else [table, lengths]
    got = getattr(kernels, name)(*given, *both[0], *rest, **named)
    real = getattr(kernels, "real_" + name)(*given, *both[1], *rest, **named)
    worst = max(worst, float((got.float() - real.float()).abs().max()))
    assert worst < 0.005, (name, named, worst)
    assert all(bool((a == b).all()) for a, b in zip(*both)), (name, named)
for queries, name in ((1, "decode"), (5, "decode"), (40, "prefill")):
    name = "paged_attn_triton_" + name
    q, k, v = half(2, queries, heads, dim), half(2, queries, kv, dim), half(2, queries, kv, dim)
    pages = [half(6, 256, kv, dim), half(6, 256, kv, dim)]
    for more in ({}, {"window_size": (64, 0)}, {"softcap": 20.0}, {"sinks": torch.randn(heads).cuda()}):
        if queries > 1 or not more:
            compare(name, (q, k, v), pages, causal=True, **more)
    for bits in ((8, 4), (4, 4), (3, 5)):
        packed = [torch.zeros(6, 256, wide * b, dtype=torch.int32).cuda() for b in bits]
        scales = [torch.zeros(6, 256, wide).half().cuda() for _ in bits]
        zero = torch.zeros(2, dtype=torch.int32).cuda()
        ext.quant_cache_paged(half(2, 400, kv, dim), packed[0], scales[0], half(2, 400, kv, dim), packed[1], scales[1],
                              zero, table, 256, 400, 0.0, True)
        compare(name, (q, None, None), packed, causal=True, qc=(*scales, *bits), pre_appended_len=queries,
                n_kv_heads_override=kv)
q, k, v = (half(100, n, dim) for n in (heads, kv, kv))
for causal in (True, False):
    compare("varlen_attn_triton", (q, k, v, torch.tensor([0, 30, 64, 100], dtype=torch.int32).cuda(), 36), [],
            causal=causal)
print("agree", worst)
"""
PARTS_AGREE = """
import numpy as np
import torch
import exllamav3
import exllamav3_ext as ext
from exllamav3.modules.quant.exl3 import LinearEXL3
random = np.random.default_rng(5)

# EXL3: each weight read from its tile's ring of bits here, one by one, and the products against the library's matrix.
inputs, outputs = 256, 384
for bits in (2, 4, 5):
    trellis = random.integers(-(1 << 15), 1 << 15, (inputs // 16, outputs // 16, 16 * bits)).astype(np.int16)
    suh, svh = random.choice([-1.0, 1.0], inputs), random.choice([-0.05, 0.05], outputs)
    marker = torch.tensor(0x83DCD12D, dtype=torch.uint32).view(torch.int)
    cuda = lambda a, kind: torch.from_numpy(np.asarray(a)).to(kind).cuda()
    linear = LinearEXL3(None, inputs, outputs, suh=cuda(suh, torch.half), svh=cuda(svh, torch.half),
                        trellis=cuda(trellis, torch.int16), mul1=marker, out_dtype=torch.float)
    inner = linear.get_inner_weight_tensor().float().cpu().numpy()
    tile = trellis[3, 7].view(np.uint16)
    ring = "".join(f"{int(tile[n + 1]) << 16 | int(tile[n]):032b}" for n in range(0, len(tile), 2))
    for number in range(256):
        begin = (number + 1) * bits - 16
        code = int("".join(ring[(begin + n) % len(ring)] for n in range(16)), 2)
        product = code * 0x83DCD12D % 2**32
        value = (sum(product.to_bytes(4, "little")) - 510) / 147.7
        lane, place = divmod(number, 8)
        row, column = lane % 4 * 2 + place % 2 + place // 2 % 2 * 8, lane // 4 + place // 4 * 8
        assert abs(inner[3 * 16 + row, 7 * 16 + column] - value) < 0.01, (bits, number)
    assert abs(inner.std() - 1) < 0.05
    whole = linear.get_weight_tensor().float().cpu()
    for rows in (3, 200):  # the second is above the number from which the library takes the matrix apart
        x = torch.randn(rows, inputs).half()
        got = linear.forward(x.cuda(), {}).cpu().float()
        assert float((got - x.float() @ whole).abs().max()) < 0.02 * float(got.abs().max()), (bits, rows)

# Layers, against what the library has of them in plain PyTorch.
from exllamav3.modules import GatedRMSNorm, RMSNorm
from exllamav3.modules.gated_delta_net_fn import conv1d, gated_delta_rule
from exllamav3.util.rope import RoPE, RopeSettings, RopeStyle
def near(got, wanted, most=0.01):
    assert float((got.float().cpu() - wanted.float().cpu()).abs().max()) < most * float(wanted.float().abs().max())
for style in (RopeStyle.NEOX, RopeStyle.GPTJ):
    rope = RoPE("cuda:0", RopeSettings(head_dim=64, rope_style=style))
    q, k = torch.randn(2, 7, 4, 64).half().cuda(), torch.randn(2, 7, 2, 64).half().cuda()
    at = torch.tensor([5, 90], dtype=torch.int32).cuda()
    for got, wanted in zip(rope.apply(q, k, positions=at), rope.apply_torch(q, k, positions=at), strict=True):
        near(got, wanted)
x, weight = torch.randn(5, 64).half().cuda(), torch.randn(64).half().cuda()
for norm, more in ((RMSNorm(None, "n", 1e-5), {}), (GatedRMSNorm(None, "n", 1e-5), {"gate": x * 2})):
    norm.weight, norm.out_dtype = weight, torch.half
    near(norm.forward(x, {}, **more), norm.forward_torch(x, {}, **more))
heads = dict(g=-torch.rand(1, 9, 4), beta=torch.rand(1, 9, 4))
q, k, v, state = torch.randn(1, 9, 4, 32), torch.randn(1, 9, 4, 32), torch.randn(1, 9, 4, 16), torch.randn(1, 4, 32, 16)
wanted = gated_delta_rule.torch_recurrent_gated_delta_rule(q, k, v, **heads, initial_state=state.clone(),
                                                           output_final_state=True, use_qk_l2norm_in_kernel=True)
got = ext.delta_rule(q[0], k[0], v[0], heads["g"][0], heads["beta"][0], state[0])
for a, b in zip(got, wanted, strict=True):
    near(a, b[0])
x, state, weight = torch.randn(1, 24, 6), torch.randn(1, 24, 4), torch.randn(24, 4)
mine, out = state.clone(), torch.empty(1, 6, 24)
wanted = conv1d.causal_conv1d_update_function_torch(x, state, weight)
ext.cuda_causal_conv1d_update(x, mine, None, weight, None, out, True, False, False)
near(out.transpose(1, 2), wanted)
near(mine, state)

# Texts that are looked for: the earliest one, and what may still become one.
def find(text, *wanted):
    packed = [w.encode("utf-32-le") for w in wanted]
    ends = np.cumsum([0, *map(len, packed)]).astype(np.int32)
    return ext.partial_strings_match(
        *(np.frombuffer(b, np.uint8) for b in (text.encode("utf-32-le"), ends.tobytes(), b"".join(packed)))
    )
assert find("one two three", "three", "two") == 4
assert find("one tw", "two") == -2
assert find("one", "two") == -1
assert find("ab", "b", "bcd") == 1 and find("ab", "bcd", "b") == -2
assert find("xab", "abc", "b") == -2

# The table of penalties and filters, on numbers.
from modules.engines.exllamav3 import sampler
from modules.messages import Sampling
def draw(logits, past=(0,), seeds=64, **given):
    step, past = sampler(Sampling(**given)), torch.tensor([list(past)])
    rows = torch.tensor([logits], dtype=torch.float)
    return {int(step.forward(rows.clone().cuda(), past.cuda(), seed)) for seed in range(seeds)}
even = [2.0, 1.9, 1.8, -9.0]
assert draw(even) == {0, 1, 2}
assert draw(even, temperature=0.0) == {0}
assert draw(even, top_k=2) == {0, 1} and draw(even, top_k=1) == {0}
assert draw(even, top_p=0.3) == {0} and draw(even, top_p=0.5) == {0, 1}
assert draw(even, min_p=0.95) == {0} and draw(even, min_p=0.85) == {0, 1}
assert draw(even, temperature=0.0, presence_penalty=0.15) == {1}
assert draw(even, past=(0, 0, 1), temperature=0.0, frequency_penalty=0.15) == {2}
assert draw(even, past=(0, 1), temperature=0.0, repetition_penalty=1.5) == {2}
print("agree")
"""


def test_attention_and_caches_are_those_of_the_librarys_kernels(exllama_python: str) -> None:
    assert "agree" in with_stand_in(KERNELS_AGREE, TRITON_INTERPRET="1")


def test_weights_texts_and_sampling_are_what_the_formats_say(exllama_python: str) -> None:
    assert "agree" in with_stand_in(PARTS_AGREE)


def test_the_self_test_runs_and_passes(exllama_python: str) -> None:
    assert len(scenarios.self_test(on_cpu())) >= 10


def test_the_self_test_sees_an_attention_that_is_wrong(models: Path) -> None:
    program = """
import sys
from pathlib import Path
import torch
from modules.engines import exllamav3 as adapter
from exllamav3.modules.attention_fn import triton_paged as kernels
right, folder = kernels.paged_attn_triton_prefill, Path(sys.argv[1])
def fails(check, **wrong):
    kernels.paged_attn_triton_prefill = lambda *args, **named: right(*args, **{**named, **wrong})
    try:
        with torch.inference_mode():
            check()
    except RuntimeError as error:
        assert "the logits differ" in str(error), error
    else:
        return False
    return True
checks = [lambda: adapter._causal(folder), lambda: adapter._at_once(folder, "FP16")]
assert [fails(check) for check in checks] == [False, False]
assert fails(checks[0], causal=False) and fails(checks[1], softmax_scale=0.5)
print("seen")
"""
    assert "seen" in with_stand_in(program, models / "fp16")


# Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(opened, models: Path, name: str) -> None:
    assert answers(opened(spec_of(models / name)), name) == expected(name)


def test_speculation_changes_no_answer(opened, models: Path) -> None:
    folder, said = models / "coding", set()
    for options in ((), (("draft", "ngram"),), (("draft_model", str(folder)), ("draft_tokens", "3"))):
        process = opened(spec_of(folder, parallel=2, options=options))
        heard = ask(process, ASKS["coding"][0], sampling=Sampling(temperature=0.0, max_tokens=80))
        said.add((heard.text, heard.end.counts.completion, heard.end.reason))
        assert process.unload() == 0
    assert len(said) == 1


def side_by_side(process: EngineProcess, count: int) -> list[int]:
    """Which of `count` answers each piece belonged to, in the order in which the pieces came."""
    order: list[int] = []
    ready = threading.Barrier(count)

    def run(number: int) -> None:
        ready.wait(10)
        request = Start(str(number), (Message("user", "Tell me something."),), Sampling(temperature=0.9, max_tokens=60))
        for event in process.generate(request):
            if isinstance(event, Delta):
                order.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return order


def test_two_answers_share_the_batch_and_one_waits_where_there_is_one_place(opened, models: Path) -> None:
    order = side_by_side(opened(spec_of(models / "fp16", parallel=2)), 2)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert set(order) == {0, 1}
    assert changes > 2  # one after the other would be 1
    order = side_by_side(opened(spec_of(models / "fp16", parallel=1)), 2)
    assert set(order) == {0, 1}
    assert sum(a != b for a, b in itertools.pairwise(order)) == 1


def test_a_load_can_be_cancelled_wherever_it_reports_and_leaves_nothing(models: Path) -> None:
    program = "tests.exllama_on_cpu.cancelled_loads"
    done = subprocess.run(
        [EXLLAMA_PYTHON, "-m", program, "exllamav3", "ExLlamaV3Engine", str(models / "fp16")], cwd=ROOT, timeout=100,
        capture_output=True, text=True, check=False, env={**os.environ, **dict(on_cpu().environment)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-2]) >= 4


def test_a_prompt_may_fill_the_context_to_the_last_place(opened, models: Path) -> None:
    process = opened(spec_of(models / "fp16", context=512))
    empty = ask(process, "").end.counts.prompt
    full = ask(process, "x" * (510 - empty))
    assert (full.end.reason, full.end.counts.prompt, full.end.counts.completion) == ("length", 510, 1)
    with pytest.raises(ContextTooLong, match="takes 511 tokens"):
        ask(process, "x" * (511 - empty))
    assert ask(process, "Hi").text


def test_a_form_may_have_stop_texts_and_an_empty_one_stops_nothing(opened, models: Path) -> None:
    process = opened(spec_of(models / "fp16"))
    form = Constraint("json_schema", json.dumps(SCHEMA))
    long = dataclasses.replace(GREEDY, max_tokens=60)
    whole = ask(process, "Hi", sampling=dataclasses.replace(long, stop=("",)), constraint=form)
    assert set(json.loads(whole.text)) == {"ok"}
    cut = ask(process, "Hi", sampling=dataclasses.replace(long, stop=(":", "")), constraint=form)
    assert cut.text == whole.text.partition(":")[0]
    assert cut.end.reason == "stop"
    assert process.unload() == 0


def test_the_demo_that_sees_answers_as_it_does_in_llama_cpp(begin, opened, models: Path, tmp_path: Path) -> None:
    blue = ("square", "blue", (10, 10, 40, 40))
    pictures = [
        drawn(tmp_path, "a.png", blue), drawn(tmp_path, "b.png", ("circle", "red", (70, 70, 100, 100))),
        drawn(tmp_path, "c.png", ("circle", "green", (10, 70, 40, 100)), ("square", "red", (70, 10, 100, 40))),
    ]  # fmt: skip
    questions = ("Describe the image.", "How many shapes are there?")
    asked = [(Message("user", question, (path,)),) for path in pictures for question in questions]
    llama = begin(LLAMA)
    options = (("image_tokens", "16"),)
    files = (str(DEMO / "vision-q8_0.gguf"), str(DEMO / "vision-mmproj-q8_0.gguf"))
    llama.load(EngineSpec("llamacpp", *files, context=1024, options=options), quiet)
    process = opened(spec_of(models / "vision", parallel=2))
    told = [
        [ask(engine, turn, sampling=Sampling(temperature=0.0, max_tokens=40)).text for turn in asked]
        for engine in (llama, process)
    ]
    assert told[1] == told[0]
    assert told[1][0] == "I see a blue square in the top left corner."
    # A turn with a picture is not read again, and the picture neither.
    second = (*asked[0], Message("assistant", told[1][0]), Message("user", "How many shapes are there?"))
    assert ask(process, second).end.counts.cached >= 16
    with pytest.raises(TurntableError):
        ask(process, (Message("user", "What?", (str(tmp_path / "gone.png"),)),))
    for number, size in enumerate([(8, 8), (3000, 10)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        assert ask(process, (Message("user", "Describe the image.", (str(tmp_path / f"{number}.png"),)),)).text
    assert process.unload() == 0


def test_a_hybrid_model_keeps_a_state_for_each_answer_and_reuses_prefixes_by_pages(opened, models: Path) -> None:
    folder, heard = models / "hybrid", {}
    questions = ("What is the capital of France?", "Please think about it. " * 13)

    def run(process: EngineProcess, number: int) -> None:
        heard[number] = ask(process, questions[number], str(number)).text

    process = opened(spec_of(folder, parallel=2, cache_mode="Q8"))
    alone = [ask(process, question, "alone").text for question in questions]
    assert len(set(alone)) == 2
    process = opened(spec_of(folder, parallel=2, cache_mode="Q8", options=(("chunk_size", "256"),)))  # other chunks
    threads = [threading.Thread(target=run, args=(process, number)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [heard[0], heard[1]] == alone
    again = ask(process, questions[1], "again")
    assert again.text == alone[1]
    assert again.end.counts.cached == 256  # the state after the last full page; the prompt has more
    assert again.end.counts.prompt > 300
    assert process.unload() == 0


def drawn(place: Path, name: str, *shapes: tuple[str, str, tuple[int, int, int, int]]) -> str:
    picture = Image.new("RGB", (112, 112), "white")
    pen = ImageDraw.Draw(picture)
    for form, colour, box in shapes:
        (pen.rectangle if form == "square" else pen.ellipse)(box, fill=colour)
    picture.save(place / name)
    return str(place / name)


# Memory -------------------------------------------------------------------------------------------


def test_many_swaps_between_two_models_change_nothing_and_leave_nothing(opened, models: Path) -> None:
    specs = [
        spec_of(models / "fp16", parallel=2), spec_of(models / "exl3", cache_mode="Q4"),
        spec_of(models / "exl3", options=(("draft_model", str(models / "fp16")),)),
        spec_of(models / "exl3", cache_mode="Q8", options=(("gpu_split", "auto"),)),
    ]  # fmt: skip
    first: dict[EngineSpec, str] = {}
    for spec in specs * 2:
        process = opened(spec)
        text = ask(process, "Hi").text
        assert first.setdefault(spec, text) == text
        assert process.unload() == 0


def test_smaller_cache_modes_take_less_memory(shared: EngineProcess, models: Path) -> None:
    taken = {}
    shared.unload()
    for mode in ("FP16", "Q8", "Q6", "Q4"):
        spec = spec_of(models / "exl3", cache_mode=mode, options=(("cache_size", str(1 << 18)),))
        taken[mode] = shared.load(spec, quiet).memory_bytes
        assert shared.unload() == 0
    # Keys and values of two layers, 128 numbers each: 16 bits, or their bits and a scale of 16 bits for each 32.
    numbers = (1 << 18) * 2 * 128
    for mode, bits in (("Q8", 16 + 1), ("Q6", 12 + 1), ("Q4", 8 + 1)):
        assert taken["FP16"] - taken[mode] == pytest.approx(numbers * (32 - bits) / 8, rel=0.01)


def test_a_model_is_spread_over_cards_or_refused_where_it_does_not_fit(begin, models: Path) -> None:
    process = begin(on_cpu(vram_bytes=420 << 20, TURNTABLE_TEST_CARDS="2"))
    for split in ((), (("gpu_split", "auto"),)):
        with pytest.raises(DoesNotFit, match="does not fit"):
            process.load(spec_of(models / "exl3", options=(("cache_size", str(1 << 20)), *split)), quiet)
    one = process.load(spec_of(models / "exl3"), quiet).memory_bytes
    said = ask(process, "Hi").text
    assert process.unload() == 0
    # The library takes its memory in blocks of 128 MiB on each card that it uses.
    both = process.load(spec_of(models / "exl3", options=(("gpu_split", "0.13,1"),)), quiet).memory_bytes
    assert both - one > 100 << 20
    assert ask(process, "Hi").text == said
    assert process.unload() == 0


class TestSwaps(Scenarios):
    """The scenarios for a card on one of 160 MiB, shortly: 130 MiB of it are in use with any model."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(cls, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
        place = tmp_path_factory.mktemp("scenarios")
        small = scenarios.small_models([models / "exl3", models / "fp16"], spec_of(models), ("FP16", "Q4"))
        sees = shutil.copytree(models / "vision", place / "sees")
        options = scenarios.allow_large_pictures(sees, 1680)
        return Rig(
            on_cpu(160 << 20), small, spec_of(scenarios.write_wide(place / "wide")),
            spec_of(models / "exl3", options=(("cache_size", str(1 << 20)),)), spec_of(sees, options=options), 1680,
            EngineProcess.measure, lambda left: contextlib.nullcontext(), swaps=6, run=8,
        )  # fmt: skip


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_work_is_an_error_in_words_and_the_child_lives(
    shared: EngineProcess, opened, models: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(models / "fp16", larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": 384}))
    shared.unload()
    for folder, options, words in (
        (models / "exl3", {"nonsense": "1"}, "no option 'nonsense'"),
        (models / "exl3", {"chunk_size": "100"}, "multiple of 256"),
        (models / "exl3", {"draft": "magic"}, "can only be ngram"),
        (models / "exl3", {"gpu_split": "a,b"}, "gigabytes"),
        (models / "exl3", {"loras": '[["/nowhere", 1.0]]'}, "LoRA adapters are for ExLlamaV2"),
        (models / "exl3", {"draft_model": str(larger)}, "larger vocabulary"),
        (models / "vision", {"draft": "ngram"}, "cannot be used with a model that sees"),
    ):
        with pytest.raises(LoadError, match=words):
            shared.load(spec_of(folder, options=tuple(options.items())), quiet)
    process = opened(spec_of(models / "exl3"))
    with pytest.raises(InvalidRequest, match="cannot look at pictures"):
        ask(process, (Message("user", "What?", (drawn(tmp_path, "a.png"),)),))
    assert ask(process, "Hi").text
    assert process.unload() == 0


# The calls and what needs no card ----------------------------------------------------------------


def child(python: str, program: str, *arguments: str) -> str:
    done = subprocess.run(
        [python, "-c", BEGIN + program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def calls() -> list[list[object]]:
    """Every call of the library: line, what is called, positional count, keyword names, spread or not."""
    found: list[list[object]] = []
    for node in ast.walk(ast.parse(ADAPTER.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        for end, dotted in CALLS.items():
            if name == end or (name.endswith(f".{end}") and not name.startswith("torch.")):
                names = [keyword.arg for keyword in node.keywords if keyword.arg]
                spread = any(keyword.arg is None for keyword in node.keywords)
                found.append([f"line {node.lineno}", dotted, len(node.args), names, spread])
    return found


def test_every_call_fits_the_real_package(exllama_python: str) -> None:
    listed = calls()
    assert {entry[1] for entry in listed} == set(CALLS.values())
    assert "bound" in child(exllama_python, BIND, json.dumps(listed))


def test_what_it_refuses_and_its_pure_parts(exllama_python: str, tmp_path: Path) -> None:
    assert "pure" in child(exllama_python, PURE, str(tmp_path))
