"""evaluate.vqa: VQAv2 and OK-VQA by the official accuracy, GQA by exact match.

    questions.json (annotations.json) --read_questions--> questions
    --answers_to_file--> OUT, one row an answer; OUT.results.json, which the test server takes
    --normalise--> vqa_accuracy, by the kind of answer and of question; vqaeval_accuracy beside it

Ten people have answered each question of VQAv2. An answer that three of them gave is right, one
that two gave is two thirds right. Officially each of the ten is left out once, and the ten scores
are averaged, so that with k people of ten agreeing

    k                 0     1     2     3     4 and more
    accuracy          0     .3    .6    .9    1

Before they are compared, answers are normalised: lower case, no articles, numbers as digits,
contractions with their apostrophe, no punctuation. The rules and their quirks are vqaEval.py's.
GQA has one answer; LAVIS compares it with the same normalisation of the model's.

[VQA] 1505.00468 and vqaEval.py; [OK-VQA] 1906.00067; [GQA] 1902.09506; [BLIP-2] 4.2.
"""
import re
from collections import Counter
from pathlib import Path

import data
from evaluate.benchmarks import answers_to_file, require, SHORT_ANSWER
from formats import language_models
from formats.checkpoints import resolve
from formats.errors import UsageError
from formats.files import write_json
from formats.strict_json import read_config, read_json

# without the apostrophe -> with it
CONTRACTIONS = {word.replace("'", ""): word for word in """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's i'm i've isn't it'd it'll ma'am mightn't might've mustn't must've needn't o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've""".split()}
# quirk: the official table is cased, and is asked in lower case: these two are never met
for cased in ("im", "ive"):
    del CONTRACTIONS[cased]
# two apostrophes, of which one is there or none; and a few odd rows of the official table
for word in """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've someone'd've
        something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've""".split():
    first, middle, last = word.split("'")
    CONTRACTIONS[f"{first}{middle}'{last}"] = word
    CONTRACTIONS[f"{first}'{middle}{last}"] = word
CONTRACTIONS |= {
    "let's": "let's", "she's": "she's", "notve": "not've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've",
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}
DIGITS = dict(zip(("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
                   "nine", "ten"), ("0", *map(str, range(11)))))
ARTICLES = "a", "an", "the"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")            # quirk: one before a digit stays, and one behind goes

# what BLIP-2 is asked, by its language model [BLIP-2] 4.2; others as LLaVA-1.5
PROMPTS = {"blip2_opt": "Question: {} Answer:", "blip2_t5": "Question: {} Short answer:"}
ASKED = f"{{}}\n{SHORT_ANSWER}"


# ------------------------------------------------------------------------------ the official rules

def strip_punctuation(text):
    """processPunctuation. quirk: a sign that stands beside a space anywhere in the text, or a comma
    between digits, makes all of that sign vanish; else it becomes a space."""
    out = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        vanishes = beside_space or COMMA_IN_NUMBER.search(text)
        out = out.replace(sign, "" if vanishes else " ")
    return PERIOD.sub("", out, count=32)    # quirk: a flag is passed as the count


def strip_articles(text):
    """processDigitArticle: lower case, number words as digits, no articles, contractions."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    words = [word for word in words if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def normalise(text):
    """A model's answer as it is compared."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return strip_articles(strip_punctuation(text))


def agreement(answer, given):
    """Accuracy, 0 to 1: the mean over the people of min(1, others who gave this answer / 3)."""
    scores = []
    for left_out in range(len(given)):
        others = given[:left_out] + given[left_out + 1:]
        scores.append(min(1, others.count(answer) / 3))
    return sum(scores) / len(scores)


def vqa_accuracy(answer, given):
    """Accuracy of a model's answer against those that people have given, all normalised."""
    return agreement(normalise(answer), [normalise(text) for text in given])


def vqaeval_accuracy(answer, given):
    """The same by the letter of vqaEval.py. quirk: where all people agree, nothing is normalised
    but the case, so that "Yes." is wrong against ten times "yes". LAVIS, by which BLIP-2's figures
    were made, normalises the model's answer there, too."""
    if len(set(given)) > 1:
        return vqa_accuracy(answer, given)
    return agreement(answer.strip().lower(), [text.strip().lower() for text in given])


# ------------------------------------------------------------------------------------- the files

def picture_name(args, subset, number):
    """The picture of an image id in COCO's naming, where --images holds it."""
    names = [f"COCO_{subset}_{number:012}.jpg", f"{subset}/COCO_{subset}_{number:012}.jpg",
             f"{number:012}.jpg"]
    for name in names:
        if (Path(args.images) / name).exists():
            return name
    return names[0]                         # it is missed by this name


