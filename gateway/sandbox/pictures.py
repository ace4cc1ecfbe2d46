"""The pictures of a request: where one is named, what kind it is, whether it fits (contract 2)."""

from __future__ import annotations

import io
from collections.abc import Container
from dataclasses import dataclass

from PIL import Image

from gateway.domain.call import Json
from gateway.sandbox.forms import Upload
from gateway.sandbox.refusals import USER_ERROR, Refused, no_file, unknown, wrong_type

MAX_IMAGE_BYTES = 50 * 1024 * 1024
MAX_MASK_BYTES = 4 * 1024 * 1024
MAX_URL = 20_971_520
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")


@dataclass(frozen=True, slots=True)
class Given:
    """An input picture: ``role`` is image, mask or markup; width and height in pixels, of the
    file as it is stored (``upright`` ones are after its EXIF orientation)."""

    role: str
    content: bytes
    width: int
    height: int
    upright: tuple[int, int]


def check_picture(name: str, holder: Json, read: Container[str]) -> None:
    """An object that names a picture by ``image_url`` or ``file_id``; ``read`` are the paths of
    those that a picture was found for. A sandbox fetches nothing. Raises ``Refused``."""
    if not isinstance(holder, dict):
        raise wrong_type(name, "an object", holder)
    asked = [key for key, value in holder.items() if value is not None]
    extra = next((key for key in asked if key not in ("image_url", "file_id")), None)
    if extra is not None:
        raise unknown(f"{name}.{extra}")
    if len(asked) != 1:
        raise Refused(
            f"Exactly one of 'image_url' and 'file_id' is required in '{name}'.",
            code="invalid_value",
            param=name,
        )
    param = f"{name}.{asked[0]}"
    value = holder[asked[0]]
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    if asked[0] == "file_id":
        if param not in read:
            raise no_file(value, param)
        return
    if len(value) > MAX_URL:
        raise Refused(
            f"Invalid '{param}': string too long. Expected a string with maximum length "
            f"{MAX_URL}, but got a string with length {len(value)} instead.",
            code="string_above_max_length",
            param=param,
        )
    if value.lower().startswith(("http://", "https://")):
        raise Refused(
            "Failed to download the image: the sandbox fetches nothing; send a data URL.",
            code="failed_to_download_image",
            param=param,
        )
    if param not in read:
        raise Refused(
            f"Invalid '{param}'. Expected a base64-encoded data URL with an image MIME type.",
            code="invalid_image_url",
            param=param,
        )


def open_picture(role: str, label: str, upload: Upload, limit: int) -> Given:
    """The picture's header, read. Raises ``Refused`` for what the API would not take."""
    kind = upload.part.content_type.partition(";")[0].strip().lower()
    if kind not in IMAGE_TYPES:
        raise Refused(
            f"Invalid file '{label}': unsupported mimetype ('{kind}'). Supported file formats are "
            "'image/jpeg', 'image/png', and 'image/webp'.",
            code="unsupported_file_mimetype",
            param=label,
        )
    if upload.part.size_bytes >= limit:
        raise Refused(
            f"Invalid file '{label}': the file is too large. The limit is {limit} bytes.",
            code="image_file_too_large",
            param=label,
        )
    try:
        with Image.open(io.BytesIO(upload.content), formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Refused(
            f"Invalid file '{label}': the file is not a valid image.",
            type_=USER_ERROR,
            code="invalid_image_file",
            param=label,
        ) from None
    upright = (height, width) if turned else (width, height)
    return Given(role, upload.content, width, height, upright)


def check_layer(role: str, upload: Upload, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """A mask or markup: a PNG with alpha, as large as the first image."""
    with Image.open(io.BytesIO(upload.content)) as picture:
        is_png, see_through = picture.format == "PNG", picture.has_transparency_data
    if not is_png:
        raise _bad_layer(role, f"Invalid {role} image format - the {role} must be a PNG.")
    if not see_through:
        raise _bad_layer(role, f"Invalid {role} image format - the alpha channel is missing.")
    if size != wanted:
        raise _bad_layer(
            role,
            f"Invalid {role} image size - {size[0]}x{size[1]} is not the size of the first image, "
            f"{wanted[0]}x{wanted[1]}.",
        )


def _bad_layer(role: str, message: str) -> Refused:
    return Refused(message, type_=USER_ERROR, code="invalid_image_file", param=role)
