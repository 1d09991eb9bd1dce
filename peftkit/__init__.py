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
    restore,
    save,
    unmerge,
    using,
)
from peftkit.checkpoints.approximation import Approximation
from peftkit.checkpoints.arithmetic import combine
from peftkit.checkpoints.differences import Difference, difference
from peftkit.checkpoints.extraction import extract
from peftkit.checkpoints.inspection import Inspection, inspect
from peftkit.checkpoints.merge import Merged, merge_checkpoint
from peftkit.checkpoints.verification import Verified, verify
from peftkit.costs.figures import Comparison, Cost
from peftkit.costs.verbs import compare, cost
from peftkit.distillation import TeacherLogits, context_distillation, teacher_logits
from peftkit.formats.convert import convert
from peftkit.method import Adapter, Config, NotMergeable
from peftkit.methods.bitfit import BitFitConfig
from peftkit.methods.dora import DoRAConfig
from peftkit.methods.ia3 import IA3Config
from peftkit.methods.loha import LoHaConfig
from peftkit.methods.lokr import LoKrConfig
from peftkit.methods.lora import LoRAConfig
from peftkit.methods.parallel import ParallelAdapterConfig
from peftkit.methods.prefix import PrefixTuningConfig
from peftkit.methods.prompt import PromptTuningConfig
from peftkit.methods.series import SeriesAdapterConfig
from peftkit.methods.vera import VeRAConfig
from peftkit.report import Report
from peftkit.schedules.half import HalfFineTuning
from peftkit.schedules.layerwise import layerwise_lr
from peftkit.schedules.lisa import LISA
from peftkit.schedules.unfreezing import GradualUnfreezing
from peftkit.schedules.weight_norms import MeanWeightNorms
from peftkit.storage import StorageError
from peftkit.targets import TargetError

__version__ = "0.1.0"

__all__ = [
    "LISA",
    "Adapter",
    "Approximation",
    "BitFitConfig",
    "Comparison",
    "Config",
    "Cost",
    "Difference",
    "DoRAConfig",
    "GradualUnfreezing",
    "HalfFineTuning",
    "IA3Config",
    "Inspection",
    "LoHaConfig",
    "LoKrConfig",
    "LoRAConfig",
    "MeanWeightNorms",
    "Merged",
    "NotMergeable",
    "ParallelAdapterConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Report",
    "SeriesAdapterConfig",
    "StorageError",
    "TargetError",
    "TeacherLogits",
    "VeRAConfig",
    "Verified",
    "activate",
    "active",
    "adapters",
    "combine",
    "compare",
    "context_distillation",
    "convert",
    "cost",
    "describe",
    "difference",
    "disabled",
    "eject",
    "extract",
    "inject",
    "inspect",
    "layerwise_lr",
    "load",
    "merge",
    "merge_checkpoint",
    "param_groups",
    "parameters",
    "reset",
    "restore",
    "save",
    "teacher_logits",
    "unmerge",
    "using",
    "verify",
]
