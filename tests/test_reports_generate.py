"""What users reported of generate.py: stop texts in any script, several pictures, cut answers, and
flags that did nothing."""
import json
import os
import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import generate as g
import instruct
import llama
import projector
from test_generate import TONGUE, args_for, asked, folder, inside, model, pixels, words
from tiny import shaken
from decoding.attention_map import attention_to_patches, tokens_by_word
from decoding.chat import add_picture
from decoding.flags import parse
from decoding.pictures import image_turns, load_picture, load_pictures
from formats.errors import UsageError
from formats.pictures import picture_path
from instruct.answerers import from_llama, from_vlm

# ------------------------------------------------------------------------------- the tokenizers


def unicode_bytes():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {b: chr(b) if b in plain else chr(next(others)) for b in range(256)}


@pytest.fixture(scope="module")
def byte_words(tmp_path_factory):
    """Byte-level BPE, as Llama-3 and Qwen have it: tokens may end, or begin, inside a character."""
    letters = unicode_bytes()
    merged = [" \xf0", "!\xf0", "\xe6\xbc", "\xa2\xe5", "\x80!", "lo", "lo ", "s.", "ca", "cat",
              "\x98\x80"]
    tokens = list(letters.values())
    merges = []
    for text in merged:
        text = "".join(letters[ord(c)] for c in text)
        left = next(text[:n] for n in range(len(text) - 1, 0, -1) if text[:n] in tokens
                    and text[n:] in tokens)
        merges.append([left, text[len(left):]])
        tokens.append(text)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [*enumerate(("<|im_end|>", "<|eot_id|>"), len(tokens))]
    kind = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": False}
    spec = {"version": "1.0", "normalizer": None, "pre_tokenizer": kind, "decoder": kind,
            "added_tokens": [{"id": i, "content": t, "special": True, **flags}
                             for i, t in special],
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": merges}}
    root = tmp_path_factory.mktemp("bytes")
    (root / "tokenizer.json").write_text(json.dumps(spec))
    (root / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return data.Tokenizer(root)


@pytest.fixture(params=["sentencepiece", "byte-level"])
def either(request, words, byte_words):
    return words if request.param == "sentencepiece" else byte_words


class Script:
    """Stands in for a model: what each row says is written down, and then its end token."""

    def __init__(self, words, rows, monkeypatch, template="v1", room=None):
        self.tokenizer, self.template, self.rows, self.steps = words, template, rows, 0
        rooms = lambda count: [min(count, room or 999)] * len(rows)
        inputs = self, torch.zeros(len(rows), 1, 4), torch.ones(len(rows), 1).bool()
        monkeypatch.setattr(g, "prefill_inputs", lambda model, prompts, pictures, count, *_: (
            *inputs, rooms(count)))
        monkeypatch.setattr(g, "KVCache", lambda *_: SimpleNamespace(reorder=lambda parents: None))
        self.config = SimpleNamespace(vocab=len(words), context=999)
        self.embed = SimpleNamespace(weight=torch.zeros(1))

    def next_logits(self, x, *_):
        row = [(row + [self.tokenizer.eos] * 400)[self.steps] for row in self.rows]
        self.steps += 1
        row = row * (len(x) // len(row))                    # beams: all hear the same
        return F.one_hot(torch.tensor(row), len(self.tokenizer)).float() * 9

    def say(self, **settings):
        """(pieces of the stream, `Generation`) of the one row."""
        self.steps = 0
        answer = g.generate(self, [1], max_new_tokens=settings.pop("max_new_tokens", 400),
                            **settings)
        return list(filter(None, g.stream_text(answer, self.tokenizer))), answer


# --------------------------------------------------------------------------- A5: the stop texts

CASES = [("Hi 😀 there", ["😀"]), ("a cat 漢字 b", ["漢字"]), ("a cat 漢字 b", ["字"]),
         ("wow!😀 x", ["😀"]), ("wow!😀 x", ["!😀"]), ("hello there", ["o "]), ("the cats.", ["at"]),
         ("the cats.", ["s."]), ("a 漢😀é", ["é"]), ("x 😀😀 y", ["😀😀"]), ("x 😀é y", ["😀 ", "é"]),
         ("one two three", ["three", "wo"]), ("abcde", ["cd", "bc"]), ("xabcdey", ["bc", "abcd"]),
         ("xabcy", ["bc", "abcd"]), ("cat here", ["at"]), ("😀", ["😀"]), ("  two", ["two"]),
         ("ab 끝 cd", ["끝"]), ("flag 🇰🇷!", ["🇰🇷"]), ("family 👨‍👩‍👧 x", ["👨‍👩‍👧"])]


def before(text, stops):
    return text[:min(text.index(stop) for stop in stops if stop in text)]


@pytest.mark.parametrize("text, stops", CASES)
def test_stop_texts_in_any_script(either, monkeypatch, text, stops):
    ids = either.encode(text, bos=False)
    script = Script(either, [ids], monkeypatch)
    said = either.decode(ids)
    assert said == text and "".join(script.say()[0]) == text        # control: without stop texts
    pieces, answer = script.say(stop=stops)
    assert "".join(pieces) == before(text, stops) and answer.finish_reason == "stop"
    assert "\ufffd" not in "".join(pieces) and all(pieces)
    assert ids[:len(answer.tokens)] == answer.tokens
    assert script.steps <= len(either.encode(text, bos=False))
    script.steps = 0
    (row,) = g.generate_batch(script, [[1]], max_new_tokens=99, stop=stops)
    assert row == answer.tokens and row.rest == answer.rest and row.finish_reason == "stop"
    assert "".join(g.stream_text(row, either)) == before(text, stops)
    if len(stops) == 1:
        pieces, beams = script.say(stop=stops[0], num_beams=2)
        assert "".join(pieces) == before(text, stops) and beams.finish_reason == "stop"


def test_drawn_texts_and_stops(either, monkeypatch):
    """Every cut of a text into tokens gives the text before the first stop text, to the letter."""
    rng, found = random.Random(0), 0
    for _ in range(150):
        text = "x" + "".join(rng.choice("ab!cat lo😀漢字é.끝") for _ in range(14))
        stops = [text[i:i + rng.randint(1, 4)] for i in (rng.randint(1, 13), rng.randint(1, 13))]
        stops.append("".join(rng.choice("ab😀漢") for _ in range(3)))
        ids = either.encode(text, bos=False)
        pieces, answer = Script(either, [ids], monkeypatch).say(stop=stops)
        # SentencePiece's first space, which nobody sees, is text: it goes on behind a word
        hidden = " " * bool(either.prefix)
        left = before(hidden + text, stops).removeprefix(hidden)
        assert "".join(pieces) == left, (text, stops)
        assert answer.finish_reason == "stop"
        found += bool(answer.rest)
    assert found > 4 or either.added("<image>")            # characters are tokens there


def test_no_piece_is_taken_back(either, monkeypatch):
    """What has been handed out stays, and no more is held than may become a stop text."""
    text = "see lo😀 lo漢 lo漢字 cat"
    script = Script(either, [either.encode(text, bos=False)], monkeypatch)
    shown = ""
    for piece in g.stream(script, [1], max_new_tokens=99, stop="漢字"):
        shown += piece
        assert text.startswith(shown)
    assert shown == "see lo😀 lo漢 lo"
    script.steps, seen = 0, []
    for piece in g.stream(script, [1], max_new_tokens=99, stop="cat"):
        seen.append((piece, script.steps))
    assert seen[0][1] <= 3                                   # not only at the end


def test_a_stream_of_broken_bytes(words, byte_words, monkeypatch):
    """Bytes that are no character are U+FFFD, and the whole one behind them is itself."""
    smile = [3 + b for b in "😀".encode()]
    a = words.encode("a", bos=False)[-1:]
    assert "".join(g.stream_text([*a, 3 + 0x80, *smile, *smile, *a], words)) == "a\ufffd😀😀a"
    for cut in (1, 2, 3):                                   # at the end half a character is nothing
        script = Script(words, [[*a, *smile, *smile[:cut]]], monkeypatch)
        for stop in ([], ["😀😀"], ["zz"]):
            pieces, answer = script.say(stop=stop)
            assert "".join(pieces) == "a😀" and answer.finish_reason == "end"
            assert answer.tokens == [*a, *smile, *smile[:cut]]            # the ids are all there
    script = Script(words, [[*a, *smile, *smile[:2]]], monkeypatch)
    assert "".join(script.say(stop="😀")[0]) == "a"
    letters = {c: b for b, c in unicode_bytes().items()}
    token = next(i for i in range(len(byte_words)) if bytes(map(
        letters.get, filter(letters.get, byte_words._lib.id_to_token(i)))) == b"!\xf0")
    script = Script(byte_words, [[*byte_words.encode("wow", bos=False), token]], monkeypatch)
    pieces, answer = script.say(stop="!", max_new_tokens=4)     # the "!" is whole, what follows not
    assert "".join(pieces) == "wow" and answer.finish_reason == "stop"


def test_a_stop_text_does_not_match_the_prompt(either, monkeypatch):
    script = Script(either, [either.encode("OP 漢 STOP", bos=False)], monkeypatch)
    prompt = either.encode("Please ST")
    answer = g.generate(script, prompt, max_new_tokens=99, stop=["STOP", "a"])
    assert "".join(g.stream_text(answer, either)) == "OP 漢 "


def test_words_of_the_attention_picture(words, byte_words):
    """Whole characters, each with its tokens."""
    for tokenizer in (words, byte_words):
        ids = tokenizer.encode("a cat 😀漢 b", bos=False)
        found = tokens_by_word(ids, tokenizer)
        assert [word for word, _ in found] == ["a", "cat", "😀漢", "b"]
        for word, numbers in found:
            assert tokenizer.decode([ids[i] for i in numbers]).strip() == word


def test_rows_of_a_batch_stop_by_themselves(either, monkeypatch):
    texts = ["a 😀 b", "no end", "漢字 x", "cats."]
    script = Script(either, [either.encode(t, bos=False) for t in texts], monkeypatch)
    rows = g.generate_batch(script, [[1]] * 4, max_new_tokens=99, stop=["😀", "字", "s"])
    assert ["".join(g.stream_text(row, either)) for row in rows] == ["a ", "no end", "漢", "cat"]
    assert [row.finish_reason for row in rows] == ["stop", "end", "stop", "stop"]


def test_a_stop_text_that_is_a_token(byte_words, monkeypatch):
    """A control token has no text; control: another one."""
    row = [*byte_words.encode("hi", bos=False), byte_words.added("<|eot_id|>"),
           *byte_words.encode("you", bos=False)]
    script = Script(byte_words, [row], monkeypatch)
    pieces, answer = script.say(stop="<|eot_id|>")
    assert "".join(pieces) == "hi" and answer.finish_reason == "stop"
    assert "".join(script.say(stop="<|nothing|>")[0]) == "hiyou"
    pieces, answer = script.say(stop="<|eot_id|>", num_beams=2)
    assert "".join(pieces) == "hi" and answer.finish_reason == "stop"


def test_hashes_of_a_template_are_an_end(words, monkeypatch):
    script = Script(words, [words.encode("a 😀 ### b", bos=False)], monkeypatch, "llava_v0")
    pieces, answer = script.say(eos=None)
    assert "".join(pieces) == "a 😀 " and answer.finish_reason == "end"
    pieces, answer = script.say(stop="😀")
    assert "".join(pieces) == "a " and answer.finish_reason == "stop"


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], ["half \ud83d"]])
def test_stop_texts_that_can_never_come(model, stop):
    with pytest.raises(UsageError, match="stop"):
        next(g.generate(model, [1], stop=stop))


