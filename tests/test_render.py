"""render.py: what a model can write, whole and in pieces, and what of it may reach a page.

The page is stood in for by `Page`, which does with a patch what the script of the page
does, over html.parser's tree. Time limits are wide: they catch work that grows with the
square of the text, not a slow machine.
"""

from __future__ import annotations

import random
import re
import time
from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modules import render
from modules.render import Patch, Stream, css, plain, to_html

TAGS = set(
    """p br hr h1 h2 h3 h4 h5 h6 strong em s code pre a ul ol li blockquote table thead tbody tr th td
    div span button""".split()
)
ATTRIBUTES = set("class title href rel target start type data-copy data-open data-host".split())
VOID = {"br", "hr"}


class Reader(HTMLParser):
    """Fails on HTML that is not well formed or holds what must never pass; collects text and tags."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.roots = 0
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)
        self.close()
        assert self.open == [], f"not closed: {self.open} in {markup!r}"

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, f"<{tag}> got through"
        assert {name for name, _ in attrs} <= ATTRIBUTES, f"{attrs} got through"
        found = dict(attrs)
        if "href" in found:
            assert re.match(r"(https?://|mailto:)[!-~]+$", found["href"] or ""), found
            assert found["rel"] == "noopener noreferrer nofollow" and found["target"] == "_blank"
            assert found["title"] == found["href"]
        self.tags.append((tag, found))
        self.roots += not self.open
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at the wrong place"

    def handle_data(self, data):
        assert self.open, f"text outside of an element: {data!r}"
        self.words.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment got through: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    @property
    def text(self) -> str:
        return "".join(self.words)


def check(blocks: list[str]) -> Reader:
    """Every block is one element of ours; all of them read as one."""
    for block in blocks:
        assert Reader(block).roots == 1, block
    return Reader("".join(blocks))


class Page:
    """A page: applies patches as the script does."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.appends = 0

    def apply(self, patch: Patch | None) -> None:
        if patch is None:
            return
        if patch.append:
            assert patch.blocks == [] and patch.keep == len(self.blocks)
            self.appends += 1
            self.blocks[-1] = self._into_last_open(self.blocks[-1], patch.append)
            return
        assert patch.keep <= len(self.blocks)
        self.blocks = self.blocks[: patch.keep] + patch.blocks

    @staticmethod
    def _into_last_open(block: str, added: str) -> str:
        *_, start = re.finditer(r"<(\w+)[^<>]* data-open>", block)
        depth = 0
        for found in re.finditer(rf"<(/?){start.group(1)}\b[^<>]*>", block[start.start() :]):
            depth += -1 if found.group(1) else 1
            if depth == 0:
                place = start.start() + found.start()
                return block[:place] + added + block[place:]
        raise AssertionError("the open element is not closed")


def play(text: str, pieces: list[str], every: int = 1) -> Page:
    """Stream the pieces; after each patch the page shows what the server thinks, and it is safe."""
    stream, page = Stream(), Page()
    for count, piece in enumerate(pieces, 1):
        stream.feed(piece)
        if count % every == 0:
            page.apply(stream.patch())
            assert page.blocks == stream.snapshot()
            check(page.blocks)
    page.apply(stream.finish())
    assert page.blocks == stream.snapshot() == to_html(text)
    check(page.blocks)
    return page


def split(text: str, seed: int, longest: int = 40) -> list[str]:
    choose, pieces = random.Random(seed), []
    while text:
        size = choose.randint(1, longest)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def one(text: str) -> str:
    return "".join(to_html(text))


