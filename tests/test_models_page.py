"""The Models page without a browser: what its parts draw and answer, against a hub on loopback and real presets."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

import pytest

from modules import advice
from modules.advice import INSTALLABLE, READY, Place
from modules.assistant import Assistant
from modules.chats import Chats
from modules.downloads import Downloads, Options
from modules.errors import InvalidRequest, ModelFilesError, PresetNotFound, SourceNotFound
from modules.hardware import Card as SeenCard
from modules.hardware import Clocks, Cpu, Disk, Driver, Machine, Memory, System
from modules.hub import Ref
from modules.images import Images
from modules.library import Library
from modules.lookup import Lookup
from modules.planner import Card
from modules.presets import Presets
from modules.shelf import Shelf
from modules.ui.models import COLUMNS, ModelsPanel, shell
from modules.ui.plan import Planning
from modules.ui.shelf import ShelfPanel

from .conftest import DEMO, LLAMA, ROOT
from .hub_server import Hub

GIB = 1 << 30
ENGINES = {"llamacpp": READY, "exllamav2": READY, "exllamav3": INSTALLABLE}
HERE = Place((), 16 * GIB, {"llamacpp": READY, "exllamav2": INSTALLABLE, "exllamav3": INSTALLABLE})
BIG = "RTX 4090, 24 GB"
PICKS = ("Phi-4 14B, 6.5 bpw", "Qwen2.5-VL 7B, 8.0 bpw", "Qwen2.5-Coder 32B, 4.25 bpw", "FuseO1 32B Preview, 4.25 bpw")
CONFIG = (
    b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, '
    b'"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, '
    b'"max_position_embeddings": 8192, "quantization_config": {"quant_method": "exl2", "bits": 4.25}}'
)
HOSTILE = """title = "<script>x</script>"
task = "assistant"
[[variants]]
title = '<b>" onclick=x'
engine = "llamacpp"
path = "/nowhere/x.gguf"
"""


@pytest.fixture
def hub():
    with Hub() as server:
        server.add("maker/model-exl2", {"README.md": b"branches"})
        files = {"config.json": CONFIG, "tokenizer.json": b"{}", "output.safetensors": weights()}
        server.add("maker/model-exl2", files, "4_25")
        demo = (DEMO / "assistant-q8_0.gguf").read_bytes()
        tower = (DEMO / "vision-mmproj-q8_0.gguf").read_bytes()
        files = {"small-Q8_0.gguf": demo, "small-Q4_K_M.gguf": demo[:900_000], "mmproj-F16.gguf": tower}
        server.add("maker/small-GGUF", files)
        yield server


def weights() -> bytes:
    head = b'{"t":{"dtype":"U8","shape":[200000],"data_offsets":[0,200000]}}'
    return len(head).to_bytes(8, "little") + head + bytes(200_000)


class Page:
    """The objects behind the page."""

    def __init__(self, tmp_path: Path, loader, endpoint: str) -> None:
        (tmp_path / "presets").mkdir(exist_ok=True)
        self.place = HERE
        self.changes: list[str] = []
        self.library = Library(tmp_path / "models", DEMO)
        presets = Presets([ROOT / "presets", tmp_path / "presets"])
        self.assistant = Assistant(
            presets, self.library, loader, Chats(tmp_path / "chats.db"), Images(tmp_path / "images"),
            {"llamacpp": LLAMA},
        )  # fmt: skip
        quick = Options(reserve_bytes=0, tries=2, backoff_s=0.02, timeout_s=2.0, cache_dir=os.devnull)
        self.downloads = Downloads(self.library, endpoint, lambda: None, quick)
        self.models = ModelsPanel(self.assistant, lambda: self.place, lambda: self.changes.append("models"))
        self.planning = Planning(self.assistant, Lookup(presets, self.downloads), self.models.place)
        self.shelf = Shelf(self.library, presets)
        self.shelf_panel = ShelfPanel(self.shelf, lambda: self.changes.append("shelf"))


@pytest.fixture
def page(tmp_path, make_loader, hub):
    made = Page(tmp_path, make_loader(8 << 30), hub.endpoint)
    yield made
    made.downloads.close()
    made.shelf.close()
    made.assistant.close()


def rows(text: str) -> list[dict[str, str]]:
    """The attributes of each variant's row."""
    return [
        {key: html.unescape(value) for key, value in re.findall(r'data-(\w+)="([^"]*)"', tag)}
        for tag in re.findall(r'<tr class="variant[^>]*>', text)
    ]


