"""What users reported about the rows of their files: every layout is read or refused by name, and
the trainer and the doctor say the same about each."""
import json
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data
import train
from formats import conversations
from tiny import write_words
from formats.conversations import images_of
from formats.errors import NothingToLearn, UserError
from formats.strict_json import read_config, read_json
from trainer import doctor as trainer_doctor, loader
from trainer.doctor import parse
from trainer.loader import MicroBatches, Samples
from trainer.samples import encode_sample

LLAMA = Path(data.__file__).parent / "toy/weights/llama"


def talk(*values):
    return [{"from": "gpt" if i % 2 else "human", "value": v} for i, v in enumerate(values)]


def chat(*values, first=()):
    return [*first, *({"role": "assistant" if i % 2 else "user", "content": v}
                      for i, v in enumerate(values))]


def text(said):
    return {"type": "text", "text": said}


IMAGE = {"type": "image"}


def url(where):
    return {"type": "image_url", "image_url": {"url": where}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "images").mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (40, 30), (80 * i, 90, 30)).save(folder / "images" / f"{name}.png")
    write_words(folder)
    return folder


def read(folder, row):
    """The samples of a file with this row, or the BadData's text."""
    (folder / "x.json").write_text(json.dumps([row]))
    ((_, where, got),) = conversations.read_rows(folder / "x.json")
    assert where == f"{folder}/x.json: row 1"
    return str(got) if isinstance(got, data.BadData) else got


def said(folder, row):
    (sample,) = read(folder, row)
    return images_of(sample), sample["conversations"][0]["value"]


# ------------------------------------------------------------------------------- A1: pictures

Q = ["<image>\nQ?", "A"]
TWO = ["<image>\nfirst, <image> second", "A"]
LAYOUTS = {
    "image": ({"image": "a.png", "conversations": talk(*Q)}, ["a.png"]),
    "LLaMA-Factory": ({"messages": chat(*Q), "images": ["a.png"]}, ["a.png"]),
    "sharegpt": ({"conversations": talk(*Q), "images": ["a.png"]}, ["a.png"]),
    "images is a text": ({"messages": chat(*Q), "images": "a.png"}, ["a.png"]),
    "image_path": ({"image_path": "a.png", "conversations": talk(*Q)}, ["a.png"]),
    "image is a list": ({"image": ["a.png"], "conversations": talk(*Q)}, ["a.png"]),
    "two": ({"images": ["a.png", "b.png"], "messages": chat(*TWO)}, ["a.png", "b.png"]),
    "two, image": ({"image": ["b.png", "a.png"], "conversations": talk(*TWO)}, ["b.png", "a.png"]),
    "twice the same": ({"image": "a.png", "images": ["a.png"], "messages": chat(*Q)}, ["a.png"]),
    "none": ({"images": [], "messages": chat("Q?", "A")}, []),
    "parts": ({"messages": chat([IMAGE, text("Q?")], "A"), "images": ["a.png"]}, ["a.png"]),
    "named parts": ({"messages": chat([url("a.png"), text("Q?")], "A")}, ["a.png"]),
    "HF parts": ({"messages": chat([{"type": "image", "text": None, "index": 0}, text("Q?")],
                                   [text("A")]), "images": ["a.png"]}, ["a.png"]),
    "image_url is a text": ({"messages": chat([{"type": "image_url", "image_url": "a.png"},
                                               text("Q?")], "A")}, ["a.png"]),
    "Qwen": ({"messages": chat([{"type": "image", "image": "a.png"}, text("Q?")], "A")},
             ["a.png"])}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_every_layout_reach_the_model(folder, layout):
    """Through what training asks: a place for each picture, and the ids of LLaVA's own layout."""
    row, names = LAYOUTS[layout]
    (sample,) = read(folder, row)
    assert images_of(sample) == names
    assert ("image" in sample) == bool(names) and not {"images", "image_path"} & set(sample)
    words = data.Tokenizer(folder)
    ids, labels = batches(folder, row, "v1").text(0)
    assert ids.count(data.IMAGE) == len(names)
    asked = sample["conversations"][0]["value"]
    want = talk(TWO[0] if len(names) == 2 else Q[0] if names else "Q?", "A")
    assert data.encode(want, "v1", words, len(names))[0] == ids, asked
    assert words.decode([x for x in labels if x >= 0]).strip() == "A"


