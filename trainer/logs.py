"""trainer/logs.py: the .jsonl files of a run, a line a step, and the curve drawn of them."""

import json

from formats.files import atomic_write


def truncate_log(path, step):
    """Drop the lines of a .jsonl that a resumed run will write again, and one cut short."""
    if path.exists():
        lines = path.read_text().splitlines(True)
        kept = [x for x in lines if x.endswith("}\n") and json.loads(x)["step"] <= step]
        atomic_write(path, "".join(kept))


def append_lines(path, lines):
    with open(path, "a") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def plot_loss(out):
    """loss.png from metrics.jsonl."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], label="training")
    held_out = [x for x in lines if x.get("eval_loss") is not None]
    if held_out:
        axes.plot([x["step"] for x in held_out], [x["eval_loss"] for x in held_out], "o-",
                  label="held-out")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    figure.savefig(out / "loss.png", dpi=100)
    pyplot.close(figure)
