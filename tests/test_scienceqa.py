"""ScienceQA as training data: the official converter's text and the official code's labels, token
for token, on 20 problems made by hand; the row of the recipe; trained and asked again on the toy.

What the official code writes was worked out by hand for each problem, from its rules:
"Question: ", "Context: " and "Options: " on three lines; two spaces become one, once; every
"Question: " goes; a picture's mark comes last. "Answer: " goes, too, and leaves a space where there
is neither lecture nor solution.
"""
import json
from pathlib import Path

import pytest
from PIL import Image

import data
import evaluate.flags
import instruct.flags
import train
from data import IGNORE, IMAGE
from evaluate.__main__ import main as evaluated
from formats.errors import exit_status
from formats.pictures import picture_path
from formats.scienceqa import prompt_text, training_row
from instruct.scienceqa import main as converted
from projector import VLM
from toy import problems
from toy.texts import description
from toy.world import draw, split_of
from test_train import parts, unchanged_process         # noqa: F401  fixtures
from trainer.start import output_folders
from trainer.samples import encode_sample, official_would_mask, sample_pieces

TOY = Path(__file__).parents[1] / "toy/weights"
LLAMA = Path(__file__).parents[2] / "shared/tokenizers/llama"       # where it is at hand
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")


def problem(question, choices, answer, hint="", picture=None, lecture="", solution=""):
    """A row of problems.json, which holds more than is read."""
    return {"question": question, "choices": choices, "answer": answer, "hint": hint,
            "image": picture, "task": "closed choice", "grade": "grade2", "topic": "physics",
            "subject": "natural science", "category": "c", "skill": "s", "lecture": lecture,
            "solution": solution, "split": "train"}