def test_one_picture_keeps_the_official_rule_and_several_stand_where_they_stand():
    words = data.Tokenizer(LLAMA)
    for one in (True, 1):
        ids = data.encode(talk("Q <image> twice <image>", "A"), "v1", words, one)[0]
        assert ids == data.encode(talk("<image>\nQ  twice", "A"), "v1", words)[0]
    ids, labels = data.encode(talk("Q <image> and <image>?", "A"), "v1", words, 2)
    system = data.TEMPLATES["v1"].system
    assert ids == data.prompt_ids(f"{system} USER: Q <image> and <image>? ASSISTANT: A</s>", words)
    assert [i for i, x in enumerate(ids) if x == data.IMAGE and labels[i] == data.IGNORE] == [
        i for i, x in enumerate(ids) if x == data.IMAGE]
    tagged = data.encode(talk("<image><image>\nQ", "A"), "v1_mmtag", words, 2)[0]
    assert tagged == data.prompt_ids(
        f"{data.TEMPLATES['v1_mmtag'].system} USER: {'<Image><image></Image>' * 2}\nQ ASSISTANT: "
        "A</s>", words)


@pytest.mark.parametrize("template", ["plain", "blip2", "minigpt4_caption", "minigpt4",
                                      "instructblip"])
def test_templates_of_one_picture_refuse_two(folder, template):
    with pytest.raises(data.BadData, match=f"template {template} holds one picture, not 2"):
        data.encode(talk(*TWO), template, data.Tokenizer(folder), 2)


KEYS = ["video", "videos", "image_url", "img", "pixel_values", "picture", "image_paths", "photo",
        "Images", "imageUrl", "image_file", "img_path", "frames", "audio", "audios", "screenshot",
        "image_names", "pixelValues", "image-url", "images_list", "image_base64", "media",
        "visuals"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"bytes": "x"}],
                         ids=["text", "list", "dict"])
def test_keys_that_look_like_pictures_are_refused_by_name(folder, key, value):
    for row in ({"conversations": talk("Q?", "A")}, {"messages": chat(*Q), "images": ["a.png"]}):
        why = read(folder, {**row, key: value})
        assert isinstance(why, str) and why.startswith(f"{key}: looks like a picture")
    why = read(folder, {"messages": [{"role": "user", "content": "Q?", key: value},
                                     {"role": "assistant", "content": "A"}]})
    assert isinstance(why, str) and why.startswith(f"messages[0].{key}: looks like a picture")


@pytest.mark.parametrize("more", [
    {"image_width": 3}, {"image_id": 5}, {"image_id": "5"}, {"url": "https://x.org/a.jpg"},
    {"source": "coco"}, {"file_name": "a.jpg"}, {"has_image": True}, {"videos": []},
    {"video": None}, {"img": ""}, {"image_size": [3, 4]}, {"model": "gpt"}, {"num_images": 1},
    {"topic": "x"}, {"framework": "x"}, {"video_fps": 3.0}, {"imaginary": "x"}])
def test_notes_beside_a_picture_are_no_pictures(folder, more):
    """The control: what tells about a picture is kept, and passes."""
    (sample,) = read(folder, {"image": "a.png", "conversations": talk(*Q), **more})
    assert {**sample, **more} == sample


@pytest.mark.parametrize("more", [
    {"image_id": 5}, {"image_id": "5"}, {"file_name": "a.jpg"}, {"path": "x/a.JPEG"},
    {"source": "clip.mp4"}, {"attachments": ["a.png", "b.webp"]},
    {"data": "data:image/png;base64,A"}])
def test_text_alone_with_the_name_of_a_picture_is_refused(folder, more):
    why = read(folder, {"conversations": talk("Q?", "A"), **more})
    assert isinstance(why, str) and why.startswith(f"{next(iter(more))}: looks like a picture")


