"""Small JSON files that others may have written."""

from __future__ import annotations

import json
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
        if (size := file.stat().st_size) > _LIMIT:
            raise StorageError(f"{file} has {size:,} bytes, which no such file has")
        found = json.loads(file.read_text("utf-8"))
    except StorageError:
        raise
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{file} is no JSON, it is truncated or damaged: {error}") from error
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise StorageError(f"{file} holds a {type(found).__name__}, expected a JSON object")
    return found
