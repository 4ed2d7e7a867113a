"""The System page: the engines of this machine, what they lack, and what is being done with them.

HTML is made here on the server, escaped; live.py sends it whenever something changes.
Knows no gradio, so that it can be used before gradio is there.
"""

from __future__ import annotations

import html
from importlib.metadata import version

from modules.environments import ABOUT_MINUTES, EngineJob, EngineJobs, Environment
from modules.errors import InstallFailed

WORDS = {
    "absent": "not installed", "broken": "not complete", "installing": "being installed", "untested": "not tried on a card",
    "failed": "self-test failed", "ready": "ready",
}  # fmt: skip
TITLES = {
    "exllamav2": ("ExLlamaV2", "EXL2, GPTQ and FP16 models on NVIDIA cards."),
    "exllamav3": ("ExLlamaV3", "EXL3 models on NVIDIA cards, the successor of ExLlamaV2."),
}


class SystemPage:
    """What the page shows and what its buttons do."""

    def __init__(self, jobs: EngineJobs) -> None:
        self._jobs = jobs

    def html(self) -> str:
        """The whole page; all foreign text is escaped. Reads the disk, so not on the event loop."""
        job = self._jobs.view()
        rows = "".join(_row(environment, job) for environment in self._jobs.environments.list())
        return (
            "<h2>System</h2><h3>Engines</h3><p>Each engine runs in processes of its own, with its own environment.</p>"
            '<div class="engines">'
            f'<section class="engine"><div class="top"><b>llama.cpp</b><span class="badge ready">ready</span>'
            f"<small>{html.escape(version('xllamacpp'))}</small></div><p>GGUF models on the processor; the bundled demo "
            f"models run on it.</p></section>{rows}</div>"
        )

    def act(self, name: str, action: str) -> None:
        """A button. Raises InstallFailed for what cannot be done now."""
        if action == "cancel":
            self._jobs.cancel()
        elif name in TITLES:
            self._jobs.start(name, action)
        else:
            raise InstallFailed(f"There is no engine {name!r}.")


def _row(environment: Environment, job: EngineJob | None) -> str:
    name = environment.name
    title, about = TITLES[name]
    mine = job if job is not None and job.name == name else None
    running = mine is not None and mine.running
    state = "installing" if running else environment.state
    facts = [f"{k} {v}" for k, v in environment.versions.items()]
    if environment.size_bytes:
        facts.append(f"{environment.size_bytes / 1e9:.1f} GB")
    if environment.tested:
        facts.append(f"tried {environment.tested}")
    badge = html.escape(WORDS[state] if not (mine and running) else f"{mine.action} …")
    parts = [
        f'<section class="engine" id="engine-{name}"><div class="top"><b>{title}</b>'
        f'<span class="badge {state}">{badge}</span><small>{html.escape(" · ".join(facts))}</small></div><p>{about}</p>'
    ]
    if mine is not None and (running or mine.error):
        parts.append(_progress(mine))
    elif environment.problem:
        parts.append(f'<p class="why">{html.escape(environment.problem)}</p>')
    parts.append(f'<div class="buttons">{_buttons(environment, running, job)}</div></section>')
    return "".join(parts)


def _progress(job: EngineJob) -> str:
    if not job.running:
        return f'<p class="why" role="alert">{html.escape(job.error)} {html.escape(job.hint)}</p>'
    lines = html.escape("\n".join(job.lines[-6:]))
    return (
        f'<p>{html.escape(job.words)}</p><div class="bar" role="progressbar" aria-valuenow="{job.fraction * 100:.0f}">'
        f'<i style="width:{job.fraction * 100:.0f}%"></i></div><pre class="lines">{lines}</pre>'
    )


def _buttons(environment: Environment, running: bool, job: EngineJob | None) -> str:
    def button(action: str, label: str, extra: str = "") -> str:
        where = f'data-panel="system" data-name="{environment.name}"'
        return f'<button type="button" {where} data-action="{action}"{extra}>{label}</button>'

    if running:
        return button("cancel", "Cancel") if job and job.action in ("install", "test") else ""
    off = " disabled" if job is not None and job.running else ""
    about = f"Install (5 GB, about {ABOUT_MINUTES[environment.name]} minutes)"
    out = []
    if environment.state in ("absent", "broken"):
        out.append(button("install", about if environment.state == "absent" else "Install again", off))
    if environment.state in ("untested", "failed", "ready"):
        out.append(button("test", "Test", off))
    if environment.state not in ("absent", "installing"):
        out.append(button("remove", "Remove", f' data-sure="Remove?"{off}'))
    return "".join(out)
