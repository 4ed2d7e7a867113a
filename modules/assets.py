"""Static files of the page and the plain page that is shown while gradio is still being imported. Knows no model."""

from __future__ import annotations

import hashlib
import html
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from modules import render

FOLDER = Path(__file__).resolve().parent / "ui" / "assets"
KINDS = {"page.js": "text/javascript", "models.js": "text/javascript", "outer.css": "text/css", "icon.svg": "image/svg+xml"}
WAITING = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Turntable</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv="refresh" content="10">
<style>body{{font:16px system-ui,sans-serif;display:grid;place-items:center;height:100vh;margin:0;background:#fafafa;color:#27272a}}
@media(prefers-color-scheme:dark){{body{{background:#18181b;color:#e4e4e7}}}}main{{text-align:center;padding:1rem}}
i{{display:block;width:44px;height:44px;margin:0 auto 1rem;border-radius:50%;border:4px solid #8884;border-top-color:#0d9488;
animation:t 1s linear infinite}}@keyframes t{{to{{transform:rotate(1turn)}}}}</style></head>
<body><main id="waiting">{body}</main>
<script>setInterval(async()=>{{try{{const r=await(await fetch('/ready')).json();if(r.ready||r.failed)location.reload()}}catch(e){{}}}},{every})</script>
</body></html>"""


def stylesheet() -> str:
    """All of the page's CSS: its own and that of highlighted code."""
    return "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "models.css")) + render.css()


def address(name: str) -> str:
    """Address of a static file; it changes with the file, so that caches never serve an old one."""
    digest = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()[:12]
    return f"/assets/{name}?v={digest}"


def asset_routes() -> list[BaseRoute]:
    """Routes of the static files."""

    async def file(request: Request) -> Response:
        name = request.url.path.rsplit("/", 1)[-1].replace("favicon.ico", "icon.svg")
        body = (FOLDER / name).read_text(encoding="utf-8")
        kept = "public, max-age=31536000, immutable" if request.query_params.get("v") else "no-cache"
        return Response(body, media_type=KINDS[name], headers={"Cache-Control": kept})

    # One by one: gradio serves its own files below /assets.
    return [*(Route(f"/assets/{name}", file, name=name) for name in KINDS), Route("/favicon.ico", file, name="icon.svg")]


def waiting_page(failed: str) -> HTMLResponse:
    """What a browser sees before the page is ready, or when it could not be built."""
    if failed:
        body = f"<p><b>The page could not be built.</b></p><p>{html.escape(failed)}</p><p>The terminal and the log have the details.</p>"
        return HTMLResponse(WAITING.format(body=body, every=5000), 500)
    return HTMLResponse(
        WAITING.format(body="<i></i><p>Turntable is starting …</p>", every=200), 503, {"Retry-After": "1"}
    )
