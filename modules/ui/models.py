"""The Models page: which model to run for each task, and every variant with its verdict for a machine.

HTML is made here on the server, escaped. live.py sends html() to every page when
something changes; a page that judges for another machine than this one asks for it
(ask). Sorting and filtering happen in the browser (assets/models.js), by the data-
attributes of the rows. Knows no gradio.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from modules import advice, planner
from modules.advice import Judged, Place
from modules.assistant import Assistant, VariantState
from modules.errors import InvalidRequest
from modules.presets import BrokenPreset, Preset
from modules.ui.bars import badge, bar, gb, options

HERE = "here"
ENGINES = {"exllamav2": "ExLlamaV2", "exllamav3": "ExLlamaV3", "llamacpp": "llama.cpp"}
# Column: what its heading says, and the attribute that it is sorted by.
COLUMNS = (
    ("Model", "title"), ("Task", "order"), ("bpw", "bpw"), ("Cache mode", "cache"), ("Context size", "context"),
    ("Download", "size"), ("Needs", "needs"), ("Speed", "speed"), ("Verdict", "spare"), ("", ""),
)  # fmt: skip


class ModelsPanel:
    """The list and the recommendations. machine says what this machine is; changed tells the pages to look again."""

    def __init__(
        self, assistant: Assistant, machine: Callable[[], Place], changed: Callable[[], None] = lambda: None
    ) -> None:
        self._assistant, self._machine, self._changed = assistant, machine, changed

    def html(self) -> str:
        """For this machine."""
        return self._draw(HERE)

    def act(self, name: str, action: str) -> None:
        """The only button of the panel itself looks again, for models that were put into the folder by hand."""
        if action != "refresh":
            raise InvalidRequest(f"The list of models cannot be told to {action!r}.")
        self._changed()

    def ask(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The list for another machine: {"place": name}. Raises InvalidRequest for one that is not known."""
        return {"html": self._draw(str(said.get("place") or HERE))}

    def place(self, name: str) -> Place:
        """A machine by its name on the page."""
        here = self._machine()
        if name == HERE:
            return here
        found = advice.places(here.ram_bytes).get(name)
        if found is None:
            raise InvalidRequest(f"There is no machine {name!r} to judge for.")
        return found

    def _draw(self, name: str) -> str:
        place = self.place(name)
        presets = self._assistant.presets.list()
        ranked = [(preset, advice.rank(preset, place), self._assistant.survey(preset)) for preset in presets]
        broken = "".join(map(_broken, self._assistant.presets.broken()))
        tasks = "".join(_task(preset, judged, states, place, name == HERE) for preset, judged, states in ranked)
        rows = "".join(
            _row(preset, number, j, state, place)
            for number, (preset, judged, states) in enumerate(ranked)
            for j, state in zip(judged, states, strict=True)
        )
        heads = "".join(
            f'<th aria-sort="none"><button type="button" data-sort="{by}">{title}</button></th>' if by else "<th></th>"
            for title, by in COLUMNS
        )
        return (
            f'<div>{broken}<p class="machine">{html.escape(_machine_words(place, name))}</p><div class="tasks">{tasks}</div></div>'
            f'<div><table class="variants"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
            '<p class="nothing" hidden>No variant is left by this filter.</p></div>'
        )


