"""The Models page, first version: every preset's variants on this machine, and the command that gets each."""

from __future__ import annotations

import html
from collections.abc import Iterable

from modules import planner
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
    rows = "".join(_row(preset.name, state) for state in states)
    return (
        f"<section><h3>{html.escape(preset.title)}</h3><p>{html.escape(preset.about)}</p><div class='scroll'><table><thead><tr>"
        "<th>Variant</th><th>Engine</th><th>bpw</th><th>Cache mode</th><th>Context</th><th>Size</th>"
        "<th>Memory</th><th>Here</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(preset: str, state: VariantState) -> str:
    v = state.variant
    bpw = f"{v.bpw:g}" if v.bpw else "–"
    size = f"{v.size_bytes / 1e9:.1f} GB" if v.size_bytes >= 100_000_000 else f"{v.size_bytes / 1e6:.1f} MB"
    badge = f'<span class="badge {state.state}">{"answers" if state.chosen else WORDS[state.state]}</span>'
    note = f"<br><small>{html.escape(state.why)}</small>" if state.state in ("damaged", "does_not_fit") else ""
    command = ""
    if v.repo and state.state == "not_downloaded":
        command = _get(preset, v.id)
    if state.command and state.state in ("not_downloaded", "engine_missing", "damaged"):
        command += (
            f'<details><summary>{"By hand" if command else "Get it"}</summary><div class="command"><code>{html.escape(state.command)}</code>'
            '<button type="button" class="copy" data-copy>Copy</button></div></details>'
        )
    licence = f"<br><small>{html.escape(v.licence)}</small>" if v.licence else ""
    return (
        f'<tr class="{"chosen" if state.chosen else ""}"><td>{html.escape(v.title)}{licence}{command}</td>'
        f"<td>{html.escape(v.engine)}</td><td>{bpw}</td><td>{v.cache_mode}</td><td>{v.context}</td><td>{size}</td><td>{_memory(state)}</td>"
        f"<td>{badge}{note}</td></tr>"
    )


# What the bar shows apart; the rest is drawn as one.
PARTS = (("weights", "Weights"), ("KV cache", "KV cache"), ("vision tower", "Vision tower"))


def _get(preset: str, variant: str) -> str:
    name = html.escape(f"{preset}/{variant}")
    return f'<br><button type="button" class="get" data-panel="downloads" data-name="{name}" data-action="start">Download</button>'


def _memory(state: VariantState) -> str:
    """What the variant takes, as a number and a bar of its parts; the parts in words on hovering."""
    variant = state.variant
    if variant.shape is None:
        return f"{state.needs_bytes / 1e9:.1f} GB" if state.needs_bytes else "–"
    on_card = variant.engine in ("exllamav2", "exllamav3")
    planned = planner.plan_variant(variant, gpus=1 if on_card else 0)
    total = max(planned.needs_bytes, 1)
    known = [(label, planned.bytes_of(name)) for name, label in PARTS]
    known.append(("Other", total - sum(size for _, size in known)))
    words = ", ".join(f"{label} {_gb(size)}" for label, size in known if size > 0)
    bar = "".join(
        f'<i class="p{number}" style="width:{100 * size / total:.1f}%"></i>'
        for number, (_, size) in enumerate(known) if size > 0
    )  # fmt: skip
    where = "VRAM" if on_card else "RAM"
    return f'<span class="needs" title="{html.escape(words)}">{_gb(total)} {where}<span class="parts">{bar}</span></span>'


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 100_000_000 else f"{size / 1e6:.1f} MB"