PNG = "image.png"
# id: (the problem, what the person says, what the model answers)
EXAM = {
    "1": (problem("Is it warm?", ["no", "yes"], 1),
          "Is it warm?\nContext: N/A\nOptions: (A) no (B) yes", " The answer is B."),
    "2": (problem("Is it warm?", ["no", "yes"], 0, picture=PNG),
          "Is it warm?\nContext: N/A\nOptions: (A) no (B) yes\n<image>", " The answer is A."),
    "3": (problem("Is it warm?", ["no", "yes"], 0, "It is red."),
          "Is it warm?\nContext: It is red.\nOptions: (A) no (B) yes", " The answer is A."),
    "4": (problem("Is it far?", ["no", "yes"], 1, "It is red.", PNG),
          "Is it far?\nContext: It is red.\nOptions: (A) no (B) yes\n<image>",
          " The answer is B."),
    "5": (problem("Is it far?", ["no", "yes"], 1, lecture="Far is not near."),
          "Is it far?\nContext: N/A\nOptions: (A) no (B) yes",
          "Far is not near. The answer is B."),
    "6": (problem("Is it far?", ["no", "yes"], 1, solution="It is small."),
          "Is it far?\nContext: N/A\nOptions: (A) no (B) yes", "It is small. The answer is B."),
    "7": (problem("Is it far?", ["no", "yes"], 1, "", PNG, "Far is not near.", "It is small."),
          "Is it far?\nContext: N/A\nOptions: (A) no (B) yes\n<image>",
          "Far is not near. It is small. The answer is B."),
    "8": (problem("Which?", ["red", "blue", "green", "black", "white"], 4, "Look.", PNG,
                  "Colours differ.", "White is bright."),
          "Which?\nContext: Look.\nOptions: (A) red (B) blue (C) green (D) black (E) white\n"
          "<image>", "Colours differ. White is bright. The answer is E."),
    "9": (problem("Which one?", ["a star"], 0),
          "Which one?\nContext: N/A\nOptions: (A) a star", " The answer is A."),
    "10": (problem("Two\nlines?", ["no", "yes"], 0, "First.\nSecond.", None, "One.\n\nTwo.",
                   "Three.\nFour."),
           "Two\nlines?\nContext: First.\nSecond.\nOptions: (A) no (B) yes",
           "One.\n\nTwo. Three.\nFour. The answer is A."),
    "11": (problem("Tight?", ["no", "yes"], 0, "", None, "a\\nb", "c\\n\\nd"),
           "Tight?\nContext: N/A\nOptions: (A) no (B) yes", "a\nb c\n\nd The answer is A."),
    "12": (problem("Is  it   wide?", ["no  no", "yes"], 0, "  A  hint    here  ", None,
                   "So    wide.", "  Yes.  "),
           "Is it  wide?\nContext: A hint  here\nOptions: (A) no no (B) yes",
           "So  wide.  Yes.  The answer is A."),
    "13": (problem("Question: Question: who?", ["a", "b"], 1, "Question: this", PNG,
                   "Answer: that.", "An Answer: there"),
           "who?\nContext: this\nOptions: (A) a (B) b\n<image>",
           "that. An there The answer is B."),
    "14": (problem(" Does it open?", ["", "yes"], 1),
           "Does it open?\nContext: N/A\nOptions: (A) (B) yes", " The answer is B."),
    "15": (problem("Ends it here?", ["no", "yes "], 1, "   "),
           "Ends it here?\nContext: N/A\nOptions: (A) no (B) yes", " The answer is B."),
    "16": (problem("Wie heißt es? 무엇?", ["빨강", "파랑"], 0, "é", PNG, "색.", "✓"),
           "Wie heißt es? 무엇?\nContext: é\nOptions: (A) 빨강 (B) 파랑\n<image>",
           "색. ✓ The answer is A."),
    "17": (problem("Is \"this\" it?", ["(A)", "A."], 1, "(B)", None, "The answer is A.", ""),
           "Is \"this\" it?\nContext: (B)\nOptions: (A) (A) (B) A.",
           "The answer is A. The answer is B."),
    "18": (problem("Is it round?", ["no", "yes"], 0, "N/A", PNG, "", "No.\n"),
           "Is it round?\nContext: N/A\nOptions: (A) no (B) yes\n<image>",
           "No.\n The answer is A."),
    "19": (problem("Is it square?", ["no", "yes"], 0, "\n", "choice.png", "L.\n", "\nS."),
           "Is it square?\nContext: N/A\nOptions: (A) no (B) yes\n<image>",
           "L.\n \nS. The answer is A."),
    "20": (problem("Which is\tit?", ["\tred", "blue\n", "x"], 2, "", None, " L", "S "),
           "Which is\tit?\nContext: N/A\nOptions: (A) \tred (B) blue\n (C) x",
           "L S The answer is C."),
}


