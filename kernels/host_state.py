"""kernels/host_state.py: what an optimizer remembers waits in the host's memory for its step.

Of a weight, 8-bit AdamW (adamw.py) remembers two moments, 2.03 bytes, and a low half, 2 bytes more;
the sum of its bf16 gradients over the micro-batches of a step is another 2. All of them are used
once a step, or once a micro-batch. So the host's memory holds them, and the GPU only those of the
weight at hand:

    the GPU computes   gradient 9 | gradient 8 | gradient 7 ...      backward, last layer first
    and steps                       weight 9     weight 8            one behind
    a second stream    fetch 9    | fetch 8    | fetch 7
                                    send 9       send 8

A weight is stepped when the gradient after its own is there: until then its state is on its way,
beside the computation. The arithmetic is the same, and so are the bits.

Three rules:

    one stream for all copies    a state is fetched after it was sent back the step before
    one at most unsent           Python is ahead of the GPU: before it asks for another state it
                                 waits until the last but one is back in the host's memory, so the
                                 GPU holds three: one that comes, one at work, one that goes
    pinned memory                or copies would not run beside the computation; cut from blocks
                                 of 1 GiB, because PyTorch rounds up to powers of two (offload.py)

On a CPU there is no second stream and no other memory; the same copies are made, there and back.

What passes over PCIe, for P weights and M micro-batches a step (trainer/traffic.py computes it):

    moments      2 · 2.03 P     7B: 27.5 GB a step, 1.1 s at 25 GB/s
    low halves   2 · 2 P            27.0 GB         1.1 s
    gradients    2 (M - 1) · 2 P    27.0 GB for each micro-batch but one

Computed; the copies have not run on a GPU yet.

Alone: `python -m kernels.host_state` adds to tensors that live on the host, compares the bits with
tensors of the device, and prints GB/s.
"""

import contextlib
import functools
from collections import deque

import torch

from kernels.offload import Arena

UNSENT = 1                  # states that may be on their way back while another one is fetched


class HostMemory:
    """The host's memory beside one device, and all copies between the two."""

    def __init__(self, device):
        self.device, self.sent = device, deque()
        self.stream = self.arena = None
        if device.type == "cuda":
            self.stream, self.arena = torch.cuda.Stream(device), Arena()

    def like(self, x):
        """Memory on the host of x's shape, dtype and order. It is never given back: a run keeps
        what its optimizers need to the end."""
        return self.arena.take(x) if self.arena else torch.empty_like(x)

    def zeros(self, size, dtype):
        """Zeros on the host."""
        if self.arena:
            return self.arena.take(torch.empty(size, dtype=dtype, device="meta")).zero_()
        return torch.zeros(size, dtype=dtype)

    def beside(self):
        """Inside, operations go to the stream of the copies."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def fetch(self, tensors):
        """Begin to copy {name: tensor on the host} to the device; returns a Visit."""
        while len(self.sent) > UNSENT:
            self.sent.popleft().synchronize()
        return Visit(self, tensors)

    def send(self, here, tensors):
        """Copy {name: tensor on the device} into the host's tensors of the same names, after what
        the device still has to do with them. Nothing to send: note how far the device is."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.beside():
            for name, x in here.items():
                tensors[name].copy_(x, non_blocking=True)
        if self.stream:
            for x in here.values():
                x.record_stream(self.stream)        # nobody gets its memory before it is read
            self.sent.append(self.stream.record_event())

    def wait(self):
        """Come back when the host's memory holds all that was sent."""
        if self.stream:
            self.stream.synchronize()
        self.sent.clear()


class Visit:
    """Copies on the device of tensors that live on the host."""

    def __init__(self, memory, tensors):
        self.device, self.ready = memory.device, None
        with memory.beside():
            self.here = {name: x.to(memory.device, non_blocking=True, copy=True)
                         for name, x in tensors.items()}
        if memory.stream:
            self.ready = memory.stream.record_event()

    def get(self):
        """{name: tensor on the device}; the current stream waits for these copies alone."""
        if self.ready:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.ready)
            for x in self.here.values():
                x.record_stream(now)
        return self.here


@functools.cache
def host_memory(device):
    """The one HostMemory of a device: all copies go over one stream."""
    return HostMemory(device)


class HostSums:
    """Sums of gradients over the micro-batches of a step, in the host's memory. They are added in
    the order and in the dtype in which autograd adds them on the device."""

    def __init__(self, device):
        self.memory = host_memory(device)
        self.room, self.begun, self.visits = {}, set(), {}      # by id of the weight

    def fetch(self, weight):
        """Begin to copy the sum of a weight to the device, if there is one."""
        if id(weight) in self.begun:
            self.visits[id(weight)] = self.memory.fetch({"sum": self.room[id(weight)]})

    def add(self, weight):
        """weight.grad becomes the sum so far and itself; without a gradient the sum alone."""
        if id(weight) not in self.begun:
            return
        if id(weight) not in self.visits:
            self.fetch(weight)
        total = self.visits.pop(id(weight)).get()["sum"]
        self.begun.remove(id(weight))
        weight.grad = total if weight.grad is None else weight.grad.add_(total)

    def keep(self, weight):
        """Send weight.grad to the host; the device forgets it."""
        if id(weight) not in self.room:
            self.room[id(weight)] = self.memory.like(weight.grad)
        self.memory.send({"sum": weight.grad.detach()}, {"sum": self.room[id(weight)]})
        self.begun.add(id(weight))
        weight.grad = None

    def clear(self):
        """Forget all sums."""
        self.begun.clear()
        self.visits.clear()


if __name__ == "__main__":
    import time

    cuda = torch.cuda.is_available()
    device, n, weights, steps = ("cuda:0", 1 << 27, 8, 3) if cuda else ("cpu", 1 << 18, 8, 3)
    memory = host_memory(torch.device(device))
    plain = [torch.zeros(n, dtype=torch.bfloat16, device=device) for _ in range(weights)]
    there = [{"x": memory.zeros(n, torch.bfloat16)} for _ in range(weights)]
    start = time.perf_counter()
    for step in range(steps):
        visit = memory.fetch(there[0])
        for i, states in enumerate(there):
            here, following = visit.get(), there[(i + 1) % weights]
            visit = memory.fetch(following)             # on its way while this one is added to
            here["x"].add_(step + i / 8)
            memory.send(here, states)
        memory.wait()
    took = time.perf_counter() - start
    for step in range(steps):
        for i, x in enumerate(plain):
            x.add_(step + i / 8)
    same = all(torch.equal(x.cpu(), states["x"]) for x, states in zip(plain, there))
    moved = 2 * 2 * n * weights * steps                 # bytes, there and back
    print(f"{weights} tensors of {2 * n / 1e6:.0f} MB, {steps} steps: bits equal: {same}; "
          f"{moved / took / 1e9:.1f} GB/s" + ("" if cuda else "; no GPU here: within the memory"))
