"""instruct.flags: the command line, read before torch is imported, so that --help answers at once.

Also what is wrong with it: who answers, from what, and whether a key may go over this connection.
"""
import argparse
import os
import re
from pathlib import PurePath

from formats.errors import bounded

KINDS = ("conversation", "detail", "reasoning")
COUNT, SECONDS, PRICE = bounded(int, 1, 10 ** 9), bounded(float, 0, 86400), bounded(float, 0, 1e9)

SHARED = {              # of all commands but scienceqa
    "--out": dict(required=True, help="LLaVA JSON; the answers stay in OUT.answers.jsonl"),
    "--seed": dict(type=bounded(int, 0, 2 ** 62), default=0),
    "--temperature": dict(type=bounded(float, 0, 100), help="default: the endpoint's; here 0"),
    "--max-tokens": dict(type=COUNT, default=512, help="of one answer"),
    "--batch-size": dict(type=COUNT, default=8, help="of a local model"),
    "--device": dict(default="auto", help="of a local model: auto, cpu, cuda, cuda:1 ..."),
    "--dtype": dict(choices=("auto", "fp32", "bf16", "fp16"), default="auto"),
    "--template": dict(help="how a local model is asked (default: as its files say; a LLaMA: v1)"),
    "--follow-links": dict(action="store_true", help="links in the folder of pictures may lead out "
                           "of it"),
    "--debug": dict(action="store_true", help="tracebacks")}
ENDPOINT_FLAGS = {      # of all but caption, and of the judge of evaluate llava-bench
    "--endpoint": dict(help="URL before /chat/completions, such as https://host/v1"),
    "--endpoint-model": dict(help="name of the model to ask there"),
    "--key-env": dict(default="OPENAI_API_KEY", help="variable that holds the key"),
    "--token-field": dict(default="max_tokens", help="newer models: max_completion_tokens"),
    "--workers": dict(type=bounded(int, 1, 256), default=4, help="requests under way at once"),
    "--per-minute": dict(type=bounded(float, 0, 1e6), default=0, help="requests; 0: no limit"),
    "--retries": dict(type=bounded(int, 0, 100), default=6, help="of one request"),
    "--backoff": dict(type=SECONDS, default=1, help="seconds before the first retry; doubles"),
    "--longest-wait": dict(type=SECONDS, default=300, help="seconds between two attempts"),
    "--timeout": dict(type=bounded(float, .001, 86400), default=120, help="seconds of a reply"),
    "--price-in": dict(type=PRICE, help="of a million tokens read"),
    "--price-out": dict(type=PRICE, help="of a million tokens written"),
    "--estimate": dict(action="store_true", help="print what it costs, ask nothing")}


def add_kind(q):
    """Flags of conversation, detail and reasoning."""
    q.add_argument("--captions", help="COCO's captions_*.json")
    q.add_argument("--instances", help="COCO's instances_*.json: the boxes, which conversation "
                   "does not show")
    q.add_argument("--toy", type=COUNT, help="instead: so many toy scenes, drawn to --images")
    q.add_argument("--split", choices=("train", "test", "novel"), default="train")
    q.add_argument("--images", required=True, help="folder of the pictures; none is opened (--toy "
                   "draws them there)")
    q.add_argument("--limit", type=COUNT, help="the first pictures only")
    q.add_argument("--llm", help="folder of a LLaMA that answers instead of an endpoint")
    q.add_argument("--shots", type=bounded(int, 0, 3), default=3, help="examples shown, at most; "
                   "conversation has 2")


