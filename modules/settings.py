"""One frozen table of settings with their help; the only reader of the command line and the environment."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.errors import SettingsError

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent
MAX_CONTEXT = 1 << 22  # tokens; the page's own limit


@dataclass(frozen=True)
class Setting:
    """One row of the table: a flag, its variable in the environment, its default in words and its help."""

    name: str
    flag: str
    env: str
    default_text: str
    help: str
    metavar: str = ""


SETTINGS: tuple[Setting, ...] = (
    Setting("port", "--port", "TURNTABLE_PORT", "7860", "Port of the page; 0 takes a free one.", "N"),
    Setting("data_dir", "--data-dir", "TURNTABLE_DATA_DIR", "~/.local/share/turntable",
            "Folder for conversations, pictures, your presets and the log.", "DIR"),
    Setting("models_dir", "--models-dir", "TURNTABLE_MODELS_DIR", "models in the data folder",
            "Folder with the downloaded models.", "DIR"),
    Setting("memory_budget", "--memory-budget", "TURNTABLE_MEMORY_BUDGET", "60 % of the RAM",
            "Memory for loaded models, for example 12GB or 800MB; the least recently used goes first.", "SIZE"),
    Setting("vram_budget", "--vram-budget", "TURNTABLE_VRAM_BUDGET", "the cards' memory less 1 GB",
            "Memory of the NVIDIA cards for loaded models; the least recently used goes first.", "SIZE"),
    Setting("pinned_memory", "--pinned-memory", "TURNTABLE_PINNED_MEMORY", "a third of the RAM",
            "RAM in which recently used models stay page-locked, so that swaps run at the bus's speed; 0 is none.",
            "SIZE"),
    Setting("preset", "--preset", "TURNTABLE_PRESET", "the first one",
            "Preset whose tab is open at the start.", "NAME"),
    Setting("threads", "--threads", "TURNTABLE_THREADS", "physical cores less one",
            "Threads of llama.cpp.", "N"),
    Setting("install_engines", "--install-engines", "TURNTABLE_INSTALL_ENGINES", "auto",
            "auto sets up ExLlamaV2 in the background where an NVIDIA card, its driver and nvcc are; no leaves it.",
            "WHEN"),
    Setting("load_timeout", "--load-timeout", "TURNTABLE_LOAD_TIMEOUT", "600",
            "Seconds after which a load counts as failed.", "S"),
    Setting("stall_timeout", "--stall-timeout", "TURNTABLE_STALL_TIMEOUT", "120",
            "Seconds of silence after which an engine counts as stuck.", "S"),
    Setting("log_level", "--log-level", "TURNTABLE_LOG_LEVEL", "info",
            "How much is logged: debug, info, warning, error.", "LEVEL"),
    Setting("engine", "--engine", "TURNTABLE_ENGINE", "none",
            "For developers: one more engine as NAME=MODULE:CLASS.", "SPEC"),
)  # fmt: skip


@dataclass(frozen=True)
class BenchChoice:
    """What was typed behind `bench`. markdown is a file, or - for standard output; history measures nothing."""

    names: tuple[str, ...] = ()
    markdown: str = ""
    history: bool = False
    prompt_tokens: int = 512
    tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class Settings:
    """What a person chose. Sizes in bytes, times in seconds, folders absolute. vram_budget_bytes 0: by the cards."""

    port: int
    data_dir: Path
    models_dir: Path
    memory_budget_bytes: int
    vram_budget_bytes: int
    pinned_memory_bytes: int
    install_engines: bool
    preset: str
    threads: int
    load_timeout_s: float
    stall_timeout_s: float
    log_level: str
    extra_engines: tuple[tuple[str, str], ...]
    command: str = "serve"
    ask_preset: str = ""
    ask_text: str = ""
    ask_images: tuple[Path, ...] = ()
    ask_json: bool = False
    action: str = ""
    what: str = ""
    yes: bool = False
    file: str = ""
    projector: str = ""
    context: int = 0
    cache: str = ""
    as_json: bool = False
    bench: BenchChoice = BenchChoice()

    @property
    def bundled_dir(self) -> Path:
        return ROOT / "demo" / "models"

    @property
    def preset_dirs(self) -> tuple[Path, Path]:
        """The shipped presets, then the person's own, which win."""
        return ROOT / "presets", self.data_dir / "presets"