MARKS = ["<video>", "<img>", "<|image_pad|>", "<image_1>", "<im_patch>", "<|vision_start|>",
         "<|image|>", "<|image_1|>", "<ImageHere>", "<image_placeholder>", "<image-placeholder>",
         "<Image>", "<IMAGE>", "<|video_pad|>", "<audio>", "<image_soft_token>", "<picture>",
         "<start_of_image>", "<img>a.png</img>", "<video>a.mp4</video>", "[IMG]", "<IMG_CONTEXT>",
         "<image1>", "<im_start>", "<|audio_pad|>", "<frame>", "<image/>", "< image >"]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_other_models_are_refused_by_name(folder, mark):
    for value in (f"{mark}\nQ?", f"Q?\n{mark}", f"Look:\n{mark}\nWhat is it?", mark):
        why = read(folder, {"messages": chat(value, "A")})
        assert isinstance(why, str), value
        assert why.startswith(f"messages[0].content: {mark!r} marks a picture")
    why = read(folder, {"image": "a.png", "conversations": talk(f"{mark}\nQ?", "A")})
    assert isinstance(why, str) and why.startswith(f"conversations[0].value: {mark!r} marks")


@pytest.mark.parametrize("value", [
    "What does <video> do in HTML?", "Does <img> need a closing tag, and <audio> one?",
    "The video shows a cat. Is the image sharp?", "<|im_start|>user", "List<Image> in Java?",
    '<img src="a.png"> is not shown, why?', "<video controls>\n  <source>\n</video>",
    "<video>\n  <source src='x'>\n</video>", "run docker run <image_name> now",
    "[img]http://x.org/a[/img]", "a <image> b", "<div>\n<p>\n", "[1] and [image] then", "<imagine>",
    "<|time|> <|claim|>", "<picture>\n<source>\n</picture> is this right?"])
def test_words_in_a_sentence_are_words(folder, value):
    (sample,) = read(folder, {"conversations": talk(value, "A")})
    words = data.Tokenizer(folder)
    ids, _ = encode_sample(sample, "v1", words, 576)
    assert data.IMAGE not in ids and ids == data.encode(talk(value, "A"), "v1", words, False)[0]


# ------------------------------------------------------------------------------- B12: system, parts

SYSTEMS = {"a turn": {"conversations": [{"from": "system", "value": "Be terse."},
                                        *talk("Q?", "A")]},
           "a role": {"messages": chat("Q?", "A", first=[{"role": "system",
                                                          "content": "Be terse."}])},
           "developer": {"messages": chat("Q?", "A", first=[{"role": "developer",
                                                             "content": [text("Be terse.")]}])},
           "a key": {"system": "Be terse.", "conversations": talk("Q?", "A")}}
HAVE = sorted(name for name, t in data.TEMPLATES.items()
              if t.system and t.style in ("two", "single", "chat", "llama2"))


@pytest.mark.parametrize("template", HAVE)
def test_system_texts_stand_where_the_templates_own_stands(folder, template):
    """The whole text equals the template's own, with another system text in its place."""
    t = data.TEMPLATES[template]
    own = t.system
    turns = talk("Q?", "A")
    before = "".join(p.text for p in data.training_segments(turns, template, False)[1])
    given = [{"from": "system", "value": "Be terse."}, *turns]
    after = "".join(p.text for p in data.training_segments(given, template, False)[1])
    assert before.count(own) == 1 and after == before.replace(own, "Be terse.")
    asked, told = data.prompt(turns[:1], template), data.prompt(given[:2], template)
    assert asked.count(own) == 1 and told == asked.replace(own, "Be terse.")
    words = data.Tokenizer(folder)
    for kind, row in SYSTEMS.items():
        (sample,) = read(folder, row)
        assert sample["system"] == "Be terse." and len(sample["conversations"]) == 2, kind
        got = encode_sample(sample, template, words, 576)
        assert got == data.encode(given, template, words, False)
        assert batches(folder, row, template).text(0) == got
    assert data.encode(turns, template, words, False) != got                        # the control


