"""What a model takes, drawn: a bar of its parts against the memory that is there, and the words beside it."""

from __future__ import annotations

import html
from collections.abc import Sequence

from modules.advice import Place
from modules.planner import Plan, Verdict, in_gb

# The parts that a bar shows apart; what they hold, in the planner's words. The rest is working memory.
GROUPS = (
    ("Weights", ("weights", "output head", "embedding")),
    ("KV cache", ("KV cache", "recurrent state", "cache scratch")),
    ("Vision tower", ("vision tower", "image transients")),
    ("Draft model", ("draft model",)),
)
REST = "Working memory"
VERDICTS = {"fits": "fits", "tight": "tight", "does not fit": "no"}


def gb(count: int) -> str:
    """A size for people: 14.4 GB, 312 MB."""
    return in_gb(count) if count >= 10**8 else f"{count / 1e6:.1f} MB"


def groups(planned: Plan) -> list[tuple[str, int]]:
    """The plan's parts as the bar shows them: name and bytes, in the memory that decides."""
    where = "gpu" if planned.setup.gpus else "host"
    found = []
    for name, members in GROUPS:
        size = sum(part.bytes for part in planned.parts if part.where == where and part.name in members)
        found.append((name, size))
    found.append((REST, planned.needs_bytes - sum(size for _, size in found)))
    return found


def bar(planned: Plan, place: Place, verdict: Verdict) -> str:
    """HTML of the stacked bar. The line in it is the end of the card's memory, where the model reaches beyond."""
    room = place.room(planned.setup, over_all=planned.setup.gpus > 1)
    others = max(0, room.total_bytes - room.free_bytes)
    scale = max(room.total_bytes, others + planned.needs_bytes, 1)
    pieces = [("Other programs", others, "others"), *((name, size, f"p{n}") for n, (name, size) in enumerate(groups(planned)))]
    drawn = "".join(
        f'<i class="{kind}" style="width:{100 * size / scale:.2f}%"></i>' for _, size, kind in pieces if size > 0
    )
    end = 100 * room.total_bytes / scale
    line = f'<u style="left:{end:.2f}%"></u>' if room.total_bytes and end < 99.9 else ""
    words = html.escape(", ".join(f"{name} {gb(size)}" for name, size, _ in pieces if size > 0))
    return f'<span class="parts" role="img" aria-label="{words}" title="{words}">{drawn}{line}</span>'


def legend(planned: Plan, place: Place) -> str:
    """The bar's colours with their sizes."""
    room = place.room(planned.setup, over_all=planned.setup.gpus > 1)
    others = max(0, room.total_bytes - room.free_bytes)
    rows = [(name, size, f"p{n}") for n, (name, size) in enumerate(groups(planned)) if size > 0]
    if others:
        rows.insert(0, ("Other programs", others, "others"))
    if room.free_bytes > planned.needs_bytes:
        rows.append(("Left free", room.free_bytes - planned.needs_bytes, "free"))
    return '<ul class="legend">' + "".join(
        f'<li><i class="{kind}"></i>{html.escape(name)} <b>{gb(size)}</b></li>' for name, size, kind in rows
    ) + "</ul>"  # fmt: skip


def badge(verdict: Verdict | None) -> str:
    """The verdict as a coloured mark with its number; the whole sentence on hovering."""
    if verdict is None:
        return '<span class="badge">not known</span>'
    what = f"{gb(-verdict.spare_bytes)} missing" if verdict.spare_bytes < 0 else f"{gb(verdict.spare_bytes)} spare"
    return (
        f'<span class="badge {VERDICTS[verdict.kind]}" title="{html.escape(verdict.words)}">{verdict.kind}</span> '
        f'<small class="spare">{what}</small>'
    )


def command(*lines: tuple[str, str]) -> str:
    """Lines to copy, each with what it is for."""
    return "".join(
        f'<div class="command"><span>{html.escape(what)}</span><code>{html.escape(text)}</code>'
        '<button type="button" class="copy" data-copy>Copy</button></div>'
        for what, text in lines if text
    )  # fmt: skip


def options(values: Sequence[tuple[str, str]], chosen: str) -> str:
    """The <option>s of a <select>, value and label each."""
    return "".join(
        f'<option value="{html.escape(value)}"{" selected" if value == chosen else ""}>{html.escape(label)}</option>'
        for value, label in values
    )
