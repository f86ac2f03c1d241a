"""ScienceQA, POPE and LLaVA-Bench on small files of the official shapes: a model whose answers are
known, a judge whose grades are known, so every score is known; and what must change it does."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import data
import generate
import standin
from decoding import loading
from evaluate import benchmarks
from evaluate.__main__ import main
from evaluate.benchmarks import is_no, parse_choice
from evaluate.flags import parse
from evaluate.judge import parse_scores
from formats.errors import exit_status
from formats.scienceqa import LETTER
from projector import VLM
from trainer.build import new_vlm

ROOT = Path(__file__).parents[1]
TOY = ROOT / "toy/weights"
WORDS = data.Tokenizer(TOY / "llama")
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")


def run(*words):
    """A command in this process; its exit code."""
    try:
        args = parse([str(w) for w in words])
        return exit_status(lambda: main(args))
    except SystemExit as error:
        return error.code


def lines(path):
    return [json.loads(x) for x in Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores(out):
    return json.loads(Path(f"{out}.scores.json").read_text())


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """A model whose bridge was never trained: it says something, untrue, about each picture."""
    folder = tmp_path_factory.mktemp("seer")
    new_vlm(TOY / "clip", TOY / "llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for i, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"img/{i}").mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"img/{i}/image.png")
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"img/{i}.jpg")
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch):
    """Instead of decoding: says[question], if one of its keys is in the prompt. `asked`: the rows,
    each with the number of its pictures."""
    says, asked = {}, []

    def known(model, rows, pictures, sizes, max_new_tokens):
        texts = [WORDS.decode([i for i in row if i >= 0]) for row in rows]
        asked.extend(zip(rows, (0 if x is None else len(x) for x in pictures), strict=True))
        found = [next(answer for key, answer in says.items() if key in text) for text in texts]
        return [WORDS.encode(answer, bos=False) for answer in found]
    monkeypatch.setattr(benchmarks, "generate_batch", known)
    return says, asked


# -------------------------------------------------------------------------------------- ScienceQA

def problem(question, choices, answer, hint="", image=None, subject="natural science", grade=2):
    """A row of problems.json, which holds more than is read."""
    return {"question": question, "choices": choices, "answer": answer, "hint": hint,
            "image": image, "task": "closed choice", "grade": f"grade{grade}", "subject": subject,
            "topic": "t", "category": "c", "skill": "s", "lecture": "l", "solution": "s",
            "split": "test"}


EXAM = {"0": problem("Is it warm?", ["no", "yes"], 1, "The thing\nis red.", "image.png"),
        "1": problem("Is it far?", ["yes", "no"], 0, "", "image.png", "social science", 7),
        "2": problem("Which word?", ["a", "b"], 1, " Think.", None, "language science", 6),
        "7": problem("Not in this split?", ["a", "b"], 1),
        "8": problem("Is it deep?", ["a", "b", "c"], 1, "", None, "natural science", 12)}


def exam(folder, problems=EXAM, splits=None, **change):
    """The flags of `scienceqa`; `change`: fields of problem 0."""
    problems = problems | {"0": problems["0"] | change} if change else problems
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(
        splits or {"train": ["7"], "test": [n for n in problems if n != "7"]}))
    return ("scienceqa", "--problems", folder / "problems.json", "--splits",
            folder / "pid_splits.json", "--images", folder / "img", "--out", folder / "o.jsonl")


def test_scienceqa_scores_are_known(folder, seer, stand_in, capsys):
    says, asked = stand_in
    says |= {"warm": "B", "far": "A. yes", "word": "The answer is C.", "deep": "I think B"}
    flags = *exam(folder), "--model", seer
    assert run(*flags) == 0
    made, rows = scores(folder / "o.jsonl"), lines(folder / "o.jsonl")
    assert made["without a letter"] == 2 and {g: (r["accuracy"], r["questions"])
                                              for g, r in made["groups"].items()} == {
        "all": (.5, 4), "natural science": (.5, 2), "social science": (1, 1),
        "language science": (0, 1), "text context": (.5, 2), "image context": (1, 2),
        "no context": (0, 1), "grades 1-6": (.5, 2), "grades 7-12": (.5, 2)}
    assert "0.5000 of 4" in capsys.readouterr().out
    # what was asked, to the letter; the picture comes first, and only where there is one
    text = ("Context: The thing\nis red.\nIs it warm?\nA. no\nB. yes\nAnswer with the option's "
            "letter from the given choices directly.")
    assert [n for _, n in asked] == [1, 1, 0, 0]
    assert asked[0][0] == data.prompt_ids(f"{SYSTEM} USER: <image>\n{text} ASSISTANT:", WORDS)
    bare = f"Is it deep?\nA. a\nB. b\nC. c\n{LETTER}"
    assert asked[3][0] == data.prompt_ids(f"{SYSTEM} USER: {bare} ASSISTANT:", WORDS)
    assert [list(row) for row in rows] == [[
        "question_id", "prompt", "text", "answer_id", "model_id", "metadata"]] * 4
    assert [row["question_id"] for row in rows] == ["0", "1", "2", "8"]
    assert rows[0]["prompt"] == f"<image>\n{text}" and rows[3]["prompt"] == bare
    # controls: nothing new, nothing asked; another truth, another score; a picture that changed
    assert run(*flags) == 0 and len(asked) == 4 and lines(folder / "o.jsonl") == rows
    assert run(*exam(folder, answer=0), "--model", seer) == 0 and len(asked) == 4
    assert scores(folder / "o.jsonl")["groups"]["all"]["accuracy"] == .25
    Image.new("RGB", (50, 50)).save(folder / "img/0/image.png")
    says["warm"] = "A"
    assert run(*exam(folder, answer=0), "--model", seer) == 0 and len(asked) > 4
    assert scores(folder / "o.jsonl")["groups"]["all"]["accuracy"] == .5


def test_the_form_of_llava_trained_on_scienceqa(folder, seer, stand_in):
    says, asked = stand_in
    says |= {"(A) no": "First this, then that. The answer is B.", "": "The answer is A."}
    flags = exam(folder, question="Question: is it  wa   rm?", hint="")
    assert run(*flags, "--form", "QCM-LEA", "--model", seer) == 0
    assert lines(folder / "o.jsonl")[0]["prompt"] == (
        "<image>\nis it wa  rm?\nContext: N/A\nOptions: (A) no (B) yes")
    assert lines(folder / "o.jsonl")[2]["prompt"] == (
        "Which word?\nContext: Think.\nOptions: (A) a (B) b")
    assert scores(folder / "o.jsonl")["groups"]["all"]["accuracy"] == .5


@pytest.mark.parametrize("text, choices, pick", [
    ("B", 2, 1), ("E", 5, 4), ("E", 4, -1), ("F", 5, -1), ("b", 2, -1), ("AB", 2, -1), ("", 2, -1),
    ("B. yes", 2, 1), ("B.", 2, -1), ("B.yes", 2, -1), ("(B) yes", 2, -1),
    ("So. The answer is B.", 2, 1), ("The answer is B", 2, -1), ("The answer is B, maybe", 2, 1),
    ("The answer is A. The answer is B.", 2, -1), ("the answer is B.", 2, -1),
    ("A. But no. The answer is B.", 2, 0), ("The answer is Z.", 5, -1)])
def test_what_counts_as_a_letter(text, choices, pick):
    assert parse_choice(text, choices) == pick


# ------------------------------------------------------------------------------------------- POPE

def pope_files(folder, **change):
    ask = ("Is there a cat in the image?", "Is there a dog in the image?",
           "Is there a cup in the image?", "Is there a bus in the image?")
    truth = {"random": "yes yes no no", "popular": "yes no no no"}
    rows = {kind: [{"question_id": i, "image": f"{i % 3}.jpg", "text": text, "label": label}
                   for i, (text, label) in enumerate(zip(ask, labels.split()))]
            for kind, labels in truth.items()}
    rows["random"][1] |= change
    return [write(folder / f"coco_pope_{kind}.json", r) for kind, r in rows.items()]


def test_pope_scores_are_known(folder, seer, stand_in, capsys):
    says, asked = stand_in
    says |= {"cat": "Yes", "dog": "No, there is not.", "cup": "Yes, a cup.", "bus": "no"}
    flags = ("pope", "--model", seer, "--images", folder / "img", "--out", folder / "o.jsonl",
             "--questions")
    assert run(*flags, *pope_files(folder)) == 0
    names = "questions", "accuracy", "precision", "recall", "F1", "yes rate"
    assert scores(folder / "o.jsonl") == {
        "random": dict(zip(names, (4, .5, .5, .5, .5, .5))),        # a hit, a false yes, a miss
        "popular": dict(zip(names, (4, .75, .5, 1, 2 / 3, .5)))}
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 3 and said[2] == "popular 4 0.7500 0.5000 1.0000 0.6667 0.5000".split()
    assert len(asked) == 4                                  # each question once, for both files
    rows = lines(folder / "o.jsonl")
    assert [(r["metadata"]["category"], r["question_id"]) for r in rows] == [
        (kind, i) for kind in ("random", "popular") for i in range(4)]
    assert len({r["answer_id"] for r in rows}) == 8
    text = "Is there a cat in the image?\nAnswer the question using a single word or phrase."
    assert rows[0]["prompt"] == text and asked[0] == (data.prompt_ids(
        f"{SYSTEM} USER: <image>\n{text} ASSISTANT:", WORDS), 1)
    # controls: the truth changed; a model that always says yes or always no
    assert run(*flags, *pope_files(folder, label="no")) == 0 and len(asked) == 4
    assert scores(folder / "o.jsonl")["random"]["accuracy"] == .75
    for always, expected in (("Yes", (4, .5, .5, 1, 2 / 3, 1)), ("No", (4, .5, 0, 0, 0, 0))):
        says.update(dict.fromkeys(says, always))
        assert run(*flags[:5], "--out", folder / f"{always}.jsonl", "--questions",
                   *pope_files(folder)) == 0
        assert scores(folder / f"{always}.jsonl")["random"] == dict(zip(names, expected))


@pytest.mark.parametrize("text, no", [
    ("No", 1), ("no", 1), ("No, there is none", 1), ("There is not", 1), ("Yes. No cat", 0),
    ("Not at all", 0), ("NO", 0), ("nothing", 0), ("", 0), ("Yes, no doubt", 1), ("no\n", 0)])
def test_what_counts_as_a_no(text, no):
    assert is_no(text) == bool(no)


# ------------------------------------------------------------------------------------ LLaVA-Bench

class Judge(standin.Server):
    """Grades by what Assistant 2 says: the review's first line is grades[answer]."""

    def __init__(self, grades):
        super().__init__(Grader)
        self.grades = grades


