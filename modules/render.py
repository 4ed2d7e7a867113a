"""Model text, which is hostile, into HTML that is safe to put into the page; piece by piece while an answer grows.

Owns the subset of Markdown that is shown, the highlighting of code, and what changed
since the page was last told. No HTML of the model's ever passes: it is escaped and
shown. Links are http, https and mailto only, and show where they lead; pictures are
never loaded; characters that hide or turn text are made visible. Typesetting of
mathematics is not done: TeX is kept from Markdown and shown as its source.

Text is cut into chunks at lines where a new block must begin. A chunk is rendered once
it is complete, alone, and so the result does not depend on how the text arrived. Only
the open chunk is rendered again and again, and not even that when it is long.

Every block is exactly one element. Knows no page, no socket and no conversation.
"""

from __future__ import annotations

import html
import re
import time
from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]
from pygments.token import STANDARD_TYPES  # type: ignore[import-untyped]
from pygments.util import ClassNotFound  # type: ignore[import-untyped]

# Limits, in characters where nothing else is said. Beyond them text is shown as it is.
MOST_CHUNK = 200_000
MOST_MARKDOWN = 500_000  # of one text
MOST_HIGHLIGHTED = 60_000
MOST_MATH = 4_000
MOST_MATH_LINES = 40
MOST_LEVELS = 20
MOST_BRACKETS = 2_000  # in one paragraph: every `[` looks for its end
# While a chunk is open:
LONG_PREVIEW = 4_000
LONGEST_PREVIEW = 32_000
SLOW_PREVIEW_S = 0.05
SEGMENT = 1_500
HEAD = 16  # so much of a line tells whether it is a list item

Env = MutableMapping[str, Any]


# Characters ------------------------------------------------------------------------------

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Bidi controls, zero-width characters, fillers, tags: what can hide text or show it in another order.
_ODD = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Joiners belong to the spelling of Arabic and Indic words, and to emoji of several parts.
_JOINS = "[\u0600-\u061b\u061d-\u0dff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff]"
_ODD_IN_CODE = re.compile(f"({_ODD})")
_ODD_IN_TEXT = re.compile(f"(?<={_JOINS})[\u200c\u200d](?={_JOINS})|({_ODD})")


def _clean(text: str) -> str:
    """Without control characters other than tab and newline, and with nothing that UTF-8 cannot hold."""
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))


def _mark(match: re.Match[str]) -> str:
    if match.group(1) is None:
        return match.group()
    name = f"U+{ord(match.group(1)):04X}"
    return f'<span class="odd" title="{name}">⟪{name}⟫</span>'


def _escape(text: str, in_code: bool = False) -> str:
    """Text as HTML, for the inside of an element or a quoted attribute-free place, odd characters marked."""
    escaped = html.escape(text)
    return escaped if escaped.isascii() else (_ODD_IN_CODE if in_code else _ODD_IN_TEXT).sub(_mark, escaped)


def plain(text: str) -> str:
    """A person's own message: escaped, line breaks kept by the style of class "plain"; "" for no text."""
    cleaned = _clean(text.replace("\r\n", "\n").replace("\r", "\n"))
    return f'<div class="plain">{_escape(cleaned)}</div>' if cleaned else ""


# Code ------------------------------------------------------------------------------------

# A closed list: an obscure lexer's regular expressions are a way to stop the server.
_LANGUAGES = frozenset(
    """asm bash sh shell zsh console bat batch powershell ps1 c cpp c++ csharp c# cs fsharp f# go golang rust rs
    java kotlin scala groovy swift objective-c objc dart d zig nim javascript js jsx typescript ts tsx json json5
    html xml css scss sass less vue php ruby rb perl pl lua python py python3 py3 pycon r julia jl matlab octave
    haskell hs ocaml elixir ex erlang clojure clj lisp common-lisp scheme racket prolog fortran cobol pascal
    delphi ada vb.net vbnet sql postgresql mysql sqlite3 plpgsql graphql protobuf toml yaml yml ini cfg dosini
    properties docker dockerfile make makefile cmake nginx apache terraform hcl nix diff udiff tex latex rst
    markdown md vim awk sed verilog systemverilog vhdl glsl hlsl cuda cu wgsl llvm gdscript solidity http
    text""".split()
)
# Names that people use and pygments does not know.
_ALSO = {"h": "c", "hpp": "cpp", "jsonc": "json", "kt": "kotlin", "opencl": "c", "patch": "diff", "svg": "xml"}
_NOT_IN_LANGUAGE = re.compile(r"[^A-Za-z0-9+#._-]")


