"""Real pictures, drawn in some ten milliseconds: a landscape that only the prompt decides, with
the prompt, the size and the quality written on it, and what was given to an edit as thumbnails.

The same prompt at the same place of an answer gives the same landscape; the serial number in the
corner makes two purchases differ, as they do in the real thing.
"""

from __future__ import annotations

import hashlib
import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

Colour: TypeAlias = tuple[int, int, int]

PALETTES: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
    ((255, 183, 128), (94, 84, 142), (255, 236, 200), (36, 30, 78)),
    ((255, 214, 165), (239, 108, 117), (255, 248, 224), (74, 26, 68)),
    ((190, 227, 219), (69, 123, 157), (255, 251, 235), (20, 54, 82)),
    ((253, 226, 228), (143, 113, 181), (255, 255, 255), (54, 36, 92)),
    ((212, 234, 173), (61, 139, 132), (255, 250, 214), (18, 60, 62)),
    ((162, 155, 215), (30, 35, 90), (244, 241, 222), (11, 14, 44)),
    ((255, 200, 150), (200, 80, 100), (255, 240, 190), (60, 20, 50)),
    ((178, 216, 248), (86, 130, 200), (255, 246, 210), (24, 42, 92)),
)
"""Horizon, zenith, sun and nearest hill of a sky, in RGB."""