# What Markdown becomes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", []),
        (" \n\n \n", []),
        ("a **b** _c_ `d` ~~e~~", ["<p>a <strong>b</strong> <em>c</em> <code>d</code> <s>e</s></p>"]),
        ("# One\ntwo\nthree", ["<h1>One</h1>", "<p>two<br>\nthree</p>"]),
        ("Setext\n===\n\n---", ["<h1>Setext</h1>", "<hr>"]),
        ("- a\n\n- b\n\nc", ["<ul>\n<li>\n<p>a</p>\n</li>\n<li>\n<p>b</p>\n</li>\n</ul>", "<p>c</p>"]),
        ("7. a\n8. b", ['<ol start="7">\n<li>a</li>\n<li>b</li>\n</ol>']),
        ("> a\n> b\n\nc", ["<blockquote>\n<p>a<br>\nb</p>\n</blockquote>", "<p>c</p>"]),
        ("a\r\nb\rc", ["<p>a<br>\nb<br>\nc</p>"]),
        ("a\x00\x1b[1m\x7f\x85b", ["<p>a[1mb</p>"]),
        ("a\ud800b", ["<p>a\ufffdb</p>"]),
    ],
)
def test_blocks(text, blocks):
    assert to_html(text) == blocks


def test_a_table_says_its_alignment_by_class():
    table = one("| a | b | c |\n|:--|--:|---|\n| 1 | 2 |")
    assert '<th class="to-left">a</th>' in table and '<td class="to-right">2</td>' in table and "<td></td>" in table


def test_code_is_highlighted_and_has_its_frame():
    (block,) = to_html("```Python title=x\ndef f(): pass\n```")
    assert block.startswith('<div class="code"><div class="code-head"><span class="lang">python</span>')
    assert '<button type="button" class="copy" data-copy>Copy</button></div><pre><code class="hl">' in block
    assert '<span class="k">def</span> <span class="nf">f</span>' in block
    assert Reader(block).text == "pythonCopydef f(): pass\n"


@pytest.mark.parametrize("code", ["x", "  x\n\n\n", "\n\nif a:\n\tb = '<'  # &amp;\n", "é⟪⟫\n"])
@pytest.mark.parametrize("language", ["python", "pycon", "html", "bash", "json", "nosuch", ""])
def test_code_keeps_every_character(code, language):
    (block,) = to_html(f"```{language}\n{code}")
    assert Reader(block).text == f"{language or 'text'}Copy{code}" + "\n" * (not code.endswith("\n"))


@pytest.mark.parametrize(
    ("info", "shown"),
    [
        ('py"onclick="alert(1)', "pyonclickalert1"),
        ("<script>", "script"),
        ("{.python}", "python"),
        ("c++", "c++"),
        ("a" * 99, "a" * 24),
        ("x&quot;y", "xquoty"),
    ],
)
def test_the_language_cannot_leave_its_place(info, shown):
    assert Reader(one(f"~~~{info}\nx\n~~~")).words[0] == shown


def test_long_code_has_no_colours():
    assert '<span class="mi"' in one("```python\n" + "1\n" * 10 + "```")
    assert '<span class="mi"' not in one("```python\n" + "1\n" * 30_001 + "```")


def test_every_language_is_known_and_a_slow_one_is_left():
    for language in (*render._LANGUAGES, *render._ALSO):
        assert render._highlight("a = 1\n", language) is not None, language
    assert render._highlight("a = 1", "python", budget_s=0) is None
    assert render._highlight("a = 1", "brainfuck") is None


def test_fences_close_by_the_book():
    assert [Reader(b).text for b in to_html("````\n```\n~~~\n    ````\n\t````\n`````  \nafter")] == [
        "textCopy```\n~~~\n    ````\n\t````\n",
        "after",
    ]
    assert [Reader(b).text for b in to_html("  ~~~\n    a\n b\n\n  ~~~")] == ["textCopy  a\nb\n\n"]
    assert one("``` a`b\nx").startswith("<p>"), "an info with a backtick opens no fence"


def test_a_fence_in_a_list_stays_in_it():
    blocks = to_html("1. one\n\n   ```sh\n   ls\n\n   cd\n   ```\n\n2. two\n\nend")
    assert len(blocks) == 2 and "<pre>" in blocks[0] and blocks[0].count("<li>") == 2
    assert Reader(blocks[0]).text.count("ls\n\ncd\n") == 1
    assert len(to_html("- a\n```\nb\n```\nc")) == 3


