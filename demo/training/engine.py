"""Asks a GGUF file in xllamacpp's llama.cpp, greedily: what the tests and the evaluation use."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import xllamacpp
from PIL import Image

MODELS = Path(__file__).resolve().parent.parent / "models"
MAX_TOKENS = 260


def gguf_path(name: str, models: Path = MODELS) -> Path:
    return models / f"{name}-q8_0.gguf"


class Demo:
    """One demo model in this process. `name` is assistant, coding, reasoning or vision."""

    def __init__(self, name: str, models: Path = MODELS) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf_path(name, models))
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.fit_params, params.use_jinja, params.cache_ram_mib = False, False, True, 0
        params.verbosity = -1
        if name == "vision":
            params.mmproj.path = str(gguf_path("vision-mmproj", models))
            params.image_min_tokens = params.image_max_tokens = 16
        self.server = xllamacpp.Server(params)

    def ask(self, question: str, image: Image.Image | None = None) -> str:
        """The whole answer to a single message."""
        content: Any = question
        if image is not None:
            store = io.BytesIO()
            image.save(store, "PNG")
            url = "data:image/png;base64," + base64.b64encode(store.getvalue()).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        reply = self.server.handle_chat_completions({
            "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "temperature": 0, "top_k": 1})
        return str(reply["choices"][0]["message"]["content"])
