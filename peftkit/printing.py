"""What rich can show, as text."""

from __future__ import annotations

import io
from typing import Any


def printed(table: Any, width: int = 120) -> str:
    """`table` as rich prints it in `width` columns, without colours and without spaces at the ends of lines."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