SHOWN_CHARACTERS = 600
MADE_BY, MARK = "made_by", "gateway.sandbox "
"""A PNG's text chunk, and what it and a JPEG's comment start with, before the model's name: the
sandbox's C2PA."""
PNG_LEVEL = 2
"""zlib's level: 12 ms for a drawing of 1024x1024; 6 takes a third longer and saves little."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """Something that was given to an edit, already small. ``label`` is its field: ``image``."""

    label: str
    picture: Image.Image


@dataclass(frozen=True, slots=True)
class Card:
    """What to draw. Sizes are in pixels.

    ``index`` is the place among the pictures of one answer, ``serial`` the number of the request.
    ``output_compression`` is 0-100 (jpeg and webp). ``frame_duration_ms`` is of each GIF frame.
    """

    prompt: str
    width: int
    height: int
    quality: str
    model: str
    serial: int
    index: int = 0
    output_format: str = "png"
    output_compression: int = 100
    transparent: bool = False
    frame_count: int = 1
    frame_duration_ms: int = 200
    thumbnails: tuple[Thumbnail, ...] = ()


def thumbnail(label: str, picture: Image.Image, edge: int = 320) -> Thumbnail:
    """A small copy of an input, upright, at most ``edge`` pixels a side."""
    picture.draft("RGB", (edge, edge))
    upright = ImageOps.exif_transpose(picture)
    small = upright.convert("RGBA")
    small.thumbnail((edge, edge))
    return Thumbnail(label, small)


def draw(card: Card) -> bytes:
    """The file: png, jpeg, webp, gif or svg, by ``card.output_format``. Takes the calling thread:
    some 40 ms for 1024x1024, so it is never called on the event loop."""
    file = io.BytesIO()
    compression = max(1, card.output_compression)
    match card.output_format:
        case "svg":
            return _svg(card).encode()
        case "gif":
            frames = [
                _picture(card, moment / card.frame_count).quantize(128, Image.Quantize.FASTOCTREE)
                for moment in range(card.frame_count)
            ]
            frames[0].save(
                file,
                "GIF",
                save_all=True,
                append_images=frames[1:],
                duration=gif_duration(card.frame_duration_ms),
                loop=0,
                optimize=False,
            )
        case "jpeg":
            made_by = (MARK + card.model).encode()
            drawn = _picture(card).convert("RGB")
            drawn.save(file, "JPEG", quality=min(95, compression), comment=made_by)
        case "webp":
            _picture(card).save(file, "WEBP", quality=compression, method=0)
        case _:
            signed = PngInfo()
            signed.add_text(MADE_BY, MARK + card.model)
            _picture(card).save(file, "PNG", compress_level=PNG_LEVEL, pnginfo=signed)
    return file.getvalue()


def draw_partial(card: Card, part: int, parts: int) -> bytes:
    """The picture as it stands after ``part + 1`` of ``parts`` partial images: still blurred."""
    blur = max(card.width, card.height) / 40 * (parts - part) / parts
    # Blurring a quarter-size copy looks the same and costs a sixteenth.
    small = _picture(card).reduce(4).filter(ImageFilter.GaussianBlur(blur / 4))
    picture = small.resize((card.width, card.height), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    match card.output_format:
        case "jpeg":
            picture.convert("RGB").save(file, "JPEG", quality=80)
        case "webp":
            picture.save(file, "WEBP", quality=80, method=0)
        case _:
            picture.save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def gif_duration(milliseconds: int) -> int:
    """Rounded to 10 ms and capped, as GIF's two bytes of hundredths want it (contract 1.2)."""
    return min(655_350, (milliseconds + 5) // 10 * 10)


@dataclass(frozen=True, slots=True)
class _Scene:
    """A landscape in fractions of the picture: 0-1 from the left and from the top."""

    horizon: Colour
    zenith: Colour
    sun: Colour
    near: Colour
    sun_x: float
    sun_y: float
    sun_radius: float
    hills: tuple[tuple[float, float, float, float], ...]
    """Base height, amplitude, waves across, phase; the farthest first."""
    stars: tuple[tuple[float, float, float], ...]

    def hill_colour(self, layer: int) -> Colour:
        near = (layer + 1) / len(self.hills)
        far = _mix(self.zenith, self.horizon, 0.45)
        return _mix(far, self.near, near)

    def skyline(self, layer: int, x: float) -> float:
        base, amplitude, waves, phase = self.hills[layer]
        slow = math.sin(2 * math.pi * waves * x + phase)
        quick = math.sin(2 * math.pi * waves * 2.7 * x + phase * 1.9)
        return base + amplitude * (0.75 * slow + 0.25 * quick)


def _scene(card: Card, moment: float) -> _Scene:
    digest = hashlib.sha256(f"{card.index}|{card.prompt}".encode()).digest()
    chance = [byte / 255 for byte in digest]
    horizon, zenith, sun, near = PALETTES[digest[0] % len(PALETTES)]
    drift = moment * 2 * math.pi
    hills = tuple(
        (
            0.50 + 0.09 * layer,
            0.045 + 0.05 * chance[layer + 1],
            0.6 + 1.3 * chance[layer + 5],
            2 * math.pi * chance[layer + 9],
        )
        for layer in range(4)
    )
    stars = tuple(
        (chance[place], chance[place + 1] * 0.40, 0.0015 + 0.0025 * chance[place - 1])
        for place in range(13, 31)
    )
    return _Scene(
        horizon=horizon,
        zenith=zenith,
        sun=sun,
        near=near,
        sun_x=0.30 + 0.42 * chance[14] + 0.05 * math.sin(drift),
        sun_y=0.30 + 0.12 * chance[15] - 0.05 * math.cos(drift),
        sun_radius=0.085 + 0.05 * chance[16],
        hills=hills,
        stars=stars,
    )


def _picture(card: Card, moment: float = 0.0) -> Image.Image:
    """The whole card; ``moment`` (0-1) moves the sun for the frames of a GIF."""
    picture = _landscape(card, _scene(card, moment))
    unit = min(card.width, card.height)
    _write_panel(picture, card, unit)
    if card.thumbnails:
        _paste_thumbnails(picture, card, unit)
    if card.transparent:
        picture.putalpha(_rounded(picture.size, unit // 32, unit // 12))
    return picture


def _landscape(card: Card, scene: _Scene) -> Image.Image:
    """Drawn at half size, softened and enlarged: smooth edges for a quarter of the work."""
    width, height = max(1, card.width // 2), max(1, card.height // 2)
    unit = min(width, height)
    ramp = Image.linear_gradient("L").resize((width, height), Image.Resampling.BILINEAR)
    sky = ImageOps.colorize(ramp, scene.zenith, scene.horizon, mid=None)
    canvas = ImageDraw.Draw(sky, "RGBA")
    for x, y, radius in scene.stars:
        _disc(canvas, x * width, y * height, radius * unit, (*scene.sun, 150))
    centre = (scene.sun_x * width, scene.sun_y * height)
    for halo, alpha in ((2.6, 18), (2.0, 26), (1.5, 40)):
        _disc(canvas, *centre, halo * scene.sun_radius * unit, (*scene.sun, alpha))
    _disc(canvas, *centre, scene.sun_radius * unit, (*scene.sun, 255))
    step = max(1, width // 128)
    for layer in range(len(scene.hills)):
        line = [(x, scene.skyline(layer, x / width) * height) for x in range(0, width + step, step)]
        outline = [(0.0, float(height)), *line, (float(width + step), float(height))]
        canvas.polygon(outline, fill=scene.hill_colour(layer))
    soft = sky.filter(ImageFilter.GaussianBlur(0.7))
    return soft.resize((card.width, card.height), Image.Resampling.BICUBIC)


def _write_panel(picture: Image.Image, card: Card, unit: int) -> None:
    """The prompt on a dark glass panel at the foot, with a line of facts under it."""
    margin, padding = unit // 16, unit // 24
    inner = card.width - 2 * margin - 2 * padding
    small = max(9, unit // 44)
    facts = ImageFont.load_default(small)
    lines, font, line_height = _fit(card.prompt, inner, int(card.height * 0.34), unit)
    height = line_height * len(lines) + padding + small + 2 * padding
    top = card.height - margin - height
    box = (margin, top, card.width - margin, card.height - margin)
    glass = picture.crop(box)
    shade = Image.new("RGB", glass.size, (16, 18, 34))
    picture.paste(
        Image.blend(glass.reduce(4).resize(glass.size), shade, 0.62),
        box,
        _rounded(glass.size, 0, padding),
    )
    canvas = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        place = (margin + padding, top + padding + number * line_height)
        canvas.text(place, line, font=font, fill=(255, 255, 255))
    foot = (margin + padding, card.height - margin - padding)
    said = f"{card.width}x{card.height}  ·  {card.quality}  ·  {card.model}"
    canvas.text(foot, said, font=facts, fill=(206, 210, 230), anchor="ls")
    number_at = (card.width - margin - padding, card.height - margin - padding)
    serial = f"#{card.serial}" if card.index == 0 else f"#{card.serial}.{card.index + 1}"
    canvas.text(number_at, serial, font=facts, fill=(206, 210, 230), anchor="rs")
    corner = (card.width - margin - padding, margin)
    canvas.text(corner, "sandbox", font=facts, fill=(255, 255, 255), anchor="rt")


def _paste_thumbnails(picture: Image.Image, card: Card, unit: int) -> None:
    """The inputs of an edit in white frames along the top, each with its field's name."""
    margin, gap = unit // 16, unit // 64
    across = max(4, len(card.thumbnails))
    edge = min(unit // 4, (card.width - 2 * margin) // across - gap)
    border, foot = max(2, edge // 24), max(10, edge // 6)
    font = ImageFont.load_default(max(8, foot * 5 // 8))
    canvas = ImageDraw.Draw(picture)
    for number, given in enumerate(card.thumbnails):
        small = given.picture.copy()
        small.thumbnail((edge - 2 * border, edge - 2 * border))
        left = margin + number * (edge + gap)
        right, bottom = left + edge, margin + small.height + 2 * border + foot
        canvas.rectangle((left, margin, right, bottom), fill=(250, 249, 245))
        inside = (left + (edge - small.width) // 2, margin + border)
        checks = _checkerboard(small.size, max(4, edge // 16))
        picture.paste(Image.alpha_composite(checks, small).convert("RGB"), inside)
        middle = (left + edge // 2, bottom - (foot + border) // 2)
        canvas.text(middle, given.label, font=font, fill=(60, 60, 70), anchor="mm")


def _fit(
    text: str, width: int, height: int, unit: int
) -> tuple[list[str], ImageFont.FreeTypeFont | ImageFont.ImageFont, int]:
    """The largest of a few type sizes at which the prompt fits; at the smallest it is cut."""
    shown, face = _readable(" ".join(text[:SHOWN_CHARACTERS].split()) or " ")
    if len(text) > SHOWN_CHARACTERS:
        shown += "…"
    for divisor in (15, 19, 24, 30, 38):
        size = max(10, unit // divisor)
        font = face.font_variant(size=size) if face else ImageFont.load_default(size)
        line_height = size * 13 // 10
        lines = _wrap(shown, font, width)
        if len(lines) * line_height <= height:
            return lines, font, line_height
    room = max(1, height // line_height)
    return [*lines[: room - 1], lines[room - 1].rstrip("…") + "…"], font, line_height


def _readable(text: str) -> tuple[str, ImageFont.FreeTypeFont | None]:
    """The text, and a font of the machine's where Pillow's own (ASCII) does not have its letters.
    Without one, accents are dropped: "Würfel" is shown as "Wurfel"."""
    if text.isascii():
        return text, None
    try:
        return text, ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        folded = unicodedata.normalize("NFKD", text)
        return "".join(letter for letter in folded if not unicodedata.combining(letter)), None


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word longer than a line is cut where it must be."""
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line]


def _svg(card: Card) -> str:
    """The same card as text; its landscape is made of the same curves."""
    scene = _scene(card, 0.0)
    width, height = card.width, card.height
    unit = min(width, height)
    hills = []
    for layer in range(len(scene.hills)):
        points = " ".join(
            f"{x * width / 32:.0f},{scene.skyline(layer, x / 32) * height:.0f}" for x in range(33)
        )
        colour = _hex(scene.hill_colour(layer))
        hills.append(f'<polygon fill="{colour}" points="0,{height} {points} {width},{height}"/>')
    margin, padding = unit // 16, unit // 24
    lines, _font, line_height = _fit(
        card.prompt, width - 2 * margin - 2 * padding, int(height * 0.34), unit
    )
    size, small = line_height * 10 // 13, max(9, unit // 44)
    panel = line_height * len(lines) + 3 * padding + small
    top = height - margin - panel
    text = "".join(
        f'<tspan x="{margin + padding}" y="{top + padding + size + number * line_height}">'
        f"{escape(line)}</tspan>"
        for number, line in enumerate(lines)
    )
    said = f"{width}x{height} · {card.quality} · {escape(card.model)} · #{card.serial}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">'
        '<defs><linearGradient id="sky" x1="0" y1="0" x2="0" y2="1">'
        f'<stop offset="0" stop-color="{_hex(scene.zenith)}"/>'
        f'<stop offset="1" stop-color="{_hex(scene.horizon)}"/></linearGradient></defs>'
        f'<rect width="{width}" height="{height}" fill="url(#sky)"/>'
        f'<circle cx="{scene.sun_x * width:.0f}" cy="{scene.sun_y * height:.0f}" '
        f'r="{scene.sun_radius * unit:.0f}" fill="{_hex(scene.sun)}"/>'
        f"{''.join(hills)}"
        f'<rect x="{margin}" y="{top}" width="{width - 2 * margin}" height="{panel}" '
        f'rx="{padding}" fill="#101222" fill-opacity="0.62"/>'
        f'<text fill="#fff" font-size="{size}">{text}</text>'
        f'<text x="{margin + padding}" y="{height - margin - padding}" fill="#ced2e6" '
        f'font-size="{small}">{said}</text></svg>\n'
    )


def _disc(
    canvas: ImageDraw.ImageDraw,
    x: float,
    y: float,
    radius: float,
    fill: tuple[int, int, int, int],
) -> None:
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _rounded(size: tuple[int, int], inset: int, radius: int) -> Image.Image:
    """A mask in which a rectangle with round corners is opaque."""
    mask = Image.new("L", size)
    box = (inset, inset, size[0] - 1 - inset, size[1] - 1 - inset)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, fill=255)
    return mask


def _checkerboard(size: tuple[int, int], square: int) -> Image.Image:
    """What transparent places are shown on."""
    board = Image.new("RGBA", size, (255, 255, 255, 255))
    canvas = ImageDraw.Draw(board)
    for row, y in enumerate(range(0, size[1], square)):
        for x in range(square * (row % 2), size[0], 2 * square):
            canvas.rectangle((x, y, x + square - 1, y + square - 1), fill=(218, 218, 226, 255))
    return board


def _mix(one: Sequence[int], other: Sequence[int], share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