def drawn_rows(text: str) -> list[str]:
    return re.findall(r'<tr class="variant.*?</tr>', text)


# The list -------------------------------------------------------------------------------------------


def test_every_variant_of_every_preset_has_a_row_with_its_verdict(page) -> None:
    text = page.models.html()
    found = rows(text)
    assert len(found) == sum(len(preset.variants) for preset in page.assistant.presets.list())
    assert {row["preset"] for row in found} == {"assistant", "vision", "coding", "reasoning"}
    assert "no NVIDIA card" in text
    for row in found:
        assert float(row["needs"]) > 0
        assert (row["fits"] == "1") == (int(row["spare"]) >= 0), row
    assert {row["fits"] for row in found} == {"0", "1"}
    assert all(f'data-sort="{by}"' in text for _, by in COLUMNS if by)


def test_each_task_gets_one_recommendation_and_says_what_answers_now(page) -> None:
    text = page.models.html()
    assert text.count('<section class="task"') == 4
    assert text.count(">recommended<") == 4
    assert text.count("Answers now: Demo") == 4
    assert text.count('class="get main"') == 4


def test_a_page_may_judge_for_another_machine(page) -> None:
    text = page.models.ask({"place": BIG})["html"]
    recommended = [html.unescape(name) for name in re.findall(r'<p class="best">(.*?) <span', text)]
    assert tuple(recommended) == PICKS
    assert "Answers now" not in text
    assert sum(row["fits"] == "1" for row in rows(text)) > sum(row["fits"] == "1" for row in rows(page.models.html()))
    for nonsense in ("RTX 9999", "../x", "<b>"):
        with pytest.raises(InvalidRequest, match="no machine"):
            page.models.ask({"place": nonsense})


def test_a_bar_is_the_card_and_shows_what_others_hold_and_what_is_too_much(page) -> None:
    page.place = Place((Card(24 * GIB, 6 * GIB, 2 * GIB),), 16 * GIB, ENGINES)
    text = page.models.html()
    assert "21.5 GB of 25.8 GB of VRAM free, after the loaded models are unloaded" in text
    assert "Other programs 4.3 GB" in text and '<i class="others"' in text
    for part in re.findall(r'<span class="parts"[^>]*>(.*?)</span>', text):
        assert sum(float(width) for width in re.findall(r"width:([\d.]+)%", part)) <= 100.1
    beyond = [row for row in drawn_rows(text) if 'data-fits="0"' in row and "VRAM" in row]
    assert beyond and all("<u style=" in row for row in beyond)


def test_what_is_on_the_disk_and_what_is_damaged_is_said(page, tmp_path) -> None:
    variant = next(v for v in page.assistant.presets.get("assistant").variants if v.engine == "llamacpp" and v.repo)
    folder = page.library.folder(variant)
    folder.mkdir(parents=True)
    (folder / variant.file).write_bytes(b"GGUF" + bytes(100))
    row = next(row for row in drawn_rows(page.models.html()) if html.escape(variant.title) in row)
    assert 'data-here="1"' in row and ">damaged<" in row and 'data-action="start"' not in row


def test_a_preset_that_is_broken_or_hostile_is_shown_as_text(page, tmp_path) -> None:
    (tmp_path / "presets" / "wrong.toml").write_text("title = 3\n")
    (tmp_path / "presets" / "evil.toml").write_text(HOSTILE)
    text = page.models.html() + shell(page.assistant)
    assert '<div class="oops"><b>wrong</b>' in text
    assert "<script>" not in text and " onclick=x" not in re.sub(r"&quot;[^<>]*", "", text)
    assert "&lt;script&gt;" in text and ">not known<" in text


def test_the_only_button_of_the_list_looks_again(page) -> None:
    page.models.act("", "refresh")
    assert page.changes == ["models"]
    with pytest.raises(InvalidRequest):
        page.models.act("", "delete")