# --------------------------------------------------------------------------- A6: several pictures

def test_ask_with_several_pictures_in_a_turn(words):
    """A mark each at the front of the turn, as the chat template that we write has it."""
    text = data.prompt([{"from": "human", "value": "<image>\n<image>\nSame?"}], "v1")
    assert g.build_prompt(["Same?"], "v1", words, (0, 0)) == data.prompt_ids(text, words)
    ids = g.build_prompt(["<image> a <image>", "b", "c"], "v1", words, (0, 2, 2, 0, 2))
    assert ids.count(data.IMAGE) == 5 and words.decode(ids).count("<image>") == 0
    with pytest.raises(UsageError, match="2 pictures and 1 <image>"):
        g.build_prompt(["<image> a"], "v1", words, (0, 0))
    for template in ("llava_llama_2", "mpt", "llava_v0", "mistral_instruct"):
        assert g.build_prompt(["?"], template, words, (0, 0, 0)).count(data.IMAGE) == 3
    assert g.build_prompt(["<image>"], "v1", words, ()).count(data.IMAGE) == 0
    one = g.build_prompt(["?"], "v1", words)
    assert g.build_prompt(["?"], "v1", words, {0: None}) == one             # as before


@pytest.mark.parametrize("template", ["plain", "blip2", "minigpt4_caption", "instructblip",
                                      "minigpt4"])
