"""TODO"""

import os
import random

import torch

import data
from decoding.loading import load_model
from formats.checkpoints import resolve
from formats.errors import note, UsageError
from formats.pictures import picture_path
from formats.strict_json import read_config
from formats.chat_templates import end_ids, folder_template
from decoding.chat import see
from decoding.prompt import build_prompt
from decoding.stopping import spell as stream_text
from generate import generate_batch
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
from toy import texts as toy_texts
from toy.texts import description, dialogue, KIND_WEIGHTS, question


def from_truth(args, jobs, journal):
    """The world writes in the blocks that it asks of others; all of it is true."""
    for _, some in unanswered_chunks(jobs, journal, 200):
        made = []
        for job in some:
            dice = random.Random(f"{args.what}:{args.seed}:{job.name}")
            if args.what == "detail":
                text = description(job.scene)
            elif args.what == "conversation":
                often = [n * (kind != "reasoning") for kind, n in zip(toy_texts.KINDS, KIND_WEIGHTS)]
                text = format_qa(dialogue(job.scene, dice, 4, often, described=0))
            else:
                asked = None
                while not asked:                    # some scenes have no two colours to compare
                    asked = question(job.scene, "reasoning", dice)
                text = format_qa([asked[:2]])
            made.append((job, text, ""))
        yield made


def from_llama(args, jobs, journal):
    """A LLaMA on this machine; the request is its template's first turns."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    if args.template and args.template not in data.TEMPLATES:
        raise UsageError(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    folder = resolve(args.llm)
    llm, words = Llama.from_pretrained(folder, dtype), data.Tokenizer(folder)
    template = args.template or folder_template(folder, words, data.TEMPLATES, data.prompt) or "v1"
    try:
        device = auto if args.device == "auto" else args.device
        llm = llm.to(device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)               # kernels start on the current one
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {args.device}: {why}: try --device cpu") from None
    eos = data.end_ids(template, words) | end_ids(folder, read_config(folder))
    for start, some in unanswered_chunks(jobs, journal, args.batch_size):
        rows = []
        for job in some:
            (_, first), (_, second), *rest = job.request
            turns = [f"{first}\n\n{second}", *(text for _, text in rest)]
            rows.append(data.prompt_tokens([{"from": ("human", "gpt")[i % 2], "value": text}
                                       for i, text in enumerate(turns)], template, words, 0))
        said = generate_batch(llm, rows, max_new_tokens=args.max_tokens, eos=eos,
                              temperature=args.temperature or 0.0, seed=args.seed + start)
        yield [(job, words.decode(x), "" if x.finish_reason == "end" else "cut off")
               for job, x in zip(some, said)]


def from_vlm(args, jobs, journal):
    """A model that sees describes pictures; in curation, one that was brief is asked to go on."""
    model = load_model(args)
    # a captioner hears no question, an InstructBLIP only the last
    more = args.what == "curate" and data.template_of(model.template).style not in (
        "plain", "instruct")

    def say(turns, seen, seed):
        """[(tokens, is it whole?, text)]"""
        rows = [build_prompt(t, model.template, model.tokenizer) for t in turns]
        said = generate_batch(model, rows, [x for x, _ in seen], sizes=[size for _, size in seen],
                              seed=seed, max_new_tokens=args.max_tokens,
                              temperature=args.temperature or 0.0)
        return [(len(x), x.finish_reason == "end", "".join(stream_text(x, model.tokenizer)).strip())
                for x in said]

    for start, some in unanswered_chunks(jobs, journal, args.batch_size):
        good, bad = [], []
        for job in some:
            try:
                job.image.encode()                          # a name may be no text
                good.append((job, see(picture_path(
                    args.source, job.image, args.follow_links), model)))
            except (data.BadImage, data.BadData, UnicodeEncodeError) as error:
                note(f"skipped: {error}")
                bad.append((job, "", "not a usable picture"))
        said = say([[args.prompt]] * len(good), [x for _, x in good], args.seed + start)
        texts = [text for *_, text in said]
        if brief := [i for i, (n, *_) in enumerate(said) if more and n <= args.short]:
            added = say([[args.prompt, texts[i], CONTINUE_PROMPT] for i in brief],
                        [good[i][1] for i in brief], args.seed + start)
            for i, (*_, text) in zip(brief, added):
                texts[i] = f"{texts[i]} {text}".strip()
        # a description that breaks off is repaired in curation, and else no caption
        ends = [whole or args.what == "curate" for _, whole, _ in said]
        yield [(job, text, "" if text and end else "cut off" if text else "empty")
               for (job, _), text, end in zip(good, texts, ends)] + bad


def curate(args, journal):
    """[(job, text, reason of a rejection)] described or read, and mended if there is an endpoint;
    None if only the cost was asked for."""
    if os.path.isdir(args.source):
        said = describe_folder(args, journal)
    else:
        said, path = [], args.source
        for i, row in enumerate(data.read_conversations(path), 1):
            turns, where = row["conversations"], f"{path}: row {i}"
            if len(turns) != 2 or turns[1]["from"] not in ("gpt", "assistant"):
                raise data.BadData(f"{where}: conversations: must be a question and a description: "
                                   "remove the row")
            name, image = str(row["id"]), coco_field(where, row, "image")
            said.append((Request(name, image, cache_key(path, i)), turns[1]["value"], ""))
    if not args.endpoint:
        return said
    who = "mend", args.endpoint, args.endpoint_model, args.temperature, args.max_tokens, args.seed
    jobs = [Request(job.name, job.image, cache_key(*who, job.key, text),
                [("system", REPAIR_PROMPT), ("user", text)]) for job, text, lost in said if not lost]
    if not ask_endpoint(args, jobs, journal):
        return None
    return [row for row in said if row[2]] + replies_in_order(jobs, journal)


def describe_folder(args, journal):
    jobs = list(folder_requests(args))
    if not jobs:
        raise data.BadData(f"{args.source}: holds no picture: give another folder")
    record_all(jobs, from_vlm(args, jobs, journal), journal, "describe")
    return replies_in_order(jobs, journal)


def generate_texts(args, journal):
    """LLaVA's three kinds: [(job, text, reason of a rejection)], or None."""
    known, jobs = list(toy_scenes(args) if args.toy else read_coco(args)), []
    who = args.endpoint_model or args.llm and model_fingerprint(args.llm) or "the world"
    how = (args.what, args.endpoint, who, args.seed, args.temperature, args.max_tokens,
           args.template, args.dtype)
    for name, image, captions, boxes, *scene in known:
        sent = (*few_shot_messages(args.what, args.shots), ("user", image_context(args.what, captions, boxes)))
        jobs.append(Request(name, image, cache_key(*how, name, image, sent), sent, *scene))
    if args.endpoint:
        return replies_in_order(jobs, journal) if ask_endpoint(args, jobs, journal) else None
    record_all(jobs, (from_llama if args.llm else from_truth)(args, jobs, journal), journal, args.what)
    return replies_in_order(jobs, journal)
