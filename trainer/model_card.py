"""trainer/model_card.py: README.md of a finished model, its model card.

What the hub and a reader want to know: recipe, parts, data, commit, loss, what it may be used for,
and how it is asked. It names files, but no folder of this machine."""

import json
import shutil
import subprocess
from pathlib import Path

from formats.files import atomic_write
from formats.strict_json import read_config
from trainer.flags import BASES

LAST = 50                   # steps whose mean loss the card gives


def git_commit():
    """The commit of this program's folder, or None."""
    if not shutil.which("git"):
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parents[1], text=True,
                          capture_output=True)
    return done.stdout.strip() or None


def write_card(folder, run):
    """README.md in the folder of a finished model. run: trainer.run_folder.Run."""
    if run.args.stage:                      # stage 0 makes parts, which are no models to ask
        atomic_write(Path(folder) / "README.md", card(read_config(folder), run))


def card(config, run):
    """The text of the card. config: the model's config.json."""
    args, row, out = run.args, run.args.row, run.out
    title = f"{args.recipe}, stage {args.stage}, base {args.base}"
    if args.task:
        title += f", {args.task}"
    lines = [*front_matter(config, args), f"# {title}", "", what_it_is(args), "",
             "| | |", "|---|---|", f"| recipe | {args.recipe}, stage {args.stage}: {row.source} |",
             f"| trained | {', '.join(row.train)}{additions(args)} |",
             f"| started from | {start(args)} |", f"| data | {data_of(args)} |",
             f"| steps | {run.job.steps:,} of {row.batch} samples, learning rate {row.lr:g} |",
             *losses(out / "metrics.jsonl", run), f"| commit | {commit(out)} |",
             "", "## What it may be used for", "", *uses(args)]
    if config.get("architectures") and not row.losses:
        lines += ["", "## How it is asked", "", *how(config)]
    return "\n".join(lines) + "\n"


def front_matter(config, args):
    """YAML that the hub reads."""
    lines = ["---", "library_name: transformers"]
    if config.get("architectures") and not args.row.losses:
        lines.append("pipeline_tag: image-text-to-text")
    named = [part for part in (args.vision, args.llm) if part]
    if args.base != "toy":
        named = named or list(BASES[args.base])
    hub_ids = [part for part in named if part.count("/") == 1 and not Path(part).exists()]
    if hub_ids:
        lines += ["base_model:", *(f"- {part}" for part in hub_ids)]
    return [*lines, "tags:", f"- {config['model_type']}", "---", ""]


def what_it_is(args):
    """One sentence."""
    if args.base == "toy":
        return ("A model of a toy world: coloured shapes on a background, and a vocabulary of a "
                "few hundred words.")
    if args.row.losses:
        return "A Q-Former that matches pictures and captions: BLIP-2's first stage."
    return "A vision-language model: a picture's vectors stand between the words of a prompt."


def additions(args):
    if not args.lora:
        return ""
    beside = f" beside weights in {args.quantize}" if args.quantize else ""
    return f"; of the language model LoRA of rank {args.lora}{beside}, merged"


def name_of(path):
    """A hub id as it is; of a folder the name alone, because its path is this machine's."""
    return Path(path).name if Path(path).exists() or path.startswith(("/", ".")) else path


def start(args):
    """What the run started from, in words."""
    parts = [f"--{name} {name_of(getattr(args, name))}" for name in
             ("vision", "llm", "qformer", "projector") if getattr(args, name)]
    if args.start and args.start != "none":
        return f"--from {name_of(args.start)}"
    if args.stage == 2 and args.start is None:
        return "stage 1 of the same recipe and base"
    if args.recipe == "sharegpt4v" and args.start is None:
        return "stage 1 of llava-1.5"
    return ", ".join([f"the parts of base {args.base}", *parts])


def data_of(args):
    """The data's name, in words."""
    words = "the toy world, scenes drawn as they are needed"
    if args.data:
        words = Path(args.data).name
    if args.eval_data:
        words += f"; held out: {Path(args.eval_data).name}"
    return words


def losses(log, run):
    """Rows of the table: the mean of the last steps, and what is held out."""
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    last = [line["loss"] for line in lines if line["loss"] is not None][-LAST:]
    if last:
        yield f"| loss | {sum(last) / len(last):.4f}, the mean of the last {len(last)} steps |"
    tried = [line for line in lines if line.get("eval_loss") is not None]
    if tried:
        chosen = tried[-1]
        if run.args.keep_best:              # the weights are those of the lowest
            chosen = min(tried, key=lambda line: line["eval_loss"])
        yield f"| held-out loss | {chosen['eval_loss']:.4f}, after step {chosen['step']:,} |"


def commit(out):
    """The commit that the run began with."""
    return read_config(out, "run.json", missing_ok=True).get("git") or "not known"


def uses(args):
    """What it may be used for."""
    if args.base == "toy" and not (args.data or args.vision or args.llm):
        yield "To study how such a model is built and trained. It knows nothing of photographs."
        yield "Weights and data were made by the program that trained it, under the MIT licence."
        return
    yield ("For research and study. It says things that are not in the picture; nobody has tested "
           "it for another use.")
    yield ("The parts that it started from and the data that it learned from have licences of "
           "their own, and they hold for it, too: look them up before you share it or use it "
           "commercially. Data that a commercial model wrote is often for research alone.")


def how(config):
    """The same question to this program and to transformers."""
    yield "```"
    yield 'python generate.py img.jpg "Describe this image" --model FOLDER'
    yield "```"
    if config["model_type"] in ("llava", "llava_next"):
        yield ""
        yield "```python"
        yield "from transformers import pipeline"
        yield 'ask = pipeline("image-text-to-text", model="FOLDER")'
        yield 'content = [{"type": "image", "url": "img.jpg"},'
        yield '           {"type": "text", "text": "Describe this image"}]'
        yield 'print(ask(text=[{"role": "user", "content": content}], return_full_text=False))'
        yield "```"
