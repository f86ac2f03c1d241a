"""evaluate.flags: the command line, read before torch is imported, so that --help answers at once.

Also what is wrong with a benchmark's flags: its files and limits are checked before a model loads.
"""
import argparse
import os

CLAIMS = "llava", "blip2", "minigpt4", "sharegpt4v"
BENCHMARKS = {"scienceqa": "multiple choice, with and without pictures",
              "pope": "is such a thing in the picture? yes or no",
              "llava-bench": "open questions; a judge grades the answers",
              "vqa": "VQAv2, OK-VQA, GQA: short answers",
              "caption": "COCO Karpathy, NoCaps: captions, by CIDEr-D"}


def temperature(text):
    """A type for argparse: a number, or None for the word "none"."""
    return None if text == "none" else float(text)


def add_benchmarks(sub):
    """The three benchmarks and their flags."""
    parsers = {name: sub.add_parser(name, help=what, allow_abbrev=False)
               for name, what in BENCHMARKS.items()}
    for name, q in parsers.items():
        q.add_argument("--model", required=True, help="folder or hub id")
        q.add_argument("--images", required=True, help="folder of the pictures")
        q.add_argument("--follow-links", action="store_true", help="links in it may lead out of it")
        q.add_argument("--out", required=True, help="JSON lines: the answers")
        most = {"pope": 128, "vqa": 10, "caption": 30}.get(name, 1024)
        q.add_argument("--max-new-tokens", type=int, default=most)
        q.add_argument("--batch-size", type=int, default=8)
        q.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
        q.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
        q.add_argument("--template", help="how the model is asked, if not as its config says")
        q.add_argument("--debug", action="store_true", help="tracebacks")
    q = parsers["scienceqa"]
    q.add_argument("--problems", required=True, help="problems.json")
    q.add_argument("--splits", required=True, help="pid_splits.json")
    q.add_argument("--split", default="test")
    q.add_argument("--form", choices=("CQM-A", "QCM-LEA"), default="CQM-A",
                   help="LLaVA-1.5's question, or that of LLaVA trained on ScienceQA")
    q = parsers["pope"]
    q.add_argument("--questions", nargs="+", required=True, help="coco_pope_*.json: a row each")
    q = parsers["llava-bench"]
    q.add_argument("--questions", required=True, help="qa90_questions.jsonl; questions.jsonl")
    q.add_argument("--context", required=True,
                   help="caps_boxes_coco2014_val_80.jsonl; context.jsonl")
    q.add_argument("--references", required=True,
                   help="qa90_gpt4_answer.jsonl; answers_gpt4.jsonl")
    q.add_argument("--endpoint", required=True, help="of the judge, such as https://host/v1; its "
                   "other flags are those of python -m instruct from --key-env on")
    q.add_argument("--endpoint-model", required=True, help="which model there is the judge")
    q.add_argument("--temperature", type=temperature, default=.2,
                   help="of the judge; none: the endpoint's own")
    q.add_argument("--max-tokens", type=int, default=1024, help="of one review")


    add_blip2_benchmarks(parsers["vqa"], parsers["caption"])


def add_blip2_benchmarks(vqa, caption):
    """What BLIP-2 is judged by, and its settings."""
    vqa.add_argument("--questions", required=True, help="v2_OpenEnded_mscoco_val2014_questions"
                     ".json or OK-VQA's; GQA's testdev_balanced_questions.json")
    vqa.add_argument("--annotations", help="v2_mscoco_val2014_annotations.json or OK-VQA's; "
                     "without it answers are written and not scored")
    caption.add_argument("--references", required=True, help="dataset_coco.json of Karpathy, "
                         "nocaps_val_4500_captions.json, or a file in COCO's form")
    caption.add_argument("--split", default="test", help="of Karpathy's file (default: test)")
    for q, form in ((vqa, "the question stands for {}"), (caption, "what is asked")):
        q.add_argument("--prompt", help=f"{form} (default: the papers')")
        q.add_argument("--num-beams", type=int, help="default: 5 for BLIP-2 with OPT or FlanT5")
        q.add_argument("--length-penalty", type=float, help="of beams (default for these BLIP-2: "
                       "-1 in vqa, 1 in caption)")


def add_retrieval_files(q):
    """Pictures and captions of real files, instead of the toy world's."""
    q.add_argument("--references", help="dataset_coco.json or dataset_flickr30k.json of Karpathy")
    q.add_argument("--split", default="test", help="of that file (default: test)")
    q.add_argument("--images", help="folder of its pictures")
    q.add_argument("--follow-links", action="store_true", help="links in it may lead out of it")
    q.add_argument("--top", type=int, default=128, help="so many by ITC are sorted again by ITM "
                   "(default: 128, as published)")
    q.add_argument("--batch-size", type=int, default=64, help="pictures or pairs at a time")


