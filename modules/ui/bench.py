"""The measured table on the System page: what measures, how far it is, and the rows with their chart.

HTML is made here on the server, escaped; live.py sends it whenever something changes.
Two panels, so that the table is not sent again with every percent. Knows no gradio.
"""

from __future__ import annotations

import html
import urllib.parse
from collections.abc import Sequence

from modules.bench import BenchJobs, BenchView, Failure, Target
from modules.errors import InvalidRequest
from modules.measured import MIB, History, Row, markdown, quant, seconds, speed
from modules.ui import speeds

MOST_ROWS = 100


class BenchPanel:
    """The button and the progress."""

    def __init__(self, jobs: BenchJobs) -> None:
        self._jobs = jobs

    def html(self) -> str:
        """Reads the models' folder unless a run is under way, so not on the event loop."""
        view = self._jobs.view()
        about = (
            "<h3>Speed on this machine</h3><p>Load time, prompt and decode speed and memory of the models that are here. "
            "Answers come in between, and what they disturb is measured again. <code>python app.py bench</code> does the "
            "same in the terminal.</p>"
        )
        if view is not None and view.running:
            return about + _running(view)
        return about + _waiting(view, self._jobs.targets())

    def act(self, name: str, action: str) -> None:
        """A button: start a run over all (no name) or one PRESET/VARIANT, or cancel it. Raises TurntableError."""
        if action == "cancel":
            self._jobs.cancel()
        elif action == "start":
            self._jobs.start([name] if name else [])
        else:
            raise InvalidRequest(f"A measurement cannot be told to {action!r}.")


class MeasuredPanel:
    """The rows so far."""

    def __init__(self, history: History) -> None:
        self._history = history

    def html(self) -> str:
        """Chart, table and export; empty before the first row. Reads the file."""
        found = self._history.read()
        odd = ""
        if found.unreadable:
            odd = (
                f'<p class="oops" role="alert">{found.unreadable} line{"s" if found.unreadable > 1 else ""} of '
                f"{html.escape(str(self._history.path))} cannot be read and {'are' if found.unreadable > 1 else 'is'} left out.</p>"
            )
        if not found.rows:
            return odd
        shown = found.rows[-MOST_ROWS:]
        older = len(found.rows) - len(shown)
        more = f"<p>{older} older rows: <code>python app.py bench --history --markdown -</code></p>" if older else ""
        return odd + speeds.chart(found.rows) + _export(shown) + _table(shown) + more

    def act(self, name: str, action: str) -> None:
        """There is nothing to press: copying and saving are the browser's."""
        raise InvalidRequest(f"The measured table cannot be told to {action!r}.")


def _button(name: str, action: str, label: str, extra: str = "") -> str:
    return (
        f'<button type="button" data-panel="bench" data-name="{html.escape(name)}" data-action="{action}"{extra}>'
        f"{html.escape(label)}</button>"
    )


def _running(view: BenchView) -> str:
    step = view.step
    words = f"{step.number} of {step.total}: {step.title} {step.words}" if step else "Looking at what is here …"
    percent = 100 * step.fraction if step else 0.0
    return (
        f'<section class="engine" data-state="running"><p role="status">{html.escape(words)}</p>'
        f'<div class="bar" role="progressbar" aria-label="Measuring" aria-valuenow="{percent:.0f}"><i style="width:{percent:.0f}%"></i></div>'
        f'<div class="buttons">{_button("", "cancel", "Cancel")}</div></section>'
    )


def _waiting(view: BenchView | None, targets: Sequence[Target]) -> str:
    parts = ['<section class="engine" data-state="idle">']
    if view is not None and view.error:
        parts.append(f'<p class="why" role="alert">{html.escape(view.error)}</p>')
    elif view is not None:
        parts.append(f'<p role="status">{html.escape(view.said)}</p>' + "".join(map(_failure, view.failures)))
    if targets:
        parts.append(f'<div class="buttons">{_button("", "start", _measure(len(targets)))}</div>')
    else:
        parts.append("<p>No model on this machine is ready to be measured.</p>")
    if len(targets) > 1:
        single = "".join(_button(target.name, "start", target.title) for target in targets)
        parts.append(f'<details id="bench-one"><summary>Only one of them</summary><div class="buttons">{single}</div></details>')
    return "".join(parts) + "</section>"


def _measure(count: int) -> str:
    return "Measure" if count == 1 else f"Measure all {count}"


def _failure(failure: Failure) -> str:
    said = f"{failure.error} {failure.hint}"
    return f'<p class="why" role="alert"><b>{html.escape(failure.title)}</b>: {html.escape(said)}</p>'


def _table(rows: Sequence[Row]) -> str:
    head = ("Date (UTC)", "Model", "Prompt tok/s", "Decode tok/s", "Load s", "Memory", "Engine", "Device")
    cells = "".join(f"<th scope='col'>{text}</th>" for text in head)
    body = "".join(_row(row, head) for row in reversed(rows))
    return f'<div class="scroll"><table class="measured"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Row, head: Sequence[str]) -> str:
    texts = (
        (row.at[:16].replace("T", " "), ""),
        (row.name, f"{quant(row)} · {row.cache_mode} cache · context {row.context:,}"),
        (speed(row.prompt_speed), f"{row.prompt_tokens} tokens"),
        (speed(row.decode_speed), _range(row.decode_tps)),
        (seconds(row.load_s), f"swap {seconds(row.swap_s)}" if row.swap_s is not None else ""),
        (f"{row.memory_bytes / MIB:,.0f} MiB", ""),
        (f"{row.engine} {row.engine_version}", row.commit),
        (row.place.replace(" W", "\u00a0W"), ""),
    )
    cells = "".join(
        f'<td data-label="{label}"><div>{html.escape(text)}{f"<small>{html.escape(small)}</small>" if small else ""}</div></td>'
        for label, (text, small) in zip(head, texts, strict=True)
    )
    return f'<tr data-key="{html.escape(row.run)}/{html.escape(row.preset)}/{html.escape(row.variant)}">{cells}</tr>'


def _range(samples: Sequence[float]) -> str:
    return f"{speed(min(samples))}–{speed(max(samples))}" if len(samples) > 1 else ""


def _export(rows: Sequence[Row]) -> str:
    """The Markdown lies in the page, hidden: copying needs no further request, and works where nothing may be saved."""
    text = markdown(rows)
    address = "data:text/markdown;charset=utf-8," + urllib.parse.quote(text)
    return (
        f'<div class="export"><code hidden>{html.escape(text)}</code>'
        '<button type="button" data-copy>Copy as Markdown</button>'
        f'<a download="turntable-measured.md" href="{html.escape(address)}">Save as Markdown</a></div>'
    )