# The plan of one model ---------------------------------------------------------------------------------


def of(page, preset: str, title: str) -> str:
    return f"{preset}/" + next(v.id for v in page.assistant.presets.get(preset).variants if v.title == title)


def figure(answer: dict, name: str) -> float:
    found = re.search(rf"{name} <b>([\d.]+) GB", answer["html"])
    assert found, answer["html"]
    return float(found[1])


def test_a_plan_moves_with_context_cache_mode_and_bits(page) -> None:
    coder = of(page, "coding", PICKS[2])
    plain = page.planning.plan({"of": coder, "place": BIG})
    form = plain["form"]
    assert plain["title"] == PICKS[2] and "32.8B parameters · 64 layers · ExLlamaV2 · apache-2.0" in plain["about"]
    assert (form["context"], form["cache"], form["bit"]) == (32768, "Q6", "4.25")
    assert form["contexts"] == sorted(form["contexts"]) and form["contexts"][-1] == 32768
    short = page.planning.plan({"of": coder, "place": BIG, "context": 8192})
    assert figure(short, "KV cache") < figure(plain, "KV cache") / 3
    assert figure(short, "Weights") == figure(plain, "Weights")
    full = page.planning.plan({"of": coder, "place": BIG, "cache": "FP16"})
    assert figure(full, "KV cache") > 2 * figure(plain, "KV cache")
    assert 'class="verdict no"' in full["html"] and "missing" in full["html"]
    few = page.planning.plan({"of": coder, "place": BIG, "bits": "3"})
    assert figure(few, "Weights") == pytest.approx(figure(plain, "Weights") * 3 / 4.25, rel=0.05)
    assert few["form"]["bit"] == "3"


def test_a_plan_says_what_else_would_fit_and_warns(page) -> None:
    coder = of(page, "coding", PICKS[2])
    answer = page.planning.plan({"of": coder, "place": BIG, "context": 4096, "bits": "6.5"})["html"]
    assert "Does not fit" in answer and 'data-use="bits" data-value="' in answer
    small = {"of": coder, "place": "RTX 4080, 16 GB", "bits": "3", "cache": "FP16"}
    longest = page.planning.plan(small)["html"]
    most = int(re.search(r'data-use="context" data-value="(\d+)"', longest)[1])
    fits = page.planning.plan({**small, "context": most})["html"]
    more = page.planning.plan({**small, "context": most + 256})["html"]
    assert "Does not fit" not in fits and "Does not fit" in more
    assert "4-bit keys" in page.planning.plan({"of": coder, "place": BIG, "cache": "Q4"})["html"]
    assert "tokens per second" in answer and "page-locked copy" in answer
    assert "Other bits are another branch" in answer and "<code>" not in answer and "data-action=" not in answer
    answer = page.planning.plan({"of": coder, "place": BIG, "context": 4096})["html"]
    assert "python app.py download bartowski/Qwen2.5-Coder-32B-Instruct-exl2@4_25" in answer
    assert "hf download bartowski/Qwen2.5-Coder-32B-Instruct-exl2 --revision 4_25" in answer
    assert "context = 4096, cache_mode = &quot;Q6&quot;" in answer


def test_the_bits_that_are_shown_are_those_that_were_asked_for(page) -> None:
    for preset, title in zip(("assistant", "vision", "coding"), PICKS, strict=False):
        one = of(page, preset, title)
        form = page.planning.plan({"of": one, "place": BIG})["form"]
        values = [value for value, _ in form["bits"]]
        assert form["bit"] in values and values == sorted(values, key=float)
        for value in values:
            assert page.planning.plan({"of": one, "place": BIG, "bits": value})["form"]["bit"] == value
        use = page.planning.plan({"of": one, "place": "RTX A6000, 48 GB", "bits": "3"})["html"]
        assert re.search(r'data-use="bits" data-value="([\d.]+)"', use)[1] in values


