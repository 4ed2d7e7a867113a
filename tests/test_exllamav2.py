"""The ExLlamaV2 adapter with the real library and no card: tests/exllama_on_cpu stands in for CUDA at the lowest level.

What only a card can show (kernels, streams, speed, real memory) is in tests/gpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from modules.engines.exllama import widened
from modules.errors import (
    DoesNotFit,
    InvalidRequest,
    LoadError,
    ModelFilesUnsafe,
    ModelNotDownloaded,
    TurntableError,
)
from modules.messages import EngineSpec, Message, Sampling
from modules.process import EngineKind, EngineProcess, Limits

from .conftest import DEMO, EXLLAMA_PYTHON, LLAMA, ROOT, eventually, in_thread
from .contract import Contract, Subject, ask
from .demo_answers import ASKS, answers, expected
from .gpu import scenarios
from .gpu.scenarios import Rig, Scenarios

STAND_IN = ROOT / "tests" / "exllama_on_cpu"
MAKE_TINY = (
    "import sys; from pathlib import Path; from modules.engines.tiny import write_tiny\n"
    "for kind in ('fp16', 'exl2', 'gptq'): write_tiny(Path(sys.argv[1]) / kind, quantization=kind)"
)


def on_cpu(vram_bytes: int = 4 << 30, **environment: str) -> EngineKind:
    given = {
        "PYTHONPATH": os.pathsep.join((str(STAND_IN), str(STAND_IN / "v2"))),
        "TURNTABLE_TEST_VRAM_BYTES": str(vram_bytes), "TURNTABLE_PINNED_BYTES": "0",
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    return EngineKind(
        "exllamav2", EXLLAMA_PYTHON, keeps_process=True, memory="vram", environment=tuple(sorted(given.items()))
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models of tiny.py, one for each quantization."""
    if not Path(EXLLAMA_PYTHON).is_file():
        pytest.skip("no environment with PyTorch and the ExLlama libraries: ./test.sh makes .venv-exllama")
    place = tmp_path_factory.mktemp("models")
    subprocess.run([EXLLAMA_PYTHON, "-c", MAKE_TINY, str(place)], cwd=ROOT, check=True, timeout=60)
    return place


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled demo models as FP16 checkpoints that ExLlamaV2 reads."""
    if not Path(EXLLAMA_PYTHON).is_file():
        pytest.skip("no environment with PyTorch and the ExLlama libraries: ./test.sh makes .venv-exllama")
    place = tmp_path_factory.mktemp("demo")

    def convert(name: str) -> Path:
        folder = place / name
        if not folder.exists():
            command = [EXLLAMA_PYTHON, "-m", "tests.exllama_on_cpu.models", name, str(folder)]
            subprocess.run(command, cwd=ROOT, check=True, timeout=100)
        return folder

    return convert


def spec_of(folder: Path, **more: object) -> EngineSpec:
    return dataclasses.replace(EngineSpec("exllamav2", str(folder), context=1024), **more)  # type: ignore[arg-type]


class TestFP16(Contract):
    """An FP16 checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        return Subject(on_cpu(), spec_of(models / "fp16"), unload_leaves_bytes=0)


class TestEXL2(Contract):
    """An EXL2 checkpoint with a quantized cache, loaded from a page-locked copy where there is one."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        kind = on_cpu(TURNTABLE_PINNED_BYTES=str(1 << 30))
        return Subject(kind, spec_of(models / "exl2", cache_mode="Q6"), unload_leaves_bytes=0)


class TestNgram(Contract):
    """Speculation from the text itself."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        return Subject(on_cpu(), spec_of(models / "exl2", options=(("draft", "ngram"),)), unload_leaves_bytes=0)


class TestDraft(Contract):
    """Speculation by a draft model; here the model itself, so every guess is right."""

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, models: Path) -> Subject:
        folder = models / "fp16"
        options = (("draft_model", str(folder)), ("draft_tokens", "3"))
        return Subject(on_cpu(), spec_of(folder, options=options), unload_leaves_bytes=0)


@pytest.fixture
def begin():
    made = []

    def make(kind: EngineKind | None = None) -> EngineProcess:
        made.append(EngineProcess(kind or on_cpu(), Limits(load_s=60, stall_s=60)))
        return made[-1]

    yield make
    for process in made:
        process.stop()


def quiet(event: object) -> None:
    pass


def test_the_self_test_runs_and_passes(exllama_python: str) -> None:
    assert len(scenarios.self_test(on_cpu())) >= 10