def test_models_of_one_picture(words, template):
    with pytest.raises(UsageError, match="one picture") as info:
        g.build_prompt(["Same?"], template, words, (0, 0))
    assert "\n" not in str(info.value)
    assert g.build_prompt(["Same?"], template, words).count(data.IMAGE) == 1
    if template == "minigpt4":              # its demo shows one picture after the other
        assert g.build_prompt(["a", "b", "c"], template, words, (0, 2)).count(data.IMAGE) == 2
    else:
        with pytest.raises(UsageError, match="one picture"):
            g.build_prompt(["a", "b", "c"], template, words, (0, 2))


def seen_by(model, paths, *turns, shown=None, new=8):
    """What the model says, by way of ids and pixels."""
    images = [load_picture(model, path) for path in paths]
    sizes = [size for _, some in images for size in some or ()]
    ids = g.build_prompt(list(turns), model.template, model.tokenizer, shown or [0] * len(paths))
    return "".join(g.stream(model, ids, torch.cat([x for x, _ in images]), max_new_tokens=new,
                            sizes=sizes or None)).strip()


def test_pictures_on_the_command_line(folder, inside, model):
    red, green, blue = (folder / f"photos/{i}.png" for i in range(3))
    said = {}
    for paths in ([red], [red, blue], [blue, red], [red, green, blue]):
        code, out, _ = inside(args_for(folder, *paths, "Same?"))
        said[tuple(paths)] = out
        assert code == 0 and out.strip() == seen_by(model, paths, "Same?")
    assert len(set(said.values())) > 1                      # control: the pictures matter
    code, out, _ = inside(args_for(folder, red, blue), "Same?", "Sure?")
    first, second = out.splitlines()
    assert first.strip() == seen_by(model, [red, blue], "Same?")
    assert second.strip() == seen_by(model, [red, blue], "Same?", first.strip(), "Sure?")


