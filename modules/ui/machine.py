"""The machine as HTML: cards with charts, processor, memory and disk, the requirements, and what to do.

Takes what hardware.py reports and doctor.py says of it. All foreign text is escaped:
a program on a card names itself. Measures nothing and knows no gradio.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from modules.doctor import ADVICE, OK, PROBLEM, Examination, Finding, Requirement, dotted, gib
from modules.hardware import GIB, Card, CardProcess, Cpu, Disk, Driver, Machine, Memory, Sample, System
from modules.ui.charts import Points, Series, chart

WORDS = {"not answering": "does not answer", "lost": "has disappeared", "failed": "answers with errors"}
BUSY_BYTES = GIB  # of other programs; a desktop takes less
HOT_C = 100  # top of the chart; cards slow down at 83 to 90
VERDICTS = {
    PROBLEM: "Something does not work as it is", ADVICE: "Nothing is broken; the advice makes it better",
    OK: "Everything is as it should be",
}  # fmt: skip
LEVELS = {PROBLEM: ("✗", "too little"), ADVICE: ("•", "enough"), OK: ("✓", "good")}


def overview(machine: Machine, examination: Examination) -> str:
    """The first lines: what this is, the verdict, and every problem in full."""
    system = machine.system
    inside = " in WSL" if system.wsl else f" in a container ({system.container})" if system.container else ""
    parts = [_system_words(system) + inside, _driver_words(machine.driver)]
    problems = [f for f in examination.findings if f.level == PROBLEM]
    return (
        f'<p class="surroundings">{html.escape(" · ".join(parts))}</p>'
        f'<p class="verdict level-{examination.level}"><b>{LEVELS[examination.level][0]}</b> '
        f"{VERDICTS[examination.level]}.</p>{findings(problems)}"
    )


def _system_words(system: System) -> str:
    return f"{system.os} {system.release}, Python {'.'.join(map(str, system.python))}"


def _driver_words(driver: Driver) -> str:
    if driver.state == "ok":
        return f"NVIDIA driver {driver.version or 'of unknown version'}, CUDA {dotted(driver.cuda)}"
    return {"missing": "no NVIDIA driver", "not answering": "the NVIDIA driver does not answer"}.get(
        driver.state, "the NVIDIA driver does not work"
    )


# Cards ------------------------------------------------------------------------------------------


def cards(machine: Machine, history: Sequence[Sample]) -> str:
    """Every card that ever answered."""
    if not machine.cards:
        words = machine.driver.words or "The driver lists no card."
        return f'<p>{html.escape(words)} llama.cpp runs on the processor.</p>'
    return '<div class="cards">' + "".join(_card(card, history, machine.at_s) for card in machine.cards) + "</div>"


def _card(card: Card, history: Sequence[Sample], now_s: float) -> str:
    about = [f"card {card.index}"]
    if card.capability:
        about.append(f"compute capability {dotted(card.capability)}")
    if not card.works and card.total_bytes:
        about.append(gib(card.total_bytes))
    state, words = _state(card)
    parts = [
        f'<section class="engine card" data-key="{html.escape(card.uuid)}" data-card="{card.index}" data-state="{html.escape(card.state)}">'
        f'<div class="top"><b>{html.escape(card.name)}</b><span class="badge {state}">{words}</span>'
        f"<small>{html.escape(' · '.join(about))}</small></div>"
    ]
    if card.works:
        parts += [_vram(card), f'<dl class="facts">{"".join(_fact(*fact) for fact in _facts(card))}</dl>']
    else:
        parts.append(f'<p class="why" role="alert">{html.escape(card.words)}</p>')
    parts += [_card_charts(card, history, now_s), _programs(card.processes), "</section>"]
    return "".join(parts)


def _state(card: Card) -> tuple[str, str]:
    if not card.works:
        return "damaged", WORDS[card.state]
    if (card.others_bytes or 0) >= BUSY_BYTES:
        return "busy", "in use by other programs"
    return ("ready", "in use by Turntable") if card.ours_bytes else ("ready", "free")


def _vram(card: Card) -> str:
    """What the card's memory is used for, as one bar and in words."""
    total = card.total_bytes
    if not total:
        return "<p>This card does not tell its memory.</p>"
    shares: list[tuple[str, str, int | None]]
    if card.ours_bytes is not None and card.others_bytes is not None:
        shares = [("h-ours", "Turntable", card.ours_bytes), ("h-others", "other programs", card.others_bytes)]
    else:
        shares = [("h-others", "used, by whom is not told", card.used_bytes)]
    shares += [("h-driver", "driver", card.reserved_bytes), ("h-free", "free", card.free_bytes)]
    told = [(look, label, size) for look, label, size in shares if size is not None]
    bar = "".join(f'<i class="{look}" style="width:{100 * size / total:.2f}%"></i>' for look, _, size in told)
    legend = "".join(f'<span class="{look}"><i></i>{label} <b>{gib(size)}</b></span>' for look, label, size in told)
    words = ", ".join(f"{label} {gib(size)}" for _, label, size in told)
    return (
        f'<div class="vram" role="img" aria-label="VRAM: {html.escape(words)}">{bar}</div>'
        f'<div class="holders"><span class="total">VRAM <b>{gib(total)}</b></span>{legend}</div>'
    )