def add_scienceqa(sub):
    """The parser of scienceqa, which asks no model."""
    q = sub.add_parser("scienceqa", help="ScienceQA's problems as LLaVA's training samples",
                       allow_abbrev=False)
    q.add_argument("source", help="folder of problems.json and pid_splits.json")
    q.add_argument("--split", default="train", help="of pid_splits.json (default: train)")
    q.add_argument("--prefix", default="", metavar="FOLDER", help="a folder to put before the "
                   "names of pictures, such as val: then --images is where val lies")
    q.add_argument("--out", required=True, help="LLaVA JSON")
    q.add_argument("--debug", action="store_true", help="tracebacks")
    return q


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m instruct",
                                description="Make and curate training text.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", required=True)
    parsers = {}
    for kind in KINDS:
        parsers[kind] = sub.add_parser(kind, help=f"LLaVA's {kind} text from captions and boxes",
                                       allow_abbrev=False)
        add_kind(parsers[kind])
    for name, what in (("caption", "describe a folder of pictures"),
                       ("curate", "MiniGPT-4's curation: of a folder, or of a LLaVA JSON")):
        q = parsers[name] = sub.add_parser(name, help=what, allow_abbrev=False)
        q.add_argument("source", help="folder of pictures; for curate a LLaVA JSON will do")
        q.add_argument("--model", help="folder or hub id of the model that describes pictures")
        q.add_argument("--prompt", default="Describe the image in detail.")
    q = parsers["curate"]
    q.add_argument("--short", type=bounded(int, 0, 10 ** 9), default=80, metavar="TOKENS",
                   help="a description of at most this many is asked to go on")
    q.add_argument("--min-words", type=COUNT, default=5, help="fewer are dropped")
    for name, q in parsers.items():
        flags = SHARED if name == "caption" else SHARED | ENDPOINT_FLAGS
        for flag, settings in flags.items():
            q.add_argument(flag, **settings)
    parsers["scienceqa"] = add_scienceqa(sub)
    a = p.parse_args(argv)
    fault = check_flags(a)
    if fault:
        parsers[a.what].error(fault)
    return a


def check_endpoint(a):
    """What is wrong with the flags about an endpoint, or None."""
    url = getattr(a, "endpoint", None)
    if not url:
        if getattr(a, "estimate", False):
            return "--estimate is of what an endpoint costs: give --endpoint"
        return None
    key = os.environ.get(a.key_env, "")
    address = re.fullmatch(
        r"(https?)://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/[\w./~-]*)?", url, re.A)
    if not address:
        return "--endpoint: give a URL such as https://host/v1"
    if not a.endpoint_model:
        return "--endpoint needs --endpoint-model: which of its models to ask"
    if not re.fullmatch(r"[!-~]*", key):
        return "the key holds what no header may: set its variable again"
    is_local = address[2] in ("localhost", "127.0.0.1", "[::1]")
    if key and address[1] == "http" and not is_local:
        return "--endpoint: http shows the key to all on the way: use https, or unset its variable"
    return None


def check_kind(a):
    """What is wrong with the flags of conversation, detail or reasoning, or None."""
    if bool(a.captions) == bool(a.toy):
        return "give --captions FILE or --toy N"
    if a.endpoint and a.llm or a.captions and not (a.endpoint or a.llm):
        return "who answers? --endpoint URL or --llm FOLDER (only --toy has its own oracle)"
    if a.captions and a.what != "conversation" and not a.instances:
        return f"{a.what} needs the boxes too: --instances FILE"
    return None


def check_source(a):
    """What is wrong with the flags of caption or curate, or None."""
    is_folder = os.path.isdir(a.source)
    if a.model and not os.path.exists(a.source):
        return f"{a.source}: no such file or folder"
    if is_folder != bool(a.model) or a.what == "caption" and not is_folder:
        return f"{a.source}: a folder of pictures needs --model, and --model a folder"
    if not a.prompt.strip() or not a.prompt.isprintable():
        return "--prompt: give it some printable words"
    if os.path.realpath(a.source) == os.path.realpath(a.out):
        return "--out would replace its own input"
    return None


def check_scienceqa(a):
    """What is wrong with the flags of scienceqa, or None."""
    inputs = [os.path.join(a.source, name) for name in ("problems.json", "pid_splits.json")]
    if os.path.realpath(a.out) in map(os.path.realpath, inputs):
        return "--out would replace its own input"
    parts = PurePath(a.prefix).parts
    if os.path.isabs(a.prefix) or ".." in parts or a.prefix and not parts:
        return f"--prefix {a.prefix}: must be a folder inside that of --images, such as val"
    return None


def check_flags(a):
    """What is wrong with a command line, or None."""
    if not os.path.isdir(os.path.dirname(a.out) or ".") or os.path.isdir(a.out):
        return f"--out {a.out}: not a file in a folder that exists"
    if a.what == "scienceqa":
        return check_scienceqa(a)
    return check_endpoint(a) or (check_kind(a) if a.what in KINDS else check_source(a))