def parser() -> argparse.ArgumentParser:
    """The command line, made from the table."""
    top = argparse.ArgumentParser(
        prog="turntable",
        description="A local assistant in the browser: a tab per task, the right model behind each.",
        epilog="Every setting can also come from the environment, for example TURNTABLE_PORT=7861.",
    )
    top.add_argument("--lan", action="store_true", help="Share with the local network; not built yet, refused.")
    _add_settings(top, top_level=True)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    ask = commands.add_parser(
        "ask",
        help="Print a preset's answer in the terminal.",
        description="Print a preset's answer in the terminal, streamed, by the same path as the page.",
    )
    ask.add_argument("ask_preset", metavar="PRESET", help="Name of the preset, for example reasoning.")
    ask.add_argument("ask_text", metavar="TEXT", help="The message; - reads it from standard input.")
    ask.add_argument(
        "--image", dest="ask_images", action="append", default=[], metavar="FILE", help="A picture; may be repeated."
    )
    ask.add_argument(
        "--json",
        dest="ask_json",
        action="store_true",
        help="Print one object with text, reasoning, counts and timings.",
    )
    _add_settings(ask, top_level=False)
    _add_model_commands(commands)
    return top


def _add_model_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    download = commands.add_parser(
        "download", help="Download a preset's model or a repository's.",
        description="Download the best variant of a preset for this machine, or OWNER/NAME@REVISION. Ctrl-C pauses.",
    )  # fmt: skip
    models = commands.add_parser(
        "models", help="List the models of all presets.",
        description="List every variant of every preset: on this machine or not, its size, and downloads under way.",
    )  # fmt: skip
    plan = commands.add_parser(
        "plan", help="Say what a model takes and whether it fits.",
        description="Say what a model takes in memory and whether it fits: a preset, a folder, a GGUF file, or "
        "OWNER/NAME@REVISION by its metadata alone.",
    )  # fmt: skip
    for command in (download, plan):
        command.add_argument("what", metavar="WHAT", help="A preset's name, or OWNER/NAME@REVISION.")
        command.add_argument("--file", dest="file", default="", metavar="NAME", help="The GGUF file of a repository.")
        command.add_argument("--projector", dest="projector", default="", metavar="NAME", help="Its projector file.")
    plan.add_argument("--context", dest="context", default="", metavar="N", help="Context size in tokens.")
    plan.add_argument("--cache", dest="cache", default="", choices=("FP16", "Q8", "Q6", "Q4"), help="Cache mode.")
    plan.add_argument("--json", dest="as_json", action="store_true", help="Print one object.")
    doctor = commands.add_parser(
        "doctor", help="Compare this machine with what Turntable needs.",
        description="Look at the cards, the driver, memory, disk and engines, and say in plain words what to do. "
        "Changes nothing. Exit code 1 where something does not work as it is.",
    )  # fmt: skip
    doctor.add_argument("--json", dest="as_json", action="store_true", help="Print one object.")
    engines = commands.add_parser(
        "engines", help="List, install, test or remove the engines for NVIDIA cards.",
        description="List the engines for NVIDIA cards, or install, test or remove one. Ctrl-C cancels an install.",
    )  # fmt: skip
    engines.add_argument("action", nargs="?", default="list", choices=("list", "install", "test", "remove"))
    engines.add_argument("what", nargs="?", default="", metavar="ENGINE", help="exllamav2 or exllamav3.")
    engines.add_argument("--yes", dest="yes", action="store_true", help="Remove without asking.")
    bench = _add_bench(commands)
    for command in (download, models, plan, doctor, engines, bench):
        _add_settings(command, top_level=False)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    bench = commands.add_parser(
        "bench", help="Measure the models that are here, and keep the table.",
        description="Measure load time, prompt and decode speed and memory of every variant that is ready, and add "
        "them to the measured table. Ctrl-C ends it; what is measured already stays.",
    )  # fmt: skip
    usual = BenchChoice()
    bench.add_argument("names", nargs="*", metavar="PRESET", help="Only these presets, or PRESET/VARIANT. [all]")
    bench.add_argument("--history", action="store_true", help="Measure nothing; show the table of all runs so far.")
    bench.add_argument("--json", dest="as_json", action="store_true", help="Print one object with rows and failures.")
    bench.add_argument("--markdown", default="", metavar="FILE", help="Write the rows as Markdown; - prints them.")
    for flag, default, words in (
        ("--prompt-tokens", usual.prompt_tokens, "Tokens of the prompt."),
        ("--tokens", usual.tokens, "Tokens to write."),
        ("--repeats", usual.repeats, "How often; the table shows the median."),
    ):
        bench.add_argument(flag, default=str(default), metavar="N", help=f"{words} [{default}]")
    return bench


def _add_settings(to: argparse.ArgumentParser, top_level: bool) -> None:
    for row in SETTINGS:
        # A subcommand takes the settings as well, without overwriting what stood before it.
        to.add_argument(
            row.flag,
            dest=row.name,
            metavar=row.metavar,
            help=f"{row.help} [{row.default_text}]".replace("%", "%%"),
            default=None if top_level else argparse.SUPPRESS,
        )


