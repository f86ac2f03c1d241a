"""Several pictures in a row of data and in a question: each stands where its mark does, in training
and when the model is asked, and the two agree to the id.
"""
import json

import pytest
import torch
from PIL import Image

import data
import generate as g
import projector
import train
from data import IGNORE, IMAGE
from decoding.chat import save_conversation
from decoding.pictures import load_picture
from formats.chat_templates import ChatTemplate
from formats.conversations import images_of, parse_row, read_conversations
from formats.errors import UsageError
from formats.llava_rows import llava_row, marks_its_pictures
from formats.templates import chat_template
from test_generate import args_for, folder, inside, model, pixels, words       # noqa: F401
from test_train import flags, parts, unchanged_process                         # noqa: F401
from tiny import gap, LIMIT
from trainer.build import start_model
from trainer.loader import MicroBatches, Samples
from trainer.samples import encode_sample, sample_pieces

BETWEEN = "Is <image> like <image>, or not?"


def talk(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(values)]


# ------------------------------------------------------------------------ what a question holds

@pytest.mark.parametrize("text, pictures, placed", [
    (BETWEEN, 2, True), ("<image><image>", 2, True), ("A <image>", 1, False), ("no", 2, False),
    (BETWEEN, 3, False), (BETWEEN, 1, False), ("<image>" * 3, 3, True), ("", 0, False)])
def test_marks_are_places_only_if_there_is_one_for_each(text, pictures, placed):
    assert marks_its_pictures(text, pictures) == placed


@pytest.mark.parametrize("text", [BETWEEN, "<image>\n<image>\nAlike?", "<image><image>",
                                  "Say <image> then\n<image>"])
def test_asked_is_what_was_trained(words, text):                                # noqa: F811
    row = {"id": "1", "image": ["a", "b"], "conversations": talk(text, "Yes.")}
    ids, labels = encode_sample(row, "v1", words, image_tokens=9)
    asked = g.build_prompt([text], "v1", words, (0, 0))
    assert ids[:len(asked)] == asked and asked.count(IMAGE) == 2
    assert labels[len(asked)] != IGNORE == labels[len(asked) - 1]
    # without marks both stand in front, each on a line of its own
    bare = text.replace("<image>", "")
    front = g.build_prompt([bare], "v1", words, (0, 0))
    assert front == data.prompt_tokens(talk(f"<image>\n<image>\n{bare}"), "v1", words)


def test_marks_in_a_later_turn(words):                                          # noqa: F811
    turns = ["<image> is typed", "Yes.", "<image>: as <image>?"]
    ids = g.build_prompt(turns, "v1", words, (0, 2, 2))
    # the first is a picture in front and a typed word, the last turn's are places
    assert ids.count(IMAGE) == 3
    front = talk("<image>\n < image> is typed", "Yes.", "<image>: as <image>?")
    assert len(ids) > len(data.prompt_tokens(front, "v1", words)) - 5
    assert "<image> " in words.decode(ids) and words.decode(ids).count("<image>") == 1
    with pytest.raises(UsageError, match="3 pictures and 2 <image> in the question"):
        g.build_prompt([BETWEEN], "v1", words, (0, 0, 0))
    with pytest.raises(UsageError, match="2 pictures and 1 <image>"):
        g.build_prompt(["What is <image>?"], "v1", words, (0, 0))
    with pytest.raises(UsageError, match="takes one picture"):
        g.build_prompt([BETWEEN], "plain", words, (0, 0))


def test_each_picture_is_spliced_at_its_mark(model, pixels):                    # noqa: F811
    """Positions of the row of embeddings, one by one; and the order of the pictures matters."""
    ids = torch.tensor([g.build_prompt([BETWEEN], "v1", model.tokenizer, (0, 0))])
    both = torch.cat((pixels[0], pixels[1]))
    with torch.no_grad():
        row = model.embed(ids, both)[0][0]
        text = model.llm.embed(ids.clamp(min=0))[0]
        one, two = model.encode_images(both)
        at, wanted = [i for i, x in enumerate(ids[0].tolist()) if x == IMAGE], []
        for i, part in enumerate((one, two)):
            before = at[i - 1] + 1 if i else 0
            wanted += [text[before:at[i]], part]
        wanted = torch.cat([*wanted, text[at[1] + 1:]])
        assert at[1] - at[0] > 2 and gap(row, wanted) == 0
        swapped = torch.cat((pixels[1], pixels[0]))
        assert gap(model(ids, both)[:, -1], model(ids, swapped)[:, -1]) > 100 * LIMIT
        front = torch.tensor([g.build_prompt(["Is like, or not?"], "v1", model.tokenizer, (0, 0))])
        assert gap(model(ids, both)[:, -1], model(front, both)[:, -1]) > 100 * LIMIT


# ------------------------------------------------------------------------------- on the way out

