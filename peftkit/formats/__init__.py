"""Adapters in other programs' files: what they mean, in peft's terms."""
