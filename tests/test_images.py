"""Pictures that people hand in: what is taken, what is refused, and before what."""

from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modules.errors import ChatDamaged, ImageError, ImageMissing, ImageRefused, ImageTooLarge
from modules.images import ImageLimits, Images, header


def encoded(kind: str = "PNG", size=(40, 30), colour=(10, 200, 30), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    return Images(tmp_path / "images")


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_the_three_formats_are_taken(images, kind, options):
    data = encoded(kind, **options)
    stored = images.add(data)
    assert (stored.format, stored.width, stored.height) == (kind, 40, 30) and stored.path.read_bytes() == data
    assert images.add(data).id == stored.id and images.path(stored.id) == stored.path
    assert header(data) == (kind, 40, 30)
    with Image.open(io.BytesIO(images.thumbnail(stored.id, 20))) as small:
        assert small.size == (20, 15)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<svg onload=x>", "SVG"), (b"GIF89a" + bytes(50), "GIF"), (b"%PDF-1.7", "PDF"), (b"", "something else"),
        (b"\x00\x00\x00\x18ftypheic" + bytes(30), "HEIC"), (b"PK\x03\x04", "zip"),
        (b"\x89PNG\r\n\x1a\n", "cut off|looks like"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "damaged"), (b"RIFF\0\0\0\0WEBPVP8?" + bytes(20), "damaged"),
        (encoded()[:60], "damaged or cut off"), (encoded("JPEG")[:-200], "damaged"),
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_its_name(images, data, words):
    with pytest.raises(ImageRefused, match=words):
        images.add(data)


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(width + 1)) for _ in range(height)) + packed.flush()
    shape = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_it_is_decoded(images):
    data = bomb(13000, 13000)
    began = time.monotonic()
    with pytest.raises(ImageTooLarge, match="13000 x 13000"):
        images.add(data)
    assert len(data) < 500_000 and time.monotonic() - began < 0.1


def test_sizes(tmp_path):
    small = Images(tmp_path, ImageLimits(max_bytes=400))
    with pytest.raises(ImageTooLarge, match="MB"):
        small.add(encoded() + bytes(400))
    with pytest.raises(ImageRefused, match="at least 8"):
        Images(tmp_path).add(encoded(size=(4, 40)))


def test_what_engines_get_is_turned_white_and_without_metadata(images):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    stored = images.add(encoded("JPEG", exif=exif))
    with Image.open(images.for_engine(stored.id, square=False)) as upright:
        assert upright.size == (30, 40) and upright.format == "PNG" and not upright.getexif()
    clear = images.add(encoded(mode="RGBA", colour=(0, 0, 0, 0)))
    with Image.open(images.for_engine(clear.id, square=True)) as square:
        assert square.size == (40, 40) and square.getpixel((5, 5)) == (255, 255, 255)
    green = images.add(encoded(size=(20, 60)))
    with Image.open(images.for_engine(green.id, square=True)) as square:
        assert square.size == (60, 60) and square.getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("id", ["", "../chats.db", "0" * 32, "A" * 32, "x" * 400, "%2e%2e"])
def test_an_id_is_never_a_path(images, id):
    with pytest.raises(ImageMissing):
        images.path(id)


def test_a_disk_that_refuses_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ChatDamaged, match="could not be stored"):
        Images(tmp_path / "file" / "images").add(encoded())


def test_unused_pictures_go(images):
    a, b = images.add(encoded()), images.add(encoded(colour=(1, 2, 3)))
    images.thumbnail(b.id)
    assert images.remove_unused({a.id}, 60, time.time()) == 0
    assert images.remove_unused({a.id}, 60, time.time() + 100) == 1
    assert images.path(a.id)
    with pytest.raises(ImageMissing):
        images.path(b.id)


GOOD = [encoded(), encoded("JPEG"), encoded("WEBP"), encoded("WEBP", lossless=True)]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    st.integers(0, 900),
)
def test_no_mutation_gets_past_with_anything_but_our_errors(tmp_path_factory, data, changes, cut):
    broken = bytearray(data[: len(data) - cut if cut < 400 else len(data)])
    for at, value in changes:
        if at < len(broken):
            broken[at] = value
    try:
        stored = Images(tmp_path_factory.getbasetemp() / "fuzz").add(bytes(broken))
        assert stored.width * stored.height <= 40_000_000
    except ImageError:
        pass
