"""Every picture is a real one, of the size and format asked for."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import httpx
import pytest
from openai import OpenAI
from PIL import Image

from gateway.sandbox.draw import Card, draw
from gateway.sandbox.server import SandboxServer
from tests.sandbox.calls import FLARE, generate, picture, png


def card(**changes: object) -> Card:
    fields = {
        "prompt": "A lighthouse",
        "width": 256,
        "height": 256,
        "quality": "low",
        "model": FLARE,
        "serial": 1,
    }
    return Card(**(fields | changes))  # type: ignore[arg-type]  # a test's own table


@pytest.mark.parametrize(
    ("output_format", "pillow", "size"),
    [
        ("png", "PNG", "1024x1024"),
        ("png", "PNG", "1536x1024"),
        ("jpeg", "JPEG", "1024x1536"),
        ("webp", "WEBP", "1536x864"),
    ],
)
def test_size_and_format(http: httpx.Client, output_format: str, pillow: str, size: str) -> None:
    answer = generate(http, output_format=output_format, size=size).json()
    drawn = picture(answer["data"][0]["b64_json"])
    assert drawn.format == pillow
    assert f"{drawn.width}x{drawn.height}" == size
    assert (answer["output_format"], answer["size"]) == (output_format, size)


def test_a_gif_moves(http: httpx.Client) -> None:
    answer = generate(
        http, output_format="gif", size="1024x640", frame_count=5, frame_duration_ms=124
    ).json()
    drawn = picture(answer["data"][0]["b64_json"])
    assert drawn.format == "GIF"
    assert drawn.size == (1024, 640)
    assert getattr(drawn, "n_frames", 1) == 5
    assert drawn.info["duration"] == 120


def test_an_svg_says_its_prompt() -> None:
    text = draw(card(output_format="svg", prompt="cats & <dogs>")).decode()
    root = ElementTree.fromstring(text)
    assert root.attrib["width"] == "256"
    assert "cats & <dogs>" in "".join(root.itertext())


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_transparent_background_is_one(http: httpx.Client, output_format: str) -> None:
    answer = generate(http, background="transparent", output_format=output_format).json()
    drawn = picture(answer["data"][0]["b64_json"])
    assert answer["background"] == "transparent"
    assert drawn.convert("RGBA").getpixel((0, 0))[3] == 0  # type: ignore[index]  # RGBA is a tuple


def test_the_prompt_decides_the_picture_and_each_purchase_is_another() -> None:
    assert draw(card()) == draw(card())
    others = [card(prompt="A cat"), card(serial=2), card(index=1), card(quality="high")]
    assert len({draw(one) for one in [card(), *others]}) == 5


@pytest.mark.parametrize("prompt", [" ", "x" * 32_000, "Würfel 画像 🐈", "\x00\t\n", "a " * 400])
@pytest.mark.parametrize("size", [(1024, 1024), (1536, 512), (512, 1536)])
def test_any_prompt_can_be_drawn(prompt: str, size: tuple[int, int]) -> None:
    drawn = Image.open(io.BytesIO(draw(card(prompt=prompt, width=size[0], height=size[1]))))
    assert drawn.size == size


def test_edits_show_what_was_given(sdk: OpenAI) -> None:
    red = io.BytesIO()
    Image.new("RGB", (300, 200), (255, 0, 0)).save(red, "PNG")
    answer = sdk.images.edit(
        model=FLARE, prompt="A hat", image=("in.png", red.getvalue(), "image/png")
    )
    assert answer.data is not None
    drawn = picture(answer.data[0].b64_json)
    assert drawn.convert("RGB").getpixel((180, 130)) == (255, 0, 0)


def test_sixteen_inputs_and_a_mask_fit(http: httpx.Client, server: SandboxServer) -> None:
    files = [("image[]", (f"{n}.png", png(), "image/png")) for n in range(16)]
    files.append(("mask", ("m.png", png(), "image/png")))
    fields = {"model": FLARE, "prompt": "All of them", "size": "1536x1024"}
    answer = http.post("/images/edits", data=fields, files=files)
    assert answer.status_code == 200
    assert [file.field for file in server.journal[0].files] == ["image[]"] * 16 + ["mask"]