def test_the_self_test_fails_with_the_attention_that_the_library_has(exllama_python: str) -> None:
    program = (
        "import modules.engines.exllamav2 as adapter, modules.engines.selftest as selftest, sys\n"
        "from exllamav2.attn import ExLlamaV2Attention\n"
        "adapter.correct = lambda attention: None\n"
        "sys.exit(selftest.run('exllamav2', sys.stdout))"
    )
    done = subprocess.run(
        [exllama_python, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False,
        env={**os.environ, **dict(on_cpu().environment)},
    )  # fmt: skip
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 1
    assert any("later tokens" in check["check"] for check in checks if not check["ok"])


def test_a_copy_in_page_locked_memory_gives_the_same_model(begin, models: Path) -> None:
    process = begin(on_cpu(TURNTABLE_PINNED_BYTES=str(1 << 30)))
    spec = spec_of(models / "exl2")
    process.load(spec, quiet)
    before = ask(process, "Tell me something.").text
    eventually(lambda: any("page-locked copy ready" in line for line in process.log), 20)
    for _ in range(3):
        assert process.unload() == 0
        process.load(spec, quiet)
        assert ask(process, "Tell me something.").text == before


def test_a_tokenizer_that_changed_on_the_disk_is_read_again(begin, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "fp16", folder)
    process, counts = begin(), []
    for added in ((), ("hello w300",)):
        table = json.loads((folder / "tokenizer.json").read_text())
        table["added_tokens"] += [
            {"id": 310, "content": text, "special": False, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False} for text in added
        ]  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(table))
        for one in (process, begin()):
            one.load(spec_of(folder), quiet)
            counts.append(one.count_tokens(("hello w300",)))
    assert counts[0] == counts[1] != counts[2] == counts[3] == (1,)


def test_a_cancel_that_overtakes_its_answer_is_not_lost(begin, models: Path) -> None:
    process = begin()
    process.load(spec_of(models / "exl2"), quiet)
    words = ("some words " * 200,) * 200
    counting = in_thread(lambda: process.count_tokens(words))
    time.sleep(0.05)
    heard = []
    warm = Sampling(temperature=1.5, seed=0, max_tokens=900)
    answering = in_thread(lambda: heard.append(ask(process, "Tell me.", "b", sampling=warm)))
    time.sleep(0.02)
    process.cancel("b")
    answering.join(60)
    counting.join(60)
    assert heard[0].end.reason == "stopped"


def test_without_flash_attn_one_answer_runs_at_a_time_whatever_the_preset_says(begin, models: Path) -> None:
    assert begin().load(spec_of(models / "exl2", parallel=4), quiet).at_once == 1


def test_a_load_can_be_cancelled_wherever_it_reports_and_leaves_nothing(models: Path) -> None:
    program = "tests.exllama_on_cpu.cancelled_loads"
    done = subprocess.run(
        [EXLLAMA_PYTHON, "-m", program, "exllamav2", "ExLlamaV2Engine", str(models / "fp16")], cwd=ROOT, timeout=100,
        capture_output=True, text=True, check=False, env={**os.environ, **dict(on_cpu().environment)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-2]) >= 2


def test_gptq_is_read_with_its_order_of_inputs(begin, models: Path) -> None:
    process = begin()
    process.load(spec_of(models / "gptq"), quiet)
    said = ask(process, "Hi").text
    assert said
    assert process.unload() == 0
    process.load(spec_of(models / "gptq"), quiet)
    assert ask(process, "Hi").text == said


def test_a_model_that_does_not_fit_says_so_and_the_next_one_loads(begin, models: Path) -> None:
    process = begin(on_cpu(vram_bytes=24 << 20))
    with pytest.raises(DoesNotFit, match="does not fit"):
        process.load(spec_of(models / "exl2", options=(("cache_size", str(1 << 20)),)), quiet)
    process.load(spec_of(models / "exl2"), quiet)
    assert ask(process, "Hi").text


class TestSwaps(Scenarios):
    """The scenarios for a card on one of 40 MiB, shortly."""

    @pytest.fixture(scope="class")
    @classmethod
    def rig(
        cls, models: Path, demo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Rig]:
        place = tmp_path_factory.mktemp("scenarios")
        small = scenarios.small_models([models / "exl2", models / "fp16"], spec_of(models), ("FP16", "Q4"))
        sees = shutil.copytree(demo("vision"), place / "sees")
        options = scenarios.allow_large_pictures(sees, 1120)
        yield Rig(
            on_cpu(40 << 20, TURNTABLE_PINNED_BYTES=str(1 << 30)), small,
            spec_of(scenarios.write_wide(place / "wide")),
            spec_of(models / "exl2", options=(("cache_size", str(1 << 20)),)), spec_of(sees, options=options), 1120,
            EngineProcess.measure, lambda left: contextlib.nullcontext(), swaps=5, run=8, copies=True,
        )  # fmt: skip


def test_the_program_that_fills_a_card_leaves_what_it_is_told(models: Path) -> None:
    first = "import pretend_cuda; pretend_cuda.install()"
    with scenarios.filled(on_cpu(64 << 20), 5 << 20, first=first) as (taken, free):
        assert (taken, free) == (59 << 20, 5 << 20)


