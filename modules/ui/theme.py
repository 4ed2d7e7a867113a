"""Looks: gradio's theme, the style sheet, the page's head. No font, script or picture comes from elsewhere."""

from __future__ import annotations

import json

import gradio as gr

from modules import assets
from modules.settings import Settings


def theme() -> gr.themes.Base:
    """Teal on zinc with the system's own font: nothing to download."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="zinc",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        body_background_fill="white",
        body_background_fill_dark="*neutral_950",
    )


def stylesheet() -> str:
    """The page's CSS."""
    return assets.stylesheet()


def head(settings: Settings) -> str:
    """The script of the page, and which tab to open."""
    start = json.dumps({"preset": settings.preset}).replace("<", "\\u003c")
    scripts, sheet = (assets.address("page.js"), assets.address("models.js")), assets.address("outer.css")
    return (
        f"<script>window.turntable={start}</script>"
        + "".join(f'<script defer src="{script}"></script>' for script in scripts)
        + f'<link rel="stylesheet" href="{sheet}"><link rel="icon" href="/assets/icon.svg" type="image/svg+xml">'
    )
