"""Prompt tuning: trained rows before the embeddings of the tokens (Lester et al., arXiv 2104.08691).

`[P; E(x)]`, with `P: length dim` all that is trained. The rows stand in the space of what the embedding returns, so where
a model scales inside its embedding they are drawn from scaled rows, and where it scales afterwards they are scaled with
the tokens; peft's are alike. The adapter hangs on the body that turns ids into hidden states: it puts the rows before the
tokens and takes their positions off what comes out, so logits, labels and losses are those of the caller's tokens. Of an
encoder-decoder the encoder has the rows, as in the paper, and their positions stay for the decoder to attend to.

Initial values (section 3.2 and figure 3b): rows of the embedding, drawn at random or those of given tokens, such as
the words for the labels, are far better than noise for small models, and no better for the largest. The paper draws them
from the 5,000 most common tokens; which those are no model says, so here all are drawn from.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from peftkit.bodies import Body, bodies_of, decoder_beside, why_no_body
from peftkit.dtypes import check_dtype, own_dtype
from peftkit.graft import underneath
from peftkit.holder import graft_of
from peftkit.hosts import host_of
from peftkit.method import Adapter, Config
from peftkit.peft_tasks import task_of
from peftkit.prepending import attend_to, call_with
from peftkit.sites import Site, walk
from peftkit.targets import TargetError

INITS = ("vocab", "uniform", "normal")
_KEY = "prompt_embeddings"


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(Config, method="prompt", peft_type="PROMPT_TUNING"):
    """Prompt tuning (arXiv 2104.08691).

    Args:
        length: how many rows. The paper finds little to gain beyond 20, its default is 100.
        tokens: token ids whose embeddings the first rows start from, at most `length` of them.
        init: what the others start from: `"vocab"`, random rows of the embedding; `"uniform"` in ±0.5, the paper's
            noise; `"normal"` with variance 1, peft's.
        dtype: of the rows; None is fp32 over a half-precision base and the base's own dtype otherwise. They are computed
            with in the dtype of the embeddings.

    Several prompts that act together stand in a row, the one attached last first.

    Raises:
        ValueError: a length below 1, more tokens than rows, a token that is no id, an unknown init.
    """

    length: int = 20
    tokens: Sequence[int] = ()
    init: str = "vocab"
    dtype: torch.dtype | None = None

    mergeable: ClassVar[bool] = False
    default_targets: ClassVar[Sequence[str]] = ("the body",)
    key_prefix: ClassVar[str] = "base_model."
    whole_keys: ClassVar[Sequence[str]] = (_KEY,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokens", tuple(int(t) for t in self.tokens))
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length: an integer of at least 1, not {self.length!r}")
        if len(self.tokens) > self.length:
            raise ValueError(f"tokens: at most length={self.length} of them, not {len(self.tokens)}; raise length")
        if min(self.tokens, default=0) < 0:
            raise ValueError(f"tokens: ids of at least 0, not {min(self.tokens)}")
        if self.init not in INITS:
            raise ValueError(f"init: one of {', '.join(map(repr, INITS))}, not {self.init!r}")
        check_dtype(self.dtype)

    @property
    def identity(self) -> Literal["none"]:
        return "none"

    # -- where ------------------------------------------------------------------------------------------------------

    def refuses(self, site: Site) -> str | None:
        return why_no_body(site.module) if site.part is None else "it is no module of its own"

    def presets(self, model: nn.Module, sites: Sequence[Site]) -> Callable[[str, Site], bool]:
        """The default is the one body that owns the model's input embedding, and of a pair both stacks."""
        bodies = {id(s) for s in bodies_of(model, sites)}
        return lambda preset, site: preset in self.default_targets and id(site) in bodies

    def prepare(self, sites: Sequence[Site]) -> tuple[Site, Site | None]:
        """The site that has the rows, and that of the decoder beside it.

        Raises:
            TargetError: several bodies that are not the two stacks of one encoder-decoder.
        """
        for site in sites:
            decoder = decoder_beside(site, sites)
            if len(sites) == (1 if decoder is None else 2):
                return site, decoder
        raise TargetError(
            f"a prompt belongs before the tokens of one module, but {' and '.join(repr(s.name) for s in sites)} are "
            f"meant; choose with targets={sites[0].name!r}"
        )

    def build(self, site: Site, plan: tuple[Site, Site | None]) -> Adapter:
        first, decoder = plan
        if site is decoder:
            return DecoderAdapter(site.module, self)
        return PromptAdapter(site.module, self, keep=decoder is not None and site is first)

    def check(self, site: Site, plan: tuple[Site, Site | None]) -> None:
        """Refuse prompts that leave no position for a token, and tokens that the embedding does not have."""
        body = Body(site.module)
        limit, vocabulary = body.limit, body.embedding.num_embeddings
        if limit is not None and self.length >= limit:
            raise ValueError(
                f"length={self.length} leaves no token a place: {site.name!r} has learned {limit} positions"
            )
        if max(self.tokens, default=0) >= vocabulary:
            raise ValueError(f"tokens: {max(self.tokens)} lies beyond the {vocabulary} rows of the embedding")

    def setup(self, model: nn.Module) -> None:
        """Refuse one stack of an encoder-decoder alone, whose other would not know of the prompt."""
        bodies = bodies_of(model, walk(model))
        for site in bodies:
            decoder = decoder_beside(site, bodies)
            if decoder is not None and self._is_on(site) != self._is_on(decoder):
                raise TargetError(
                    f"{site.name!r} is to have the prompt and {decoder.name!r} to attend to it, so none can be adapted "
                    "without the other; leave targets out"
                )

    def _is_on(self, site: Site) -> bool:
        graft = graft_of(site.module)
        return graft is not None and any(getattr(a, "config", None) is self for a in graft.children())

    @classmethod
    def examples(cls) -> Sequence[PromptTuningConfig]:
        return cls(length=3), cls(length=2, tokens=[4], init="normal")

    # -- the file ---------------------------------------------------------------------------------------------------

    def whole_tensors(self, adapters: Mapping[str, Any]) -> dict[str, Tensor]:
        return {_KEY: _with_rows(adapters).prompt.detach()}

    def load_whole(self, found: Mapping[str, Tensor], adapters: Mapping[str, Any]) -> None:
        """Take the rows over. peft keeps twice as many for an encoder-decoder, and computes with the first half."""
        adapter = _with_rows(adapters)
        if _KEY not in found:
            raise ValueError(f"missing {_KEY}")
        rows, expected = found[_KEY], tuple(adapter.prompt.shape)
        if adapter.keep and rows.shape == (2 * expected[0], expected[1]):
            rows = rows[: self.length].clone()
        if tuple(rows.shape) != expected or not rows.is_floating_point():
            raise ValueError(f"{_KEY} is {rows.dtype} of shape {tuple(rows.shape)}, expected floats of {expected}")
        adapter.take("prompt", rows)

    def peft_task(self, model: nn.Module, whole: Sequence[str]) -> str | None:
        return task_of(model, whole)

    def to_peft(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        return {
            "num_attention_heads": None,
            "num_layers": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.length,
            "prompt_tuning_init": "RANDOM",
            "token_dim": _with_rows(adapters).prompt.shape[1],
        }

    @classmethod
    def from_peft(cls, stored: Mapping[str, Any], shapes: Mapping[str, Any]) -> PromptTuningConfig:
        return cls(length=int(stored["num_virtual_tokens"]))

    @classmethod
    def tensor_endings(cls) -> Sequence[str]:
        return ()


class PromptAdapter(Adapter):
    """The rows, `prompt: length dim`.

    Attributes:
        keep: their positions stay in the output.
        mark: what a cache that holds the rows is known by.
    """

    gathers = 1
    body: Body
    prompt: nn.Parameter

    def __init__(self, body: nn.Module, config: PromptTuningConfig, *, keep: bool):
        super().__init__()
        self.body, self.config, self.keep = Body(body), config, keep
        self.mark = uuid.uuid4().hex
        embedding = self.body.embedding
        host = host_of(Site("", embedding))
        dtype = own_dtype(host.dtype, config.dtype)
        self.prompt = nn.Parameter(torch.empty(config.length, embedding.embedding_dim, dtype=dtype, device=host.device))

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.gathered([self], base, *args, **kwargs)

    @classmethod
    def gathered(cls, adapters: Sequence[PromptAdapter], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Prompts beside each other are one: a cache, masks and positions know of their rows together."""
        first = adapters[0]
        rows = first.prompt
        if len(adapters) > 1:
            rows = torch.cat([a.prompt.to(rows) for a in reversed(adapters)])
        marks = tuple((a.mark, a.prompt.shape[0]) for a in adapters)
        return call_with(rows, marks, first.body, base, args, kwargs, keep=first.keep)

    def why_not_merge(self) -> str:
        return "its rows are an input of the model, which no weight holds"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `tokens` and `init` say."""
        embedding, config = self.body.embedding, self.config
        device = host_of(Site("", embedding)).device
        if device.type == "meta":
            return
        if self.prompt.is_meta:
            self.prompt = nn.Parameter(torch.empty_like(self.prompt, device=device), self.prompt.requires_grad)
        if config.init == "normal":
            self.prompt.normal_()
        else:
            self.prompt.uniform_(-0.5, 0.5)
        count = config.length if config.init == "vocab" else len(config.tokens)
        if count:
            drawn = torch.randint(embedding.num_embeddings, (count,), device=device)
            drawn[: len(config.tokens)] = torch.tensor(config.tokens, dtype=torch.long, device=device)
            self.prompt[:count].copy_(underneath(embedding)(drawn))

    def extra_repr(self) -> str:
        return f"length={self.prompt.shape[0]}"


class DecoderAdapter(Adapter):
    """On the decoder beside an encoder with a prompt: without parameters, it lets its tokens see the rows."""

    gathers = 1
    decoder: Body

    def __init__(self, decoder: nn.Module, config: PromptTuningConfig):
        super().__init__()
        self.decoder, self.config = Body(decoder), config

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.gathered([self], base, *args, **kwargs)

    @classmethod
    def gathered(cls, adapters: Sequence[DecoderAdapter], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return attend_to(sum(a.config.length for a in adapters), adapters[0].decoder, base, args, kwargs)

    def why_not_merge(self) -> str:
        return "it has no weight of its own"

    def reset_parameters(self) -> None:
        """Nothing: it has no parameters."""

    def extra_repr(self) -> str:
        return f"attends to {self.config.length} rows"


def _with_rows(adapters: Mapping[str, Any]) -> PromptAdapter:
    return next(a for a in adapters.values() if isinstance(a, PromptAdapter))
