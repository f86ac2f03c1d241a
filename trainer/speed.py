"""TODO"""

import resource
import time
from collections import deque

import torch


def measured_matmul_flops(device):
    """FLOPs a second of a bf16 product of 8192³ on this GPU: what utilisation is a share of."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    spans = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        spans.append(time.perf_counter() - began)
    return 2 * 8192 ** 3 / sorted(spans[10:])[10]


class Throughput:
    """Figures of the last 50 steps: how fast, of what is possible, and waiting for data how much.

    MFU is the share of `product_rate` that useful FLOPs make, what is computed again not counted;
    there is none on a CPU. Peak memory: the GPU's, or this process's."""

    def __init__(self, device, steps):
        self.device, self.left, self.steps = device, steps, deque(maxlen=50)
        self.rate = measured_matmul_flops(device) if device.type == "cuda" else 0
        self.began = time.perf_counter()

    def step(self, samples, tokens, flops, waited):
        """A step is done. Returns its figures."""
        now = time.perf_counter()
        self.steps.append((now - self.began, samples, tokens, flops, waited))
        self.began, self.left = now, self.left - 1
        seconds, samples, tokens, flops, waited = map(sum, zip(*self.steps))
        cuda = self.device.type == "cuda"
        peak = (torch.cuda.max_memory_allocated(self.device) if cuda else
                1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return {"samples_per_second": round(samples / seconds, 1),
                **({"tokens_per_second": round(tokens / seconds)} if tokens else {}),
                **({"mfu": round(flops / seconds / self.rate, 3)} if flops and cuda else {}),
                "peak_gb": round(peak / 1e9, 2), "data_wait": round(waited / seconds, 3),
                "eta": round(self.left * seconds / len(self.steps))}
