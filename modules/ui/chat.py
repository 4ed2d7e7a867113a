"""The frame of the page: status strip, sidebar, a tab for each preset, and the Models page."""

from __future__ import annotations

import html
import json

import gradio as gr

from modules.assistant import Assistant
from modules.errors import TurntableError
from modules.presets import Preset
from modules.settings import Settings
from modules.ui import models

TITLE = "Turntable"


def blocks(assistant: Assistant, settings: Settings) -> gr.Blocks:
    """The whole page. Presets are read here: a new file is a new tab at the next start."""
    presets = assistant.presets.list()
    opened = next((p.name for p in presets if p.name == settings.preset), presets[0].name if presets else "models")
    with gr.Blocks(title=TITLE, fill_height=True, fill_width=True) as demo:
        gr.HTML(_strip(presets), elem_id="strip", padding=False)
        with gr.Row(elem_id="shell"):
            with gr.Column(elem_id="side", min_width=0):
                gr.Button("+ New chat", elem_id="new-chat", variant="secondary", size="md")
                gr.HTML('<nav id="chat-list" aria-label="Conversations"></nav>', padding=False)
            with gr.Tabs(elem_id="tabs", selected=opened):
                for preset in presets:
                    with gr.Tab(preset.title, id=preset.name, elem_id=f"panel-{preset.name}", render_children=True):
                        _panel(assistant, preset)
                with gr.Tab("Models", id="models", elem_id="panel-models", render_children=True):
                    _models_page(assistant)
                with gr.Tab("System", id="system", elem_id="panel-system", render_children=True):
                    _system_page()
    page: gr.Blocks = demo
    return page


def _strip(presets: list[Preset]) -> str:
    """Status strip and tab bar. The bar presses gradio's own tabs; unlike those it scrolls on a phone."""
    tabs = [(p.name, p.title) for p in presets] + [("models", "Models"), ("system", "System")]
    buttons = "".join(
        f'<button type="button" role="tab" id="tab-{name}" data-tab="{name}" aria-selected="false">{html.escape(title)}</button>'
        for name, title in tabs
    )
    return (
        '<header id="topbar"><button type="button" id="side-toggle" aria-label="Conversations" aria-expanded="false">'
        "<i></i><i></i><i></i></button>"
        f'<div id="tabbar" role="tablist" aria-label="Presets">{buttons}</div>'
        '<div id="status" role="status" aria-live="off"><b class="dot"></b><span id="status-model">No model loaded</span>'
        '<span id="status-bar" hidden><i></i></span><span id="status-speed"></span></div></header>'
    )


def _panel(assistant: Assistant, preset: Preset) -> None:
    name = preset.name
    with gr.Column(elem_classes="chatwrap"):
        gr.HTML(_log(assistant, preset), elem_id=f"chat-{name}", elem_classes="chatbox", padding=False)
        with gr.Column(elem_classes="composer", elem_id=f"composer-{name}"):
            if preset.task == "vision":
                gr.HTML(_pictures(), elem_id=f"image-{name}", elem_classes="pictures", padding=False)
            with gr.Row(elem_classes="line"):
                gr.Textbox(
                    placeholder=f"Message {preset.title}", elem_id=f"message-{name}", elem_classes="message", lines=1,
                    max_lines=8, container=False, show_label=False, label=f"Message to {preset.title}", scale=1,
                )  # fmt: skip
                gr.Button("Send", elem_id=f"send-{name}", elem_classes="send", variant="primary", min_width=72, scale=0)
                gr.Button("Stop", elem_id=f"stop-{name}", elem_classes="stop", variant="stop", min_width=72, scale=0)


def _log(assistant: Assistant, preset: Preset) -> str:
    """The empty conversation: what this tab is for, what answers, and something to try."""
    try:
        variant = assistant.choose(preset)[0]
        demo, answers = bool(variant.bundled), variant.title
    except TurntableError as error:
        demo, answers = False, f"{error} {error.hint}"
    data = json.dumps({
        "title": preset.title, "about": preset.about, "task": preset.task, "examples": list(preset.examples),
        "demo": demo, "answers": answers,
    })  # fmt: skip
    return f'<div class="log" role="log" aria-label="Conversation" data-preset="{preset.name}" data-about="{html.escape(data)}"></div>'


def _pictures() -> str:
    return (
        '<div class="tray" aria-label="Pictures to send"></div><div class="picture-buttons">'
        '<label class="pick">Add picture<input type="file" accept="image/png,image/jpeg,image/webp" multiple></label>'
        '<button type="button" class="camera">Camera</button><span class="hint">or paste, or drop it here</span></div>'
    )


def _system_page() -> None:
    """Empty here: live.py sends what belongs into it."""
    with gr.Column(elem_classes="page"):
        gr.HTML('<div id="system-page" class="models" aria-live="off"></div>', padding=False)
        gr.HTML('<div id="bench-page" class="models" aria-live="off"></div>', padding=False)
        gr.HTML('<div id="measured-page" class="models" aria-live="off"></div>', padding=False)


def _models_page(assistant: Assistant) -> None:
    """The fields; live.py sends the lists into them."""
    with gr.Column(elem_classes="page wide"):
        gr.HTML(models.shell(assistant), elem_id="models-list", padding=False)
