"""Who trains when: full fine-tuning, LISA, half fine-tuning and LoRA on a real decoder, and what each holds in memory.

    python -m benchmarks.schedules
    python -m benchmarks.schedules --only full lisa-2
    python -m benchmarks.schedules --memory

Each run is a process of its own, so that its peak of memory is its own, and renews its rows in the result file. `--memory`
runs what was promised of LISA's memory, on few tokens, so that weights, gradients and state are what is seen.
"""
