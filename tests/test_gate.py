"""The gate before a real server: hosts, origins, bodies, headers, sockets."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from modules.gate import Gate, GateRules

REACHED: list[str] = []


async def inner(scope, receive, send):
    """Says how much it was given; sends headers that the gate must take away."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    REACHED.append(scope["path"])
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "hello"})
        return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    headers = [
        (b"access-control-allow-origin", b"*"),
        (b"x-frame-options", b"ALLOWALL"),
        (b"content-type", b"text/plain"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    config = uvicorn.Config(Gate(inner, GateRules(max_body_bytes=1000)), host="127.0.0.1", port=number, log_level="error",  # noqa: E501
                            ws="websockets-sansio")  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield number
    server.should_exit = True
    thread.join(5)


def raw(port: int, request: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; status, headers and body of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        data = b""
        while piece := connection.recv(65536):
            data += piece
            if b"\r\n\r\n" in data and b"close" not in data.split(b"\r\n\r\n")[0].lower():
                head, _, rest = data.partition(b"\r\n\r\n")
                if b"0\r\n\r\n" in rest or b"content-length" in head.lower():
                    break
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {line.split(":", 1)[0].lower(): line.split(":", 1)[1].strip() for line in lines[1:]}
    return int(lines[0].split()[1]), headers, rest


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:80", "[::1]", "127.0.0.1:7860"])
def test_our_own_names_are_let_in(port, host):
    assert raw(port, f"GET / HTTP/1.1\nHost: {host}")[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "EVIL.example:7860", "localhost.", "127.0.0.1.evil.example", "localhost@evil", "127.0.0.1:x", "",
     "localhost:80:80", "0.0.0.0", "[::2]", "localhost evil", "192.168.1.20"],
)  # fmt: skip
def test_other_names_are_not(port, host):
    before = len(REACHED)
    status, _, body = raw(port, f"GET / HTTP/1.1\nHost: {host}")
    assert status in (400, 421) and len(REACHED) == before
    if status == 421 and body:
        assert json.loads(body)["error"]["code"] == "wrong_host"


def test_two_hosts_and_none(port):
    assert raw(port, "GET / HTTP/1.1\nHost: localhost\nHost: evil.example")[0] in (400, 421)
    assert raw(port, "GET / HTTP/1.0")[0] == 421


@pytest.mark.parametrize(
    "extra",
    ["Origin: http://evil.example", "Origin: null", "Origin: http://localhost.evil", "Origin: https://localhost:{port}",
     "Origin: http://localhost:1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_sites_change_nothing(port, extra, method):
    before = len(REACHED)
    status, headers, _ = raw(
        port, f"{method} /x HTTP/1.1\nHost: localhost:{port}\n{extra.format(port=port)}\nContent-Length: 0"
    )
    assert status == 403 and len(REACHED) == before and "access-control-allow-origin" not in headers


def test_our_own_page_may(port):
    own = f"Host: localhost:{port}\nOrigin: http://localhost:{port}\nSec-Fetch-Site: same-origin"
    status, headers, body = raw(port, f"POST /x HTTP/1.1\n{own}\nContent-Length: 3", b"abc")
    assert status == 200 and b"3" in body
    assert "access-control-allow-origin" not in headers and headers["x-frame-options"] == "DENY"
    assert (
        "frame-ancestors 'none'" in headers["content-security-policy"]
        and headers["x-content-type-options"] == "nosniff"
    )


def test_another_site_may_link_here_but_not_read(port):
    site = "Host: localhost\nSec-Fetch-Site: cross-site"
    assert raw(port, f"GET / HTTP/1.1\n{site}\nSec-Fetch-Mode: navigate")[0] == 200
    assert raw(port, f"GET / HTTP/1.1\n{site}\nSec-Fetch-Mode: no-cors")[0] == 403


def test_bodies_are_bounded_by_length_and_by_count(port):
    head = "POST /x HTTP/1.1\nHost: localhost\n"
    assert raw(port, head + "Content-Length: 1001")[0] == 413
    assert raw(port, head + "Content-Length: -1")[0] in (400, 403)
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    assert raw(port, head + "Transfer-Encoding: chunked", chunk * 2 + b"0\r\n\r\n")[0] == 200
    assert raw(port, head + "Transfer-Encoding: chunked", chunk * 3 + b"0\r\n\r\n")[0] == 413


def test_a_refusal_is_words_for_people_and_data_for_programs(port):
    status, headers, body = raw(port, "GET / HTTP/1.1\nHost: evil\nAccept: text/html")
    assert status == 421 and headers["content-type"].startswith("text/plain") and b"does not answer for" in body
    assert b"<" not in body


def test_sockets(port):
    address = f"ws://127.0.0.1:{port}/live"
    with connect(address, origin=f"http://127.0.0.1:{port}") as page:
        assert page.recv(timeout=5) == "hello"
    with connect(address) as terminal:
        assert terminal.recv(timeout=5) == "hello"
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        with pytest.raises((InvalidStatus, ConnectionClosed)), connect(address, origin=origin) as page:
            page.recv(timeout=5)