@pytest.mark.parametrize("line, images, prompt", [
    (["{red}"], 1, None), (["{red}", "Why?"], 1, "Why?"), (["{red}", "{blue}"], 2, None),
    (["{red}", "{blue}", "{red}"], 3, None), (["{red}", "{blue}", "Why?"], 2, "Why?"),
    (["{red}", "none.jpg"], 2, None), (["{red}", "none.JPEG", "Why?"], 2, "Why?"),
    (["{red}", "{photos}/my none.png"], 2, None), (["none.png"], 1, None),
    (["{red}", "Is this a.jpg or b.jpg"], 1, "Is this a.jpg or b.jpg"),
    (["{red}", "Why"], 1, "Why"), (["{red}", "e.g."], 1, "e.g."),
    (["{photos}", "Why?", "--out", "x.json"], 1, "Why?"), (["{red}", "--", "-x"], 1, "-x")])
def test_which_argument_is_the_question(folder, line, images, prompt):
    names = {"red": folder / "photos/0.png", "blue": folder / "photos/2.png",
             "photos": folder / "photos"}
    args = parse([word.format(**names) for word in line])
    assert (len(args.images), args.prompt) == (images, prompt)
    assert args.image == args.images[0]


@pytest.mark.parametrize("line", [["{red}", "none.jpg"], ["{red}", "none.jpg", "Why?"],
                                  ["none.jpg", "{red}"], ["{red}", "{photos}/none.webp"]])
def test_a_missing_picture_is_named(folder, inside, line):
    line = [x.format(red=folder / "photos/0.png", photos=folder / "photos") for x in line]
    code, out, err = inside(args_for(folder, *line), "never asked")
    assert code == 3 and out == "" and len(err.splitlines()) == 1 and "none." in err


