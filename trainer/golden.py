"""Golden losses: the first 20 losses of every recipe's toy stages, compared with those in a file.

    python train.py --compare-golden      is the arithmetic still what it was?
    python train.py --write-golden        it has changed, and is meant to: measure it anew

Stage 2 of a recipe begins with what two steps of its stage 1 have made, so that saving and loading
are compared, too. One thread, fp32, the CPU.

On the processor and with the torch of the file every loss must be equal to the bit. On others sums
are added in another order: there a loss may differ by `allowed`, relative to it, of its stage and
step. That is MARGIN times the largest difference up to that step that --write-golden measures
between the instruction sets of one processor (OTHER_SETS), and at least that of ROUNDING. By steps,
because a toy that learns fast makes much of a difference that began as rounding: 1e-6 at step 1 is
up to 7.2 times the loss at step 20."""

import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import torch

from formats.errors import BadData, note, TrainingFailed
from formats.files import atomic_write
from formats.strict_json import read_json
from trainer.flags import GOLDEN
from trainer.machine import prepare
from trainer.run_folder import Run

ROOT = Path(__file__).parents[1]
STEPS = 20
HANDED_ON = 2           # the step whose model the next stage starts from: two steps show it, too
MARGIN = 4
ROUNDING = 1e-6         # a few times that of fp32: a first loss may happen to be equal here
PARTS = ("clip", "llama", "qformer")
# what the libraries below PyTorch are told, so that they compute as on an older processor
OTHER_SETS = (
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
     "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"})


class FewSteps(Run):
    """A run that ends after `most` steps, keeps its losses instead of writing them down, and saves
    its model for the stage behind it."""

    def __init__(self, out, args, most):
        super().__init__(out, args)
        self.most, self.losses = most, []

    def log(self, step, grad_norm):
        self.losses.append(float(self.loss))
        if step == HANDED_ON:
            (self.out / "model").mkdir()
            self.job.save_model(self.out / "model")
        self.exit_code = self.stop.code
        return bool(self.exit_code) or step == self.most


def stage_losses(argv, program, steps):
    """The first losses of one stage.

    program: train.py's functions {parse_args, set_trainable, make_job, train_loop}."""
    args = program["parse_args"](argv)
    device, out = prepare(args, program["set_trainable"]), Path(args.output_dir)
    with FewSteps(out, args, steps) as run:
        job = program["make_job"](args, out, device)
        run.begin(job)
        if code := program["train_loop"](job, run):
            raise SystemExit(code)                          # Ctrl-C or SIGTERM
    return run.losses


def golden_losses(program, recipes, steps=STEPS):
    """{"llava stage 1": [losses], ...}. recipes: their names; a recipe that starts from another's
    model stands behind that."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for recipe in recipes:
            for stage in ("1", "2"):
                argv = ["--recipe", recipe, "--stage", stage, "--threads", "1", "--device", "cpu",
                        "--dtype", "fp32", "--output-dir", f"{folder}/{recipe}/stage{stage}"]
                name, said, began = f"{recipe} stage {stage}", io.StringIO(), time.monotonic()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    found[name] = stage_losses(argv, program, steps)
                note(f"{name}: {steps} steps in {time.monotonic() - began:.0f} s")
    return found


# ------------------------------------------------------------------------------------- the file

def processor():
    """The name of the processor, and the instructions that PyTorch uses of it."""
    name, table = platform.machine(), Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def shipped_weights():
    """{part: the start of its weights' SHA-256}: other weights have other losses."""
    found = {}
    for part in PARTS:
        path = ROOT / f"toy/weights/{part}/model.safetensors"
        if path.exists():               # else the stage that needs it says so
            found[part] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def differences(losses, wanted):
    """[difference relative to the loss wanted], a number a step."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]


def largest_so_far(gaps, measured):
    """[the larger of the two up to each step], at least ROUNDING."""
    return list(accumulate(map(max, gaps, measured), max, initial=ROUNDING))[1:]


def other_losses(folder):
    """The same losses by this processor's older instructions, each in a process of its own."""
    for number, settings in enumerate(OTHER_SETS):
        path = Path(folder) / f"{number}.json"
        # a file that is not the default is written without this measurement
        subprocess.run([sys.executable, ROOT / "train.py", "--write-golden", path], check=True,
                       env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
        yield read_json(path)["losses"]


def write_golden(path, losses, measure):
    """measure: find `allowed`, which takes twice as long again."""
    content = {"command": "python train.py --write-golden", "torch": torch.__version__,
               "processor": processor(), "weights": shipped_weights(), "losses": losses}
    if measure:
        measured = {name: [ROUNDING] * len(values) for name, values in losses.items()}
        with tempfile.TemporaryDirectory() as folder:
            for others in other_losses(folder):
                for name, values in others.items():
                    gaps = differences(values, losses[name])
                    measured[name] = largest_so_far(gaps, measured[name])
        content["allowed"] = {name: [MARGIN * gap for gap in gaps]
                              for name, gaps in measured.items()}
        content["measured"] = measured
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def compare(golden, losses):
    """A line for each stage. Raises TrainingFailed at the first that differs."""
    if set(golden["losses"]) != set(losses):
        raise TrainingFailed("the file has other stages than there are recipes for: measure anew "
                             "with --write-golden")
    here = golden["processor"] == processor() and golden["torch"] == torch.__version__
    for name, wanted in golden["losses"].items():
        values = losses[name]
        gaps = differences(values, wanted[:len(values)])
        allowed = [0.0] * len(gaps) if here else golden["allowed"][name]
        for i, (gap, most) in enumerate(zip(gaps, allowed)):
            if gap > most:
                raise TrainingFailed(
                    f"{name}, step {i + 1}: loss {values[i]!r}, and {wanted[i]!r} is written "
                    f"({gap:.1e} of it; {most:.1e} are allowed): if the change of arithmetic is "
                    "meant, measure anew with --write-golden and say why in the commit")
        yield f"{name}: largest difference {max(gaps):.1e}"
    if here:
        yield "equal to the bit, on the processor and with the torch of the file"
    else:
        yield (f"within what was measured between instruction sets, times {MARGIN}: the file is "
               f"of {golden['processor']}, torch {golden['torch']}; this is {processor()}, "
               f"torch {torch.__version__}")


def read_golden(path):
    """Raises BadData for a file that is missing, or of other weights."""
    if not Path(path).exists():
        raise BadData(f"{path}: is missing: measure it with python train.py --write-golden")
    golden = read_json(path)
    if not isinstance(golden, dict) or not {"losses", "weights", "allowed"} <= set(golden):
        raise BadData(f"{path}: holds no golden losses: measure them with --write-golden")
    other = [part for part, digest in shipped_weights().items()
             if golden["weights"].get(part) != digest]
    if other:
        raise BadData(f"{path}: was measured with other toy/weights ({', '.join(other)}): measure "
                      "anew with --write-golden")
    return golden


def run_golden(args, recipes, **program):
    """--compare-golden or --write-golden. program: see `stage_losses`."""
    path = Path(args.compare_golden or args.write_golden)
    if args.compare_golden:
        golden = read_golden(path)
        for line in compare(golden, golden_losses(program, recipes)):
            print(line)
        return 0
    is_default = path.resolve() == Path(GOLDEN).resolve()
    write_golden(path, golden_losses(program, recipes), measure=is_default)
    print(f"{path} written")
    return 0
