"""formats/scienceqa.py: ScienceQA's files, and its problems as a model reads and answers them.

    problems.json     {"7": {question, choices, answer (from 0), hint, lecture, solution, image}}
    pid_splits.json   {"train": ["7", ...], "val": [...], "test": [...], "minival": [...] ...}
    images/train/7/image.png

    QCM-LEA   LLaVA trained on ScienceQA: question, context, choices -> lecture, solution, answer
    CQM-A     LLaVA-1.5, which is only asked: context, question, choices -> a letter

[ScienceQA] 2209.09513; haotian-liu/LLaVA scripts/convert_sqa_to_llava.py and its base_prompt.
"""

import os

from formats.conversations import IMAGE_TOKEN
from formats.errors import BadData
from formats.fields import require
from formats.strict_json import read_json

LETTERS = "A", "B", "C", "D", "E"
LETTER = "Answer with the option's letter from the given choices directly."
FIELDS = dict(question="text", choices="texts", hint="text", answer="a whole number",
              image="text or null", subject="text", grade="text")
ANSWER_FIELDS = dict(lecture="text", solution="text")


def read_problems(problems_file, splits_file, split, **more):
    """The problems of a split, in its order: each with `id` and `where`, its place in the file.

    more: fields beside FIELDS that must be there. Raises BadData naming file, problem and field."""
    problems, splits = read_json(problems_file), read_json(splits_file)
    ids = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(ids, list) or not ids or not isinstance(problems, dict):
        raise BadData(f"{splits_file}: has no list {split!r}, or {problems_file} is no table: give "
                      "pid_splits.json and problems.json")
    found = []
    for name in ids:
        where = f"{problems_file}: {name}"
        if str(name) not in problems:
            raise BadData(f"{problems_file}: no problem {name}, which {splits_file} names in "
                          f"{split!r}: give the two files of one release, or correct one of them")
        p = require(where, problems[str(name)], **FIELDS, **more)
        if not 0 <= p["answer"] < len(p["choices"]) <= len(LETTERS):
            raise BadData(f"{where}: needs 1 to 5 choices, and as answer the number of one, from "
                          "0: correct the row")
        found.append({**p, "id": name})
    return found


def picture_name(problem):
    """The picture's file, relative to the folder of the split's pictures; None: there is none."""
    return f"{problem['id']}/{problem['image']}" if problem["image"] else None


def question_text(problem):
    """Question, context and choices of QCM-LEA, as the official converter writes them."""
    hint, choices = problem["hint"].strip(), zip(LETTERS, problem["choices"])
    options = " ".join(f"({letter}) {choice}" for letter, choice in choices)
    text = f"Question: {problem['question']}\nContext: {hint or 'N/A'}\nOptions: {options}"
    # quirk: two spaces become one, once; "Question: " goes wherever it stands; so does "BECAUSE:",
    # but only from a text that ends with it
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace("Question: ", "")


def answer_text(problem):
    """Lecture, solution and answer of QCM-LEA, as the official converter writes them."""
    # quirk: a backslash and an n in the file become a line's end, like the line ends themselves
    lecture, solution = (problem[name].replace("\\n", "\n") for name in ("lecture", "solution"))
    text = f"Answer: {lecture} {solution} The answer is {LETTERS[problem['answer']]}."
    # quirk: so without lecture and solution the answer begins with a space
    return text.replace("  ", " ").strip().replace("Answer: ", "")


def training_row(problem, prefix=""):
    """A problem as a row of LLaVA's training file, in which the picture stands last. prefix: a
    folder to put before the picture's name."""
    text, image = question_text(problem), picture_name(problem)
    row = {"id": problem["id"]}
    if image:
        row["image"] = os.path.join(prefix, image)
        text = f"{text}\n{IMAGE_TOKEN}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer_text(problem)}]
    return {**row, "conversations": turns}


def prompt_text(problem, form):
    """A problem as a model is asked about it, behind the picture if there is one."""
    if form == "QCM-LEA":                       # for a model that lectures first
        return question_text(problem).replace(IMAGE_TOKEN, "").strip()
    # quirk: no released script writes this form; it is that of the released llava_test_CQM-A.json
    hint = problem["hint"].strip()
    lines = [f"Context: {hint}"] if hint else []
    lines += [problem["question"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"])]
    return "\n".join(lines).replace(IMAGE_TOKEN, "").strip() + f"\n{LETTER}"