def test_chat_with_several_pictures(folder, inside, model, tmp_path):
    red, green, blue = (folder / f"photos/{i}.png" for i in range(3))
    code, out, err = inside(args_for(folder, red), f"/image {green}", f"/image {blue}", "One?",
                            f"/image {blue}", f"/image {red}", "Two?",
                            f"/save {tmp_path}/x.json", "/reset", "Three?")
    one, two, three = (line.strip() for line in out.splitlines())
    assert code == 0 and "error" not in err
    assert one == seen_by(model, [red, green, blue], "One?")
    talk = ["One?", one, "Two?"]
    assert two == seen_by(model, [red, green, blue, blue, red], *talk, shown=(0, 0, 0, 2, 2))
    assert three == seen_by(model, [blue, red], "Three?")           # those of the newest turn
    assert one != seen_by(model, [blue], "One?")                    # control: as it was
    # the file: a list with a name for each mark, and what was said
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["image"] == ["0.png", "1.png", "2.png", "2.png", "0.png"]
    values = [turn["value"] for turn in row["conversations"]]
    assert values == ["<image>\n<image>\n<image>\nOne?", one, "<image>\n<image>\nTwo?", two]
    turns = [re.sub("^(<image>\n)*", "", value) for value in values]
    assert g.build_prompt(turns[:3], "v1", model.tokenizer, (0, 0, 0, 2, 2)) == data.prompt_tokens(
        row["conversations"][:3], "v1", model.tokenizer)
    code, _, err = inside(args_for(folder, red), f"/image {blue}", "/image none.png", "/reset",
                          "Now?", f"/save {tmp_path}/y.json")
    assert json.loads((tmp_path / "y.json").read_text())[0]["image"] == ["0.png", "2.png"]
    assert err.count("error") == 1


def test_one_picture_is_saved_as_before(folder, inside, tmp_path):
    inside(args_for(folder, folder / "photos/1.png"), "What <image>?", f"/save {tmp_path}/x.json",
           "more", f"/image {folder}/photos/2.png", f"/save {tmp_path}/y.json")
    for name in "xy":                       # a picture that nobody was asked about is not saved
        (row,) = data.read_conversations(tmp_path / f"{name}.json")
        assert row["image"] == row["id"] == "1.png"
        assert row["conversations"][0]["value"] == "<image>\nWhat < image>?"


def test_saved_names_tell_folders_apart(folder, inside, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / name / "1.png")
    args = args_for(folder, tmp_path / "a/1.png", tmp_path / "b/1.png")
    code, _, err = inside(args, "Same?", f"/save {tmp_path}/x.json")
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["image"] == ["a/1.png", "b/1.png"] and f"its pictures are in {tmp_path}" in err
    assert all(picture_path(tmp_path, name).is_file() for name in row["image"])
    bad = os.fsdecode(b"\xff.png")
    (tmp_path / bad).write_bytes((tmp_path / "a/1.png").read_bytes())
    code, _, err = inside(args_for(folder, tmp_path / bad), "Hi", f"/save {tmp_path}/z.json")
    assert code == 0 and err.count("error") == 1 and "UTF-8" in err
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "z.json").exists()


def test_a_model_of_one_picture_says_so(folder, inside, tmp_path, model):
    red, blue = folder / "photos/0.png", folder / "photos/2.png"
    model.template = "plain"
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        model.template = "v1"
    code, out, err = inside(args_for(tmp_path, red, blue, "Same?"))
    assert code == 2 and out == "" and "one picture" in err.splitlines()[-1]
    code, out, err = inside(args_for(tmp_path, red), "a", f"/image {blue}", "b", "/quit")
    assert code == 0 and "begins anew" in err and len(out.splitlines()) == 2
    _, alone, _ = inside(args_for(tmp_path, blue), "b")
    assert out.splitlines()[1] == alone.splitlines()[0]


def test_pictures_that_fill_the_context(folder, inside, tmp_path, model):
    red = folder / "photos/0.png"
    many = [red] * 80                                       # 9 places each, 700 in all
    code, out, err = inside(args_for(folder, *many))
    assert code == 3 and out == "" and "700" in err and len(err.splitlines()) == 1
    code, out, err = inside(args_for(folder, red), *[f"/image {red}"] * 80, "Still here?")
    assert code == 0 and "error" in err and len(out.splitlines()) == 1


