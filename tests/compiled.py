"""Compile kernels for GPUs that are not here, and read in the machine code what would be slow.

    python tests/compiled.py                          every kernel module, as a table
    python tests/compiled.py planted --json out.json  the cases of one module, for a test

Triton compiles for any GPU; only running needs one. Each case of a module's compile_cases() is
compiled for sm_80 (A100) and sm_90 (H100, H200), or the one of them that its "sm" names, and
disassembled. Faults:

    shared memory    more than a block may have: 163 KB and 227 KB
    spills           LDL or STL (registers pushed out to memory) in a loop with matrix instructions,
                     or with those that "hot" of a case names; before or after the loop they cost
                     nothing
    no HMMA, HGMMA   a case with "dot": True runs on the tensor cores: mma.sync (HMMA) on sm_80,
                     wgmma (HGMMA) on sm_90. Two exceptions, where sm_90 uses mma.sync as well:
                     num_warps not a multiple of 4 (wgmma needs whole groups of 4 warps), and
                     "dot": "HMMA", by which a case says that its tiles have under 64 rows
    not compiled     an error of the compiler or the assembler
    narrow loads     under three quarters of the bytes that the load instructions name (or the
                     share "wide" that a case gives, with its reason) come 128 bits at a time, or
                     64 in a kernel that reads 8-bit codes: a thread holds
                     the same elements of all tensors, and 8 of bf16 are 128 bits, of codes 64

Run it with PYTHONPATH at another Triton to compile with that one. Exit status 1 if anything fails.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))                  # a spawned worker runs this line too

MODULES = ("attention", "decode", "quantize", "norm", "rope", "swiglu", "cross_entropy", "adamw")
SHARED = {80: 163 * 1024, 90: 227 * 1024}      # bytes a block may have
WIDE_SHARE = 0.75
COUNTS = ("registers", "stack", "spills", "shared", "HMMA", "HGMMA", "wide", "loads")


def loops_with(code, wanted):
    """Indices of the instructions that lie in a loop with an instruction that `wanted` accepts.

    code: [(address, predicated, mnemonic, operands)]. A loop is what can be reached from its
    matrix instruction and reaches it again. Ranges between a backward jump and its target would be
    simpler and wrong: the assembler puts rarely run blocks behind the end."""
    place = {address: i for i, (address, *_) in enumerate(code)}
    target = [place.get(int(m[1], 16)) if (m := re.search(r"0x([0-9a-f]+)\)?$", operands)) else None
              for *_, operands in code]
    jumps = [op.split(".")[0] in ("BRA", "CALL", "BSSY", "WARPSYNC", "UBRA", "JMP")
             and t is not None for (_, _, op, _), t in zip(code, target)]
    starts = sorted({0} | {t for t, jump in zip(target, jumps) if jump}
                    | {i + 1 for i, (_, _, op, _) in enumerate(code[:-1])
                       if jumps[i] or op.split(".")[0] in ("EXIT", "BSYNC", "RET")})
    block = {first: n for n, first in enumerate(starts)}
    ends = [*(s - 1 for s in starts[1:]), len(code) - 1]
    after = []
    for n, end in enumerate(ends):
        _, predicated, op, operands = code[end]
        stem = op.split(".")[0]
        # "BRA P1, 0x..." and "BRA.U !UP0, 0x..." are conditional as "@P1 BRA 0x..." is
        conditional = predicated or "," in operands
        falls = conditional or stem not in ("BRA", "UBRA", "JMP", "EXIT", "RET")
        after.append({n + 1} if falls and n + 1 < len(starts) else set())
        if jumps[end]:
            after[n].add(block[target[end]])
    before = [{m for m in range(len(starts)) if n in after[m]} for n in range(len(starts))]

    def reach(n, edges):
        seen, todo = set(), [*edges[n]]
        while todo:
            if (m := todo.pop()) not in seen:
                seen.add(m)
                todo += edges[m]
        return seen

    inside = set()
    for n, (first, end) in enumerate(zip(starts, ends)):
        if n not in inside and any(wanted(code[i][2]) for i in range(first, end + 1)):
            inside |= reach(n, after) & reach(n, before)
    return {i for n in inside for i in range(starts[n], ends[n] + 1)}


def disassemble(cubin):
    """(registers, stack bytes, code) of a cubin, by the tools that Triton ships."""
    from triton.backends import nvidia
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-sass", "-res-usage", file.name], capture_output=True,
                              text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout + told.stderr)
    code = [(int(a, 16), bool(p), op, rest.strip()) for a, p, op, rest in re.findall(
        r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ )? *([A-Z][\w.]*)([^;/]*);", told.stdout)]
    return int(usage[1]), int(usage[2]), code


def bits(op):
    """How wide a load from global memory is, 0 for anything else."""
    stem, *marks = op.split(".")
    if stem not in ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP"):
        return 0
    if stem[0] == "U":                         # the copy engine: whole tiles
        return 128
    return next((int(m.lstrip("US")) for m in marks if re.fullmatch(r"[US]?(8|16|64|128|256)", m)),
                32)


def examine(case, arch):
    """Compile one case for one architecture; a dict of what was found, with "faults"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import PTXASError
    kernel = case["kernel"]
    missing = set(kernel.arg_names) ^ (set(case["signature"]) | set(case["constexprs"]))
    if missing:
        raise ValueError(f"{case['name']}: arguments {sorted(missing)} are in the kernel or in the "
                         "case, not in both")
    types = {name: case["signature"].get(name, "constexpr") for name in kernel.arg_names}
    sixteen = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if name in case["divisible"]}
    found = dict.fromkeys(COUNTS, 0) | {"name": case["name"], "sm": arch}
    try:
        made = triton.compile(
            ASTSource(kernel, types, constexprs=case["constexprs"], attrs=sixteen),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": case["num_warps"], "num_stages": case["num_stages"],
                     "enable_fp_fusion": True})
    # of the language, of a pass of the compiler, of the assembler
    except (triton.compiler.errors.CompilationError, RuntimeError, PTXASError) as error:
        return found | {"faults": [f"does not compile: {str(error).strip().splitlines()[-1]}"]}
    registers, stack, code = disassemble(made.asm["cubin"])
    matrix = [op.split(".")[0] for _, _, op, _ in code if re.match(r"HG?MMA", op)]
    hot = loops_with(code, lambda op: re.match(case.get("hot", "HG?MMA"), op))
    spills = sum(code[i][2].split(".")[0] in ("LDL", "STL") for i in hot)
    loads = [n for _, _, op, _ in code if (n := bits(op))]
    enough = 64 if {"*i8", "*u8"} & {*types.values()} else 128
    wide = [n for n in loads if n >= enough]
    faults = []
    if made.metadata.shared > SHARED[arch]:
        faults.append(f"shared memory {made.metadata.shared:,} of {SHARED[arch]:,}")
    if spills:
        faults.append(f"{spills} spills in the loop")
    hopper = arch >= 90 and case["dot"] is True and case["num_warps"] % 4 == 0
    if case["dot"] and ("HGMMA" if hopper else "HMMA") not in matrix:
        faults.append("no HGMMA" if hopper else "no HMMA")
    if sum(wide) < case.get("wide", WIDE_SHARE) * sum(loads):
        faults.append(f"narrow loads: {len(wide)} of {len(loads)} are wide")
    return found | dict(zip(COUNTS, (
        registers, stack, spills, made.metadata.shared, matrix.count("HMMA"), matrix.count("HGMMA"),
        len(wide), len(loads)))) | {"faults": faults}


