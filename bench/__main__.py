"""bench: the kernels against what people use, in one call of nine minutes.

    python -m bench --gpu               all tables, on the GPU that is here
    python -m bench --gpu --budget 240  preflight, correctness and a 7B step of each stage
    python -m bench --gpu attention     some of the tables, behind the preflight
    python -m bench --rehearse          the same plan for an A100 and an H100 that are not here:
                                        every kernel is compiled and launched, nothing computed, and
                                        ten failures are planted, of ours and of baselines
    python -m bench --toy               every table in toy sizes on a CPU: its figures mean nothing,
                                        but the code has run
    python -m bench --cpu               tokens and training steps a second on one core, beside
                                        transformers, in turns
    python -m bench                     --gpu where there is one; elsewhere every kernel is compiled
                                        for sm_80 and sm_90 and its machine code judged

Half of the baselines need transformers: pip install -r tests/requirements.txt. Each table runs in
a process of its own (bench/plan.py); a row is written to runs/bench/<table>.json when it is made,
and report.json says what failed and what was not run. Exit status: 1 if anything of ours was wrong
or did not run, 2 if there is no GPU that can be used.

    bench/preflight.py    is there a GPU that can be used?
    bench/correctness.py  every kernel against fp64
    bench/models.py       a training step and generation at 7B, beside transformers
    bench/kernels.py      one operation, beside PyTorch's and others' form of it
    bench/cpu.py          the toy and a 160M model on one core, beside transformers
    bench/tricks.py       what each way to save memory saves and costs, on one core
    bench/qlora.py        the toy's loss with LoRA beside frozen weights of five kinds
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.plan import BUDGET, ON_CPU, ON_GPU, ROOT, run_plan, Setting, STALL
from bench.rehearsal import KINDS, rehearse

HOURS = 4 * 3600                        # where nobody waits for a lent GPU


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m bench",
                                description="The kernels against what people use.")
    p.add_argument("tables", nargs="*", help=", ".join(table.name for table in ON_GPU))
    how = p.add_mutually_exclusive_group()
    how.add_argument("--toy", action="store_true", help="toy sizes, on a CPU")
    how.add_argument("--cpu", action="store_true", help="on one core, beside transformers: "
                     f"{', '.join(table.name for table in ON_CPU)}")
    p.add_argument("--gpu", action="store_true", help="stop if there is no GPU")
    p.add_argument("--rehearse", action="store_true",
                   help="without a GPU: compile, launch, and fail where it is planted")
    p.add_argument("--plant", nargs="*", choices=("none", *KINDS), default=list(KINDS),
                   metavar="KIND",
                   help=f"of --rehearse: none, or {', '.join(KINDS)} (default: all)")
    p.add_argument("--sm", type=int, nargs="*", choices=(80, 90), default=[80, 90],
                   help="of --rehearse: the architectures (default: 80 90)")
    p.add_argument("--budget", type=int, default=BUDGET,
                   help=f"seconds in all; at 240 preflight, correctness and step, at 120 one step "
                        f"(default: {BUDGET})")
    p.add_argument("--stall", type=int, default=STALL,
                   help=f"seconds of silence after which a process is killed (default: {STALL})")
    p.add_argument("--out", type=Path, default=ROOT / "runs/bench",
                   help="folder of the tables (default: runs/bench)")
    args = p.parse_args(argv)
    if args.cpu and (args.gpu or args.rehearse) or args.toy and (args.gpu or args.rehearse):
        p.error("--toy and --cpu go with neither --gpu nor --rehearse")
    if args.budget < 60 or args.stall < 1:
        p.error("--budget is from 60 seconds on, --stall from 1 on")
    plan = ON_CPU if args.cpu else ON_GPU
    unknown = set(args.tables) - {table.name for table in plan}
    if unknown:
        p.error(f"no table {', '.join(sorted(unknown))}; there are "
                f"{', '.join(table.name for table in plan)}")
    args.plan = [table for table in plan if chosen(table, args)]
    return args


def chosen(table, args):
    """Is the table run? The preflight always: the percentages are of its ceilings."""
    if args.tables:
        return table.name in (*args.tables, "preflight", "cpu_machine")
    return args.cpu or table.least <= args.budget


def without_gpu(args):
    """What `python -m bench` does on a machine whose GPU PyTorch does not find; None: it does."""
    import torch

    from bench.preflight import no_gpu, nvidia_smi
    why = no_gpu(torch)
    if why is None:
        return None
    if nvidia_smi():                    # a GPU is here: do not spend its time on compilations
        print("error:", why, file=sys.stderr)
        return 2
    print("No GPU here: nothing is timed. What the compiler makes of the kernels:", flush=True)
    return subprocess.run([sys.executable, ROOT / "tests/compiled.py"]).returncode


def main(args):
    """Run the tables; returns an exit status."""
    if args.rehearse:
        with tempfile.TemporaryDirectory() as cache:        # an old cache would hide a failure
            os.environ["TRITON_CACHE_DIR"] = cache
            kinds = [kind for kind in args.plant if kind != "none"]
            return rehearse(args.plan, args.out, args.sm, kinds, args.stall, HOURS)
    if args.toy or args.cpu:
        setting = Setting("toy" if args.toy else "cpu", args.out, HOURS)
        report = run_plan(args.plan, setting, HOURS)
    else:
        status = None if args.gpu else without_gpu(args)
        if status is not None:
            return status
        report = run_plan(args.plan, Setting("gpu", args.out, args.stall), args.budget, ahead=90)
    if report.stop:
        print("error:", report.stop, file=sys.stderr)
        return 2
    report.show()
    return int(bool(report.failed))


if __name__ == "__main__":
    args = parse()                      # before torch is imported: --help answers at once
    sys.exit(main(args))
