"""The tests import the modules from the folder above, whatever folder pytest was started in.

`make test` runs two workers (pytest-xdist), a file at a time each."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:         # before torch is imported; for children as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

SLOW = ("toy", "train", "soak", "golden", "hostile", "blip2_train", "blip2_llms", "compile",
        "adamw", "official", "objective",
        "kernels", "reports_judge", "instruct", "qformer_vlm", "qformer", "qformer_parts",
        "reports_loading", "reports_models", "reports_train", "recipes", "readme", "page",
        "browser", "bench", "book", "held_out", "scienceqa", "several_pictures", "other_tools")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; `pytest -m gpu` runs the kernels on it")


def pytest_collection_modifyitems(items):
    """The slowest files first, or one worker would do them alone at the end."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    # the sort is stable: inside a file the tests keep their order
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