def test_indented_code():
    assert Reader(one("a\n\n    x < 1\n\n    y")).text.endswith("textCopyx < 1\n\ny\n")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        (r"so \(a_1 * b_2 * c\) is", '<p>so <span class="math">a_1 * b_2 * c</span> is</p>'),
        (r"$$\frac{a_b}{c_d}$$", r'<p class="math-block"><span class="math">\frac{a_b}{c_d}</span></p>'),
        ("in $$x_1$$ _b_", '<p>in <span class="math">x_1</span> <em>b</em></p>'),
        ("\\[\n- a\n+ b\n\\]", '<p class="math-block"><span class="math">- a\n+ b</span></p>'),
        (r"\(a<b\)", '<p><span class="math">a&lt;b</span></p>'),
        (r"\(never", "<p>(never</p>"),
        ("$$ $$ a", "<p>$$ $$ a</p>"),
        (r"`\(a\)`", r"<p><code>\(a\)</code></p>"),
        (r"\[a\] b", '<p><span class="math">a</span> b</p>'),
        ("$$\na\n\nb\n$$", "<p>$$<br>\na</p><p>b<br>\n$$</p>"),
        (r"[\(a\)](https://b.c)", None),
    ],
)
def test_formulas_are_kept_from_markdown(text, html):
    assert one(text) == html if html else '<span class="math">a</span>' in one(text)


def test_a_formula_ends_a_paragraph_and_stands_in_lists():
    assert [b[:9] for b in to_html("so\n\\[\na\n\\]\nend")] == ["<p>so</p>", "<p class=", "<p>end</p"]
    assert 'class="math-block"' in one("- a\n  $$\n  - b\n  $$\n")
    assert 'class="math-block"' not in one("$$\n" + "a\n" * 60 + "$$")


def test_a_link_may_be_defined_before_or_after_its_use():
    assert one("[a]: https://x.y\n\n[a] [b][] [c]\n\nx\n\n[b]: https://z.w").count("<a ") == 2
    assert one("[a]: https://first.x\n\n[a]\n\n[a]: https://second.x").count("first.x") > 0


# Attacks ---------------------------------------------------------------------------------

HTML_ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "<math><mi xlink:href='javascript:alert(1)'>x",
    "<style>@import 'https://canary.example'</style>",
    "<base href=https://canary.example>",
    "<form action=https://canary.example><button>",
    '<meta http-equiv="refresh" content="0;url=https://canary.example">',
    "<!-- --><![CDATA[x]]><?php ?><!DOCTYPE html>",
    "</code></pre></div><script>alert(1)</script>",
    "<a href=https://x.y ping=https://canary.example>x</a>",
    "<video src=https://canary.example><audio src=https://canary.example>",
]
ADDRESSES = [
    "javascript:alert(1)",
    "JaVaScRiPt:alert(1)",
    "&#106;avascript:alert(1)",
    "&#x6A&#x61;vascript:alert(1)",
    "java&Tab;script:alert(1)",
    "java\tscript:alert(1)",
    "<java script:alert(1)>",
    "\u200bjavascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "data:image/png;base64,AAAA",
    "vbscript:x",
    "file:///etc/passwd",
    "/relative",
    "//canary.example/x",
    "x.html",
    "#anchor",
    "",
    "ftp://a.b",
    "blob:https://a.b/c",
    "https:canary.example",
    "https:///canary.example",
    "https:\\\\canary.example",
    "https://good.example\\@canary.example",
    "https://good.example@canary.example/",
    "https://good.example%2f@canary.example",
    "https://a b.c",
    "http://",
    "mailto:",
    "mailto:a@b.c?bcc=canary@x.y",
    "view-source:https://a.b",
]


@pytest.mark.parametrize("attack", HTML_ATTACKS)
@pytest.mark.parametrize(
    "frame",
    [
        "{}",
        "> {}",
        "- {}",
        "# {}",
        "`{}`",
        "```html\n{}\n```",
        "| {} |\n|---|\n| {} |",
        "    {}",
        r"\({}\)",
        "$$\n{}\n$$",
    ],
)
def test_html_is_shown_and_never_works(attack, frame):
    seen = check(to_html(frame.replace("{}", attack)))
    assert attack.split(">")[0][:12].strip() in re.sub(r"\s+", " ", seen.text)
    assert not [found for _, found in seen.tags if "href" in found]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "frame",
    [
        "[x]({})",
        "![x]({})",
        "<{}>",
        "[x]\n\n[x]: {}",
        '[x]({} "title")',
        "[![x]({})]({})",
        "[x](<{}>)",
        "![x]\n\n[x]: {}",
    ],
)
def test_other_addresses_are_text(address, frame):
    seen = check(to_html(frame.replace("{}", address)))
    assert not [tag for tag, _ in seen.tags if tag == "a"], seen.tags