def _language(info: str) -> str:
    """The name after the fence, reduced to what cannot leave its place; "" when there is none."""
    words = info.split(None, 1)
    return _NOT_IN_LANGUAGE.sub("", words[0]).strip(".").lower()[:24] if words else ""


def _highlight(code: str, language: str, budget_s: float | None = None) -> str | None:
    """Spans with pygments' short class names; None when the language is unknown or the code takes too long.

    A lexer may be quadratic in hostile code. It hands over token by token, so it can be
    left when it has used 0.25 s and 20 µs a character, some eight times what code needs.
    That time alone can make two renderings of one text differ, and only in colours.
    """
    name = _ALSO.get(language, language)
    if name not in _LANGUAGES or len(code) > MOST_HIGHLIGHTED:
        return None
    try:
        lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False)
    except ClassNotFound:  # an older pygments
        return None
    deadline_s = time.thread_time() + (0.25 + len(code) * 20e-6 if budget_s is None else budget_s)
    runs: list[tuple[str, list[str]]] = []
    for kind, value in lexer.get_tokens(code):
        if time.thread_time() > deadline_s:
            return None
        while kind not in STANDARD_TYPES:
            kind = kind.parent
        name = STANDARD_TYPES[kind].removeprefix("w")  # white space has no colour
        if runs and runs[-1][0] == name:
            runs[-1][1].append(value)
        else:
            runs.append((name, [value]))
    spans = [(name, _escape("".join(values), in_code=True)) for name, values in runs]
    return "".join(f'<span class="{name}">{inner}</span>' if name else inner for name, inner in spans)


def _code_frame(language: str, is_open: bool = False) -> tuple[str, str]:
    """What stands before and after the code of a block."""
    return (
        f'<div class="code"><div class="code-head"><span class="lang">{html.escape(language or "text")}</span>'
        '<button type="button" class="copy" data-copy>Copy</button></div>'
        f'<pre><code class="hl"{" data-open" if is_open else ""}>',
        "</code></pre></div>",
    )


def _code_block(code: str, info: str, colours: bool = True) -> str:
    language = _language(info)
    before, after = _code_frame(language)
    inner = _highlight(code, language) if colours else None
    return before + (_escape(code, in_code=True) if inner is None else inner) + after


# Addresses -------------------------------------------------------------------------------

# As markdown-it normalises them: ASCII only, hosts in punycode. No name before an @ may pose as the host.
_WEB = re.compile(r"https?://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:[/?#].*)?", re.IGNORECASE | re.DOTALL)
_MAIL = re.compile(r"mailto:[a-z0-9.!#$&'*+/=^_`{|}~-]+@([a-z0-9.-]+)", re.IGNORECASE)


def _host(address: str) -> str | None:
    """The host of an address that may be a link; None for every other address."""
    match = _WEB.fullmatch(address) or _MAIL.fullmatch(address)
    return match.group(1).lower() if match else None


# Markdown --------------------------------------------------------------------------------

_MATH = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}


def _math_inline(state: StateInline, silent: bool) -> bool:
    """`$$…$$`, `\\[…\\]` or `\\(…\\)` in running text."""
    start = state.pos + 2
    closing = _MATH.get(state.src[state.pos : start])
    if closing is None:
        return False
    end = state.src.find(closing, start, min(state.posMax, start + MOST_MATH))
    if end < 0 or not state.src[start:end].strip():
        return False
    if not silent:
        state.push("math", "span", 0).content = state.src[start:end]
    state.pos = end + 2
    return True


