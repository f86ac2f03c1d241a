"""How fast a run is: samples, tokens, FLOPs a second, peak memory, time spent waiting for data."""

import resource
import time
from collections import deque

import torch


def measured_matmul_flops(device):
    """FLOPs a second of a bf16 product of 8192³ on this GPU: what utilisation is a share of."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(30):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[10:])[10]           # the first ten warm the GPU up
    return 2 * 8192 ** 3 / median


class Throughput:
    """Figures of the last 50 steps.

    MFU (model FLOPs utilisation) is useful FLOPs a second as a share of `measured_matmul_flops`;
    what backward recomputes is not counted. There is none on a CPU. Memory: the GPU's peak, or
    that of this process."""

    def __init__(self, device, steps):
        self.device, self.left, self.steps = device, steps, deque(maxlen=50)
        self.is_gpu, self.rate = device.type == "cuda", 0
        if self.is_gpu:
            self.rate = measured_matmul_flops(device)
        self.began = time.perf_counter()

    def step(self, samples, tokens, flops, waited):
        """A step is done: its samples, tokens and FLOPs, the seconds that it waited for data.
        Returns its figures for the log."""
        now = time.perf_counter()
        self.steps.append((now - self.began, samples, tokens, flops, waited))
        self.began, self.left = now, self.left - 1
        seconds, samples, tokens, flops, waited = map(sum, zip(*self.steps))
        figures = {"samples_per_second": round(samples / seconds, 1)}
        if tokens:
            figures["tokens_per_second"] = round(tokens / seconds)
        if flops and self.is_gpu:
            figures["mfu"] = round(flops / seconds / self.rate, 3)
        figures["peak_gb"] = round(self.peak_bytes() / 1e9, 2)
        figures["data_wait"] = round(waited / seconds, 3)
        figures["eta"] = round(self.left * seconds / len(self.steps))
        return figures

    def restart_clock(self):
        """The next step begins now: what was done since the last one is no part of it."""
        self.began = time.perf_counter()

    def peak_bytes(self):
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # Linux: in KiB