def test_a_refused_address_stays_readable():
    assert one("[x](javascript:alert(1))") == "<p>[x](javascript:alert(1))</p>"
    assert one("![x](data:a,b)") == "<p>![x](data:a,b)</p>"
    assert one("[a]: file:///b") == "<p>[a]: file:///b</p>"


def test_a_link_shows_where_it_leads():
    seen = check(to_html("[my bank](HTTPS://Bücher.example:81/a?b=c&d='\"#e 'title')"))
    ((_, link),) = [tag for tag in seen.tags if tag[0] == "a"]
    assert link["data-host"] == "xn--bcher-kva.example"
    assert (link["href"] or "").lower() == "https://xn--bcher-kva.example:81/a?b=c&d='%22#e"
    assert 'href="mailto:a.b@c.d"' in one("<mailto:a.b@c.d>") and "data-host" not in one("<https://a.b>")


def test_pictures_are_words():
    seen = check(to_html('![a <b> "c"](https://canary.example/?q=1) ![](http://d.e) [![f](https://g.h)](https://i.j)'))
    assert "img" not in [tag for tag, _ in seen.tags]
    assert 'a <b> "c" https://canary.example/?q=1' in seen.text and "picture http://d.e" in seen.text
    assert [found["href"] for _, found in seen.tags if "href" in found] == ["https://i.j"]


def test_what_hides_or_turns_text_is_marked():
    mark = '<span class="odd" title="U+202E">⟪U+202E⟫</span>'
    assert one("a\u202eb") == f"<p>a{mark}b</p>"
    assert mark in one("`a\u202eb`") and mark in one("```python\n'\u202e'\n```") and mark in one("```\n\u202e")
    assert (
        mark in plain("\u202e")
        and mark in one("a&#x202e;b")
        and mark in one(r"\(\u202e\)".replace(r"\u202e", "\u202e"))
    )
    for odd in "\u200b\u200e\u2066\ufeff\u00ad\u3164\U000e0041\U000e0101":
        assert f"U+{ord(odd):04X}" in one(f"a{odd}b")


def test_joiners_that_spell_words_stay_outside_code():
    family, persian = "👨\u200d👩\u200d👧", "می\u200cخواهم"
    assert one(f"{family} {persian}") == f"<p>{family} {persian}</p>"
    assert one(f"`{family}`").count("⟪U+200D⟫") == 2
    assert "U+200D" in one("a\u200db")


def test_plain_is_escaped_and_keeps_its_lines():
    assert plain("a <b>\r\n\"c\"\rd & 'e'\x00") == (
        '<div class="plain">a &lt;b&gt;\n&quot;c&quot;\nd &amp; &#x27;e&#x27;</div>'
    )
    assert plain("") == plain("\x00") == ""
    assert plain("**a** [b](https://c.d)") == '<div class="plain">**a** [b](https://c.d)</div>'


@pytest.mark.parametrize("attack", [*HTML_ATTACKS, *(f"[x]({a})\n\n![y]({a})" for a in ADDRESSES)])
def test_attacks_in_single_characters_are_inert_at_every_frame(attack):
    play(attack, list(attack))


# Streams ---------------------------------------------------------------------------------

SAMPLE = """Here is **some** text with a [link][later] and `code`.
A second line \\(x_1\\).

1. one
   ```python
   def f():

       return "<&>"
   ```
2. two

   more
- other

* * *
| a | b |
|:-:|---|
| 1 | *2* |

```js
let a = 1; // ``` no end

# no heading
```
> quote
lazy
> - in it

Setext
------

    indented

    code

\\[
- a
+ b
\\]

[later]: https://later.example "x"
~~~
open \u202e to the end
"""


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_ends_as_the_whole_text_however_it_came(seed):
    play(SAMPLE, split(SAMPLE, seed, 1 + seed * 3), every=1 + seed % 3)


