"""Tokens per second seen by a page against the bare engine; many readers; long histories. Timing-true fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.running import Reader, add_fake, program
from modules.chats import Chats
from modules.messages import Delta, EngineSpec, Message, Sampling, Start
from modules.process import EngineKind, EngineProcess

TOKENS, RATE = 500, 100


def measure() -> dict[str, Any]:
    """Print the table; the figures are seconds for an answer of 500 tokens at 100 tokens/s."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Reading the prompt is the engine's own time and grows with the history by nature; here it takes next to none.
        plan = add_fake(folder, "paced", tokens_per_second=RATE, prompt_tokens_per_second=50_000_000)
        bare_s = _bare(plan)
        chats = {turns: _history(folder, turns) for turns in (0, 100, 400)}
        with program(folder, "--engine", "fake=tests.fake_engine:FakeEngine", "--memory-budget", "1GB") as running:
            asyncio.run(_answer(running.address, 0, None, 5))  # the engine is loaded and warm from here on
            readers = {n: asyncio.run(_answer(running.address, n - 1, None, TOKENS)) for n in (1, 25, 100)}
            history = {turns: asyncio.run(_answer(running.address, 0, chat, TOKENS)) for turns, chat in chats.items()}
    figures = {
        "bare_tps": round(TOKENS / bare_s, 2), "page_tps": round(TOKENS / readers[1], 2),
        "readers": {str(n): round(s, 3) for n, s in readers.items()},
        "history": {str(n): round(s, 3) for n, s in history.items()},
    }  # fmt: skip
    print(f"{TOKENS} tokens at {RATE} tokens/s      seconds   of the bare engine")
    print(f"bare engine                     {bare_s:7.3f}   1.000")
    for n, s in readers.items():
        print(f"{n:4d} readers                    {s:7.3f}   {s / bare_s:.3f}")
    for n, s in history.items():
        print(f"history of {n:3d} turns            {s:7.3f}   {s / bare_s:.3f}")
    return figures


def _bare(plan: Path) -> float:
    """Seconds of the same answer straight from the engine's process."""
    engine = EngineProcess(EngineKind("fake", where="tests.fake_engine:FakeEngine"))
    try:
        engine.load(EngineSpec("fake", str(plan)), lambda event: None)
        engine.ping()
        began = time.monotonic()
        start = Start("x", (Message("user", f"say {TOKENS}"),), Sampling(max_tokens=10_000))
        assert sum(isinstance(e, Delta) for e in engine.generate(start)) == TOKENS
        return time.monotonic() - began
    finally:
        engine.stop()


def _history(folder: Path, turns: int) -> str:
    """A conversation of so many turns, each a question and an answer of some length."""
    chats = Chats(folder / "chats.db")
    chat = chats.create("paced").id
    for turn in range(turns):
        chats.add_user(chat, f"Question {turn} about something", (), "paced")
        answer = chats.begin_answer(chat, "paced", "Fake")
        chats.end_answer(
            answer.id, text=f"Answer {turn}. " + "It has **several** words. " * 12, reasoning="", state="done"
        )
    chats.close()
    return chat


async def _answer(address: str, followers: int, chat: str | None, tokens: int) -> float:
    """Seconds from the click until the last of the readers has the whole answer."""
    async with contextlib.AsyncExitStack() as stack:
        writer = await stack.enter_async_context(Reader(address))
        writer.chat = chat
        if chat:
            await writer.say(do="open", preset="paced", chat=chat)
            await writer.until("chat")
        others = [await stack.enter_async_context(Reader(address)) for _ in range(followers)]
        began = time.monotonic()
        await writer.send("paced", f"say {tokens}")
        for other in others:
            await other.say(do="open", preset="paced", chat=writer.chat)
        texts = await asyncio.gather(*(reader.whole_answer() for reader in [writer, *others]))
        spent = time.monotonic() - began
        assert all(text.split()[-1].endswith(f"w{tokens - 1}</p>") for text in texts), texts[0][-100:]
        return spent
