"""The one table of what can be wrong with a record or an image, and what training makes of it."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What training does where it meets a defect; only the last one leaves the record usable as it is."""

    refused = "refused, whatever the rules"
    image_rule = "data.on_bad_image: error, or left out of its step and counted"
    record_rule = "data.on_bad_record: error, or left out of the mixture and counted"
    length_rule = "data.overlength: error, left out and counted, or its answer is shortened"
    left_out = "left out of the mixture and counted"
    doubtful = "used, `<image>` as text; counted as bad, because a lost image looks the same"
    used = "used as it stands, and reported"


class Defect(str, Enum):
    """Kinds of findings, each with the words of its report, its verdict, and what it covers."""

    verdict: Verdict
    covers: str

    def __new__(cls, words: str, verdict: Verdict, covers: str) -> Defect:
        self = str.__new__(cls, words)
        self._value_, self.verdict, self.covers = words, verdict, covers
        return self

    # A file of annotations must not choose what else on the machine is read, so no rule lets this one pass.
    outside = "image outside its root", Verdict.refused, "a symbolic link that leads out of the image folder"
    missing = "image missing", Verdict.image_rule, "no file of that name"
    unreadable = (
        "image unreadable", Verdict.image_rule,
        "no bytes, broken off, a git-LFS pointer, a folder, a pipe, links in a circle, another format than "
        "JPEG, PNG, WebP, GIF, BMP, TIFF and PPM",
    )  # fmt: skip
    oversized = "image oversized", Verdict.image_rule, "a side above 11,585 pixels: 20k x 20k, a bomb, a long strip"
    malformed = (
        "record not understood", Verdict.record_rule,
        "an unknown role, a value of another type, half of a surrogate pair, an image path that is absolute or has "
        "`..` in it",
    )  # fmt: skip
    mismatch = "<image> count mismatch", Verdict.record_rule, "an image without `<image>`, two `<image>` and one image"
    refused = "refused by the processor", Verdict.record_rule, "turns that do not alternate, no user's turn"
    too_long = "too long", Verdict.length_rule, "more positions than data.max_length (a text of 100,000 characters)"
    imageless = "<image> without an image", Verdict.doubtful, "`<image>` in the question of a record without images"
    no_targets = "nothing supervised", Verdict.left_out, "a question without an answer"

    shortened = "answer shortened", Verdict.used, "too long, and fits without the end of its answer"
    mislabelled = "suffix and format differ", Verdict.used, "a GIF named .jpg: its bytes say what it is"
    duplicate_id = "duplicate id", Verdict.used, "an id a second time: it becomes `id~2`"
    duplicate_image = "duplicate image", Verdict.used, "the bytes of another file"
    empty_answer = "empty answer", Verdict.used, "only its stop is supervised"
    control = "control character", Verdict.used, "NUL and its like in a text: encoded like any other character"
    # Pillow's Image.open does not turn, and neither does the published code: the model was trained on images as stored.
    rotated = "EXIF rotation (not applied)", Verdict.used, "an orientation other than upright: seen as it is stored"
    animated = "several frames (first is used)", Verdict.used, "an animation"
    # Pillow's convert("RGB"), as the published code: 16-bit greys above 255 become white, CMYK is 255 minus ink.
    mode = "unusual pixel format", Verdict.used, 'CMYK, 16-bit and the like: as Pillow\'s `convert("RGB")` has them'
    tiny = "tiny image", Verdict.used, "a side below 8 pixels (1 x 1)"

    @property
    def is_bad(self) -> bool:
        """Whether training would refuse the record, leave it out or shorten it."""
        return self.verdict is not Verdict.used
