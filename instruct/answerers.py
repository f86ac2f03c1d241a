"""instruct.answerers: who writes the text, and in which order the requests are made.

    from_truth   the toy world itself: every word is true
    from_llama   a LLaMA on this machine, which reads captions and boxes
    from_vlm     a model that sees the picture: captions, and descriptions to be curated
    (instruct/endpoint.py: a model behind an HTTP endpoint)

Each of them yields [(request, text, reason of a rejection or "")], a batch at a time, and the
journal keeps what it yields. `describe_folder`, `curate` and `generate_texts` return all answers in
the order of the pictures, or None if only the cost was asked for.
"""
import os
import random

import torch

import data
from decoding.loading import load_model
from decoding.pictures import load_picture
from decoding.prompt import build_prompt
from formats.chat_templates import end_ids, folder_template
from formats.checkpoints import resolve
from formats.errors import note, UsageError
from formats.pictures import picture_path
from formats.strict_json import read_config
from formats.templates import BLIP2
from generate import generate_batch, stream_text
from instruct.endpoint import ask_endpoint
from instruct.journal import (
    cache_key,
    model_fingerprint,
    record_all,
    replies_in_order,
    Request,
    unanswered_chunks,
)
from instruct.prompts import (
    CONTINUE_PROMPT,
    few_shot_messages,
    format_qa,
    image_context,
    REPAIR_PROMPT,
)
from instruct.sources import coco_field, folder_requests, read_coco, toy_scenes
from llama import Llama
from toy.texts import description, dialogue, KIND_WEIGHTS, KINDS, question

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -------------------------------------------------------------------------- from the toy world

def true_text(kind, scene, rng):
    """The text that a perfect author would write, in the form that authors are asked for."""
    if kind == "detail":
        return description(scene)
    if kind == "conversation":
        weights = [0 if name == "reasoning" else n for name, n in zip(KINDS, KIND_WEIGHTS)]
        return format_qa(dialogue(scene, rng, 4, weights, described=0))
    asked = None
    while not asked:                        # None: the scene has no two colours to compare
        asked = question(scene, "reasoning", rng)
    return format_qa([asked[:2]])


def from_truth(args, jobs, journal):
    """The world writes in the blocks that it asks of others; all of it is true."""
    for _, chunk in unanswered_chunks(jobs, journal, 200):
        answers = []
        for job in chunk:
            rng = random.Random(f"{args.what}:{args.seed}:{job.name}")
            answers.append((job, true_text(args.what, job.scene, rng), ""))
        yield answers


# ------------------------------------------------------------------------------ from a LLaMA

