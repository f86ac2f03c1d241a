"""decoding/cuda_graph.py: on a GPU one decoding step is captured and replayed for each token.

A 7B step is 14 kernel launches a layer and 30 around the layers, 480 in all (counted in the code).
Launched one by one they take longer on the host than on the GPU. A CUDA graph is one launch, but
it repeats exactly the same kernels on the same addresses, so a step may not depend on a number
that the host holds. `DecodeStep` keeps all that changes in tensors and updates them itself.

A captured step is kept for the next answer: where the batch, the room in the cache and the sampler
are the same, and the weights lie where they lay, the new prompt's cache is copied into the old
buffers and the graph is replayed from the second token on. One is kept for each model, and none
whose cache is larger than KEPT_BYTES: the old buffers and the new prompt's are there at once."""

import functools
import weakref

import torch

from formats.errors import UserError
from kernels.launch import SPEC
from llama import KVCache

WARMUP_STEPS = 3    # steps before the capture: they compile the kernels, and an answer of a word or
                    # two has ended by then
KEPT_BYTES = 2 ** 30
KEPT = weakref.WeakKeyDictionary()      # llm -> (key, step, graph), while no answer uses them


class StaticCache(KVCache):
    """A KV cache, after the prompt, whose length lives on the GPU, so that every step has the same
    shapes and addresses: one token at a time goes to row `at` (1,), and update() returns the whole
    buffer, of which sample b sees the first `end[b]` rows."""

    def __init__(self, cache):
        """cache: a KVCache, whose memory this one uses from here on."""
        self.k, self.v, self.attention_mask = cache.k, cache.v, cache.attention_mask
        batch, device = self.k.shape[1], self.k.device
        self.at = torch.full((1,), cache.length, device=device)
        self.end = torch.full((batch,), cache.length + 1, dtype=torch.int32, device=device)
        self.length = None                          # the host does not know it any more

    def refill(self, cache):
        """The content of another KVCache, after its prompt, at the same addresses."""
        T = cache.length
        self.k[:, :, :T].copy_(cache.k[:, :, :T])
        self.v[:, :, :T].copy_(cache.v[:, :, :T])
        if self.attention_mask is not None:
            self.attention_mask.copy_(cache.attention_mask)
        self.at.fill_(T)
        self.end.fill_(T + 1)

    def update(self, layer, k, v):
        """Store (B, 1, G, D) at row `at`; returns the whole buffer. Raises if there are more."""
        self.k[layer].index_copy_(1, self.at, k)
        self.v[layer].index_copy_(1, self.at, v)
        return self.k[layer], self.v[layer]

    def advance(self, T):
        self.at += T
        self.end += T


class DecodeStep:
    """One token more in every row: every time the same kernels, shapes and addresses.

        token (B, 1) -> embed -> blocks -> head -> sampler -+
          ^                        |                        |      position (B, 1), the cache's `at`
          |              writes row `at` of the cache,      |      and `end`, the sampler's step:
          |              reads the rows before `end`        |      each + 1
          +-------------------------------------------------+
    """

    def __init__(self, llm, cache, sampler, token, position):
        """After the prompt: token (B, 1) chosen from its logits, position (B, 1) in its text."""
        self.llm, self.cache, self.sampler = llm, StaticCache(cache), sampler
        self.token, self.position = token.clone(), position.clone()

    def restart(self, llm, cache, sampler, token, position):
        """Another answer on the same addresses; the arguments of `DecodeStep`, of equal shapes."""
        self.llm = llm
        self.cache.refill(cache)
        for name in ("u", "seen", "step"):
            if getattr(sampler, name) is not None:
                getattr(self.sampler, name).copy_(getattr(sampler, name))
        self.token.copy_(token)
        self.position.copy_(position)

    def __call__(self):
        # -1 means that a row's logits were NaN: the caller stops at it, here it needs a valid id
        ids = self.token.clamp(min=0)
        new = self.sampler(self.llm.next_logits(ids, self.cache, self.position))    # (B,)
        self.token.copy_(new[:, None])
        self.position += 1