@pytest.mark.parametrize("name", ASKS)
def test_the_demo_models_answer_as_they_do_in_llama_cpp(begin, demo: Callable[[str], Path], name: str) -> None:
    process = begin()
    process.load(spec_of(demo(name)), quiet)
    assert answers(process, name) == expected(name)


def test_a_card_without_the_flash_kernel_answers_the_same_with_bounded_scores(
    begin, demo: Callable[[str], Path], tmp_path: Path
) -> None:
    process = begin(on_cpu(TURNTABLE_TEST_CAPABILITY="7.5"))
    process.load(spec_of(demo("assistant")), quiet)
    assert answers(process, "assistant") == expected("assistant")
    process.unload()
    process.load(spec_of(demo("vision")), quiet)
    blue = drawn(tmp_path, "a.png", ("square", "blue", (10, 10, 40, 40)))
    said = ask(process, (Message("user", "Describe the image.", (blue,)),)).text
    assert said == "I see a blue square in the top left corner."


def drawn(place: Path, name: str, *shapes: tuple[str, str, tuple[int, int, int, int]]) -> str:
    picture = Image.new("RGB", (112, 112), "white")
    pen = ImageDraw.Draw(picture)
    for form, colour, box in shapes:
        (pen.rectangle if form == "square" else pen.ellipse)(box, fill=colour)
    picture.save(place / name)
    return str(place / name)


def test_the_demo_that_sees_answers_as_it_does_in_llama_cpp(begin, demo, tmp_path: Path) -> None:
    blue = ("square", "blue", (10, 10, 40, 40))
    pictures = [
        drawn(tmp_path, "a.png", blue), drawn(tmp_path, "b.png", ("circle", "red", (70, 70, 100, 100))),
        drawn(tmp_path, "c.png", ("circle", "green", (10, 70, 40, 100)), ("square", "red", (70, 10, 100, 40))),
    ]  # fmt: skip
    questions = ("Describe the image.", "How many shapes are there?")
    asked = [(Message("user", question, (path,)),) for path in pictures for question in questions]
    answers = []
    for kind, spec in (
        (LLAMA, EngineSpec("llamacpp", str(DEMO / "vision-q8_0.gguf"), str(DEMO / "vision-mmproj-q8_0.gguf"), 1024,
                           options=(("image_tokens", "16"),))),
        (on_cpu(), spec_of(demo("vision"))),
    ):  # fmt: skip
        process = begin(kind)
        process.load(spec, quiet)
        answers.append([ask(process, turn, sampling=Sampling(temperature=0.0, max_tokens=40)).text for turn in asked])
    assert answers[1] == answers[0]
    assert answers[1][0] == "I see a blue square in the top left corner."


