"""Faults that users reported: pictures, answers to instruct, the three benchmarks."""
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

import data
import test_benchmarks as benchmarks
import test_instruct as asking
import train
from formats import pictures
from test_benchmarks import Judge, bench, exam, scores, seer, stand_in              # noqa: F401
from test_instruct import Server, asked, coco, folder                               # noqa: F401
from evaluate.benchmarks import parse_choice_leniently, says_neither
from evaluate.judge import relative_score
from formats.pictures import list_pictures, picture_path
from instruct.endpoint import ChatEndpoint
from instruct.flags import parse
from instruct.parsing import parse_reply
from instruct.prompts import format_qa
from instruct.sources import folder_requests
from trainer import doctor, doctor_flags
from trainer.run_folder import run_config

ROOT = Path(__file__).parents[1]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def load(raw):
    return data.load_image(io.BytesIO(raw))


def chunk(name, body, crc=None):
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def with_chunks(raw, *chunks, behind=False):
    """A PNG with chunks behind its header, or before its end."""
    at = len(raw) - 12 if behind else 33
    return raw[:at] + b"".join(chunks) + raw[at:]


def with_segments(raw, *segments):
    """A JPEG with segments [(marker, body)] behind its first two bytes."""
    made = b"".join(bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body
                    for marker, body in segments)
    return raw[:2] + made + raw[2:]


# ---------------------------------------------------------------- metadata decides nothing

PNG, JPEG = encoded(NOISE, "PNG"), encoded(NOISE, "JPEG")
BOMB = zlib.compress(bytes(60_000_000), 9)
XMP = b"XML:com.adobe.xmp\0"


@pytest.mark.parametrize("chunks", [
    [chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000)))], [chunk(b"zTXt", b"a\0\0" + BOMB)],
    [chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)], [chunk(b"iTXt", XMP + b"\1\0\0\0" + BOMB)],
    [chunk(b"iTXt", XMP + b"\0\0\0\0" + b"x" * 3_000_000)],
    [chunk(b"tEXt", b"k\0" + b"x" * 3_000_000)] * 30, [chunk(b"iCCP", b"p\0\0" + BOMB)],
    [chunk(b"iCCP", b"p\0\7nonsense")], [chunk(b"zTXt", b"a\0\7no such method")],
    [chunk(b"tEXt", b"a\0b", crc=5)], [chunk(b"eXIf", b"nonsense" * 99)],
    [chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\xff\xff" * 9)],
    [chunk(b"eXIf", b"x" * 3_000_000)], [chunk(b"gAMA", b"")], [chunk(b"pHYs", b"1")],
    [chunk(b"cHRM", b"2")], [chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB)]])
@pytest.mark.parametrize("behind", [False, True])
def test_png_metadata_decides_nothing(chunks, behind):
    assert load(with_chunks(PNG, *chunks, behind=behind)).tobytes() == NOISE.tobytes()


@pytest.mark.parametrize("segments", [
    [(0xED, b"Photoshop 3.0\0008BIM\4\4")], [(0xE2, b"ICC_PROFILE\0")], [(0xE0, b"JFIF\0")],
    [(0xEE, b"Adobe")], [(0xE1, b"Exif\0\0nonsense")], [(0xE1, b"Exif\0\0" + b"x" * 65_000)] * 60,
    [(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\xff\xff" * 9)],
    [(0xFE, b"x" * 65_000)] * 60, [(0xE2, b"MPF\0nonsense")],
    [(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 60_000)] * 60])
def test_jpeg_metadata_decides_nothing(segments):
    assert load(with_segments(JPEG, *segments)).tobytes() == load(JPEG).tobytes()


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_pictures_are_turned_as_pillow_turns_them(kind, turn):
    """Also if the tag stands between metadata that is left out; TIFF keeps it in its own table."""
    options = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(NOISE, kind, exif=exif(turn), **options)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
    big = chunk(b"zTXt", b"a\0\0" + BOMB)
    made = [raw] + ([with_chunks(raw, big), with_chunks(raw, big, behind=True)] * (kind == "PNG"))
    made += [with_segments(raw, *[(0xED, b"x" * 60_000)] * 40)] * (kind == "JPEG")
    for raw in made:
        got = load(raw)
        assert got.size == want.size and got.tobytes() == want.convert("RGB").tobytes()


def test_orientation_in_xmp_and_in_text_still_counts():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=True)
    raw = encoded(NOISE, "PNG", pnginfo=info)
    assert load(raw).size == (30, 40) == ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).size
    body = b"Exif\0\0" + exif(6).tobytes()[6:]
    profile = f"\nexif\n{len(body):8}\n{body.hex()}\n".encode()
    assert load(with_chunks(PNG, chunk(b"tEXt", b"Raw profile type exif\0" + profile))).size == (
        30, 40)


