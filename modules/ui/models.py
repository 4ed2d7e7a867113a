"""The Models page, first version: every preset's variants on this machine, and the command that gets each."""

from __future__ import annotations

import html
from collections.abc import Iterable

from modules.assistant import Assistant, VariantState
from modules.presets import BrokenPreset, Preset

WORDS = {
    "ready": "ready", "engine_missing": "engine missing", "not_downloaded": "not downloaded",
    "damaged": "damaged", "does_not_fit": "does not fit",
}  # fmt: skip


def listing(assistant: Assistant, broken: Iterable[BrokenPreset]) -> str:
    """HTML of the page; all text is escaped."""
    parts = [
        "<h2>Models</h2><p>The best variant that is ready answers in its tab. A downloaded model is found by itself in "
        f"<code>{html.escape(str(assistant.library.models_dir))}</code>.</p>"
    ]
    parts += [_broken(b) for b in broken]
    parts += [_preset(p, assistant.survey(p)) for p in assistant.presets.list()]
    return '<div class="models">' + "".join(parts) + "</div>"


def _broken(preset: BrokenPreset) -> str:
    return f'<div class="oops"><b>{html.escape(preset.name)}</b> {html.escape(str(preset.error))}</div>'


def _preset(preset: Preset, states: list[VariantState]) -> str:
    rows = "".join(_row(state) for state in states)
    return (
        f"<section><h3>{html.escape(preset.title)}</h3><p>{html.escape(preset.about)}</p><div class='scroll'><table><thead><tr>"
        "<th>Variant</th><th>Engine</th><th>bpw</th><th>Cache mode</th><th>Context</th><th>Size</th><th>Here</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(state: VariantState) -> str:
    v = state.variant
    bpw = f"{v.bpw:g}" if v.bpw else "–"
    size = f"{v.size_bytes / 1e9:.1f} GB" if v.size_bytes >= 100_000_000 else f"{v.size_bytes / 1e6:.1f} MB"
    badge = f'<span class="badge {state.state}">{"answers" if state.chosen else WORDS[state.state]}</span>'
    note = f"<br><small>{html.escape(state.why)}</small>" if state.state in ("damaged", "does_not_fit") else ""
    command = ""
    if state.command and state.state in ("not_downloaded", "engine_missing", "damaged"):
        command = (
            f'<details><summary>Get it</summary><div class="command"><code>{html.escape(state.command)}</code>'
            '<button type="button" class="copy" data-copy>Copy</button></div></details>'
        )
    licence = f"<br><small>{html.escape(v.licence)}</small>" if v.licence else ""
    return (
        f'<tr class="{"chosen" if state.chosen else ""}"><td>{html.escape(v.title)}{licence}{command}</td>'
        f"<td>{html.escape(v.engine)}</td><td>{bpw}</td><td>{v.cache_mode}</td><td>{v.context}</td><td>{size}</td><td>{badge}{note}</td></tr>"
    )
