"""bench: the kernels against what people use, in one call of ten minutes.

    python -m bench                     all tables, on the GPU that is here
    python -m bench attention decode    some of them
    python -m bench --cpu               tokens and training steps a second on one core, beside
                                        transformers, in turns
    python -m bench --rehearse          every table in toy sizes, on a CPU too: its figures mean
                                        nothing, but the code has run

Without a GPU it says so, compiles every kernel for sm_80 and sm_90 instead, and prints what the
machine code looks like (tests/compiled.py). How is measured: bench/measure.py. Tables go to
runs/bench/<table>.json (--out: to another folder), correctness first. Exit status 1 if anything of
ours was wrong or did not run.

    bench/kernels.py    one operation, beside PyTorch's and others' form of it
    bench/models.py     a training step and generation at 7B, beside transformers
    bench/cpu.py        the toy and a 160M model on one core, beside transformers
"""
import argparse
import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# {table: (file of bench/, seconds)}; what compiles longest comes last
ON_GPU = {"ceilings": ("measure", 15), "correctness": ("kernels", 60),
          "attention": ("kernels", 100), "elementwise": ("kernels", 60), "head": ("kernels", 25),
          "decode": ("kernels", 25), "optimizer": ("kernels", 30), "curves": ("kernels", 25),
          "generate": ("models", 80), "step": ("models", 120)}
ON_CPU = {"cpu_step": ("cpu", 600), "cpu_quantize": ("cpu", 60), "cpu_generate": ("cpu", 3000)}


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m bench",
                                description="The kernels against what people use.")
    p.add_argument("tables", nargs="*", help=", ".join(ON_GPU))
    p.add_argument("--cpu", action="store_true",
                   help=f"on one core, beside transformers: {', '.join(ON_CPU)}")
    p.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU too")
    p.add_argument("--out", type=Path, default=ROOT / "runs/bench",
                   help="folder of the tables (default: runs/bench)")
    args = p.parse_args(argv)
    args.plan = ON_CPU if args.cpu else ON_GPU
    unknown = set(args.tables) - set(args.plan)
    if unknown:
        p.error(f"no table {', '.join(sorted(unknown))}")
    return args


def main(args):
    """Run the tables; returns an exit status."""
    import torch

    from bench import measure
    if args.cpu:
        torch.set_num_threads(1)
    elif not measure.GPU and not args.rehearse:
        print("No GPU here: nothing is timed. What the compiler makes of the kernels:", flush=True)
        return subprocess.run([sys.executable, ROOT / "tests/compiled.py"]).returncode
    device = "a CPU, rehearsal"
    if args.cpu:
        device = "one core of a CPU"
    elif measure.GPU:
        device = torch.cuda.get_device_name()
    machine = {"device": device, "torch": torch.__version__}
    print(*machine.values())
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name, (file, seconds) in args.plan.items():
        # the ceilings come always: the percentages of the others are of them
        if args.tables and name != "ceilings" and name not in args.tables:
            continue
        table = getattr(importlib.import_module(f"bench.{file}"), name)
        results.append(measure.report(table, seconds, args.out, machine))
    return int(not all(results))


if __name__ == "__main__":
    args = parse()                      # before torch is imported: --help answers at once
    sys.exit(main(args))
