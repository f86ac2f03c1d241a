"""--compare: does the loss of a run lie where the losses of the same stage lay, with other seeds?

curves.json beside this file has a row for each recipe and stage of the toy, made by
`python -m evaluate.curves`: the losses of a few seeds in tenths of the run, each tenth a mean.

    band    of each tenth: from the lowest seed to the highest, and as much again on either side, at
            least FLOOR of the loss. A few seeds show less than the whole spread.

`lines` says whether a finished run ends inside the band, where it left it, and what usually is the
cause: first what can be seen to differ from the runs behind the curve, then what cannot."""

import hashlib
import json
from pathlib import Path

from trainer.logs import read_lines

HERE = Path(__file__).parent
CURVES = HERE / "curves.json"
TENTHS = 10
FLOOR = .05
WEIGHTS = {"vision": "toy/weights/clip", "llm": "toy/weights/llama",
           "qformer": "toy/weights/qformer"}


# ------------------------------------------------------------------------------ the curves

def read_curves():
    """{recipe: {"1", "2" or "2 alone": a curve}}; a curve is what `curve_of` makes."""
    return json.loads(CURVES.read_text(encoding="utf-8"))


def curve_for(args):
    """The curve of this run's recipe and stage, or None. Needs no torch: asked before it loads.

    Stage 2 of blip2 has two: behind a stage 1 of one's own, and alone, from the shipped Q-Former,
    which has seen far more."""
    curves, stage = read_curves().get(args.recipe, {}), str(args.stage)
    if args.recipe == "blip2" and args.start == WEIGHTS["qformer"]:
        stage = "2 alone"
    return curves.get(stage)


def tenths(losses):
    """Mean loss of each tenth of a run, [10]; steps without a usable sample, None, are left out."""
    means = []
    for part in range(TENTHS):
        first, last = len(losses) * part // TENTHS, len(losses) * (part + 1) // TENTHS
        found = [loss for loss in losses[first:last] if loss is not None]
        means.append(sum(found) / len(found) if found else None)
    return means


def losses_of(out):
    """The loss of each step of the run in `out`."""
    return [line.get("loss") for _, line in read_lines(Path(out) / "metrics.jsonl")]


def digest(folder):
    """The first 12 letters of the SHA-256 of a folder's weights; "" without any."""
    path = Path(folder) / "model.safetensors"
    if not path.exists():
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def weight_digests():
    """{part: digest} of the shipped weights that the toy's stages start from."""
    return {part: digest(HERE.parent / folder) for part, folder in WEIGHTS.items()}


def curve_of(outs):
    """A curve, from the folders of the same stage with several seeds."""
    runs = [tenths(losses_of(out)) for out in outs]
    config = json.loads((Path(outs[0]) / "config.json").read_text())
    machine = json.loads((Path(outs[0]) / "run.json").read_text())
    return {"seeds": [json.loads((Path(out) / "config.json").read_text())["seed"] for out in outs],
            "steps": machine["steps"], "dtype": machine["dtype"], "commit": machine["git"],
            "weights": weight_digests(), "row": config["stage_row"],
            "low": [round(min(column), 5) for column in zip(*runs)],
            "high": [round(max(column), 5) for column in zip(*runs)]}


def band(curve):
    """[(lowest, highest)] of each tenth."""
    found = []
    for low, high in zip(curve["low"], curve["high"]):
        more = max(high - low, FLOOR * high)
        found.append((max(0., low - more), high + more))
    return found


# ------------------------------------------------------------------------------ the verdict

def is_outside(value, limits):
    return value is not None and not limits[0] <= value <= limits[1]


def report(out, args):
    """Print whether the loss of the finished run in `out` is normal, if --compare is given."""
    if args.compare:
        print("\n".join(lines(out, args)))


def lines(out, args):
    """What --compare prints."""
    curve, losses = curve_for(args), losses_of(out)
    values, limits = tenths(losses), band(curve)
    outside = [i for i in range(TENTHS) if is_outside(values[i], limits[i])]
    if values[-1] is None:
        return ["--compare: the last steps have no loss: no sample of theirs was usable"]
    low, high = limits[-1]
    seeds = len(curve["seeds"])
    said = (f"--compare: loss {values[-1]:.4g} over the last tenth; the band of {seeds} seeds is "
            f"{low:.4g} to {high:.4g}")
    if TENTHS - 1 not in outside:
        found = [f"{said}: inside"]
        if outside:
            found.append(f"  on the way it was outside in {places(outside, len(losses))}")
        return found
    side = "above" if values[-1] > high else "below"
    # since when without a break
    since = TENTHS - 1
    while since - 1 in outside:
        since -= 1
    step = len(losses) * since // TENTHS + 1
    found = [f"{said}: {side} it since step {step:,}", "  what usually is the cause:"]
    return found + [f"  - {cause}" for cause in causes(out, args, curve, side, since == 0)]


def places(outside, steps):
    """Steps of the tenths that are outside, in words."""
    return ", ".join(f"steps {steps * i // TENTHS + 1:,} to {steps * (i + 1) // TENTHS:,}"
                     for i in outside)


def causes(out, args, curve, side, from_the_start):
    """Sentences, the surest first."""
    yield from differences(out, args, curve)
    if side == "below":
        yield ("tokens have loss that are too easy, such as the prompt's: --show-batch 2 marks "
               "those with loss")
        yield "the samples repeat, and the model knows them by heart"
    if side == "above" and from_the_start:
        yield ("it starts from something else than the runs behind the curve: another stage 1 "
               "(--from), a new projector, other weights, another template")
    if side == "above":
        yield (f"the learning rate: loss that jumps, and a growing grad_norm in "
               f"{Path(out) / 'metrics.jsonl'}, say too high; a smooth curve above the band says "
               "too low")
        yield (f"a part is frozen that should train: compare \"trained\" in "
               f"{Path(out) / 'run.json'} with another run's")


def differences(out, args, curve):
    """What can be seen to differ from the runs behind the curve."""
    row = json.loads(json.dumps(vars(args.row)))
    for name, value in curve["row"].items():
        if name != "source" and row.get(name) != value:
            yield f"--{name.replace('_', '-')} {told(row.get(name))} instead of {told(value)}"
    for name in ("vision", "llm", "qformer", "projector", "start", "lora", "max_length"):
        if getattr(args, name, None) and not (name == "start" and args.recipe == "blip2"):
            flag = "from" if name == "start" else name.replace("_", "-")
            yield f"--{flag} {getattr(args, name)}: the curve's runs had none"
    machine = json.loads((Path(out) / "run.json").read_text())
    if machine["dtype"] != curve["dtype"]:
        yield f"computed in {machine['dtype']}, the curve in {curve['dtype']}"
    now = weight_digests()
    for part, known in curve["weights"].items():
        if now[part] != known:
            yield (f"{WEIGHTS[part]} are other weights than those that the curve was made with "
                   f"(commit {(curve['commit'] or 'unknown')[:7]}): python -m evaluate.curves "
                   "makes it anew")


def told(value):
    """A value as it is typed behind its flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