def capture(step, stream):
    """The CUDA graph of step(). step has run before: the first run compiles its kernels.

    stream: one on which nothing else runs. Raises UserError."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # kernels are written down and not run; other threads (a data loader's) may go on meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        torch.cuda.set_stream(current)
        raise
    except RuntimeError as error:
        # quirk: after an error torch.cuda.graph stays on its stream, and hides the step's own error
        torch.cuda.set_stream(current)
        reason = str(error.__context__ or error).strip().splitlines()[0]
        raise UserError(f"a step cannot be recorded as a CUDA graph ({reason}): set KERNELS=spec "
                        "in the environment, which is slow, and report this") from None
    return graph


def graph_key(llm, cache, sampler):
    """What a captured step depends on, but for the content of the tensors that `restart` fills."""
    places = [t.data_ptr() for t in (*llm.parameters(), *llm.buffers())]
    shapes = []
    for t in (cache.k, cache.attention_mask, sampler.u, sampler.seen):
        shapes.append(None if t is None else (t.shape, t.dtype, t.device))
    return places, shapes, sampler.settings, sampler.penalty


@functools.cache
def capture_stream(device):
    """The stream to capture on: one a device, because PyTorch keeps cuBLAS's workspace for each."""
    return torch.cuda.Stream(device)


def can_capture(x):
    """Does decoding from x go by a CUDA graph? Not under FSDP: it gathers weights on a stream of
    its own, which a graph cannot capture."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return x.is_cuda and not distributed


def decode_graph(llm, x, attention_mask, cache, sampler, count):
    """The ids of generate.decode_steps, by a captured `DecodeStep`; with KERNELS=spec not captured.

    The host reads a step's ids while the next step is running, so the GPU never waits for it:

        GPU     step 4 | step 5 | step 6 | step 7        host   reads 4 | reads 5 | reads 6

    When all answers have ended, one step has run for nothing. Raises as `capture` does."""
    lengths = attention_mask.sum(1, keepdim=True)                           # (B, 1)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)              # (B, T)
    first = sampler(llm.next_logits(x, cache, position_ids, attention_mask))
    start, key = (llm, cache, sampler, first[:, None], lengths), graph_key(llm, cache, sampler)
    # taken out while it is used: two answers that take turns must not share buffers
    kept, step, graph = KEPT.pop(llm, (None, None, None))
    if SPEC or kept != key:
        step = graph = None             # its memory goes before the new one's comes
        step = DecodeStep(*start)
    else:
        step.restart(*start)
    del start, cache, sampler           # of a kept step it has its own
    yield step.token[:, 0].tolist()

    stream, current = capture_stream(x.device), torch.cuda.current_stream(x.device)
    warmup = 1 if graph else min(count, WARMUP_STEPS)
    if SPEC:
        warmup = count
    for _ in range(1, warmup):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        yield step.token[:, 0].tolist()
    if warmup == count:
        return

    graph = graph or capture(step, stream)
    try:
        yield from replayed_ids(step, graph, warmup, count, current)
    finally:
        if 2 * step.cache.k.nbytes <= KEPT_BYTES:
            step.llm = None             # or the model would never be freed
            KEPT[llm] = key, step, graph


def replayed_ids(step, graph, warmup, count, current):
    """The ids of steps `warmup` to count - 1, a list of B each, from replays of the graph.

    current: the stream that they run on."""
    # two buffers on the host: one is read while the GPU copies into the other
    ids = torch.empty(2, len(step.token), dtype=torch.long).pin_memory()
    copied = torch.cuda.Event(), torch.cuda.Event()
    for n in range(warmup, count + 1):
        if n < count:
            graph.replay()
            ids[n % 2].copy_(step.token[:, 0], non_blocking=True)
            copied[n % 2].record(current)
        if n > warmup:
            previous = (n - 1) % 2
            copied[previous].synchronize()
            yield ids[previous].tolist()