class Grader(standin.Handler):
    def do_POST(self):
        body = self.body()
        self.server.seen.append(body)
        answer = body["messages"][1]["content"].split("[Assistant 2]\n")[1].split("\n\n[End")[0]
        grade = self.server.grades[answer]
        self.say(f"{grade}\nBecause.", code=400 if grade == "refuse" else 200)


def bench(folder, wild=False, **change):
    """Flags; three questions, the references in another order."""
    ask = [{"question_id": i, "image": "0.jpg", "text": f"What is {kind}?", "category": kind}
           for i, kind in enumerate(("conv", "detail", "complex", "conv"))]
    ask[1] |= change
    about = {"image": "0.jpg", "caption": "A red thing."} if wild else {
        "id": 1, "image": "0.jpg", "captions": ["A red thing.", "It is red."],
        "instances": [{"category": "thing", "bbox": [0.25, 0, 0.75, 1.0]},
                      {"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}]}
    best = [{"question_id": i, "text": f"Reference {i}.", "answer_id": f"r{i}"}
            for i in (3, 1, 2, 0)]
    return ("llava-bench", "--images", folder / "img", "--out", folder / "o.jsonl",
            "--questions", write(folder / "q.jsonl", ask),
            "--context", write(folder / "c.jsonl", [about]),
            "--references", write(folder / "r.jsonl", best))


SAYS = {"What is conv?": "Red.", "What is detail?": "A thing.", "What is complex?": "Who knows."}


@pytest.mark.parametrize("wild", [False, True])
def test_llava_bench_scores_are_known(folder, seer, stand_in, capsys, wild):
    says, asked = stand_in
    says |= SAYS
    judge = Judge({"Red.": "8 9", "A thing.": "10 4.5", "Who knows.": "9,3"})
    flags = (*bench(folder, wild), "--model", seer, "--endpoint", judge.url, "--workers", 1,
             "--endpoint-model", "m")
    assert run(*flags) == 0
    made, pre = scores(folder / "o.jsonl"), "llava_bench_" * wild
    assert made["groups"] == {
        f"{pre}conv": {"score": 112.5, "reference": 8, "answer": 9, "questions": 2},
        f"{pre}detail": {"score": 45.0, "reference": 10, "answer": 4.5, "questions": 1},
        f"{pre}complex": {"score": 33.3, "reference": 9, "answer": 3, "questions": 1},
        "all": {"score": 72.9, "reference": 8.75, "answer": 6.375, "questions": 4}}     # 72.86
    assert made["graded"] == 4 and "72.9" in capsys.readouterr().out
    rows, reviews = lines(folder / "o.jsonl"), lines(folder / "o.jsonl.reviews.jsonl")
    assert [r["text"] for r in rows] == ["Red.", "A thing.", "Who knows.", "Red."]
    assert reviews[1] == {"id": 2, "question_id": 1, "answer1_id": "r1",
                          "answer2_id": rows[1]["answer_id"], "content": "10 4.5\nBecause.",
                          "tuple": [10, 4.5], "category": f"{pre}detail"}
    # the official layout, reference first; the judge's words are ours
    body = judge.seen[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", .2, 1024)
    known = "A red thing." if wild else ("A red thing.\nIt is red.\n\nthing: [0.25, 0, 0.75, 1.0]\n"
                                         "cat: [0.1, 0.2, 0.3, 0.4]")
    head, rule = body["messages"][1]["content"].split("[System]\n")
    assert head == (
        f"[Context]\n{known}\n\n[Question]\nWhat is conv?\n\n[Assistant 1]\nReference 0.\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nRed.\n\n[End of Assistant 2]\n\n")
    assert ("corners" in rule) is not wild and rule.count("Assistant 2") == 1
    # controls: again costs nothing; another judge is asked anew and its grades are what counts
    assert run(*flags) == 0 and len(judge.seen) == 4 and len(asked) == 3    # one is asked twice
    judge.grades["A thing."] = "10 9"
    assert run(*flags, "--endpoint-model", "n", "--temperature", "none") == 0
    assert len(judge.seen) == 8 and len(asked) == 3 and "temperature" not in judge.seen[-1]
    assert scores(folder / "o.jsonl")["groups"][f"{pre}detail"]["score"] == 90.0


def test_a_judge_that_fails(folder, seer, stand_in, capsys):
    """A review without grades is asked for again, counts as -1 and is told; one that is missing
    ends the run."""
    stand_in[0].update(SAYS)
    judge = Judge({"Red.": "8 8", "A thing.": "refuse", "Who knows.": "I cannot say"})
    flags = (*bench(folder), "--model", seer, "--endpoint", judge.url, "--endpoint-model", "m")
    assert run(*flags) == 3 and "1 review(s) are missing, first that of question 1" in (
        capsys.readouterr().err)
    assert not Path(f"{folder / 'o.jsonl'}.scores.json").exists()
    judge.grades["A thing."], before = "8 4", len(judge.seen)
    assert before == 4 + 2                                  # two more tries of the ungraded one
    assert run(*flags) == 0 and len(judge.seen) == before + 1 + 3
    assert scores(folder / "o.jsonl")["groups"]["complex"]["score"] is None
    ask = lines(folder / "q.jsonl")
    write(folder / "q.jsonl", [q | {"category": "conv"} for q in ask])
    assert run(*flags) == 0
    made = scores(folder / "o.jsonl")
    assert made["graded"] == 3 and made["groups"]["all"]["score"] == round(100 * 4.75 / 5.75, 1)
    assert "1 review(s) without two grades" in (said := capsys.readouterr().out)
    assert f"all: {round(100 * 6.667 / 8, 1)}" in said
    judge.grades["Who knows."], before = "8 8", len(judge.seen)
    assert run(*flags) == 0 and len(judge.seen) == before + 1
    assert scores(folder / "o.jsonl")["graded"] == 4


def test_what_a_judge_costs_and_needs(folder, seer, stand_in, capsys, monkeypatch):
    stand_in[0].update(SAYS)
    judge = Judge({})
    flags = (*bench(folder), "--model", seer, "--endpoint", judge.url, "--endpoint-model", "m")
    assert run(*flags, "--estimate", "--price-in", 1, "--price-out", 1) == 0 and not judge.seen
    assert "4 requests to m" in capsys.readouterr().out
    assert not Path(f"{folder / 'o.jsonl'}.scores.json").exists()
    for more in (("--workers", 0), ("--no-such-flag",), ("--endpoint", "file:///etc/passwd"),
                 ("--temperature", "nan"), ("--max-tokens", 0), ("--out", folder / "q.jsonl"),
                 ("--out", folder), ("--out", folder / "none/o.jsonl")):
        assert run(*flags, *more) == 2 and capsys.readouterr().err, more
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    assert run(*flags, "--endpoint", "http://example.com/v1") == 2
    assert "http shows the key" in capsys.readouterr().err and not judge.seen


@pytest.mark.parametrize("line, pair", [
    ("8 9", [8, 9]), ("8.5 10\nWell", [8.5, 10]), ("8,9", [8, 9]), ("8, 9", [-1, -1]),
    ("8 9 10", [-1, -1]), ("8", [-1, -1]), ("", [-1, -1]), ("\n8 9", [-1, -1]),
    ("nan 9", [-1, -1]), ("8 inf", [-1, -1]), ("Assistant 8", [-1, -1]), ("8/10 9/10", [-1, -1])])
def test_what_counts_as_grades(line, pair):
    assert parse_scores(line) == pair


# -------------------------------------------------------------------------------- what all share

def test_a_killed_run_goes_on(folder, seer, capsys):
    """With the real model: what it says to each alone, whatever it was killed and batched with."""
    problems = {str(i): problem(f"Is it number {i}?", ["a", "b"], 0,
                                image="image.png" if i < 3 else None) for i in range(9)}
    flags = [*exam(folder, problems, {"test": list(problems)}), "--model", seer,
             "--max-new-tokens", 20, "--batch-size", 2, "--device", "cpu"]
    child = subprocess.Popen([str(w) for w in (sys.executable, "-m", "evaluate", *flags)],
                             stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT)
    journal, out = folder / "o.jsonl.answers.jsonl", folder / "o.jsonl"
    while child.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = journal.read_bytes()
    assert 0 < had.count(b"\n") < 9 and not out.exists()
    journal.write_bytes(had[:-5])                           # and its last line was torn
    assert run(*flags) == 0
    assert journal.read_bytes().startswith(had[:had[:-5].rfind(b"\n") + 1])
    assert len({row["key"] for row in lines(journal)}) == len(lines(journal)) == 9
    model = VLM.from_pretrained(seer)
    rows = lines(out)
    for i, row in enumerate(rows):
        assert row["question_id"] == str(i)
        text, seen = row["prompt"].removeprefix("<image>\n"), None
        talk = [{"from": "human", "value": row["prompt"]}]
        if i < 3:
            seen = model.pixels(data.load_image(folder / f"img/{i}/image.png"))
        ids = data.prompt_ids(data.prompt(talk, "v1"), WORDS)
        assert text in WORDS.decode([x for x in ids if x >= 0])
        alone = "".join(generate.stream(model, ids, seen, max_new_tokens=20)).strip()
        assert row["text"] == alone
    assert len({row["text"] for row in rows}) > 1           # else all of this shows nothing


@pytest.mark.parametrize("change, where", [
    ({"question": 5}, "0.question"), ({"choices": "ab"}, "0.choices"),
    ({"choices": []}, "5 choices"), ({"choices": list("abcdef")}, "5 choices"),
    ({"answer": 2}, "the number"), ({"answer": True}, "0.answer"), ({"hint": None}, "0.hint"),
    ({"hint": "\ud800"}, "0.hint"), ({"image": "../../secret.png"}, "problems.json: 0: image"),
    ({"image": "none.png"}, "is not a file"), ({"grade": 3}, "0.grade")])
def test_bad_problems_are_named(folder, seer, capsys, monkeypatch, change, where):
    """Before any model is loaded."""
    monkeypatch.setattr(benchmarks, "load_model", lambda args: pytest.fail("loaded"))
    assert run(*exam(folder, **change), "--model", seer) == 3
    said = capsys.readouterr().err
    assert where in said and said.count("\n") == 1


@pytest.mark.parametrize("text, where", [
    ("", "no rows"), ("5\n", "row 1.question_id"), ('{"question_id": 1}\n', "row 1.image"),
    ("nonsense", "row 1"), ('{"question_id": NaN}', "NaN"), ("[" * 100_000, "row 1"),
    ('{"question_id": ' + "9" * 5000 + "}", "row 1"), ("\xff", "row 1"),
    (json.dumps({"question_id": 1, "image": "0.jpg", "text": "?", "label": "maybe"}), "yes or no"),
    (json.dumps({"question_id": 1, "image": "/etc/passwd", "text": "?", "label": "no"}),
     "row 1: image '/etc/passwd': must be a plain path"),
    (2 * (json.dumps({"question_id": 1, "image": "0.jpg", "text": "?", "label": "no"}) + "\n"),
     "row 2.question_id: 1 is there twice")])
def test_bad_lines_are_named(folder, seer, capsys, monkeypatch, text, where):
    monkeypatch.setattr(benchmarks, "load_model", lambda args: pytest.fail("loaded"))
    (folder / "coco_pope_x.json").write_bytes(text.encode("latin-1"))
    assert run("pope", "--model", seer, "--images", folder / "img", "--out", folder / "o.jsonl",
               "--questions", folder / "coco_pope_x.json") == 3
    said = capsys.readouterr().err
    assert where in said and said.count("\n") == 1


@pytest.mark.parametrize("change", [{"image": "1.jpg"}, {"question_id": 9}, {"category": "math"}])
def test_files_that_do_not_belong_together(folder, seer, capsys, monkeypatch, change):
    monkeypatch.setattr(benchmarks, "load_model", lambda args: pytest.fail("loaded"))
    assert run(*bench(folder, **change), "--model", seer, "--endpoint", "http://127.0.0.1:1/v1",
               "--endpoint-model", "m") == 3
    assert "q.jsonl: line 2, row 2: its image" in capsys.readouterr().err


def test_a_model_that_only_captions_is_refused(folder, seer, capsys, monkeypatch):
    model = VLM.from_pretrained(seer)
    model.template = "plain"
    monkeypatch.setattr(benchmarks, "load_model", lambda args: model)
    assert run(*exam(folder), "--model", seer) == 2
    assert "--template v1" in capsys.readouterr().err


def test_other_commands_take_no_strange_flags(capsys):
    """Only a judge's flags are read later."""
    for words in (("toy", "--workers", 2), ("pope", "--model", "m", "--images", "i", "--out", "o",
                                            "--questions", "q", "--workers", 2)):
        assert run(*words) == 2 and "--workers 2" in capsys.readouterr().err
