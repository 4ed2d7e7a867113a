"""Downloads on the Models page: the jobs with their bars, and what their buttons do.

HTML is made here on the server, escaped; live.py sends it whenever a job moves. The
jobs belong to the server, so every page sees the same ones. Knows no gradio.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from modules.downloads import RUNNING, Downloads, JobView, progress_line
from modules.errors import InvalidRequest
from modules.hub import Ref
from modules.lookup import FOLDER
from modules.presets import Presets

WORDS = {
    "queued": "waits for another download", "planning": "asking what is needed", "checking": "checking what is here",
    "downloading": "downloading", "publishing": "putting it in place", "paused": "paused", "failed": "failed",
    "done": "ready", "cancelled": "cancelled",
}  # fmt: skip


class DownloadsPanel:
    """What stands above the list of models."""

    def __init__(self, downloads: Downloads, presets: Presets) -> None:
        self._downloads, self._presets = downloads, presets

    def html(self) -> str:
        """The jobs, newest last; empty where there are none."""
        jobs = [job for job in self._downloads.jobs() if job.state != "cancelled"]
        if not jobs:
            return ""
        return '<h3>Downloads</h3><div class="engines">' + "".join(map(_job, jobs)) + "</div>"

    def act(self, name: str, action: str) -> None:
        """A button: start PRESET/VARIANT, fetch what plan.py calls hub:REPOSITORY|FILE|PROJECTOR, or pause, resume,
        cancel or dismiss a job by its id. Raises TurntableError."""
        if action == "start":
            self._downloads.start(self._ref(name))
        elif action == "fetch":
            repo, file, projector = (*name.removeprefix("hub:").split("|"), "", "")[:3]
            self._downloads.start(Ref.parse(repo, "" if file == FOLDER else file, projector))
        elif action == "pause":
            self._downloads.pause(name)
        elif action == "resume":
            self._downloads.resume(name)
        elif action == "cancel":
            self._downloads.cancel(name)
        elif action == "dismiss":
            self._downloads.dismiss(name)
        else:
            raise InvalidRequest(f"A download cannot be told to {action!r}.")

    def token(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The hub's access token: {"token"} keeps one, {"forget": true} deletes it, {} tells whether there is one.

        It is checked with the hub and lies in the hub library's file alone. Raises AccessDenied or SourceUnreachable.
        """
        if said.get("forget"):
            self._downloads.forget_token()
        elif given := str(said.get("token") or "").strip():
            self._downloads.save_token(given)
        return {"html": "A token is kept." if self._downloads.has_token else "No token is kept."}

    def _ref(self, name: str) -> Ref:
        preset, _, wanted = name.partition("/")
        for variant in self._presets.get(preset).variants:
            if variant.id == wanted and variant.repo:
                return Ref.of(variant)
        raise InvalidRequest(f"The preset {preset} has no variant {wanted!r} that can be downloaded.")


def _job(job: JobView) -> str:
    share = 100 * job.done_bytes / job.total_bytes if job.total_bytes else 0.0
    title = f"{job.repo}{f'@{job.revision}' if job.revision else ''} {job.file}".strip()
    figures = progress_line(job).partition("]")[2].strip() if job.state != "done" and job.total_bytes else ""
    parts = [
        f'<section class="engine" data-state="{job.state}"><div class="top"><b>{html.escape(title)}</b>'
        f'<span class="badge {job.state}">{WORDS[job.state]}</span><small>{html.escape(figures)}</small></div>'
    ]
    if job.state not in ("done", "failed"):
        parts.append(
            f'<div class="bar" role="progressbar" aria-valuenow="{share:.0f}" aria-label="{html.escape(title)}">'
            f'<i style="width:{share:.1f}%"></i></div>'
        )
    if job.error:
        said = f"{job.error['message']} {job.error['hint']}"
        parts.append(f'<p class="why" role="alert">{html.escape(said)}</p>')
    elif job.note:
        parts.append(f"<p>{html.escape(job.note)}</p>")
    elif job.state == "done":
        parts.append(f"<p>{html.escape(job.folder)}</p>")
    return "".join(parts) + f'<div class="buttons">{_buttons(job)}</div></section>'


def _buttons(job: JobView) -> str:
    def button(action: str, label: str, extra: str = "") -> str:
        name = html.escape(job.id)
        return f'<button type="button" data-panel="downloads" data-name="{name}" data-action="{action}"{extra}>{label}</button>'

    if job.state in RUNNING:
        return button("pause", "Pause") + button("cancel", "Cancel", ' data-sure="Delete what is here?"')
    if job.state in ("paused", "failed"):
        return button("resume", "Go on") + button("cancel", "Delete", ' data-sure="Delete what is here?"')
    return button("dismiss", "Dismiss")  # it is done
