"""Film reviews rated by people, and how they are cut into training texts, held-out texts and batches.

The snippets come with VADER (Hutto and Gilbert, ICWSM 2014; MIT licence), inside the source
distribution of the PyPI package `vaderSentiment`. Each carries the mean of at least twenty ratings
between -4 and 4.
"""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

BAD, GOOD = 0, 1


@dataclass(frozen=True)
class Review:
    """One snippet."""

    text: str
    label: int
    """`GOOD` or `BAD`."""


def read_reviews(sdist: Path, *, margin: float = 0.5) -> list[Review]:
    """Every snippet that people agree on: a mean rating of at least `margin` either way, each text once.

    Raises `FileNotFoundError` without the file, and `ValueError` where it is not the one expected.
    """
    if not sdist.exists():
        raise FileNotFoundError(f"{sdist} is missing: `make {sdist}` fetches it")
    content = sdist.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{sdist} is damaged or another release: delete it and run `make {sdist}`")
    return parse_ratings(_member(_member(content, ARCHIVE), RATINGS).decode("utf-8"), margin=margin)


def parse_ratings(table: str, *, margin: float) -> list[Review]:
    """Read lines of `id <tab> mean rating <tab> text`."""
    reviews: dict[str, Review] = {}
    for line in table.splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= margin:
            reviews.setdefault(text, Review(text, GOOD if float(rating) > 0 else BAD))
    return list(reviews.values())


def split(reviews: Sequence[Review], *sizes: int, seed: int = 0, skip: int = 0) -> tuple[list[Review], ...]:
    """Disjoint random parts of the given sizes, each half good and half bad.

    `skip` leaves out that many first, which gives another draw that shares no text with the usual one.
    """
    pools = [[review for review in reviews if review.label == label] for label in (BAD, GOOD)]
    shuffle = random.Random(seed).shuffle
    for pool in pools:
        shuffle(pool)
    if (needed := skip + sum(sizes)) > 2 * (smallest := min(map(len, pools))):
        raise ValueError(f"{needed} balanced reviews asked for, {2 * smallest} are there")
    if odd := [size for size in (skip, *sizes) if size % 2]:
        raise ValueError(f"half good and half bad needs even sizes, got {odd}")

    parts, start = [], skip // 2
    for size in sizes:
        part = [review for pool in pools for review in pool[start : start + size // 2]]
        shuffle(part)
        parts.append(part)
        start += size // 2
    return tuple(parts)


def length_sorted(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of indices in order of length, so that hardly any padding is computed."""
    return list(_chunks(sorted(range(len(lengths)), key=lengths.__getitem__), size))


def length_bucketed(lengths: Sequence[int], size: int, rng: random.Random, *, window: int = 16) -> list[list[int]]:
    """One epoch of random batches whose texts are of like length.

    Texts are shuffled, sorted within windows of `window` batches, and the batches shuffled again: the
    gradient stays close to that of plain shuffling, at a third less arithmetic.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = [
        batch
        for bucket in _chunks(order, window * size)
        for batch in _chunks(sorted(bucket, key=lengths.__getitem__), size)
    ]
    rng.shuffle(batches)
    return batches


def _chunks(items: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _member(archive: bytes, name: str) -> bytes:
    """One file of a compressed tar, read in memory: nothing is unpacked onto the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        if file is None:
            raise ValueError(f"{name} is not a file")
        return file.read()
