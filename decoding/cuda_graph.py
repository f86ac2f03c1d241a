"""TODO"""

import functools

import torch

from formats.errors import UserError
from kernels.launch import SPEC


class DecodeStep:
    """One token more in every row: a step that is the same every time, to the address.

        token (B, 1) -> embed -> blocks -> head -> choose --+
          ^                        |                        |      place (B, 1), the cache's at
          |              writes place `at`, reads           |      and end, the dice's number: + 1
          |              what lies before `end`             |
          +-------------------------------------------------+

    A 7B step is 14 launches a layer and 30 around the layers, 480 in all (counted in the code). A
    GPU that gets them one by one waits for the host, which says with each where the cache ends.
    Here all that changes lies in tensors that the step itself moves on. So a GPU is told once what
    to do, in a CUDA graph; from then on a token is one call, and a text writes itself without a
    word from the host."""

    def __init__(self, llm, memory, choose, token, place):
        """After the prompt: token (B, 1) chosen from its logits, place (B, 1) in its text."""
        memory.hold()
        self.llm, self.memory, self.choose = llm, memory, choose
        self.token, self.place = token.clone(), place.clone()

    def __call__(self):
        # a row that is damaged says -1 from then on, and reads some token: nobody looks at it
        new = self.choose(self.llm.next_logits(self.token.clamp(min=0), self.memory, self.place))
        self.token.copy_(new[:, None])
        self.place += 1


WARMUP_STEPS = 3           # steps run before one is recorded: they compile all that is launched, and the
                    # answer of a word or two is over by then


def capture(step, side):
    """The CUDA graph of step(), which has run before: the first time kernels are compiled. side: a
    stream, on which nothing else runs. Raises data.Failure."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # nothing runs: it is written down; other threads (a loader's) may go on meanwhile
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        torch.cuda.set_stream(here)
        raise
    except RuntimeError as error:
        # quirk: after an error torch.cuda.graph stays on its stream, and hides the step's own error
        torch.cuda.set_stream(here)
        error = error.__context__ or error
        raise UserError("a step cannot be recorded as a CUDA graph "
                           f"({str(error).strip().splitlines()[0]}): set KERNELS=spec in the "
                           "environment, which is slow, and report this") from None
    return graph


@functools.cache
def capture_stream(device):
    """The stream to record on: one a device, for PyTorch keeps cuBLAS's scratch for each."""
    return torch.cuda.Stream(device)


def decode_graph(llm, x, attention_mask, memory, choose, count):
    """`one_by_one`'s ids by `Step`, recorded once and replayed; with KERNELS=spec, only run.

    The host reads a step's ids while the next is running, so the GPU never waits for it:

        GPU     step 4 | step 5 | step 6 | step 7        host   reads 4 | reads 5 | reads 6

    At an end one step has run for nothing. Raises as `record` does."""
    lengths, position_ids = attention_mask.sum(1, keepdim=True), (attention_mask.cumsum(1) - 1).clamp(min=0)
    step = DecodeStep(llm, memory, choose, choose(llm.next_logits(x, memory, position_ids, attention_mask))[:, None],
                lengths)
    yield step.token[:, 0].tolist()
    side, here = capture_stream(x.device), torch.cuda.current_stream(x.device)
    eager = count if SPEC else min(count, WARMUP_STEPS)
    for _ in range(1, eager):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            step()
        here.wait_stream(side)
        yield step.token[:, 0].tolist()
    if eager == count:
        return
    graph, told = capture(step, side), torch.empty(2, len(x), dtype=torch.long).pin_memory()
    there = torch.cuda.Event(), torch.cuda.Event()
    for n in range(eager, count + 1):
        if n < count:
            graph.replay()
            told[n % 2].copy_(step.token[:, 0], non_blocking=True)
            there[n % 2].record(here)
        if n > eager:
            there[(n - 1) % 2].synchronize()
            yield told[(n - 1) % 2].tolist()
