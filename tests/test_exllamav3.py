"""The ExLlamaV3 adapter without a card: its calls against the real package's signatures, refusals, pure parts.

The library's Python is real; its compiled extension is an empty stand-in, so nothing
can be loaded here. What only a card can show is in tests/gpu.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
from pathlib import Path

from .conftest import ROOT

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
refused("EXL2 format, which ExLlamaV3 cannot read", model=str(place / "exl2"))
refused("is not there", model=str(place / "gone"))
refused("was made for 2048", context=4096)
refused("No NVIDIA card")
refused("no option", options=(("x", "1"),))
print("pure")
"""


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
