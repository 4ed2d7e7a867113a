"""The page: the only importer of gradio. What moves comes over live.py's WebSocket (assets/page.js).

Gradio's own chat renders a whole conversation at every update (facts in
docs/decisions.md), so the conversation is a log that the script appends to, and
gradio holds what surrounds it: tabs, text boxes, buttons, the sidebar, the Models page.
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
from typing import Any

from modules.assistant import Assistant
from modules.settings import Settings


def build_page(assistant: Assistant, settings: Settings) -> Any:
    """Import gradio and build the ASGI application of the page. Takes a second or two, on a thread of the caller."""
    _prepare(settings)
    import gradio as gr
    from fastapi import FastAPI

    from modules.ui.chat import blocks
    from modules.ui.theme import head, stylesheet, theme

    demo = blocks(assistant, settings)
    demo.max_threads = 40
    demo.queue(max_size=200)
    demo._queue.sleep_when_free = 0.1  # polled every millisecond as it comes: 7.5 % of a core when idle
    demo._queue.progress_update_sleep_when_free = 0.5
    demo.state_session_capacity = 200
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        outer, demo, path="/", run_history=False, footer_links=[], max_file_size="1mb", show_error=False,
        mcp_server=False, ssr_mode=False, theme=theme(), css=stylesheet(), head=head(settings),
    )  # fmt: skip


def _prepare(settings: Settings) -> None:
    """Switch off what must not run, before gradio is imported."""
    folder = settings.data_dir / "gradio"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False", GRADIO_ANALYTICS_CACHE_FREQUENCY="1000000", HF_HUB_DISABLE_TELEMETRY="1",
        GRADIO_TEMP_DIR=str(folder) if os.access(folder, os.W_OK) else tempfile.mkdtemp(prefix="turntable-"),
    )  # fmt: skip
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]  # gradio tries to import it at every update
    sys.meta_path.insert(0, _NoStubs())


class _NoStubs:
    """Keeps gradio from rewriting a .pyi file for each of its components while it is imported.

    That is for people who write components; it takes more than half of the import's
    time and fails where the environment cannot be written. The one function that does
    it is emptied between the import of its module and the first component. The finder
    stays in the list: taking it out while another thread imports would make that
    thread skip a finder.
    """

    NAME = "gradio.component_meta"

    def __init__(self) -> None:
        self._used = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.NAME or self._used:
            return None
        self._used = True
        import importlib.util

        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def run(module: types.ModuleType) -> None:
                execute(module)
                if hasattr(module, "create_or_modify_pyi"):
                    module.create_or_modify_pyi = lambda *arguments: None  # type: ignore[attr-defined]

            spec.loader.exec_module = run  # type: ignore[method-assign]
        return spec
