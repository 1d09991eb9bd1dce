"""Every method trained on a real encoder and a real decoder, with three seeds: what it costs and what it reaches.

    python -m benchmarks.methods --model minilm
    python -m benchmarks.methods --model smollm2 --only lora dora
    python -m benchmarks.methods --model minilm --steps

Each run is a process of its own, so that its peak of memory is its own. A run renews its rows in the result file and
leaves the others, so that methods can be measured one by one. `--steps` times a training step of all methods, taking
turns on one model.
"""