def read_vqa(args, table):
    """Questions of VQAv2 or OK-VQA, and their annotations, if there are any."""
    subset = table.get("data_subtype")
    rows = require(args.questions, table, questions="objects", data_subtype="text")["questions"]
    answers = {}
    if args.annotations:
        notes = read_json(args.annotations)
        notes = require(args.annotations, notes, annotations="objects")["annotations"]
        for i, note in enumerate(notes):
            where = f"{args.annotations}: annotations[{i}]"
            require(where, note, question_id="a whole number or text", answers="objects")
            given = [require(where, one, answer="text")["answer"] for one in note["answers"]]
            if not given:
                raise data.BadData(f"{where}.answers: is empty: give the official file")
            answers[note["question_id"]] = {**note, "given": given}
    questions, seen = [], set()
    for i, row in enumerate(rows):
        where = f"{args.questions}: questions[{i}]"
        row = require(where, row, question="text", question_id="a whole number or text",
                      image_id="a whole number")
        if row["question_id"] in seen:
            raise data.BadData(f"{where}.question_id: {row['question_id']!r} is there twice: "
                               "remove one")
        seen.add(row["question_id"])
        if answers and row["question_id"] not in answers:
            raise data.BadData(f"{where}: {args.annotations} has no answers to question "
                               f"{row['question_id']}: give the files of one split")
        note = answers.get(row["question_id"], {})
        questions.append({"where": where, "id": row["question_id"], "question": row["question"],
                          "image": picture_name(args, subset, row["image_id"]),
                          "given": note.get("given"), "groups": [
                              f"{key} {note[key]}" for key in ("answer_type", "question_type")
                              if note.get(key)]})
    return questions


def read_gqa(args, table):
    """Questions of GQA: one object, with the answer beside each question."""
    questions = []
    for name, row in table.items():
        row = require(f"{args.questions}: {name}", row, question="text", imageId="text",
                      answer="text or null")
        questions.append({"where": row["where"], "id": name, "question": row["question"],
                          "image": f"{row['imageId']}.jpg", "answer": row.get("answer"),
                          "groups": []})
    return questions


def read_questions(args):
    """(questions, "gqa" or "vqa") of --questions. Raises data.BadData."""
    table = read_json(args.questions)
    if isinstance(table, dict) and "questions" in table:
        return read_vqa(args, table), "vqa"
    rows = list(table.values()) if isinstance(table, dict) else []
    if rows and isinstance(rows[0], dict) and "imageId" in rows[0]:
        if args.annotations:
            raise UsageError("--annotations: GQA's answers stand in its questions: leave it out")
        return read_gqa(args, table), "gqa"
    raise data.BadData(f"{args.questions}: neither VQA's questions (a list `questions`) nor GQA's "
                       "(an object of questions with imageId): give the official file")


# ----------------------------------------------------------------------------------- the command

def mean_by_group(scored):
    """{group: {"accuracy", "questions"}} of [(question, score)], "all" last."""
    sums, counts = Counter(), Counter()
    for q, score in scored:
        for group in (*q["groups"], "all"):
            sums[group] += score
            counts[group] += 1
    return {group: {"accuracy": sums[group] / counts[group], "questions": counts[group]}
            for group in sorted(counts, key=lambda name: (name == "all", name))}


def published_settings(args, prompts, other, length_penalty):
    """Fill args.prompt and args.settings: of a BLIP-2 with OPT or FlanT5 as published, of other
    models greedy. prompts: {template: prompt}; other: the prompt of other models."""
    beams = 1
    c = read_config(resolve(args.model))
    if c.get("model_type") == "blip-2":
        kind = language_models.kind_of(c.get("text_config", {}))
        template = args.template or c.get("template", language_models.BLIP2_TEMPLATES[kind])
        if template in prompts:
            beams, other = 5, prompts[template]
    if args.prompt is None:
        args.prompt = other
    args.settings = {"num_beams": args.num_beams or beams}
    if args.settings["num_beams"] > 1:
        penalty = length_penalty if args.length_penalty is None else args.length_penalty
        args.settings["length_penalty"] = penalty
    elif args.length_penalty is not None:
        raise UsageError("--length-penalty compares beams: give --num-beams above 1, or leave it "
                         "out")


def vqa(args):
    """Ask all questions, and print the accuracy where the files hold the answers."""
    published_settings(args, PROMPTS, ASKED, -1.0)
    questions, kind = read_questions(args)
    for q in questions:
        q["text"] = args.prompt.replace("{}", q["question"])
    pairs, left_out = answers_to_file(args, questions)
    results = [{"question_id": q["id"], "answer": normalise(row["text"])} for q, row in pairs]
    write_json(f"{args.out}.results.json", results)
    figures = {"prompt": args.prompt, "left out": len(left_out)}
    if kind == "gqa":
        known = [(q, row["text"]) for q, row in pairs if q["answer"] is not None]
        exact = [(q, float(text.strip() == q["answer"])) for q, text in known]
        scored = [(q, float(normalise(text) == normalise(q["answer"]))) for q, text in known]
    else:
        known = [(q, row["text"]) for q, row in pairs if q["given"]]
        scored = [(q, vqa_accuracy(text, q["given"])) for q, text in known]
        exact = [(q, vqaeval_accuracy(text, q["given"])) for q, text in known]
    if not scored:
        print(f"{len(pairs)} answers in {args.out}.results.json; the files hold no answers of "
              "people, so there is no accuracy")
        return figures
    figures["groups"] = mean_by_group(scored)
    name = "exact match as written" if kind == "gqa" else "by the letter of vqaEval.py"
    figures[name] = sum(score for _, score in exact) / len(exact)
    print(f"{'GQA, exact match' if kind == 'gqa' else 'VQA accuracy'}, {args.prompt!r}")
    for group, row in figures["groups"].items():
        print(f"  {group:<40}{100 * row['accuracy']:6.2f} of {row['questions']:,}")
    print(f"  {'all, ' + name:<40}{100 * figures[name]:6.2f}")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    return figures
