"""What `app.py COMMAND` does: ask, engines, doctor, bench. Prints, and returns exit codes.

The commands about models are terminal.py's.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import logging.handlers
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules import doctor
from modules.assistant import Assistant, totals
from modules.bench import Bench, Outcome, Sizes
from modules.bench import Step as BenchStep
from modules.building import MEASURED, build, lock_data, tell_bus_speeds
from modules.chats import Chats
from modules.environments import Environments, Step, cards_of
from modules.errors import SettingsError
from modules.hardware import Hardware, Machine
from modules.library import largest_weights
from modules.measured import History, Row, markdown, text_table
from modules.messages import Delta, Failed, Finished, Loading, Queued
from modules.settings import Settings
from modules.ui.system import engine_states

log = logging.getLogger("turntable")
PATIENCE_S = 20.0  # of a command for a driver; one of many cards that nobody used for a while needs that long


def run(settings: Settings) -> int:
    """The command of the settings; its exit code. Raises TurntableError and OSError."""
    if settings.command == "engines":
        return run_engines(settings)
    if settings.command == "bench":
        return run_bench(settings)
    if settings.command == "doctor":
        return run_doctor(settings)
    return ask(settings)


def ask(settings: Settings) -> int:
    """`ask PRESET TEXT`: print an answer, streamed, by the path that the page uses. Nothing is kept."""
    text = sys.stdin.read() if settings.ask_text == "-" else settings.ask_text
    hardware = Hardware(settings.models_dir)
    assistant = build(settings, Chats(":memory:"), lambda: None, hardware)
    try:
        images = [assistant.add_image(_read(path)).id for path in settings.ask_images]
        job = assistant.reply(None, text, images, settings.ask_preset)
        try:
            return _print_answer(assistant, job, settings.ask_json)
        except KeyboardInterrupt:
            assistant.stop(job.chat)
            return 130
    finally:
        assistant.close()
        hardware.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"--image {path}: {error.strerror}.", hint="Give the path of a picture.") from error


def _print_answer(assistant: Assistant, job: Any, as_json: bool) -> int:
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    dim, plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
    channel, failed, finished = "", None, None
    for event in job.follow():
        if isinstance(event, Failed):
            failed = event
        elif isinstance(event, Finished):
            finished = event
        elif isinstance(event, Delta) and not as_json:
            if event.channel != channel:
                start = dim if event.channel == "reasoning" else plain
                print(("\n\n" if channel else "") + start, end="")
                channel = event.channel
            print(_printable(event.text), end="", flush=True)
        elif isinstance(event, Loading | Queued) and sys.stderr.isatty():
            print("\r\x1b[K" + _progress_words(event), end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if not as_json:
        print(plain)
    else:
        message = job.message
        print(json.dumps({
            "preset": job.preset.name, "variant": job.variant, "text": message.text, "reasoning": message.reasoning,
            "reason": finished.reason if finished else "error", **totals(message.counts, message.timings),
            "error": message.error,
        }, ensure_ascii=False))  # fmt: skip
    if failed:
        print(f"turntable: {failed.message} {failed.hint}".rstrip(), file=sys.stderr)
        return 1
    return 0


def _printable(text: str) -> str:
    """A model's text must not drive the terminal: control characters other than line ends and tabs are shown."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _progress_words(event: Loading | Queued) -> str:
    if isinstance(event, Queued):
        return f"waiting, place {event.place}"
    return f"{event.stage} {event.fraction:.0%} of {event.total_bytes / 1e6:.0f} MB"


def run_doctor(settings: Settings) -> int:
    """`doctor`: this machine beside what Turntable needs; exit code 1 where something does not work as it is."""
    hardware = Hardware(settings.models_dir, limit_s=PATIENCE_S)
    environments = Environments(cards=cards_of(hardware))
    try:
        tell_bus_speeds(environments, hardware)
        machine = examined(settings, hardware)
        engines = engine_states(environments.list())
    finally:
        hardware.close()
    examination = doctor.examine(machine, engines, settings.pinned_memory_bytes)
    if settings.as_json:
        print(json.dumps({**examination.to_dict(), "machine": dataclasses.asdict(machine)}, indent=1))
    else:
        plain = not _can_print(doctor.MARKS[doctor.OK] + doctor.MARKS[doctor.PROBLEM] + "→°")
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        print(doctor.format_report(machine, examination, colour=colour, ascii_only=plain, width=width), end="")
    return doctor.exit_code(examination)