def _math_block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Lines from one that begins with `$$` or `\\[` to one that ends with its partner, with no empty line between.

    A rule of its own, because a line of a formula that begins with - or + would become a list.
    """
    start = state.bMarks[start_line] + state.tShift[start_line]
    closing = _MATH.get(state.src[start : start + 2])
    if closing is None or closing == "\\)" or state.is_code_block(start_line):
        return False
    begin = start + 2
    for line in range(start_line, min(end_line, start_line + MOST_MATH_LINES)):
        if line > start_line:
            begin = state.bMarks[line] + state.tShift[line]
            if state.isEmpty(line) or state.sCount[line] < state.blkIndent:
                return False
        end = state.src.find(closing, begin, state.eMarks[line])
        if end >= 0:
            break
    else:
        return False
    tex = state.getLines(start_line, line + 1, state.blkIndent, False).strip()
    if state.src[end + 2 : state.eMarks[line]].strip() or not tex[2:-2].strip():
        return False
    if not silent:
        state.push("math_block", "p", 0).content = tex[2:-2]
        state.line = line + 1
    return True


def _too_deep(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """What is nested too deep is shown as it is; markdown-it alone would leave it out."""
    if silent or state.level < MOST_LEVELS:
        return False
    line = start_line + 1
    while line < end_line and (state.isEmpty(line) or state.sCount[line] >= state.blkIndent):
        line += 1
    state.push("literal", "p", 0).content = state.getLines(start_line, line, state.blkIndent, False)
    state.line = line
    return True


def _inline(state: StateCore) -> None:
    """The inside of paragraphs, unless it is made of brackets."""
    for token in state.tokens:
        if token.type != "inline":
            continue
        token.children = []
        if token.content.count("[") > MOST_BRACKETS:
            token.children.append(Token("text", "", 0, content=token.content))
        else:
            state.md.inline.parse(token.content, state.md, state.env, token.children)
            _unlink(token.children)


def _unlink(children: list[Token]) -> None:
    """Make words of links whose address may not be one: markdown-it never asks about an empty address."""
    is_bad = False
    for child in children:
        if child.type == "link_open":
            is_bad = _host(str(child.attrGet("href"))) is None
        if is_bad and child.type in ("link_open", "link_close"):
            child.type, child.tag, child.attrs = "words", "span", {}


def _literal(source: str) -> str:
    """A paragraph that shows the source."""
    return f'<p class="plain">{_escape(source.strip())}</p>'


class _Html(RendererHTML):
    """Every token that carries text of the model's, as HTML."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _escape(tokens[idx].content)

    def literal(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _literal(tokens[idx].content)

    def math(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f'<span class="math">{_escape(tokens[idx].content.strip())}</span>'

    def math_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f'<p class="math-block">{self.math(tokens, idx, options, env)}</p>'

    def code_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return f"<code>{_escape(tokens[idx].content, in_code=True)}</code>"

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _code_block(tokens[idx].content, "")

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return _code_block(tokens[idx].content, tokens[idx].info)

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        address = str(tokens[idx].attrGet("href"))
        # An address in angle brackets stands there already; else the host is shown beside the text.
        host = "" if tokens[idx].markup == "autolink" else f' data-host="{html.escape(_host(address) or "")}"'
        shown = html.escape(address)
        return f'<a href="{shown}" title="{shown}"{host} target="_blank" rel="noopener noreferrer nofollow">'

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        address, alt = str(tokens[idx].attrGet("src")), tokens[idx].content
        shown = f'<span class="address">{_escape(address)}</span>'
        return f'<span class="picture">{_escape(alt or "picture")} {shown}</span>'

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        # The style attribute becomes a class, so that nothing in here needs inline styles.
        style = str(tokens[idx].attrGet("style") or "").removeprefix("text-align:")
        return f'<{tokens[idx].tag} class="to-{style}">' if style else f"<{tokens[idx].tag}>"

    td_open = th_open


class _Parser(MarkdownIt):
    """CommonMark without HTML, with tables, strikethrough and formulas; a line break stays a line break."""

    def __init__(self) -> None:
        options = {"html": False, "xhtmlOut": False, "breaks": True, "maxNesting": MOST_LEVELS + 10}
        super().__init__("commonmark", options, renderer_cls=_Html)
        self.enable(["table", "strikethrough"])
        ends = {"alt": ["paragraph", "reference", "blockquote", "list"]}
        self.block.ruler.before("table", "math_block", _math_block, ends)  # type: ignore[arg-type]
        self.block.ruler.before("math_block", "too_deep", _too_deep)
        self.inline.ruler.before("escape", "math", _math_inline)
        self.core.ruler.at("inline", _inline)

    def normalizeLink(self, url: str) -> str:
        # markdown-it puts hosts into punycode only where the scheme is in lower case.
        scheme, colon, rest = url.partition(":")
        return super().normalizeLink(scheme.lower() + colon + rest if colon else url)

    def validateLink(self, url: str) -> bool:
        return _host(url) is not None

    def blocks(self, source: str, env: Env) -> list[str]:
        """One string for each top-level element."""
        if _is_bomb(source):
            return [_literal(source)]
        tokens, found, depth, start = self.parse(source, env), [], 0, 0
        for place, token in enumerate(tokens):
            depth += token.nesting
            if depth == 0:
                found.append(str(self.renderer.render(tokens[start : place + 1], self.options, env)).strip("\n"))
                start = place + 1
        return found


_MARKERS = re.compile(r"[ \t>*+\-\d.)]*")
_MARKER = re.compile(r"[>*+\-]|\d[.)]")


def _is_bomb(source: str) -> bool:
    """Would the work, or the result, be out of proportion to the text?

    Every line is looked at once for each level that it is nested in, and the short rows of
    a table are filled up to the widest. Text of people has neither more levels nor more
    cells than characters.
    """
    if len(source) > MOST_CHUNK:
        return True
    lines = source.split("\n")
    if len(lines) < 8:
        return False
    cells = max(line.count("|") for line in lines) * len(lines)
    levels = max(len(_MARKER.findall(_MARKERS.match(line).group()[:99])) for line in lines)  # type: ignore[union-attr]
    return cells > 200 + 2 * len(source) or min(levels, MOST_LEVELS) * len(lines) > 200 + len(source)


# Chunks ----------------------------------------------------------------------------------

_FENCE = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})(.*)")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
_ITEM = re.compile(r" {0,3}(?:[-+*]|\d{1,9}[.)])(?:[ \t]|$)")
_FOUR_COLUMNS = re.compile(r" {0,3}\t| {4}")


