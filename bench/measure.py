"""bench.measure: how a GPU is timed, and how a table of timings is kept.

The candidates of a row get the same tensors and take turns, A B C A B C ..., each warmed up before;
the median of at least 5 turns counts. Before each turn a gigabyte is overwritten: the tensors
leave the cache, and while the GPU is busy with that, Python queues the candidate, so that no launch
is waited for. Percentages are of two ceilings measured first in the same run: a copy of a gigabyte,
and a bf16 product of 8192³. A candidate that cannot run says why in its cell.

A table is a generator of rows. It has a time of its own and stops between two rows when that is
used up, saying so. Each row is written at once: a call that is cut off loses nothing.

On a CPU everything runs once, on toy sizes: a rehearsal of the code, no measurement.
Alone: `python -m bench.measure` prints the two ceilings.
"""

import gc
import json
import math
import statistics
import time
from functools import partial

import torch

GPU = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
# what one candidate may fail with while the others run: not built in, not supported, no memory,
# not compiled, another version's signature
FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
CEILING = {"copy": math.nan, "GEMM": math.nan}          # GB/s and TFLOP/s


def pick(real, toy):
    return real if GPU else toy


def random(*shape, grad=False):
    return torch.randn(shape, device=DEVICE).to(HALF).requires_grad_(grad)


def compiled(f):
    """torch.compile, reset first: after eight shapes of one function it would run eagerly."""
    torch.compiler.reset()
    return torch.compile(f, dynamic=False) if GPU else f


def short(error):
    """An error in one cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    first = (str(error).strip() or "-").splitlines()[0]
    return f"{type(error).__name__}: {first[:60]}"


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


def race(candidates, turns=7, warm=3, flush=True):
    """{name: median milliseconds, or why there is none} of {name: function}."""
    trash = torch.empty(pick(2 ** 28, 1) if flush else 0, device=DEVICE)
    found, times = dict.fromkeys(candidates), {}
    for name, run in candidates.items():
        try:
            for _ in range(pick(warm, 1)):
                clock(run)
            times[name] = []
        except FAILURES as error:
            found[name] = short(error)
    for _ in range(pick(turns, 1)):
        for name in times:
            trash.zero_()
            times[name].append(clock(candidates[name]))
    return found | {name: statistics.median(taken) for name, taken in times.items()}


def with_gradients(f, inputs, upstream):
    """(output, gradients) of f(*inputs). upstream: a list of one, the gradient of the output; into
    an empty one goes noise of the output's shape."""
    out = f(*inputs)
    if not upstream:
        upstream.append(random(*out.shape))
    leaves = [t for t in inputs if t.requires_grad]
    return out, *torch.autograd.grad(out, leaves, upstream[0].to(out.dtype))


def both_ways(candidates):
    """("forward" or "both", race) of {name: (function, inputs)}: without and with gradients."""
    yield "forward", race({name: partial(f, *x) for name, (f, x) in candidates.items()})
    runs = {}
    for name, (f, x) in candidates.items():
        runs[name] = partial(with_gradients, f, [t.detach().requires_grad_() for t in x], [])
    yield "both", race(runs)


def speeds(amount, found, ceiling):
    """GB/s of an amount of bytes, or TFLOP/s of thousands of operations, and ours in percent."""
    fast = {name: round(amount / ms / 1e6, 2) if isinstance(ms, float) else ms
            for name, ms in found.items()}
    first = next(iter(fast.values()))
    return fast | ({f"% of {ceiling}": round(100 * first / CEILING[ceiling])}
                   if isinstance(first, float) else {})


def peak(run):
    """GB at the peak of a run above what was there before."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 2)


def ceilings():
    side, size = pick((8192, 2 ** 29), (64, 2 ** 10))
    a, b, x, y = random(side, side), random(side, side), *random(2, size)
    for _ in range(pick(20, 1)):                # clocks climb from idle
        a @ b
    found = race({"copy": lambda: y.copy_(x), "GEMM": lambda: a @ b}, flush=False)
    CEILING["copy"] = 2 * x.nbytes / found["copy"] / 1e6
    CEILING["GEMM"] = 2 * side ** 3 / found["GEMM"] / 1e9
    yield {"copy GB/s": round(CEILING["copy"], 2), "GEMM TFLOP/s": round(CEILING["GEMM"], 2)}


def report(table, seconds, folder, machine):
    """One table, printed and written row by row; False if something of ours failed."""
    print(f"\n{table.__name__}: {' '.join((table.__doc__ or '').split())}")
    torch.manual_seed(0)
    rows, start, good = [], time.perf_counter(), True
    try:
        for row in table():
            rows.append(row)
            good &= row.get("ok", True) and not isinstance(row.get("ours"), str)
            print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                            for k, v in row.items() if k != "losses"), flush=True)
            took = time.perf_counter() - start
            if took > seconds:
                rows.append({"stopped": f"its {seconds} seconds are used up"})
                print(rows[-1]["stopped"])
            (folder / f"{table.__name__}.json").write_text(json.dumps(
                {**machine, **CEILING, "seconds": round(took, 1), "rows": rows}, indent=1) + "\n")
            if took > seconds:
                break
    except FAILURES as error:                   # the other tables are still worth having
        print(f"{table.__name__} failed: {short(error)}")
        good = False
    gc.collect()
    torch.cuda.empty_cache()
    return good


if __name__ == "__main__":
    print(torch.cuda.get_device_name() if GPU else "no GPU here: toy sizes, no measurement")
    for row in ceilings():
        print(row)
