"""What peftkit's verbs cost beside peft's own: `python -m benchmarks.against_peft`."""
