"""fastload.py against the library's own loading: same tensors from files and from page-locked copies, LRU, budget."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from .conftest import ROOT

STAND_IN = ROOT / "tests" / "exllama_on_cpu"

PROGRAM = """
import itertools, json, os, sys, threading
from pathlib import Path
import numpy as np
from modules.engines.tiny import write_safetensors, write_tiny
import exllamav2
import torch
from exllamav2 import ExLlamaV2, ExLlamaV2Config, ext
from modules.engines.fastload import Feeder, HostCopies, HostCopy, Reader, derive, lay_out, Piece, remap, remap_4bit
import modules.engines.fastload as fastload

place = Path(sys.argv[1])
fastload.STAGE_BYTES = 64 << 10  # tensors that lie across stages are the case that matters
fastload.REGISTER_BYTES = 96 << 10
fastload.READ_BYTES = 7000

def new(folder):
    config = ExLlamaV2Config(str(folder))
    config.max_seq_len = 512
    return ExLlamaV2(config)

def held(model):
    found = {}
    for module in model.modules:
        for one in (*module.submodules, module):
            for name, value in vars(one).items():
                if name == "q_tensors" and value:
                    found |= {(one.key, key): tensor.clone() for key, tensor in value.items()}
                elif name in ("linear", "embedding") and value is not None:
                    found[one.key, name] = value.weight.clone()
                elif name == "weight" and value is not None:
                    found[one.key, name] = value.clone()
    return found

def same(a, b):
    assert set(a) <= set(b), set(a) - set(b)
    for key, tensor in a.items():
        if (key[0], "qweight") in a and key[1] in ("q_perm", "q_invperm"):
            continue  # for GPTQ the card writes these
        other = b[key]
        if tensor.dtype == torch.int32 and other.dtype == torch.int16:
            tensor = tensor.short()
        bits = (lambda t: t.contiguous().view(torch.int16)) if tensor.dtype == torch.float16 else lambda t: t
        assert tensor.dtype == other.dtype and torch.equal(bits(tensor), bits(other)), key  # NaN equals itself
    return len(a)

