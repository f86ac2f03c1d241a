"""bench.preflight: is there a GPU that can be used? In seconds, before anything is compiled for it.

A machine with a GPU may still have none for PyTorch: the driver is older than PyTorch's CUDA, or
there is no C compiler or no Python.h, which Triton needs to start its kernels. Each is one line
that says what to do, and the call ends there. `no_gpu` looks from outside, without torch;
`preflight` is the first table of the plan.

Alone: `python -m bench.preflight` says what is missing here.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

OLDEST = 80                             # compute capability: bf16 and cp.async, an A100's


def nvidia_smi():
    """(driver, GPU) of `nvidia-smi`, or None where it is missing or finds none."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return None
    try:
        done = subprocess.run([tool, "--query-gpu=driver_version,name", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or "," not in lines[0]:
        return None
    driver, name = lines[0].split(",", 1)
    return driver.strip(), name.strip()


def no_gpu(torch):
    """Why PyTorch finds no GPU, and what to do; None if it finds one."""
    if torch.cuda.is_available():
        return None
    found = nvidia_smi()
    if found is None:
        return ("no GPU: neither PyTorch nor nvidia-smi finds one; python -m bench without --gpu "
                "compiles the kernels, python -m bench --rehearse runs the plan without one")
    driver, name = found
    if torch.version.cuda is None:
        return (f"nvidia-smi finds {name}, but torch {torch.__version__} is built without CUDA: "
                f"pip install --force-reinstall torch=={torch.__version__.split('+')[0]} from the "
                "index of wheels with CUDA")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return (f"nvidia-smi finds {name}, but CUDA_VISIBLE_DEVICES hides it: unset it")
    try:
        torch.cuda.init()
        reason = "no reason given"
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
    return (f"nvidia-smi finds {name} with driver {driver}, but PyTorch does not ({reason}): torch "
            f"{torch.__version__} needs a driver for CUDA {torch.version.cuda}; update the driver, "
            "or install a torch built for an older CUDA")


def no_compiler():
    """Why Triton cannot build what starts its kernels, and what to do; None if it can."""
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        return ("no C compiler, which Triton needs to start its kernels: install gcc, or name one "
                "in CC")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return (f"no Python.h ({header.name} of Python {sysconfig.get_python_version()}), which "
                "Triton needs to start its kernels: install python3-dev, or use another Python")
    return None


def versions(*names):
    """{name: version} of packages; a missing one is None."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def stop(why):
    """Say why there can be no figures, and end the process: the plan stops there."""
    from bench.measure import DEAD, worker
    worker.say({"stop": why})
    os._exit(DEAD)


def machine():
    """The machine of all figures. Does not return if it can give none."""
    import torch

    from bench import measure
    if measure.GPU:
        why = no_gpu(torch) or no_compiler()
        if why:
            stop(why)
    row = {"device": "a CPU", "torch": torch.__version__, **versions(
        "triton", "transformers", "flash-attn", "liger-kernel")}
    if measure.GPU or measure.DRY:
        card = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability(0)
        row |= {"device": card.name, "sm": 10 * major + minor, "cores": os.cpu_count(),
                "GB": round(card.total_memory / 1e9, 1)}
        if row["sm"] < OLDEST:
            stop(f"{card.name} is sm_{row['sm']}; the kernels need sm_80 (A100) or newer")
    if row["transformers"] is None:
        row["baselines"] = ("transformers is missing, half of the baselines with it: pip install "
                            "-r tests/requirements.txt")
    return row


def first_kernel():
    """One kernel from source to result: the compiler, ptxas and the driver work together."""
    import torch

    from bench import measure
    from kernels import rms_norm
    x = torch.randn(16, 4096, device=measure.DEVICE, dtype=measure.HALF)
    weight = torch.ones(4096, device=measure.DEVICE, dtype=measure.HALF)
    try:
        measure.attempt("ours", lambda: rms_norm(x, weight, 1e-5))
    except measure.Failed as why:
        if measure.GPU:
            stop(f"a first kernel does not run: {why}")
        return {"ours": str(why)}
    return {"ok": True}


def preflight():
    """The machine, a first kernel, and the two ceilings."""
    from bench import measure
    yield "machine", machine
    yield "first kernel", first_kernel
    yield from measure.ceilings()


def cpu_machine():
    """The machine of the tables of --cpu."""
    yield "machine", machine


if __name__ == "__main__":
    import torch
    print(no_gpu(torch) or no_compiler() or "a GPU can be used here")
