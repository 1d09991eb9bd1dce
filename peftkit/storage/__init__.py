"""The directory that adapters are kept in: `adapter_config.json` and `adapter_model.safetensors`, as peft has them."""

from peftkit.storage.allowance import bounded
from peftkit.storage.errors import StorageError
from peftkit.storage.matching import fill, match, refuse_base
from peftkit.storage.reader import Stored, read
from peftkit.storage.restoring import check_identity, identity, take_over
from peftkit.storage.writer import Origin, save, stored_bytes

__all__ = [
    "Origin",
    "StorageError",
    "Stored",
    "bounded",
    "check_identity",
    "fill",
    "identity",
    "match",
    "read",
    "refuse_base",
    "save",
    "stored_bytes",
    "take_over",
]
