import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from maclin.bench import MemoryTracker, free_bytes, largest_intermediate, peak_bytes

KB = 1024
MIB = 2**20


def block(kib: int = 1) -> torch.Tensor:
    return torch.ones(kib * KB // 4)


OUTSIDE = block(8)


def chain() -> torch.Tensor:
    x = block(4)  # 4
    x = x + 1  # 8 at the peak, 4 after
    return x * 2  # 8 at the peak


def held_then_dropped() -> torch.Tensor:
    a, b = block(3), block(5)  # 8
    del a  # 5
    return torch.cat([b, b[: KB // 4]])  # 5 + 6


def views_and_in_place() -> torch.Tensor:
    x = block(4)
    y = x.view(2, -1).mT[1:].unsqueeze(0)
    y.add_(1)
    x.exp_()
    return y.detach()


def einsum() -> torch.Tensor:
    x = torch.ones(16, 32)  # 2 KiB
    return torch.einsum("ij,kj->ik", x, x)  # 1 KiB


def batched_product() -> torch.Tensor:
    left, right = torch.ones(2, 1, 16, 32), torch.ones(4, 32, 8)  # 4 + 4 KiB
    return left @ right  # both are expanded to (2, 4) and copied, 16 + 8 KiB; the result is 4 KiB


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("fn", "peak", "largest"),
    [
        (lambda: None, 0, 0),
        (block, 1, 1),
        (chain, 8, 4),
        (held_then_dropped, 11, 6),
        (views_and_in_place, 4, 4),
        (lambda: OUTSIDE.view(4, -1)[1:].mT, 0, 0),
        (lambda: OUTSIDE.clone().view(-1, 4), 8, 8),
        (lambda: [OUTSIDE * 2 for _ in range(3)], 24, 8),
        (lambda: [(OUTSIDE * 2).sum() for _ in range(3)] and None, 8 + 12 / KB, 8),  # three sums, too
        (lambda: OUTSIDE.to(torch.float64), 16, 16),
        (einsum, 3, 2),
        (batched_product, 4 + 4 + 16 + 8 + 4, 16),
    ],
)
def test_peak_and_largest_by_hand(
    context: Callable[[], torch.autograd.grad_mode.no_grad], fn: Callable[[], object], peak: float, largest: float
) -> None:
    with context(), MemoryTracker() as tracker:
        result = fn()
    assert tracker.peak_bytes == peak * KB
    assert tracker.largest_bytes == largest * KB
    del result
    assert tracker.live_bytes == 0


def test_a_storage_resized_in_place_counts_what_it_grew_to() -> None:
    with MemoryTracker() as tracker:
        x = torch.empty(0)
        torch.add(OUTSIDE, 1, out=x)
        assert tracker.live_bytes == 8 * KB
        x = None
        assert tracker.live_bytes == 0
    assert tracker.peak_bytes == 8 * KB


def test_what_was_made_outside_is_not_given_back_inside() -> None:
    x = [block(4)]
    with MemoryTracker() as tracker:
        y = x[0] + 1
        x.clear()
        assert tracker.live_bytes == 4 * KB
        del y
    assert tracker.live_bytes == 0


def test_what_autograd_keeps_counts() -> None:
    x = block(4).requires_grad_()
    with MemoryTracker() as tracker:
        y = (x.exp() + 1).exp()  # both exponentials are kept for the gradient, the sum is not
        assert tracker.live_bytes == 8 * KB
        del y
        assert tracker.live_bytes == 0


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / 8).softmax(-1) @ v


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def test_the_quadratic_one_shows() -> None:
    def largest(fn: Callable[..., torch.Tensor], length: int) -> int:
        q, k, v = torch.ones(3, 1, 2, length, 16)
        return largest_intermediate(lambda: fn(q, k, v))

    assert largest(naive, 512) == 4 * largest(naive, 256) == 2 * 512 * 512 * 4
    assert largest(linear, 512) == 2 * largest(linear, 256) == 2 * 512 * 16 * 4
    # fused softmax: out and the log-sum-exp of each row
    assert largest(F.scaled_dot_product_attention, 512) == 2 * 512 * 16 * 4


def test_peak_bytes_holds_results() -> None:
    assert peak_bytes(lambda: [block(2), block(3)]) == 5 * KB


def test_scratch_memory_of_a_kernel_counts() -> None:
    q, k, v = torch.ones(3, 1, 2, 512, 16)
    out = q.nbytes
    assert peak_bytes(lambda: F.scaled_dot_product_attention(q, k, v)) > 1.2 * out


@pytest.fixture(scope="module")
def doubled() -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.library.custom_op("maclin_test_memory::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        scratch = torch.ones(16 * KB // 4)  # 16 KiB that nobody outside sees
        return x * scratch.mul(2)[0]

    return doubled  # pyright: ignore[reportReturnType]


def test_a_custom_operator_is_looked_into(doubled: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = block(4)
    with MemoryTracker() as tracker:
        result = doubled(x)
    assert torch.equal(result, 2 * x)
    assert tracker.largest_bytes == 16 * KB
    assert tracker.peak_bytes == 36 * KB  # the scratch, its double, of which one number is used, and the result
    assert peak_bytes(lambda: doubled(x)) == 36 * KB


@pytest.mark.gpu
def test_peak_bytes_on_cuda() -> None:
    x = torch.ones(MIB, device="cuda")
    assert peak_bytes(lambda: (x + 1) * 2, "cuda") == 8 * MIB


MEMINFO = "MemTotal: 999 kB\nMemFree: 10 kB\nMemAvailable: 100 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"meminfo": MEMINFO}, 100 * KB),
        ({"meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 100 * KB),
        ({"meminfo": MEMINFO, "memory.max": "51200\n", "memory.current": "1200\n"}, 50000),
        ({"meminfo": MEMINFO, "memory.max": "51200\n", "memory.current": "60000\n"}, 0),
        ({"meminfo": "MemTotal: 999 kB\n"}, None),
    ],
)
def test_free_bytes_from_the_system(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert free_bytes(meminfo=tmp_path / "meminfo", cgroup=tmp_path) == free


def test_free_bytes_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free_bytes(meminfo=tmp_path / "none", cgroup=tmp_path) is None


RESIDENT = """
import sys, torch
from maclin.bench import peak_bytes

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def fn():
    held = [torch.ones(2**23) for _ in range(4)]  # 4 x 32 MiB
    held = [held[0] + held[1], held[2]]           # 32 MiB more at the peak
    return held[0] * 2

fn()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = status("VmRSS")
fn()
print(status("VmHWM") - before, peak_bytes(fn))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the process table of Linux")
def test_the_peak_agrees_with_the_resident_memory_of_a_process() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    resident, tracked = map(int, done.stdout.split())
    assert tracked == 160 * MIB
    assert resident == pytest.approx(tracked, rel=0.05)
