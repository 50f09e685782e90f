"""Reads text files of annotations with a line per image: `relative/path.jpg CLASS_NUMBER`.

OmniBenchmark's realms use this format (Zhang et al., 2022, arXiv 2207.07106). A path may occur in
several lines, as some paths in OmniBenchmark do.
"""

import array
import hashlib
import os

import numpy as np
from etils import epath

from mixer.data.sources import folder
from mixer.errors import UserError
from mixer.files import read_regular

LINE = "train/images/1.jpg 17"


def read_annotations(file: epath.PathLike, root: epath.PathLike) -> folder.LabelFile:
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
    lines, labels = array.array("i"), array.array("i")
    path_starts, hashes, paths = array.array("q", [0]), array.array("Q"), bytearray()
    for number, row in enumerate(content.splitlines(), 1):
        if not row.strip():
            continue
        path, label = _parse_line(file, number, row)
        paths += path
        path_starts.append(len(paths))
        labels.append(label)
        lines.append(number)
        hashes.append(int.from_bytes(hashlib.blake2b(path, digest_size=8).digest(), "big"))
    if not lines:
        raise UserError(f"{file} lists no image; expected lines such as {LINE}")
    listing = folder.LabelFile(
        file=file,
        root=root,
        class_names=None,
        several=False,
        paths=bytes(paths),
        path_starts=np.array(path_starts),
        label_starts=np.arange(len(lines) + 1),
        labels=np.array(labels),
        weights=np.ones(len(lines), np.float32),
        lines=np.array(lines),
        path_hashes=np.array(hashes),
        splits={"images": np.arange(len(lines))},
    )
    _check_images(listing)
    return listing


def _parse_line(file: epath.Path, number: int, row: bytes) -> tuple[bytes, int]:
    """Returns the path and the class number of a line."""
    parts = row.rsplit(maxsplit=1)
    path, label = parts if len(parts) == 2 else (b"", b"")
    path = path.strip()
    if not path or path.startswith(b"/") or b"\0" in path or not label.isdigit():
        raise UserError(
            f"{file}, line {number}: {folder.displayed(folder.decode(row))!r}; expected a relative "
            f"path and a class number, as in {LINE}"
        )
    if len(label) > 9 or int(label) >= folder.MOST_CLASSES:
        raise UserError(
            f"{file}, line {number}: class {label.decode()[:20]}; expected a number below "
            f"{folder.MOST_CLASSES:,}"
        )
    return path, int(label)


def _check_images(listing: folder.LabelFile) -> None:
    """Raises UserError for the first image that is missing or not a regular file."""
    images = folder.LabelledPaths(listing, np.arange(len(listing.lines)))
    sizes = folder.file_sizes(listing.root, images)
    if sizes is None:
        return  # an object store needs a request per file; reading an image reports a missing one
    for image in np.flatnonzero(sizes < 0)[:1].tolist():
        path = os.path.join(os.fsencode(listing.root), images[image])
        raise UserError(
            f"{listing.file}, line {listing.lines[image]}: "
            f"{folder.displayed(folder.decode(path))} cannot be read: {folder.fault_of(path)}"
        )
