"""From an image reference to an open image, inside its root or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from anchorformer.errors import UserError
from anchorformer.images import image_size, open_image
from data.record import ImageRef


def locate(ref: ImageRef) -> Path | bytes:
    """Where the image's bytes are; those of a stored image are fetched here.

    Raises:
        UserError: symbolic links followed, the file lies outside the folders it may lie in, or a stored image cannot be
            fetched. This is never skipped as a bad image is: a file of annotations must not choose what else on the
            machine is read, and a network that fails says nothing of an image.
    """
    if ref.stored is not None:
        return ref.stored.read()
    if ref.data is not None:
        return ref.data
    if ref.path is None:
        raise ValueError("an ImageRef holds neither a path nor data")
    path = Path(os.path.realpath(ref.path))  # Path.resolve() may raise where links go in a circle
    if ref.roots and not any(path.is_relative_to(root) for root in ref.roots):
        raise UserError(
            f"{ref.path}: the image lies outside its root",
            found=path,
            expected="a file inside " + " or ".join(map(str, ref.roots)),
            remedy="correct the path, or name the folder a link leads to in the source's linked_roots",
        )
    return path


def load(ref: ImageRef) -> Image.Image:
    """The decoded image.

    Raises:
        UserError: what `locate` raises; or the file is missing, unreadable, damaged or too large.
    """
    return open_image(locate(ref), name=None if ref.path is None else str(ref.path))


def size(ref: ImageRef) -> tuple[int, int] | None:
    """(width, height) from the image's header; None where `load` would refuse it.

    Raises:
        OSError: the file could not be read for a reason that is none of its own.
    """
    if ref.stored is not None:
        return ref.stored.size
    try:
        place = locate(ref)
    except UserError:  # training refuses it, whatever the rules, when its turn comes
        return None
    return image_size(place)
