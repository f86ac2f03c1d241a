"""Kernels under Triton's interpreter: collected only where TRITON_INTERPRET=1 was set before the
first import, as tests/test_kernels.py does in a process of its own."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