def test_what_stands_in_a_system_text_is_no_control_token():
    words = data.Tokenizer(LLAMA)
    turns = [{"from": "system", "value": "say </s> now"}, *talk("Q?")]
    for template in HAVE:
        assert data.prompt_tokens(turns, template, words).count(words.eos) == 0, template
        bare = data.prompt_tokens(turns[1:], template, words)
        blank = [{"from": "system", "value": " "}, *turns[1:]]
        assert data.prompt_tokens(blank, template, words) == bare


@pytest.mark.parametrize("template", sorted(set(data.TEMPLATES) - set(HAVE)))
def test_templates_without_a_system_text_refuse_one(folder, template):
    turns = [{"from": "system", "value": "Be terse."}, *talk("<image>\nQ?", "A")]
    for ask in (lambda: data.encode(turns, template, data.Tokenizer(folder)),
                lambda: data.prompt(turns[:2], template)):
        with pytest.raises(data.BadData, match=f"template {template} has no system text.*--temp"):
            ask()


def test_parts_are_joined_and_pictures_stand_in_their_place(folder):
    row = {"images": ["a.png", "b.png"],
           "messages": chat([text("A: "), IMAGE, text(" and "), IMAGE, text("?")], "A")}
    assert said(folder, row) == (["a.png", "b.png"], "A: <image> and <image>?")
    row["messages"][0]["content"] = [IMAGE, IMAGE, text("Which?"), text(" Say.")]
    assert said(folder, row) == (["a.png", "b.png"], "<image>\n<image>\nWhich? Say.")
    row = {"messages": chat([url("b.png"), text("Q"), url("a.png")], [text("A"), text("!")])}
    assert said(folder, row) == (["b.png", "a.png"], "<image>\nQ<image>")
    assert read(folder, row)[0]["conversations"][1]["value"] == "A!"


BAD_FIELDS = {
    "null answer": ({"messages": chat("Q?", "A", "Q?", None)}, "messages[3].content: must be text"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content: must be text"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0].value: must be text"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: must be user"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role: must be user or assistant"),
    "from": ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from: must be"),
    "no turn": ({"messages": [3]}, "messages[0]: must be an object with role and content"),
    "messages": ({"messages": "Q?"}, "messages: must be a list of turns"),
    "null image": ({"image": None, "conversations": talk(*Q)}, "image: must be a file name"),
    "empty image": ({"image": "", "conversations": talk(*Q)}, "image: must be a file name"),
    "null in images": ({"images": [None], "messages": chat(*Q)}, "images[0]: must be a file name"),
    "a dict": ({"image": {"path": "a.png"}, "messages": chat(*Q)}, "image: must be a file name"),
    "null images": ({"images": None, "messages": chat(*Q)}, "images: must be a file name"),
    "two keys": ({"image": "a.png", "images": ["b.png"], "messages": chat(*Q)},
                 "image and images: name different pictures"),
    "http": ({"messages": chat([url("https://x.org/a.png")], "A")},
             "messages[0].content[0].image_url.url: 'https://x.org/a.png' is an address"),
    "http image": ({"image": "http://x.org/a.png", "messages": chat(*Q)},
                   "image: 'http://x.org/a.png' is an address"),
    "data": ({"messages": chat([url("data:image/png;base64," + "A" * 999)], "A")},
             "messages[0].content[0].image_url.url: 'data:image/png;base64,AAAA"),
    "no url": ({"messages": chat([{"type": "image_url"}], "A")},
               "messages[0].content[0].image_url: has no url"),
    "video part": ({"messages": chat([{"type": "video", "video": "a.mp4"}], "A")},
                   "messages[0].content[0].type: 'video' is not read"),
    "untyped part": ({"messages": chat([{"text": "Q?"}], "A")},
                     "messages[0].content[0].type: None is not read"),
    "null text": ({"messages": chat([{"type": "text", "text": None}], "A")},
                  "messages[0].content[0].text: must be text"),
    "part": ({"messages": chat(["Q?"], "A")}, "messages[0].content[0]: must be an object"),
    "picture in an answer": ({"messages": chat("Q?", [IMAGE])},
                             "messages[1].content[0]: a picture"),
    "some named": ({"images": ["b.png"], "messages": chat([url("a.png"), IMAGE], "A")},
                   "messages: some pictures are named there"),
    "two systems": ({"system": "x", **SYSTEMS["a role"]}, "system: is there twice"),
    "system last": ({"messages": chat("Q?", "A") + [{"role": "system", "content": "x"}]},
                    "messages: a system turn behind others (turn 3)"),
    "system number": ({"system": 3, "messages": chat("Q?", "A")}, "system: must be text")}


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_bad_fields_have_the_names_of_the_file(folder, kind):
    row, words = BAD_FIELDS[kind]
    why = read(folder, row)
    assert isinstance(why, str) and why.startswith(words) and len(why) < 300, why
    if "messages" in row and not words.startswith("conversations"):
        assert "value" not in why and "conversations" not in why


