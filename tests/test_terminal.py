"""The commands download, models and plan: with a hub on loopback, files and presets, and as a user starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.downloads import model
from modules.advice import INSTALLABLE, READY, Place
from modules.downloads import Downloads, Options
from modules.errors import ModelFilesDamaged, ModelNotDownloaded, PresetNotFound
from modules.library import Library
from modules.planner import Card
from modules.presets import Presets
from modules.terminal import Asked, Terminal

from . import nvml
from .conftest import DEMO, ROOT
from .hub_server import Hub

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "quantization_config": {"quant_method": "exl2", "bits": 5.0, "head_bits": 6},
}  # fmt: skip
PRESET = """title = "Mine"
task = "assistant"
[[variants]]
title = "For a card"
engine = "exllamav2"
repo = "maker/model-exl2"
revision = "4_25"
bpw = 4.25
size_bytes = 200000
shape = { layers = 2, hidden = 256, heads = 4, kv_heads = 2, head_dim = 64, intermediate = 512, vocab = 512 }
[[variants]]
title = "For a processor"
engine = "llamacpp"
repo = "maker/other"
file = "other.gguf"
bpw = 8.5
size_bytes = 2000000
shape = { layers = 2, hidden = 256, heads = 4, kv_heads = 2, head_dim = 64, intermediate = 512, vocab = 512 }
"""


@pytest.fixture
def hub():
    with Hub() as server:
        server.add("maker/model-exl2", {"README.md": b"branches"})
        server.add("maker/model-exl2", {**model(), "config.json": json.dumps(CONFIG).encode()}, "4_25")
        server.add("maker/gguf", {"x.gguf": b"GGUF" * 100})
        yield server


@pytest.fixture
def terminal(hub, tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.toml").write_text(PRESET)
    library = Library(tmp_path / "models", tmp_path)
    quick = Options(reserve_bytes=0, tries=2, backoff_s=0.02, timeout_s=2.0, cache_dir=os.devnull)
    downloads = Downloads(library, hub.endpoint, lambda: None, quick, None)
    written: list[str] = []
    made = Terminal(Presets([tmp_path / "presets"]), library, downloads, written.append)
    made.said = lambda: "".join(written)  # type: ignore[attr-defined]
    yield made
    downloads.close()


def place(*gb: int) -> Place:
    engines = {"llamacpp": READY, "exllamav2": READY, "exllamav3": INSTALLABLE}
    return Place(tuple(Card(size << 30) for size in gb), 16 << 30, engines)


def test_a_preset_is_downloaded_in_the_variant_that_fits_the_card(terminal, tmp_path: Path) -> None:
    assert terminal.download(Asked("mine"), False, place(8)) == 0
    assert "For a card" in terminal.said()
    assert (tmp_path / "models" / "model-exl2-4_25" / "config.json").is_file()
    assert terminal.models() == 0
    assert "ready" in terminal.said()


def test_without_a_card_the_variant_for_the_processor_is_taken(terminal) -> None:
    assert terminal.download(Asked("mine"), False, place()) == 1  # it is not on this hub
    assert "For a processor" in terminal.said()
    assert "maker/other" in terminal.said()


def test_a_repository_is_planned_by_its_metadata_alone(terminal, hub) -> None:
    assert terminal.plan(Asked("maker/model-exl2@4_25", context=4096, cache="Q8"), place(12)) == 0
    said = terminal.said()
    assert "32 layers of 4096, EXL2 at 5.00 bpw, cache mode Q8, context size 4,096" in said
    assert "This card: Fits" in said
    assert not any(asked.path.endswith(".safetensors") for asked in hub.log)


def test_plans_as_json_for_programs(terminal) -> None:
    assert terminal.plan(Asked("mine", as_json=True), place()) == 0
    figures = json.loads(terminal.said())
    assert figures["title"] == "For a card"
    assert figures["verdicts"]["24 GB"] == "fits"
    assert sum(p["bytes"] for p in figures["parts"] if p["where"] == "gpu") == figures["needs_bytes"]


def test_two_cards_are_judged_one_by_one_and_a_context_that_fits_is_named(terminal) -> None:
    terminal.plan(Asked("maker/model-exl2@4_25", context=8192), place(24, 2))
    said = terminal.said()
    assert "Card 0: Fits" in said
    assert "Card 1: " in said


def test_files_are_planned_by_their_headers(terminal, tmp_path: Path) -> None:
    assert terminal.plan(Asked(str(DEMO / "coding-q8_0.gguf")), place()) == 0
    assert "4 layers of 128, GGUF" in terminal.said()
    with pytest.raises(ModelNotDownloaded, match=r"config\.json"):
        terminal.plan(Asked(str(tmp_path)), place())


def test_names_that_mean_nothing_are_errors_that_help(terminal) -> None:
    with pytest.raises(PresetNotFound) as caught:
        terminal.plan(Asked("main"), place())
    assert "mine" in str(caught.value)
    assert "OWNER/NAME@REVISION" in caught.value.hint
    with pytest.raises(ModelFilesDamaged, match="does not say in its header"):
        terminal.plan(Asked("maker/gguf", file="x.gguf"), place())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "coding", "--context", "8192", "--cache", "Q4"), 0, "take Q6 or Q8"),
        (("models",), 0, "Qwen2.5-Coder 32B"),
        (("plan", "nonsense"), 1, "nearest name"),
        (("download", "nonsense"), 1, "nearest name"),
    ],
)
def test_as_a_user_types_it(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py"), *arguments, "--data-dir", str(tmp_path)], capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr


def test_the_plan_of_a_person_is_for_the_cards_of_the_machine(tmp_path: Path) -> None:
    """A 4090 that is free, and a 3060 of which another program holds 9 of 12 GB."""
    stand_in = nvml.environment(nvml.build(tmp_path / "lib"), nvml.two_cards(tmp_path / "plan").file)
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py"), "plan", "coding", "--data-dir", str(tmp_path)], capture_output=True,
        text=True, timeout=60, env={**os.environ, **stand_in}, check=True,
    )  # fmt: skip
    first, second = re.findall(r"^Card \d: (.+)$", done.stdout, re.MULTILINE)
    assert not first.startswith("Does not fit") and second.startswith("Does not fit")


def test_repositories_are_planned_and_downloaded_by_a_fresh_program(hub, tmp_path: Path) -> None:
    """The hub library is imported late, and its parts are there only for who asks for them."""
    variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}

    def run(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "app.py"), *arguments, "--data-dir", str(tmp_path / "data")]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
        return f"{done.returncode} {done.stdout} {done.stderr}"

    assert run("plan", "maker/model-exl2@4_25").startswith("0 maker/model-exl2@4_25")
    assert "no revision nowhere" in run("plan", "maker/model-exl2@nowhere")
    said = run("download", "maker/model-exl2@4_25")
    assert said.startswith("0 ") and "done" in said
    assert (tmp_path / "data" / "models" / "model-exl2-4_25" / "config.json").is_file()
