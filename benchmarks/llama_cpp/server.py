"""llama.cpp asked for the probabilities of the next token: a program that reads its question from its input.

It is a process of its own, since a file that llama.cpp cannot read may end it, and imports nothing but llama.cpp.
"""

import json
import os
import sys
from typing import Any

import xllamacpp


def _server(base: str, adapter: str | None) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = base
    settings.n_ctx = 256
    settings.n_gpu_layers = 0
    settings.warmup = False
    # keys, values and their products in fp32, as in torch
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = 1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return xllamacpp.Server(settings)


def _next_token(server: Any, prompt: list[int], count: int) -> list[float]:
    # a token that ends the text, or half a character, would be answered without probabilities, which are those before any
    # bias; so the last token of the vocabulary is drawn, an ordinary one
    drawn = [[count - 1, 1e4]]
    request = {"prompt": prompt, "n_predict": 1, "n_probs": count, "logit_bias": drawn, "cache_prompt": False}
    answer = server.handle_completions(request)
    if not answer.get("choices") or not answer["choices"][0].get("logprobs"):
        raise ValueError(f"llama.cpp gave no probabilities for {prompt}: {json.dumps(answer)[:500]}")
    found = {t["id"]: t["logprob"] for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    if len(found) != count:
        raise ValueError(f"llama.cpp gave {len(found)} probabilities, expected {count}")
    return [found[i] for i in range(count)]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    answers = []
    for adapter in asked["adapters"]:
        server = _server(asked["base"], adapter)
        answers.append([_next_token(server, prompt, asked["count"]) for prompt in asked["prompts"]])
    print(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # the servers' threads are not waited for
