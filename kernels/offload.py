"""kernels/offload.py: activations wait for their backward in the host's memory.

    forward      layer 1 | layer 2 | layer 3 ...        the GPU computes
                    ^ copy 1 | copy 2 | copy 3 ...      a second stream sends what regions keep
    backward     ... layer 3 | layer 2 | layer 1
                 copy 2 | copy 1                        fetched one region ahead

Copies run beside the computation only from pinned memory, which the system may not move. Two rules
keep them there:

    an event for each copy    who needs a tensor waits for its own copy, not for those behind it:
                              the region ahead is on its way while this one begins
    blocks of 1 GiB           PyTorch rounds every pinned tensor up to a power of two: of 135 MB,
                              the inputs of a 7B layer over 8,192 tokens, to 256. Here tensors are
                              cut one behind the other from blocks that are powers of two; when the
                              last of them has gone, the next forward begins at the first block

Alone: `python -m kernels.offload` cuts the tensors of a small stack and prints what they take.
"""

import functools
import math
import threading
import weakref

import torch

BLOCK = 2 ** 30             # bytes of a pinned block
ALIGNED = 512               # tensors begin at a multiple, as PyTorch's own do


class Arena:
    """Host memory that is handed out in order and taken back all at once.

    Every copy into it and out of it goes over one stream, so that a tensor that is cut again is
    overwritten only after it has been read."""

    def __init__(self, block=BLOCK, pinned=True):
        self.block, self.pinned = block, pinned
        self.blocks, self.current, self.used, self.lent = [], 0, 0, 0
        self.lock = threading.Lock()            # PyTorch runs backward in a thread of its own

    def take(self, x):
        """Room for x, in its dtype, shape and order in memory. Give it back with `release`."""
        layout = torch.empty_like(x, device="meta")     # x itself may have gaps
        size = max(layout.numel() * layout.element_size(), 1)
        with self.lock:
            start = math.ceil(self.used / ALIGNED) * ALIGNED
            while self.current < len(self.blocks) and (
                    start + size > len(self.blocks[self.current])):
                self.current, start = self.current + 1, 0
            if self.current == len(self.blocks):
                # what is larger than a block gets the next power of two; others use its rest
                length = max(self.block, 2 ** (size - 1).bit_length())
                self.blocks.append(torch.empty(length, dtype=torch.uint8, pin_memory=self.pinned))
            self.used, self.lent = start + size, self.lent + 1
            piece = self.blocks[self.current][start:start + size]
        piece = piece[:layout.numel() * layout.element_size()].view(layout.dtype)
        return piece.as_strided(layout.shape, layout.stride())

    def release(self):
        """One tensor has gone. After the last the next one is cut from the beginning."""
        with self.lock:
            self.lent -= 1
            if self.lent == 0:
                self.current = self.used = 0


@functools.cache
def side_of(device):
    """(stream for copies, arena) of a GPU."""
    return torch.cuda.Stream(device), Arena()


class Hosted:
    """A tensor in pinned host memory, sent and fetched on a stream beside the one that computes."""

    def __init__(self, x):
        self.device, self.back, self.ready = x.device, None, None
        self.side, arena = side_of(x.device)
        self.side.wait_stream(torch.cuda.current_stream(x.device))      # x has to be there first
        with torch.cuda.stream(self.side):
            self.host = arena.take(x)
            self.host.copy_(x, non_blocking=True)
        x.record_stream(self.side)      # nobody gets x's memory before it has been read
        weakref.finalize(self, arena.release)

    def fetch(self):
        """Send it back to the GPU, if it is not on its way."""
        if self.back is None:
            with torch.cuda.stream(self.side):
                self.back = self.host.to(self.device, non_blocking=True)
                self.ready = self.side.record_event()

    def get(self):
        """The tensor on the GPU; the current stream waits for its copy, and for no other."""
        self.fetch()
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self.ready)
        self.back.record_stream(now)
        return self.back


def hosting(device):
    """How to put a tensor of this device into host memory; None where it lies there already."""
    return Hosted if device.type == "cuda" else None


if __name__ == "__main__":
    arena = Arena(2 ** 22, pinned=torch.cuda.is_available())
    for _ in range(30):
        arena.take(torch.empty(300, 1000))
    rounded = 30 * 2 ** (300 * 1000 * 4 - 1).bit_length()
    print(f"30 tensors of 1.2 MB: {sum(map(len, arena.blocks)) / 1e6:.1f} MB in blocks, "
          f"{rounded / 1e6:.1f} MB one by one")