def write_exam(folder, problems=None, splits=None):
    """The official folder, with pictures of one colour."""
    problems = problems or {name: row for name, (row, *_) in EXAM.items()}
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = splits or {"train": list(problems), "test": ["4", "1"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    for split in ("train", "test"):
        for i, (name, row) in enumerate(problems.items()):
            if isinstance(row["image"], str):
                (folder / f"images/{split}/{name}").mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (30, 20), (12 * i, 90, 30)).save(
                    folder / f"images/{split}/{name}/{row['image']}")
    return folder


def convert(*words):
    """`python -m instruct scienceqa` in this process; its exit code."""
    try:
        args = instruct.flags.parse(["scienceqa", *map(str, words)])
        return exit_status(lambda: converted(args))
    except SystemExit as error:
        return error.code


# quirk: where a text ends with "BECAUSE:", every "BECAUSE:" goes
CUT = {
    "21": (problem("Is it warm?", ["no", "yes BECAUSE:"], 1),
           "Is it warm?\nContext: N/A\nOptions: (A) no (B) yes", " The answer is B."),
    "22": (problem("BECAUSE: why?", ["no BECAUSE:", "yes  BECAUSE: "], 0, "BECAUSE: it is.", PNG,
                   "Far BECAUSE:", "Near BECAUSE:"),
           " why?\nContext:  it is.\nOptions: (A) no  (B) yes\n<image>",
           "Far BECAUSE: Near BECAUSE: The answer is A."),
    # controls: it does not end the text, is written otherwise, or ends the question only
    "23": (problem("Is it so BECAUSE:", ["no", "yes"], 1),
           "Is it so BECAUSE:\nContext: N/A\nOptions: (A) no (B) yes", " The answer is B."),
    "24": (problem("Is it?", ["BECAUSE: no", "Because:"], 1),
           "Is it?\nContext: N/A\nOptions: (A) BECAUSE: no (B) Because:", " The answer is B."),
}


@pytest.mark.parametrize("name", CUT)
def test_because_is_cut_where_it_ends_the_text(name):
    p, asked, answered = CUT[name]
    row = training_row({**p, "id": name})
    assert [turn["value"] for turn in row["conversations"]] == [asked, answered]
    assert prompt_text({**p, "id": name}, "QCM-LEA") == asked.removesuffix("\n<image>").strip()


@pytest.fixture
def rows(tmp_path):
    write_exam(tmp_path)
    assert convert(tmp_path, "--out", tmp_path / "sqa.json") == 0
    return json.loads((tmp_path / "sqa.json").read_text())


# ------------------------------------------------------------------------- the official layout

def test_there_are_20_of_all_kinds():
    assert len(EXAM) == 20
    kinds = {(bool(row["image"]), bool(row["hint"].strip()), bool(row["lecture"]))
             for row, *_ in EXAM.values()}
    assert len(kinds) == 8                          # with and without picture, hint, lecture


def test_rows_are_the_official_converters(rows):
    assert [row["id"] for row in rows] == list(EXAM)
    for row, (p, asked, answered) in zip(rows, EXAM.values()):
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        assert row["conversations"] == turns, row["id"]
        assert row.get("image") == (f"{row['id']}/{p['image']}" if p["image"] else None)
        assert set(row) <= {"id", "image", "conversations"}


def official(asked, answered, tokenizer):
    """(ids, labels) as llava/train/train.py makes them of one question and its answer (v1): the
    picture first, the text tokenized whole, the question's tokens counted on their own."""
    if "<image>" in asked:
        asked = f"<image>\n{asked.replace('<image>', '').strip()}".strip()

    def ids_of(text):                               # the pieces around a picture, each alone
        first, *rest = [tokenizer.encode(part) for part in text.split("<image>")]
        for part in rest:
            first += [IMAGE, *part[1:]]
        return first
    before = f"{SYSTEM} USER: {asked} ASSISTANT: "
    ids = ids_of(f"{before}{answered}</s>")
    masked = 1 + len(ids_of(before)) - 2
    return ids, [IGNORE] * masked + ids[masked:]


@pytest.mark.parametrize("name", EXAM)
def test_ids_and_labels_are_the_official_ones(rows, name):
    folder = LLAMA if LLAMA.exists() else None
    if folder is None:
        pytest.skip("needs LLaMA's tokenizer, which is not in the repository")
    tokenizer, row = data.Tokenizer(folder), rows[list(EXAM).index(name)]
    _, asked, answered = EXAM[name]
    found = encode_sample(row, "v1", tokenizer, image_tokens=576)
    assert found == official(asked, answered, tokenizer)
    # and the official code prints no warning, so that nothing of it is masked
    t, segments, pictures = sample_pieces(row, "v1")
    assert not official_would_mask(segments, t, tokenizer, -1 if pictures else 0, found[0])


@pytest.mark.parametrize("name", EXAM)
def test_what_has_loss_is_the_answer_and_its_end(rows, name):
    """With the toy's tokenizer, whose words are whole: the text of the ids, and of those with loss.
    """
    tokenizer, row = data.Tokenizer(TOY / "llama"), rows[list(EXAM).index(name)]
    p, asked, answered = EXAM[name]
    ids, labels = encode_sample(row, "v1", tokenizer, image_tokens=64)
    shown = asked.removesuffix("\n<image>")
    if p["image"]:
        shown = f"<image>\n{shown}"
    assert ids == data.prompt_ids(f"{SYSTEM} USER: {shown} ASSISTANT: {answered}</s>", tokenizer)
    learned = [i for i in labels if i != IGNORE]
    begin = len(ids) - len(learned)
    assert learned == ids[begin:] and learned[-1] == tokenizer.eos      # one stretch, at the end
    before = data.prompt_ids(f"{SYSTEM} USER: {shown} ASSISTANT:", tokenizer)
    assert ids[:begin] == before                    # the space before the answer is learned


def test_what_is_asked_later_is_what_was_trained(rows):
    """The prompt of `evaluate scienceqa --form QCM-LEA` is the beginning of the training row."""
    tokenizer = data.Tokenizer(TOY / "llama")
    for row, (p, *_) in zip(rows, EXAM.values()):
        text = prompt_text({**p, "id": row["id"]}, "QCM-LEA")
        turns = [{"from": "human", "value": f"<image>\n{text}" if p["image"] else text}]
        asked = data.prompt_tokens(turns, "v1", tokenizer, pictures=int(bool(p["image"])))
        ids, labels = encode_sample(row, "v1", tokenizer, image_tokens=64)
        assert ids[:len(asked)] == asked and labels[len(asked)] != IGNORE


# ------------------------------------------------------------------------------------ the command

def test_a_split_is_converted_in_its_order(tmp_path, capsys):
    write_exam(tmp_path, splits={"train": ["3", "2", "3"], "minival": ["8"]})
    assert convert(tmp_path, "--out", tmp_path / "a.json") == 0
    assert "2 samples, 1 of them with a picture" in capsys.readouterr().out
    assert [row["id"] for row in json.loads((tmp_path / "a.json").read_text())] == ["3", "2"]
    assert convert(tmp_path, "--out", tmp_path / "a.json", "--split", "minival") == 0
    assert [row["id"] for row in json.loads((tmp_path / "a.json").read_text())] == ["8"]


@pytest.mark.parametrize("change, told", [
    ({"lecture": None}, "problems.json: 3.lecture: must be text"),
    ({"solution": 7}, "problems.json: 3.solution: must be text"),
    ({"answer": 2}, "problems.json: 3: needs 1 to 5 choices"),
    ({"answer": "1"}, "problems.json: 3.answer: must be a whole number: correct the row"),
    ({"answer": True}, "problems.json: 3.answer"), ({"choices": "ab"}, "problems.json: 3.choices"),
    ({"choices": list("abcdef")}, "needs 1 to 5 choices"), ({"hint": None}, "3.hint"),
    ({"image": 3}, "3.image"), ({"question": "\ud800"}, "3.question")], ids=str)
def test_a_bad_problem_is_named(tmp_path, capsys, change, told):
    problems = {"3": EXAM["3"][0] | change}
    write_exam(tmp_path, problems, {"train": ["3"]})
    assert convert(tmp_path, "--out", tmp_path / "a.json") == 3
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not (tmp_path / "a.json").exists()
    assert ("UTF-8" in said) == (change == {"question": "\ud800"})


@pytest.mark.parametrize("name", ["4", 4], ids=["text", "number"])
def test_a_problem_that_is_missing_is_called_so(tmp_path, capsys, name):
    write_exam(tmp_path, {"3": EXAM["3"][0]}, {"train": ["3", name], "val": [3]})
    assert convert(tmp_path, "--out", tmp_path / "a.json") == 3
    said = capsys.readouterr().err
    assert f"{tmp_path}/problems.json: no problem 4, which {tmp_path}/pid_splits.json" in said
    assert said.count("\n") == 1 and "question" not in said
    assert convert(tmp_path, "--out", tmp_path / "a.json", "--split", "val") == 0       # control


def test_one_folder_serves_two_splits(tmp_path, capsys):
    """With --prefix the names of both files start from images/; without it they do not."""
    write_exam(tmp_path)
    for split, prefix in (("train", "train"), ("test", "test/")):
        assert convert(tmp_path, "--split", split, "--prefix", prefix, "--out",
                       tmp_path / f"{split}.json") == 0
        assert f"their pictures: --images {tmp_path}/images\n" in capsys.readouterr().out
        names = [row["image"] for row in json.loads((tmp_path / f"{split}.json").read_text())
                 if "image" in row]
        assert names and all(name.startswith(f"{split}/") for name in names)
        for name in names:
            assert picture_path(tmp_path / "images", name).is_file()
    assert convert(tmp_path, "--split", "test", "--out", tmp_path / "bare.json") == 0
    assert f"their pictures: --images {tmp_path}/images/test\n" in capsys.readouterr().out
    with pytest.raises(data.BadData, match="is not a file"):
        picture_path(tmp_path / "images", json.loads(
            (tmp_path / "bare.json").read_text())[0]["image"])


@pytest.mark.parametrize("words, code, told", [
    (("--split", "nothing"), 3, "has no list 'nothing'"),
    (("--out", "{}/problems.json"), 2, "replace its own input"),
    (("--out", "{}/no/a.json"), 2, "folder that exists"),
    (("--prefix", "../val"), 2, "--prefix ../val"), (("--prefix", "/val"), 2, "--prefix /val"),
    (("--prefix", "."), 2, "--prefix ."),
    (("--model", "x"), 2, "unrecognized arguments: --model"),
    (("--llm", "x"), 2, "unrecognized arguments")])
def test_a_wrong_command_is_refused(tmp_path, capsys, words, code, told):
    write_exam(tmp_path)
    out = () if "--out" in words else ("--out", tmp_path / "a.json")
    assert convert(tmp_path, *out, *(word.format(tmp_path) for word in words)) == code
    assert told in capsys.readouterr().err


def test_a_folder_without_the_files_is_refused(tmp_path, capsys):
    assert convert(tmp_path, "--out", tmp_path / "a.json") == 3
    assert "problems.json" in capsys.readouterr().err
    assert convert(tmp_path / "no", "--out", tmp_path / "a.json") == 2
    assert "no such folder" in capsys.readouterr().err


# ------------------------------------------------------------------------- the row of the recipe

def test_the_third_row_is_the_published_one():
    row = train.RECIPES["llava"][2]
    assert (row.epochs, row.batch, row.lr, row.warmup) == (12, 128, 2e-5, .03)
    assert row.train == ("projector", "llm") and row.template == "v1"
    assert row.image_aspect == "square" and row.projector_type == "linear"
    args = train.parse_args(["--stage", "2", "--recipe", "llava", "--task", "scienceqa", "--base",
                             "7b", "--data", "sqa.json"])
    assert args.row == row
    assert str(output_folders(args)[0]) == "runs/7b/llava/stage2-scienceqa"
    other = train.parse_args(["--stage", "2", "--recipe", "llava", "--data", "x.json"])
    assert other.row.epochs == 3 and str(output_folders(other)[0]) == "runs/toy/llava/stage2"
    toy = train.parse_args(["--stage", "2", "--recipe", "llava", "--task", "scienceqa", "--data",
                            "sqa.json"])
    assert toy.row.epochs == 12 and not toy.row.steps and toy.row.lr > 1e-4


@pytest.mark.parametrize("words", [
    ("--stage", "1", "--recipe", "llava", "--data", "x"), ("--stage", "2", "--data", "x"),
    ("--stage", "2", "--recipe", "llava")], ids=" ".join)
def test_the_row_is_of_one_stage_of_one_recipe(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_args([*words, "--task", "scienceqa"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--task scienceqa" in said and said.count("\n") == 1


# ------------------------------------------------------------------------- trained, and evaluated

def colour_problems():
    """Problems whose answer is seen (1 to 4), or read in the hint (5, 6)."""
    red_first, blue_first = ["red", "blue"], ["blue", "red"]
    return {"1": problem("Which?", red_first, 0, "", "red.png", "It is one.", "It is red."),
            "2": problem("Which?", red_first, 1, "", "blue.png", "It is one.", "It is blue."),
            "3": problem("Which?", blue_first, 1, "", "red.png", "", "It is red."),
            "4": problem("Which?", blue_first, 0, "", "blue.png", "", "It is blue."),
            "5": problem("Which?", red_first, 0, "It is red."),
            "6": problem("Which?", red_first, 1, "It is blue.")}


def write_colours(folder, swapped=False):
    """Their folder; swapped: each picture has the other colour."""
    write_exam(folder, colour_problems(), {"train": list("123456"), "test": list("123456")})
    for path in folder.glob("images/*/*/*.png"):
        is_red = (path.name == "red.png") != swapped
        Image.new("RGB", (40, 40), (250, 20, 20) if is_red else (20, 20, 250)).save(path)
    return folder


def scored(folder, model):
    """{group: accuracy} of `evaluate scienceqa` on a folder's test split."""
    args = evaluate.flags.parse([str(word) for word in (
        "scienceqa", "--model", model, "--problems", folder / "problems.json", "--splits",
        folder / "pid_splits.json", "--images", folder / "images/test", "--out", folder / "o.jsonl",
        "--form", "QCM-LEA", "--max-new-tokens", 40, "--device", "cpu")])
    assert exit_status(lambda: evaluated(args)) == 0
    made = json.loads((folder / "o.jsonl.scores.json").read_text())
    return {group: row["accuracy"] for group, row in made["groups"].items()}


def test_trained_and_asked_again(parts, tmp_path):                              # noqa: F811
    """The whole way in small: the official folder, its training file, the third row of the recipe,
    the official score. With pictures exchanged it must fall where pictures decide, and only there.
    """
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir(), wrong.mkdir()
    write_colours(right), write_colours(wrong, swapped=True)
    assert convert(right, "--out", right / "sqa.json") == 0
    out = tmp_path / "stage2-scienceqa"
    train.main(train.parse_args([str(word) for word in (
        "--stage", 2, "--recipe", "llava", "--task", "scienceqa", "--data", right / "sqa.json",
        "--images", right / "images/train", "--output-dir", out, "--threads", 1, "--from", "none",
        "--vision", parts / "clip", "--llm", parts / "llama", "--epochs", 250, "--batch", 6,
        "--train", "vision,projector,llm", "--lr", 5e-3)]))
    assert VLM.from_pretrained(out / "model").projector_type == "linear"
    seen = scored(right, out / "model")
    assert seen["all"] == 1.0
    unseen = scored(wrong, out / "model")
    assert unseen["image context"] == 0 and unseen["text context"] == 1.0


# ------------------------------------------------------------------------------- the toy's problems

def test_the_toys_problems_are_scienceqas(tmp_path):
    """Read by the same code; the answer can be seen in the picture, or read in the hint; the
    control shows another picture; a test scene is one that training never draws."""
    problems.main([str(tmp_path), "--train", "16", "--test", "8"])
    assert convert(tmp_path, "--out", tmp_path / "a.json") == 0
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 16 and sum("image" in row for row in rows) == 11
    table = json.loads((tmp_path / "problems.json").read_text())
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    assert [len(splits[name]) for name in ("train", "test")] == [16, 8]
    for number, name in enumerate(splits["test"]):
        row, scene = problems.make_problem(number, "test")
        assert row == table[name] and split_of(scene) == "test"
        value = row["choices"][row["answer"]]
        assert value in row["solution"] and len(set(row["choices"])) == problems.CHOICES
        assert value in description(scene) and bool(row["hint"]) != bool(row["image"])
        if row["image"]:
            pictures = [data.load_image(tmp_path / f"images/{split}/{name}/image.png").tobytes()
                        for split in ("test", "test-other")]
            assert pictures[0] == draw(scene).tobytes() != pictures[1]
