"""`make demo`: fine-tune a real model with LoRA on real film reviews, and check what peftkit promises."""

import logging

# Where torchao is installed, transformers imports it, and it reports every kernel that this machine cannot run.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