# ------------------------------------------------------------------------------- both say the same

def batches(folder, row, template="v1", *more):
    """What training asks for a file's texts, with a model of a tokeniser alone."""
    (folder / "x.json").write_text(json.dumps([row]))
    args = train.parse_args(["--stage", "2", "--template", template, "--data",
                            str(folder / "x.json"), "--images", str(folder / "images"),
                            "--batch", "1", *map(str, more)])
    model = SimpleNamespace(tokenizer=data.Tokenizer(folder), image_size=336,
                            num_image_tokens=lambda: 576, qformer_tokenizer=None,
                            llm=SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1))))
    return MicroBatches(Samples(args), model, args)


def reason(line):
    """A message without the places before it: file and row, the sample's name, the row's field."""
    line = re.sub(r"^.*\bx\.json: row 1[:,] ", "", line)
    line = re.sub(r"^sample [^:]*: ", "", line)
    line = line.removesuffix(": correct them, or leave them out with --on-bad-sample skip")
    return re.sub(r"^(conversations|messages|caption): ", "", line)


def trained(folder, row, template, *more):
    """Training's verdict: "", or what it says."""
    try:
        job = batches(folder, row, template, *more)
        if job.samples.rows is None or len(job.samples.rows) != 1:
            raise AssertionError("one sample is expected")
        ids, labels = job.text(0)
        if not any(x >= 0 for x in labels):
            # left out and counted; what is said of it is the judge's
            ((_, _, (sample,)),) = conversations.read_rows(folder / "x.json")
            flags = dict(zip(more[::2], more[1::2]))
            with pytest.raises(NothingToLearn) as info:
                encode_sample(sample, template, data.Tokenizer(folder), 576,
                                   flags.get("--pack", 0), flags.get("--max-length", 0))
            return reason(str(info.value))
        return ""
    except UserError as error:
        return reason(str(error))


def doctored(folder, row, template, capsys, *more):
    """The doctor's verdict: "", or what it says."""
    (folder / "x.json").write_text(json.dumps([row]))
    capsys.readouterr()
    code = trainer_doctor.run(parse(["check", str(folder / "x.json"), "--images",
                                     str(folder / "images"), "--llm", str(folder), "--template",
                                     template, *map(str, more)]))
    out = capsys.readouterr().out
    faults = [line for line in out.split("\n\n")[0].splitlines() if "x.json: row 1" in line]
    assert (code, len(faults)) in ((0, 0), (3, 1)), out
    assert f"; {len(faults)} faults" in out
    return reason(faults[0]) if faults else ""


