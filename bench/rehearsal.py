"""bench.rehearsal: the plan of `--gpu` without a GPU, with failures planted.

Each architecture gets the plan's tables on bench/dry.py: every kernel is compiled and launched, and
nothing is computed. Ten candidates fail, five of ours and five baselines, in each way that a GPU
has. Each must be reported in its own cell and nowhere else, and all other rows must be there.
"""

from bench.plan import run_plan, Setting

# table, row, candidate, how it fails
PLANTED = (
    ("correctness", "rms_norm, bf16", "ours", "resources"),
    ("correctness", "rope, fp32", "ours", "ptxas"),
    ("step", "stage 1, ours, none", "ours, none", "out of memory"),
    ("attention", "CLIP, forward", "ours", "illegal access"),
    ("elementwise", "SwiGLU, forward", "ours", "hang"),
    ("elementwise", "LayerNorm, forward", "compile", "resources"),
    ("elementwise", "RoPE, q and k, both", "compile", "ptxas"),
    ("step", "stage 2, transformers, checkpointing", "transformers, checkpointing",
     "out of memory"),
    ("attention", "Q-Former, forward", "flash", "illegal access"),
    ("generate", "transformers, batch 8", "transformers 1", "hang"))
KINDS = ("resources", "ptxas", "illegal access", "hang", "out of memory")
# what the cell must say
WORDS = {"resources": "OutOfResources", "ptxas": "PTXASError", "hang": "hang",
         "illegal access": "illegal memory access", "out of memory": "OOM"}


def compare(planted, report):
    """(planted failures that nobody reported, failures that nobody planted), as lines."""
    found = [*report.failed, *report.baselines]
    silent = []
    for table, row, candidate, kind in planted:
        mine = [f for f in found if (f["table"], f.get("row")) == (table, row)
                and WORDS[kind] in f["why"]]
        if not mine:
            silent.append(f"{table}, {row}, {candidate}: {kind}")
        found = [f for f in found if f not in mine]
    strange = [f"{f['table']}, {f.get('row', '')}: {f['why']}" for f in [*found, *report.missing]]
    return silent, strange


def rehearse(tables, out, architectures, kinds, stall, seconds):
    """Run the tables for each architecture. Exit status: 1 if anything failed, planted or not."""
    names, status = [table.name for table in tables], 0
    for sm in architectures:
        planted = [p for p in PLANTED if p[0] in names and p[3] in kinds]
        print(f"\nrehearsal for sm_{sm}: {len(planted)} failures are planted")
        setting = Setting("dry", out / f"sm_{sm}", stall, sm, tuple(planted))
        report = run_plan(tables, setting, seconds, ahead=seconds)
        report.show()
        silent, strange = compare(planted, report)
        for title, lines in (("planted and not reported", silent), ("not planted", strange)):
            for line in lines:
                print(f"{title}: {line}")
        print(f"sm_{sm}: {len(planted) - len(silent)} of {len(planted)} planted failures reported, "
              f"{len(strange)} others")
        status |= bool(planted or strange)
    return status
