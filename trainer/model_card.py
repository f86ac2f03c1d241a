"""trainer/model_card.py: README.md of a finished model, its model card.

What the hub and a reader want to know: recipe, parts, data, commit, loss, what it may be used for,
and how it is asked. It names files, but no folder of this machine."""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import data
from formats.files import atomic_write
from formats.folders import SHIPPED_QFORMER
from formats.hub import hub_id
from formats.strict_json import read_config
from formats.templates import BLIP2, chat_template, stop_text
from trainer.flags import BASES
from trainer.logs import read_lines
from trainer.start import chosen_start

LAST = 50                   # steps whose mean loss the card gives
# names of files and folders that are the same in every run: they name nothing alone
SAME_EVERYWHERE = "model", "adapter", "model.safetensors", "adapter_model.safetensors"
PARTS = "vision", "llm", "qformer", "projector"         # flags for other parts than the base's


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
    lines = [*front_matter(config, args), f"# {title}", "", what_it_is(config, args, out), "",
             "| | |", "|---|---|", f"| recipe | {args.recipe}, stage {args.stage}: {row.source} |",
             f"| trained | {', '.join(row.train)}{additions(args)} |",
             f"| started from | {start(args, out)} |", f"| data | {data_of(args)} |",
             f"| steps | {run.job.steps:,} of {row.batch} samples, learning rate {row.lr:g} |",
             *losses(out / "metrics.jsonl", run), f"| commit | {commit(out)} |",
             "", "## What it may be used for", "", *uses(args, out)]
    if not row.losses:
        lines += ["", "## How it is asked", "", *how(config, run.job.model.tokenizer)]
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


def what_it_is(config, args, out):
    """What the model is, and in which world it learned."""
    if args.row.losses:
        text = "A Q-Former that matches pictures and captions: BLIP-2's first stage."
    else:
        text = ("A vision-language model: a picture's vectors stand between the words of a prompt. "
                f"Its vocabulary has {config['text_config']['vocab_size']:,} rows.")
    if is_of_the_toy_world(args, out):
        return ("A model of a toy world: coloured shapes on a background, and a vocabulary of a "
                f"few hundred words. {text}")
    if args.base == "toy" and not args.data:
        text += " It learned from pictures of a toy world: coloured shapes on a background."
    return text


def history(args, out):
    """[(flags, folder)] of this run and of those whose models it goes back to, the newest first, as
    far as their folders are here and say so."""
    runs, folders = [], set()
    while os.path.abspath(out) not in folders:      # a folder may have been used anew
        runs.append((args, out))
        folders.add(os.path.abspath(out))
        start = Path(chosen_start(args, out))
        if start.name not in SAME_EVERYWHERE:
            break
        before = read_config(start.parent, missing_ok=True)
        if not isinstance(before.get("stage_row"), dict):       # of no run
            break
        args, out = argparse.Namespace(**before), start.parent
    return runs


def is_of_the_toy_world(args, out):
    """Were all parts and all data made by this program, of this run and of those before it?"""
    runs = history(args, out)
    for flags, _ in runs:
        if flags.base != "toy" or any(vars(flags).get(name) for name in (*PARTS, "data")):
            return False
    return chosen_start(*runs[-1]) in ("none", SHIPPED_QFORMER)


def additions(args):
    if not args.lora:
        return ""
    beside = f" beside weights in {args.quantize}" if args.quantize else ""
    return f"; of the language model LoRA of rank {args.lora}{beside}, merged"


def name_of(path):
    """A hub id as it is; of a path its end, because the rest is this machine's: the folder's name,
    and before names that every run has the run's."""
    if not Path(path).exists() and not path.startswith(("/", ".", "~")):
        return path
    if hub_id(path):                        # in the hub's cache a folder has a number for a name
        return hub_id(path)
    parts = Path(os.path.abspath(path)).parts
    first = len(parts) - 1
    while first > 1 and parts[first] in SAME_EVERYWHERE:
        first -= 1
    return "/".join(parts[first:])


def start(args, out):
    """What the run started from, in words; behind a colon, what the run before had started from."""
    return ": ".join(start_of_run(flags) for flags, _ in history(args, out))


def start_of_run(args):
    """What one run started from."""
    if args.start and args.start != "none":
        return f"--from {name_of(args.start)}"
    if args.stage == 2 and args.start is None:
        return "stage 1 of the same recipe and base"
    if args.recipe == "sharegpt4v" and args.start is None:
        return "stage 1 of llava-1.5"
    given = [name for name in PARTS if vars(args).get(name)]
    parts = [f"--{name} {name_of(getattr(args, name))}" for name in given]
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
    lines = [line for _, line in read_lines(log)]
    last = [line["loss"] for line in lines if type(line.get("loss")) is float][-LAST:]
    if last:
        yield f"| loss | {sum(last) / len(last):.4f}, the mean of the last {len(last)} steps |"
    tried = [line for line in lines if type(line.get("eval_loss")) is float]
    if tried:
        chosen = tried[-1]
        if run.args.keep_best:              # the weights are those of the lowest
            chosen = min(tried, key=lambda line: line["eval_loss"])
        yield f"| held-out loss | {chosen['eval_loss']:.4f}, after step {chosen['step']:,} |"


def commit(out):
    """The commit that the run began with."""
    return read_config(out, "run.json", missing_ok=True).get("git") or "not known"


def uses(args, out):
    """What it may be used for."""
    if is_of_the_toy_world(args, out):
        yield "To study how such a model is built and trained. It knows nothing of photographs."
        yield "Weights and data were made by the program that trained it, under the MIT licence."
        return
    yield ("For research and study. It says things that are not in the picture; nobody has tested "
           "it for another use.")
    yield ("The parts that it started from and the data that it learned from have licences of "
           "their own, and they hold for it, too: look them up before you share it or use it "
           "commercially. Data that a commercial model wrote is often for research alone.")


def how(config, tokenizer):
    """The same question to this program and to transformers; of a captioner the picture alone."""
    template = data.template_of(config["template"])
    is_captioner = template.style in ("plain", *BLIP2)
    question = "--caption" if is_captioner else '"Describe this image"'
    yield "```"
    yield f"python generate.py img.jpg {question} --model FOLDER"
    yield "```"
    # transformers needs the template in Jinja, and ends at tokens, not at a text such as ###
    is_alike = chat_template(template) and stop_text(config["template"], tokenizer) is None
    if config["model_type"] not in ("llava", "llava_next") or not is_alike:
        return
    yield ""
    yield "```python"
    yield "from transformers import pipeline"
    yield 'ask = pipeline("image-text-to-text", model="FOLDER")'
    if is_captioner:
        yield 'content = [{"type": "image", "url": "img.jpg"}]'
    else:
        yield 'content = [{"type": "image", "url": "img.jpg"},'
        yield '           {"type": "text", "text": "Describe this image"}]'
    yield 'print(ask(text=[{"role": "user", "content": content}], return_full_text=False))'
    yield "```"
    if is_captioner:
        yield ""
        yield ("It has learned captions and no questions. generate.py leaves a question out; "
               "transformers does not, so give it the picture alone.")
