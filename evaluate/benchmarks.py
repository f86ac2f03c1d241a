"""TODO"""

import json
import os
import re
from collections import Counter
from pathlib import Path

import data
import generate
from decoding.loading import load_model
from decoding.pictures import load_picture
from decoding.prompt import prompt_length
from formats.checkpoints import resolve
from formats.conversations import IMAGE_TOKEN
from formats.errors import note, UsageError
from formats.files import read_text
from formats.pictures import picture_path
from formats.strict_json import is_broken_text, iter_rows, read_json
from generate import generate_batch
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
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "A", "B", "C", "D", "E"
FITS = {"text": lambda v: isinstance(v, str) and not is_broken_text(v),
        "a whole number": lambda v: type(v) is int,
        "texts": lambda v: isinstance(v, list) and all(map(FITS["text"], v)),
        "objects": lambda v: isinstance(v, list) and all(isinstance(x, dict) for x in v),
        "numbers": lambda v: isinstance(v, list) and all(type(x) in (int, float) for x in v),
        "null": lambda v: v is None}


def require(where, row, **kinds):
    """The row and its place, if every field is of its kind, as "text or null". Raises BadData."""
    for name, kind in kinds.items():
        value = row.get(name) if isinstance(row, dict) else None
        if not any(FITS[k](value) for k in kind.split(" or ")):
            raise data.BadData(f"{where}.{name}: must be {kind}, in valid UTF-8: correct the row")
    return {**row, "where": where}


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
    aside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(aside, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def model_answers(args, jobs, journal):
    """The model's answers, greedy as in LLaVA-1.5's tables; the picture stands first."""
    model = load_model(args)
    if data.template_of(model.template).style == "plain":
        raise UsageError(f"{args.model}: has learnt to caption, not to answer: take a model of "
                         "stage 2, or ask this one with --template v1")
    for _, chunk in unanswered_chunks(jobs, journal, args.batch_size):
        some, rows, seen = [], [], []
        for job in chunk:
            try:
                row, picture = asked_of(args, model, job)
            except (data.BadImage, data.BadData) as error:
                journal.put_off([(job, str(error))], "it could not be asked")
                continue
            some.append(job)
            rows.append(row)
            seen.append(picture)
        if not some:
            continue
        said = generate_batch(model, rows, [x for x, _ in seen], sizes=[size for _, size in seen],
                              max_new_tokens=args.max_new_tokens)
        yield [(job, "".join(generate.stream_text(x, model.tokenizer)).strip(), "")
               for job, x in zip(some, said)]


def answers_to_file(args, asked):
    """Answers in the official form, written to --out, to questions {where, id, image, text, shown
    (the prompt as it is written down), metadata}: ([(question, answer)], [questions left out]).

    POPE's files share many of their questions: what is equal is put once. A question whose picture
    is damaged, or that is longer than the context, is left out and named; if a picture is not
    there at all, none is asked."""
    who = (args.what, model_fingerprint(resolve(args.model)), args.template, args.dtype,
           args.max_new_tokens)
    jobs, size, missing = [], {None: 0}, []
    for q in asked:
        try:
            if q["image"] not in size:
                size[q["image"]] = picture_path(args.images, q["image"],
                                                     args.follow_links).stat().st_size
        except data.BadData as error:
            missing.append(f"{q['where']}: {error}")
            continue
        key = cache_key(*who, q["image"], size[q["image"]], q["text"])
        jobs.append(Request(str(q["id"]), q["image"], key, q["text"]))
    if missing:
        more = f" (so are those of {len(missing) - 1:,} more question(s))" * (len(missing) > 1)
        raise data.BadData(missing[0] + more)
    once, journal = list({job.key: job for job in jobs}.values()), Journal(args.out)
    with journal.file:
        if any(job not in journal for job in once):
            record_all(once, model_answers(args, once, journal), journal, args.what)
        said = [(text, lost) for _, text, lost in replies_in_order(jobs, journal)]
    left_out = [(q, lost) for q, (_, lost) in zip(asked, said) if lost]
    for q, lost in left_out[:10]:
        note(f"left out: {q['where']}: {lost}")
    if len(left_out) == len(asked):
        raise data.BadData(f"none of the {len(asked)} questions could be asked: see the lines "
                           "above")
    rows = [{"question_id": q["id"], "prompt": q.get("shown", q["text"]), "text": text,
             # theirs is drawn; ours is a hash, so that another answer has another id
             "answer_id": cache_key(job.key, q["id"], q.get("metadata"), text),
             "model_id": str(args.model), "metadata": q.get("metadata", {})}
            for q, job, (text, lost) in zip(asked, jobs, said) if not lost]
    write_lines(args.out, rows)
    kept = [q for q, (_, lost) in zip(asked, said) if not lost]
    return list(zip(kept, rows)), [q for q, _ in left_out]


def scienceqa_prompt(problem, form):
    """A problem of ScienceQA as the model reads it, behind the picture if there is one."""
    question, hint, choices = problem["question"], problem["hint"].strip(), problem["choices"]
    if form == "QCM-LEA":           # convert_sqa_to_llava.py: for a model that lectures first
        options = " ".join(f"({n}) {c}" for n, c in zip(LETTERS, choices))
        text = f"Question: {question}\nContext: {hint or 'N/A'}\nOptions: {options}"
        # quirk: two spaces become one, once; "Question: " goes wherever it stands
        text = text.replace("  ", " ").strip().replace("Question: ", "")
        return text.replace(IMAGE_TOKEN, "").strip()
    # quirk: no released script writes this form; it is that of the released llava_test_CQM-A.json
    lines = [f"Context: {hint}"] * bool(hint) + [question]
    lines += [f"{n}. {c}" for n, c in zip(LETTERS, choices)]
    return "\n".join(lines).replace(IMAGE_TOKEN, "").strip() + f"\n{LETTER}"


def parse_choice(text, choices):
    """Which of so many choices an answer takes, by eval_science_qa.py; -1: one cannot tell."""
    hits = re.findall("The answer is ([A-Z]).", text)   # quirk: any sign will do at the end
    letter = (text if text in LETTERS else text[0] if text[:1] in LETTERS and text[1:3] == ". " else
              hits[0] if len(hits) == 1 else None)
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


def scienceqa(args):
    """Print the accuracy by ScienceQA's own groups. An answer that the official rule does not read
    (see `chosen`) is wrong; how many there are, and the accuracy if they are read leniently, stand
    beside it.

    [ScienceQA] 2209.09513. The columns of LLaVA's table; its test split has 4,241 questions."""
    problems, splits = read_json(args.problems), read_json(args.splits)
    ids = splits.get(args.split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids or not isinstance(problems, dict):
        raise data.BadData(f"{args.splits}: has no list {args.split!r}, or {args.problems} is no "
                           "table: give pid_splits.json and problems.json")
    asked = []
    for name in ids:
        where = f"{args.problems}: {name}"
        p = require(where, problems.get(str(name)), question="text", choices="texts", hint="text",
                    answer="a whole number", image="text or null", subject="text", grade="text")
        if not 0 <= p["answer"] < len(p["choices"]) <= len(LETTERS):
            raise data.BadData(f"{where}: needs 1 to 5 choices, and as answer the number of one, "
                               "from 0: correct the row")
        text = scienceqa_prompt(p, args.form)
        asked.append({**p, "id": name, "text": text, "image": p["image"] and f"{name}/{p['image']}",
                      "shown": f"{IMAGE_TOKEN}\n{text}" if p["image"] else text})
    groups, failed = {"all": []}, 0
    pairs, left_out = answers_to_file(args, asked)
    for q, row in pairs:
        pick = parse_choice(row["text"], len(q["choices"]))
        failed += pick < 0
        hit = pick == q["answer"], chosen_leniently(row["text"], q["choices"]) == q["answer"]
        low = q["grade"] in [f"grade{n}" for n in range(1, 7)]
        for group in (q["subject"], "text context" * bool(q["hint"]),
                      "image context" * bool(q["image"]),
                      "no context" * (not q["hint"] and not q["image"]),
                      "grades 1-6" if low else "grades 7-12", "all"):
            groups.setdefault(group, []).append(hit)
    groups.pop("", None)
    made = {group: {"accuracy": sum(hit for hit, _ in hits) / len(hits), "questions": len(hits),
                    "lenient": sum(hit for _, hit in hits) / len(hits)}
            for group, hits in groups.items()}
    print(f"ScienceQA, {args.split}, {args.form}; {failed} answer(s) are wrong because the "
          "official rule reads no choice in them")
    for group, row in made.items():
        print(f"  {group:<20}{row['accuracy']:.4f} of {row['questions']:,}   "
              f"read leniently {row['lenient']:.4f}")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    # "without a letter": what the count is called in older files
    return {"split": args.split, "form": args.form, "rejected by the official rule": failed,
            "without a letter": failed, "left out": len(left_out), "groups": made}


def is_no(text):
    """Is it a no? POPE's rule: by the words of the first sentence, without commas.

    quirk: "NO" is a yes, like all that holds none of the three words between two spaces."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return any(no in words for no in ("No", "not", "no"))


def pope(args):
    """Print a row for each file. [POPE] 2305.10355. Precision and recall are those of yes.

    Ours: a rate of nothing is 0, and notes where the figures do not speak of the pictures."""
    asked, counts, notes = [], {}, {}
    for path in args.questions:
        kind = Path(path).stem.removeprefix("coco_pope_")
        if kind in counts:
            raise UsageError(f"--questions: two files would be the row {kind}: rename one")
        counts[kind], notes[kind] = Counter(), Counter()
        for q in read_rows(path, "question_id", question_id="a whole number or text", image="text",
                       text="text", label="text").values():
            if q["label"] not in ("yes", "no"):
                raise data.BadData(f"{q['where']}.label: must be yes or no: correct the row")
            asked.append({**q, "id": q["question_id"], "text": f"{q['text']}\n{SHORT_ANSWER}",
                          "metadata": {"category": kind}})
    pairs, left_out = answers_to_file(args, asked)
    for q, row in pairs:
        kind = q["metadata"]["category"]
        counts[kind][not is_no(row["text"]), q["label"] == "yes"] += 1
        notes[kind]["neither yes nor no"] += says_neither(row["text"])
    for q in left_out:
        notes[q["metadata"]["category"]]["left out"] += 1
    made, names = {}, ("accuracy", "precision", "recall", "F1", "yes rate")
    for kind, n in counts.items():
        hit, total = n[True, True], n.total()
        yes, there = hit + n[True, False], hit + n[False, True]
        rates = ((hit + n[False, False]) / max(1, total), hit / max(1, yes), hit / max(1, there),
                 2 * hit / max(1, yes + there), yes / max(1, total))
        made[kind] = {"questions": total, **dict(zip(names, rates)), **+notes[kind]}
    print(f"{'POPE':<16}{'questions':>10}" + "".join(f"{name:>11}" for name in names))
    for kind, row in made.items():
        print(f"{kind:<16}{row['questions']:>10,}" + "".join(f"{row[n]:>11.4f}" for n in names))
    for kind, row in made.items():
        if unclear := row.get("neither yes nor no"):
            print(f"note: {kind}: {unclear:,} of {row['questions']:,} answers hold neither yes nor "
                  "no; the official rule counts them as yes")
        if row["questions"] and row["yes rate"] in (0, 1):
            print(f"note: {kind}: every answer counts as {'yes' if row['yes rate'] else 'no'}: "
                  "these figures need no picture")
        if lost := row.get("left out"):
            print(f"note: {kind}: {lost:,} question(s) could not be asked and are in no figure")
    return made


def asked_of(args, model, job):
    """(ids, (pixels, sizes)) of a question. Raises BadImage, or BadData if it is too long."""
    if job.image:
        row = generate.build_prompt([job.request], model.template, model.tokenizer)
        path = picture_path(args.images, job.image, args.follow_links)
        picture = load_picture(model, path)
    else:
        row, picture = data.prompt_tokens([{"from": "human", "value": job.request}], model.template,
                                     model.tokenizer, pictures=0), (None, None)
    if prompt_length(model, row, picture[1]) >= model.llm.config.context:
        raise data.BadData("longer than the model's context: take another model")
    return row, picture


def chosen_leniently(text, choices):
    """The choice that an answer takes for a reader: what `chosen` reads, and "(B)", "b.", "B) yes",
    "Answer: B", or the words of exactly one choice. -1: one cannot tell."""
    if (pick := parse_choice(text, len(choices))) >= 0:
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
    named = [i for i, choice in enumerate(choices) if choice.casefold().strip(" .!\n") in words]
    picks = {LETTERS.index(letter) for letter in letters} or set(named)
    return picks.pop() if len(picks) == 1 and max(picks) < len(choices) else -1


def says_neither(text):
    """Is there neither yes nor no in it? The official rule counts it as a yes."""
    return not re.search(r"\b(yes|no|not|\w+n['’]t)\b", text, re.I)
