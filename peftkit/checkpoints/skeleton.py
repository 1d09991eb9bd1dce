"""A model made of a checkpoint's names and shapes alone: enough to find sites in, to build adapters on and to merge into.

What kind of module a weight belongs to is told by its dimensions and by what adapters store for it. A skeleton is never
called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.storage import StorageError, Stored, layout

_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_CONVOLUTIONS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_DEEPEST = 100  # modules in one another; what walks them recurses, a few frames for each
_ATTENTION = ("in_proj_weight", "q_proj_weight")


class Hints:
    """What stored adapters say of the kinds of modules they are for.

    Attributes:
        embeddings: paths, or ends of them, of embeddings.
        inputs: path of a convolution -> its input channels, where they are known.
        transposed: paths of weights that are `(in, out)`, as GPT-2's are.
    """

    def __init__(self, adapters: Sequence[Stored]):
        self.embeddings: set[str] = set()
        self.inputs: dict[str, int] = {}
        self.transposed: set[str] = set()
        for adapter in adapters:
            self.embeddings.update(adapter.rows)
            for stem, tensors in adapter.sites.items():
                path = layout.path_of(stem)
                if any(key in tensors for key in _EMBEDDING):
                    self.embeddings.add(path)
                a = tensors.get("lora_A.weight")
                if a is not None and a.dim() > 2:
                    self.inputs[path] = a.shape[1]

    def embeds(self, path: str) -> bool:
        return any(path == e or path.endswith("." + e) for e in self.embeddings)


def skeleton(shapes: Mapping[str, tuple[torch.dtype, Sequence[int]]], hints: Hints) -> nn.Module:
    """The modules whose parameters have these names, dtypes and shapes, on the meta device.

    Raises:
        StorageError: a name that is a module and a tensor at once, that no module can have, or that lies deeper than modules
            do.
    """
    held: dict[str, dict[str, Tensor]] = {}
    for key, (dtype, shape) in shapes.items():
        if key.count(".") > _DEEPEST:
            raise StorageError(f"{key[:80]}… has {key.count('.')} dots, but no model nests its modules so deep")
        if any(part.startswith("__") for part in key.split(".")):
            raise StorageError(f"{key} is no name of a tensor: Python keeps names with two underscores for itself")
        path, _, name = key.rpartition(".")
        held.setdefault(path, {})[name] = torch.empty(tuple(shape), dtype=dtype, device="meta")
    root = _Holder()
    for path in sorted(held, key=lambda p: p.count(".")):  # an attention comes before the projection in it
        _hang(root, path, _module(path, held, hints), held[path])
    return root


def _check_free(parent: nn.Module, name: str, path: str) -> None:
    if name in parent._parameters or name in parent._buffers:
        raise StorageError(f"{path}: its {name} is a tensor and has tensors in it, which no module has")


class _Holder(nn.Module):
    """Of a kind that nobody asks for."""


def _hang(root: nn.Module, path: str, made: nn.Module | None, tensors: Mapping[str, Tensor]) -> None:
    parent: Any = root
    *above, last = path.split(".")
    for name in above:
        _check_free(parent, name, path)
        parent = parent._modules.setdefault(name, _Holder())
    _check_free(parent, last, path)
    there = parent._modules.get(last)
    module: Any = made or there or _Holder()
    if not path:
        module = root
    else:
        parent._modules[last] = module
        if there is not None and there is not module:
            module._modules.update(there._modules)
    for name, value in tensors.items():
        if name in module._modules:
            raise StorageError(f"{path}.{name} is a tensor and has tensors in it, which no module has")
        trained = value.is_floating_point() and name not in _BUFFERS
        held: dict[str, Any] = module._parameters if trained else module._buffers
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
        held[name] = nn.Parameter(value, requires_grad=False) if trained else value


def _module(path: str, held: Mapping[str, Mapping[str, Tensor]], hints: Hints) -> nn.Module | None:
    """An empty module of the right kind and sizes; None where the kind does not matter."""
    tensors = held[path]
    if any(name in tensors for name in _ATTENTION):
        return _attention(tensors, held.get(f"{path}.out_proj" if path else "out_proj", {}))
    parent, _, last = path.rpartition(".")
    if last == "out_proj" and any(name in held.get(parent, {}) for name in _ATTENTION):
        return None  # the attention has made it
    weight = tensors.get("weight")
    if weight is None or not weight.numel():
        return None
    sizes: dict[str, Any] = {"device": "meta", "dtype": weight.dtype if weight.is_floating_point() else None}
    bias = "bias" in tensors
    if weight.dim() == 2:
        rows, cols = weight.shape
        if hints.embeds(path):
            return nn.Embedding(rows, cols, **sizes)
        if path in hints.transposed:
            return _transposed(rows, cols, bias=bias)
        return nn.Linear(cols, rows, bias=bias, **sizes)
    if weight.dim() in _CONVOLUTIONS:
        out, per_group, *kernel = weight.shape
        groups = hints.inputs.get(path, per_group) // max(1, per_group)
        if groups < 1 or out % groups:
            return None
        kind = _CONVOLUTIONS[weight.dim()]
        return kind(per_group * groups, out, tuple(kernel), groups=groups, bias=bias, **sizes)
    if weight.dim() == 1 and "running_mean" in tensors:
        return nn.BatchNorm1d(len(weight), **sizes)
    if weight.dim() == 1 and bias:
        return nn.LayerNorm(len(weight), **sizes)
    return None


def _transposed(rows: int, cols: int, *, bias: bool) -> nn.Module:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError as error:
        raise StorageError(
            "the adapter is for weights of transformers' Conv1D (fan_in_fan_out), which needs transformers: "
            "pip install 'peftkit[transformers]'"
        ) from error
    with torch.device("meta"):
        made = Conv1D(cols, rows)
    if not bias:
        made._parameters["bias"] = None
    return made


def _attention(tensors: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> nn.Module | None:
    one, weight = tensors.get("in_proj_weight"), out.get("weight")
    if weight is None or weight.dim() != 2:
        return None
    sizes: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    if one is None:
        k, v = tensors.get("k_proj_weight"), tensors.get("v_proj_weight")
        if k is None or v is None or k.dim() != 2 or v.dim() != 2:
            return None
        sizes.update(kdim=k.shape[1], vdim=v.shape[1])
    made = nn.MultiheadAttention(weight.shape[0], 1, bias="in_proj_bias" in tensors, **sizes)
    if one is None:  # separate by choice, even where the sizes are alike
        made._parameters["in_proj_weight"] = None
    return made
