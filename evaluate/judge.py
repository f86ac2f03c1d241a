"""TODO"""

import argparse

import data
from evaluate.benchmarks import answers_to_file, read_rows, require, write_lines
from formats.errors import note, UsageError, UserError
from formats.replies import without_thinking
from instruct.endpoint import ask_endpoint
from instruct.flags import check_flags, ENDPOINT_FLAGS
from instruct.journal import cache_key, Journal, Request

JUDGE_SYSTEM = "You compare answers with care and grade them fairly."
JUDGE_PROMPT = ("Two assistants have answered the question above, which a person asked while looking at a "
        "picture. You cannot see it; the context above tells what it shows, {}.\nGrade each answer "
        "from 1 to 10, the better the higher: does it help, does it keep to the question, is it "
        "true of the picture, does it tell enough?\nBegin with a line that holds two numbers with "
        "a space between them and nothing else, the grade of Assistant 1 and that of Assistant 2. "
        "From the next line on give your reasons in full. Take no side, and do not let it matter "
        "which answer you read first.")
KNOWN = "in a few sentences", ("in five sentences, and in the corners of its objects: (left, top, "
                               "right, bottom) in parts of its width and height, from 0 to 1")


def read_questions(args):
    """LLaVA-Bench's questions, each with what is known of its picture and the reference answer."""
    seen, asked = read_rows(args.context, "image", image="text"), []
    best = read_rows(args.references, "question_id", question_id="a whole number or text", text="text")
    for q in read_rows(args.questions, "question_id", question_id="a whole number or text",
                   image="text", text="text", category="text").values():
        about, name = seen.get(q["image"]), q["question_id"]
        if about is None or name not in best or q["category"] not in ("conv", "detail", "complex"):
            raise data.BadData(f"{q['where']}: its image has no context, its question_id no "
                               "reference, or its category is none of conv, detail and complex: "
                               "are the three files of one benchmark?")
        # COCO: captions and instances. In the wild: caption, one text or several
        boxes, lines = about.get("instances"), about.get("captions", about.get("caption"))
        lines = [lines] if isinstance(lines, str) else lines
        require(about["where"], {"captions": lines, "instances": boxes}, captions="texts",
                instances="objects or null")
        known = "\n".join(lines) + "\n\n" * (boxes is not None) + "\n".join(
            f"{b['category']}: {b['bbox']}" for b in boxes or () if require(
                about["where"], b, category="text", bbox="numbers"))
        asked.append({**q, "id": name, "known": known, "boxes": boxes is not None,
                      "best": best[name]})
    return asked


def parse_scores(review):
    """[the reference's, the answer's] from a review's first line; [-1, -1] if there are not two.

    quirk: a comma is a space, so "8,9" is read and "8, 9", with two, is not."""
    try:
        pair = [float(word) for word in review.split("\n")[0].replace(",", " ").split(" ")]
    except ValueError:
        pair = []
    return pair if len(pair) == 2 and all(0 <= g <= 100 for g in pair) else [-1, -1]


def relative_score(pairs):
    """The answers' mean grade in percent of the references', and both means, as rounded by
    summarize_gpt_review.py. quirk: what has no grades counts as -1 in both. The score is None if
    the references have no grades."""
    reference, answer = (round(sum(column) / len(pairs), 3) for column in zip(*pairs))
    score = round(100 * answer / reference, 1) if reference > 0 else None
    return {"score": score, "reference": reference, "answer": answer, "questions": len(pairs)}


