"""Every kernel compiles for compute capability 9.0 and fits it; that takes no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {"accumulate", "read", "gradient", "factors", "causal_forward", "causal_queries", "causal_keys"}
SHARED = 227 << 10  # bytes that a block may have there


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, _, _ in rows} == KERNELS
    assert all(int(shared) <= SHARED for _, shared, _ in rows)
    assert {name for name, _, wgmma in rows if wgmma == "True"} == KERNELS - {"factors"}
