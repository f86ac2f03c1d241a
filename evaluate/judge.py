"""evaluate.judge: LLaVA-Bench. The model answers, a judge grades its answer beside a reference.

    questions, context, references --read_questions--> questions
    --answers_to_file--> OUT --review_request--> an endpoint --parse_scores--> OUT.reviews.jsonl

The judge sees captions (and boxes) instead of the picture. The score of a category is the mean
grade of the answers in percent of that of the references. Files, layout and rounding are LLaVA's
(eval_gpt_review_bench.py, summarize_gpt_review.py); the words sent to the judge are ours. The
papers' judge was gpt-4-0314, which is gone: figures of two judges do not compare.

[LLaVA] 2304.08485.
"""
import argparse

import data
from evaluate.benchmarks import answers_to_file, read_rows, require, write_lines
from formats.errors import note, UsageError, UserError
from formats.replies import without_thinking
from instruct.endpoint import ask_endpoint
from instruct.flags import check_flags, ENDPOINT_FLAGS
from instruct.journal import cache_key, Journal, Request

JUDGE_SYSTEM = "You compare answers with care and grade them fairly."
JUDGE_PROMPT = (
    "Two assistants have answered the question above, which a person asked while looking at a "
    "picture. You cannot see it; the context above tells what it shows, {}.\nGrade each answer "
    "from 1 to 10, the better the higher: does it help, does it keep to the question, is it "
    "true of the picture, does it tell enough?\nBegin with a line that holds two numbers with "
    "a space between them and nothing else, the grade of Assistant 1 and that of Assistant 2. "
    "From the next line on give your reasons in full. Take no side, and do not let it matter "
    "which answer you read first.")
KNOWN_BY_CAPTIONS = "in a few sentences"
KNOWN_BY_BOXES = ("in five sentences, and in the corners of its objects: (left, top, right, "
                  "bottom) in parts of its width and height, from 0 to 1")
ATTEMPTS = 3            # at a review in one run, while it has no two grades
NO_GRADES = [-1, -1]    # the official value where a review has no two grades


def picture_context(about):
    """(text, has boxes) of a row of the context file. Raises data.BadData."""
    # COCO: captions and instances. In the wild: caption, one text or several
    boxes, lines = about.get("instances"), about.get("captions", about.get("caption"))
    lines = [lines] if isinstance(lines, str) else lines
    require(about["where"], {"captions": lines, "instances": boxes}, captions="texts",
            instances="objects or null")
    known = "\n".join(lines)
    if boxes is None:
        return known, False
    rows = []
    for box in boxes:
        require(about["where"], box, category="text", bbox="numbers")
        rows.append(f"{box['category']}: {box['bbox']}")
    return known + "\n\n" + "\n".join(rows), True


def read_questions(args):
    """LLaVA-Bench's questions, each with what is known of its picture and the reference answer."""
    contexts = read_rows(args.context, "image", image="text")
    references = read_rows(args.references, "question_id", question_id="a whole number or text",
                           text="text")
    questions = []
    for q in read_rows(args.questions, "question_id", question_id="a whole number or text",
                       image="text", text="text", category="text").values():
        about, name = contexts.get(q["image"]), q["question_id"]
        if (about is None or name not in references
                or q["category"] not in ("conv", "detail", "complex")):
            raise data.BadData(f"{q['where']}: its image has no context, its question_id no "
                               "reference, or its category is none of conv, detail and complex: "
                               "are the three files of one benchmark?")
        known, has_boxes = picture_context(about)
        questions.append({**q, "id": name, "known": known, "boxes": has_boxes,
                          "best": references[name]})
    return questions


# ---------------------------------------------------------------------------------- reviews

def parse_scores(review):
    """[the reference's, the answer's] from a review's first line; NO_GRADES if there are not two.

    quirk: a comma is a space, so "8,9" is read and "8, 9", with two, is not."""
    try:
        pair = [float(word) for word in review.split("\n")[0].replace(",", " ").split(" ")]
    except ValueError:
        return NO_GRADES
    return pair if len(pair) == 2 and all(0 <= grade <= 100 for grade in pair) else NO_GRADES


def review_request(args, q, answer):
    """The request that asks the judge about one answer."""
    known = KNOWN_BY_BOXES if q["boxes"] else KNOWN_BY_CAPTIONS
    # quirk: officially there is a rule for each category, all three the same
    messages = (("system", JUDGE_SYSTEM), ("user", (
        f"[Context]\n{q['known']}\n\n[Question]\n{q['text']}\n\n"
        f"[Assistant 1]\n{q['best']['text']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{JUDGE_PROMPT.format(known)}\n\n")))
    key = cache_key(args.endpoint_model, args.temperature, args.max_tokens, messages)
    return Request(str(q["id"]), None, key, messages)


def attempts_of(job, journal):
    """(the next attempt's request, the reviews so far). A review without two grades is followed by
    another attempt, under a key of its own; where there are grades, the last attempt's request."""
    current, reviews = job, []
    while current in journal:
        text = journal.rows[current.key]["text"]
        reviews.append(without_thinking(text) or "")
        if parse_scores(reviews[-1]) != NO_GRADES:
            break
        key = cache_key(job.key, "again", len(reviews))
        current = Request(job.name, None, key, job.request)
    return current, reviews


