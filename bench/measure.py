"""bench.measure: how a GPU is timed, and what happens when a candidate fails.

The candidates of a row get the same tensors and take turns, A B C A B C ..., each warmed up before;
the median of at least 5 turns counts. Before each turn a gigabyte is overwritten: the tensors
leave the cache, and while the GPU is busy with that, Python queues the candidate, so that no launch
is waited for. Percentages are of two ceilings measured first in the same run: a copy of a gigabyte,
and a bf16 product of 8192³.

A candidate that fails says why in its cell, and the others go on: an operation that is missing, a
kernel that does not compile or needs more than the GPU has, memory that runs out. After an illegal
access nothing runs any more in this process: it ends, and bench/plan.py starts another one, which
leaves that candidate out. So does a candidate that never returns.

Three modes. gpu: as said. toy: on a CPU everything runs once, in toy sizes. dry: the kernels are
compiled and launched on a GPU that is not there (bench/dry.py). The last two measure nothing.
Alone: `python -m bench.measure` prints the two ceilings.
"""

import gc
import math
import os
import statistics
import time
from functools import partial

import torch

from formats.errors import UserError

try:
    from triton import TritonError
except ModuleNotFoundError:
    TritonError = ImportError

MODE = os.environ.get("BENCH_MODE", "gpu" if torch.cuda.is_available() else "toy")
GPU, DRY = MODE == "gpu", MODE == "dry"
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.float32 if MODE == "toy" else torch.bfloat16
# what one candidate may fail with while the others run: not built in, not supported, no memory,
# not compiled (a TritonError is no RuntimeError), another version's signature
FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError,
            LookupError, OSError, TritonError, UserError)
CEILING = {"copy": math.nan, "GEMM": math.nan}          # GB/s and TFLOP/s
DEAD = 70                               # exit status: after this error nothing runs in the process


class Worker:
    """This process, as bench/plan.py sees it.

    say: called with a dict before and after all that may not return. row: the row being made.
    excused: {(row, candidate): why it is left out}. planted: what bench/dry.py lets fail."""
    row, excused, planted = "", {}, None

    @staticmethod
    def say(line):
        """Nobody listens."""


worker = Worker()


def pick(real, toy, dry=None):
    """A size: on a GPU, on a CPU, and where kernels are compiled for a GPU that is not there: there
    whatever a kernel is compiled for must be as on the GPU."""
    if GPU:
        return real
    return dry if DRY and dry is not None else toy


def random(*shape, grad=False, dtype=None):
    return torch.randn(shape, device=DEVICE).to(dtype or HALF).requires_grad_(grad)


def compiled(f):
    """torch.compile, reset first: after eight shapes of one function it would run eagerly."""
    torch.compiler.reset()
    return torch.compile(f, dynamic=False) if GPU else f


# ------------------------------------------------------------------------------ what may fail

class Failed(Exception):
    """Why a candidate has no figure; the text of its cell."""


