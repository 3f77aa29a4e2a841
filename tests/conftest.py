"""What every test needs: no network, and property tests that do not depend on the speed of the machine."""

import os

# Before any test imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MACLIN_NATIVE", "wait")  # compiled kernels from the first call on, not from some call on

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    )

import pytest
import torch
from hypothesis import settings

# The same examples at each run, so that a change is what turns a test red. To look for others:
# MACLIN_EXPLORE=1 make test
settings.register_profile("maclin", deadline=None, derandomize="MACLIN_EXPLORE" not in os.environ, print_blob=True)
settings.load_profile("maclin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