def _facts(card: Card) -> Iterator[tuple[str, str, str]]:
    """Name, value and a smaller remark; only what the card tells."""
    if card.power_w is not None:
        limit = f"of {card.power_limit_w:.0f} W" if card.power_limit_w else ""
        usual = card.power_default_w
        if usual and card.power_limit_w and round(usual) != round(card.power_limit_w):
            limit += f", {usual:.0f} W by default"
        yield "Power", f"{card.power_w:.0f} W", limit
    if card.temperature_c is not None:
        slowed = [reason for reason in card.slowed_by if reason != "power limit"]
        yield "Temperature", f"{card.temperature_c} °C", f"slowed by {' and '.join(slowed)}" if slowed else ""
    if card.utilisation is not None:
        yield "Utilisation", f"{card.utilisation:.0%}", "at its power limit" if "power limit" in card.slowed_by else ""
    clocks = card.clocks
    if clocks.graphics_mhz is not None:
        yield "Clock", f"{clocks.graphics_mhz} MHz", f"of {clocks.graphics_max_mhz} MHz" if clocks.graphics_max_mhz else ""
    if clocks.memory_mhz is not None:
        yield "Memory clock", f"{clocks.memory_mhz} MHz", f"of {clocks.memory_max_mhz} MHz" if clocks.memory_max_mhz else ""
    link = card.pcie
    if link.width:
        most = f"of x{link.width_max}" if link.width_max and link.width_max != link.width else ""
        if link.generation and link.generation_max and link.generation < link.generation_max:
            most = f"{most}, resting at {link.generation}.0".lstrip(", ")
        yield "PCIe", f"{link.generation_max or link.generation or '?'}.0 x{link.width}", most
    measured = card.host_to_device_bytes_per_s
    if measured:
        yield "RAM to card", f"{measured / 1e9:.1f} GB/s", "measured"
    elif link.bytes_per_s:
        yield "RAM to card", "–", f"not measured; at most {link.bytes_per_s / 1e9:.0f} GB/s"


def _fact(name: str, value: str, remark: str) -> str:
    more = f" <small>{html.escape(remark)}</small>" if remark else ""
    return f'<div data-key="{html.escape(name)}"><dt>{html.escape(name)}</dt><dd><b>{html.escape(value)}</b>{more}</dd></div>'


