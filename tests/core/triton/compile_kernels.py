"""Compile every kernel for a GPU that need not be there: prints name, bytes of shared memory, and whether it has wgmma.

Run by test_compile.py in a process of its own, because there the interpreter must be off. Triton asks a driver for the
target and the device; this one has no device, and launches are replaced by what Triton does before them.
"""

from typing import Any

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from maclin.core.triton import launch
from maclin.core.triton.attention import attend, attend_backward, causal, causal_backward
from maclin.core.triton.positive import positive
from maclin.core.triton.products import products
from maclin.core.triton.softmax import softmax


class Target:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


original = JITFunction.run


def compile_only(self, *args, grid, warmup, **kwargs):
    compiled: Any = original(self, *args, grid=grid, warmup=True, **kwargs)
    print(self.fn.__name__, compiled.metadata.shared, "wgmma" in compiled.asm["ptx"])


pretended: Any = Target()
driver.set_active(pretended)
JITFunction.run = compile_only
launch.runs_on = lambda x: True
heads, key_heads, d, m = 2, 1, 64, 128
projections = torch.zeros(key_heads, d, 4)
index = torch.tensor([[0, 1, 2]]).expand(m, -1)
centre = torch.zeros(key_heads, d)
tables = products(projections, index, torch.ones(m), centre, centre)
log_maps = (positive(torch.zeros(key_heads, d, m), 0.1),) * 2
for (f_q, f_k), floor, dtype in (
    ((tables, tables), 0.7, torch.bfloat16),
    (log_maps, 0.0, torch.bfloat16),
    ((softmax(d, 0.5), softmax(d)), 0.0, torch.bfloat16),
    (log_maps, 0.0, torch.float32),
):
    q, k, v = (torch.zeros(1, h, 512, d, dtype=dtype) for h in (heads, key_heads, key_heads))
    mask = torch.ones(1, 512, dtype=torch.bool)
    reading, sums = attend(f_q, f_k, q, k, v, mask, floor)
    attend_backward(f_q, f_k, q, k, v, reading, sums, q, mask, floor)
    reading, _ = causal(f_q, f_k, q, k, v, mask, floor=floor)
    causal_backward(f_q, f_k, q, k, v, reading, q, mask, floor=floor)