def to_device(llm, name):
    """The model on a device; "auto": a GPU if there is one. Raises UsageError."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if name == "auto" else name
    try:
        llm = llm.to(device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)               # kernels start on the current one
    except (RuntimeError, AssertionError) as error:     # what torch raises for a missing device
        why = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {name}: {why}: try --device cpu") from None
    return llm


def from_llama(args, jobs, journal):
    """A LLaMA on this machine; the request becomes its template's first turns."""
    if args.template and args.template not in data.TEMPLATES:
        raise UsageError(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    folder = resolve(args.llm)
    llm, tokenizer = Llama.from_pretrained(folder, DTYPES.get(args.dtype)), data.Tokenizer(folder)
    template = args.template
    if not template:
        template = folder_template(folder, tokenizer, data.TEMPLATES, data.prompt) or "v1"
    llm = to_device(llm, args.device)
    eos = data.end_ids(template, tokenizer) | end_ids(folder, read_config(folder))
    for start, chunk in unanswered_chunks(jobs, journal, args.batch_size):
        prompts = []
        for job in chunk:
            (_, system), (_, first), *rest = job.request
            # no template has a place for this system text: it opens the first turn
            texts = [f"{system}\n\n{first}", *(text for _, text in rest)]
            turns = [{"from": ("human", "gpt")[i % 2], "value": text}
                     for i, text in enumerate(texts)]
            prompts.append(data.prompt_tokens(turns, template, tokenizer, 0))
        rows = generate_batch(llm, prompts, max_new_tokens=args.max_tokens, eos=eos,
                              temperature=args.temperature or 0.0, seed=args.seed + start)
        yield [(job, tokenizer.decode(row), "" if row.finish_reason == "end" else "cut off")
               for job, row in zip(chunk, rows)]


# ----------------------------------------------------------------------- from a model that sees

def describe(model, args, turns, pictures, seed):
    """[(number of tokens, is it whole?, text)] of each conversation about its picture.

    turns: the texts of each; pictures: (pixels, sizes) of each."""
    prompts = [build_prompt(texts, model.template, model.tokenizer) for texts in turns]
    rows = generate_batch(model, prompts, [pixels for pixels, _ in pictures],
                          sizes=[sizes for _, sizes in pictures], seed=seed,
                          max_new_tokens=args.max_tokens, temperature=args.temperature or 0.0)
    replies = []
    for row in rows:
        text = "".join(stream_text(row, model.tokenizer)).strip()
        replies.append((len(row), row.finish_reason == "end", text))
    return replies


def load_pictures(args, model, chunk):
    """([(request, (pixels, sizes))], answers of those whose picture cannot be used)."""
    good, bad = [], []
    for job in chunk:
        try:
            job.image.encode()                          # a file's name may be no UTF-8
            path = picture_path(args.source, job.image, args.follow_links)
            good.append((job, load_picture(model, path)))
        except (data.BadImage, data.BadData, UnicodeEncodeError) as error:
            note(f"skipped: {error}")
            bad.append((job, "", "not a usable picture"))
    return good, bad


def from_vlm(args, jobs, journal):
    """A model that sees describes pictures; in curation, a short description is continued."""
    model = load_model(args)
    # a captioner reads no question, an InstructBLIP only the last one: neither can continue
    style = data.template_of(model.template).style
    can_continue = args.what == "curate" and style not in ("plain", "instruct", *BLIP2)
    for start, chunk in unanswered_chunks(jobs, journal, args.batch_size):
        good, bad = load_pictures(args, model, chunk)
        pictures, seed = [picture for _, picture in good], args.seed + start
        replies = describe(model, args, [[args.prompt]] * len(good), pictures, seed)
        texts = [text for *_, text in replies]
        short = []
        if can_continue:
            short = [i for i, (length, *_) in enumerate(replies) if length <= args.short]
        if short:
            turns = [[args.prompt, texts[i], CONTINUE_PROMPT] for i in short]
            more = describe(model, args, turns, [pictures[i] for i in short], seed)
            for i, (*_, text) in zip(short, more):
                texts[i] = f"{texts[i]} {text}".strip()
        answers = []
        for (job, _), text, (_, whole, _) in zip(good, texts, replies):
            reason = "" if text else "empty"
            # one that breaks off is repaired in curation; it is no caption
            if text and not whole and args.what != "curate":
                reason = "cut off"
            answers.append((job, text, reason))
        yield answers + bad


# ------------------------------------------------------------------------------ the commands

def describe_folder(args, journal):
    """A description of every picture of a folder."""
    jobs = list(folder_requests(args))
    if not jobs:
        raise data.BadData(f"{args.source}: holds no picture: give another folder")
    record_all(jobs, from_vlm(args, jobs, journal), journal, "describe")
    return replies_in_order(jobs, journal)


def read_descriptions(path):
    """The descriptions of a LLaVA JSON, as replies: a question and a description in each row."""
    replies = []
    for i, row in enumerate(data.read_conversations(path), 1):
        turns, where = row["conversations"], f"{path}: row {i}"
        if len(turns) != 2 or turns[1]["from"] not in ("gpt", "assistant"):
            raise data.BadData(f"{where}: conversations: must be a question and a description: "
                               "remove the row")
        image = coco_field(where, row, "image")
        job = Request(str(row["id"]), image, cache_key(path, i))
        replies.append((job, turns[1]["value"], ""))
    return replies


def curate(args, journal):
    """Descriptions, written or read, and repaired by an endpoint if there is one."""
    if os.path.isdir(args.source):
        replies = describe_folder(args, journal)
    else:
        replies = read_descriptions(args.source)
    if not args.endpoint:
        return replies
    who = "mend", args.endpoint, args.endpoint_model, args.temperature, args.max_tokens, args.seed
    rejected, jobs = [], []
    for job, text, reason in replies:
        if reason:
            rejected.append((job, text, reason))
            continue
        messages = [("system", REPAIR_PROMPT), ("user", text)]
        jobs.append(Request(job.name, job.image, cache_key(*who, job.key, text), messages))
    if not ask_endpoint(args, jobs, journal):
        return None
    return rejected + replies_in_order(jobs, journal)


def author_of(args):
    """What identifies who writes, for the keys of the answers."""
    if args.endpoint_model:
        return args.endpoint_model
    return model_fingerprint(args.llm) if args.llm else "the world"


def generate_texts(args, journal):
    """LLaVA's three kinds of text."""
    pictures = list(toy_scenes(args) if args.toy else read_coco(args))
    settings = (args.what, args.endpoint, author_of(args), args.seed, args.temperature,
                args.max_tokens, args.template, args.dtype)
    jobs = []
    for p in pictures:
        messages = (*few_shot_messages(args.what, args.shots),
                    ("user", image_context(args.what, p.captions, p.boxes)))
        key = cache_key(*settings, p.name, p.image, messages)
        jobs.append(Request(p.name, p.image, key, messages, p.scene))
    if args.endpoint:
        if not ask_endpoint(args, jobs, journal):
            return None
    else:
        write = from_llama if args.llm else from_truth
        record_all(jobs, write(args, jobs, journal), journal, args.what)
    return replies_in_order(jobs, journal)