@pytest.mark.parametrize("cut", range(0, len(SAMPLE), 7))
def test_a_stream_may_end_anywhere(cut):
    play(SAMPLE[:cut], split(SAMPLE[:cut], cut))


WORDS = st.sampled_from(
    [
        "\n", "\n\n", "```", "~~~", "``", "`", "- ", "* ", "1. ", "12", ")", "> ", "# ", "---", "===", "|",
        "|-|-|\n", "a", "b c", " ", "   ", "    ", "\t", "\r", "\r\n", "[x]", "[x]: https://y.z\n", "(https://y.z)",
        "![", "](", "**", "_", "~~", "<", ">", "&", "&amp;", "\\", "\\(", "\\)", "\\[", "\\]", "$$", "\u202e",
        "\u200d", "\x00", "\xe9", "python", "\ud800", "\U0001f600", "\u2028",
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(pieces=st.lists(st.lists(WORDS, min_size=1, max_size=6).map("".join), max_size=25), every=st.integers(1, 3))
def test_any_text_in_any_pieces(pieces, every):
    play("".join(pieces), pieces, every)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=200))
def test_any_characters(text):
    check(to_html(text))
    check([plain(text)] if plain(text) else [])


def test_what_is_final_is_never_sent_again():
    stream, kept = Stream(), []
    for word in ("First.\n\n", "Sec", "ond.\n\n", "Third"):
        stream.feed(word)
        kept.append(stream.patch())
    assert kept == [
        Patch(0, ["<p>First.</p>"]),
        Patch(1, ["<p>Sec</p>"]),
        Patch(1, ["<p>Second.</p>"]),
        Patch(2, ["<p>Third</p>"]),
    ]
    assert stream.finish() is None and stream.finish() is None and stream.patch() is None


def test_what_follows_a_list_makes_it_final_at_its_first_letter():
    stream = Stream()
    stream.feed("- a\n\nE")
    assert len(stream.snapshot()) == 0 and stream.patch() == Patch(0, ["<ul>\n<li>a</li>\n</ul>", "<p>E</p>"])
    stream.feed("nd")
    assert stream.patch() == Patch(1, ["<p>End</p>"])


def test_a_fence_right_after_a_paragraph_loses_nothing():
    stream, page = Stream(), Page()
    for piece in ("para\n```py", "\ncode\n"):
        stream.feed(piece)
        page.apply(stream.patch())
    assert [Reader(block).text for block in page.blocks] == ["para", "pyCopycode\n"]


@pytest.mark.parametrize("piece", ["word ", "word\n", "12 "])
def test_a_long_paragraph_shows_every_word_while_it_grows(piece):
    stream, page = Stream(), Page()
    for count in range(1, 2500):
        stream.feed(piece)
        page.apply(stream.patch())
        if count % 50 == 0 and len(piece) * count > 3000:
            assert len(Reader("".join(page.blocks)).text.split()) == count
    assert page.appends > 1000


def test_nothing_new_is_no_patch():
    stream = Stream()
    assert stream.patch() is None
    stream.feed("")
    assert stream.patch() is None
    stream.feed("a\r")
    assert stream.patch() == Patch(0, ["<p>a</p>"])
    stream.feed("\x00")
    stream.feed("\n  ")
    assert stream.patch() is None and stream.finish() is None
    assert stream.snapshot() == ["<p>a</p>"]


def test_a_finished_stream_takes_no_more():
    stream = Stream()
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.feed("a")


def test_an_open_fence_is_appended_to_and_coloured_once():
    stream, page = Stream(), Page()
    sent = []
    for piece in ("```py", "thon\nde", "f f():\n", "``", "`", "\nend"):
        stream.feed(piece)
        sent.append(stream.patch())
        page.apply(sent[-1])
        assert page.blocks == stream.snapshot()
    assert sent[0] is None, "a fence that has just begun is not shown as text"
    assert sent[1] is not None and sent[1].blocks[0].endswith('<code class="hl" data-open>de</code></pre></div>')
    assert sent[2] == Patch(1, [], "f f():\n")
    assert sent[3] is sent[4] is None, "what may be the closing fence is kept back"
    assert sent[5] is not None and sent[5].keep == 0 and '<span class="k">def</span>' in sent[5].blocks[0]
    assert page.blocks[-1] == "<p>end</p>"


