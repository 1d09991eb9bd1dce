"""A Llama-type base as an fp32 GGUF file, so that no quantisation lies between it and the model in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

BYTES = 256  # tokens that every vocabulary of the kind written here has, behind its three special ones


@torch.no_grad()
def write_base(model: nn.Module, path: Path) -> None:
    """Write a transformers Llama to the file `path`; its vocabulary of at least 259 tokens gets names of no meaning."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".q_proj." in key:
            value = paired(value, config.num_attention_heads)
        if ".k_proj." in key:
            value = paired(value, config.num_key_value_heads)
        writer.add_tensor(names.get_name(key, (".weight",)), value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp's own converter orders them: row i of the first half, then row i of the second."""
    size = len(weight) // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[torch.tensor(order)]


def _add_vocabulary(writer: Any, size: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(BYTES))]
    tokens += [f"t{i}" for i in range(size - len(tokens))]
    kinds = [2, 3, 3] + [6] * BYTES + [1] * (size - 3 - BYTES)  # unknown, control, byte, normal
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
