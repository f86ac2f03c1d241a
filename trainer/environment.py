"""Settings that PyTorch reads once, from the environment, when it is imported.

So train.py calls `before_torch` above its import of torch, and nothing here imports torch. What the
user has set stays."""

import os


def before_torch():
    """Waiting CPU threads sleep; freed pages of the GPU's memory are put together again."""
    # spinning threads take each other's time where cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:     # the older name of the same setting
        # rows differ in length from step to step: trainer/allocator.py
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
