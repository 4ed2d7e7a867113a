"""The table of settings: precedence, sizes, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.errors import SettingsError
from modules.settings import SETTINGS, parser, read


def test_defaults_and_precedence():
    s = read([], {"HOME": "/home/x"})
    assert (
        s.port == 7860
        and s.command == "serve"
        and s.models_dir == s.data_dir / "models"
        and s.memory_budget_bytes > 1 << 28
    )
    assert read([], {"TURNTABLE_PORT": "7000"}).port == 7000
    assert read(["--port", "7001"], {"TURNTABLE_PORT": "7000"}).port == 7001
    assert read(["--port", "0", "--data-dir", "/a b/c"], {}).data_dir == Path("/a b/c")
    assert read([], {}).data_dir.name == "turntable"


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 << 30), ("800 mb", 800 << 20), ("1.5g", 3 << 29), ("99999999", 99999999), ("2GiB", 2 << 30)],
)
def test_sizes(text, size):
    assert read(["--memory-budget", text], {}).memory_budget_bytes == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], "not a whole number"), (["--port", "70000"], "between 0 and 65535"),
        (["--memory-budget", "lots"], "not a size"), (["--memory-budget", "1MB"], "less than 16 MB"),
        (["--lan"], "not built yet"), (["--log-level", "loud"], "debug, info"),
        (["--engine", "x"], "NAME=MODULE:CLASS"),
    ],
)  # fmt: skip
def test_refusals(arguments, words):
    with pytest.raises(SettingsError, match=words) as caught:
        read(arguments, {})
    assert caught.value.hint


def test_ask():
    s = read(["--threads", "2", "ask", "vision", "what?", "--image", "a.png", "--json", "--port", "1"], {})
    assert (s.command, s.ask_preset, s.ask_text, s.ask_json, s.threads, s.port) == (
        "ask",
        "vision",
        "what?",
        True,
        2,
        1,
    )
    assert s.ask_images == (Path("a.png").absolute(),)


def test_help_names_every_setting(capsys):
    text = parser().format_help()
    assert all(row.flag in text and row.help.split()[0] in text for row in SETTINGS)
    with pytest.raises(SystemExit):
        read(["--nonsense"], {})
    assert "unrecognized" in capsys.readouterr().err


def test_engines_and_whether_they_are_installed_unasked():
    s = read(["engines"], {})
    assert (s.command, s.action, s.what, s.yes, s.install_engines) == ("engines", "list", "", False, True)
    s = read(["engines", "remove", "exllamav2", "--yes"], {"TURNTABLE_INSTALL_ENGINES": "no"})
    assert (s.action, s.what, s.yes, s.install_engines) == ("remove", "exllamav2", True, False)
    assert read(["--install-engines", "auto"], {"TURNTABLE_INSTALL_ENGINES": "no"}).install_engines
    with pytest.raises(SettingsError, match="use auto or no"):
        read(["--install-engines", "always"], {})


@pytest.mark.parametrize("context", ["-5", "0", "99999999999", "many"])
def test_a_context_is_a_positive_number(context: str) -> None:
    with pytest.raises(SettingsError, match="--context"):
        read(["plan", "reasoning", f"--context={context}"], {})
    assert read(["plan", "reasoning", "--context=4096"], {}).context == 4096
