"""What is planted in data, by name: images and records, each with the defect that `data.verdicts` has for it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from data.verdicts import Defect

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
COLOURS = (90, 200, 30, 250)

Plant = Callable[[Path], object]
"""Makes whatever is planted at a path; the folder is there."""


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """A picture of one colour, as a file of that format holds it."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    buffer = io.BytesIO()
    Image.new(mode, size, COLOURS[:bands] if bands > 1 else COLOURS[0]).save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _file(content: bytes) -> Plant:
    return lambda path: path.write_bytes(content)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def _outside(path: Path) -> None:
    secret = path.parent.parent / "secret.png"
    secret.write_bytes(encoded("PNG"))
    path.symlink_to(secret)


def _circle(path: Path) -> None:
    other = path.with_name(f"{path.name}.other")
    other.symlink_to(path)
    path.symlink_to(other)


_noise = Image.effect_noise((64, 64), 80).convert("RGB")


def _cut(format: str) -> bytes:
    buffer = io.BytesIO()
    _noise.save(buffer, format)
    return buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]


def _frames() -> bytes:
    return encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), (shade, 0, 9)) for shade in (5, 99)])


IMAGES: dict[str, tuple[str, Plant, Defect | None]] = {
    "missing": ("missing.jpg", lambda _: None, Defect.missing),
    "missing_folder": ("no/where.jpg", lambda _: None, Defect.missing),
    "dangling_link": ("dangling.jpg", lambda path: path.symlink_to("nothing.jpg"), Defect.missing),
    "outside": ("outside.png", _outside, Defect.outside),
    "zero_bytes": ("zero.jpg", _file(b""), Defect.unreadable),
    "truncated_jpeg": ("cut.jpg", _file(_cut("JPEG")), Defect.unreadable),
    "truncated_png": ("cut.png", _file(_cut("PNG")), Defect.unreadable),
    "truncated_webp": ("cut.webp", _file(_cut("WEBP")), Defect.unreadable),
    "truncated_bmp": ("cut.bmp", _file(_cut("BMP")), Defect.unreadable),
    "truncated_tiff": ("cut.tif", _file(_cut("TIFF")), Defect.unreadable),
    "header_only": ("header.jpg", _file(b"\xff\xd8\xff\xe0"), Defect.unreadable),
    "no_pixels": ("nothing.png", _file(png_header(30, 20)), Defect.unreadable),
    "no_size": ("flat.png", _file(png_header(0, 20)), Defect.unreadable),
    "lfs_pointer": ("pointer.jpg", _file(POINTER), Defect.unreadable),
    "web_page": ("page.jpg", _file(b"<!DOCTYPE html><html>404 Not Found</html>"), Defect.unreadable),
    "svg": ("drawing.png", _file(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"), Defect.unreadable),
    "postscript": ("page.eps", _file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n"), Defect.unreadable),
    "pdf": ("page.pdf", _file(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n"), Defect.unreadable),
    "folder": ("folder.jpg", lambda path: path.mkdir(), Defect.unreadable),
    "pipe": ("pipe.jpg", os.mkfifo, Defect.unreadable),
    "links_in_a_circle": ("circle.jpg", _circle, Defect.unreadable),
    "20k_x_20k": ("huge.png", _file(png_header(20_000, 20_000)), Defect.oversized),
    "bomb": ("bomb.png", _file(png_header(100_000, 100_000)), Defect.oversized),
    "strip": ("strip.png", _file(png_header(100_000, 1)), Defect.oversized),
    "gif_named_jpg": ("gif.jpg", _file(encoded("GIF", "P")), Defect.mislabelled),
    "exif_rotated": ("turned.jpg", _file(_turned()), Defect.rotated),
    "animation": ("frames.gif", _file(_frames()), Defect.animated),
    "cmyk": ("cmyk.jpg", _file(encoded("JPEG", "CMYK")), Defect.mode),
    "16_bit": ("deep.png", _file(encoded("PNG", "I;16")), Defect.mode),
    "32_bit": ("deep.tif", _file(encoded("TIFF", "I")), Defect.mode),
    "float": ("float.tif", _file(encoded("TIFF", "F")), Defect.mode),
    "1_x_1": ("dot.png", _file(encoded("PNG", size=(1, 1))), Defect.tiny),
    "grey": ("grey.png", _file(encoded("PNG", "L")), None),
    "transparent": ("glass.png", _file(encoded("PNG", "RGBA")), None),
    "one_bit": ("bit.png", _file(encoded("PNG", "1")), None),
    "webp": ("picture.webp", _file(encoded("WEBP")), None),
    "bytes_behind_the_end": ("tail.jpg", _file(encoded("JPEG") + b"more"), None),
    "no_suffix": ("picture", _file(encoded("JPEG")), None),
}
"""Name -> file name, what makes it, and the one defect that is found in it (None: nothing)."""


def spoken(question: str = "<image>\nwhat?", answer: str = "this", role: Any = "human") -> list[dict[str, Any]]:
    return [{"from": role, "value": question}, {"from": "gpt", "value": answer}]


def _record(image: Any = "good.png", **values: Any) -> dict[str, Any]:
    return {"id": "planted", "image": image, "conversations": spoken(), **values}


RECORDS: dict[str, tuple[Any, Defect | None]] = {
    "no_image_token": (_record(conversations=spoken("what?")), Defect.mismatch),
    "token_in_the_answer": (_record(conversations=spoken("what?", "<image>")), Defect.mismatch),
    "two_tokens_one_image": (_record(conversations=spoken("<image><image>\nwhat?")), Defect.mismatch),
    "one_token_two_images": (_record(["good.png", "good.png"]), Defect.mismatch),
    "token_without_image": ({"id": "planted", "conversations": spoken()}, Defect.imageless),
    "unknown_role": (_record(conversations=spoken(role="robot")), Defect.malformed),
    "role_is_a_list": (_record(conversations=spoken(role=["human"])), Defect.malformed),
    "role_is_missing": (_record(conversations=[{"value": "<image>"}, {"from": "gpt", "value": "a"}]), Defect.malformed),
    "text_is_a_number": (_record(conversations=spoken(answer=3)), Defect.malformed),  # type: ignore[arg-type]
    "text_is_null": (_record(conversations=spoken(answer=None)), Defect.malformed),  # type: ignore[arg-type]
    "turns_are_text": (_record(conversations=["hello"]), Defect.malformed),
    "turns_are_one_text": (_record(conversations="hello"), Defect.malformed),
    "no_turns": (_record(conversations=[]), Defect.malformed),
    "no_conversation": ({"id": "planted", "image": "good.png"}, Defect.malformed),
    "not_an_object": ("hello", Defect.malformed),
    "a_list": ([1, 2], Defect.malformed),
    "null": (None, Defect.malformed),
    "lone_surrogate": (_record(conversations=spoken(answer="a \ud83d b")), Defect.malformed),
    "surrogate_in_the_id": (_record(id="\udc00"), Defect.malformed),
    "surrogate_in_the_path": (_record("\ud800.png"), Defect.malformed),
    "id_is_an_object": (_record(id={"a": 1}), Defect.malformed),
    "id_is_true": (_record(id=True), Defect.malformed),
    "image_is_a_number": (_record(3), Defect.malformed),
    "image_is_blank": (_record(" "), Defect.malformed),
    "image_with_nul": (_record("good\0.png"), Defect.malformed),
    "image_is_absolute": (_record("/etc/passwd"), Defect.malformed),
    "image_leaves_the_root": (_record("../secret.png"), Defect.malformed),
    "image_leaves_on_a_detour": (_record("a/../../secret.png"), Defect.malformed),
    "system_prompt_is_a_list": (_record(system_prompt=["be brief"]), Defect.malformed),
    "two_questions_in_a_row": (_record(conversations=[spoken()[0], *spoken("and?")]), Defect.refused),
    "two_answers_in_a_row": (_record(conversations=[*spoken(), spoken()[1]]), Defect.refused),
    "system_in_the_middle": (
        _record(conversations=[*spoken(), {"from": "system", "value": "be brief"}, *spoken("and?")]), Defect.refused,
    ),
    "nobody_asks": (_record(None, conversations=[{"from": "gpt", "value": "this"}]), Defect.refused),
    "nobody_answers": (_record(conversations=spoken()[:1]), Defect.no_targets),
    "100k_characters": (_record(conversations=spoken(answer="x" * 100_000)), Defect.too_long),
    "100k_characters_asked": (_record(conversations=spoken("<image>" + "y" * 100_000)), Defect.too_long),
    "nul": (_record(conversations=spoken(answer="a\0b")), Defect.control),
    "escape": (_record(conversations=spoken("<image>\n\x1b[31mred?")), Defect.control),
    "silent": (_record(conversations=spoken(answer="")), Defect.empty_answer),
    "blank": (_record(conversations=spoken(answer="  \n")), Defect.empty_answer),
    "int_id": (_record(id=7), None),
    "float_id": (_record(id=7.5), None),
    "null_id": (_record(id=None), None),
    "no_id": ({"image": "good.png", "conversations": spoken()}, None),
    "more_keys": (_record(source="web", score=0.5), None),
    "answer_first": (_record(conversations=[spoken()[1], *spoken()]), None),
    "emoji": (_record(conversations=spoken(answer="\U0001f600 \u202e \u0301")), None),
    "special_token_spelt_out": (_record(conversations=spoken(answer="</s> <s> <pad>")), None),
    "system_prompt": (_record(system_prompt="be brief"), None),
}  # fmt: skip
"""Name -> an entry of LLaVA's JSON over `good.png`, and the one defect that is found in it (None: nothing)."""