def llava_bench(args):
    """Print the score by category: what a judge, who sees captions only, gives to the answers in
    percent of what it gives to the references. Files and layout are LLaVA's, the words are ours.

    The papers' judge was gpt-4-0314, which is gone: figures of two judges do not compare."""
    flags = argparse.ArgumentParser(prog="evaluate.py llava-bench", allow_abbrev=False)
    for flag, how in ENDPOINT_FLAGS.items():
        flags.add_argument(flag, **how)
    flags.parse_args(args.rest, args)
    args.seed = 0
    like = {**vars(args), "what": "conversation", "captions": True, "toy": None, "llm": None}
    if wrong := check_flags(argparse.Namespace(**like)):     # of an endpoint: the same there
        raise UsageError(wrong)
    jobs, (pairs, left_out) = [], answers_to_file(args, read_questions(args))
    for q, row in pairs:
        # quirk: they have a rule for each category, all three the same
        sent = (("system", JUDGE_SYSTEM), ("user", (
            f"[Context]\n{q['known']}\n\n[Question]\n{q['text']}\n\n"
            f"[Assistant 1]\n{q['best']['text']}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{row['text']}\n\n[End of Assistant 2]\n\n"
            f"[System]\n{JUDGE_PROMPT.format(KNOWN[q['boxes']])}\n\n")))
        key = cache_key(args.endpoint_model, args.temperature, args.max_tokens, sent)
        jobs.append(Request(str(q["id"]), None, key, sent))
    journal = Journal(f"{args.out}.reviews")
    with journal.file:
        if (said := reviewed(args, jobs, journal)) is None:
            return None
    missing = [job.name for job, text in zip(jobs, said) if text is None]
    reviews = [{"id": i, "question_id": q["id"], "answer1_id": q["best"].get("answer_id", q["id"]),
                "answer2_id": row["answer_id"], "content": text, "tuple": parse_scores(text),
                "category": ("" if q["boxes"] else "llava_bench_") + q["category"]}
               for i, ((q, row), text) in enumerate(zip(pairs, said), 1) if text is not None]
    write_lines(f"{args.out}.reviews.jsonl", reviews)
    groups, failed = {}, [row for row in reviews if row["tuple"] == [-1, -1]]
    for row in reviews:
        for group in (row["category"], "all"):
            groups.setdefault(group, []).append(row["tuple"])
    graded = [row["tuple"] for row in reviews if row["tuple"] != [-1, -1]]
    if reviews and not graded:
        raise data.BadData("the references have no grades: read the reviews; is the judge up to "
                           "it, or cut off by --max-tokens?")
    made = {group: relative_score(pairs) for group, pairs in sorted(groups.items())}
    print(f"LLaVA-Bench, judged by {args.endpoint_model}: percent of the references")
    for group, row in made.items():
        score = "  none" if row["score"] is None else f"{row['score']:6.1f}"
        print(f"  {group:<22}{score}   {row['answer']:.3f} to {row['reference']:.3f}, "
              f"{row['questions']} questions")
    if failed:
        names = ", ".join(f"{row['question_id']} ({row['category']})" for row in failed)
        without = relative_score(graded)["score"]
        print(f"  {len(failed)} review(s) without two grades count as -1 to -1, the official way; "
              f"without them, all: {without if without is None else format(without, '.1f')}; they "
              f"are those of question {names}, and are asked for again on the next run")
    if left_out:
        print(f"  {len(left_out)} question(s) could not be asked and are in no figure")
    if missing:
        raise data.BadData(f"{len(missing)} review(s) are missing, first that of question "
                           f"{missing[0]}: run the same command again")
    return {"judge": args.endpoint_model, "graded": len(graded), "left out": len(left_out),
            "groups": made}


TRIES = 3       # of a review in one run, while it has no two grades


def tries_of(job, journal):
    """(the next try's job, the reviews so far). A review without two grades is followed by another
    try, under a key of its own; where there are grades, the job of the last try."""
    now, reviews = job, []
    while now in journal:
        text = journal.rows[now.key]["text"]
        reviews.append(without_thinking(text) or "")
        if parse_scores(reviews[-1]) != [-1, -1]:
            break
        key = cache_key(job.key, "again", len(reviews))
        now = Request(job.name, None, key, job.request)
    return now, reviews


def reviewed(args, jobs, journal):
    """[a review, or None if there is none] of the jobs; None if only the cost was asked for.

    One without two grades is asked for again, TRIES times in a run. If those requests fail, the
    others count all the same."""
    for i in range(TRIES):
        tries = [tries_of(job, journal) for job in jobs]
        again = [now for now, reviews in tries if reviews and now not in journal]
        if i and not again:
            break
        if again:
            note(f"asked for again: {len(again)} review(s) without two grades, first that "
                          f"of question {again[0].name}")
        try:
            if not ask_endpoint(args, again if i else [now for now, _ in tries], journal):
                return None
        except UserError as error:
            if not i and not all(reviews for _, reviews in tries):
                raise
            note(f"not asked for again: {error}")
            break
    done = [tries_of(job, journal)[1] for job in jobs]
    return [reviews[-1] if reviews else None for reviews in done]