def test_two_cards_share_what_one_cannot_hold(page) -> None:
    coder = of(page, "coding", PICKS[2])
    one = page.planning.plan({"of": coder, "place": "RTX 3060, 12 GB"})["html"]
    two = page.planning.plan({"of": coder, "place": "2 × RTX 3060, 24 GB"})["html"]
    assert 'class="verdict no"' in one
    assert "Over 2 cards" in two or "missing" in two
    large = page.planning.plan({"of": coder, "place": "2 × RTX 3090, 48 GB", "cache": "FP16"})["html"]
    assert "Over 2 cards" in large and "Does not fit" not in large


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"of": "coding/none"}, InvalidRequest), ({"of": "nobody/x"}, PresetNotFound),
        ({"of": "", "place": "x"}, InvalidRequest), ({"cache": "Q7"}, InvalidRequest),
        ({"bits": "9.9"}, InvalidRequest), ({"context": "many"}, ValueError),
    ],
)  # fmt: skip
def test_nonsense_is_refused(page, said, error) -> None:
    with pytest.raises(error):
        page.planning.plan({"of": of(page, "coding", PICKS[2]), "place": BIG, **said})


def test_a_repository_is_planned_by_its_metadata_only(page, hub) -> None:
    asked = page.planning.look({"repo": "maker/model-exl2"})
    assert asked["html"].count("data-look=") == 1 and 'data-look="maker/model-exl2@4_25"' in asked["html"]
    found = page.planning.look({"repo": "maker/model-exl2@4_25"})
    assert found == {"of": "hub:maker/model-exl2@4_25||", "html": ""}
    plan = page.planning.plan({"of": found["of"], "place": BIG})
    assert "8.0B parameters" in plan["about"] and plan["form"]["contexts"][-1] == 8192
    assert f'data-name="{found["of"]}" data-action="fetch"' in plan["html"]
    assert "python app.py download maker/model-exl2@4_25" in plan["html"]
    assert hub.asked_for("output.safetensors") == []
    # A page that was open before a restart asks about what this server never looked up.
    again = Planning(page.assistant, Lookup(page.assistant.presets, page.downloads), page.models.place)
    assert again.plan({"of": found["of"], "place": BIG}) == plan


def test_a_gguf_repository_offers_its_files_and_its_projector(page) -> None:
    asked = page.planning.look({"repo": "maker/small-GGUF"})["html"]
    assert re.findall(r'data-file="([^"]+)"', asked) == ["small-Q4_K_M.gguf", "small-Q8_0.gguf"]
    assert "mmproj-F16.gguf" in asked
    found = page.planning.look({"repo": "maker/small-GGUF", "file": "small-Q8_0.gguf", "projector": "mmproj-F16.gguf"})
    plan = page.planning.plan({"of": found["of"], "place": "here"})
    assert "llama.cpp" in plan["about"] and 'class="verdict fits"' in plan["html"]
    assert "--file small-Q8_0.gguf --projector mmproj-F16.gguf" in plan["html"]


@pytest.mark.parametrize(
    ("said", "task", "engine"),
    [
        ({"repo": "maker/model-exl2@4_25"}, "assistant", "exllamav2"),
        ({"repo": "maker/small-GGUF", "file": "small-Q8_0.gguf"}, "assistant", "llamacpp"),
        ({"repo": "maker/small-GGUF", "file": "small-Q8_0.gguf", "projector": "mmproj-F16.gguf"}, "vision", "llamacpp"),
    ],
)
def test_a_repository_comes_with_a_preset_to_copy_that_is_valid(page, tmp_path, said, task, engine) -> None:
    found = page.planning.look(said)["of"]
    text = page.planning.plan({"of": found, "place": "here", "context": 2048, "cache": "Q8"})["html"]
    name = re.search(r"Save this as <code>([^<]+)</code>", text)[1]
    copied = html.unescape(re.search(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)[1])
    Path(name).write_text(copied)
    preset = page.assistant.presets.get(Path(name).stem)
    (variant,) = preset.variants
    assert (preset.task, variant.engine, variant.repo) == (task, engine, said["repo"].partition("@")[0])
    assert (variant.context, variant.cache_mode, variant.file) == (2048, "Q8", said.get("file", ""))
    # The downloaded files are found by it, and it is planned as the dialog did.
    downloads = page.downloads
    assert downloads.wait(downloads.start(Ref.of(variant)).id, 30).state == "done"
    assert page.library.folder(variant).is_dir()
    again = page.planning.plan({"of": f"{preset.name}/{variant.id}", "place": "here"})
    assert again["title"] == variant.title


