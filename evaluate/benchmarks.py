"""evaluate.benchmarks: ScienceQA and POPE, by their official rules, and what all benchmarks share.

    official file --read_rows, require--> questions --answers_to_file--> OUT, one row an answer
                                                                         |
    scienceqa  parse_choice, by subject, context and grade <-------------+
    pope       is_no: accuracy, precision, recall, F1, yes rate <--------+

Answers are greedy, as in LLaVA-1.5's tables. Each is kept in OUT.answers.jsonl under a hash of all
that it depends on, so a run that was killed is resumed. The official rules are kept with their
quirks; a second figure stands beside them where a quirk decides.

[ScienceQA] 2209.09513, eval_science_qa.py and convert_sqa_to_llava.py.  [POPE] 2305.10355.
"""
import json
import re
from collections import Counter
from pathlib import Path

import data
from decoding.loading import load_model
from decoding.pictures import load_picture
from decoding.prompt import build_prompt, prompt_length
from formats.checkpoints import resolve
from formats.conversations import IMAGE_TOKEN
from formats.errors import note, UsageError
from formats.fields import require
from formats.files import atomic_write, read_text
from formats.pictures import picture_path
from formats.scienceqa import LETTERS, picture_name, prompt_text, read_problems
from formats.strict_json import iter_rows
from generate import generate_batch, stream_text
from instruct.journal import (
    cache_key,
    Journal,
    model_fingerprint,
    record_all,
    replies_in_order,
    Request,
    unanswered_chunks,
)

SHORT_ANSWER = "Answer the question using a single word or phrase."


# ------------------------------------------------------------------------------ reading rows

def read_rows(path, key, **kinds):
    """{value of `key`: row} of a file of JSON lines, in its order. Raises data.BadData."""
    try:
        text = read_text(path, 1_000_000_000, "surrogateescape")
    except (OSError, ValueError) as error:
        raise data.BadData(f"{path}: cannot be read ({error}): give the official file") from None
    rows = {}
    for _, place, row in iter_rows(text):
        where = f"{path}: {place}"
        if isinstance(row, data.BadData):
            raise data.BadData(f"{where}: {row}")
        row = require(where, row, **kinds)
        if row[key] in rows:
            raise data.BadData(f"{where}.{key}: {row[key]!r} is there twice: remove one")
        rows[row[key]] = row
    if not rows:
        raise data.BadData(f"{path}: holds no rows: give the official file")
    return rows


