"""VQA accuracy, CIDEr-D and retrieval on hand-computed values, and on small files of the official
shapes, answered by tiny random models."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import qformer
from evaluate import __main__ as program
from evaluate import retrieval, vqa
from evaluate.cider import cider_d, words
from evaluate.flags import parse
from evaluate.karpathy import read_pictures
from formats.bert import BertTokenizer
from formats.errors import UsageError
from test_blip2_llms import byte_words, piece_words, their_model
from test_qformer_vlm import S

# ------------------------------------------------------------------------------ VQA, by hand


@pytest.mark.parametrize("alike, accuracy", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_ten_people(alike, accuracy):
    given = ["red"] * alike + ["blue"] * (10 - alike)
    assert vqa.vqa_accuracy("red", given) == pytest.approx(accuracy)


@pytest.mark.parametrize("text, normal", [
    ("The Two dogs.", "2 dogs"), ("none", "0"), ("Ten", "10"), ("an apple", "apple"),
    ("dont know", "don't know"), ("it's", "it's"), ("whats that", "what's that"),
    ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("oclock", "o'clock"),
    ("Yes, it is!", "yes it is"),           # a comma beside a space, and a ! that is not: gone, " "
    ("black/white", "black white"), ("1,000", "1000"), ("1,000-2", "10002"), ("3.5", "3.5"),
    ("3.", "3"), (".5", ".5"), ("u.s.a.", "usa"), ("a\nb\tc", "b c"), ("  yes ", "yes"),
    ("t-shirt", "t shirt"), ("blue - ish", "blue ish"), ("", ""), ("the", "")])
def test_normalised_as_officially(text, normal):
    assert vqa.normalise(text) == normal


def test_the_table_of_contractions_is_the_official_one():
    assert len(vqa.CONTRACTIONS) == 116         # of 120 rows; four are cased, and never met
    for row in ("aint", "hes", "shed've", "somebodyd've", "theyve", "wed've", "yalldve", "youve"):
        assert (row in vqa.CONTRACTIONS) == (row != "yalldve")
    for word in ("wed", "were", "shell", "well", "ill", "id", "hell", "im", "ive"):
        assert word not in vqa.CONTRACTIONS     # words of their own, or not of the table


def test_where_all_agree_vqaeval_normalises_nothing():
    assert vqa.vqaeval_accuracy("Yes.", ["yes"] * 10) == 0
    assert vqa.vqaeval_accuracy("Yes", ["yes"] * 10) == 1
    assert vqa.vqa_accuracy("Yes.", ["yes"] * 10) == 1
    mixed = ["a cat", "cat", "two", "2", "dog", "dog", "dog", "dog", "dog", "dog"]
    for rule in (vqa.vqa_accuracy, vqa.vqaeval_accuracy):
        assert rule("The cat", mixed) == pytest.approx(.6)
        assert rule("2.", mixed) == pytest.approx(.6)


# --------------------------------------------------------------------------- CIDEr-D, by hand

def test_words_of_the_official_tool():
    assert words("Two men's dogs don't sit, on a black-and-white bench (sic).") == [
        "two", "men", "'s", "dogs", "do", "n't", "sit", "on", "a", "black-and-white", "bench",
        "-lrb-", "sic", "-rrb-"]
    assert words('A "red" sign; 3.5 feet -- it is 10:30...') == [
        "a", "red", "sign", "3.5", "feet", "it", "is", "10:30"]
    assert words("The end.the $5 sign of www.x.com at 100%; a black/white T-shirt's #1") == [
        "the", "end", "the", "$", "5", "sign", "of", "www.x.com", "at", "100", "%", "a",
        "black/white", "t-shirt", "'s", "#", "1"]
    assert words("Mr. Smith cannot go.") == ["mr.", "smith", "can", "not", "go"]
    assert words("the dogs' bowl's at the U.S. border") == [
        "the", "dogs", "bowl", "'s", "at", "the", "u.s.", "border"]


def test_cider_of_the_reference_itself():
    """Every n-gram is one picture's alone: a cosine of 1 for each n that the caption has."""
    scores = cider_d(["a cat sits here", "two dogs"], [["a cat sits here"], ["Two dogs."]])
    assert scores == pytest.approx([10, 5])             # two words: no n-grams of 3 and 4


