"""Parameter-efficient fine-tuning for PyTorch: adapters that attach to any model, in place, and come off again."""

from peftkit.api import (
    activate,
    active,
    adapters,
    describe,
    disabled,
    eject,
    inject,
    load,
    merge,
    param_groups,
    parameters,
    reset,
    save,
    unmerge,
    using,
)
from peftkit.method import Adapter, Config, NotMergeable
from peftkit.methods.lora import LoRAConfig
from peftkit.methods.prefix import PrefixTuningConfig
from peftkit.report import Report
from peftkit.storage import StorageError
from peftkit.targets import TargetError

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Config",
    "LoRAConfig",
    "NotMergeable",
    "PrefixTuningConfig",
    "Report",
    "StorageError",
    "TargetError",
    "activate",
    "active",
    "adapters",
    "describe",
    "disabled",
    "eject",
    "inject",
    "load",
    "merge",
    "param_groups",
    "parameters",
    "reset",
    "save",
    "unmerge",
    "using",
]
