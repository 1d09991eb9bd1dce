"""Damage that keeps what lies around it valid, so that it gets past the first check.

All choices come from one function, `draw(n)`, which gives a number below `n`: hypothesis and a coverage-guided fuzzer can
each be that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.fuzz.seeds import Files
from peftkit.storage.tensorfile import DIGEST

T = TypeVar("T")
Draw = Callable[[int], int]


@dataclass(frozen=True)
class Special:
    """What is no file: `"link"`, `"fifo"`, `"socket"` or `"folder"`."""

    kind: str
    target: str = ""


SPECIALS = (
    Special("fifo"), Special("socket"), Special("folder"), Special("link", "/dev/zero"), Special("link", "nowhere"),
    Special("link", "."), Special("link", "../secret/secret.json"), Special("link", "../secret"), Special("link", "itself"),
)  # fmt: skip
NESTED: Any = 0
for _ in range(200):
    NESTED = [NESTED]
NUMBERS = (
    0, 1, -1, 2, 3, 7, 10**6, 10**9, 10**12, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), True, False,
)  # fmt: skip
TEXTS = (
    "", "x", ".", "..", "../x", "/etc/passwd", "a/b", "\0", "\ud800", "\u202e", "é", "[", "(", "*", "^", "^0", "2", "nn",
    "float32", "cuda", "all-linear", "__class__", "__init__", "training", "forward", "modules", "_modules", "peftkit",
    "../x.safetensors", "/x.safetensors", "x\0.safetensors", "w" * 300 + ".safetensors", ".safetensors",
    "weight", "lora_A.weight", "base_model.model.", "." * 3000, "a." * 3000 + "weight", "w" * 5000, "1" * 5000,
)  # fmt: skip
VALUES = (
    *NUMBERS, *TEXTS, None, [], {}, [[]], {"": {}}, [None], [0], [-1], ["0", "0"], ["0", 1], [10**12] * 3, {"0": 10**12},
    {"0": None}, {"0": "x"}, {"items": []}, {"items": [[1]]}, {"items": [[["x"], 1]]}, {"items": [["0", 10**9]]},
    {"dtype": "float32"}, {"dtype": "nn"}, {"dtype": 3}, {"regex": "(", "flags": 0}, {"regex": "x", "flags": 10**12}, NESTED,
)  # fmt: skip


def pick(draw: Draw, options: Sequence[T]) -> T:
    """One of `options`."""
    return options[draw(len(options))]


def mutated(files: Files, draw: Draw) -> Files:
    """`files` with one to three damages."""
    files = dict(files)
    for _ in range(1 + draw(3)):
        name = pick(draw, sorted(files))
        raw = files[name]
        if not isinstance(raw, bytes):
            continue
        kinds = [_bytes, _special]
        if name.endswith(".json"):
            kinds += [_json] * 4
        if name.endswith(".safetensors"):
            kinds += [_header] * 5
        if "adapter_config.json" in files and name == "adapter_model.safetensors":
            kinds += [_both] * 4
        pick(draw, kinds)(files, name, draw)
    return files


def _special(files: Files, name: str, draw: Draw) -> None:
    files[name] = pick(draw, SPECIALS)


def _bytes(files: Files, name: str, draw: Draw) -> None:
    raw = bytearray(files[name])
    at = draw(len(raw) + 1)
    kind = draw(7)
    if kind == 0:
        del raw[at:]
    elif kind == 1 and at < len(raw):
        raw[at] ^= 1 << draw(8)
    elif kind == 2:
        raw[at:at] = bytes(draw(256) for _ in range(draw(9)))
    elif kind == 3:
        raw += raw[at:]
    elif kind == 4:
        raw[:8] = pick(draw, NUMBERS[:14]).to_bytes(16, "little", signed=True)[:8]  # type: ignore[union-attr]
    elif kind == 5:
        raw[:] = pick(draw, (b"", b"[" * 100_000, b"{}", b"null", b"\xff\xfe", b'{"a":' * 50_000, b"9" * 5000))
    else:
        raw[at : at + 8] = b"\xff" * 8
    files[name] = bytes(raw)


def _json(files: Files, name: str, draw: Draw) -> None:
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    files[name] = json.dumps(changed(found, draw)).encode()


def changed(tree: Any, draw: Draw) -> Any:
    """A JSON value with one place in it replaced, removed, renamed or doubled."""
    if not isinstance(tree, dict | list) or not tree or not draw(8):
        return pick(draw, VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = pick(draw, keys)
    made: Any = tree.copy()
    kind = draw(8)
    if kind == 0:
        del made[key]
    elif kind == 1 and isinstance(made, dict):
        made[pick(draw, TEXTS)] = made.pop(key)
    elif kind == 2:
        made[key] = tree[pick(draw, keys)]
    elif kind == 3:
        made[key] = pick(draw, VALUES)
    elif kind == 4 and isinstance(tree[key], int | float):
        made[key] = tree[key] + pick(draw, (1, -1, 8, -8, 0.5))
    elif kind == 5 and isinstance(tree[key], list):
        made[key] = [*tree[key], pick(draw, VALUES)]
    else:
        made[key] = changed(tree[key], draw)
    return made


def parts(raw: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Header and data of a safetensors file; None where it has none any more."""
    length = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError):
        return None
    return (header, raw[8 + length :]) if isinstance(header, dict) else None