def _card_charts(card: Card, history: Sequence[Sample], now_s: float) -> str:
    mine = [(sample.at_s, one) for sample in history for one in sample.cards if one.uuid == card.uuid]
    if not mine:
        return ""
    used: Points = [(at, one.used_bytes) for at, one in mine]
    ours: Points = [(at, one.ours_bytes if one.used_bytes is not None else None) for at, one in mine]
    watts: Points = [(at, one.power_w) for at, one in mine]
    heat: Points = [(at, one.temperature_c) for at, one in mine]
    load: Points = [(at, one.utilisation) for at, one in mine]
    limit = card.power_limit_w or max((value or 0 for _, value in watts), default=0) or 1.0
    total = card.total_bytes or max((value or 0 for _, value in used), default=0) or 1
    return '<div class="charts">' + "".join((
        chart("VRAM", gib(card.used_bytes) if card.used_bytes is not None else "–",
              [Series(used, "b"), Series(ours, "a")], now_s=now_s, top=total, scale=f"of {gib(int(total))}"),
        chart("Utilisation", f"{card.utilisation:.0%}" if card.utilisation is not None else "–",
              [Series(load)], now_s=now_s, top=1.0),
        chart("Temperature", f"{card.temperature_c} °C" if card.temperature_c is not None else "–",
              [Series(heat, "c")], now_s=now_s, top=HOT_C),
        chart("Power", f"{card.power_w:.0f} W" if card.power_w is not None else "–",
              [Series(watts, "d")], now_s=now_s, top=limit, scale=f"of {limit:.0f} W" if card.power_limit_w else ""),
    )) + "</div>"  # fmt: skip