def write_lines(path, rows):
    """JSON lines, whole or not at all."""
    atomic_write(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------- the answers

def prompt_and_picture(args, model, job):
    """(ids, (pixels, sizes)) of a question. Raises BadImage, or BadData if it is too long."""
    if job.image:                               # the picture stands first
        ids = build_prompt([job.request], model.template, model.tokenizer)
        path = picture_path(args.images, job.image, args.follow_links)
        picture = load_picture(model, path)
    else:
        turns = [{"from": "human", "value": job.request}]
        ids = data.prompt_tokens(turns, model.template, model.tokenizer, pictures=0)
        picture = None, None
    if prompt_length(model, ids, picture[1]) >= model.llm.config.context:
        raise data.BadData("longer than the model's context: take another model")
    return ids, picture


def model_answers(args, jobs, journal):
    """Yield [(job, answer, "")], a batch at a time; a question that cannot be asked is put off."""
    model = load_model(args)
    captions = getattr(args, "what", None) == "caption"         # there a captioner is right
    if not captions and data.template_of(model.template).style == "plain":
        raise UsageError(f"{args.model}: has learnt to caption, not to answer: take a model of "
                         "stage 2, or ask this one with --template v1")
    for _, chunk in unanswered_chunks(jobs, journal, args.batch_size):
        asked, prompts, pixels, sizes = [], [], [], []
        for job in chunk:
            try:
                ids, picture = prompt_and_picture(args, model, job)
            except (data.BadImage, data.BadData) as error:
                journal.put_off([(job, str(error))], "it could not be asked")
                continue
            asked.append(job)
            prompts.append(ids)
            pixels.append(picture[0])
            sizes.append(picture[1])
        if not asked:
            continue
        rows = generate_batch(model, prompts, pixels, sizes=sizes,
                              max_new_tokens=args.max_new_tokens, **getattr(args, "settings", {}))
        texts = ["".join(stream_text(row, model.tokenizer)).strip() for row in rows]
        yield [(job, text, "") for job, text in zip(asked, texts)]


def requests_for(args, questions):
    """A Request for each question. Raises data.BadData if a picture is not there.

    The key holds the picture's size, so that another picture under the same name is asked anew."""
    who = [args.what, model_fingerprint(resolve(args.model)), args.template, args.dtype,
           args.max_new_tokens]
    if getattr(args, "settings", {}):
        who.append(sorted(args.settings.items()))
    jobs, size, missing = [], {None: 0}, []
    for q in questions:
        try:
            if q["image"] not in size:
                path = picture_path(args.images, q["image"], args.follow_links)
                size[q["image"]] = path.stat().st_size
        except data.BadData as error:
            missing.append(f"{q['where']}: {error}")
            continue
        key = cache_key(*who, q["image"], size[q["image"]], q["text"])
        jobs.append(Request(str(q["id"]), q["image"], key, q["text"]))
    if missing:
        more = ""
        if len(missing) > 1:
            more = f" (so are those of {len(missing) - 1:,} more question(s))"
        raise data.BadData(missing[0] + more)
    return jobs


def answers_to_file(args, questions):
    """Ask the model and write its answers to --out, in the official form.

    questions: {where, id, image, text, shown (the prompt as it is written down), metadata}.
    Returns ([(question, answer row)], [questions left out]).

    POPE's files share many of their questions: equal ones are asked once. A question whose picture
    is damaged, or that is longer than the context, is left out and named; if a picture is not
    there at all, none is asked."""
    jobs = requests_for(args, questions)
    unique, journal = list({job.key: job for job in jobs}.values()), Journal(args.out)
    with journal.file:
        if any(job not in journal for job in unique):
            record_all(unique, model_answers(args, unique, journal), journal, args.what)
        replies = replies_in_order(jobs, journal)
    pairs, left_out = [], []
    for q, (job, text, reason) in zip(questions, replies):
        if reason:
            left_out.append(q)
            if len(left_out) <= 10:
                note(f"left out: {q['where']}: {reason}")
            continue
        metadata = q.get("metadata")
        pairs.append((q, {
            "question_id": q["id"], "prompt": q.get("shown", q["text"]), "text": text,
            # the official id is random; ours is a hash, so that another answer has another id
            "answer_id": cache_key(job.key, q["id"], metadata, text),
            "model_id": str(args.model), "metadata": metadata if metadata is not None else {}}))
    if not pairs:
        raise data.BadData(f"none of the {len(questions)} questions could be asked: see the lines "
                           "above")
    write_lines(args.out, [row for _, row in pairs])
    return pairs, left_out


# --------------------------------------------------------------------------------- ScienceQA

def parse_choice(text, choices):
    """Which of so many choices an answer takes, by eval_science_qa.py; -1: one cannot tell."""
    hits = re.findall("The answer is ([A-Z]).", text)   # quirk: any sign will do at the end
    letter = None
    if text in LETTERS:
        letter = text
    elif text[:1] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    elif len(hits) == 1:
        letter = hits[0]
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


def parse_choice_leniently(text, choices):
    """The choice that an answer takes for a person: what `parse_choice` reads, and "(B)", "b.",
    "B) yes", "Answer: B", or the words of exactly one choice. -1: one cannot tell."""
    pick = parse_choice(text, len(choices))
    if pick >= 0:
        return pick
    text = re.sub(r"[*_`\"“”]", "", text).strip()
    behind = re.fullmatch(r"(?:.*\b)?(?:answer|option|choice)(?: is)?:?\s+(.*)", text, re.I | re.S)
    letters, words = set(), []
    for part in (text, behind[1] if behind else text):
        alone = re.match(r"\(?([A-Ea-e])(?:\)|[.:](?=\s|$)|$)|([A-E])\s*[-–—]\s", part)
        if alone:
            letters.add((alone[1] or alone[2]).upper())
        words.append(part.casefold().strip(" .!\n"))
    letters |= set(re.findall(r"\b(?:answer|option|choice)(?: is)?:?\s+\(?([A-E])\b(?! \w)", text))
    picks = {LETTERS.index(letter) for letter in letters}
    if not picks:
        picks = {i for i, choice in enumerate(choices) if choice.casefold().strip(" .!\n") in words}
    return picks.pop() if len(picks) == 1 and max(picks) < len(choices) else -1


def read_scienceqa(args):
    """The questions of a split. Raises data.BadData naming file, problem and field."""
    questions = []
    for p in read_problems(args.problems, args.splits, args.split):
        text, image = prompt_text(p, args.form), picture_name(p)
        shown = f"{IMAGE_TOKEN}\n{text}" if image else text
        questions.append({**p, "text": text, "image": image, "shown": shown})
    return questions


def scienceqa_groups(q):
    """The official groups that a question counts in."""
    groups = [q["subject"]]
    if q["hint"]:
        groups.append("text context")
    if q["image"]:
        groups.append("image context")
    if not q["hint"] and not q["image"]:
        groups.append("no context")
    low = q["grade"] in [f"grade{n}" for n in range(1, 7)]
    return [*groups, "grades 1-6" if low else "grades 7-12", "all"]


def scienceqa(args):
    """Print the accuracy by ScienceQA's own groups: the columns of LLaVA's table.

    An answer that the official rule does not read (`parse_choice`) is wrong; how many there are,
    and the accuracy if they are read leniently, stand beside it. The test split has 4,241
    questions."""
    hits, failed = {"all": []}, 0           # {group: [(by the official rule, read leniently)]}
    pairs, left_out = answers_to_file(args, read_scienceqa(args))
    for q, row in pairs:
        pick = parse_choice(row["text"], len(q["choices"]))
        failed += pick < 0
        hit = (pick == q["answer"],
               parse_choice_leniently(row["text"], q["choices"]) == q["answer"])
        for group in scienceqa_groups(q):
            if group:                       # a subject may be empty
                hits.setdefault(group, []).append(hit)
    groups = {}
    for group, some in hits.items():
        official, lenient = (sum(column) / len(some) for column in zip(*some))
        groups[group] = {"accuracy": official, "questions": len(some), "lenient": lenient}
    print(f"ScienceQA, {args.split}, {args.form}; {failed} answer(s) are wrong because the "
          "official rule reads no choice in them")
    for group, row in groups.items():
        print(f"  {group:<20}{row['accuracy']:.4f} of {row['questions']:,}   "
              f"read leniently {row['lenient']:.4f}")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    # "without a letter": what the count is called in older files
    return {"split": args.split, "form": args.form, "rejected by the official rule": failed,
            "without a letter": failed, "left out": len(left_out), "groups": groups}


# -------------------------------------------------------------------------------------- POPE

POPE_RATES = "accuracy", "precision", "recall", "F1", "yes rate"


def is_no(text):
    """Is it a no? POPE's rule: by the words of the first sentence, without commas.

    quirk: "NO" is a yes, like all that holds none of the three words between two spaces."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(no in words for no in ("No", "not", "no"))


def says_neither(text):
    """Is there neither yes nor no in it? The official rule counts it as a yes."""
    return not re.search(r"\b(yes|no|not|\w+n['’]t)\b", text, re.I)


def read_pope(args):
    """(questions of all files, their names). Raises data.BadData, UsageError."""
    questions, kinds = [], []
    for path in args.questions:
        kind = Path(path).stem.removeprefix("coco_pope_")
        if kind in kinds:
            raise UsageError(f"--questions: two files would be the row {kind}: rename one")
        kinds.append(kind)
        for q in read_rows(path, "question_id", question_id="a whole number or text", image="text",
                           text="text", label="text").values():
            if q["label"] not in ("yes", "no"):
                raise data.BadData(f"{q['where']}.label: must be yes or no: correct the row")
            questions.append({**q, "id": q["question_id"], "text": f"{q['text']}\n{SHORT_ANSWER}",
                              "metadata": {"category": kind}})
    return questions, kinds


def pope_rates(n):
    """POPE_RATES of n: Counter {(answered yes, is yes): questions}. A rate of nothing is 0."""
    hit, total = n[True, True], n.total()
    answered, is_yes = hit + n[True, False], hit + n[False, True]
    rates = ((hit + n[False, False]) / max(1, total), hit / max(1, answered),
             hit / max(1, is_yes), 2 * hit / max(1, answered + is_yes), answered / max(1, total))
    return {"questions": total, **dict(zip(POPE_RATES, rates))}


def pope(args):
    """Print a row for each file. Precision and recall are those of yes.

    Ours: notes where the figures do not depend on the pictures."""
    questions, kinds = read_pope(args)
    counts = {kind: Counter() for kind in kinds}
    notes = {kind: Counter() for kind in kinds}
    pairs, left_out = answers_to_file(args, questions)
    for q, row in pairs:
        kind = q["metadata"]["category"]
        counts[kind][not is_no(row["text"]), q["label"] == "yes"] += 1
        notes[kind]["neither yes nor no"] += says_neither(row["text"])
    for q in left_out:
        notes[q["metadata"]["category"]]["left out"] += 1
    # +: without the notes that are 0
    table = {kind: {**pope_rates(counts[kind]), **+notes[kind]} for kind in kinds}
    print(f"{'POPE':<16}{'questions':>10}" + "".join(f"{name:>11}" for name in POPE_RATES))
    for kind, row in table.items():
        cells = "".join(f"{row[name]:>11.4f}" for name in POPE_RATES)
        print(f"{kind:<16}{row['questions']:>10,}{cells}")
    for kind, row in table.items():
        if "neither yes nor no" in row:
            print(f"note: {kind}: {row['neither yes nor no']:,} of {row['questions']:,} answers "
                  "hold neither yes nor no; the official rule counts them as yes")
        if row["questions"] and row["yes rate"] in (0, 1):
            print(f"note: {kind}: every answer counts as {'yes' if row['yes rate'] else 'no'}: "
                  "these figures need no picture")
        if "left out" in row:
            print(f"note: {kind}: {row['left out']:,} question(s) could not be asked and are in no "
                  "figure")
    return table