LONG = "word " * 200
TABLE = [                   # row, template, flags, a word of the verdict ("": fine)
    *((row, "v1", (), "") for row, _ in LAYOUTS.values()),
    *((row, "v1", (), "") for row in SYSTEMS.values()),
    *((row, "v1", (), words.partition(": ")[2]) for row, words in BAD_FIELDS.values()),
    ({"video": "a.mp4", "conversations": talk("<video>\nQ?", "A")}, "v1", (), "looks like|marks"),
    ({"conversations": talk("<video>\nQ?", "A")}, "v1", (), "marks a picture"),
    ({"conversations": talk("<image>\nQ?", "A")}, "v1", (), "but no picture"),
    ({"messages": chat("Q?\n<image>", "A")}, "v1", (), "but no picture"),
    ({"messages": chat("Look\n<image>\nQ?", "A")}, "v1", (), "but no picture"),
    ({"conversations": talk("a <image> b", "A")}, "v1", (), ""),
    ({"image": "a.png", "conversations": talk("Q?", "A")}, "v1", (), "one picture, but 0"),
    ({"image": "a.png", "conversations": talk("<image>", "A", "<image>", "B")}, "v1", (),
     "one picture, but 2"),
    ({"image": "a.png", "conversations": talk("<image>Q<image>", "A")}, "v1", (), ""),
    ({"images": ["a.png", "b.png"], "messages": chat(*Q)}, "v1", (), "2 pictures, but 1"),
    ({"images": ["a.png"], "messages": chat("<image><image>", "A", "<image>", "A")}, "v1", (),
     "one picture, but 2"),
    *(({key: ["a.png"], turns: say(*TWO)}, name, (), "is a list of one picture, but 2 <image>")
      for key, turns, say in (("image", "conversations", talk), ("images", "messages", chat))
      for name in ("v1", "plain", "minigpt4")),
    ({"image": "a.png", "conversations": talk(*TWO)}, "v1", (), ""),
    ({"image": ["a.png"], "conversations": talk(*Q)}, "v1", (), ""),
    ({"images": ["a.png", "b.png"], "messages": chat(*TWO)}, "plain", (), "holds one picture"),
    ({"images": ["a.png", "b.png"], "messages": chat(*TWO)}, "minigpt4", (), "holds one picture"),
    ({"images": ["a.png", "b.png"], "messages": chat(*TWO)}, "llava_llama_2", (), ""),
    ({"conversations": talk("Q?", "")}, "v1", (), "nothing to learn"),
    ({"conversations": talk("Q?", " \n")}, "v1", (), "nothing to learn"),
    ({"conversations": talk("Q?")}, "v1", (), "nothing to learn"),
    ({"messages": chat("Q?", "", "Q?", "A")}, "v1", (), ""),
    ({"image": "a.png", "conversations": talk("<image>", " ")}, "plain", (), "nothing to learn"),
    ({"conversations": talk("Q?", "")}, "llava_v0", (), "nothing to learn"),
    ({"image": "a.png", "conversations": talk("<image>", "...")}, "blip2", (), "nothing to learn"),
    ({"image": "a.png", "caption": ["A Cat."]}, "blip2", (), ""),
    ({"image": "a.png", "conversations": talk(*Q, *Q)}, "blip2", (), "not from 4 turns"),
    ({"image": "a.png", "conversations": talk(*Q, "Q?", "A")}, "minigpt4", (), "not from 4 turns"),
    ({"image": "a.png", "conversations": talk("no mark", "A")}, "minigpt4", (), ""),
    *(({"conversations": talk("Q?", "A")}, name, (), "picture in every row, and this")
      for name in ("minigpt4", "minigpt4_caption", "plain", "blip2")),
    ({"conversations": talk("<image>\nQ?", "A")}, "minigpt4", (), "but no picture"),
    ({"conversations": talk("Q?", "A")}, "instructblip", (), ""),
    ({"image": "a.png", "conversations": talk(*Q, "Q?", "A")}, "plain", (), "needs <image>"),
    ({"image": "a.png", "conversations": talk(*Q)}, "instructblip", (), ""),
    ({"conversations": talk("Q?", "A", "B")[1:]}, "v1", (), "nothing to learn"),
    ({"conversations": [talk("Q?")[0]] * 2}, "v1", (), "wrong speaker"),
    ({"conversations": talk("", "A")}, "llama_2", (), "the first human turn is empty"),
    ({"conversations": talk("Q?", LONG)}, "v1", ("--pack", 900), "tokens are over --pack 900"),
    ({"conversations": talk("Q?", LONG)}, "v1", ("--pack", 1300), ""),
    ({"image": "a.png", "conversations": talk(*Q)}, "v1", ("--pack", 600), "are over --pack 600"),
    ({"conversations": talk("Q?", LONG)}, "v1", ("--max-length", 900), ""),
    ({"conversations": talk(LONG, "A")}, "v1", ("--max-length", 900), "behind --max-length 900"),
    ({"image": "a.png", "conversations": talk(*Q)}, "v1", ("--max-length", 600),
     "picture ends behind --max-length 600"),
    ({"conversations": talk("Q?", LONG)}, "v1", ("--max-length", 900, "--pack", 900), ""),
    *((SYSTEMS["a key"] | {"image": "a.png", "conversations": talk(*Q)}, name, (),
       "has no system text") for name in ("plain", "minigpt4", "instructblip",
                                          "mistral_instruct")),
    ({"system": "a <image>", "image": "a.png", "conversations": talk("Q?", "A")}, "v1", (),
     "in the system text"),
    ({"image": "a.png", "conversations": talk("<|image_pad|>Q?", "A")}, "v1", (), "marks"),
    ({"image": "gone.png", "conversations": talk("Q?", "A", "Q?", 3)}, "v1", (), "must be text"),
    (3, "v1", (), "a sample must be an object"), ({"id": None, **LAYOUTS["image"][0]}, "v1", (),
                                                  "must be text or a number")]