@dataclass
class _Chunk:
    """Lines that are rendered together. parts are whole lines with their ends."""

    parts: list[str] = field(default_factory=list)
    size: int = 0
    fence: re.Match[str] | None = None  # of the opening line
    is_closed: bool = False  # the closing line of the fence is there
    has_list: bool = False
    ends_blank: bool = False
    cuts: list[int] = field(default_factory=list)  # parts at which a preview may be divided
    since_cut: int = 0
    taken: int = 0  # parts of which the page has the text

    def add(self, line: str) -> None:
        self.parts.append(line + "\n")
        self.size += len(line) + 1
        self.since_cut += len(line) + 1

    def goes_on(self, head: str, is_whole: bool) -> bool:
        """After an empty line: may a line that begins so belong to this chunk? True also when it is not known yet."""
        if self.has_list:
            if head[0] in " \t":
                return True
            if head[0] not in "-+*0123456789":
                return False
            return (len(head) < HEAD and not is_whole) or _ITEM.match(head) is not None
        return not head.strip(" \t") or _FOUR_COLUMNS.match(head) is not None

    def closes(self, line: str) -> bool:
        """Is the line the closing one of the fence?"""
        assert self.fence is not None
        marker, bare = self.fence.group(2), line.strip(" \t")
        indent = len(line) - len(line.lstrip(" "))
        return indent < 4 and len(bare) >= len(marker) and bare == marker[0] * len(bare) and not line.startswith("\t")

    def may_close(self, start: str) -> bool:
        """Could a line that begins so become the closing one?"""
        assert self.fence is not None
        return not start.strip(" \t").strip(self.fence.group(2)[0])

    def code(self) -> str:
        """The lines between the fences, less the indentation of the opening one."""
        assert self.fence is not None
        indent = len(self.fence.group(1))
        lines = self.parts[1 : -1 if self.is_closed else None]
        if indent:
            lines = [line[min(indent, len(line) - len(line.lstrip(" "))) :] for line in lines]
        return "".join(lines)