def test_cider_by_hand():
    """"a cat" for "a cat sits here": cosines 2 / (√2 · 2) and 1 / √3; 1 pair of words for 3."""
    score = cider_d(["a cat", "two dogs"], [["a cat sits here"], ["two dogs"]])[0]
    assert score == pytest.approx(10 * (2 / (2 * 2 ** .5) + 3 ** -.5) / 4 * math.exp(-4 / 72))
    # a word of both pictures' references has no weight
    score = cider_d(["a cat", "x"], [["a cat sits here"], ["a dog"]])[0]
    assert score == pytest.approx(10 * (3 ** -.5 + 3 ** -.5) / 4 * math.exp(-4 / 72))
    # repeated words are clipped: min(2, 1) · 1 / (2 · 1), and no pair in common
    score = cider_d(["cat cat", "x"], [["cat"], ["dog"]])[0]
    assert score == pytest.approx(10 * (1 / 2) / 4 * math.exp(-1 / 72))
    # of several references the mean
    score = cider_d(["a cat", "x"], [["a cat", "the bird"], ["two dogs"]])[0]
    assert score == pytest.approx(10 * (2 / 4) / 2)
    assert cider_d(["a cat"], [["a cat"]]) == [0]       # one picture: nothing is rare


# ------------------------------------------------------------------------------ the programs

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny BLIP-2 models and some pictures in COCO's, GQA's and NoCaps' naming."""
    root = tmp_path_factory.mktemp("judged")
    for kind, tokens in (("opt", byte_words), ("t5", piece_words)):
        their_model(kind).save_pretrained(root / kind)
        tokens(root / kind, None)
    rng = np.random.default_rng(0)
    (root / "images/val2014").mkdir(parents=True)
    for name in ("COCO_val2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg",
                 "n161.jpg", "0a.jpg", "0b.jpg", "0c.jpg"):
        Image.fromarray(rng.integers(0, 255, (S, S, 3), np.uint8)).save(root / "images" / name)
    return root


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def run(folder, kind, what, out, *flags):
    """(figures, answer rows) of python -m evaluate."""
    program.main(parse([what, "--model", str(folder / kind), "--images", str(folder / "images"),
                        "--out", str(out), "--device", "cpu", *map(str, flags)]))
    figures = json.loads(out.with_name(f"{out.name}.scores.json").read_text())
    return figures, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def vqa_files(tmp_path):
    questions = write(tmp_path / "questions.json", {
        "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {},
        "data_subtype": "val2014", "questions": [
            {"image_id": 1, "question": "What colour?", "question_id": 10},
            {"image_id": 2, "question": "How many?", "question_id": 20}]})
    annotations = tmp_path / "annotations.json"

    def annotate(*answers):
        return write(annotations, {"annotations": [
            {"question_id": 10 * (i + 1), "image_id": i + 1, "question_type": f"kind {i}",
             "answer_type": "other", "multiple_choice_answer": given[0],
             "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n + 1}
                         for n, text in enumerate(given)]} for i, given in enumerate(answers)]})
    return questions, annotate


@pytest.mark.parametrize("kind, prompt", [("opt", "Question: What colour? Answer:"),
                                          ("t5", "Question: What colour? Short answer:")])
def test_vqa(folder, tmp_path, vqa_files, kind, prompt, capsys):
    questions, annotate = vqa_files
    first, rows = run(folder, kind, "vqa", tmp_path / "a.jsonl", "--questions", questions)
    assert "groups" not in first and rows[0]["prompt"] == prompt and len(rows) == 2
    assert "no accuracy" in capsys.readouterr().out
    said = [row["text"] for row in rows]
    assert json.loads((tmp_path / "a.jsonl.results.json").read_text()) == [
        {"question_id": 10 * (i + 1), "answer": vqa.normalise(text)} for i, text in enumerate(said)]
    annotations = annotate([said[0]] * 2 + ["z z"] * 8, ["z z"] * 9 + [said[1]])
    figures, _ = run(folder, kind, "vqa", tmp_path / "a.jsonl", "--questions", questions,
                     "--annotations", annotations)
    assert figures["groups"]["all"] == {"accuracy": pytest.approx(.45), "questions": 2}
    assert figures["groups"]["question_type kind 0"]["accuracy"] == pytest.approx(.6)
    assert figures["groups"]["answer_type other"]["questions"] == 2