@pytest.mark.parametrize("at", range(len(TABLE)))
def test_training_and_the_doctor_say_the_same(folder, capsys, at):
    row, template, flags, words = TABLE[at]
    doctor = doctored(folder, row, template, capsys, *flags)
    assert trained(folder, row, template, *flags) == doctor
    assert any(word in doctor for word in words.split("|")) if words else not doctor, doctor


def test_the_control_of_the_table(folder, capsys, monkeypatch):
    """A judge that only the doctor asks is found out."""
    row = {"image": "a.png", "conversations": talk("Q?", "A")}
    alone = lambda sample, template, words, *_, **__: data.encode(
        sample["conversations"], template, words)
    monkeypatch.setattr(loader, "encode_sample", alone)
    monkeypatch.setattr(Samples, "check", lambda *_: None, raising=False)
    assert trained(folder, row, "v1") != doctored(folder, row, "v1", capsys)


# ------------------------------------------------------------------------------- the doctor, show

def test_samples_that_teach_nothing_are_counted_and_named(folder, capsys):
    rows = [{"conversations": talk("Q?", "A" if i == 3 else "")} for i in range(8)]
    (folder / "x.json").write_text(json.dumps(rows))
    assert trainer_doctor.run(parse(["check", str(folder / "x.json")])) == 3
    out = capsys.readouterr().out
    assert out.count("conversations: nothing to learn, no answer has words") == 8     # 7 and a sum
    assert re.search(r"^ +7  conversations: nothing to learn", out, re.M)
    assert issubclass(NothingToLearn, data.BadData)


def test_marks_that_become_one_are_named_and_are_no_fault(folder, capsys):
    """A single name with two marks in a turn: officially one picture, in front."""
    rows = [{"image": "a.png", "conversations": talk(*said)} for said in (
        Q, TWO, [TWO[0], "A", "Q?", "A"], ["<image><image><image>", "A"], Q, *[TWO] * 19)]
    rows.append({"image": "a.png", "caption": "a cat"})
    (folder / "x.json").write_text(json.dumps(rows))
    check = parse(["check", str(folder / "x.json"), "--images", str(folder / "images")])
    assert trainer_doctor.run(check) == 0
    out = capsys.readouterr().out
    named = ", ".join(map(str, (2, 3, 4, *range(6, 23))))
    assert re.search(rf"^ +22  note: several <image> in a turn and one .* Rows: {named}, \.\.\.$",
                     out, re.M)
    assert "0 faults" in out
    (folder / "x.json").write_text(json.dumps(rows[:1]))
    assert trainer_doctor.run(check) == 0 and "note: " not in capsys.readouterr().out