def examined(settings: Settings, hardware: Hardware) -> Machine:
    """Two looks, since load is of the time between; what lies between them is the disk's reading speed."""
    before = hardware.snapshot(0)
    file = None if before.disk.words else largest_weights(settings.models_dir)
    if file is None:
        time.sleep(0.5)
    else:
        try:
            hardware.measure_disk(file)
        except OSError as error:
            log.warning("The disk's reading speed was not measured: %s", error)
    return hardware.snapshot(0)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def run_bench(settings: Settings) -> int:
    """`bench`: measure what is ready and add it to the table, or show the table. 1 when something was not measured."""
    asked, history = settings.bench, History(settings.data_dir / MEASURED)
    if asked.history:
        found = history.read()
        if found.unreadable:
            print(f"turntable: {found.unreadable} lines of {history.path} cannot be read.", file=sys.stderr)
        wanted = [r for r in found.rows if not asked.names or {r.preset, f"{r.preset}/{r.variant}"} & {*asked.names}]
        print_rows(wanted, settings, {"unreadable": found.unreadable})
        return 0
    try:
        lock_data(settings).close()
    except SettingsError:
        words = "Turntable is running with this data folder; what it does meanwhile falsifies the figures."
        print(f"turntable: {words} Its System page can measure as well.", file=sys.stderr)
    hardware = Hardware(settings.models_dir, limit_s=PATIENCE_S)
    assistant = build(settings, Chats(":memory:"), lambda: None, hardware)
    bench = Bench(assistant, hardware, history)
    outcome = Outcome()
    try:
        targets = bench.targets(asked.names)
        # On a thread, because Ctrl-C must reach the lease that waits, and not cut through it.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sizes = Sizes(asked.prompt_tokens, asked.tokens, asked.repeats)
            running = pool.submit(bench.run, targets, sizes, bench_teller())
            try:
                outcome = running.result()
            except KeyboardInterrupt:
                bench.cancel()
                outcome = running.result()
    finally:
        assistant.close()
        hardware.close()
    print("\r\x1b[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
    print_rows(outcome.rows, settings, {"failures": [dataclasses.asdict(one) for one in outcome.failures]})
    for failure in outcome.failures:
        print(f"turntable: {failure.title}: {failure.error} {failure.hint}".rstrip(), file=sys.stderr)
    if outcome.cancelled:
        print("turntable: Cancelled; the rows above are kept.", file=sys.stderr)
        return 130
    return 1 if outcome.failures else 0


def bench_teller() -> Callable[[BenchStep], None]:
    """Progress on stderr: one line that changes on a terminal, else a line for each variant."""
    live, said = sys.stderr.isatty(), [0]

    def tell(step: BenchStep) -> None:
        head = f"{step.number} of {step.total}: {_printable(step.title)}"
        if live:
            line = f"{step.fraction:4.0%}  {head} {step.words}"
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + line[:width], end="", file=sys.stderr, flush=True)
        elif step.number != said[0]:
            said[0] = step.number
            print(head, file=sys.stderr, flush=True)

    return tell


def print_rows(rows: Sequence[Row], settings: Settings, more: dict[str, Any]) -> None:
    """The table as a person asked for it: text, one JSON object, Markdown, or Markdown in a file beside the text."""
    asked = settings.bench
    if asked.markdown not in ("", "-"):
        Path(asked.markdown).write_text(markdown(rows), encoding="utf-8")
    if settings.as_json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], **more}, ensure_ascii=False))
    elif asked.markdown == "-":
        print(markdown(rows), end="")
    elif rows:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(_printable(text_table(rows, width)), end="")
    else:
        print("Nothing has been measured.")


def run_engines(settings: Settings) -> int:
    """`engines`: list them, or install, test or remove one, with progress."""
    environments = Environments(cards=cards_of(Hardware(settings.models_dir, limit_s=PATIENCE_S)))
    if settings.action == "list":
        for found in environments.list():
            versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
            size = f"{found.size_bytes / 1e9:.1f} GB" if found.size_bytes else ""
            print("  ".join(filter(None, [f"{found.name:10s} {found.state:10s}", versions, size, found.problem])))
        return 0
    if not settings.what:
        raise SettingsError(f"engines {settings.action}: name the engine.", hint="exllamav2 or exllamav3.")
    if settings.action == "remove":
        return remove_engine(environments, settings)
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    said = [""]

    def tell(step: Step) -> None:
        if step.words != said[0]:
            said[0] = step.words
            print(f"{clear}{step.fraction:4.0%}  {step.words}", flush=True)
        if step.detail.startswith(("ok: ", "NOT OK: ")):
            print(f"{clear}      {_printable(step.detail)}", flush=True)
        elif clear:
            line = f"{step.fraction:4.0%}  {_printable(step.detail or step.words)}"
            print(clear + line[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    try:
        change = environments.install if settings.action == "install" else environments.test
        found = change(settings.what, tell)
    except KeyboardInterrupt:
        print(f"{clear}Cancelled. The same command goes on where it stopped.")
        return 130
    print(f"{clear}{found.name}: {found.state}{f', {found.problem}' if found.problem else ''}")
    if settings.action == "test" and found.state == "untested":
        return 3  # there is no card to try it on
    return 0 if found.usable else 1


def remove_engine(environments: Environments, settings: Settings) -> int:
    """Asks a person first; a script says what it wants by calling this."""
    found = environments.get(settings.what, sized=True)
    if found.state == "absent":
        print(f"{found.name} is not installed.")
        return 0
    if sys.stdin.isatty() and not settings.yes:
        answer = input(f"Delete {found.folder}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return 1
    print(f"{found.name} removed, {environments.remove(found.name) / 1e9:.1f} GB freed.")
    return 0