def test_a_saved_talk_comes_back_as_it_was_asked(tmp_path, words):              # noqa: F811
    turns = [BETWEEN, "Yes.", "What does <image> do?", "It draws."]
    row = llava_row(["a.png", "b.png"], turns, (0, 0))
    assert row["conversations"][0]["value"] == BETWEEN
    assert row["conversations"][2]["value"] == "What does < image> do?"
    assert llava_row("a.png", ["Is <image>?"], (0,))["conversations"][0]["value"] == (
        "<image>\nIs < image>?")
    group = torch.zeros(2, 3, 24, 24), None, [tmp_path / "a.png", tmp_path / "b.png"]
    save_conversation(tmp_path / "talk.json", turns, {0: group})
    (found,) = read_conversations(tmp_path / "talk.json")
    ids, _ = encode_sample(found, "v1", words, image_tokens=9)
    asked = g.build_prompt([BETWEEN], "v1", words, (0, 0))
    assert ids[:len(asked)] == asked and images_of(found) == ["a.png", "b.png"]


@pytest.mark.parametrize("parts, text", [
    ([None, None, "Alike?"], "<image>\n<image>\nAlike?"),
    (["Is ", None, " like ", None, "?"], "Is <image> like <image>?"),
    ([None, " and ", None, "?"], "<image>\n and <image>?"),
    ([None, "\n", None, "\nAlike?"], "<image>\n<image>\nAlike?"),        # as lm-eval cuts texts
    ([None, None], "<image>\n<image>"), (["What?\n", None], "<image>\nWhat?"),
    ([None, "\nWhat?"], "<image>\nWhat?"), ([None], "<image>"), (["No picture "], "No picture ")])
def test_a_part_list_is_rendered_as_it_is_trained(parts, text):
    """The saved chat template, and a row of a data file with the same parts."""
    chat = ChatTemplate.of(chat_template(data.template_of("v1")), "x.jinja", {})
    said = chat.write([("user", parts)])
    assert said == data.prompt(talk(text), "v1")
    content = [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]
    row = {"images": [f"{i}.png" for i in range(parts.count(None))],
           "messages": [{"role": "user", "content": content},
                        {"role": "assistant", "content": "A"}]}
    (sample,) = parse_row(row, "row 1")
    _, segments, _ = sample_pieces(sample, "v1")
    trained = "".join(segment.text for segment in segments)
    if text != "<image>\n<image>":      # nothing but pictures: a file's end in a newline
        assert trained.startswith(said)


def test_generate_takes_marks_on_the_command_line(folder, inside, model):       # noqa: F811
    red, blue = folder / "photos/0.png", folder / "photos/2.png"
    code, said, _ = inside(args_for(folder, red, blue, BETWEEN))
    both = torch.cat([load_picture(model, path)[0] for path in (red, blue)])
    ids = g.build_prompt([BETWEEN], model.template, model.tokenizer, (0, 0))
    assert code == 0
    assert said == "".join(g.stream(model, ids, both, max_new_tokens=8)) + "\n"
    code, _, err = inside(args_for(folder, red, blue, "What is <image>?"))
    assert code == 2 and err.count("\n") == 1 and "2 pictures and 1 <image>" in err


# ------------------------------------------------------------------------------------- trained

@pytest.fixture
def pairs(tmp_path):
    """Rows of two pictures in both orders, and a row of one and of none."""
    for name, colour in (("red", (250, 20, 20)), ("blue", (20, 20, 250))):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    rows = []
    for a, b in (("red", "blue"), ("blue", "red"), ("red", "red"), ("blue", "blue")):
        rows.append({"id": f"{a} {b}", "image": [f"{a}.png", f"{b}.png"],
                     "conversations": talk(ASK, f"{a} {b}.")})
    rows.append({"id": "one", "image": "red.png", "conversations": talk("<image>\nWhat?", "red.")})
    rows.append({"id": "none", "conversations": talk("What?", "blue.")})
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    return tmp_path


ASK = "What colour is <image> and what is <image>?"


def test_a_batch_holds_the_pictures_in_the_order_of_their_marks(flags, pairs):  # noqa: F811
    args = train.parse_args(flags(None, "--data", pairs / "pairs.json", "--images", pairs,
                                  "--batch", 6))
    samples, model = Samples(args), start_model(args, pairs)
    (micro,) = MicroBatches(samples, model, args)(0)
    wanted = []
    for index in range(6):
        for name in images_of(samples.sample(index)):
            wanted.append(model.pixels(data.load_image(pairs / name)))
    assert len(wanted) == 9 and torch.equal(micro.pixels, torch.cat(wanted))
    assert [count[2] for count in micro.counts] == [
        len(images_of(samples.sample(index))) for index in range(6)]


def test_trained_and_asked(flags, pairs):                                       # noqa: F811
    """A model learns the rows by heart. Which picture stands where decides what it answers."""
    out = pairs / "run"
    train.main(train.parse_args(flags(
        out, "--data", pairs / "pairs.json", "--images", pairs, "--batch", 6, "--lr", 5e-3,
        "--train", "vision,projector,llm", steps=160)))
    learned = projector.VLM.from_pretrained(out / "model")
    right = {"red": "blue", "blue": "red"}
    for a in right:
        for b in right:
            ids = g.build_prompt([ASK], "v1", learned.tokenizer, (0, 0))
            both = [learned.pixels(data.load_image(pairs / f"{name}.png")) for name in (a, b)]
            said = "".join(g.stream(learned, ids, torch.cat(both), max_new_tokens=8))
            assert said.split() == f"{a} {b} .".split() or said == f"{a} {b}.", (a, b, said)