def stored_as(folder, dtype, of, name):
    # The folder with its F16 tensors of these names in another type, and numbers among them that F16 cannot hold.
    path = folder / name
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    tensors, edges = {}, [1e30, -7e4, 65519.0, 65520.0, 1e-7, -3e-8, 6e-5, float("inf"), float("nan")]
    for key, entry in json.loads(raw[8:begin]).items():
        first, last = (begin + at for at in entry["data_offsets"])
        types = {"F16": np.float16, "I32": np.int32, "I16": np.int16}
        values = np.frombuffer(raw[first:last], types[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "F16" and key.endswith(of):
            values = values.astype(np.float32)
            values.reshape(-1)[: len(edges)] = edges
            values.reshape(-1)[len(edges):] *= 1.0009765625
            tensors[key] = (dtype, values)
        else:
            tensors[key] = (entry["dtype"], values)
    write_safetensors(path, tensors)
    return folder

write = {
    "bf16": lambda: stored_as(write_tiny(place / "bf16"), "BF16", ".weight", "model.safetensors"),
    "f32": lambda: stored_as(write_tiny(place / "f32"), "F32", "_proj.weight", "model.safetensors"),
    "gptq-f32": lambda: stored_as(
        write_tiny(place / "gptq-f32", quantization="gptq"), "F32", (".scales", "norm.weight"), "model.safetensors"),
    "exl2-bf16": lambda: stored_as(
        write_tiny(place / "exl2-bf16", quantization="exl2"), "BF16", ".weight", "output.safetensors"),
}
for kind in ("exl2", "fp16", "gptq", *write):
    folder = write[kind]() if kind in write else write_tiny(place / kind, quantization=kind)
    stock = new(folder)
    stock.load()
    expected = held(stock)
    feeder, copies = Feeder(), HostCopies(1 << 30)
    for source in ("files", "copy", "copy"):
        model = new(folder)
        model.set_device_map([99999])
        layout = lay_out([model])
        assert {piece.dtype for _, piece in layout.pieces.values()} <= {torch.float16, torch.int32, torch.int16}
        copy = copies.find(layout)
        assert (copy is not None) == (source == "copy")
        steps = []
        blocks = feeder.load(layout, copy, lambda done, total: steps.append((done, total)))
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
        count = same(expected, held(model))
        print(kind, source, count, "tensors equal")
        assert count > 15
        copies.make(layout, lambda: None)
        # The next load must find the copy untouched by what the library did to its tensors in place.
        for module in model.modules:
            module.unload()
        del blocks, model

# The least recently used copy goes, one that is in use or too large does not.
layouts = []
for number in range(3):
    model = new(write_tiny(place / f"m{number}", quantization="exl2", seed=number))
    model.set_device_map([99999])
    layouts.append(lay_out([model]))
size = layouts[0].size
copies = HostCopies(size * 2 + 10)
assert copies.make(layouts[0], lambda: None) and copies.make(layouts[1], lambda: None)
assert copies.find(layouts[0])  # now the most recently used
assert copies.make(layouts[2], lambda: None)
assert copies.find(layouts[1]) is None and copies.find(layouts[0]) and copies.find(layouts[2])
assert copies.make(layouts[1], lambda: None, keep=(layouts[0].key, layouts[2].key)) is None
assert copies.used_bytes() == 2 * size
assert copies.limit(size, keep=(layouts[0].key,)) == size and copies.find(layouts[0])
assert copies.make(layouts[1], lambda: None, keep=(layouts[0].key,)) is None
assert copies.limit(0, keep=(layouts[0].key,)) == size, "what is in use stays"
assert copies.limit(size * 2 + 10) == size and copies.make(layouts[1], lambda: None)
assert copies.limit(size) == size and copies.find(layouts[1]) and copies.find(layouts[0]) is None
assert HostCopies(size - 1).make(layouts[0], lambda: None) is None
copies.clear()
assert copies.used_bytes() == 0

# A file that ends too early is an error on the thread that loads, and nothing hangs.
folder = write_tiny(place / "cut", quantization="exl2")
model = new(folder)
model.set_device_map([99999])
layout = lay_out([model])
os.truncate(folder / "output.safetensors", (folder / "output.safetensors").stat().st_size - 5000)
try:
    Feeder().load(layout, None, lambda done, total: None)
    raise AssertionError("a file that was cut off was loaded")
except OSError as error:
    assert "ended while it was read" in str(error)
try:
    HostCopies(1 << 30).make(layout, lambda: None)
    raise AssertionError("a file that was cut off was copied")
except OSError:
    pass
assert [t for t in threading.enumerate() if t.name.startswith(("read", "feed"))] == []

# What is derived is what the library derives.
random = np.random.default_rng(0)
for inputs in (64, 1536):
    bits, groups, row, left = itertools.cycle((8, 6, 5, 4, 3, 2)), [], 0, inputs
    while left:
        rows, b = 32, next(bits)
        groups += [b, row]
        row, left = row + rows * b // 32, left - rows
    invperm, table = random.permutation(inputs).astype(np.int32), np.array(groups, np.int16)
    def made(kind, count):
        raw = derive(Piece("x", f"k.#{kind}", 0, 0, 2 * count, torch.int16, (count,), kind), invperm, table, row)
        return torch.frombuffer(bytearray(raw), dtype=torch.int16)
    assert torch.equal(made("map", 2 * inputs), ext.make_group_map_py(torch.from_numpy(table), row))
    assert torch.equal(made("perm", inputs), torch.argsort(torch.from_numpy(invperm)).short())
    assert torch.equal(made("invperm", inputs), torch.from_numpy(invperm).short())
words, index = torch.randint(-2**31, 2**31 - 1, (9, 512), dtype=torch.int32), torch.randperm(512).int()
a, b = words.clone(), words.clone()
remap(a, index.short()); ext.ext_c.tensor_remap(b, index)
assert torch.equal(a, b)
nibbles = words[:, :64].clone()
a, b = nibbles.clone(), nibbles.clone()
remap_4bit(a, index); ext.ext_c.tensor_remap_4bit(b, index)
assert torch.equal(a, b)
print("all equal")
"""


def test_every_way_to_load_gives_the_tensors_that_the_library_loads(exllama_python: str, tmp_path: Path) -> None:
    path = os.pathsep.join((str(STAND_IN), str(STAND_IN / "v2")))
    done = subprocess.run(
        [exllama_python, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=110,
        check=False, env={**os.environ, "PYTHONPATH": path, "EXLLAMA_NO_XFORMERS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("all equal")
