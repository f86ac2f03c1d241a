"""kernels/launch.py: when a kernel runs, and what every kernel file needs to say so.

    tensors on CUDA, Triton installed          the Triton kernel
    anything else                              the specification, or PyTorch's own fused operation
    KERNELS=spec in the environment            the specification everywhere: for debugging
    TRITON_INTERPRET=1 in the environment      the Triton kernel on CPU tensors, in Triton's
                                               interpreter: how the tests run kernels without a GPU

The device alone decides. Nothing else is asked: not the model, not the size, not a flag.

Alone: `python -m kernels.launch` says what runs here.
"""

import os

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:             # a laptop: the specifications are all it needs
    triton = tl = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SPEC = os.environ.get("KERNELS") == "spec"


def jit(kernel):
    """triton.jit where Triton is installed; elsewhere the function stays as it is, uncalled."""
    return triton.jit(kernel) if triton else kernel


def fused(*tensors):
    """Does the kernel run for these tensors (None among them is passed over)?

    Raises ValueError where tensors lie on different devices, and for bfloat16 in the interpreter,
    which computes garbage from it without an error (Triton 3.6 to 3.9)."""
    tensors = [t for t in tensors if t is not None]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"kernels: tensors on {', '.join(sorted(map(str, devices)))}; move them "
                         "to one device")
    if SPEC or triton is None:
        return False
    if INTERPRET and any(t.dtype == torch.bfloat16 for t in tensors):
        raise ValueError("kernels: bfloat16 in Triton's interpreter gives wrong numbers; test in "
                         "float32 or float16")
    device = devices.pop()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(f"kernels: tensors on {device}, but kernels start on the current device, "
                         f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first")
    return INTERPRET or device.type == "cuda"


if __name__ == "__main__":
    here = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"Triton {triton.__version__ if triton else 'is not installed'}; for tensors on {here} "
          f"the {'kernels' if fused(torch.ones(1, device=here)) else 'specifications'} run")
