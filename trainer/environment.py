"""Settings that PyTorch reads once, from the environment, when it is imported.

So train.py calls `before_torch` above its import of torch, and nothing here imports torch. What the
user has set stays."""

import os


def before_torch():
    """Waiting CPU threads soon sleep; freed pages of the GPU's memory are put together again."""
    # threads that spin take each other's time where cores are shared; waking one that has slept is
    # slow. MiniGPT-4's toy stages took 65 and 53 s on two cores without the short wait, 37 and 25 s
    # with it; two trainings at once then take 7 s for what took 5
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")     # of GNU's OpenMP, which PyTorch has
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:     # the older name of the same setting
        # rows differ in length from step to step: trainer/allocator.py
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