def short(error):
    """An error in one cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    lines = str(error).strip().splitlines() or ["-"]
    return f"{type(error).__name__}: {lines[0][:90]}"


def synchronize():
    """Wait for the GPU: what failed on it is raised here at the latest."""
    if GPU or DRY:
        torch.cuda.synchronize()


def recover(why):
    """Give back what a failed candidate held. If the GPU does not answer any more, end here."""
    gc.collect()
    try:
        synchronize()
        if GPU or DRY:
            torch.cuda.empty_cache()
    except RuntimeError:
        worker.say({"dead": why})
        os._exit(DEAD)                  # not sys.exit: destructors would call the GPU


def attempt(candidate, run, clean=None):
    """run(), of one candidate of the row; Failed if it cannot. clean(): drops what it left."""
    if (worker.row, candidate) in worker.excused:
        raise Failed(worker.excused[worker.row, candidate])
    worker.say({"candidate": candidate})
    try:
        if worker.planted:
            worker.planted(candidate)
        result = run()
        synchronize()
    except FAILURES as error:
        why = short(error)
        error.__traceback__ = None      # its frames hold tensors
    else:
        worker.say({"candidate": None})
        return result
    if clean:
        clean()
    recover(why)
    worker.say({"candidate": None})
    raise Failed(why)


def clock(run):
    """Milliseconds of one turn."""
    start = time.perf_counter()
    if GPU:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
    run()
    if GPU:
        end.record()
        torch.cuda.synchronize()
    return begin.elapsed_time(end) if GPU else 1000 * (time.perf_counter() - start)


def race(candidates, turns=7, warm=3, flush=True, clean=None):
    """{name: median milliseconds, or why there is none} of {name: function}."""
    trash = torch.empty(pick(2 ** 28, 1) if flush else 0, device=DEVICE)
    found, times = dict.fromkeys(candidates), {name: [] for name in candidates}

    def warm_up(run):
        for _ in range(pick(warm, 1)):
            clock(run)

    def turn(name):
        trash.zero_()
        times[name].append(clock(candidates[name]))

    for name, run in candidates.items():
        try:
            attempt(name, partial(warm_up, run), clean)
        except Failed as why:
            found[name] = str(why)
            del times[name]
    for _ in range(pick(turns, 1)):
        for name in list(times):
            try:
                attempt(name, partial(turn, name), clean)
            except Failed as why:
                found[name] = str(why)
                del times[name]
    return found | {name: statistics.median(taken) for name, taken in times.items()}


# ---------------------------------------------------------------------------- what is measured

def with_gradients(f, inputs, upstream):
    """(output, gradients) of f(*inputs). upstream: a list of one, the gradient of the output; into
    an empty one goes noise of the output's shape."""
    out = f(*inputs)
    if not upstream:
        upstream.append(random(*out.shape, dtype=out.dtype))
    leaves = [t for t in inputs if t.requires_grad]
    return out, *torch.autograd.grad(out, leaves, upstream[0].to(out.dtype))


def one_way(candidates):
    """The race of {name: (function, inputs)} without gradients."""
    return race({name: partial(f, *x) for name, (f, x) in candidates.items()})


def both_ways(candidates):
    """The race of {name: (function, inputs)} with gradients."""
    runs = {}
    for name, (f, x) in candidates.items():
        runs[name] = partial(with_gradients, f, [t.detach().requires_grad_() for t in x], [])
    return race(runs)


def speeds(amount, found, ceiling):
    """GB/s of an amount of bytes, or TFLOP/s of thousands of operations, and ours in percent."""
    fast = {name: round(amount / ms / 1e6, 2) if isinstance(ms, float) else ms
            for name, ms in found.items()}
    first = next(iter(fast.values()))
    if isinstance(first, float) and CEILING[ceiling] == CEILING[ceiling]:
        fast[f"% of {ceiling}"] = round(100 * first / CEILING[ceiling])
    return fast


def peak(run):
    """GB at the peak of a run above what was there before."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def ceilings():
    """The copy of a gigabyte and the product that percentages refer to."""
    def measured():
        side, size = pick((8192, 2 ** 29), (64, 2 ** 10))
        a, b, x, y = random(side, side), random(side, side), *random(2, size)
        for _ in range(pick(20, 1)):                # clocks climb from idle
            a @ b
        found = race({"copy": lambda: y.copy_(x), "GEMM": lambda: a @ b}, flush=False)
        speed = {"copy GB/s": 2 * x.nbytes / 1e6, "GEMM TFLOP/s": 2 * side ** 3 / 1e9}
        return {name: round(amount / ms, 2) if isinstance(ms, float) else ms
                for (name, amount), ms in zip(speed.items(), found.values())}
    yield "ceilings", measured


if __name__ == "__main__":
    print(torch.cuda.get_device_name() if GPU else "no GPU here: toy sizes, no measurement")
    for _, measured in ceilings():
        print(measured())