def joined(header: Any, data: bytes, *, seal: bool = True) -> bytes:
    """The inverse, with the checksum made right where there is one."""
    raw = json.dumps(header).encode()
    said = header.get("__metadata__") if isinstance(header, dict) else None
    if seal and isinstance(said, dict) and DIGEST in said:
        raw = json.dumps({**header, "__metadata__": {**said, DIGEST: "0" * 32}}).encode()
        digest = hashlib.blake2b(raw + data, digest_size=16).hexdigest()
        raw = raw.replace(b"0" * 32, digest.encode(), 1)
    return len(raw).to_bytes(8, "little") + raw + data


def _header(files: Files, name: str, draw: Draw) -> None:
    found = parts(files[name])
    if found is None:
        return
    header, data = found
    kind = draw(6)
    tensors = [k for k in header if k != "__metadata__" and isinstance(header[k], dict)]
    if kind == 0 or not tensors:
        header = changed(header, draw)
    elif kind == 1:  # a tensor under another name, in its place
        key, new = pick(draw, tensors), _name(draw, tensors)
        header = {new if k == key else k: v for k, v in header.items()}
    elif kind == 2:  # another shape of as many numbers, or of none
        entry = dict(header[pick(draw, tensors)])
        shape = entry.get("shape")
        if isinstance(shape, list) and all(isinstance(n, int) for n in shape):
            header[next(k for k in tensors if header[k].get("shape") == shape)] = {
                **entry,
                "shape": _shape(shape, draw),
            }
    elif kind == 3:  # a tensor of no bytes, of whatever shape
        shape = [0, *(pick(draw, NUMBERS[:18]) for _ in range(draw(4)))]
        header[_name(draw, tensors)] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
    elif kind == 4:  # one that is not finite, or other bytes
        at = draw(max(1, len(data) // 4)) * 4
        data = (
            data[:at] + pick(draw, (b"\0\0\x80\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\x7f")) + data[at + 4 :]
        )
    else:
        key = pick(draw, tensors)
        header[key] = changed(header[key], draw)
    files[name] = joined(header, data, seal=draw(8) > 0)


def _name(draw: Draw, tensors: list[str]) -> str:
    key = pick(draw, tensors)
    head, _, last = key.rpartition(".")
    return pick(
        draw,
        (f"{head}.{pick(draw, TEXTS)}", f"{pick(draw, TEXTS)}.{last}", f"base_model.model.{pick(draw, TEXTS)}.{last}",
         key.replace(".", "..", 1), key + ".weight", pick(draw, TEXTS)),
    )  # fmt: skip


def _shape(shape: list[int], draw: Draw) -> list[int]:
    count = 1
    for n in shape:
        count *= n
    options = [
        [count],
        [1, count],
        [count, 1],
        shape[::-1],
        [*shape, 1],
        [1, *shape],
        [1] * 70 + shape,
        [1] * 9 + shape,
    ]
    return pick(draw, options)


def _both(files: Files, name: str, draw: Draw) -> None:
    """The config, and the copies of it that peftkit keeps beside the tensors, changed alike."""
    found = parts(files[name])
    config = files["adapter_config.json"]
    if found is None or not isinstance(config, bytes):
        return
    header, data = found
    try:
        peft, own = json.loads(config), json.loads(header["__metadata__"]["peftkit"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if not isinstance(own, dict):
        return
    if draw(3):
        peft = changed(peft, draw)
        own["peft"] = peft if draw(4) else own.get("peft")
        files["adapter_config.json"] = json.dumps(peft).encode()
    else:
        own = changed(own, draw)
    header["__metadata__"]["peftkit"] = json.dumps(own)
    files[name] = joined(header, data)
