"""The plan of one model: what it takes at a context size, a cache mode and bits, and whether that fits a machine.

Serves the dialog of the Models page (assets/models.js), which asks anew while its
sliders move. Models are a preset's variants, or repositories that somebody typed in,
of which only metadata is read.
"""

from __future__ import annotations

import html
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from modules import advice, planner
from modules.advice import Place
from modules.assistant import Assistant
from modules.errors import InvalidRequest
from modules.hub import Ref
from modules.lookup import FOLDER, Choices, Found, Lookup, found_of
from modules.planner import Plan, Quantization, Setup, Verdict
from modules.presets import CACHE_MODES, Preset, Shape, Variant, dumps
from modules.ui.bars import VERDICTS, bar, command, gb, legend, options
from modules.ui.models import ENGINES

CONTEXTS = (
    1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 20480, 24576, 32768, 40960, 49152, 65536, 98304, 131072, 196608, 262144,
)  # fmt: skip
SCHEMES = ("IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
REMEMBERED = 32  # repositories that were looked up
MOST_CHOICES = 60


class Planning:
    """Answers the dialog's questions. place gives a machine by its name on the page. Thread-safe."""

    def __init__(self, assistant: Assistant, lookup: Lookup, place: Callable[[str], Place]) -> None:
        self._assistant, self._lookup, self._place = assistant, lookup, place
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Found] = OrderedDict()

    def look(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """{"repo": OWNER/NAME[@REVISION], "file", "projector": for GGUF}: what there is to choose from, or {"of": id}.

        Asks the hub. Raises what downloads.py raises, and SourceNotFound.
        """
        repo, file, projector = (str(said.get(name) or "").strip() for name in ("repo", "file", "projector"))
        name, _, revision = repo.partition("@")
        if not file:
            choices = self._lookup.choices(name, revision)
            if isinstance(choices, Choices):
                return {"html": _choices(choices)}
            repo = f"{choices.repo}@{choices.revision}"
        of = f"hub:{repo}|{file}|{projector}"
        self._hub(of)
        return {"of": of, "html": ""}

    def plan(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """{"of": PRESET/VARIANT or what look() gave, "place", and where moved "context", "cache", "bits"}.

        Gives the form with its choices and the result as HTML. Raises InvalidRequest
        and, for a repository that has to be looked up again, what look() raises.
        """
        of, place = str(said["of"]), self._place(str(said.get("place") or "here"))
        found, variant = (self._hub(of), None) if of.startswith("hub:") else self._variant(of)
        setup = _moved(found.setup, said)
        tensors = found.tensors if setup.quantization == found.setup.quantization else None
        planned, verdict = advice.judge(setup, place, tensors)
        engine = ENGINES.get(setup.engine, setup.engine)
        licence = variant.licence if variant else ""
        about = [f"{planner.parameters(setup.shape) / 1e9:.1f}B parameters", f"{setup.shape.layers} layers", engine, licence]
        form = _form(found.setup, setup)
        return {
            "title": found.title, "about": " · ".join(filter(None, about)), "form": form,
            "html": self._result(found, variant, of, planned, verdict, place, tensors),
        }  # fmt: skip

    def _variant(self, of: str) -> tuple[Found, Variant]:
        preset, _, wanted = of.partition("/")
        for variant in self._assistant.presets.get(preset).variants:
            if variant.id == wanted and variant.shape is not None:
                return found_of(variant), variant
        raise InvalidRequest(f"The preset {preset} has no variant {wanted!r} that can be planned.")

    def _hub(self, of: str) -> Found:
        with self._lock:
            known = self._found.get(of)
        if known is None:
            repo, file, projector = (*of.removeprefix("hub:").split("|"), "", "")[:3]
            known = self._lookup.find(repo, file, projector)
        with self._lock:
            self._found[of] = known
            self._found.move_to_end(of)
            while len(self._found) > REMEMBERED:
                self._found.popitem(last=False)
        return known

    def _result(
        self, found: Found, variant: Variant | None, of: str, planned: Plan, verdict: Verdict, place: Place, tensors: Any
    ) -> str:  # fmt: skip
        setup = planned.setup
        parts = "".join(
            f"<tr><td>{html.escape(part.name)}</td><td>{gb(part.bytes)}</td><td>{'VRAM' if part.where == 'gpu' else 'RAM'}</td></tr>"
            for part in planned.parts if part.bytes
        )  # fmt: skip
        said = "".join(f"<li>{line}</li>" for line in _advice(found, planned, place, tensors))
        notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in planned.notes)
        return (
            f'<p class="verdict {VERDICTS[verdict.kind]}">{html.escape(verdict.words)}</p>{bar(planned, place, verdict)}'
            f'{legend(planned, place)}<ul class="advice">{said}</ul>{notes}<details><summary>All parts</summary><table>{parts}'
            f"</table></details>{self._get(found, variant, of, setup)}"
        )

    def _get(self, found: Found, variant: Variant | None, of: str, setup: Setup) -> str:
        """The commands and the button; of other bits, which are another file, nothing is known to download."""
        if setup.quantization != found.setup.quantization:
            own = _bits_of(found.setup.quantization)
            return f"<p class='note'>Other bits are another branch or file than this one of {html.escape(own)}; look it up by its name.</p>"
        return f'{self._commands(found, variant, setup)}<div class="buttons">{_download(found, variant, of)}</div>'

    def _commands(self, found: Found, variant: Variant | None, setup: Setup) -> str:
        ref = found.download.ref if found.download else Ref.of(variant) if variant is not None and variant.repo else None
        lines: list[tuple[str, str]] = []
        if ref is not None:
            at = f"@{ref.revision}" if ref.revision else ""
            more = f" --file {ref.file}" if ref.file else ""
            more += f" --projector {ref.projector}" if ref.projector else ""
            lines.append(("Download in the terminal", f"python app.py download {ref.repo}{at}{more}"))
            lines.append(("With the hub's own tool", self._assistant.library.download_command(variant or ref.variant())))
        own = found.setup
        if (setup.context, setup.cache_mode) != (own.context, own.cache_mode) or variant is None:
            lines.append(("In a preset", f'context = {setup.context}, cache_mode = "{setup.cache_mode}"'))
        text = self._preset_text(found, ref, setup) if variant is None and ref is not None else ""
        return command(*lines) + text

    def _preset_text(self, found: Found, ref: Ref, setup: Setup) -> str:
        """A preset for a repository that is in none, to copy; planned as it stands in the dialog."""
        shape = Shape(**{each.name: getattr(setup.shape, each.name) for each in fields(Shape)})
        name = re.sub(r"[^a-z0-9]+", "-", ref.repo.partition("/")[2].lower()).strip("-")[:40] or "mine"
        bits = setup.quantization.scheme or f"{_bits_of(setup.quantization)} bpw"
        variant = Variant(
            "", f"{ref.repo.partition('/')[2][:60]}, {bits}", setup.engine, repo=ref.repo, revision=ref.revision, file=ref.file,
            projector=ref.projector, bpw=round(setup.quantization.bpw, 2), cache_mode=setup.cache_mode, context=setup.context,
            max_position_embeddings=setup.shape.max_positions,
            size_bytes=found.download.size_bytes if found.download else 0, shape=shape,
        )  # fmt: skip
        sees = setup.vision and (setup.shape.vision is not None or bool(ref.projector))
        preset = Preset(name, name[:30].capitalize(), "vision" if sees else "assistant", 50, variants=(variant,))
        folder = html.escape(str(self._assistant.presets.own_folder / f"{name}.toml"))
        return (
            f"<details class='preset'><summary>A tab of its own</summary><p>Save this as <code>{folder}</code>. The tab is there "
            f"at the next start.</p><div class='code'><pre><code>{html.escape(dumps(preset))}</code></pre>"
            '<button type="button" class="copy" data-copy>Copy</button></div></details>'
        )


def _moved(setup: Setup, said: Mapping[str, Any]) -> Setup:
    """The setup as the sliders stand."""
    if said.get("context"):
        setup = replace(setup, context=max(planner.PAGE_TOKENS, min(int(said["context"]), 1 << 22)))
    if said.get("cache"):
        if said["cache"] not in CACHE_MODES:
            raise InvalidRequest(f"There is no cache mode {said['cache']!r}.")
        setup = replace(setup, cache_mode=str(said["cache"]))
    bits = str(said.get("bits") or "")
    if bits and bits != _bits_of(setup.quantization):
        if bits not in dict(_bit_choices(setup)):
            raise InvalidRequest(f"{bits} are no bits per weight to choose.")
        setup = replace(setup, quantization=_at_bits(setup.quantization, bits))
    return setup


def _at_bits(before: Quantization, bits: str) -> Quantization:
    if before.kind == "gguf":
        return replace(before, scheme=bits)
    most = planner.EXL2_MOST_BITS if before.kind == "exl2" else 16.0
    return replace(before, bpw=min(float(bits), most), head_bits=8.0 if float(bits) >= 8 else before.head_bits)


def _bits_of(quantization: Quantization) -> str:
    return quantization.scheme if quantization.kind == "gguf" else f"{quantization.bpw:.2f}".rstrip("0").rstrip(".")


def _bit_choices(setup: Setup) -> list[tuple[str, str]]:
    """Value and label, the fewest bits first; only its own where there is nothing to choose."""
    kind, own = setup.quantization.kind, _bits_of(setup.quantization)
    if kind == "gguf":
        names = SCHEMES if own in SCHEMES else (own, *SCHEMES)
        return [(name, name or "as it is") for name in names]
    if kind not in ("exl2", "exl3"):
        return [(own, f"{own} bpw")]
    most = planner.EXL2_MOST_BITS if kind == "exl2" else 16.0  # what 8 bits come to
    values = sorted({*(min(bits, most) for bits in planner.BITS), round(setup.quantization.bpw, 2)})
    return [(f"{bits:g}", "8 bpw (7.6 in fact)" if bits == planner.EXL2_MOST_BITS else f"{bits:g} bpw") for bits in values]


def _form(own: Setup, setup: Setup) -> dict[str, Any]:
    most = own.shape.max_positions or max(32768, own.context)
    contexts = sorted({*(c for c in CONTEXTS if c <= most), most, own.context, setup.context})
    return {
        "contexts": contexts, "context": setup.context, "caches": list(CACHE_MODES), "cache": setup.cache_mode,
        "bits": _bit_choices(own), "bit": _bits_of(setup.quantization),
    }  # fmt: skip


def _choices(found: Choices) -> str:
    repo, plain = html.escape(found.repo), html.escape(found.repo.partition("@")[0])
    branches = "".join(
        f'<button type="button" data-look="{plain}@{html.escape(branch)}">{_visible(branch)}</button>'
        for branch in found.branches[:MOST_CHOICES]
    )
    if not found.files:
        return f"<p>{repo} holds its weights on branches. Which one?</p><div class='choices'>{branches}</div>"
    rows = sorted(found.files.items(), key=lambda item: item[1])[:MOST_CHOICES]
    buttons = "".join(
        f'<button type="button" data-look="{repo}" data-file="{html.escape(name)}">{_visible(name)} '
        f"<small>{gb(size)}</small></button>"
        for name, size in rows
    )
    if found.folder:
        at = html.escape(found.folder)
        buttons += (
            f'<button type="button" data-look="{plain}@{at}" data-file="{FOLDER}">'
            f"the folder at {_visible(found.folder)}</button>"
        )
    pictures = ""
    if found.projectors:
        choices = [("", "without pictures"), *((name, f"with {_plain(name)}") for name in found.projectors)]
        pictures = f"<label>Pictures <select id='look-projector'>{options(choices, found.projectors[0])}</select></label>"
    more = f"<p>It has other branches, too.</p><div class='choices'>{branches}</div>" if branches else ""
    return f"<p>{repo} holds several files. Which one?</p>{pictures}<div class='choices'>{buttons}</div>{more}"


def _plain(name: str) -> str:
    """A foreign name as it is seen: a control character, such as one that turns the order of letters, is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _visible(name: str) -> str:
    return html.escape(_plain(name))


def _advice(found: Found, planned: Plan, place: Place, tensors: Any) -> list[str]:
    """Lines of HTML: what could be set otherwise, with a button that sets it."""
    setup, said = planned.setup, []
    own = replace(setup, gpus=min(setup.gpus, 1))
    if warning := planner.cache_warning(setup.shape.architecture, setup.cache_mode):
        said.append(f"<b>{html.escape(warning)}</b>")
    longest = advice.largest_context(own, place, tensors)
    if longest:
        use = "" if longest == setup.context else f' <button type="button" data-use="context" data-value="{longest}">Use</button>'
        all_of_it = ", as much as it was made for" if longest == setup.shape.max_positions else ""
        said.append(f"Largest context that fits: {longest:,} tokens{all_of_it}.{use}")
    best = advice.best_cache(own, place, tensors)
    if best and best != setup.cache_mode:
        why = "fits as well and loses less" if CACHE_MODES.index(best) < CACHE_MODES.index(setup.cache_mode) else "would fit"
        said.append(f'Cache mode {best} {why}. <button type="button" data-use="cache" data-value="{best}">Use</button>')
    if setup.quantization.kind in ("exl2", "exl3"):
        bits = advice.best_bits(own, place)
        value = min(bits, planner.EXL2_MOST_BITS) if setup.quantization.kind == "exl2" else bits
        if bits and abs(value - setup.quantization.bpw) > 0.06:
            said.append(f'Most bits per weight that fit: {bits:g}. <button type="button" data-use="bits" data-value="{value:g}">Use</button>')
    if speed := advice.speed(planned, place):
        source = f"{place.bandwidth_gb_s(setup):.0f} GB/s of {'VRAM' if setup.gpus else 'RAM, a guess'}"
        said.append(f"About {speed:.0f} tokens per second, an estimate from {source}.")
    if setup.gpus:
        copy = planner.pinned_bytes([planned])
        said.append(f"A page-locked copy for swaps at bus speed takes {gb(copy)} of RAM.")
    elif planned.setup.shape.vision and planned.setup.vision:
        said.append("Pictures take longer on a processor.")
    return said


def _download(found: Found, variant: Variant | None, of: str) -> str:
    if found.download is not None:
        return (
            f'<button type="button" class="get main" data-panel="downloads" data-name="{html.escape(of)}" data-action="fetch">'
            f"Download {gb(found.download.size_bytes)}</button>"
        )
    if variant is not None and variant.repo:
        return (
            f'<button type="button" class="get main" data-panel="downloads" data-name="{html.escape(of)}" data-action="start">'
            f"Download {gb(variant.size_bytes) if variant.size_bytes else ''}</button>"
        )
    return ""
