"""`make demo`: fine-tune a real model with LoRA on real film reviews, and check what peftkit promises."""