def read(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Settings:
    """Settings of this run: the command line wins over the environment, the environment over the defaults.

    Raises SettingsError with one sentence. `--help` and unknown flags leave through argparse.
    """
    environment = os.environ if environment is None else environment
    chosen = parser().parse_args(list(arguments))
    if chosen.lan:
        raise SettingsError(
            "--lan is not built yet: Turntable has no login so far, and without one it is not shared.",
            hint="Start without --lan; the page is then for this machine only.",
        )
    values = {row.name: _value(row, chosen, environment) for row in SETTINGS}
    data_dir = _folder(values["data_dir"] or str(_default_data_dir(environment)))
    level = (values["log_level"] or "info").lower()
    if level not in ("debug", "info", "warning", "error"):
        raise SettingsError(f"--log-level {level}: use debug, info, warning or error.")
    return Settings(
        port=_number("--port", values["port"] or "7860", 0, 65535),
        data_dir=data_dir,
        models_dir=_folder(values["models_dir"]) if values["models_dir"] else data_dir / "models",
        memory_budget_bytes=_size("--memory-budget", values["memory_budget"], int(_total_memory_bytes() * 0.6)),
        vram_budget_bytes=_size("--vram-budget", values["vram_budget"], 0),
        pinned_memory_bytes=_size("--pinned-memory", values["pinned_memory"], _total_memory_bytes() // 3, least=0),
        install_engines=_choice("--install-engines", values["install_engines"] or "auto", ("auto", "no")) == "auto",
        preset=values["preset"],
        threads=_number("--threads", values["threads"] or "0", 0, 1024),
        load_timeout_s=float(_number("--load-timeout", values["load_timeout"] or "600", 1, 86400)),
        stall_timeout_s=float(_number("--stall-timeout", values["stall_timeout"] or "120", 1, 86400)),
        log_level=level,
        extra_engines=_engines(values["engine"]),
        command=chosen.command or "serve",
        ask_preset=getattr(chosen, "ask_preset", ""),
        ask_text=getattr(chosen, "ask_text", ""),
        ask_images=tuple(Path(name).absolute() for name in getattr(chosen, "ask_images", ())),
        ask_json=getattr(chosen, "ask_json", False),
        action=getattr(chosen, "action", ""),
        what=getattr(chosen, "what", ""),
        yes=getattr(chosen, "yes", False),
        file=getattr(chosen, "file", ""),
        projector=getattr(chosen, "projector", ""),
        context=_number("--context", words, 1, MAX_CONTEXT) if (words := getattr(chosen, "context", "")) else 0,
        cache=getattr(chosen, "cache", ""),
        as_json=getattr(chosen, "as_json", False),
        bench=_bench(chosen) if chosen.command == "bench" else BenchChoice(),
    )


def _bench(chosen: argparse.Namespace) -> BenchChoice:
    return BenchChoice(
        names=tuple(chosen.names), markdown=chosen.markdown, history=chosen.history,
        prompt_tokens=_number("--prompt-tokens", chosen.prompt_tokens, 16, 1_000_000),
        tokens=_number("--tokens", chosen.tokens, 8, 100_000), repeats=_number("--repeats", chosen.repeats, 1, 100),
    )  # fmt: skip


def _value(row: Setting, chosen: argparse.Namespace, environment: Mapping[str, str]) -> str:
    given = getattr(chosen, row.name, None)
    return str(given) if given is not None else environment.get(row.env, "")


def _folder(text: str) -> Path:
    return Path(os.path.expanduser(text)).absolute()


def _default_data_dir(environment: Mapping[str, str]) -> Path:
    if sys.platform == "win32":
        return Path(environment.get("LOCALAPPDATA", "~\\AppData\\Local")) / "Turntable"
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/Turntable")
    home = environment.get("XDG_DATA_HOME") or ("~/.local/share" if environment.get("HOME") else str(ROOT / ".data"))
    return Path(home) / "turntable"


def _number(flag: str, text: str, low: int, high: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise SettingsError(f"{flag} {text}: not a whole number.") from None
    if not low <= number <= high:
        raise SettingsError(f"{flag} {number}: must lie between {low} and {high}.")
    return number


def _choice(flag: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise SettingsError(f"{flag} {text}: use {' or '.join(choices)}.")
    return text


def _size(flag: str, text: str, default: int, least: int = 16 << 20) -> int:
    """Bytes of "12GB", "800 MB", "1.5g" or a plain number of bytes; empty is the default."""
    if not text:
        return default
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE)
    if not match:
        raise SettingsError(f"{flag} {text}: not a size; write 12GB or 800MB.")
    size = int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))
    if size < least:
        raise SettingsError(f"{flag} {text}: less than 16 MB, no model fits into that.")
    return size


def _total_memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 * GIB  # Windows has no sysconf; a cautious guess until hardware.py measures it


def _engines(text: str) -> tuple[tuple[str, str], ...]:
    if not text:
        return ()
    match = re.fullmatch(r"([a-z0-9]+)=([A-Za-z0-9_.]+:[A-Za-z0-9_]+)", text)
    if not match:
        raise SettingsError(f"--engine {text}: write NAME=MODULE:CLASS.")
    return ((match[1], match[2]),)