def ask_judge(args, jobs, journal):
    """[a review, or None if there is none] of the jobs; None if only the cost was asked for.

    One without two grades is asked for again, ATTEMPTS times in a run. If those requests fail, the
    others count all the same."""
    for i in range(ATTEMPTS):
        attempts = [attempts_of(job, journal) for job in jobs]
        again = [request for request, reviews in attempts if reviews and request not in journal]
        if i and not again:
            break
        if again:
            note(f"asked for again: {len(again)} review(s) without two grades, first that "
                 f"of question {again[0].name}")
        requests = again if i else [request for request, _ in attempts]
        try:
            if not ask_endpoint(args, requests, journal):
                return None
        except UserError as error:
            if not i and not all(reviews for _, reviews in attempts):
                raise
            note(f"not asked for again: {error}")
            break
    texts = []
    for job in jobs:
        _, reviews = attempts_of(job, journal)
        texts.append(reviews[-1] if reviews else None)
    return texts


def write_reviews(path, pairs, texts):
    """Write the reviews that there are, in the official form; returns their rows."""
    rows = []
    for i, ((q, answer), text) in enumerate(zip(pairs, texts), 1):
        if text is None:
            continue
        prefix = "" if q["boxes"] else "llava_bench_"
        rows.append({"id": i, "question_id": q["id"],
                     "answer1_id": q["best"].get("answer_id", q["id"]),
                     "answer2_id": answer["answer_id"], "content": text,
                     "tuple": parse_scores(text), "category": prefix + q["category"]})
    write_lines(path, rows)
    return rows


# ----------------------------------------------------------------------------------- scores

def relative_score(pairs):
    """The answers' mean grade in percent of the references', and both means, as rounded by
    summarize_gpt_review.py. quirk: what has no grades counts as -1 in both. The score is None if
    the references have no grades."""
    reference, answer = (round(sum(column) / len(pairs), 3) for column in zip(*pairs))
    score = round(100 * answer / reference, 1) if reference > 0 else None
    return {"score": score, "reference": reference, "answer": answer, "questions": len(pairs)}


def print_scores(args, groups, failed, without_failed, left_out):
    """The table, and what is not in it. failed: reviews without two grades."""
    print(f"LLaVA-Bench, judged by {args.endpoint_model}: percent of the references")
    for group, row in groups.items():
        score = "  none" if row["score"] is None else f"{row['score']:6.1f}"
        print(f"  {group:<22}{score}   {row['answer']:.3f} to {row['reference']:.3f}, "
              f"{row['questions']} questions")
    if failed:
        names = ", ".join(f"{row['question_id']} ({row['category']})" for row in failed)
        score = "none" if without_failed is None else f"{without_failed:.1f}"
        print(f"  {len(failed)} review(s) without two grades count as -1 to -1, the official way; "
              f"without them, all: {score}; they "
              f"are those of question {names}, and are asked for again on the next run")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")


def read_judge_flags(args):
    """Parse the judge's flags, which are those of python -m instruct, into args."""
    flags = argparse.ArgumentParser(prog="python -m evaluate llava-bench", allow_abbrev=False)
    for flag, settings in ENDPOINT_FLAGS.items():
        flags.add_argument(flag, **settings)
    flags.parse_args(args.rest, args)
    args.seed = 0
    # an endpoint is checked as it is there
    same = {**vars(args), "what": "conversation", "captions": True, "toy": None, "llm": None}
    fault = check_flags(argparse.Namespace(**same))
    if fault:
        raise UsageError(fault)


def llava_bench(args):
    """Print the score by category; None if only the judge's cost was asked for."""
    read_judge_flags(args)
    pairs, left_out = answers_to_file(args, read_questions(args))
    jobs = [review_request(args, q, answer["text"]) for q, answer in pairs]
    journal = Journal(f"{args.out}.reviews")
    with journal.file:
        texts = ask_judge(args, jobs, journal)
    if texts is None:
        return None
    missing = [job.name for job, text in zip(jobs, texts) if text is None]
    reviews = write_reviews(f"{args.out}.reviews.jsonl", pairs, texts)
    grades, failed = {}, []
    for row in reviews:
        for group in (row["category"], "all"):
            grades.setdefault(group, []).append(row["tuple"])
        if row["tuple"] == NO_GRADES:
            failed.append(row)
    graded = [row["tuple"] for row in reviews if row["tuple"] != NO_GRADES]
    if reviews and not graded:
        raise data.BadData("the references have no grades: read the reviews; is the judge up to "
                           "it, or cut off by --max-tokens?")
    groups = {group: relative_score(pairs) for group, pairs in sorted(grades.items())}
    without_failed = relative_score(graded)["score"] if failed else None
    print_scores(args, groups, failed, without_failed, left_out)
    if missing:
        raise data.BadData(f"{len(missing)} review(s) are missing, first that of question "
                           f"{missing[0]}: run the same command again")
    return {"judge": args.endpoint_model, "graded": len(graded), "left out": len(left_out),
            "groups": groups}
