"""What llama.cpp says of the next token, as a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def next_tokens(
    base: Path, adapters: Sequence[Path | None], prompts: Sequence[Sequence[int]], vocabulary: int
) -> Tensor:
    """Log probabilities of every token to follow each prompt: `(adapters prompts vocabulary)`; None is the base alone.

    Raises:
        RuntimeError: llama.cpp refused a file; the message has what it said.
    """
    asked = {"base": str(base), "adapters": [a and str(a) for a in adapters], "prompts": prompts, "count": vocabulary}
    command = [sys.executable, str(Path(__file__).with_name("server.py"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed:\n{done.stderr[-3000:]}")
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))
