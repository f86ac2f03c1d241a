"""The Triton kernels, without a GPU: their numbers, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernels_compute_what_their_specifications_say():
    """All of tests/interpreted, in a process that imports the kernels for the interpreter."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/interpreted"], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10 and "skipped" not in done.stdout


def test_bf16_in_the_interpreter_is_refused():
    code = ("import torch; from kernels.launch import fused\n"
            "assert fused(torch.ones(1))\n"
            "try: fused(torch.ones(1, dtype=torch.bfloat16))\n"
            "except ValueError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    assert "bfloat16" in done.stdout
    plain = ("import torch; from kernels.launch import fused\n"
             "print(fused(torch.ones(1, dtype=torch.bfloat16)))")
    without = subprocess.run([sys.executable, "-c", plain], cwd=ROOT, capture_output=True,
                             text=True, check=True)
    assert without.stdout.strip() == "False"            # control: on a CPU nothing is asked of it
