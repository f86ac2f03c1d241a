"""The kernels on a GPU, where there is one: `python -m pytest -m gpu tests`.

The rows are those of bench/correctness.py, in the bench's own processes: a kernel that hangs or
breaks the GPU's context costs its row and not the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="no GPU here")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(exit status and what was printed, rows, report) of `bench --gpu correctness`."""
    out = tmp_path_factory.mktemp("gpu")
    done = subprocess.run([sys.executable, "-m", "bench", "--gpu", "correctness", "--out", out],
                          cwd=ROOT, capture_output=True, text=True)
    assert (out / "correctness.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((out / "correctness.json").read_text())["rows"]
    return done, rows, json.loads((out / "report.json").read_text())


def test_every_kernel_agrees_with_fp64(found):
    done, rows, report = found
    assert not report["failed"] and not report["missing"], report
    assert done.returncode == 0 and all(row.get("ok") for row in rows)


@pytest.mark.parametrize("number_format", ["bf16", "fp16", "fp32"])
def test_in_each_number_format(found, number_format):
    assert sum(row["what"].endswith(number_format) for row in found[1]) > 20