def test_what_looked_like_a_closing_fence_is_shown_after_all():
    text = "```\n``"
    stream, page = Stream(), Page()
    for piece in (text, "x", "\n", " ", "y", "\n~", "\n"):
        stream.feed(piece)
        page.apply(stream.patch())
    assert Reader(page.blocks[0]).text == "textCopy``x\n y\n~\n"


@pytest.mark.parametrize(
    ("name", "text", "most_blocks"),
    [
        ("fence", "```python\n" + "x = '<'  # comment\n" * 3000, 1),
        ("one line", "```\n" + "x < y " * 9000, 1),
        ("paragraph", "Some **bold** words & more. " * 3000, 1),
        ("lines", "Some **bold** words & more.\n" * 3000, 1),
        ("table", "| a | b |\n|---|---|\n" + "| one | **two** |\n" * 3000, 1),
        ("quote", "> some words\n" * 4000, 1),
        ("list", "".join(f"{i}. item *{i}*\n\n" for i in range(1, 3000)), 1),
        ("item", "- a\n  ```sh\n" + "  ls -l  # <\n" * 3000, 1),
        ("brackets", "[" * 50_000, 1),
        ("wide table", "|a" * 60 + "\n" + "|-" * 60 + "\n" + "|\n" * 20_000, 1),
    ],
)
def test_a_huge_block_costs_in_proportion(name, text, most_blocks):
    def stream_s(source: str) -> tuple[float, Page]:
        stream, page = Stream(), Page()
        began_s = time.process_time()
        for start in range(0, len(source), 100):
            stream.feed(source[start : start + 100])
            patch = stream.patch()
            if patch and not patch.append:
                page.apply(patch)
            elif patch:
                page.appends += 1
                page.blocks = stream.snapshot()[-1:] if page.appends == 1 else page.blocks
        stream.finish()
        spent_s = time.process_time() - began_s
        assert len(stream.snapshot()) == most_blocks
        return spent_s, page

    half_s, page = stream_s(text[: len(text) // 2])
    whole_s, _ = stream_s(text)
    if name != "list":
        assert page.appends > 100
    assert whole_s < 3.2 * half_s + 2  # quadratic cost would be minutes; the rest is the noise of a shared machine
    assert whole_s < 30


@pytest.mark.parametrize(
    "text",
    [
        "Some **bold** words & more. " * 400,
        "Some words \u202e\n" * 900,
        "| a | b |\n|---|---|\n" + "| one | **two** |\n" * 600,
        "> quoted\n" * 900,
        "".join(f"{i}. item *{i}* and words\n" for i in range(1, 400)) + "\nend [x]\n\n[x]: https://y.z\n",
        "- a\n  ```sh\n" + "  ls -l  # <\n" * 600,
        "  ```sh\n" + "  ls -l  # <\n" * 200 + "  ```\nend",
        "Words " * 8000,
    ],
)
def test_long_blocks_show_on_the_page_what_the_server_thinks(text):
    play(text, split(text, 5, 400))


def test_a_long_list_is_previewed_in_parts_and_ends_as_one():
    text = "".join(f"{i}. item *{i}* and words\n" for i in range(1, 400))
    stream, page = Stream(slow_preview_s=60), Page()
    for piece in split(text, 3, 200):
        stream.feed(piece)
        page.apply(stream.patch())
    assert len(page.blocks) > 3 and '<ol start="' in page.blocks[-1]
    page.apply(stream.finish())
    assert page.blocks == to_html(text) and len(page.blocks) == 1


def test_a_slow_preview_is_not_made_again():
    text = ">" * 19 + " a\n" + "b c d e f g h i j k l m n o p q r\n" * 100
    bomb = "".join("![" * 60 + "\n" for _ in range(30))
    for source in (text, bomb):
        play(source * 2, split(source * 2, 1, 300))


# Bombs -----------------------------------------------------------------------------------

BOMBS = {
    "quotes": ">" * 10_000,
    "spaced quotes": "> " * 10_000 + "x",
    "brackets": "[" * 100_000,
    "pictures": "![" * 50_000,
    "nested links": "[" * 1000 + "a" + "](https://a)" * 1000,
    "nested pictures": "![" * 1000 + "a" + "](https://a)" * 1000,
    "backticks": "`" * 100_000,
    "runs of backticks": "".join("`" * (i % 300) + " " for i in range(1000)),
    "stars": "*a " * 30_000,
    "deep list": "".join(" " * i + "- a\n" for i in range(400)),
    "list in a line": "- " * 10_000 + "x",
    "lazy lines": ">" * 30 + "a\n" + "b\n" * 50_000,
    "wide table": "|a" * 60 + "\n" + "|-" * 60 + "\n" + "|\n" * 50_000,
    "many wide tables": ("|a" * 30 + "\n" + "|-" * 30 + "\n" + "|\n" * 30 + "\n") * 300,
    "formulas": "\\[\n" * 30_000,
    "inline formulas": "\\(" * 50_000,
    "definitions": "".join(f"[{i}]: https://a.b\n" for i in range(5000)),
    "one long line": "word " * 2_000_000,
    "comments": "```js\n" + "/*" * 29_000 + "\n```",
    "quotes in code": "```python\n" + "'''\"\"\"" * 9000 + "\n```",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_bounded_time(name):
    began_s = time.process_time()
    blocks = to_html(BOMBS[name])
    assert time.process_time() - began_s < 30
    assert sum(map(len, blocks)) < 12_000_000


def test_ten_megabytes_of_paragraphs():
    began_s = time.process_time()
    blocks = to_html("Some words, **bold** too.\n\n" * 380_000)
    assert time.process_time() - began_s < 30
    assert blocks[0] == "<p>Some words, <strong>bold</strong> too.</p>"
    assert blocks[-1] == '<p class="plain">Some words, **bold** too.</p>'


def test_nothing_that_is_nested_too_deep_is_lost():
    for text in (
        ">" * 99 + "deep",
        "- " * 99 + "deep",
        "".join("  " * i + "- a\n" for i in range(60)) + "  " * 60 + "deep\n\nout",
    ):
        seen = check(to_html(text))
        assert "deep" in seen.text
    assert seen.words[-1] == "out"


def test_a_block_over_the_limit_is_plain():
    short, long = "**a** b " * 24_000, "**a** b " * 25_001
    assert one(short).startswith("<p><strong>")
    assert to_html(long) == [f'<p class="plain">{long.strip()}</p>']
    page = play("x\n\n" + long, split("x\n\n" + long, 1, 40_000))
    assert page.appends > 0


def test_beyond_the_limit_of_one_text_previews_are_plain_too():
    text = "```\n" + "x" * render.MOST_MARKDOWN + "\n```\n**a**"
    stream, page = Stream(), Page()
    stream.feed(text)
    page.apply(stream.patch())
    assert page.blocks[1] == '<p class="plain" data-open>**a**</p>'
    page.apply(stream.finish())
    assert page.blocks[1] == '<p class="plain">**a**</p>'


# Style -----------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_on_light_and_dark_ground():
    rules = re.findall(r"^((?:\.dark )?)\.hl .*\{color:(#\w{6})\}$", css(), re.MULTILINE)
    grounds = {"": ("#ffffff", "#f4f4f5"), ".dark ": ("#18181b", "#27272a")}
    assert len(rules) == 14
    for where, colour in rules:
        for ground in grounds[where]:
            assert contrast(colour, ground) >= 4.5, (where, colour, ground)


def test_the_style_asks_for_nothing_from_elsewhere():
    assert "url(" not in css() and "@import" not in css() and css().count("{") == css().count("}")
    for name in ("plain", "odd", "math", "to-center"):
        assert f".{name}" in css()


def test_a_link_in_text_is_unescaped_once():
    assert unescape(Reader(one("[a](https://b.c/?d=1&amp;e=2)")).tags[1][1]["title"] or "") == "https://b.c/?d=1&e=2"
