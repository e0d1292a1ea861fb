"""Images to train or select on that are reported on too: told by the hash of their bytes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tract_transfer.build_data import Data
from tract_transfer.data.images import content_hashes, estimated_bytes
from tract_transfer.data.streaming import Stream

logger = logging.getLogger(__name__)
MAX_COMPARED, MAX_BYTES = 100_000, 2**31  # of all splits together: above, it takes too long
_NAMED = 10


def find_leaks(
    data: Data, hashes: Mapping[str, Sequence[str]], rows: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Return, for train and val, how many of its images are reported on too, and the first ones.

    They stay; a warning is logged.

    Args:
        hashes: split -> the hash of each image's stored bytes.
        rows: split -> the images that count.
    """
    reported, tested = data.report
    first_with: dict[str, int] = {}
    for row in rows[reported]:
        first_with.setdefault(hashes[reported][row], row)
    found: dict[str, dict[str, Any]] = {}
    for name, split in data.splits.items():
        if name == reported:
            continue
        own = [row for row in rows[name] if hashes[name][row] in first_with]
        pairs = [
            [split.item(row), tested.item(first_with[hashes[name][row]])] for row in own[:_NAMED]
        ]
        found[name] = {f"images_in_{reported}": len(own), "first": pairs}
        if own:
            logger.warning(
                "%d of the %d images of %s are in %s too, the first: %s is %s. They stay; the "
                "result is that much too good.",
                len(own), len(rows[name]), name, reported, *pairs[0],
            )  # fmt: skip
    return found


def find_training_leaks(data: Data) -> dict[str, dict[str, Any]] | None:
    """Return `find_leaks` of all images; None where they are streamed or too many to read first."""
    splits = {name: each for name, each in data.splits.items() if not isinstance(each, Stream)}
    if len(splits) < len(data.splits) or _takes_long(splits):
        logger.info(
            "Not looked for: images of train in %s. tools/check_data.py does.", data.report[0]
        )
        return None
    hashes = {name: content_hashes(split.encoded, len(split)) for name, split in splits.items()}
    return find_leaks(data, hashes, {name: range(len(each)) for name, each in hashes.items()})


def _takes_long(splits: Mapping[str, Any]) -> bool:
    """Whether reading all images would hold up the start of a training: every one does it."""
    if sum(len(split) for split in splits.values()) > MAX_COMPARED:
        return True
    sizes = [estimated_bytes(split.encoded, len(split)) for split in splits.values()]
    return sum(sizes) > MAX_BYTES
