"""What is trained: a config and a learning rate for each method, the same for both models unless it says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.demo.tasks import MiniLM, SmolLM2
from peftkit import (
    BitFitConfig,
    Config,
    DoRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoRAConfig,
    ParallelAdapterConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeriesAdapterConfig,
    VeRAConfig,
)


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    config: Config
    lr: float
    models: tuple[str, ...] = ("minilm", "smollm2")
    decoder_lr: float | None = None
    opening: str = ""  # what a decoder's prefix starts from; drawn at random, it drowns what the model knows

    def rate(self, model: str) -> float:
        """The learning rate for a model."""
        return self.decoder_lr if model == "smollm2" and self.decoder_lr is not None else self.lr


OPENING = "Does the writer of this film review like the film? Say whether it is negative or positive, and nothing else."

# Learning rates are the customary ones of each method, and none was searched for. Two were lowered once, after a run that
# ended below the frozen base: BitFit's from 5e-3, and the series adapter's on the decoder from 2e-3.
METHODS = {
    "lora": Method(LoRAConfig(r=8, alpha=16, targets="all-linear"), 2e-3),
    "dora": Method(DoRAConfig(r=8, alpha=16, targets="all-linear"), 2e-3),
    "series": Method(SeriesAdapterConfig(bottleneck=64, targets=("attention", "mlp")), 2e-3, decoder_lr=1e-3),
    "parallel": Method(ParallelAdapterConfig(bottleneck=64, scale=4.0, targets="mlp"), 2e-3),
    "prefix": Method(PrefixTuningConfig(length=16), 1e-2, opening=OPENING),
    "prompt": Method(PromptTuningConfig(length=16), 3e-2),
    "ia3": Method(IA3Config(), 1e-2),
    "vera": Method(VeRAConfig(r=128, targets="all-linear"), 1e-2),
    "bitfit": Method(BitFitConfig(), 1e-3, ("minilm",)),  # the decoder has no biases
    "loha": Method(LoHaConfig(r=8, alpha=16, targets="all-linear"), 2e-3),
    "lokr": Method(LoKrConfig(r=8, alpha=16, targets="all-linear"), 2e-3),
}

SEEDS = (0, 1, 2)
HEAD_LR = 2e-3
RECIPES = {
    "minilm": replace(MiniLM.recipe, steps=48),
    "smollm2": replace(SmolLM2.recipe, train=320, held_out=300, steps=40),
}


def config_for(method: str, also_train: Sequence[str]) -> Config:
    """The method's config, with the head that the task lacks."""
    return replace(METHODS[method].config, also_train=tuple(also_train))
