"""The program as a person starts it: commands, errors, the port, the gate around everything, the end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from .browser.conftest import Server, free_port
from .conftest import ROOT, eventually

PRESET = """title = "Slow"
task = "assistant"
order = 9
[sampling]
max_tokens = 9000
[[variants]]
title = "Fake"
engine = "fake"
path = "{path}"
context = 32768
"""


def run(tmp_path: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "app.py"), "--data-dir", str(tmp_path / "data"), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path, **options)


def test_help_reads_as_if_somebody_cared(tmp_path):
    done = run(tmp_path, "--help")
    assert done.returncode == 0 and "ask" in done.stdout and "--memory-budget" in done.stdout and done.stderr == ""


def test_ask_prints_the_answer(tmp_path):
    done = run(tmp_path, "ask", "reasoning", "What is 12 + 13?")
    assert done.returncode == 0 and done.stdout.endswith("The answer is 25.\n") and "12+13=25" in done.stdout
    assert done.stderr == "" and not (tmp_path / "data" / "chats.db").exists()


def test_ask_json_holds_text_reasoning_counts_and_timings(tmp_path):
    done = run(tmp_path, "ask", "reasoning", "-", "--json", input="What is 12 + 13?")
    answer = json.loads(done.stdout)
    assert answer["text"] == "The answer is 25." and "12+13=25" in answer["reasoning"] and answer["reason"] == "stop"
    assert answer["counts"]["completion"] > answer["counts"]["reasoning"] > 0
    assert answer["timings"]["tokens_per_second"] > 0 and answer["error"] is None


def test_ask_about_a_picture(tmp_path):
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (400, 300), "white")
    ImageDraw.Draw(image).ellipse([164, 114, 236, 186], fill="red")
    image.save(tmp_path / "a b.png")
    done = run(tmp_path, "ask", "vision", "What do you see?", "--image", "a b.png")
    assert done.returncode == 0 and "red circle" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ask", "reasonin", "x"], 1, "reasoning"), (["ask", "vision", "what?"], 1, "no picture"),
        (["ask", "vision", "x", "--image", "none.png"], 2, "No such file"), (["--port", "x"], 2, "not a whole number"),
        (["--lan"], 2, "not built yet"), (["ask", "assistant", " "], 1, "empty"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(tmp_path, arguments, code, words):
    done = run(tmp_path, *arguments)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use_and_a_data_folder_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(tmp_path, "--port", str(taken.getsockname()[1]))
        assert done.returncode == 2 and "is in use" in done.stderr and "--port" in done.stderr
    with running(tmp_path):
        done = run(tmp_path, "--port", str(free_port()))
        assert done.returncode == 2 and "Another Turntable" in done.stderr and "--data-dir" in done.stderr


class running:
    """A server for a `with` block."""

    def __init__(self, tmp_path: Path, *arguments: str, wait: bool = True) -> None:
        self.server, self.waits = Server(tmp_path, *arguments), wait

    def __enter__(self) -> Server:
        return self.server.wait() if self.waits else self.server

    def __exit__(self, *problem) -> None:
        if self.server.child.poll() is None:
            self.server.stop()


def ask(port: int, method: str = "GET", path: str = "/ready", body: bytes | None = None, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if body is not None:
        headers.setdefault("Content-Length", str(len(body)))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply, text


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("app")) as started:
        yield started


def test_the_port_answers_at_once_with_a_waiting_page(tmp_path):
    with running(tmp_path, wait=False) as server:
        began = time.monotonic()
        while True:
            try:
                reply, text = ask(server.port, path="/")
                break
            except OSError:
                assert time.monotonic() - began < 5
                time.sleep(0.01)
        assert reply.status == 503 and b"Turntable is starting" in text
        server.wait()
        reply, text = ask(server.port, path="/")
        assert reply.status == 200 and b"gradio" in text.lower()


def test_it_listens_on_loopback_only(server):
    opened = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) == server.port:
                opened.append(address)
    assert opened == ["0100007F"]


def test_the_gate_stands_before_everything(server):
    own = f"127.0.0.1:{server.port}"
    for path in ("/", "/ready", "/config", "/assets/page.js", "/gradio_api/info"):
        assert ask(server.port, path=path, Host="evil.example")[0].status == 421, path
    assert ask(server.port, "POST", "/upload", b"x", Origin="http://evil.example")[0].status == 403
    assert ask(server.port, "POST", "/gradio_api/upload", b"x", Origin="null")[0].status == 403
    assert ask(server.port, "POST", "/upload", b"x", Sec_Fetch_Site="cross-site")[0].status == 403
    assert ask(server.port, "POST", "/upload", Content_Length=str(10**9))[0].status == 413
    reply, _ = ask(server.port, path="/", Origin=f"http://{own}")
    assert "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
    assert reply.headers["X-Content-Type-Options"] == "nosniff" and reply.headers["Access-Control-Allow-Origin"] is None
    with pytest.raises(InvalidStatus):
        connect(f"ws://{own}/live", origin="http://evil.example")


def test_pictures_are_refused_with_a_sentence_and_never_served_by_guessing(server):
    reply, text = ask(server.port, "POST", "/upload", b"<svg/>")
    assert reply.status == 415 and "SVG" in json.loads(text)["error"]["message"]
    for path in ("/image/../chats.db", "/image/%2e%2e%2fchats.db", "/image/" + "0" * 32):
        assert ask(server.port, path=path)[0].status in (400, 404), path


def test_nonsense_on_the_socket_is_answered_and_survived(server):
    with connect(f"ws://127.0.0.1:{server.port}/live") as socket_:
        for line in ("nonsense", "[]", "{}", '{"do":"send"}', '{"do":"fly"}', '{"do":"send","preset":"nobody","text":"x"}',  # noqa: E501
                     '{"do":"open","preset":"assistant","chat":"nope"}', '{"do":"earlier","chat":"x","before":"y"}'):  # fmt: skip  # noqa: E501
            socket_.send(line)
            while (frame := json.loads(socket_.recv(timeout=5)))["t"] != "error":
                pass
            assert frame["message"] and frame["code"]


def test_a_question_is_answered_to_the_page_that_asked_and_by_its_name(server):
    with connect(f"ws://127.0.0.1:{server.port}/live") as one, connect(f"ws://127.0.0.1:{server.port}/live") as other:

        def ask(ref, **said):
            one.send(json.dumps({"do": "ask", "ref": ref, **said}))

        frames = {}

        def heard(ref):  # answers may overtake each other
            while ref not in frames:
                frame = json.loads(one.recv(timeout=10))
                frames[frame.get("ref")] = frame
            return frames[ref]

        ask("a", to="models", place="RTX 4090, 24 GB")
        assert "recommended" in heard("a")["html"]
        ask("b", to="models", place="a toaster")
        ask("c", to="plan")
        ask("d", to="nobody")
        assert (refused := heard("b"))["t"] == "error" and "toaster" in refused["message"]
        assert heard("c")["code"] == heard("d")["code"] == "invalid_request"
        other.send(json.dumps({"do": "ask", "ref": "e", "to": "models"}))
        while (frame := json.loads(other.recv(timeout=10)))["t"] != "told":
            assert frame.get("ref") is None
        assert frame["ref"] == "e" and "no NVIDIA card" in frame["html"]


def test_sigterm_in_the_middle_of_answers_keeps_their_parts(tmp_path):
    presets = tmp_path / "data" / "presets"
    presets.mkdir(parents=True)
    (tmp_path / "slow.plan").write_text('{"tokens_per_second": 50}')
    (presets / "slow.toml").write_text(PRESET.format(path=tmp_path / "slow.plan"))
    with running(tmp_path, "--engine", "fake=tests.fake_engine:FakeEngine") as server:
        with connect(f"ws://127.0.0.1:{server.port}/live") as page:
            page.send('{"do":"send","preset":"slow","text":"say 5000"}')
            while "w20 " not in page.recv(timeout=10):
                pass
            children = server.engines()
            began = time.monotonic()
            os.kill(server.child.pid, signal.SIGTERM)
            assert server.child.wait(6) == 0 and time.monotonic() - began < 5
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        assert "Traceback" not in server.log()
        server._log.close()
    import sqlite3

    with sqlite3.connect(tmp_path / "data" / "chats.db") as db:
        text = json.dumps(db.execute("select * from messages").fetchall())
    db.close()
    assert "w20 " in text and "stopped" in text


def test_a_killed_server_leaves_no_orphan_and_marks_the_half_answer(tmp_path):
    presets = tmp_path / "data" / "presets"
    presets.mkdir(parents=True)
    (tmp_path / "slow.plan").write_text('{"tokens_per_second": 50}')
    (presets / "slow.toml").write_text(PRESET.format(path=tmp_path / "slow.plan"))
    arguments = ("--engine", "fake=tests.fake_engine:FakeEngine")
    with running(tmp_path, *arguments) as server, connect(f"ws://127.0.0.1:{server.port}/live") as page:
        page.send('{"do":"send","preset":"slow","text":"say 5000"}')
        while "w80 " not in page.recv(timeout=10):
            pass
        children = server.engines()
        server.child.kill()
        server.child.wait()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 3)
        server._log.close()
    with running(tmp_path, *arguments) as server, connect(f"ws://127.0.0.1:{server.port}/live") as page:
        while (frame := json.loads(page.recv(timeout=5)))["t"] != "chats":
            pass
        page.send(json.dumps({"do": "open", "preset": "slow", "chat": frame["chats"][0]["id"]}))
        while (frame := json.loads(page.recv(timeout=5)))["t"] != "chat":
            pass
        answer = frame["messages"][-1]
        assert answer["state"] == "broken" and "w1 " in answer["html"] and "ended while" in answer["error"]["message"]


def test_the_page_is_served_without_a_request_to_elsewhere(server):
    page = urllib.request.urlopen(server.url + "/", timeout=10).read().decode()
    for word in ("fonts.googleapis", "cdn.", "gstatic", "analytics.gradio"):
        assert f"//{word}" not in page