def cases_of(module):
    """A module's cases; a name without a dot is one in kernels/, or beside this file."""
    name = f"kernels.{module}" if module in MODULES else module
    loaded = importlib.import_module(name)
    if not hasattr(loaded, "compile_cases"):
        raise SystemExit(f"{name}: no compile_cases(); every kernel module says what it ships")
    return loaded.compile_cases()


def one(job):
    module, index, arch = job
    return {"module": module, **examine(cases_of(module)[index], arch)}


def matrix(modules, only="", archs=(80, 90), workers=2):
    """All cases of the modules, compiled afresh in `workers` processes."""
    jobs = [(module, i, arch) for module in modules for i, case in enumerate(cases_of(module))
            for arch in archs if only in case["name"] and case.get("sm", arch) == arch]
    with tempfile.TemporaryDirectory() as cache:        # an old cache would hide a change
        os.environ["TRITON_CACHE_DIR"] = cache
        if workers == 1:
            return [one(job) for job in jobs]
        with ProcessPoolExecutor(workers) as pool:
            return list(pool.map(one, jobs))


def table(found):
    lines = [f"{'kernel':46} sm  regs stack spills  smem KB  HMMA HGMMA wide/loads  verdict"]
    for r in found:
        lines.append(f"{r['name']:46} {r['sm']} {r['registers']:5} {r['stack']:5} {r['spills']:6} "
                     f"{r['shared'] / 1024:8.1f} {r['HMMA']:5} {r['HGMMA']:5} "
                     f"{r['wide']:5}/{r['loads']:<5} {'; '.join(r['faults']) or 'ok'}")
    return "\n".join(lines)


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description="compile kernels and judge their machine code")
    ask.add_argument("modules", nargs="*", default=MODULES)
    ask.add_argument("--only", default="", help="cases whose name contains this")
    ask.add_argument("--json", type=Path, help="write the findings here as well")
    ask.add_argument("--workers", type=int, default=2)
    asked = ask.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)            # it would leave nothing to compile
    found = matrix(asked.modules, asked.only, workers=asked.workers)
    import triton
    print(f"Triton {triton.__version__}\n{table(found)}")
    if asked.json:
        asked.json.write_text(json.dumps({"triton": triton.__version__, "cases": found}, indent=1))
    sys.exit(any(r["faults"] for r in found))