def shell(assistant: Assistant) -> str:
    """What stands still on the page: the fields, and the places that the panels fill."""
    tasks = [("", "All tasks"), *((p.name, p.title) for p in assistant.presets.list())]
    machines = [(HERE, "This machine"), *((name, name) for name in advice.places(0))]
    return (
        '<div class="models"><h2>Models</h2><p>What fits a machine is computed before a byte is downloaded. Downloaded models lie in '
        f"<code>{html.escape(str(assistant.library.models_dir))}</code>; the best variant that is ready answers in its tab.</p>"
        '<div id="downloads-page" aria-live="off"></div>'
        '<form id="look"><label for="look-repo">What would it take to run</label>'
        '<input id="look-repo" name="repo" placeholder="OWNER/NAME, or OWNER/NAME@REVISION" autocomplete="off" spellcheck="false">'
        '<button type="submit">Look</button></form><div id="look-page" role="status"></div>'
        '<details id="access"><summary>Access token for gated repositories</summary><form id="token">'
        '<input type="password" name="token" placeholder="hf_…" autocomplete="off" aria-label="Access token">'
        '<button type="submit">Keep</button><button type="button" id="token-forget">Forget</button>'
        '<span id="token-says" role="status"></span></form><p>It is checked with the hub, lies in the file of the hub '
        "library, and goes to the hub alone.</p></details>"
        '<div class="judge"><h3>For each task</h3><label>judged for <select id="place">'
        f"{options(machines, HERE)}</select></label></div>"
        '<div id="models-page" aria-live="off"></div>'
        '<div class="filter" role="search"><h3>All variants</h3>'
        '<input id="filter-text" type="search" placeholder="Filter" aria-label="Filter by name, engine or licence">'
        f'<select id="filter-task" aria-label="Task">{options(tasks, "")}</select>'
        '<label><input id="filter-fits" type="checkbox"> fits</label>'
        '<label><input id="filter-here" type="checkbox"> on disk</label>'
        '<button type="button" data-panel="models" data-name="" data-action="refresh">Look again</button></div>'
        '<div id="models-table" aria-live="off"></div><div id="shelf-page" aria-live="off"></div>'
        '<dialog id="plan" aria-labelledby="plan-title"><div class="head"><h3 id="plan-title"></h3>'
        '<button type="button" class="close" aria-label="Close">×</button></div><p id="plan-about"></p><div id="plan-form">'
        '<label>Context size <output></output><input type="range" id="plan-context" min="0" step="1"></label>'
        '<label>Cache mode <select id="plan-cache"></select></label>'
        '<label>Bits per weight <output></output><input type="range" id="plan-bits" min="0" step="1"></label></div>'
        '<div id="plan-result"></div></dialog></div>'
    )


def _machine_words(place: Place, name: str) -> str:
    ram = f"{gb(place.ram_bytes)} of RAM free"
    if not place.cards:
        return f"This machine has no NVIDIA card that answers, {ram}: models run on the processor with llama.cpp."
    cards = " and ".join(f"{gb(c.free_bytes)} of {gb(c.total_bytes)}" for c in place.cards)
    own = ", after the loaded models are unloaded" if any(c.released_bytes for c in place.cards) else ""
    who = "This machine" if name == HERE else name
    return f"{who}: {cards} of VRAM free{own}, {ram}. GB are 10⁹ bytes here, so that a card of 24 GB has 25.8."


def _broken(preset: BrokenPreset) -> str:
    return f'<div class="oops"><b>{html.escape(preset.name)}</b> {html.escape(str(preset.error))}</div>'


def _task(preset: Preset, judged: list[Judged], states: list[VariantState], place: Place, here: bool) -> str:
    """A task's card: what to run, why, and what answers now."""
    now = next((state for state in states if state.chosen), None)
    best, state = next(((j, s) for j, s in zip(judged, states, strict=True) if j.recommended), (None, None))
    said = [f'<h4>{html.escape(preset.title)}</h4>']
    if best is None or state is None or best.plan is None or best.verdict is None:
        said.append("<p>No variant of this preset fits; the smallest cards need smaller models.</p>")
    else:
        said.append(
            f'<p class="best">{html.escape(best.variant.title)} {badge(best.verdict)}</p>{bar(best.plan, place, best.verdict)}'
            f'<p class="why">{html.escape(best.why)}</p>'
        )
    if here and now is not None:
        same = best is not None and now.variant is best.variant
        said.append(f'<p class="now">Answers now: {"it does" if same else html.escape(now.variant.title)}.</p>')
    if best is not None and state is not None:
        said.append(f'<div class="buttons">{_buttons(preset, state, main=True)}</div>')
    return f'<section class="task" data-preset="{html.escape(preset.name)}">{"".join(said)}</section>'


