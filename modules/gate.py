"""The outer ASGI gate: Host, Origin, size of the body, headers. Stands before everything, gradio included.

Loopback is no trust boundary: any web page open in the same browser can send
requests here. So a request must name this machine, and one that changes something
must come from our own page. Decides on the path and the headers only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from modules.errors import AccessError, Forbidden, TooLarge, WrongHost

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HOST = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
READING = ("GET", "HEAD", "OPTIONS")
CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CSP.encode()), (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"), (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
)  # fmt: skip


@dataclass(frozen=True)
class GateRules:
    """hosts are the names that a Host header may hold, without port; max_body_bytes bounds a request's body."""

    hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost", "[::1]"})
    max_body_bytes: int = 25_000_000


class _TooMuch(Exception):
    """The body grew over the limit while it was read."""


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: Any, rules: GateRules | None = None) -> None:
        self._app, self._rules = app, rules or GateRules()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        problem = self._judge(scope)
        if scope["type"] == "websocket":
            if problem is not None:
                await receive()
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        if problem is not None:
            await _refuse(scope, send, problem)
            return
        await self._pass(scope, receive, send)

    def _judge(self, scope: Scope) -> AccessError | None:
        found: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            found.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1") for value in found.get(b"host", [])]
        match = HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None or match[1].lower() not in self._rules.hosts:
            return WrongHost(f"This server does not answer for {hosts[0] if hosts else 'a request without a host'!r}.")
        socket, method = scope["type"] == "websocket", scope.get("method", "GET")
        origins = [value.decode("latin-1").lower() for value in found.get(b"origin", [])]
        site = b",".join(found.get(b"sec-fetch-site", [])).lower()
        if socket or method not in READING:
            scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
            if origins and origins != [f"{scheme}://{hosts[0].lower()}"]:
                return Forbidden("The request came from another site.")
            if site not in (b"", b"same-origin", b"none"):
                return Forbidden("The request came from another site.")
        elif site in (b"cross-site", b"same-site") and b",".join(found.get(b"sec-fetch-mode", [])) != b"navigate":
            return Forbidden("The request came from another site.")
        return self._judge_length(found.get(b"content-length", []))

    def _judge_length(self, lengths: list[bytes]) -> AccessError | None:
        if not lengths:
            return None
        if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 15:
            return Forbidden("The request's length makes no sense.")
        if int(lengths[0]) > self._rules.max_body_bytes:
            return TooLarge(f"The request has more than {self._rules.max_body_bytes // 1_000_000} MB.")
        return None

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, started = 0, False

        async def counted() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._rules.max_body_bytes:
                raise _TooMuch
            return message

        async def dressed(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                ours = {name for name, _ in HEADERS}
                kept = [
                    (name, value) for name, value in message.get("headers", [])
                    if name.lower() not in ours and not name.lower().startswith(b"access-control-")
                ]  # fmt: skip
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        try:
            await self._app(scope, counted, dressed)
        except _TooMuch:
            if not started:
                await _refuse(
                    scope, send, TooLarge(f"The request has more than {self._rules.max_body_bytes // 1_000_000} MB.")
                )


async def _refuse(scope: Scope, send: Send, error: AccessError) -> None:
    accept = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
    if b"text/html" in accept:
        kind, body = b"text/plain; charset=utf-8", f"{error} {error.hint}\n".encode()
    else:
        kind, body = b"application/json", json.dumps({"error": error.to_wire()}).encode()
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *HEADERS,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