class _Splitter:
    """Cuts text into chunks, line by line. Its cuts depend on the text alone, not on how it was fed."""

    def __init__(self) -> None:
        self.closed: list[_Chunk] = []
        self.open = _Chunk()
        self._line: list[str] = []  # pieces of the line that has not ended
        self._line_size = 0
        self._head = ""
        # What the page has of the open chunk beyond chunk.taken.
        self._pieces_taken = 0
        self._line_taken = 0

    def feed(self, text: str) -> None:
        first, *others = text.split("\n")
        self._grow(first)
        for other in others:
            line = "".join(self._line)
            self._line, self._line_size, self._head, self._pieces_taken = [], 0, "", 0
            self._end(line)
            self._grow(other)

    def finish(self) -> None:
        if self._line_size:
            self.feed("\n")
        self._close()

    def settle(self) -> None:
        """Close the open chunk when the line that has just begun cannot belong to it any more."""
        chunk = self.open
        if self._head and chunk.ends_blank and not chunk.fence and not chunk.goes_on(self._head[:HEAD], is_whole=False):
            self._close()

    def size(self) -> int:
        """Of the open chunk, since its last cut."""
        return self.open.since_cut + self._line_size

    def text(self, start: int) -> tuple[str, str]:
        """The open chunk from this part on, and the line that has not ended. The page is taken to have all of it."""
        self._line = ["".join(self._line)]
        self._pieces_taken, self._line_taken = 1, self._line_size
        self.open.taken = len(self.open.parts)
        return "".join(self.open.parts[start:]), self._line[0]

    def take(self) -> str:
        """What the page does not have of the open chunk. A line that may close a fence is kept back."""
        chunk = self.open
        new = chunk.parts[chunk.taken :]
        if new:
            new[0] = new[0][self._line_taken :]
            self._line_taken, chunk.taken = 0, len(chunk.parts)
        is_kept_back = chunk.fence and self._line_taken == 0 and self._line_size <= HEAD and chunk.may_close(self._head)
        if not is_kept_back:
            new += self._line[self._pieces_taken :]
            self._pieces_taken, self._line_taken = len(self._line), self._line_size
        return "".join(new)

    def _grow(self, piece: str) -> None:
        if piece:
            self._line.append(piece)
            self._line_size += len(piece)
            if len(self._head) < HEAD:
                self._head = (self._head + piece)[:HEAD]

    def _end(self, line: str) -> None:
        """Put a whole line where it belongs."""
        if self.open.fence:
            self.open.add(line)
            if self.open.closes(line):
                self.open.is_closed = True
                self._close()
            return
        if not line.strip(" \t"):
            if self.open.parts:
                self.open.add(line)
                self.open.ends_blank = True
            return
        if self.open.ends_blank and not self.open.goes_on(line[:HEAD], is_whole=True):
            self._close()
        fence = _FENCE.match(line)
        # An indented fence after a list may stand in its last item.
        if fence and not (self.open.has_list and fence.group(1)):
            self._close()
            self.open.fence, self.open.taken = fence, 1
            self.open.add(line)
        elif _HEADING.match(line):
            self._close()
            self.open.add(line)
            self._close()
        else:
            self._continue(line)

    def _continue(self, line: str) -> None:
        chunk = self.open
        is_item = _ITEM.match(line) is not None
        if is_item and chunk.has_list and chunk.since_cut > SEGMENT and line[0] != " ":
            chunk.cuts.append(len(chunk.parts))
            chunk.since_cut = 0
        chunk.add(line)
        chunk.ends_blank = False
        chunk.has_list = chunk.has_list or is_item

    def _close(self) -> None:
        if self.open.parts:
            self.closed.append(self.open)
            self.open = _Chunk()
            self._line_taken = self._pieces_taken = 0