def _buttons(preset: Preset, state: VariantState, main: bool = False) -> str:
    variant = state.variant
    name, out = html.escape(f"{preset.name}/{variant.id}"), []
    if variant.repo and not state.here:
        out.append(
            f'<button type="button" class="get{" main" if main else ""}" data-panel="downloads" data-name="{name}" '
            f'data-action="start">Download{f" {gb(variant.size_bytes)}" if main and variant.size_bytes else ""}</button>'
        )
    if variant.shape is not None:
        out.append(f'<button type="button" data-plan="{name}" aria-label="Plan {html.escape(variant.title)}">Plan</button>')
    return "".join(out)


def _row(preset: Preset, order: int, judged: Judged, state: VariantState, place: Place) -> str:
    """One variant; the attributes are what the page sorts and filters by."""
    v, planned, verdict = judged.variant, judged.plan, judged.verdict
    engine = ENGINES.get(v.engine, v.engine)
    needs = planned.needs_bytes if planned else state.needs_bytes
    speed = advice.speed(planned, place) if planned and not v.bundled else 0.0  # no such estimate holds for megabytes
    words = f"{v.title} {engine} {v.engine} {v.licence} {v.repo} {preset.title} {v.cache_mode}".lower()
    attributes = {
        "preset": preset.name, "text": words, "fits": int(verdict is not None and verdict.fits), "here": int(state.here),
        "title": v.title.lower(), "order": order, "bpw": f"{v.bpw or 0:g}", "cache": v.cache_mode, "context": v.context,
        "size": v.size_bytes, "needs": needs, "speed": f"{speed:.2f}", "spare": verdict.spare_bytes if verdict else 0,
    }  # fmt: skip
    data = " ".join(f'data-{key}="{html.escape(str(value))}"' for key, value in attributes.items())
    marks = []
    if judged.recommended:
        marks.append('<span class="badge best">recommended</span>')
    if state.chosen:
        marks.append('<span class="badge answers">answers</span>')
    elif state.here:
        marks.append(f'<span class="badge">{"bundled" if v.bundled else "on disk"}</span>')
    if state.state == "damaged":
        marks.append(f'<span class="badge no" title="{html.escape(state.why)}">damaged</span>')
    states = {advice.READY: "", advice.INSTALLABLE: ", not installed"}
    small = " · ".join(filter(None, [engine + states.get(judged.engine, ", not usable here"), v.licence]))
    reason = "" if judged.engine in states else f' title="{html.escape(judged.engine)}"'
    drawn = f"{gb(needs)}{bar(planned, place, verdict)}" if planned and verdict else gb(needs) if needs else "–"
    cells = (
        f'<b>{html.escape(v.title)}</b> {" ".join(marks)}<small{reason}>{html.escape(small)}</small>'
        + (f'<small class="why">{html.escape(state.why)}</small>' if state.state == "damaged" else ""),
        html.escape(preset.title),
        _bits(judged), v.cache_mode, f"{v.context:,}",
        gb(v.size_bytes) if v.size_bytes else "–",
        f'{drawn}<small>{"VRAM" if planned and planned.setup.gpus else "RAM"}</small>',
        f"≈ {speed:.0f} t/s" if speed >= 1 else "< 1 t/s" if speed else "–",
        badge(verdict), f'<div class="buttons">{_buttons(preset, state)}</div>',
    )  # fmt: skip
    body = "".join(
        f'<td data-label="{title}">{cell}</td>' for (title, _), cell in zip(COLUMNS, cells, strict=True)
    )
    chosen = " recommended" if judged.recommended else ""
    return f'<tr class="variant{chosen}" {data}>{body}</tr>'


def _bits(judged: Judged) -> str:
    v = judged.variant
    scheme = judged.plan.setup.quantization.scheme if judged.plan else planner.scheme_of(v.file)
    return html.escape(scheme or (f"{v.bpw:g}" if v.bpw else "–"))