def _programs(found: Sequence[CardProcess]) -> str:
    if not found:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(_shown(one.name))}{' <small>(Turntable)</small>' if one.ours else ''}</td><td>{one.pid}</td>"
        f"<td>{gib(one.used_bytes) if one.used_bytes is not None else 'not told'}</td></tr>"
        for one in found
    )
    count = f"{len(found)} programs" if len(found) > 1 else "One program"
    return (
        f'<details data-key="programs"><summary>{count} on this card</summary><table><thead><tr><th>Program</th><th>Process</th>'
        f"<th>VRAM</th></tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _shown(name: str) -> str:
    """Without characters that turn the direction of what follows, or that nobody sees."""
    return "".join(c if c.isprintable() else "�" for c in name)


# The computer ---------------------------------------------------------------------------------------


def computer(machine: Machine, history: Sequence[Sample], measuring: str) -> str:
    """Processor, RAM and disk. measuring is how far the disk's measurement is, in words; empty where it is at rest."""
    return (
        '<div class="computer">'
        + _processor(machine.cpu, history, machine.at_s)
        + _memory(machine.memory, history, machine.at_s)
        + _disk(machine.disk, measuring)
        + "</div>"
    )


def _processor(cpu: Cpu, history: Sequence[Sample], now_s: float) -> str:
    points: Points = [(sample.at_s, sample.cpu_load) for sample in history]
    cores = f"{cpu.usable:g} of {cpu.logical} threads" if cpu.usable < cpu.logical else f"{cpu.logical} threads"
    load = f"{cpu.load:.0%}" if cpu.load is not None else "–"
    return _tile("Processor", f"{cpu.model} · {cores}", chart("CPU", load, [Series(points)], now_s=now_s, top=1.0))


def _memory(memory: Memory, history: Sequence[Sample], now_s: float) -> str:
    if not memory.total_bytes:
        return _tile("RAM", "This system does not tell its RAM.", "")
    points: Points = [(sample.at_s, sample.memory_used_bytes) for sample in history]
    used = memory.total_bytes - memory.available_bytes
    about = f"{gib(memory.available_bytes)} available" + (" · the container's limit" if memory.limited else "")
    if memory.swap_total_bytes:
        about += f" · swap {gib(memory.swap_total_bytes - memory.swap_free_bytes)} of {gib(memory.swap_total_bytes)}"
    drawn = chart(
        "RAM", gib(used), [Series(points, "a")], now_s=now_s, top=memory.total_bytes, scale=f"of {gib(memory.total_bytes)}"
    )
    return _tile("RAM", about, drawn)


def _disk(disk: Disk, measuring: str) -> str:
    kind = disk.kind or "kind not known"
    if disk.words:
        return _tile("Disk of the models", disk.path, f'<p class="why" role="alert">{html.escape(disk.words)}</p>')
    parts = []
    if disk.total_bytes and disk.free_bytes is not None:
        used = 100 - 100 * disk.free_bytes / disk.total_bytes
        parts.append(
            f'<div class="vram" role="img" aria-label="Disk: {used:.0f} % used"><i class="h-others" style="width:{used:.1f}%"></i></div>'
            f"<p>{disk.free_bytes / 1e9:.0f} GB free of {disk.total_bytes / 1e9:.0f} GB</p>"
        )
    speed = disk.speed
    if speed is not None:
        how = {"direct": "", "cache dropped": "", "cached": ", perhaps from the RAM"}[speed.method]
        said = f"Reads <b>{speed.bytes_per_s / 1e9:.2f} GB/s</b> <small>measured{how}, {_size(speed.read_bytes)} in {speed.took_s:.1f} s</small>"
    else:
        said = html.escape(measuring or "Reading speed not measured.")
    parts.append(
        f'<p class="speed">{said}</p><div class="buttons"><button type="button" data-panel="system" data-name="disk" '
        f'data-action="measure"{" disabled" if measuring.endswith("…") else ""}>Measure</button></div>'
    )
    return _tile("Disk of the models", f"{kind} · {disk.path}", "".join(parts))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


def _tile(title: str, about: str, content: str) -> str:
    return (
        f'<section class="engine tile" data-key="{html.escape(title)}"><div class="top"><b>{html.escape(title)}</b></div>'
        f'<p class="about">{html.escape(about)}</p>{content}</section>'
    )


# What it means --------------------------------------------------------------------------------------


def requirements(rows: Sequence[Requirement]) -> str:
    """The table: what is asked for beside what is here."""
    body = "".join(
        f'<tr class="level-{row.level}"><td><b class="mark" title="{LEVELS[row.level][1]}">{LEVELS[row.level][0]}</b> {html.escape(row.name)}</td>'
        f'<td data-label="Minimum">{html.escape(row.minimum)}</td><td data-label="Recommended">{html.escape(row.recommended)}</td>'
        f'<td data-label="This machine">{html.escape(row.found)}</td></tr>'
        for row in rows
    )
    return (
        '<table class="requirements"><thead><tr><th>What</th><th>Minimum</th><th>Recommended</th><th>This machine</th>'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def findings(found: Sequence[Finding]) -> str:
    """Each with what to do; a command can be copied, and is never run by us."""
    return "".join(_finding(one) for one in found)


def advice(examination: Examination) -> str:
    """What could be better, and folded what is fine."""
    better = [f for f in examination.findings if f.level == ADVICE]
    fine = [f for f in examination.findings if f.level == OK]
    parts = [findings(better) or "<p>Nothing to do.</p>"]
    if fine:
        parts.append(f'<details class="fine" data-key="fine"><summary>What is fine ({len(fine)})</summary>{findings(fine)}</details>')
    return "".join(parts)


def _finding(one: Finding) -> str:
    # Figures in a title change all the time, and it is still the same finding.
    key = re.sub(r"\W+", "-", re.sub(r"\b\d+(\.\d+)?\b", "", f"{one.about} {one.title}".lower())) + str(one.card)
    todo = f'<p class="todo">{_with_commands(one.what_to_do)}</p>' if one.what_to_do else ""
    role = ' role="alert"' if one.level == PROBLEM else ""
    return (
        f'<div class="finding level-{one.level}" data-key="{key}"{role}><b class="mark">{LEVELS[one.level][0]}</b><div>'
        f"<b>{html.escape(one.title)}</b><p>{html.escape(one.detail)}</p>{todo}</div></div>"
    )


def _with_commands(text: str) -> str:
    """What stands between backticks, or a whole text that begins as one, is a command with a button to copy it."""
    pieces = ["", text] if text.startswith("python ") else text.split("`")
    return "".join(
        f'<span class="command"><code>{html.escape(piece)}</code><button type="button" class="copy" data-copy>Copy</button></span>'
        if number % 2 else html.escape(piece)
        for number, piece in enumerate(pieces)
    )  # fmt: skip