def test_vqa_is_asked_as_published(folder, tmp_path):
    """5 beams, length penalty -1, 10 tokens; a flag wins; other models are greedy."""
    line = ["vqa", "--model", str(folder / "opt"), "--images", "x", "--out",
            str(tmp_path / "o"), "--questions", "q"]
    args = parse(line)
    vqa.published_settings(args, vqa.PROMPTS, vqa.ASKED, -1.0)
    assert args.settings == {"num_beams": 5, "length_penalty": -1} and args.max_new_tokens == 10
    args = parse([*line, "--num-beams", "1", "--prompt", "{}?"])
    vqa.published_settings(args, vqa.PROMPTS, vqa.ASKED, -1.0)
    assert args.settings == {"num_beams": 1} and args.prompt == "{}?"
    args = parse([*line, "--num-beams", "1", "--length-penalty", "0"])
    with pytest.raises(UsageError, match="beams"):
        vqa.published_settings(args, vqa.PROMPTS, vqa.ASKED, -1.0)
    llama = write(tmp_path / "config.json", {"model_type": "llava"})
    args = parse([*line[:2], str(llama.parent), *line[3:]])
    vqa.published_settings(args, vqa.PROMPTS, vqa.ASKED, -1.0)
    assert args.settings == {"num_beams": 1} and "single word" in args.prompt


def test_gqa(folder, tmp_path):
    table = {"1": {"question": "Is it?", "imageId": "n161", "answer": "yes"}}
    figures, rows = run(folder, "t5", "vqa", tmp_path / "a.jsonl", "--questions",
                        write(tmp_path / "q.json", table))
    assert figures["groups"]["all"] == {"accuracy": 0, "questions": 1}
    table["1"]["answer"] = vqa.normalise(rows[0]["text"])
    figures, _ = run(folder, "t5", "vqa", tmp_path / "a.jsonl", "--questions",
                     write(tmp_path / "q.json", table))
    assert figures["groups"]["all"]["accuracy"] == 1


def test_nocaps(folder, tmp_path):
    images = [{"id": i, "file_name": f"0{c}.jpg", "domain": d, "open_images_id": f"0{c}"}
              for i, (c, d) in enumerate(zip("abc", ("in-domain", "near-domain", "near-domain")))]
    notes = [{"image_id": i, "id": n, "caption": text} for n, (i, text) in enumerate(
        [(0, "a cat"), (0, "the cat"), (1, "two dogs"), (2, "some birds")])]
    file = write(tmp_path / "nocaps.json", {"images": images, "annotations": notes})
    figures, rows = run(folder, "opt", "caption", tmp_path / "c.jsonl", "--references", file)
    said = [row["text"] for row in rows]
    scores = cider_d(said, [["a cat", "the cat"], ["two dogs"], ["some birds"]])
    found = figures["CIDEr-D"]
    assert found["all"] == {"score": pytest.approx(100 * sum(scores) / 3), "pictures": 3}
    assert found["near-domain"]["score"] == pytest.approx(50 * (scores[1] + scores[2]))
    assert rows[0]["prompt"] == "a photo of" and json.loads(
        (tmp_path / "c.jsonl.results.json").read_text())[2] == {"image_id": 2, "caption": said[2]}


def karpathy(tmp_path):
    return write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": f"COCO_val2014_{i:012}.jpg", "cocoid": i,
         "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts]}
        for i, split, texts in ((1, "test", ["a cat", "one cat"]), (2, "test", ["two dogs"]),
                                (3, "train", ["a bird"]))]})


