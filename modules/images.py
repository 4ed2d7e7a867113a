"""Pictures that people hand in. Nothing is decoded before its header was checked; the original bytes are kept.

What engines and pages are given is made from the original: turned as its EXIF says,
on white where it was transparent, and without its metadata.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import ChatDamaged, ImageMissing, ImageRefused, ImageTooLarge

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
ID = re.compile(r"[0-9a-f]{32}")
OTHERS = (
    (b"GIF8", "a GIF"), (b"%PDF", "a PDF"), (b"II*\0", "a TIFF"), (b"MM\0*", "a TIFF"), (b"BM", "a BMP"),
    (b"%!PS", "an EPS"), (b"SIMPLE", "a FITS"), (b"PK", "a zip file"), (b"<", "HTML or SVG"),
)  # fmt: skip


@dataclass(frozen=True)
class ImageLimits:
    """Bounds of a picture: bytes of the file, pixels in all, pixels of a side."""

    max_bytes: int = 20_000_000
    max_pixels: int = 40_000_000
    max_side: int = 16384
    min_side: int = 8


@dataclass(frozen=True)
class StoredImage:
    """A picture on the disk. id is the beginning of the SHA-256 of its bytes."""

    id: str
    path: Path
    width: int
    height: int
    format: str


class Images:
    """The folder of pictures."""

    def __init__(self, folder: Path, limits: ImageLimits | None = None) -> None:
        self._folder, self._limits = folder, limits or ImageLimits()

    def add(self, data: bytes) -> StoredImage:
        """Check and store. Raises ImageRefused, ImageTooLarge, or ChatDamaged when the disk refuses."""
        if len(data) > self._limits.max_bytes:
            raise ImageTooLarge(
                f"The picture has {len(data) / 1e6:.0f} MB; the most is {self._limits.max_bytes / 1e6:.0f} MB."
            )
        kind, width, height = header(data)
        self._check_size(width, height)
        with _opened(data, kind) as image:
            if image.size != (width, height):
                raise ImageRefused("The picture's header contradicts its contents.")
        name = hashlib.sha256(data).hexdigest()[:32]
        path = self._folder / f"{name}.{FORMATS[kind]}"
        if not path.exists():
            self._write(path, data)
        return StoredImage(name, path, width, height, kind)

    def path(self, id: str) -> Path:
        """Where the original lies. Raises ImageMissing."""
        if ID.fullmatch(id):
            for ending in FORMATS.values():
                path = self._folder / f"{id}.{ending}"
                if path.is_file() and not path.is_symlink():
                    return path
        raise ImageMissing("The picture is not there any more.", hint="Add it again.")

    def thumbnail(self, id: str, side_px: int = 640) -> bytes:
        """A WebP of at most side_px on its longer side, for the page."""
        source = self.path(id)
        cached = self._folder / "made" / f"{id}-{side_px}.webp"
        if not cached.exists():
            with self._clean(source) as image:
                image.thumbnail((side_px, side_px))
                self._save(image, cached, "WEBP")
        return cached.read_bytes()

    def for_engine(self, id: str, square: bool) -> Path:
        """A PNG that every engine opens. square pads with the border's usual colour, as the demo model needs."""
        source = self.path(id)
        made = self._folder / "made" / f"{id}{'-square' if square else ''}.png"
        if not made.exists():
            with self._clean(source) as image:
                self._save(_squared(image) if square else image, made, "PNG")
        return made

    def remove_unused(self, used: set[str], older_than_s: float, now_s: float) -> int:
        """Delete pictures that no conversation holds; returns how many."""
        count = 0
        for path in self._folder.glob("*.*"):
            if path.stem not in used and now_s - path.stat().st_mtime > older_than_s:
                path.unlink(missing_ok=True)
                for made in (self._folder / "made").glob(f"{path.stem}*"):
                    made.unlink(missing_ok=True)
                count += 1
        return count

    def _check_size(self, width: int, height: int) -> None:
        limits = self._limits
        if width * height > limits.max_pixels or max(width, height) > limits.max_side:
            raise ImageTooLarge(
                f"The picture has {width} x {height} pixels; the most is {limits.max_pixels / 1e6:.0f} million "
                f"in all and {limits.max_side} on a side."
            )
        if min(width, height) < limits.min_side:
            raise ImageRefused(
                f"The picture has {width} x {height} pixels; a side must have at least {limits.min_side}."
            )

    def _clean(self, source: Path) -> Any:
        from PIL import Image, ImageOps

        data = source.read_bytes()
        with _opened(data, header(data)[0]) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
                layer = turned.convert("RGBA")
                turned = Image.new("RGB", layer.size, (255, 255, 255))
                turned.paste(layer, mask=layer.getchannel("A"))
            return turned.convert("RGB")

    def _save(self, image: Any, to: Path, kind: str) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        self._write(to, buffer.getvalue())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, temporary = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError, UnboundLocalError):
                os.unlink(temporary)
            raise ChatDamaged(f"The picture could not be stored: {error.strerror}.") from error


def header(data: bytes) -> tuple[str, int, int]:
    """Format, width and height from the first bytes alone. Raises ImageRefused for anything but PNG, JPEG, WebP."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            width, height = struct.unpack(">II", data[16:24])
            return "PNG", width, height
        if data[:3] == b"\xff\xd8\xff":
            return ("JPEG", *_jpeg_size(data))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return ("WEBP", *_webp_size(data))
    except (struct.error, IndexError):
        raise ImageRefused("The picture is cut off.") from None
    if data[4:8] == b"ftyp":
        raise ImageRefused("This looks like HEIC, AVIF or a video, not a PNG, JPEG or WebP picture.")
    looks = next((name for magic, name in OTHERS if data.lstrip()[: len(magic)] == magic), "something else")
    raise ImageRefused(f"This looks like {looks}, not a PNG, JPEG or WebP picture.")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    position = 2
    while position < len(data):
        if data[position] != 0xFF:
            raise ImageRefused("The JPEG is damaged.")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        if marker == 0xDA:
            break
        if marker in (0x01, *range(0xD0, 0xD9)):
            position += 2
            continue
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        position += 2 + max(2, length)
    raise ImageRefused("The JPEG is damaged: it gives no size.")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise ImageRefused("The WebP is damaged.")


@contextlib.contextmanager
def _opened(data: bytes, kind: str) -> Any:
    """Decode the first frame with the one decoder that the header named."""
    from PIL import Image, UnidentifiedImageError  # imported here: it slows the start

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that were checked here already
            with Image.open(io.BytesIO(data), formats=[kind]) as image:
                image.load()
                yield image
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ImageRefused("The picture is damaged or cut off.") from error


def _squared(image: Any) -> Any:
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    border = [image.getpixel((x, y)) for x in range(0, width, max(1, width // 40)) for y in (0, height - 1)]
    border += [image.getpixel((x, y)) for y in range(0, height, max(1, height // 40)) for x in (0, width - 1)]
    middle = tuple(sorted(pixel[i] for pixel in border)[len(border) // 2] for i in range(3))
    side = max(width, height)
    out = Image.new("RGB", (side, side), middle)
    out.paste(image, ((side - width) // 2, (side - height) // 2))
    return out
