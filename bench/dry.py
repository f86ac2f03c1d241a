"""bench.dry: launches on a GPU that is not there.

Triton's own front end, binder, specialisation, compiler and ptxas run as for an A100 or an H100;
the tensors lie in the CPU's memory, nothing is launched and no result is computed. So a first call
meets here what it would meet on the GPU: types of arguments, a kernel that does not compile, more
shared memory than the card has, a grid that is too large.

`install(sm)` puts it in the place of the driver; nothing of kernels/ may have run before. LAUNCHES
and COMPILED say what would have happened. `failing` lets chosen candidates fail as a GPU would.
Alone: `python -m bench.dry` compiles and launches one kernel for both architectures.
"""

import importlib
import os
import sys
import tempfile
import time

import torch

# {compute capability: (bytes of shared memory that a block may have, multiprocessors)}
CARDS = {80: (166912, 108), 86: (101376, 82), 89: (101376, 128), 90: (232448, 132),
         100: (232448, 148), 120: (101376, 170)}
LAUNCHES, COMPILED = [], []             # (kernel, grid); (kernel, bytes of shared memory)
MODULES = "attention cross_entropy decode norm rope swiglu adamw quantize".split()


class State:
    """broken: after an illegal access every call fails. failing: how the next launch fails."""
    broken, failing = False, None


state = State()


# ------------------------------------------------------------------------------- the driver

class Utils:
    """What Triton asks of the CUDA driver about a compiled kernel and its device."""

    def __init__(self, sm):
        self.sm = sm

    def load_binary(self, name, kernel, shared, device):
        return 1, name, 0, 0, 1024      # module, function, registers, spills, most threads

    def get_device_properties(self, device):
        shared, processors = CARDS[self.sm]
        return {"max_shared_mem": shared, "multiprocessor_count": processors,
                "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    """Stands for the compiled C function that starts a kernel."""

    def __init__(self, src, metadata):
        self.name = getattr(src.fn, "__name__", src.name)
        COMPILED.append((self.name, metadata.shared))

    def __call__(self, x, y, z, *arguments):
        if state.broken:
            raise illegal_access()
        kind, state.failing = state.failing, None
        if kind:
            fail(kind)
        if not (0 < x < 2 ** 31 and 0 < y <= 65535 and 0 < z <= 65535):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {self.name} has a grid of "
                               f"{(x, y, z)}")
        LAUNCHES.append((self.name, (x, y, z)))


class Driver:
    """Triton's active driver."""
    launcher_cls = Launcher

    def __init__(self, sm):
        self.sm, self.utils = sm, Utils(sm)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.sm, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda

    @staticmethod
    def is_active():
        return True


def fused(*tensors):
    """kernels.launch.fused with every tensor on the GPU: only fp64 has no kernel."""
    tensors = [t for t in tensors if t is not None]
    if len({t.device for t in tensors}) > 1:
        raise ValueError("kernels: tensors on different devices")
    return not any(t.dtype == torch.float64 for t in tensors)


def answer():
    """In the place of torch.cuda.synchronize and empty_cache."""
    if state.broken:
        raise illegal_access()


def install(sm):
    """A GPU of compute capability sm, one of CARDS, from here on. Needs Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    from triton.runtime import driver

    class Properties:
        name, multi_processor_count, total_memory = f"sm_{sm}", CARDS[sm][1], 80 * 2 ** 30

    driver.set_active(Driver(sm))
    torch.cuda.get_device_properties = lambda *_: Properties
    torch.cuda.get_device_capability = lambda *_: (sm // 10, sm % 10)
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: answer()
    # results are zeros: what lies in fresh memory may be NaN, which a caller would find
    torch.empty, torch.empty_like, torch.Tensor.new_empty = (
        torch.zeros, torch.zeros_like, torch.Tensor.new_zeros)
    import kernels
    for name in MODULES:
        importlib.import_module(f"kernels.{name}").fused = fused
    kernels.fused = sys.modules["kernels.launch"].fused = fused


# ------------------------------------------------------------------------- planted failures

def illegal_access():
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def fail(kind):
    """Fail as a GPU does."""
    from triton.runtime.errors import OutOfResources, PTXASError
    if kind == "hang":
        time.sleep(3600)
    if kind == "illegal access":
        state.broken = True
        raise illegal_access()
    raise {"resources": OutOfResources(2 * CARDS[90][0], CARDS[90][0], "shared memory"),
           "ptxas": PTXASError("planted: ptxas exited with status 255"),
           "out of memory": torch.OutOfMemoryError("CUDA out of memory (planted)")}[kind]


def failing(planted):
    """A function that is called before a candidate runs. planted: [[row, candidate, kind]]; ours
    fails at its next launch, a baseline, which has none here, at once."""
    from bench.measure import worker
    kinds = {(row, candidate): kind for row, candidate, kind in planted}

    def before(candidate):
        kind = kinds.get((worker.row, candidate))
        if kind and candidate.startswith("ours"):
            state.failing = kind
        elif kind:
            fail(kind)
    return before


if __name__ == "__main__":
    for chosen in (80, 90):
        install(chosen)
        norm = importlib.import_module("kernels.norm")
        norm.rms_norm(torch.randn(16, 4096, dtype=torch.bfloat16),
                      torch.ones(4096, dtype=torch.bfloat16), 1e-6)
        print(f"sm_{chosen}: {LAUNCHES[-1]}, {COMPILED[-1][1]} bytes of shared memory")