def add_toy_commands(sub):
    """parts, toy, retrieval and claims, and their flags."""
    parts = sub.add_parser("parts", help="the gates of the shipped parts", allow_abbrev=False)
    parts.add_argument("--vision", default="toy/weights/clip")
    parts.add_argument("--llm", default="toy/weights/llama")
    parts.add_argument("--qformer", default="toy/weights/qformer")
    toy = sub.add_parser("toy", help="questions about the toy world", allow_abbrev=False)
    toy.add_argument("--model", nargs="+", default=["runs/toy/llava-1.5/stage2/model"])
    toy.add_argument("--descriptions", action="store_true",
                     help="score descriptions alone: all that a BLIP-2 can be asked for")
    toy.add_argument("--no-controls", dest="controls", action="store_false",
                     help="the model with the right pictures only")
    find = sub.add_parser("retrieval", help="texts for pictures, and back", allow_abbrev=False)
    find.add_argument("--model", default="toy/weights/qformer")
    add_retrieval_files(find)
    claims = sub.add_parser("claims", help="the papers' claims", allow_abbrev=False)
    claims.add_argument("--only", default=",".join(CLAIMS), help="papers, with commas")
    claims.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    claims.add_argument("--runs", default="runs/claims", help="where they lie, or will lie")
    claims.add_argument("--picture", metavar="PNG", help="draw the figures too")
    for q in (parts, toy, find, claims):
        q.add_argument("--scenes", type=int, default=1000 if q in (parts, toy) else 500,
                       help="held-out scenes")
        q.add_argument("--out", help="write the figures to this JSON file too")
        q.add_argument("--debug", action="store_true", help="tracebacks")


def check_benchmark(a):
    """What is wrong with a benchmark's command line, or None."""
    files = []                              # the benchmark's own files
    for name in ("problems", "splits", "questions", "annotations", "context", "references"):
        value = getattr(a, name, None)
        files += value if isinstance(value, list) else [value]
    files = [os.path.realpath(path) for path in files if path is not None]
    is_other = os.path.exists(a.out) and not os.path.isfile(a.out)
    if is_other or not os.path.isdir(os.path.dirname(a.out) or "."):
        return f"--out {a.out}: not a file in a folder that exists"
    if os.path.realpath(a.out) in files:
        return "--out would replace one of the benchmark's own files"
    if min(a.max_new_tokens, a.batch_size, getattr(a, "max_tokens", 1)) < 1:
        return "--max-new-tokens, --batch-size and --max-tokens must be at least 1"
    if not 0 <= (getattr(a, "temperature", None) or 0) <= 100:
        return "--temperature must be none, or 0 to 100"
    if a.what in ("vqa", "caption"):
        if a.num_beams is not None and a.num_beams < 1:
            return "--num-beams must be at least 1"
        if a.what == "vqa" and a.prompt is not None and a.prompt.count("{}") != 1:
            return '--prompt must hold {} once, for the question: "Question: {} Answer:"'
        if a.what == "caption" and a.prompt is not None and not a.prompt.strip():
            return "--prompt is empty: leave it out"
    if a.rest and a.what != "llava-bench":
        return f"unrecognized arguments: {' '.join(a.rest)}"
    return None


def check_toy(a):
    """What is wrong with the command line of parts, toy, retrieval or claims, or None."""
    if a.scenes < 20 or a.scenes % 2:
        return "--scenes must be even, and at least 20"
    for flag in ("out", "picture"):
        path = getattr(a, flag, None)
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            return f"--{flag} {path}: not a file in a folder that exists: name another"
    if not (getattr(a, "picture", None) or ".png").endswith(".png"):
        return f"--picture {a.picture}: must end in .png"
    if a.what == "retrieval":
        if bool(a.references) != bool(a.images):
            return "--references and --images go together: give both, or none for the toy world"
        if min(a.top, a.batch_size) < 1:
            return "--top and --batch-size must be at least 1"
    if a.what == "claims" and (set(a.only) - set(CLAIMS) or not 1 <= a.seeds <= 100):
        return f"--only takes {', '.join(CLAIMS)}; --seeds 1 to 100"
    return None


def parse(argv=None):
    """The namespace of a command line. `rest`: flags of a judge, which instruct/flags.py reads."""
    p = argparse.ArgumentParser(prog="python -m evaluate", description="Score a model.",
                                allow_abbrev=False)
    sub = p.add_subparsers(dest="what", required=True)
    add_toy_commands(sub)
    add_benchmarks(sub)
    a, rest = p.parse_known_args(argv)
    if a.what == "claims":
        a.only = list(dict.fromkeys(a.only.split(",")))         # each paper once, in this order
    if a.what in BENCHMARKS:
        a.rest = rest
        fault = check_benchmark(a)
    elif rest:
        fault = f"unrecognized arguments: {' '.join(rest)}"
    else:
        fault = check_toy(a)
    if fault:
        p.error(fault)
    return a