# Streams ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """What a page has to do: keep the first `keep` blocks and put `blocks` in the place of all others.

    Or, when append is not empty: add it, which is escaped text (odd characters in their
    spans), at the end of the last element with the attribute data-open; nothing else changes.
    """

    keep: int
    blocks: list[str]
    append: str = ""


@dataclass
class _Hole:
    """The last block while text is appended to it."""

    before: str
    added: list[str]
    after: str

    def html(self) -> str:
        return self.before + "".join(self.added) + self.after


@dataclass(frozen=True)
class _Rendered:
    """A chunk that could come out otherwise when more link definitions are known."""

    first: int
    count: int
    source: str
    known: int


# A line that has just begun and may become nearly anything; to show it would make the page flicker.
_UNSETTLED = re.compile(r"[-=*+#_>|~` \t]*|[ \t]*\d{1,9}[.)]?[ \t]*|[ \t]*(?:`{3,}|~{3,})[^`]*")


class Stream:
    """Markdown that only grows, and the patches that make a page show it.

    To feed n characters in k pieces costs about n + k, also within one huge block: code
    in fences is only appended to, and so are other chunks over 4,000 characters, which
    are rendered again when they have grown by half, up to 32,000. Not for several threads.
    """

    def __init__(self, slow_preview_s: float = SLOW_PREVIEW_S) -> None:
        """slow_preview_s: a preview that took longer, in CPU seconds, is not repeated for the same chunk."""
        self._slow_preview_s = slow_preview_s
        self._parser = _Parser()
        self._references: dict[str, Any] = {}
        self._splitter = _Splitter()
        self._final: list[str] = []
        self._rendered: list[_Rendered] = []
        self._rendered_size = 0
        # What the page has: the first _sent blocks are final, the others a preview.
        self._shown: list[str] = []
        self._sent = 0
        self._hole: _Hole | None = None
        # The preview of the open chunk.
        self._chunk: _Chunk | None = None
        self._frozen: list[str] = []  # blocks of its parts before _start
        self._start = 0
        self._again_size = 0.0  # render again when the chunk has grown to this
        self._is_slow = False
        self._has_news = self._ends_cr = self._is_finished = False

    def feed(self, piece: str) -> None:
        """More text. Raises ValueError after finish()."""
        if self._is_finished:
            raise ValueError("The stream is finished; nothing can be added.")
        text = "\r" + piece if self._ends_cr else piece
        self._ends_cr = text.endswith("\r")
        text = _clean((text[:-1] if self._ends_cr else text).replace("\r\n", "\n").replace("\r", "\n"))
        if text:
            self._has_news = True
            self._splitter.feed(text)

    def patch(self) -> Patch | None:
        """What changed since the last patch; None when nothing did."""
        if not self._has_news:
            return None
        self._has_news = False
        self._splitter.settle()
        self._render_closed()
        return self._preview()

    def finish(self) -> Patch | None:
        """Close the stream. Now the blocks are those of to_html() of the whole text."""
        if self._is_finished:
            return None
        self._is_finished, self._has_news = True, False
        if self._ends_cr:
            self._splitter.feed("\n")
        self._splitter.finish()
        self._render_closed()
        self._resolve_references()
        return self._show([])

    def snapshot(self) -> list[str]:
        """All blocks as the last patch left them, for a page that joins late."""
        return [*self._shown[:-1], self._hole.html()] if self._hole else list(self._shown)

    def _render_closed(self) -> None:
        for chunk in self._splitter.closed:
            is_cheap = self._rendered_size < MOST_MARKDOWN
            self._rendered_size += chunk.size
            if chunk.fence:
                self._final.append(_code_block(chunk.code(), chunk.fence.group(3), is_cheap))
                continue
            source = "".join(chunk.parts)
            blocks = self._parser.blocks(source, {"references": self._references}) if is_cheap else [_literal(source)]
            if is_cheap and "[" in source:
                known = len(self._references)
                self._rendered.append(_Rendered(len(self._final), len(blocks), source, known))
            self._final += blocks
        self._splitter.closed.clear()

    def _resolve_references(self) -> None:
        """A link may be defined after its use: render such chunks once more."""
        for old in reversed(self._rendered):
            if old.known < len(self._references):
                place = slice(old.first, old.first + old.count)
                blocks = self._parser.blocks(old.source, self._preview_env())
                if blocks != self._final[place]:
                    self._final[place] = blocks
                    self._sent = min(self._sent, old.first)

    def _preview_env(self) -> Env:
        """What is defined so far, with room for what the open chunk may define."""
        return {"references": ChainMap({}, self._references)}

    def _preview(self) -> Patch | None:
        chunk, is_code = self._splitter.open, self._splitter.open.fence is not None
        is_same = chunk is self._chunk
        if not is_same:
            self._chunk, self._frozen, self._start, self._again_size, self._is_slow = chunk, [], 0, 0.0, False
        if is_same and self._hole and (is_code or self._splitter.size() < self._again_size):
            added = _escape(self._splitter.take(), is_code)
            self._hole.added.append(added)
            return Patch(len(self._shown), [], added) if added else None
        if chunk.fence:
            before, after = _code_frame(_language(chunk.fence.group(3)), is_open=True)
            return self._show([], _Hole(before, [_escape(self._splitter.take(), in_code=True)], after))
        return self._preview_text(chunk)

    def _preview_text(self, chunk: _Chunk) -> Patch | None:
        for cut in chunk.cuts:
            self._frozen += self._parser.blocks("".join(chunk.parts[self._start : cut]), self._preview_env())
            self._start = cut
        chunk.cuts.clear()
        size = self._splitter.size()
        body, line = self._splitter.text(self._start)
        if size > LONGEST_PREVIEW or self._rendered_size >= MOST_MARKDOWN:
            self._again_size = float("inf")
            return self._show(self._frozen, _Hole('<p class="plain" data-open>', [_escape(body + line)], "</p>"))
        hidden = line if _UNSETTLED.fullmatch(line) else ""
        source = body + line if not hidden else body
        began_s = time.thread_time()
        blocks = [*self._frozen, *self._parser.blocks(source, self._preview_env())]
        self._is_slow = self._is_slow or time.thread_time() - began_s > self._slow_preview_s
        if size <= LONG_PREVIEW and not self._is_slow:
            return self._show(blocks)
        grown = size * 1.5
        self._again_size = float("inf") if self._is_slow or grown > LONGEST_PREVIEW else grown
        rest = source[len(source.rstrip()) :] + hidden
        if blocks and blocks[-1].endswith("</p>"):
            return self._show(blocks[:-1], _Hole(blocks[-1][:-4] + "<span data-open>", [_escape(rest)], "</span></p>"))
        return self._show(blocks, _Hole('<p class="plain" data-open>', [_escape(rest)], "</p>"))

    def _show(self, preview: list[str], hole: _Hole | None = None) -> Patch | None:
        """Make the page show the final blocks, then the preview, then the block with the hole."""
        old = self.snapshot()[self._sent :] if self._hole else self._shown[self._sent :]
        new = [*self._final[self._sent :], *preview, *([hole.html()] if hole else [])]
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        keep = self._sent + same
        self._sent, self._hole = len(self._final), hole
        if same == len(old) == len(new):
            return None
        self._shown[keep:] = new[same:]
        return Patch(keep, new[same:])


def to_html(text: str) -> list[str]:
    """Finished Markdown as safe HTML, one string for each block."""
    stream = Stream()
    stream.feed(text)
    stream.finish()
    return stream.snapshot()


# Style -----------------------------------------------------------------------------------

# Selectors of pygments' short class names, and the colour on light and on dark ground; 4.5:1 and more on both.
_COLOURS = (
    ('[class^="c"]', "#57606a", "#9ca3af"),  # comments
    ('[class^="k"],.ow,.nt', "#b4232c", "#ff8a80"),  # keywords, tags
    ('[class^="s"],.dl,.gi', "#0a5c36", "#8ddb8c"),  # strings, what a patch adds
    ('[class^="m"],.il,.no', "#0550ae", "#79c0ff"),  # numbers, constants
    (".nf,.fm,.nd,.gh,.gu", "#6f42c1", "#d2a8ff"),  # functions, decorators, headings
    (".nc,.ne,.nn,.nb,.bp,.na,.nv,.vi", "#8a4600", "#ffb86b"),  # classes, builtins, attributes, variables
    (".err,.gd,.gr", "#a40e26", "#ffa198"),  # what the lexer refuses, what a patch removes
)


def css() -> str:
    """The style of what this file makes: code on light ground, and on dark where the page has the class "dark"."""
    rules = [
        ".plain{white-space:pre-wrap;overflow-wrap:anywhere}",
        ".odd{background:#b4530922;border:1px dashed #b45309;border-radius:3px;font-size:.8em}",
        ".math{font-family:ui-monospace,monospace;white-space:pre-wrap}",
        ".math-block{text-align:center}",
        ".picture .address{opacity:.8;font-size:.85em;overflow-wrap:anywhere}",
        "a[data-host]::after{content:' (' attr(data-host) ')';font-size:.8em;opacity:.8}",
        ".to-left{text-align:left}.to-center{text-align:center}.to-right{text-align:right}",
    ]
    for selectors, light, dark in _COLOURS:
        names = selectors.split(",")
        rules.append(",".join(f".hl {name}" for name in names) + f"{{color:{light}}}")
        rules.append(",".join(f".dark .hl {name}" for name in names) + f"{{color:{dark}}}")
    return "\n".join(rules) + "\n"