def test_damage_of_pixels_is_still_refused():
    """The controls: what decides about pixels is checked as before."""
    for raw in (PNG[:-500], with_chunks(PNG, chunk(b"tRNS", b"")), PNG[:60] + b"?" + PNG[61:],
                JPEG[:300], PNG[:40], b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"):
        with pytest.raises(data.BadImage, match="give a whole PNG, JPEG"):
            load(raw)
    pages = encoded(NOISE, "TIFF", exif=exif(3))
    assert load(pages).tobytes() == NOISE.transpose(Image.Transpose.ROTATE_180).tobytes()


def test_a_text_bomb_takes_no_memory(tmp_path):
    """100 chunks, each of which would unpack to 60 MB."""
    path = tmp_path / "bomb.png"
    path.write_bytes(with_chunks(PNG, *[chunk(b"zTXt", b"a\0\0" + BOMB)] * 100))
    said = subprocess.run([sys.executable, "-c", "import resource, sys\n"
                           "from formats.pictures import load_image\nimport torch\n"
                           "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                           "before = peak(); load_image(sys.argv[1]); print(peak() - before)",
                           path], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said) < 40_000                                   # KiB


# ---------------------------------------------------------------- sizes

def test_photographs_of_telephones_are_read(tmp_path):
    """50 megapixels, and 200 (16,320 × 12,240); Pillow's global limit stays as it was."""
    limit = Image.MAX_IMAGE_PIXELS
    for size in ((8160, 6144), (16320, 12240)):
        Image.new("L", size, 77).save(tmp_path / "x.jpg")
        image = data.load_image(tmp_path / "x.jpg")
        assert image.size == size and image.mode == "RGB" and image.getpixel((9, 9)) == (77,) * 3
    assert Image.MAX_IMAGE_PIXELS == limit


@pytest.mark.parametrize("mode, size, words", [
    ("L", (15000, 15000), "15000×15000 is over 205 megapixels: make it smaller first"),
    ("1", (13000, 13000), "13000×13000 is over 50 megapixels in")])
def test_what_is_too_large_says_what_to_do(tmp_path, mode, size, words):
    Image.new(mode, size).save(tmp_path / "x.png")
    with pytest.raises(data.BadImage, match=words) as info:
        data.load_image(tmp_path / "x.png")
    assert "give a whole" not in str(info.value) and "smaller first" in str(info.value)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "CMYK"])
def test_strips_are_the_picture(monkeypatch, mode):
    """Large pictures are converted by strips: the same pixels."""
    noise = np.random.default_rng(1).integers(0, 65535, (3000, 2000)).astype(np.uint16)
    large = Image.fromarray(noise) if mode == "I;16" else NOISE.resize((2000, 3000)).convert(mode)
    raw = encoded(large, "JPEG" if mode == "CMYK" else "PNG", **(
        {"transparency": 3} if mode == "P" else {}))
    assert load(raw).tobytes() == pictures._to_rgb(Image.open(io.BytesIO(raw))).tobytes()


# ---------------------------------------------------------------- links