def test_every_picture_of_a_row_is_looked_at(folder, capsys):
    row = {"images": ["a.png", "gone.png"], "messages": chat(*TWO)}
    assert "is not a file of" in doctored(folder, row, "v1", capsys)
    row = {"images": ["a.png", "../x.json"], "messages": chat(*TWO)}
    assert "must be a plain path inside" in doctored(folder, row, "v1", capsys)


def test_the_doctor_counts_tokens_as_training_does(folder, capsys):
    dice = random.Random(0)
    for _ in range(20):
        n = dice.randint(0, 3)
        row = {"system": "x " * dice.randint(0, 9), "images": ["a.png"] * n,
               "messages": chat("<image>\n" * n + "Q " * dice.randint(1, 9), "A")}
        (sample,) = read(folder, row)
        words = data.Tokenizer(folder)
        ids = encode_sample(sample, "v1", words, 576)[0]
        size = len(ids) + 575 * n
        assert not doctored(folder, row, "v1", capsys, "--pack", size)
        assert f"{size:,} tokens" in doctored(folder, row, "v1", capsys, "--pack", size - 1)


def test_show_names_each_picture_and_the_system_text(folder, capsys):
    row = {"system": "Be terse.", "images": ["a.png", "b.png"], "messages": chat(*TWO)}
    (folder / "x.json").write_text(json.dumps([row]))
    assert trainer_doctor.run(parse(["show", str(folder / "x.json"), "--llm", str(folder)])) == 0
    out = capsys.readouterr().out
    assert 0 < out.index("<a.png: 576 places>") < out.index("<b.png: 576 places>")
    assert "B e ▁ t e r s e" in out and "c u r i o u s" not in out


# ------------------------------------------------------------------------------- C18: encodings

@pytest.mark.parametrize("bom", [True, False])
@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_unicodes_are_named(folder, tmp_path, name, bom):
    told = f"is {name[:6].upper()}: save it as UTF-8"
    rows = [{"conversations": talk("é", "ü")}]
    for written in (json.dumps(rows), json.dumps(rows[0]), "\n" + json.dumps(rows, indent=1)):
        (tmp_path / "x.json").write_bytes(("\ufeff" * bom + written).encode(name))
        for ask in (data.read_conversations, read_json):
            with pytest.raises(data.BadData, match=told) as info:
                ask(tmp_path / "x.json")
            assert "x.json" in str(info.value)
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes(("\ufeff" * bom + "{}").encode(name))
    for ask in (read_config, data.Tokenizer):
        with pytest.raises(data.BadModel, match=told):
            ask(tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)
    (tmp_path / "x.json").write_text("\ufeff" * bom + json.dumps(rows), encoding="utf-8")
    assert len(data.read_conversations(tmp_path / "x.json")) == 1                   # the control


def test_rows_of_bad_shape_are_yielded_and_do_not_hide_others(tmp_path):
    rows = [{"messages": chat(*Q), "images": ["a.png"]}, 3, {"messages": chat("Q?", None)},
            {"image": None, "conversations": talk(*Q)}, {"conversations": talk("Q?", "A")}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    got = list(conversations.read_rows(tmp_path / "x.json"))
    assert [n for n, *_ in got] == [1, 2, 3, 4, 5]
    assert [isinstance(x, data.BadData) for *_, x in got] == [False, True, True, True, False]
    assert got[4][2][0]["where"] == got[4][1] == f"{tmp_path}/x.json: row 5"
    assert got[0][2][0]["field"] == "messages"


def test_long_texts_of_marks_take_no_time(folder):
    start = time.process_time()
    for value in ("say <img> and " * 20_000 + "?", "<|" + "image" * 50_000, "a <image> b " * 20_000,
                  "<img>" * 20_000 + " x."):
        read(folder, {"conversations": talk(value, "A")})
    assert time.process_time() - start < 5
