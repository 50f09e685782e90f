"""Reads text files of annotations with a line per image: `relative/path.jpg CLASS_NUMBER`.

OmniBenchmark's realms use this format (Zhang et al., 2022, arXiv 2207.07106). A path may occur in
several lines, as some paths in OmniBenchmark do.
"""

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from mixer.data.sources import folder
from mixer.data.sources.label_file import (
    MAX_CLASSES,
    LabelFile,
    LabelledImage,
    LabelledPaths,
    collect,
)
from mixer.errors import UserError, printable
from mixer.files import read_regular

LINE = "train/images/1.jpg 17"


def read_annotations(file: epath.PathLike, root: epath.PathLike) -> LabelFile:
    """Reads an annotation file; all its images form one split, "images".

    Args:
      file: the annotation file.
      root: the folder that the paths are relative to.

    Raises:
      UserError: the file is missing or lists no image, a line is invalid, or an image is missing;
        the message for the last two has the line number.
    """
    file, root = epath.Path(file), epath.Path(root)
    content = read_regular(file)
    if content is None:
        raise UserError(f"{file} is missing; expected lines such as {LINE}")
    listing = collect(file, root, _parse(file, content))
    if not len(listing.lines):
        raise UserError(f"{file} lists no images; expected lines such as {LINE}")
    listing = dataclasses.replace(listing, splits={"images": np.arange(len(listing.lines))})
    _check_images(listing)
    return listing


def _parse(file: epath.Path, content: bytes) -> Iterator[LabelledImage]:
    """Yields the images of all lines."""
    for number, row in enumerate(content.splitlines(), 1):
        if not row.strip():
            continue
        parts = row.rsplit(maxsplit=1)
        path, label = parts if len(parts) == 2 else (b"", b"")
        path = path.strip()
        if not path or path.startswith(b"/") or b"\0" in path or not label.isdigit():
            raise UserError(
                f"{file}, line {number}: {printable(folder.decode(row))!r}; expected a "
                f"relative path and a class number, as in {LINE}"
            )
        if len(label) > 9 or int(label) >= MAX_CLASSES:
            raise UserError(
                f"{file}, line {number}: class {label.decode()[:20]}; expected a number below "
                f"{MAX_CLASSES:,}"
            )
        yield LabelledImage(number, path, [int(label)], None, "images")


def _check_images(listing: LabelFile) -> None:
    """Raises UserError for the first image that is missing or not a regular file."""
    images = LabelledPaths(listing, np.arange(len(listing.lines)))
    sizes = folder.file_sizes(listing.root, images)
    if sizes is None:
        return  # an object store needs a request per file; reading an image reports a missing one
    for image in np.flatnonzero(sizes < 0)[:1].tolist():
        path = os.path.join(os.fsencode(listing.root), images[image])
        raise UserError(
            f"{listing.file}, line {listing.lines[image]}: "
            f"{printable(folder.decode(path))} cannot be read: {folder.fault_of(path)}"
        )