@pytest.fixture
def linked(tmp_path):
    """A folder whose coco leads to another disk."""
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "img").mkdir()
    NOISE.save(tmp_path / "disk/deep/a.png")
    (tmp_path / "img/coco").symlink_to(tmp_path / "disk")
    (tmp_path / "img/b.png").symlink_to(tmp_path / "disk/deep/a.png")
    (tmp_path / "img/loop").symlink_to(tmp_path / "img")
    (tmp_path / "secret.png").write_bytes(PNG)
    return tmp_path


def test_links_are_followed_on_request(linked):
    for name in ("coco/deep/a.png", "b.png"):
        with pytest.raises(data.BadData, match="leads outside of .* give --follow-links"):
            picture_path(linked / "img", name)
        assert picture_path(linked / "img", name, follow_links=True).read_bytes()
    for name in ("../secret.png", str(linked / "secret.png"), "coco/../../secret.png", "coco",
                 "coco/none.png", "C:\\x.png", ""):
        with pytest.raises(data.BadData):
            picture_path(linked / "img", name, follow_links=True)


def rows(linked):
    path = linked / "rows.json"
    path.write_text(json.dumps([{"id": "1", "image": "coco/deep/a.png", "conversations": [
        {"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]}]))
    return path


def test_the_doctor_follows_links(linked, capsys):
    words = ["check", str(rows(linked)), "--images", str(linked / "img")]
    assert doctor.run(doctor_flags.parse(words)) == 3
    assert "--follow-links" in capsys.readouterr().out
    assert doctor.run(doctor_flags.parse([*words, "--follow-links"])) == 0


def test_training_follows_links(linked):
    args = train.parse_args(["--stage", "2", "--data", str(rows(linked)), "--images",
                             str(linked / "img"), "--follow-links"])
    assert args.follow_links and not train.parse_args(["--stage", "2"]).follow_links
    assert "follow_links" not in run_config(args)           # old runs can be resumed


def test_captions_of_linked_folders(linked):
    words = ["caption", str(linked / "img"), "--model", str(linked), "--out", str(linked / "o")]
    jobs = list(folder_requests(parse(words)))
    assert [job.image for job in jobs] == ["b.png"]             # refused when it is opened
    jobs = list(folder_requests(parse([*words, "--follow-links"])))
    assert [job.image for job in jobs] == ["b.png", "coco/deep/a.png"]


# ---------------------------------------------------------------- which files are pictures

def test_every_picture_of_a_folder_is_listed(tmp_path):
    good = "a.JPG b.jfif c.jpe d.png e.PNG f.webp g.tif h.bmp i.gif 0f3a".split()
    for name in good:
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "noname").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic")
    for name in ("notes.txt", "README", "raw.dng", "BMW"):
        (tmp_path / name).write_bytes(b"BMW is a car, said II*\0")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/x.png").write_bytes(PNG)
    found, lines = list_pictures(tmp_path)
    if "AVIF" in pictures.READERS:
        (tmp_path / "y.avif").write_bytes(encoded(NOISE, "AVIF"))
        assert "y.avif" in [p.name for p in list_pictures(tmp_path)[0]]
        assert data.load_image(tmp_path / "y.avif").size == NOISE.size
    assert [p.name for p in found] == sorted(good)
    told = "\n".join(lines)
    assert "2 HEIC file(s) passed over, IMG_1.HEIC, noname: HEIC is not read here: convert" in told
    assert "4 file(s) are no pictures: BMW, README, notes.txt ..." in told
    assert "1 folder(s) in it are not entered: below" in told
    assert "below/x.png" in [p.relative_to(tmp_path).as_posix()
                             for p in list_pictures(tmp_path, below=True)[0]]
    with pytest.raises(data.BadImage, match="HEIC is not read here: convert it"):
        data.load_image(tmp_path / "IMG_1.HEIC")


def test_nothing_outside_is_opened_to_look_at_it(linked):
    (linked / "img/word").symlink_to(linked / "secret.png")
    opened, watching = [], True
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(args[0]))
    found, lines = list_pictures(linked / "img", below=True)
    watching = False
    assert not [p for p in opened if "secret" in str(p)] and "--follow-links" in "".join(lines)
    assert [p.name for p in found] == ["b.png"]
    assert "word" in [p.name for p in list_pictures(linked / "img", follow_links=True)[0]]


def test_generate_tells_of_the_others(tmp_path, seer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jfif").write_bytes(JPEG)
    (tmp_path / "in/notes.txt").write_text("hello")
    done = subprocess.run([sys.executable, ROOT / "generate.py", tmp_path / "in", "What?",
                           "--model", seer, "--out", tmp_path / "o.json", "--max-new-tokens", "3"],
                          capture_output=True, text=True)
    assert [r["image"] for r in json.loads((tmp_path / "o.json").read_text())] == ["a.jfif"]
    assert "1 file(s) are no pictures: notes.txt" in done.stderr


# ---------------------------------------------------------------- a request that always fails

def number(picture):
    return int(re.search(r"\d+", picture)[0])


def run(folder, server, *more, n=8):
    code = asking.run("conversation", *coco(folder, n), *asked(server, "--retries", 1, *more),
                      "--out", folder / "o.json")
    out = folder / "o.json"
    return code, len(json.loads(out.read_text())) if out.exists() else None


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("how", ["always 500", "hours", "401", "302"])
@pytest.mark.parametrize("bad", [[3], [7], [2, 3]])
def test_one_request_that_always_fails_is_dropped_and_counted(
        folder, capsys, workers, how, bad):
    how = {"hours": "429 hours"}.get(how, how)
    server = Server(lambda p: how if number(p) in bad else "")
    assert run(folder, server, "--workers", workers) == (0, 8 - len(bad))
    said = capsys.readouterr()
    assert f"{len(bad)} no answer (HTTP {how[-3:] if how[-1].isdigit() else 429})" in said.out
    assert "asked again when the same command is run" in said.err
    assert {row["id"] for row in json.loads((folder / "o.json.dropped.json").read_text())} == {
        str(100 - i) for i in bad}
    before = len(server.seen)
    if how != "429 hours":                                      # which is over the second time
        assert run(folder, server, "--workers", workers)[0] == 0        # still failing
    server.first = lambda p: ""
    assert run(folder, server, "--workers", workers) == (0, 8)
    assert before < len(server.seen) <= before + 3 * len(bad)
    asked_for = len(server.seen)
    assert run(folder, server) == (0, 8) and len(server.seen) == asked_for


def test_the_first_request_fails_and_nobody_else_asks(folder):
    """One worker cannot know: the run ends, and the next asks that one last."""
    server = Server(lambda p: "always 500" if number(p) == 0 else "")
    assert run(folder, server, "--workers", 1) == (4, None)
    assert run(folder, server, "--workers", 1) == (0, 7)


@pytest.mark.parametrize("how, code", [("always 500", 4), ("401", 3)])
def test_a_server_where_nothing_succeeds_ends_the_run(folder, how, code):
    server = Server(lambda p: how)
    for _ in range(3):
        before = len(server.seen)
        assert run(folder, server, n=30) == (code, None)
        assert len(server.seen) - before <= 20


def test_a_server_that_dies_ends_the_run(folder):
    """After 10 of 60 answers; control: it comes back, and all is answered."""
    server = Server()
    server.first = lambda p: "always 500" if len(server.seen) > 10 else ""
    assert run(folder, server, n=60) == (4, None) and len(server.seen) < 50
    server.first = lambda p: ""
    assert run(folder, server, n=60) == (0, 60)


def test_many_refusals_do_not_end_a_run_that_gets_answers(folder):
    server = Server(lambda p: "400" if number(p) >= 5 else "")
    assert run(folder, server, "--workers", 1, n=40) == (0, 5)
    assert run(folder, server, "--workers", 1, n=40) == (0, 5)


# ---------------------------------------------------------------- the form of answers

WANT = ["What is it?", "A cat.", "Is it large?", "Yes, it is."]
PLAIN = format_qa([WANT[:2], WANT[2:]])
BOLD = ("**Question:** What is it?\n**Answer:** A cat.\n\n**Question:** Is it large?\n"
        "**Answer:** Yes, it is.")
SHAPES = {
    "fence": f"```\n{PLAIN}\n```", "fence that never ends": f"```text\n{PLAIN}",
    "fence, words around": f"Here it is:\n\n```text\n{PLAIN}\n===\n```\nLet me know!",
    "bold": BOLD, "bold, colon outside": BOLD.replace(":**", "**:"),
    "bold question": BOLD.replace(":** What is it?", ": What is it?**"),
    "bold and ===": PLAIN.replace("Question:", "**Question:**").replace("Answer:", "**Answer:**"),
    "headings and ===": PLAIN.replace("Question:", "### Question").replace("Answer:", "### Answer"),
    "headings": "".join(f"### {name}\n{text}\n\n" for name, text in zip(
        ("Question", "Answer") * 2, WANT)),
    "numbered": "\n".join(f"{name}: {text}" for name, text in zip(
        ("Question 1", "Answer 1", "Question 2", "Answer 2"), WANT)),
    "Q and A": "\n".join(f"{name}: {text}" for name, text in zip("QAQA", WANT)),
    "Q1": "\n".join(f"{name}: {text}" for name, text in zip(("Q1", "A1", "Q2", "A2"), WANT)),
    "list": "\n".join(f"{name}: {text}" for name, text in zip(
        ("1. Question", "   Answer", "2. Question", "   Answer"), WANT)),
    "bold list": "\n".join(f"{name} {text}" for name, text in zip(
        ("1. **Q:**", "   **A:**", "2. **Q:**", "   **A:**"), WANT)),
    "thinking": f"<think>\nQuestion:\n===\nThe captions say\n</think>\n\n{PLAIN}",
    "thinking, opened by the server": f"the captions</think>\n{PLAIN}",
    "Windows": PLAIN.replace("\n", "\r\n"), "old Mac": PLAIN.replace("\n", "\r"),
    "byte order mark": "\ufeff" + PLAIN, "=== at the end": PLAIN + "\n===\n",
    "preamble": f"Sure! Here is a conversation based on the captions:\n\n{PLAIN}",
    "no === behind answers": "Question:\n===\nWhat is it?\n===\nAnswer:\nA cat.\nQuestion:\n===\n"
                             "Is it large?\nAnswer:\n===\nYes, it is.",
    "smart quotes": BOLD.replace("**Question:**", "“Question:”").replace(
        "**Answer:**", "“Answer”:"),
    "rules": BOLD.replace("\n\n", "\n\n---\n\n") + "\n\n---"}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_read_in_any_clear_form(shape):
    assert parse_reply("conversation", SHAPES[shape]) == WANT


@pytest.mark.parametrize("text, reason", [
    ("Question: a\nAnswer: b", "no === blocks"), ("Q: what? A: this", "no === blocks"),
    (f"{PLAIN}\n===\nI hope this helps!", "by turns"), (f"{BOLD}\n\nLet me know!", "no === blocks"),
    ("1. What is it?\nA cat.\n2. Is it large?\nYes.", "no === blocks"),
    (f"<think>\n{PLAIN}", "thinking that does not end"), ("<think>a</think>", "empty"),
    ("Q: What is it?\nQ: Is it large?\nA: Yes.", "no === blocks"),
    (f"A story about a man.\n{BOLD}", "no === blocks"),
    (BOLD.replace("A cat.", "A ### cat."), "control token"),
    (BOLD.replace("A cat.", "The caption says so."), "speaks of captions"),
    ("Question: What is it?\nAnswer:", "no === blocks")])
def test_what_is_not_clear_is_rejected_with_its_reason(text, reason):
    with pytest.raises(data.BadData, match=reason):
        parse_reply("conversation", text)


@pytest.mark.parametrize("text, want", [
    ("Here is the description:\n\nA cat sits.", "A cat sits."),
    ("**Description:**\nA cat sits.", "A cat sits."), ("```\nA cat sits.\n```", "A cat sits."),
    ("<think>The caption</think>A cat sits.", "A cat sits."),
    ("Here is a cat. It sits.", "Here is a cat. It sits.")])
def test_descriptions_without_what_stands_around_them(text, want):
    assert parse_reply("detail", text) == [want]


@pytest.mark.parametrize("message, what, want", [
    ({"content": "A."}, "detail", ("A.", "")),
    ({"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]}, "detail",
     ("A cat.", "")),
    ({"content": [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "A."}]},
     "detail", ("A.", "")),
    ({"content": "", "reasoning_content": PLAIN}, "conversation", (PLAIN, "")),
    ({"content": None, "reasoning": PLAIN}, "conversation", (PLAIN, "")),
    ({"reasoning_content": PLAIN}, "conversation", (PLAIN, "")),
    ({"content": "A.", "reasoning_content": "Hm"}, "detail", ("A.", "")),
    ({"content": "", "reasoning_content": "Hm"}, "detail", ("Hm", "thinking without an answer")),
    ({"content": None}, "detail", ("", ""))])
def test_what_a_message_says(folder, message, what, want):
    args = parse([what, "--toy", "1", "--images", str(folder), "--out",
                               str(folder / "o"), "--endpoint", "http://127.0.0.1:1/v1",
                               "--endpoint-model", "m"])
    assert ChatEndpoint(args).read({"choices": [{"message": message}]}) == want


# ---------------------------------------------------------------- LLaVA-Bench

papers = benchmarks.folder          # three pictures, in both layouts


def test_one_ungraded_review_empties_no_table(papers, seer, stand_in, capsys):
    stand_in[0].update(benchmarks.SAYS)
    judge = Judge({"Red.": "8 8", "A thing.": "8 4", "Who knows.": "I cannot say"})
    flags = (*bench(papers), "--model", seer, "--endpoint", judge.url, "--endpoint-model", "m")
    assert benchmarks.run(*flags) == 0 and len(judge.seen) == 4 + 2     # asked again, twice
    said, made = capsys.readouterr().out, scores(papers / "o.jsonl")
    assert made["groups"]["conv"]["score"] == 100 and made["groups"]["detail"]["score"] == 50
    assert made["groups"]["complex"]["score"] is None and made["graded"] == 3
    assert "question 2 (complex)" in said and re.search(r"complex +none", said)
    judge.grades["Who knows."] = "8 8"                                  # it is not final
    assert benchmarks.run(*flags) == 0 and len(judge.seen) == 4 + 2 + 1
    assert scores(papers / "o.jsonl")["groups"]["complex"]["score"] == 100
    assert benchmarks.run(*flags) == 0 and len(judge.seen) == 4 + 2 + 1
    judge.grades.update(dict.fromkeys(judge.grades, "nothing"))         # control: no grades at all
    assert benchmarks.run(*flags, "--endpoint-model", "n") == 3
    assert "the references have no grades" in capsys.readouterr().err


def test_a_missing_review_leaves_the_other_categories(papers, seer, stand_in, capsys):
    stand_in[0].update(benchmarks.SAYS)
    judge = Judge({"Red.": "8 8", "A thing.": "refuse", "Who knows.": "8 4"})
    flags = (*bench(papers), "--model", seer, "--endpoint", judge.url, "--endpoint-model", "m")
    assert benchmarks.run(*flags) == 3
    said = capsys.readouterr()
    assert re.search(r"complex +50\.0", said.out) and "review(s) are missing" in said.err


def test_groups_without_grades():
    assert relative_score([[-1, -1]])["score"] is None
    assert relative_score([[1, 2], [-1, -1]])["score"] is None       # a mean of nothing
    assert relative_score([[8, 4]])["score"] == 50


# ---------------------------------------------------------------- ScienceQA and POPE

@pytest.mark.parametrize("text, pick", [
    ("(B)", 1), ("B", 1), ("b.", 1), ("b", 1), ("Answer: B", 1), ("cat", 1), ("Cat.", 1),
    ("B) cat", 1), ("B. cat", 1), ("**B**", 1), ("The answer is B", 1), ("The answer is cat.", 1),
    ("The correct option is C.", 2), ("Answer: A bird", 2), ("The answer is a bird.", 2),
    ("A dog runs", -1), ("A or B", -1), ("A, B", -1), ("D", -1), ("F", -1), ("", -1),
    ("I do not know", -1), ("The answer is a cat", -1),
    ("The answer is A. The answer is B.", -1)])
def test_what_a_reader_would_read(text, pick):
    assert parse_choice_leniently(text, ["dog", "cat", "a bird"]) == pick


def test_scienceqa_shows_both_rules(papers, seer, stand_in, capsys):
    stand_in[0].update({"warm": "(B)", "far": "Answer: A", "word": "b", "deep": "perhaps"})
    assert benchmarks.run(*exam(papers), "--model", seer) == 0
    said, made = capsys.readouterr().out, scores(papers / "o.jsonl")
    assert "without a letter" not in said and "4 answer(s) are wrong because the" in said
    assert made["rejected by the official rule"] == 4
    assert made["groups"]["all"] == {"accuracy": 0, "questions": 4, "lenient": .75}
    assert "0.0000 of 4   read leniently 0.7500" in said


def pope(papers, seer):
    flags = ("pope", "--model", seer, "--images", papers / "img", "--out", papers / "o.jsonl",
             "--questions")
    return benchmarks.run(*flags, *benchmarks.pope_files(papers))


def test_pope_says_when_there_is_no_yes_and_no_no(papers, seer, stand_in, capsys):
    stand_in[0].update({"": "A cat."})
    assert pope(papers, seer) == 0
    said, made = capsys.readouterr().out, scores(papers / "o.jsonl")
    assert made["random"]["F1"] == 2 / 3 and made["random"]["neither yes nor no"] == 4
    assert "random: 4 of 4 answers hold neither yes nor no" in said
    assert "popular: every answer counts as yes" in said


def test_pope_has_no_note_where_there_is_nothing_to_note(papers, seer, stand_in, capsys):
    stand_in[0].update({"cat": "Yes", "": "No, it isn't"})
    assert pope(papers, seer) == 0 and "note" not in capsys.readouterr().out


@pytest.mark.parametrize("text, neither", [
    ("Yes", 0), ("NO", 0), ("there isn't", 0), ("It is not", 0), ("A cat", 1), ("nothing", 1),
    ("", 1), ("know", 1)])
def test_neither_yes_nor_no(text, neither):
    assert says_neither(text) == bool(neither)


def test_a_damaged_picture_ends_no_benchmark(papers, seer, stand_in, capsys):
    """Its questions are left out and named; control: pictures that are not there end it first."""
    stand_in[0].update({"cat": "Yes", "": "No"})
    (papers / "img/1.jpg").write_bytes(b"no picture")
    assert pope(papers, seer) == 0
    said, made = capsys.readouterr(), scores(papers / "o.jsonl")
    assert made["random"]["questions"] == 3 and made["random"]["left out"] == 1
    assert "coco_pope_random.json: line 2, row 2" in said.err and "could not be asked" in said.out
    Image.new("RGB", (30, 20)).save(papers / "img/1.jpg")               # mended: it is asked
    assert pope(papers, seer) == 0 and scores(papers / "o.jsonl")["random"]["questions"] == 4
    (papers / "img/1.jpg").unlink()
    (papers / "img/2.jpg").unlink()
    assert pope(papers, seer) == 3
    assert "(so are those of 3 more question(s))" in capsys.readouterr().err


def test_benchmarks_follow_links(papers, seer, stand_in, capsys):
    stand_in[0].update({"": "No"})
    os.rename(papers / "img/1.jpg", papers / "1.jpg")
    (papers / "img/1.jpg").symlink_to(papers / "1.jpg")
    assert pope(papers, seer) == 3 and "--follow-links" in capsys.readouterr().err
    flags = ("pope", "--model", seer, "--images", papers / "img", "--out", papers / "o.jsonl",
             "--follow-links", "--questions")
    assert benchmarks.run(*flags, *benchmarks.pope_files(papers)) == 0
