"""Bad and unusual image files, one row for each that `tests.spoilt` can make."""

from __future__ import annotations

from functools import partial

from data.examine import examine_image
from data.images import load
from data.record import ImageRef
from data.verdicts import Verdict
from tests.bad_inputs.case import Case, World
from tests.spoilt import IMAGES


def judge(world: World, name: str) -> None:
    """Plants an image: the doctor finds exactly what is declared, and a bad one cannot be opened.

    Raises:
        UserError: the image's, where it is bad.
    """
    file, plant, defect = IMAGES[name]
    root = world.folder / "images"
    root.mkdir()
    plant(root / file)
    ref = ImageRef(path=root / file, roots=(root,))
    found, _ = examine_image(ref)
    assert [finding.defect for finding in found] == [defect] * (defect is not None)
    world.processor.image_transform(load(ref))


CASES = [
    Case(f"image_{name}", partial(judge, name=name),
         (file,) if defect is not None and defect.verdict is not Verdict.used else ())
    for name, (file, _, defect) in IMAGES.items()
]  # fmt: skip
