"""What is on the disk, on the Models page: sizes, last use, which preset uses it, and deleting with undo.

HTML is made here on the server, escaped; live.py sends it whenever something changes.
Knows no gradio.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable

from modules.errors import InvalidRequest
from modules.shelf import Deleted, OnDisk, Shelf
from modules.ui.bars import gb


class ShelfPanel:
    """The models folder as a list. changed is called after every button, so that all pages look again."""

    def __init__(
        self, shelf: Shelf, changed: Callable[[], None] = lambda: None, now: Callable[[], float] = time.time
    ) -> None:
        self._shelf, self._changed, self._now = shelf, changed, now

    def html(self) -> str:
        """The folder's models, the largest first, below what can still be taken back."""
        models, deleted = self._shelf.models(), self._shelf.deleted()
        if not models and not deleted:
            return "<h3>On disk</h3><p>No model has been downloaded yet. The bundled demo models are part of Turntable.</p>"
        total = sum(model.size_bytes for model in models)
        rows = "".join(self._row(model) for model in models)
        table = (
            "<table class='shelf'><thead><tr><th>Model</th><th>Size</th><th>Last used</th><th>Used by</th><th></th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
        said = f"{len(models)} model{'s' if len(models) != 1 else ''}, {gb(total)}."
        return f"<h3>On disk</h3><p>{said}</p>{''.join(map(_gone, deleted))}{table if models else ''}"

    def act(self, name: str, action: str) -> None:
        """A button: delete a model by its name; undo or free what was deleted, by its id. Raises TurntableError."""
        change = {"delete": self._shelf.delete, "undo": self._shelf.undo, "free": self._shelf.free}.get(action)
        if change is None:
            raise InvalidRequest(f"A model on the disk cannot be told to {action!r}.")
        try:
            change(name)
        finally:
            self._changed()  # after a failure too: what the page showed may be out of date

    def _row(self, model: OnDisk) -> str:
        users = html.escape(", ".join(model.used_by)) or "no preset"
        last = _ago(self._now() - model.last_used_s) if model.last_used_s else "never"
        cells = (
            ("Model", f"<b>{html.escape(model.name)}</b>"), ("Size", gb(model.size_bytes)), ("Last used", last),
            ("Used by", users), ("", _button("delete", model.name, "Delete", f"Delete {model.name}")),
        )  # fmt: skip
        return "<tr>" + "".join(f'<td data-label="{label}">{cell}</td>' for label, cell in cells) + "</tr>"


def _gone(deleted: Deleted) -> str:
    left = max(1, round(deleted.left_s / 60))
    return (
        f'<div class="gone" role="status"><span><b>{html.escape(deleted.name)}</b> was deleted. It can be had back for '
        f"{left} minute{'s' if left != 1 else ''}; its {gb(deleted.size_bytes)} are free after that.</span>"
        f'{_button("undo", deleted.id, "Undo")}{_button("free", deleted.id, "Free the space now")}</div>'
    )


def _button(action: str, name: str, label: str, spoken: str = "") -> str:
    aria = f' aria-label="{html.escape(spoken)}"' if spoken else ""
    where = f'data-panel="shelf" data-name="{html.escape(name)}" data-action="{action}"'
    return f'<button type="button" {where}{aria}>{label}</button>'


def _ago(seconds: float) -> str:
    if seconds < 3600:
        return "within the hour"
    if seconds < 86400:
        return "today" if seconds < 43200 else "within the day"
    days = round(seconds / 86400)
    return f"{days} day{'s' if days != 1 else ''} ago"
