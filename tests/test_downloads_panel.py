"""The downloads as the Models page shows them: real jobs against a hub on loopback."""

from __future__ import annotations

import os

import pytest

from benchmarks.downloads import model
from modules.downloads import Downloads, Options
from modules.errors import InvalidRequest, PresetNotFound, SourceNotFound
from modules.library import Library
from modules.presets import Presets
from modules.ui.downloads import DownloadsPanel

from .conftest import eventually
from .hub_server import Hub

PRESET = """title = "Mine"
task = "assistant"
[[variants]]
id = "there"
title = "There"
engine = "exllamav2"
repo = "maker/model-exl2"
revision = "4_25"
bpw = 4.25
size_bytes = 200000
[[variants]]
id = "nowhere"
title = "Nowhere"
engine = "llamacpp"
repo = "maker/other"
file = "other.gguf"
[[variants]]
id = "mine"
title = "My own file"
engine = "llamacpp"
path = "~/own.gguf"
"""


@pytest.fixture
def hub():
    with Hub() as server:
        server.add("maker/model-exl2", {"README.md": b"branches"})
        server.add("maker/model-exl2", model(), "4_25")
        yield server


@pytest.fixture
def told():
    return []


@pytest.fixture
def panel(hub, tmp_path, told):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.toml").write_text(PRESET)
    quick = Options(reserve_bytes=0, tries=2, backoff_s=0.02, timeout_s=2.0, cache_dir=os.devnull)
    downloads = Downloads(Library(tmp_path / "models", tmp_path), hub.endpoint, lambda: None, quick, told.append)
    yield DownloadsPanel(downloads, Presets([tmp_path / "presets"]))
    downloads.close()


def state(panel: DownloadsPanel) -> str:
    return panel._downloads.jobs()[-1].state


def job_id(panel: DownloadsPanel) -> str:
    return panel._downloads.jobs()[-1].id


def test_nothing_is_shown_before_the_first_download(panel) -> None:
    assert panel.html() == ""


def test_a_variant_is_downloaded_and_every_page_is_told(panel, told, tmp_path) -> None:
    panel.act("mine/there", "start")
    eventually(lambda: state(panel) == "done", 20)
    shown = panel.html()
    assert "maker/model-exl2@4_25" in shown
    assert 'data-state="done"' in shown and shown.count("<button") == 1
    assert (tmp_path / "models" / "model-exl2-4_25" / "config.json").is_file()
    assert {view.state for view in told} >= {"downloading", "done"}


def test_pause_keeps_what_has_arrived_and_go_on_ends_it(panel, hub) -> None:
    hub.bytes_per_s = 40_000
    panel.act("mine/there", "start")
    eventually(lambda: panel._downloads.jobs()[-1].done_bytes > 0, 10)
    assert 'role="progressbar"' in panel.html() and 'data-action="pause"' in panel.html()
    panel.act(job_id(panel), "pause")
    eventually(lambda: state(panel) == "paused", 10)
    assert "paused" in panel.html() and 'data-action="resume"' in panel.html()
    (view,) = panel._downloads.jobs()
    assert f"{view.done_bytes / 1000:.1f} KB of {view.total_bytes / 1000:.1f} KB" in panel.html()
    hub.bytes_per_s = 0
    panel.act(job_id(panel), "resume")
    eventually(lambda: state(panel) == "done", 20)


def test_cancel_takes_it_away(panel, hub, tmp_path) -> None:
    hub.bytes_per_s = 40_000
    panel.act("mine/there", "start")
    eventually(lambda: panel._downloads.jobs()[-1].done_bytes > 0, 10)
    panel.act(job_id(panel), "cancel")
    eventually(lambda: panel.html() == "", 10)
    assert not (tmp_path / "models" / "model-exl2-4_25").exists()


def test_what_is_done_can_be_dismissed(panel, tmp_path, hub, told) -> None:
    hub.bytes_per_s = 40_000
    panel.act("mine/there", "start")
    eventually(lambda: panel._downloads.jobs()[-1].done_bytes > 0, 10)
    with pytest.raises(InvalidRequest, match="is not done"):
        panel.act(job_id(panel), "dismiss")
    hub.bytes_per_s = 0
    eventually(lambda: state(panel) == "done", 20)
    assert 'data-action="dismiss"' in panel.html()
    before = len(told)
    panel.act(job_id(panel), "dismiss")
    assert panel.html() == "" and len(told) == before + 1  # every page is told
    assert (tmp_path / "models" / "model-exl2-4_25" / "config.json").is_file()
    with pytest.raises(SourceNotFound, match="gone"):
        panel._downloads.dismiss(told[-1].id)


def test_what_is_done_and_was_deleted_since_is_not_called_ready(panel, tmp_path) -> None:
    panel.act("mine/there", "start")
    eventually(lambda: state(panel) == "done", 20)
    (tmp_path / "models" / "model-exl2-4_25").rename(tmp_path / "aside")
    assert panel.html() == ""


def test_a_download_that_failed_shows_what_has_arrived(panel, hub) -> None:
    hub.wrong = {"output-00001-of-00003.safetensors": 2}
    panel.act("mine/there", "start")
    eventually(lambda: state(panel) == "failed", 20)
    (view,) = panel._downloads.jobs()
    assert view.total_bytes and f" of {view.total_bytes / 1000:.1f} KB" in panel.html()


def test_a_failure_is_said_in_words(panel) -> None:
    panel.act("mine/nowhere", "start")
    eventually(lambda: state(panel) == "failed", 20)
    shown = panel.html()
    assert 'role="alert"' in shown and "maker/other" in shown.partition("alert")[2]
    assert 'data-action="resume"' in shown


@pytest.mark.parametrize("name", ["mine/mine", "mine/unknown", "mine"])
def test_what_cannot_be_downloaded_is_refused(panel, name: str) -> None:
    with pytest.raises(InvalidRequest, match="no variant"):
        panel.act(name, "start")


def test_unknown_presets_jobs_and_actions_are_refused(panel) -> None:
    with pytest.raises(PresetNotFound):
        panel.act("yours/there", "start")
    with pytest.raises(InvalidRequest, match="cannot be told"):
        panel.act("x", "explode")
    with pytest.raises(SourceNotFound):
        panel.act("no such job", "pause")
