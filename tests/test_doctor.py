"""The dataset doctor: every shape of file is read, every fault named, nothing else opened."""
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import data
import train
from tiny import write_words
from formats.errors import exit_status
from formats.strict_json import read_json
from trainer import doctor as trainer_doctor
from trainer.doctor import TokenCounter, check_picture, parse
from trainer.loader import Samples

SHARED = Path(__file__).parents[2] / "shared/tokenizers"
OPENED = None           # a list while somebody watches


def _watch(event, args):
    if event == "open" and OPENED is not None:
        OPENED.append(args[0])


sys.addaudithook(_watch)


def talk(*values):
    return [{"from": "gpt" if i % 2 else "human", "value": v} for i, v in enumerate(values)]


def good():
    """Five rows: three with a picture, two of text alone."""
    return [{"id": str(i), "image": f"{i}.png", "conversations": talk("<image>\nQ?", f"A {i}")}
            for i in range(3)] + [{"conversations": talk("Q?", "A", "Q?", "A")} for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, a tokeniser, and whatever a picture's name must not lead to."""
    folder = tmp_path_factory.mktemp("doctor")
    images = folder / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 90, 30)).save(images / f"{i}.png")
    Image.new("RGB", (40, 30)).save(images / "0.jpg")
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(images / "torn.jpg")
    (images / "torn.jpg").write_bytes((images / "torn.jpg").read_bytes()[:2000])
    (images / "words.jpg").write_text("no picture")
    Image.new("1", (13_000, 13_000)).save(images / "bomb.png")
    assert (images / "bomb.png").stat().st_size < 30_000
    Image.new("1", (20_000, 2)).save(images / "thin.png")
    noise.save(folder / "secret.png")
    (images / "out.png").symlink_to(folder / "secret.png")
    (images / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(images / "pipe.png")
    write_words(folder)
    Image.init()                            # else Pillow opens files of its own to look for formats
    return folder


def doctor(folder, rows, capsys, *flags, lines=False, images="images"):
    """(exit status, fault lines, what follows them, CPU seconds, files opened)."""
    global OPENED
    if not isinstance(rows, bytes):
        rows = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        rows = rows.encode()
    if rows is not None:
        (folder / "x.json").write_bytes(rows)
    args = parse(["check", str(folder / "x.json"), "--images", str(folder / images),
                           *map(str, flags)])
    capsys.readouterr()
    OPENED, start = [], time.process_time()
    with warnings.catch_warnings():
        try:
            code = exit_status(lambda: trainer_doctor.run(args))
        finally:
            opened, OPENED = OPENED, None
    spent, (out, err) = time.process_time() - start, capsys.readouterr()
    faults, _, rest = out.partition("\n\n") if out.startswith(str(folder)) else ("", "", out)
    return code, faults.split("\n") if faults else [], rest + err, spent, opened


def outside(folder, opened):
    fine = {folder / "x.json", folder / "tokenizer.json", folder / "tokenizer_config.json",
            *(folder / "images" / f"{i}.png" for i in range(3)),
            *(folder / "images" / name for name in ("torn.jpg", "words.jpg", "bomb.png",
                                                    "thin.png"))}
    return {str(path) for path in opened} - {str(path) for path in fine}


# ------------------------------------------------------------------------------- what is read

LLAVA = {"id": "1", "image": "0.png", "conversations": talk("<image>\nQ?", "a cat")}
SHAPES = {
    "595K, 558K, 150K": [LLAVA],
    "mix665k": [{"id": "x", "model": "", "conversations": talk("Hi", "a cat")}],
    "ShareGPT4V": [{"id": 7, "image": "0.png", "conversations": talk("Q?\n<image>", "a cat")}],
    "user and assistant": [{"id": "1", "conversations": [
        {"from": "user", "value": "Hi"}, {"from": "assistant", "value": "a cat"}]}],
    "role and content": [{"image": "0.png", "conversations": [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"}]}],
    "messages": [{"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a cat"}]}],
    "cc_sbu_align": {"annotations": [{"image_id": "0", "caption": "a cat"}]},
    "cc_sbu_align, numbers": {"annotations": [{"image_id": 0, "caption": "a cat"}]},
    "LAVIS": [{"image": "0.png", "image_id": "coco_0", "caption": "a cat"}],
    "LAVIS, a list": [{"image": "0.png", "caption": ["a cat", "a dog"]}]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("written", ["json", "pretty", "jsonl", "BOM and CRLF"])
def test_every_shape_is_read_and_trained_from(folder, capsys, shape, written):
    rows = SHAPES[shape]
    if written == "jsonl":
        text = "\n".join(map(json.dumps, rows)) if isinstance(rows, list) else json.dumps(rows)
    else:
        text = json.dumps(rows, indent=None if written == "json" else 1)
    if written == "BOM and CRLF":
        text = "\ufeff" + text.replace("\n", "\r\n") + "\r\n"
    code, faults, said, *_ = doctor(folder, text.encode(), capsys)
    assert (code, faults) == (0, []), said
    samples = data.read_conversations(folder / "x.json")
    assert [s["conversations"][-1] for s in samples] == [
        {"from": "gpt", "value": f"a {what}"} for what in ("cat", "dog")[:len(samples)]]
    assert all(s["conversations"][0]["from"] == "human" and s["id"] != "" for s in samples)
    assert len({s["id"] for s in samples}) == len(samples) == 1 + (shape == "LAVIS, a list")
    pictured = [s for s in samples if "image" in s]
    assert all(s["image"] == ("0.jpg" if "cc_sbu" in shape else "0.png") for s in pictured)
    assert len(pictured) == len(samples) * ("0.png" in text or "image_id" in text)
    args = train.parse_args(["--stage", "2", "--data", str(folder / "x.json"),
                            "--images", str(folder / "images")])
    picture, said = Samples(args)[0]
    assert (picture is not None) == bool(pictured) == ("<image>" in said[0]["value"])
    words = data.Tokenizer(folder)
    for template in ["v1"] + ["plain", "minigpt4", "blip2"] * bool(pictured):
        ids, labels = data.encode(said, template, words, bool(pictured))
        assert ids.count(data.IMAGE) == len(pictured[:1]) and any(x >= 0 for x in labels)


# ------------------------------------------------------------------------------- what is refused

def put(**fields):
    return lambda row: row.update(fields)


def says(*values):
    return put(conversations=talk(*values))


def raw(text, field="value"):
    """`text` itself, unquoted, in the third row."""
    where = lambda row: row["conversations"][1] if field == "value" else row
    return lambda row: where(row).update({field: b"RAW" + text})


DEEP = b"[" * 100_000 + b"]" * 100_000
BROKEN = {
    "not an object": (lambda row: row.clear(), "conversations: must be a list"),
    "no list": (put(conversations="Q?"), "conversations: must be a list"),
    "no turns": (put(conversations=[]), "conversations: must be a list"),
    "no turn": (put(conversations=[3]), "conversations[0]: must be an object"),
    "speaker": (lambda row: row["conversations"][1].update({"from": "dog"}),
                "conversations[1].from: must be human or gpt"),
    "number for text": (says("<image>", 3), "conversations[1].value: must be text"),
    "lone surrogate": (says("<image>", "a \ud800"), "conversations[1].value: half a surrogate"),
    "surrogate in a name": (put(image="\udfff.png"), "image: half a surrogate"),
    "id": (put(id=["2"]), "id: must be text or a number"),
    "image is no text": (put(image=3), "image: must be a file name"),
    "absolute": (put(image="/dev/zero"), "image '/dev/zero': must be a plain path inside"),
    "windows": (put(image="C:\\x.png"), "image 'C:\\\\x.png': must be a plain path inside"),
    "dots": (put(image="../secret.png"), "image '../secret.png': must be a plain path inside"),
    "link": (put(image="out.png"), "image 'out.png': leads outside of"),
    "device": (put(image="zero.png"), "image 'zero.png': leads outside of"),
    "pipe": (put(image="pipe.png"), "image 'pipe.png': is not a file of"),
    "missing": (put(image="gone.png"), "image 'gone.png': is not a file of"),
    "folder": (put(image="."), "image '.': is not a file of"),
    "corrupt JPEG": (put(image="torn.jpg"), "image 'torn.jpg': image file is truncated"),
    "no picture": (put(image="words.jpg"), "image 'words.jpg': cannot identify"),
    "bomb": (put(image="bomb.png"), "image 'bomb.png': 13000×13000 is over 50 megapixels"),
    "thin": (put(image="thin.png"), "image 'thin.png': a 20000×20000 intermediate is too large"),
    "no mark": (says("Q?", "A"), "conversations: one picture, but 0 <image>"),
    "two marks": (says("<image>", "A", "<image>", "A"), "conversations: one picture, but 2"),
    "a mark alone": (lambda row: row.pop("image"), "conversations: <image> in the text, but no"),
    "order": (lambda row: row["conversations"].insert(1, row["conversations"][0]),
              "conversations: turn 2 has the wrong speaker"),
    "nothing to learn": (says("<image>", " "), "conversations: nothing to learn"),
    "no answer": (says("<image>"), "conversations: nothing to learn"),
    "too long": (says("<image>", "word " * 9000), "tokens are over --pack 6,144"),
    "NaN": (raw(b"NaN"), "conversations[1].value: cannot be read as JSON (NaN"),
    "infinite": (raw(b"-Infinity", "score"), "score: cannot be read as JSON (-Infinity"),
    "1e999": (raw(b"1e999", "score"), "score: cannot be read as JSON (1e999"),
    "5,000 digits": (raw(b"9" * 5000), "conversations[1].value: cannot be read as JSON (a number"),
    "5,000 decimals": (raw(b"0." + b"9" * 5000, "score"), "score: cannot be read as JSON"),
    "100,000 deep": (raw(DEEP), "conversations[1].value: cannot be read as JSON (maximum rec"),
    "no UTF-8": (raw(b'"caf\xe9"'), "conversations[1].value: cannot be read as JSON (bytes"),
    "no UTF-8 aside": (raw(b'["\xed\xa0\x80"]', "more"), "more[0]: cannot be read as JSON (bytes")}


def written(rows, lines):
    """As bytes, and what `raw` put in unquoted."""
    found = []

    def keep(value):
        found.append(value[3:])
        return f"RAW{len(found) - 1}RAW"
    text = [json.dumps(row, default=keep).encode() for row in rows]
    text = b"\n".join(text) if lines else b"[" + b", ".join(text) + b"]"
    return re.sub(rb'"RAW(\d+)RAW"', lambda m: found[int(m[1])], text)


def test_a_clean_file_has_no_fault(folder, capsys):
    """The control of all below."""
    for lines in (False, True):
        code, faults, said, _, opened = doctor(folder, good(), capsys, "--llm", folder, lines=lines)
        assert (code, faults) == (0, []) and "5 rows, 5 samples, 3 pictures; 0 faults" in said
        assert {Path(p).name for p in opened} >= {"x.json", "0.png", "1.png", "2.png"}
        assert not outside(folder, opened)


@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
@pytest.mark.parametrize("kind", BROKEN)
def test_each_fault_is_named(folder, capsys, kind, lines):
    """Its row and field in one line, within a second; the rows behind it are read all the same."""
    rows, (change, words) = good(), BROKEN[kind]
    change(rows[2])
    code, faults, said, spent, opened = doctor(folder, written(rows, lines), capsys)
    place = "line 3, row 3: " if lines else "row 3: "
    assert code == 3 and len(faults) == 1 and faults[0].isprintable(), (faults, said)
    assert faults[0].startswith(f"{folder}/x.json: {place}") and words in faults[0], faults
    assert "5 rows" in said and "1 faults" in said and spent < 1
    assert re.search(r"^ +1  \S", said, re.M)
    assert not outside(folder, opened)
    picture = faults[0].partition(place)[2].startswith("image '")
    if not picture and kind != "a mark alone" and "conversations: " not in faults[0]:
        with pytest.raises(data.BadData, match="row 3") as info:        # and by training
            data.read_conversations(folder / "x.json")
        assert words in str(info.value)


def test_the_watch_sees_what_is_opened_outside(folder, capsys, monkeypatch):
    """Without the check of the names the audit hook finds the secret."""
    rows = good()
    rows[2]["image"] = "out.png"
    monkeypatch.setattr(trainer_doctor, "picture_path", lambda root, name: Path(root) / name)
    code, faults, _, _, opened = doctor(folder, rows, capsys)
    assert (code, faults) == (0, []) and outside(folder, opened) == {
        str(folder / "images/out.png")}


@pytest.mark.parametrize("text, words", [
    (b'[{"conversations": [{"from": "human", "value": "Q"} {"from"', "row 1: conversations[0]"),
    (b'[{"image": "a.png", "conversations": "torn', "row 1: conversations: cannot be read"),
    (b"[" + b"[" * 200_000, "row 1: [0][0][0]: cannot be read as JSON (maximum"),
    (b"[{}{}]", "row 1: cannot be read as JSON (no comma"), (b"{\n}", "line 1, row 1: cannot"),
    (b'{"conversations": 1} {}', "line 1, row 1: cannot be read as JSON (more than one"),
    (b"9" * 5000, "a number of 5,000 digits"), (b"NaN", "line 1, row 1: cannot"),
    (b"\xff\xfe[\0]\0", "line 1, row 1: cannot"), (b'{"annotations": [{"caption": "a"}]}',
                                                   "row 1: image: is missing"),
    (b'[{"image": "0.png", "caption": []}]', "row 1: caption: must be"),
    (b'[{"image": "0.png", "caption": ["a", 3]}]', "row 1: caption: must be text"),
    (b'{"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}', "row 1: conversations"),
    (b'"' + b'\\"' * 200_000, "row 1: cannot be read")])
def test_files_that_end_badly(folder, capsys, text, words):
    code, faults, said, spent, _ = doctor(folder, text, capsys)
    assert code == 3 and any(words in line for line in faults), (faults, said)
    assert spent < 1


def test_files_that_are_none(folder, capsys, tmp_path):
    """Pipes, devices, folders, holes of 5 GB: refused before they are opened."""
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(5_000_000_000)                        # a hole: no disk is used
    for path, words in ((tmp_path / "pipe", "not a file"), ("/dev/zero", "not a file"),
                        (tmp_path, "not a file"), (tmp_path / "none", "no such file"),
                        (tmp_path / "hole", "at most 4,000,000,000")):
        for read in (data.read_conversations, lambda p: read_json(p, 4_000_000_000)):
            start = time.process_time()
            with pytest.raises(data.BadData, match=words) as info:
                read(path)
            assert str(path) in str(info.value) and time.process_time() - start < 1
    for text in (b"", b"[]", b" \n\n", b'{"annotations": []}'):
        code, _, said, *_ = doctor(folder, text, capsys)
        assert code == 3 and "holds no samples" in said


def test_read_json_names_the_place(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('\ufeff{"a": [1.5, null, "\u00e9"]}', encoding="utf-8")
    assert read_json(path) == {"a": [1.5, None, "\u00e9"]}
    for text, words in (('{"a": [1, NaN]}', "a[1]: unreadable JSON (NaN"),
                        ('{"a": {"b": 1e999}}', "a.b: unreadable JSON (1e999"),
                        ('{"a": %s}' % ("9" * 5000), "a: unreadable JSON (a number of 5,000"),
                        ('{"a": %s' % ("[" * 100_000), "a[0][0]: unreadable JSON (maximum"),
                        ('{"a": 1,, "b": 2}', "a: unreadable JSON (Expecting"), ("", "unreadable")):
        path.write_text(text)
        with pytest.raises(data.BadData) as info:
            read_json(path)
        assert words in str(info.value)


# ------------------------------------------------------------------------------- what is told

def test_faults_are_counted_by_kind(folder, capsys):
    rows = good()
    for name in ("gone.png", "it's.png", "a (b).png"):
        rows.append({"image": name, "conversations": talk("<image>", "A")})
    rows += [{"conversations": talk("Q?", "A", "Q?", i)} for i in range(2)]
    rows += [{"image": "0.png", "conversations": talk("Q?")}]           # two faults
    rows += [{"image": "gone.png", "conversations": talk("Q?", "A")}]   # two faults
    code, faults, said, *_ = doctor(folder, rows, capsys)
    assert code == 3 and len(faults) == 3 + 2 + 1 + 2 and "12 rows" in said and "8 faults" in said
    kinds = {kind: int(n) for n, kind in re.findall(r"^ +(\d+)  (\S.*)", said, re.M)}
    assert kinds.pop("conversations[].value: must be text") == 2
    assert kinds.pop(next(k for k in kinds if k.startswith("image: is not a file"))) == 4
    assert kinds.pop(next(k for k in kinds if "one picture, but n" in k)) == 2 and not kinds


def test_lengths_are_those_of_training(folder, capsys):
    """The histogram holds each sample's tokens, a picture's places among them."""
    rows, words = good(), data.Tokenizer(folder)
    rows.append({"conversations": talk("Q?", "word " * 100)})
    for places in (1, 32):
        _, _, said, *_ = doctor(folder, rows, capsys, "--llm", folder, "--places", places)
        want = Counter()
        for row in rows:
            n = len(data.encode(row["conversations"], "v1", words, "image" in row)[0])
            want[(n + (places - 1) * ("image" in row)).bit_length()] += 1
        bins = {int(low.replace(",", "")).bit_length(): int(n)
                for low, n in re.findall(r"^ *([\d,]+) to +[\d,]+ +(\d+)", said, re.M)}
        assert {k: n for k, n in bins.items() if n} == want
    for i, places in ((5, 1), (0, 2000)):                   # the longest, to the token
        size = len(data.encode(rows[i]["conversations"], "v1", words, i == 0)[0]) + places - 1
        flags = "--llm", folder, "--places", places, "--pack"
        assert doctor(folder, rows, capsys, *flags, size)[0] == 0
        code, faults, *_ = doctor(folder, rows, capsys, *flags, size - 1)
        assert code == 3 and f"row {i + 1}" in faults[0] and f"{size:,} tokens" in faults[0]


TEXTS = ["", " ", "  two  spaces ", "line\nline\n\n", "\t", "say </s> now", "<s>x", "x<s> y",
         "▁a ▁", "é 😀 ünï", "\x00\x1b", "<unk> <unk>", "a" * 300, "don't  1,234.5",
         "<image> inside", " x", "\u00a0 \u3000wide", "</s></s>"]


@pytest.mark.parametrize("kind", ["tiny", "llama", "llama-legacy"])
def test_counting_by_words_is_exact(folder, kind):
    where = folder if kind == "tiny" else SHARED / kind
    if not (where / "tokenizer.json").exists():
        pytest.skip(f"{where} is not here")
    words, dice = data.Tokenizer(where), random.Random(0)
    lengths = TokenCounter(words)
    assert lengths.apart
    for i in range(400):
        q, a, b = ("".join(dice.choices(TEXTS, k=dice.randint(0, 4))) for _ in range(3))
        for template, seen in (("v1", i % 2), ("llava_llama_2", 0), ("plain", 1), ("minigpt4", 1),
                               ("instructblip", 1), ("mpt", i % 2)):
            turns = talk("<image>\nq" + q if seen else "q" + q, a, *(
                ["q", b] if template in ("v1", "mpt") else []))
            pieces = data.training_segments(turns, template, seen)[1]
            count = -1 if seen else 0
            assert lengths.of(pieces, count) == len(data.tokenize_segments(pieces, words, count)[0])


def test_a_vocabulary_across_spaces_is_tokenised_in_full(folder, tmp_path):
    """The control: with a token "a▁b" words are no longer counted apart, and would be wrong so."""
    write_words(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a▁"] = len(vocabulary)
    spec["model"]["merges"] = [["a", "▁"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    words = data.Tokenizer(tmp_path)
    lengths = TokenCounter(words)
    pieces = data.training_segments(talk("a b a b", "a b"), "v1", False)[1]
    want = len(data.tokenize_segments(pieces, words, 0)[0])
    assert not lengths.apart and lengths.of(pieces, 0) == want
    lengths.apart = True
    assert lengths.of(pieces, 0) != want


def test_pictures_are_opened_once_or_not_at_all(folder, capsys):
    rows = good() * 2
    _, _, said, _, opened = doctor(folder, rows, capsys)
    assert sum(Path(p).suffix == ".png" for p in opened) == 3
    assert "without opening pictures: " in said and "opening 3 pictures: " in said
    rows[0]["image"] = "torn.jpg"
    code, faults, said, _, opened = doctor(folder, rows, capsys, "--no-open")
    assert (code, faults) == (0, []) and {Path(p).name for p in opened} == {"x.json"}
    assert "without opening pictures: " in said and "opening 3" not in said
    assert doctor(folder, rows, capsys)[0] == 3


@pytest.mark.parametrize("template, size, good", [
    ("plain", (2500, 1), False), ("v1", (2500, 1), True), ("v1", (20000, 1), False),
    ("plain", (20000, 1000), True), ("minigpt4_caption", (20000, 1), True)])
def test_shapes_are_judged_as_training_would_show_them(tmp_path, template, size, good):
    """Cropped to a square, padded to one, squashed: each has shapes that it cannot take."""
    Image.new("L", size).save(tmp_path / "x.png")
    why = check_picture(tmp_path / "x.png", template)
    aspect = {"plain": "square", "v1": "pad"}.get(template, "squash")
    if good:
        assert why is None
        data.preprocess(data.load_image(tmp_path / "x.png"), 336, aspect)
    else:
        assert "too large" in why
        with pytest.raises(data.BadImage, match="too large"):
            data.preprocess(data.load_image(tmp_path / "x.png"), 336, aspect)


def test_an_estimate_is_called_one(folder, capsys):
    rows = good()
    rows[0]["conversations"][1]["value"] = "x " * 9000
    assert "about (4 for 3 words; --llm counts them) " in "".join(doctor(folder, rows, capsys)[1])


def test_five_thousand_rows_take_their_share_of_a_minute(folder, capsys):
    """100,000 rows have 60 seconds; one core's time is counted, so that busy machines do not."""
    llm = SHARED / "llama"
    if not llm.exists():
        pytest.skip(f"{llm} is not here")
    dice = random.Random(0)
    stock = ["".join(dice.choices("etaoinshrdlu", k=dice.randint(2, 9))) for _ in range(5000)]
    say = lambda n: " ".join(dice.choices(stock, k=n))
    rows = [{"id": str(i), "image": f"{i % 3}.png", "conversations": talk(
        "<image>\n" + say(12), say(40), say(12), say(40), say(12), say(40))} for i in range(5000)]
    code, _, said, spent, _ = doctor(folder, rows, capsys, "--no-open", "--llm", llm)
    assert code == 0 and "5,000 rows" in said and spent < 60 * 5_000 / 100_000


# ------------------------------------------------------------------------------- show, usage

def shown(capsys, folder, *flags):
    code = exit_status(lambda: trainer_doctor.run(parse(
        ["show", str(folder / "x.json"), *map(str, flags)])))
    return (code, *capsys.readouterr())


def test_show_marks_what_is_learned_and_where_the_picture_is(folder, capsys):
    rows = good() + [{"image": "0.png", "caption": ["a\x1b[31mb", "c"]}, 5]
    doctor(folder, rows, capsys)
    code, out, _ = shown(capsys, folder, "--llm", folder, "--sample", 2)
    assert code == 0 and "row 2" in out and "id 1" in out and "<1.png: 576 places>" in out
    assert [t for t in re.findall(r"\[(.+?)\](?:\s|$)", out)] == ["▁", "A", "▁", "1", "</s>"]
    ids, labels = data.encode(rows[1]["conversations"], "v1", data.Tokenizer(folder))
    assert f"{len(ids) + 575} tokens, {sum(x >= 0 for x in labels)} of them" in out
    code, out, _ = shown(capsys, folder, "--llm", folder, "--sample", 6, "--template", "plain",
                         "--places", 32)
    assert code == 0 and out.count("<0.png: 32 places>") == 2 and "\x1b" not in out
    assert shown(capsys, folder, "--llm", folder, "--sample", 4)[1].count("places>") == 0
    code, _, err = shown(capsys, folder, "--llm", folder, "--sample", 7)
    assert code == 3 and "row 7" in err
    code, _, err = shown(capsys, folder, "--llm", folder, "--sample", 8)
    assert code == 2 and "has 7 rows" in err


def test_nothing_in_a_file_commands_the_terminal(folder, capsys, tmp_path):
    write_words(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["\x1b"] = len(spec["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    rows = [{"id": "\x1b[1m", "image": "\x1b[2J\n.png", "\x1b": 1,
             "conversations": talk("<image>\nQ\x1b[31m", "\x1b]0;A\x07")}]
    _, faults, said, *_ = doctor(folder, rows, capsys)
    assert len(faults) == 1 and faults[0].isprintable() and "\x1b" not in said
    code, out, _ = shown(capsys, folder, "--llm", tmp_path)
    assert code == 0 and "\\x1b" in out and "⏎" in out and "\x1b" not in out
    doctor(folder, b'[{"\x1b[31m": NaN}]', capsys)
    code, faults, *_ = doctor(folder, '[{"\u202e[31m": NaN}]'.encode(), capsys)
    assert code == 3 and faults[0].isprintable()


def test_usage(folder, capsys):
    doctor(folder, good(), capsys)
    file = str(folder / "x.json")
    for words in (["check"], ["show"], ["look", file], ["check", file, "--template", "v9"],
                  ["check", file, "--pack", "0"], ["show", file, "--sample", "0"],
                  ["check", file, "--no-ope"], ["check", file, "--places", "x"]):
        with pytest.raises(SystemExit) as stop:
            parse(words)
        assert stop.value.code == 2
    run = lambda *words: exit_status(lambda: trainer_doctor.run(parse(list(map(str, words)))))
    assert run("check", file) == 2 and "give --images" in capsys.readouterr().err
    assert run("check", file, "--images", folder / "none") == 2
    assert run("check", file, "--images", folder, "--llm", folder / "none") == 3
    capsys.readouterr()
    assert data.main() == 0 and "with loss" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["check", "show"])
def test_help_imports_no_torch(what):
    done = subprocess.run([sys.executable, "-X", "importtime", data.__file__, what, "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: data.py {what} ")
    assert "argparse" in done.stderr and "torch" not in done.stderr