def test_karpathys_files(folder, tmp_path):
    found = read_pictures(karpathy(tmp_path), folder / "images")
    assert [p["image"] for p in found] == ["COCO_val2014_000000000001.jpg",
                                           "val2014/COCO_val2014_000000000002.jpg"]
    assert found[0]["captions"] == ["a cat", "one cat"] and found[1]["id"] == 2
    with pytest.raises(data.BadData, match="'val'.*test, train"):
        read_pictures(karpathy(tmp_path), folder / "images", "val")
    lavis = write(tmp_path / "l.json", [{"image": "val2014/0a.jpg", "caption": ["x", "y"]}])
    assert read_pictures(lavis, folder / "images")[0]["image"] == "0a.jpg"
    for bad, why in (({"images": [{"split": "test"}]}, "filename"), ([], "no picture"),
                     ({"x": 1}, "none of"), ([{"image": "a"}], "caption"),
                     ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "no caption")):
        with pytest.raises(data.BadData, match=why) as info:
            read_pictures(write(tmp_path / "bad.json", bad), folder)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("change, why", [
    (lambda q, a: q["questions"].append(q["questions"][0]), "there twice"),
    (lambda q, a: q["questions"][0].pop("question"), "question: must be text"),
    (lambda q, a: a["annotations"].pop(), "no answers to question 20"),
    (lambda q, a: a["annotations"][0].update(answers=[]), "answers: is empty"),
    (lambda q, a: a["annotations"][0]["answers"][3].pop("answer"), "answer: must be text"),
    (lambda q, a: q.pop("data_subtype"), "data_subtype"),
    (lambda q, a: q.pop("questions"), "neither VQA's")])
def test_faults_of_the_files_are_one_line(folder, tmp_path, vqa_files, change, why):
    questions, annotate = vqa_files
    annotations = annotate(["a"] * 10, ["b"] * 10)
    q, a = json.loads(questions.read_text()), json.loads(annotations.read_text())
    change(q, a)
    write(questions, q)
    write(annotations, a)
    args = parse(["vqa", "--model", "x", "--images", "x", "--out", str(tmp_path / "o"),
                  "--questions", str(questions), "--annotations", str(annotations)])
    with pytest.raises(data.BadData, match=why) as info:
        vqa.read_questions(args)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("flags", [
    ["vqa", "--questions", "q", "--prompt", "no place"], ["vqa", "--questions", "q", "--num-beams",
                                                         "0"],
    ["caption", "--references", "r", "--prompt", " "], ["vqa"], ["caption"]])
def test_flags_that_are_refused(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as info:
        parse([flags[0], "--model", "m", "--images", "i", "--out", str(tmp_path / "o"), *flags[1:]])
    assert info.value.code == 2


# --------------------------------------------------------------------------------- retrieval

@pytest.mark.parametrize("top", [1, 2, 128])
def test_retrieval_of_official_files(folder, tmp_path, monkeypatch, top):
    """Against all pairs scored one by one; pairs outside the best `top` do not count."""
    tokenizer = BertTokenizer.build(["a cat one two dogs"])
    torch.manual_seed(0)
    tower = clip.Config(width=32, depth=1, heads=4, mlp=48, image_size=S, patch_size=8, eva=True,
                        has_final_block=False)
    model = qformer.Blip2Stage1(tower, qformer.Config(
        width=24, depth=2, heads=3, mlp=40, num_queries=5, vision_width=32, vocab=len(tokenizer),
        context=64), 16).eval()
    model.tokenizer = tokenizer
    monkeypatch.setattr(retrieval.Blip2Stage1, "from_pretrained", lambda folder: model)
    args = parse(["retrieval", "--references", str(karpathy(tmp_path)), "--images",
                  str(folder / "images"), "--top", str(top), "--batch-size", "2"])
    table = retrieval.eval_retrieval(args)
    pictures = read_pictures(args.references, args.images)
    texts, owner = ["a cat", "one cat", "two dogs"], [0, 0, 1]
    ids, mask = tokenizer.encode(texts, length=35)
    with torch.no_grad():
        pixels = torch.cat([data.preprocess(data.load_image(folder / "images" / p["image"]), S,
                                            "squash") for p in pictures])
        features = model.ln_vision(model.encode_vision(pixels))
        cosine = qformer.max_query_similarity(model.encode_image(features),
                                              model.encode_text(ids, mask))
        match = torch.stack([model.itm_logits(f.expand(3, -1, -1), ids, mask)[:, 1]
                             for f in features])
    for name, extra in (("itc", 0), ("itc + itm", match)):
        for side, near, scores in (("image to text", cosine, cosine + extra),
                                   ("text to image", cosine.T, (cosine + extra).T)):
            hits = 0
            for i, row in enumerate(scores):
                best = near[i].topk(min(top, len(row))).indices.tolist()
                winner = max(best, key=lambda j: row[j])
                hits += owner[winner] == i if side == "image to text" else owner[i] == winner
            assert table[name][f"{side} 1"] == pytest.approx(hits / len(scores))
    assert table["itc"]["image to text 10"] >= table["itc"]["image to text 1"]
