"""Small JSON files that others may have written."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from peftkit.storage.errors import StorageError

_LIMIT = 100_000_000  # bytes; the indices of the largest models have a few million


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that `file` holds.

    Raises:
        StorageError: it cannot be read, is no JSON or no object, or is larger than any such file.
    """
    try:
        size = checked_file(file).st_size
        raw = file.read_bytes() if size <= _LIMIT else b""
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error}") from error
    if size > _LIMIT:
        raise StorageError(f"{file} has {size:,} bytes, which no such file has")
    try:
        found = parsed(raw)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is no JSON, it is truncated or damaged: {error}") from error
    if not isinstance(found, dict):
        raise StorageError(f"{file} holds a {type(found).__name__}, expected a JSON object")
    return found


def parsed(raw: bytes) -> Any:
    """The value of JSON text in UTF-8.

    Raises:
        ValueError: it is none, or has a string that is no text: half of a pair of surrogates, which nothing can print.
        RecursionError: it is nested too deep.
    """
    found = json.loads(raw.decode())
    if b"\\u" in raw:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def checked_file(file: Path) -> os.stat_result:
    """What is known of a file that is about to be opened.

    Raises:
        OSError: it is not there, or is a pipe, a device or the like, which opening could wait for or reading never ends.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is a directory" if stat.S_ISDIR(found.st_mode) else "it is no regular file")
    return found