def test_a_tower_in_bf16_has_a_page_locked_copy_too_and_sees_the_same(begin, demo, tmp_path: Path) -> None:
    raw = (demo("vision") / "model.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {entry["dtype"] for name, entry in head.items() if name.startswith("visual.")} == {"BF16"}
    process = begin(on_cpu(TURNTABLE_PINNED_BYTES=str(1 << 30)))
    asked = (Message("user", "Describe the image.", (drawn(tmp_path, "a.png", ("square", "blue", (10, 10, 40, 40))),)),)
    for _ in range(2):
        process.load(spec_of(demo("vision")), quiet)
        assert ask(process, asked).text == "I see a blue square in the top left corner."
        eventually(lambda: any("page-locked copy ready" in line for line in process.log), 20)
        assert process.unload() == 0


@pytest.mark.parametrize("max_pixels", [112 * 112, 1280 * 28 * 28])
@pytest.mark.parametrize("size", [(8, 8), (10, 3000), (16384, 8), (16384, 90), (400, 20), (640, 480)])
def test_a_picture_is_widened_until_its_sides_are_large_enough_at_any_size(size: tuple, max_pixels: int) -> None:
    made = widened(Image.new("RGB", size, "red"), max_pixels)
    width, height = made.size
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    assert scale * min(width, height) >= 32 and max(width, height) / min(width, height) < 200
    assert (made.size == size) == (size == (640, 480) or (size, max_pixels) == ((16384, 90), 1280 * 28 * 28))
    assert made.getpixel((width // 2, height // 2)) == (255, 0, 0)


def test_small_and_narrow_pictures_are_seen_and_leave_the_conversation_whole(begin, demo, tmp_path: Path) -> None:
    process = begin()
    process.load(spec_of(demo("vision")), quiet)
    for number, size in enumerate([(8, 8), (8, 400), (3000, 10), (16384, 8)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", size, "red").save(path)
        assert ask(process, (Message("user", "Describe the image.", (str(path),)),)).text, size


def test_a_picture_is_read_once_and_its_turn_is_not_read_again(begin, demo, tmp_path: Path) -> None:
    process = begin()
    process.load(spec_of(demo("vision")), quiet)
    first = (Message("user", "Describe the image.", (drawn(tmp_path, "a.png", ("circle", "red", (50, 50, 80, 80))),)),)
    heard = ask(process, first)
    second = (*first, Message("assistant", heard.text), Message("user", "How many shapes are there?"))
    assert ask(process, second).end.counts.cached >= 16
    with pytest.raises(TurntableError):
        ask(process, (Message("user", "What?", (str(tmp_path / "gone.png"),)),))
    assert ask(process, first).text == heard.text


def test_a_model_that_does_not_see_refuses_pictures(begin, models: Path, tmp_path: Path) -> None:
    process = begin()
    process.load(spec_of(models / "fp16"), quiet)
    with pytest.raises(InvalidRequest, match="cannot look at pictures"):
        ask(process, (Message("user", "What?", (drawn(tmp_path, "a.png"),)),))


def test_a_lora_changes_the_answers_as_much_as_its_scale_says(begin, models: Path, tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path; from modules.engines.tiny import write_safetensors\n"
        "random, pre = np.random.default_rng(1), 'base_model.model.model.layers.0.self_attn.o_proj'\n"
        "a, b = random.normal(0, 1, (8, 256)), random.normal(0, 1, (256, 8))\n"
        "tensors = {f'{pre}.lora_A.weight': ('F16', a), f'{pre}.lora_B.weight': ('F16', b)}\n"
        "write_safetensors(Path(sys.argv[1]), tensors)"
    )
    file = tmp_path / "adapter_model.safetensors"
    subprocess.run([EXLLAMA_PYTHON, "-c", program, str(file)], cwd=ROOT, check=True, timeout=60)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16}))
    said = {}
    for kind in ("fp16", "exl2"):
        for scale in (None, 0.0, 1.0):
            options = () if scale is None else (("loras", json.dumps([[str(tmp_path), scale]])),)
            process = begin()
            process.load(spec_of(models / kind, options=options), quiet)
            said[scale] = ask(process, "Hi").text
            assert process.unload() == 0
        assert said[0.0] == said[None]
        assert said[1.0] != said[None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((("nonsense", "1"),), "no option 'nonsense'"),
        ((("chunk_size", "100"),), "multiple of 256"),
        ((("chunk_size", "many"),), "makes no sense"),
        ((("draft", "magic"),), "can only be ngram"),
        ((("draft_tokens", "99"),), "from 1 to 8"),
        ((("gpu_split", "a,b"),), "gigabytes"),
        ((("tensor_parallel", "1"),), "flash-attn"),
        ((("loras", '[["/nowhere", 1.0]]'),), "No LoRA"),
    ],
)
def test_an_option_that_cannot_work_is_an_error_in_words(begin, models: Path, options: tuple, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        begin().load(spec_of(models / "exl2", options=options), quiet)


def edited(folder: Path, place: Path, **config: object) -> Path:
    """A copy of a model with other values in its config.json."""
    shutil.copytree(folder, place)
    said = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**said, **config}))
    return place


def test_a_draft_model_is_judged_as_a_model_is(begin, models: Path, tmp_path: Path) -> None:
    unknown = edited(models / "fp16", tmp_path / "a", architectures=["Llama4ForCausalLM"], auto_map={"AutoModel": "x"})
    larger = edited(models / "fp16", tmp_path / "b", vocab_size=384)
    pickle = edited(models / "fp16", tmp_path / "c")
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    process = begin()
    for folder, error, words in (
        (unknown, ModelFilesUnsafe, "Llama4ForCausalLM brings Python code"), (pickle, ModelFilesUnsafe, "pickles"),
        (larger, LoadError, "larger vocabulary"), (tmp_path / "gone", ModelNotDownloaded, "not there"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            process.load(spec_of(models / "exl2", options=(("draft_model", str(folder)),)), quiet)
    # What only an answer needs it may lack, and what other tools write is mended for it too.
    rope = {"type": "linear", "rope_type": "linear", "factor": 1.0}
    plain = edited(models / "fp16", tmp_path / "d", eos_token_id=None, rope_scaling=rope)
    (plain / "tokenizer_config.json").unlink()
    process.load(spec_of(models / "fp16"), quiet)
    alone = ask(process, "Hi").text
    process.unload()
    process.load(spec_of(models / "fp16", options=(("draft_model", str(plain)),)), quiet)
    assert ask(process, "Hi").text == alone


def test_a_lora_with_a_pickle_is_refused(begin, models: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"x")
    options = (("loras", json.dumps([[str(tmp_path), 1.0]])),)
    with pytest.raises(ModelFilesUnsafe, match="pickle"):
        begin().load(spec_of(models / "exl2", options=options), quiet)
