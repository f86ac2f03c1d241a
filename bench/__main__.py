"""bench: the kernels against what people use, in one call of ten minutes.

    python -m bench                     all tables, on the GPU that is here
    python -m bench attention decode    some of them
    python -m bench --cpu               tokens and training steps a second on one core,
                                                beside transformers, in turns
    python -m bench --rehearse          every table in toy sizes, on a CPU too: no figure
                                                of it means anything, but the code has run

Without a GPU it says so, compiles every kernel for sm_80 and sm_90 instead, and prints what the
machine code looks like (tests/compiled.py). How is measured: bench/measure.py. Tables go to
bench/results/<table>.json (--out: to another folder), correctness first. Exit status 1 if
anything of ours was wrong or did not run.

Some tables run whole models, texts and training steps; what they import lies above kernels/ and
imports it. They do so inside their functions: nobody imports this file, so there is no circle, and
what is above is not needed for the others.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from bench.cpu import cpu_generate, cpu_quantize, cpu_step
from bench.kernels import attention, correctness, curves, decode, elementwise, head, optimizer, ROOT
from bench.measure import ceilings, GPU, report
from bench.models import generate, step

# seconds of each; what compiles longest comes last
TABLES = {ceilings: 15, correctness: 60, attention: 100, elementwise: 60, head: 25, decode: 25,
          optimizer: 30, curves: 25, generate: 80, step: 120}

ON_CPU = {cpu_step: 600, cpu_quantize: 60, cpu_generate: 3000}

if __name__ == "__main__":
    ask = argparse.ArgumentParser(description="the kernels against what people use")
    ask.add_argument("tables", nargs="*", help=", ".join(t.__name__ for t in TABLES))
    ask.add_argument("--cpu", action="store_true", help="on one core, beside transformers")
    ask.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU too")
    ask.add_argument("--out", type=Path, default=ROOT / "bench/results")
    asked = ask.parse_args()
    TABLES = ON_CPU if asked.cpu else TABLES
    if unknown := set(asked.tables) - {t.__name__ for t in TABLES}:
        ask.error(f"no table {', '.join(sorted(unknown))}")
    if asked.cpu:
        torch.set_num_threads(1)
    elif not GPU and not asked.rehearse:
        print("No GPU here: nothing is timed. What the compiler makes of the kernels:", flush=True)
        sys.exit(subprocess.run([sys.executable, ROOT / "tests/compiled.py"]).returncode)
    machine = {"device": "one core of a CPU" if asked.cpu else
               torch.cuda.get_device_name() if GPU else "a CPU, rehearsal",
               "torch": torch.__version__}
    print(*machine.values())
    asked.out.mkdir(parents=True, exist_ok=True)
    results = [report(table, seconds, asked.out, machine) for table, seconds in TABLES.items()
               if not asked.tables or table is ceilings or table.__name__ in asked.tables]
    sys.exit(not all(results))