@pytest.mark.parametrize("repo", ["maker/none", "nonsense", "../x", "maker/model-exl2@none", "<b>/x", ""])
def test_what_is_no_repository_is_said(page, repo) -> None:
    with pytest.raises(SourceNotFound):
        page.planning.look({"repo": repo})


def test_only_the_latest_lookups_are_remembered(page, monkeypatch) -> None:
    monkeypatch.setattr("modules.ui.plan.REMEMBERED", 1)
    first = page.planning.look({"repo": "maker/model-exl2@4_25"})["of"]
    page.planning.look({"repo": "maker/small-GGUF", "file": "small-Q8_0.gguf"})
    assert list(page.planning._found) == ["hub:maker/small-GGUF|small-Q8_0.gguf|"]
    assert page.planning.plan({"of": first, "place": BIG})["title"] == "maker/model-exl2@4_25"


# This machine ------------------------------------------------------------------------------------------


def machine(*cards: SeenCard) -> Machine:
    return Machine(
        0.0, Driver("ok"), cards, Cpu("cpu", 4, 4, 4), Memory(32 * GIB, 20 * GIB), Disk("/models", 1, 1, "SSD"),
        System("Linux", "6", "x86_64", (3, 11, 7), 64),
    )  # fmt: skip


def test_this_machine_is_judged_as_its_cards_are_now() -> None:
    busy = SeenCard(
        0, "NVIDIA GeForce RTX 3090", "a", total_bytes=24 * GIB, free_bytes=10 * GIB, ours_bytes=6 * GIB,
        memory_bus_bits=384, clocks=Clocks(memory_max_mhz=9751),
    )  # fmt: skip
    lost = SeenCard(1, "NVIDIA GeForce RTX 3090", "b", "lost", "It is gone.", total_bytes=24 * GIB)
    place = advice.place_of(machine(busy, lost), ENGINES)
    assert [card.free_bytes for card in place.cards] == [16 * GIB]
    assert place.ram_bytes == 20 * GIB
    assert place.bandwidths_gb_s == pytest.approx((936,), abs=1)  # as NVIDIA's data sheet has it
    assert advice.place_of(machine(), {}).cards == ()
    silent = SeenCard(0, "NVIDIA GeForce RTX 4060 Ti", "c", total_bytes=16 * GIB, free_bytes=16 * GIB)
    assert advice.place_of(machine(silent), {}).bandwidths_gb_s == (0,)


# The disk -----------------------------------------------------------------------------------------------


def test_the_shelf_lists_deletes_and_brings_back(page, tmp_path) -> None:
    assert "No model has been downloaded" in page.shelf_panel.html()
    folder = tmp_path / "models" / "it's <mine>"
    folder.mkdir(parents=True)
    (folder / "a.gguf").write_bytes(bytes(250_000_000))
    text = page.shelf_panel.html()
    assert "it&#x27;s &lt;mine&gt;" in text and "0.2 GB" in text and "never" in text and "no preset" in text
    page.shelf_panel.act("it's <mine>", "delete")
    text = page.shelf_panel.html()
    assert not folder.exists() and "was deleted" in text and "10 minutes" in text
    gone = html.unescape(re.search(r'data-name="([^"]+)" data-action="undo"', text)[1])
    page.shelf_panel.act(gone, "undo")
    assert (folder / "a.gguf").stat().st_size == 250_000_000
    page.shelf_panel.act("it's <mine>", "delete")
    gone = html.unescape(re.search(r'data-name="([^"]+)" data-action="free"', page.shelf_panel.html())[1])
    page.shelf_panel.act(gone, "free")
    assert "No model has been downloaded" in page.shelf_panel.html()
    assert page.changes == ["shelf"] * 4


def test_what_the_shelf_refuses_is_an_error_and_the_pages_look_again(page) -> None:
    for name, action in (("x", "delete"), ("x", "undo"), ("../x", "delete"), ("x", "burn")):
        with pytest.raises((InvalidRequest, ModelFilesError)):
            page.shelf_panel.act(name, action)
    assert page.changes == ["shelf"] * 3