def test_tiles_of_several_pictures(words, tmp_path, monkeypatch, inside):
    """LLaVA-NeXT: each picture is cut by its own size."""
    vision = clip.ViT(clip.Config(width=32, depth=2, heads=4, mlp=48, image_size=24, patch_size=8))
    llm = llama.Llama(llama.Config(vocab=len(words), context=700, **TONGUE))
    tiles = shaken(projector.LlavaNext(vision, "mlp", llm, words), seed=3)
    paths = [tmp_path / "wide.png", tmp_path / "tall.png", tmp_path / "small.png"]
    for path, size in zip(paths, ((60, 20), (25, 70), (24, 24))):
        Image.effect_noise(size, 90).convert("RGB").save(path)
    args = SimpleNamespace(settings={"max_new_tokens": 8}, seed=0, max_new_tokens=8, num_beams=1,
                           attention=None, verbose=False)
    picture = load_pictures(tiles, paths)
    assert picture[1] == [(60, 20), (25, 70), (24, 24)] and image_turns({0: picture}) == [0, 0, 0]
    said = g.print_answer(tiles, ["Same?"], {0: picture}, args)
    assert said == seen_by(tiles, paths, "Same?")
    grown = add_picture(tiles, {0: load_pictures(tiles, paths[:2])}, 0, paths[2])
    assert torch.equal(grown[0][0], picture[0]) and grown[0][1:] == picture[1:]


def test_attention_is_of_one_picture(folder, model, pixels, capsys):
    red, blue = folder / "photos/0.png", folder / "photos/2.png"
    with pytest.raises(SystemExit):
        args_for(folder, red, blue, "Same?", "--attention", "x.png")
    assert "one picture" in capsys.readouterr().err
    ids = g.build_prompt(["Same?"], "v1", model.tokenizer, (0, 0))
    with pytest.raises(UsageError, match="one picture"):
        attention_to_patches(model, ids, [80, 81], torch.cat((pixels[0], pixels[1])))


# ------------------------------------------------------------------------- A9: why an answer ended

@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_why_an_answer_ended(either, monkeypatch, settings):
    ids = either.encode("a cat 😀", bos=False)
    script = Script(either, [ids], monkeypatch)
    reason = lambda **more: script.say(**{**settings, **more})[1].finish_reason
    assert reason() == "end" and reason(stop="cat") == "stop"
    assert reason(max_new_tokens=3) == "length"
    assert reason(max_new_tokens=len(ids)) == "length"      # nobody knows that it was over
    assert reason(max_new_tokens=len(ids) + 1) == "end"
    assert reason(stop="😀", max_new_tokens=len(ids)) == "stop"
    script = Script(either, [ids], monkeypatch, room=4)
    assert reason() == "context" and reason(max_new_tokens=5) == "context"
    assert reason(max_new_tokens=4) == reason(max_new_tokens=3) == "length"


def test_reasons_of_real_models(model, words, pixels):
    ids = words.encode("x" * 690)
    room = 700 - len(ids)
    answer = g.generate(model, ids)
    assert answer.finish_reason is None                     # not before it is over
    assert len(list(answer)) == room and answer.finish_reason == "context"
    rows = g.generate_batch(model, [ids, words.encode("short")], max_new_tokens=14)
    assert [row.finish_reason for row in rows] == ["context", "length"]
    assert rows == [list(row) for row in rows]              # they are lists
    answer = g.generate(model.llm, words.encode("a"), max_new_tokens=5)     # text only
    assert len(list(answer)) == 5 and answer.finish_reason == "length"
    end = answer.tokens[3]
    answer = g.generate(model.llm, words.encode("a"), max_new_tokens=5, eos=end)
    assert end not in list(answer) and answer.finish_reason == "end"


