"""Kernels under Triton's interpreter: collected only where TRITON_INTERPRET=1 was set before the
first import, as tests/test_kernels.py does in a process of its own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def grounded(monkeypatch):
    """Nothing may be launched."""
    from triton.runtime.interpreter import GridExecutor

    def launched(*args, **named):
        raise AssertionError("launched")
    monkeypatch.setattr(GridExecutor, "__call__", launched)