def test_a_cut_answer_is_told(folder, inside, tmp_path, model):
    red = folder / "photos/0.png"
    _, _, err = inside(args_for(folder, red, "What?"))
    assert re.fullmatch("note: .*--max-new-tokens 8: give more\n", err)
    long = args_for(folder, red, "x" * 300)
    long.settings["max_new_tokens"] = long.max_new_tokens = 690
    code, _, err = inside(long)
    assert code == 0 and "context of 700" in err and len(err.splitlines()) == 1
    stop = seen_by(model, [red], "What?")[4]
    code, out, err = inside(args_for(folder, red, "What?", "--stop", stop))
    assert code == 0 and err == "" and stop not in out      # control: it ended by itself
    _, _, err = inside(args_for(folder, red), "What?", "And?")
    assert err.count("--max-new-tokens 8") == 2             # in a chat, each


def test_cut_captions_are_counted(folder, inside, tmp_path, model):
    out = tmp_path / "x.json"
    photos = folder / "photos"
    code, _, err = inside(args_for(folder, photos, "What?", "--out", out))
    assert code == 0 and "3 of 3 answers: cut at --max-new-tokens 8" in err
    said = [seen_by(model, [photos / f"{i}.png"], "What?") for i in range(3)]
    stop = next(c for c in said[0] if c.isalnum() and c not in said[2])
    code, _, err = inside(args_for(folder, photos, "What?", "--out", out, "--stop", stop))
    cut = sum(stop not in text for text in said)
    assert cut and f"{cut} of 3 answers: cut at" in err


def test_instruct_goes_by_the_reason():
    """No arithmetic of its own."""
    import inspect
    assert "context" not in inspect.getsource(from_llama) + inspect.getsource(from_vlm)


# ----------------------------------------------------------------- A10: flags that did nothing

USELESS = [["--top-p", ".5"], ["--top-k", "5"], ["--top-p", ".5", "--num-beams", "2"],
           ["--temperature", "0", "--top-k", "1"], ["--layer", "1"], ["--batch-size", "4"],
           ["--out", "x.json"]]


@pytest.mark.parametrize("flags", USELESS)
def test_flags_that_would_be_passed_over(folder, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        args_for(folder, folder / "photos/0.png", "hi", *flags)
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and flags[-2].strip("-").split(" ")[0] in err


def test_flags_that_matter_are_taken(folder, capsys):
    red, photos = folder / "photos/0.png", folder / "photos"
    for line in (["--temperature", ".5", "--top-p", ".5", "--top-k", "5"], ["--seed", "3"],
                 ["--attention", "x.png", "--layer", "1"], ["--top-p", "1", "--top-k", "0"]):
        args_for(folder, red, "hi", *line)
    assert args_for(folder, photos, "hi", "--out", "x.json").batch_size == 8
    assert args_for(folder, photos, "hi", "--out", "x.json", "--batch-size", 3).batch_size == 3
    with pytest.raises(SystemExit):
        args_for(folder, red, "hi", "--top-k", "5")
    assert "--temperature" in capsys.readouterr().err
    for line in ([photos, red, "hi"], [red, photos, "hi"], [red, photos]):
        with pytest.raises(SystemExit):
            args_for(folder, *line)
        assert "folder" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"top_p": .5}, {"top_k": 3}, {"top_k": 3, "num_beams": 2}])
def test_python_callers_hear_it_too(model, settings):
    with pytest.raises(UsageError, match="top-p and top-k"):
        next(g.generate(model, [1], **settings))
    with pytest.raises(UsageError, match="top-p and top-k"):
        g.generate_batch(model, [[1]], **settings)


def test_verbose_says_something(folder, inside, tmp_path):
    red, photos = folder / "photos/0.png", folder / "photos"
    _, _, err = inside(args_for(folder, red, "hi", "--verbose", "--num-beams", "2"))
    assert "2 beams" in err and "8 tokens" in err
    _, _, err = inside(args_for(folder, photos, "hi", "--verbose", "--out", tmp_path / "x.json"))
    assert "4 pictures in" in err and "tokens/s" in err


def test_attention_of_an_empty_answer(folder, inside, tmp_path, model):
    red = folder / "photos/0.png"
    first = "".join(g.stream(model, asked(model, "What?"), load_picture(model, red)[0],
                             max_new_tokens=1))
    code, _, err = inside(args_for(folder, red, "What?", "--stop", first, "--attention",
                                   tmp_path / "x.png", "--verbose"))
    assert code == 0 and "x.png is not drawn" in err and "prompt:" in err
    assert not (tmp_path / "x.png").exists()
