"""instruct/: a stand-in endpoint that misbehaves, runs that are killed, rules with controls."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import standin
from formats import files
from formats.errors import exit_status
from formats.pictures import picture_path
from instruct import answerers
from instruct.endpoint import ChatEndpoint, retry_after
from instruct.flags import KINDS, parse
from instruct.journal import Journal
from instruct.parsing import parse_reply, repair_by_rules, repaired_or_reject, to_turns
from instruct.prompts import CONTINUE_PROMPT, FEW_SHOT, format_qa, image_context
from instruct.write import main
from toy.texts import description
from toy.world import draw, make_scene
from trainer.build import new_vlm

ROOT = Path(__file__).parents[1]
TOY = ROOT / "toy/weights"
LLAMA = data.Tokenizer(TOY / "llama")
GOOD = format_qa([("What is it?", "A {}."), ("Is it large?", "Yes.")])


def run(*words):
    """A command in this process; its exit code."""
    args = parse([str(w) for w in words])
    return exit_status(lambda: main(args))


def rows(path):
    return json.loads(Path(path).read_text())


def lines(out):
    return [json.loads(x) for x in Path(f"{out}.answers.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ stand-in endpoint

class Server(standin.Server):
    """Answers in GOOD about the first caption; `first` says how each picture's first request ends.

    seen: [(time, picture, body)] of all requests."""

    def __init__(self, first=lambda picture: "", delay=0.0):
        super().__init__(Handler)
        self.first, self.delay, self.headers = first, delay, []


class Handler(standin.Handler):
    def trickle(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(180):
            self.wfile.write(b" ")
            time.sleep(.05)

    def do_POST(self):
        body = self.body()
        assert self.path == "/v1/chat/completions"
        picture = body["messages"][-1]["content"].split("\n")[0]
        how = self.server.first(picture)
        again = any(p == picture for _, p, _ in self.server.seen)
        self.server.seen.append((time.monotonic(), picture, body))
        self.server.headers.append(self.headers)
        time.sleep(self.server.delay)
        good = GOOD.format(picture)
        always = {"malformed": lambda: self.say("Q: what? A: this"), "cut": lambda: self.say(
            good, "length"), "surrogate": lambda: self.say(good + "\ud800"),
            "filter": lambda: self.say(None, "content_filter"),
            "400": lambda: self.send(400, b'{"error": "too long for sk-test"}'),
            "401": lambda: self.send(401, b'{"error": "wrong key sk-test"}'),
            "always 500": lambda: self.send(500, b""), "hang": lambda: time.sleep(9),
            "trickle": self.trickle,
            "302": lambda: self.send(302, b"", ("Location", "http://127.0.0.1:1/v1"))}
        once = {"429": lambda: self.send(429, b"slow down", ("Retry-After", 1)),
                "429 hours": lambda: self.send(429, b"tomorrow", ("Retry-After", 90_000)),
                "500": lambda: self.send(500, b"oops"),
                "drop": lambda: self.connection.close(),
                "half": lambda: self.send(200, b'{"choices": [{"mess', size=900),
                "html": lambda: self.send(200, b"<html>hello"),
                "deep": lambda: self.send(200, b"[" * 100_000),
                "shape": lambda: self.send(200, b'{"choices": []}'),
                "slow": lambda: (time.sleep(.3), self.say(good))}
        try:
            if how in always:
                always[how]()
            elif how in once and not again:
                once[how]()
            else:
                self.say(good)
        except OSError:
            pass                                # the other side was killed or has given up


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def coco(folder, n=6, **change):
    """Files of COCO's shape about n pictures, ids descending; `change`: edits by path."""
    (folder / "img").mkdir(exist_ok=True)
    images = [{"id": 100 - i, "file_name": f"{i:03}.jpg", "width": 200, "height": 100}
              for i in range(n)]
    for image in images:
        (folder / "img" / image["file_name"]).write_bytes(b"nobody opens this")
    notes = [{"id": 5 * i + j, "image_id": 100 - i, "caption": f"thing {i}\r\n seen {j}"}
             for j in range(6) for i in range(n)]
    captions = {"images": images, "annotations": notes}
    boxes = {"categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dining table"}],
             "annotations": [{"id": i, "image_id": 100 - i, "category_id": 1 + 6 * (i % 2),
                              "bbox": [20, 10.5, 100, 89.5]} for i in range(n)]}
    read = {"captions": captions, "instances": boxes}
    for path, value in change.items():
        where, last = read, path.split("__")
        for step in last[:-1]:
            where = where[int(step) if step.isdigit() else step]
        where[int(last[-1]) if last[-1].isdigit() else last[-1]] = value
    for name, made in read.items():
        (folder / f"{name}.json").write_text(json.dumps(made))
    return ["--captions", folder / "captions.json", "--instances", folder / "instances.json",
            "--images", folder / "img"]


def asked(server, *more):
    return ["--endpoint", server.url, "--endpoint-model", "m", "--backoff", .01, *more]


FAULTS = ("", "429", "500", "drop", "half", "html", "deep", "shape", "slow", "malformed", "cut",
          "surrogate", "filter", "400")


def fault_of(picture):
    return FAULTS[int(re.search(r"\d+", picture)[0]) % len(FAULTS)]


def test_endpoint_with_every_fault(folder, capsys):
    """28 pictures, two a fault: all that can be is kept, in order, once; the rest is counted."""
    server, out = Server(fault_of), folder / "out.json"
    assert run("conversation", *coco(folder, 28), *asked(server), "--out", out,
               "--price-in", 2, "--price-out", 8, "--max-tokens", 50) == 0
    made, said = rows(out), capsys.readouterr().out
    lost = ("malformed", "cut", "surrogate", "filter", "400")
    assert [r["image"] for r in made] == [f"{i:03}.jpg" for i in range(28)
                                          if FAULTS[i % 14] not in lost]
    assert all(r["id"] == str(100 - int(r["image"][:3])) for r in made)
    assert made[1]["conversations"][1]["value"] == "A thing 1 seen 0."
    assert "18 of 28 kept, 64.3%; dropped: " in said and all(f"2 {why}" in said for why in (
        "no === blocks", "cut off", "not Unicode text", "filtered", "refused by the endpoint"))
    # the estimate comes first, by its rule: 4 characters a token, 4 tokens a message
    each = sum(-(-len(m["content"]) // 4) + 4 for m in server.seen[0][2]["messages"])
    read = int(re.search(r"about ([\d,]+) tokens to read", said)[1].replace(",", ""))
    assert abs(read - 28 * each) <= 28 * 3 and "at most 1,400 to write" in said
    assert f"cost: at most about {(read * 2 + 1400 * 8) / 1e6:,.2f}" in said
    assert said.index("cost:") < said.index("kept") and "read, 1" in said
    # what is asked: system, two examples, captions alone; five of the six
    body = server.seen[0][2]
    assert [m["role"] for m in body["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert body["messages"][-1]["content"].count("\n") == 4 and body["max_tokens"] == 50
    assert server.headers[0]["Authorization"] == "Bearer sk-test"
    # each fault once more than needed; a second run asks only what was refused
    times = Counter(p for _, p, _ in server.seen)
    assert {times[p] for p in times if fault_of(p) in FAULTS[1:8]} == {2}
    assert {times[p] for p in times if fault_of(p) not in FAULTS[1:8]} == {1}
    before, text = len(server.seen), out.read_bytes()
    assert run("conversation", *coco(folder, 28), *asked(server), "--out", out,
               "--max-tokens", 50) == 0
    assert len(server.seen) == before + 2 and out.read_bytes() == text
    # control: another seed is another request
    run("conversation", *coco(folder, 28), *asked(server), "--out", out, "--limit", 3,
        "--max-tokens", 50, "--seed", 1)
    assert len(server.seen) == before + 2 + 3


@pytest.mark.parametrize("kind", ["detail", "reasoning"])
def test_requests_with_boxes(folder, kind):
    server = Server()
    run(kind, *coco(folder, 2), *asked(server), "--out", folder / "out.json")
    body = next(b for _, p, b in server.seen if p.startswith("thing 1"))
    assert body["messages"][-1]["content"].split("\n")[-2:] == [
        "", "dining table: [0.1, 0.105, 0.6, 1.0]"]
    assert [m["role"] for m in body["messages"]] == ["system", *["user", "assistant"] * 3, "user"]


def test_retry_after_is_honoured(folder):
    """By all threads; control: without the header a retry is immediate."""
    for how, least, most in (("429", .95, 9), ("500", 0, .9)):
        server = Server(lambda p: how if "thing 0" in p else "slow")        # others end later
        assert run("conversation", *coco(folder, 6), *asked(server),
                   "--out", folder / f"{how}.json") == 0
        first = next(t for t, p, _ in server.seen if "thing 0" in p)
        later = [t - first for t, _, _ in server.seen[4:]]
        assert len(later) == 3 and least <= later[0] < most
    assert retry_after("7") == 7 and retry_after("soon") == retry_after(None) == 0
    assert retry_after(formatdate(time.time() - 60, usegmt=True)) == 0
    assert 58 < retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_rate_limit(folder):
    for rate, least in ((240, 1.2), (0, 0)):            # 6 requests, 5 gaps of a quarter
        server = Server()
        run("conversation", *coco(folder), *asked(server, "--per-minute", rate), "--out",
            folder / f"{rate}.json")
        took = server.seen[-1][0] - server.seen[0][0]
        assert took >= least and (rate or took < 1.2)


@pytest.mark.parametrize("how, code, word, requests", [
    ("401", 3, "HTTP 401", 1), ("302", 3, "HTTP 302", 1), ("429 hours", 4, "1 attempts", 1),
    ("always 500", 4, "3 attempts", 3), ("400", 3, "none of 20 requests", 20)])
def test_when_it_stops(folder, capsys, how, code, word, requests):
    """Bounded, in one line, without the key; answers so far are kept."""
    server = Server(lambda p: how)
    assert run("conversation", *coco(folder, 25), *asked(server), "--workers", 1,
               "--retries", 2, "--out", folder / "out.json") == code
    said = capsys.readouterr().err
    last = said.strip().split("\n")[-1]
    assert last.startswith("error: ") and word in last and "sk-test" not in said
    time.sleep(.05)                                     # a worker left behind would ask on
    assert requests <= len(server.seen) <= requests + 4 * (how == "400")
    assert not (folder / "out.json").exists()


@pytest.mark.parametrize("how", ["trickle", "hang"])
def test_timeout(folder, how):
    """A byte at a time for ever, or nothing: both end at --timeout; control: 9 s to wait."""
    for timeout in (.2, .5):
        server, start = Server(lambda p: how), time.monotonic()
        assert run("conversation", *coco(folder, 1), *asked(server), "--timeout", timeout,
                   "--retries", 1, "--out", folder / "out.json") == 4
        assert 2 * timeout < time.monotonic() - start < 5 and len(server.seen) == 2


def test_backoff_is_a_function_of_the_seed(folder):
    words = ["conversation", "--toy", 1, "--images", folder, "--out", folder / "o",
             "--endpoint", "http://127.0.0.1:1/v1", "--endpoint-model", "m", "--longest-wait", 9]
    made = [ChatEndpoint(parse([str(w) for w in (*words, "--seed", s)]))
            for s in (0, 0, 1)]
    a, b, c = ([e.backoff("k", i) for i in range(8)] for e in made)
    assert a == b != c and len({*a}) == 8 and a != [made[0].backoff("j", i) for i in range(8)]
    assert all(min(9, 2 ** i) / 2 <= x <= min(9, 2 ** i) for i, x in enumerate(a))


def test_kill_9_and_restart(folder):
    """Killed twice while it writes; then complete, valid, in order, each asked once or twice."""
    server, out = Server(lambda p: {0: "500", 1: "drop"}.get(len(p) * int(p[6:8]) % 7, ""), .03), \
        folder / "o.json"
    words = [sys.executable, "-m", "instruct", "conversation", *coco(folder, 60),
             *asked(server), "--out", out]
    for enough in (5, 25):
        child = subprocess.Popen([str(w) for w in words], stderr=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, cwd=ROOT)
        while child.poll() is None and len(server.seen) < enough * 1.3 + 4:
            time.sleep(.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and not out.exists()
        assert 0 < len(lines(out)) < 60
    journal = Path(f"{out}.answers.jsonl")
    with open(journal, "ab") as file:
        file.write(b'{"key": "torn')                    # a kill in the middle of a write
    assert run(*words[3:]) == 0
    made = data.read_conversations(out)
    assert [r["image"] for r in made] == [f"{i:03}.jpg" for i in range(60)]
    keys = [row["key"] for row in lines(out)]
    assert len(keys) == len({*keys}) == 60
    # control: a line that is whole and damaged is named, not passed over
    journal.write_bytes(b"{}\n" + journal.read_bytes())
    assert run(*words[3:]) == 3


def test_two_at_once(folder, capsys):
    """The second is told so; when the first has ended (its lock gone), it may."""
    words = "detail", "--toy", 2, "--images", folder / "i", "--out", folder / "o.json"
    held = Journal(folder / "o.json")
    assert run(*words) == 2 and "another run" in capsys.readouterr().err
    held.file.close()
    assert run(*words) == run(*words) == 0              # in this process too, no lock is left


def test_limit_grows(folder):
    server, out = Server(), folder / "o.json"
    for limit, total in ((2, 2), (5, 5)):
        run("conversation", *coco(folder), *asked(server), "--out", out, "--limit", limit)
        assert len(rows(out)) == len(server.seen) == total
    run("conversation", *coco(folder), *asked(server), "--out", out, "--estimate")
    assert len(server.seen) == 5                        # an estimate asks nothing


# -------------------------------------------------------------------------------------- answers

@pytest.mark.parametrize("kind, text, reason", [
    ("conversation", GOOD, None), ("conversation", GOOD.replace("\n", "\r\n"), None),
    ("conversation", f"===\n{GOOD}\n===", None), ("conversation", "", "empty"),
    ("conversation", "Question: a\nAnswer: b", "no === blocks"),
    ("conversation", GOOD.replace("Answer", "Reply"), "by turns"),
    ("conversation", GOOD.rsplit("===", 2)[0], "by turns"),
    ("conversation", GOOD.replace("Yes.", " "), "by turns"),
    ("conversation", GOOD.replace("What is it?", ""), "an empty block"),
    ("conversation", GOOD + "</s>", "control token"), ("detail", "A ### cat.", "control token"),
    ("conversation", GOOD + "<image>", "control token"),
    ("conversation", GOOD + "\udfff", "not Unicode"),
    ("conversation", GOOD.replace("Yes.", "The caption says so."), "speaks of captions"),
    ("reasoning", GOOD, "more than one question"),
    ("reasoning", format_qa([("Why?", "For: [0.1, 0.2] it lies.")]), "speaks of captions"),
    ("reasoning", format_qa([("Why?", "Of 0.1, [2], 3 === 3.")]), None),
    ("detail", "A cat. A captain.", None), ("detail", GOOD, "blocks in a description")])
def test_parse(kind, text, reason):
    if reason is None:
        assert parse_reply(kind, text)
        return
    with pytest.raises(data.BadData, match=reason):
        parse_reply(kind, text)


def test_blocks_come_back():
    """Our own examples pass our own parser, and come back as they were."""
    for _, _, talk, told, hard in FEW_SHOT:
        for kind, pairs in (("conversation", talk), ("reasoning", [hard])):
            if pairs:
                turns = parse_reply(kind, format_qa(pairs))
                assert list(zip(turns[::2], turns[1::2])) == list(pairs)
        assert parse_reply("detail", told) == [told]
    # control: boxes in an example would teach them, and be rejected
    with pytest.raises(data.BadData):
        parse_reply("detail", image_context("detail", *FEW_SHOT[0][:2]))


# ------------------------------------------------------------------------------------ toy scenes

@pytest.mark.parametrize("kind", KINDS)
def test_oracle(folder, kind):
    """What the world says loads, encodes, and is true; repeated byte for byte; no captions read."""
    out = folder / f"{kind}.json"
    words = kind, "--toy", 30, "--images", folder / "img", "--split", "test", "--out", out
    assert run(*words) == 0
    made = data.read_conversations(out)
    assert len(made) == 30 and len({r["id"] for r in made}) == 30
    for i, row in enumerate(made):
        ids, labels = data.encode(row["conversations"], "v1", LLAMA)
        assert ids.count(data.IMAGE) == 1 and any(label != data.IGNORE for label in labels)
        scene = make_scene(f"instruct:0:{i}", "test")
        picture = data.load_image(picture_path(folder / "img", row["image"]))
        assert picture.tobytes() == draw(scene).tobytes()
        turns = [t["value"] for t in row["conversations"]]
        assert len(turns) == {"conversation": 8, "detail": 2, "reasoning": 2}[kind]
        if kind == "detail":
            assert turns[1] == description(scene)
            # control: not another scene's
            assert turns[1] != description(make_scene(f"instruct:0:{i + 1}", "test"))
    text = out.read_bytes()
    Path(f"{out}.answers.jsonl").unlink()
    assert run(*words) == 0 and out.read_bytes() == text
    assert run(*words, "--seed", 1) == 0 and out.read_bytes() != text


def test_local_llama_answers(folder, capsys):
    """It was never taught blocks: descriptions pass, conversations are rejected and counted."""
    words = "--toy", 3, "--images", folder, "--llm", TOY / "llama", "--shots", 0, "--batch-size", 2
    assert run("detail", *words, "--out", folder / "d.json", "--max-tokens", 60) == 0
    assert all(r["conversations"][1]["value"] for r in rows(folder / "d.json"))
    capsys.readouterr()
    assert run("conversation", *words, "--out", folder / "c.json", "--max-tokens", 9) == 3
    assert "none of 3 can be used" in capsys.readouterr().err and not (folder / "c.json").exists()
    assert run("detail", *words[:-4], "--out", folder / "e.json") == 3      # examples: too long
    assert "the model's context has 1024" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ bad input

def named(**change):
    return change


BAD = [
    (named(captions__annotations__3__image_id=7), "annotations[3].image_id: there is no image 7"),
    (named(captions__annotations__3__image_id=1.5), "annotations[3].image_id"),
    (named(captions__annotations__3__image_id=True), "annotations[3].image_id"),
    (named(captions__annotations__3__image_id=None), "annotations[3].image_id"),
    (named(captions__images__1__id=100), "images[1].id: 100 is there twice"),
    (named(captions__images__1__id=[1]), "images[1].id"),
    (named(captions__annotations__2__caption=5), "annotations[2].caption"),
    (named(captions__annotations__2__caption=" "), "annotations[2].caption"),
    (named(captions__annotations__2__caption="a\ud800"), "annotations[2].caption"),
    (named(captions__images__1__file_name="/etc/passwd"), "images[1].file_name"),
    (named(captions__images__1__file_name="../captions.json"), "images[1].file_name"),
    (named(captions__images__1__file_name="out.jpg"), "images[1].file_name"),
    (named(captions__images__1__file_name="pipe.jpg"), "images[1].file_name"),
    (named(captions__images__1__file_name="gone.jpg"), "images[1].file_name"),
    (named(captions__images="x"), "images must be a list"),
    (named(captions__annotations=[1]), "annotations must be a list of objects"),
    (named(captions__annotations=[]), "holds no captions"),
    (named(instances__annotations__1__bbox=[1, 2, 3]), "annotations[1].bbox"),
    (named(instances__annotations__1__bbox=[1, 2, -3, 4]), "annotations[1].bbox"),
    (named(instances__annotations__1__bbox=[1, 2, 10 ** 30, 4]), "annotations[1].bbox"),
    (named(instances__annotations__1__bbox=[201, 2, 3, 4]), "annotations[1].bbox: lies outside"),
    (named(instances__annotations__1__category_id=3), "annotations[1].category_id: there is no"),
    (named(captions__images__1__width=0), "images[1].width"),
    (named(captions__images__1__height="100"), "images[1].height"),
]


@pytest.mark.parametrize("change, word", BAD)
def test_bad_rows_are_named(folder, capsys, change, word):
    """Before anything is asked or opened; the control is the same file without the change."""
    server, opened = Server(), []
    words = ["detail", *coco(folder, **change), *asked(server), "--out", folder / "o.json"]
    (folder / "img/out.jpg").symlink_to(folder / "captions.json")
    os.mkfifo(folder / "img/pipe.jpg")
    start, watching = time.process_time(), True
    sys.addaudithook(lambda event, args: watching and event == "open" and opened.append(args[0]))
    try:
        assert run(*words) == 3
    finally:
        watching = False
    said = capsys.readouterr().err
    said = [line for line in said.split("\n") if "pictures: those" not in line]
    assert len(said) == 2 and word in said[0], said
    assert time.process_time() - start < 1 and not server.seen
    assert {Path(p).name for p in opened if str(p).startswith(str(folder))} <= {
        "captions.json", "instances.json", "o.json.answers.jsonl"}


@pytest.mark.parametrize("text, word", [
    (b"[" * 100_000, "recursion"), (b'{"images": NaN}', "NaN"), (b"\xff\xfe{", "utf-8"),
    (b'{"images": ' + b"9" * 5000 + b"}", "digits"), (b"", "unreadable"), (None, "no such file"),
    (b'{"images": [], "annotations": []}', "holds no captions")])
def test_bad_files(folder, capsys, text, word):
    words = coco(folder)
    (folder / "captions.json").unlink()
    if text is not None:
        (folder / "captions.json").write_bytes(text)
    start = time.process_time()
    assert run("detail", *words, "--llm", "none", "--out", folder / "o.json") == 3
    assert word in capsys.readouterr().err and time.process_time() - start < 1


def test_infinity_huge_files_and_good_ones(folder, capsys):
    words = coco(folder)
    captions, boxes = folder / "captions.json", folder / "instances.json"
    good = boxes.read_text()
    boxes.write_text(good.replace("89.5", "1e999", 1))          # parsed as infinity
    assert run("detail", *words, "--llm", "none", "--out", folder / "o.json") == 3
    assert "annotations[0].bbox" in capsys.readouterr().err
    boxes.write_bytes(b"\xef\xbb\xbf" + good.replace(",", ",\r\n").encode())      # BOM and CRLF
    server = Server()
    assert run("conversation", *words, *asked(server), "--out", folder / "o.json") == 0
    assert run("detail", *words, *asked(server, "--estimate"), "--out", folder / "o.json") == 0
    with open(captions, "r+b") as file:
        file.truncate(3_000_000_000)                            # a hole: no disk is used
    assert run("detail", *words, "--llm", "none", "--out", folder / "o.json") == 3
    assert "at most 2,000,000,000" in capsys.readouterr().err


@pytest.mark.parametrize("words, word", [
    ("detail --toy 3 --images i --out no/where", "--out"), ("detail --images i --out o", "--toy N"),
    ("detail --toy 0 --images i --out o", "--toy"), ("caption photos --out o", "--model"),
    ("detail --captions c --images i --out o", "who answers"),
    ("detail --captions c --images i --out o --llm m", "--instances"),
    ("detail --toy 3 --images i --out o --endpoint file:///etc --endpoint-model m", "https://"),
    ("detail --toy 3 --images i --out o --endpoint https://u@h/v1 --endpoint-model m", "https://"),
    ("detail --toy 3 --images i --out o --endpoint https://h/v1", "--endpoint-model"),
    ("detail --toy 3 --images i --out o --endpoint http://h/v1 --endpoint-model m", "use https"),
    ("detail --toy 3 --images i --out o --temperature nan", "--temperature")])
def test_usage(folder, capsys, monkeypatch, words, word):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2 and word in capsys.readouterr().err.split("error:")[1]


def test_help_without_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "instruct", "curate",
                           "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--min-words" in done.stdout and " torch" not in done.stderr
    assert " argparse" in done.stderr                   # the control: imports are listed


# ------------------------------------------------------------------------------------- curation

@pytest.mark.parametrize("text, mended, taken", [
    ("A cat sits. A cat sits. It is grey.", "A cat sits. It is grey.", "repeated sentences"),
    ("A cat sits. a cat, sits! It is grey.", "A cat sits. It is grey.", "repeated sentences"),
    ("A cat sits. A cat stands.", "A cat sits. A cat stands.", None),
    ("A cat sits. It has a long", "A cat sits.", "fragments"),
    ("A cat sits. Grey. It naps.", "A cat sits. It naps.", "fragments"),
    ('A sign says "Stop here!" It is red.', 'A sign says "Stop here!" It is red.', None),
    ("A cat sits. 1 2 3 4 5 6 a. It naps.", "A cat sits. It naps.", "not English letters"),
    ("A cat sits. Это кошка. It naps.", "A cat sits. It naps.", "not English letters"),
    ("A café has 12 tables.", "A café has 12 tables.", None),
    ("A cat ######## sits.", "A cat sits.", "runs of signs"),
    ("A cat sits. ### Human sits.", "A cat sits. Human sits.", "runs of signs"),
    ("A cat\ufffd sits.", "A cat sits.", "runs of signs"),
    ("A cat... sits there.", "A cat... sits there.", None),
    ("Mr. Smith sits.", "Smith sits.", "fragments")])
def test_repair(text, mended, taken):
    """The last row is what the rules get wrong: they know no abbreviations."""
    got, out = repair_by_rules(text)
    assert got == mended and list(out) == ([taken] if taken else [])
    assert repair_by_rules(got) == (got, Counter())


@pytest.mark.parametrize("said, reason", [
    ("A cat sits on a mat.", ""), ("I'm sorry, I made a mistake. A cat sits on a mat.", "apology"),
    ("I’m so sorry. A cat sits on the mat.", "apology"),
    ("A cat sits on a mat. I apologize for the", "apology"),
    ("A child in a sorry state sits on a mat.", ""), ("A cat and", "nothing left"),
    ("A cat sits.", "fewer than 5 words"), ("A cat </s> sits on a mat.", "control token")])
def test_keep_or_drop(said, reason):
    if not reason:
        assert repaired_or_reject(said, 5)[0] == said
        return
    with pytest.raises(data.BadData, match=reason):
        repaired_or_reject(said, 5)


def descriptions(path, *texts):
    path.write_text(json.dumps([{"id": i, "image": f"{i}.png", "conversations": [
        {"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": text}]}
        for i, text in enumerate(texts)]))
    return path


def test_curate_a_file(folder, capsys):
    source = descriptions(folder / "in.json", "A cat sits on a mat. A cat sits on a mat. It",
                          "I am sorry, I made a mistake.", "A dog runs over a green lawn.", "Dog.")
    assert run("curate", source, "--out", folder / "o.json") == 0
    made, said = data.read_conversations(folder / "o.json"), capsys.readouterr().out
    assert [r["conversations"][1]["value"] for r in made] == [
        "A cat sits on a mat.", "A dog runs over a green lawn."]
    assert all(x in said for x in ("1 repeated sentences", "2 of 4 kept, 50.0%", "1 an apology"))
    assert [(r["id"], r["reason"]) for r in rows(folder / "o.json.dropped.json")] == [
        ("1", "an apology"), ("3", "nothing left")]


def test_curate_through_an_endpoint(folder, capsys):
    """What it sends back is judged by the rules as well; texts are asked once."""
    source = descriptions(folder / "in.json", *(f"text {i} is about a cat." for i in range(14)))
    server = Server(fault_of)
    for _ in range(2):
        assert run("curate", source, *asked(server), "--out", folder / "o.json") == 0
    made, said = rows(folder / "o.json"), capsys.readouterr().out
    assert len(made) == 9 and "9 of 14 kept" in said
    assert "refused by the endpoint" in said and "0 requests" not in said
    assert "1 requests to m (13 answered already)" in said


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """A model whose bridge was never trained: it says something about each picture, untrue."""
    folder = tmp_path_factory.mktemp("seer")
    new_vlm(TOY / "clip", TOY / "llama", seed=1).save_pretrained(folder)
    return folder


def photos(folder, n):
    (folder / "in/deep").mkdir(parents=True, exist_ok=True)
    for i in range(n):
        draw(make_scene(i)).save(folder / f"in/{'deep/' * (i % 2)}{i}.png")
    return folder / "in"


def test_caption_goes_on_after_kill_9(folder, seer, capsys):
    source, out = photos(folder, 12), folder / "o.json"
    (source / "broken.png").write_bytes(b"\x89PNG no")
    (source / "link.png").symlink_to(ROOT / "tests/scene.png")
    (source / os.fsdecode(b"\xff.png")).write_bytes((source / "0.png").read_bytes())
    words = ["caption", source, "--model", seer, "--max-tokens", 150, "--batch-size", 2]
    child = subprocess.Popen([str(w) for w in (sys.executable, "-m", "instruct", *words,
                                               "--out", out)], stderr=subprocess.DEVNULL,
                             cwd=ROOT)
    journal = Path(f"{out}.answers.jsonl")
    while child.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = journal.read_bytes()
    assert 0 < had.count(b"\n") < 15
    journal.write_bytes(had[:-5])                       # and its last line was torn
    assert run(*words, "--out", out) == 0
    said = capsys.readouterr()
    assert "12 of 15 kept, 80.0%; dropped: 3 not a usable picture" in said.out
    assert "leads outside" in said.err
    made = data.read_conversations(out)
    assert [r["image"] for r in made] == sorted(p.relative_to(source).as_posix() for p in
                                                source.rglob("*.png")
                                                if p.name[0].isdigit())
    assert len({row["key"] for row in lines(out)}) == len(lines(out)) == 15
    # the same to the byte as an undisturbed run; control: other pictures, other words
    assert run(*words, "--out", folder / "whole.json") == 0
    assert (folder / "whole.json").read_bytes() == out.read_bytes()
    assert len({r["conversations"][1]["value"] for r in made}) > 1


def test_caption_asks_anew_what_changed(folder, seer, monkeypatch, capsys):
    """A model trained again, another picture; control: nothing changed, nothing is generated."""
    source, out, calls = photos(folder, 3), folder / "o.json", []
    real = answerers.generate_batch
    monkeypatch.setattr(answerers, "generate_batch", lambda model, prompts, *rest, **settings:
                        calls.append(len(prompts)) or real(model, prompts, *rest, **settings))
    words = "caption", source, "--model", seer, "--out", out
    assert run(*words) == run(*words) == 0 and calls == [3]
    (source / "0.png").write_bytes((ROOT / "tests/scene.png").read_bytes())
    assert run(*words) == 0 and calls == [3, 3] and len(lines(out)) == 4        # a chunk of three
    os.utime(seer / "model.safetensors")
    assert run(*words) == 0 and calls == [3, 3, 3] and len(lines(out)) == 7 and len(rows(out)) == 3
    capsys.readouterr()
    assert run(*words, "--max-tokens", 5) == 3
    assert "none of 3 can be used (3 cut off)" in capsys.readouterr().err and len(rows(out)) == 3


def test_curate_asks_the_brief_to_go_on(folder, seer, monkeypatch, capsys):
    """At most 80 tokens: the question, the answer and "Continue" go in; control: --short 0."""
    source, seen = photos(folder, 2), []
    real = answerers.build_prompt
    monkeypatch.setattr(answerers, "build_prompt", lambda turns, *rest: seen.append(turns) or real(
        turns, *rest))
    words = "curate", source, "--model", seer, "--max-tokens", 30, "--min-words", 1
    for short, more in ((80, 2), (0, 0)):
        seen.clear()
        assert run(*words, "--short", short, "--out", folder / f"{short}.json") in (0, 3)
        assert [len(t) for t in seen] == [1, 1] + [3] * more
        assert all(t[2] == CONTINUE_PROMPT for t in seen[2:])
    said = {short: {row["id"]: row["text"] for row in lines(folder / f"{short}.json")}
            for short in (80, 0)}
    assert all(long.startswith(said[0][i]) for i, long in said[80].items())


def test_captioners_are_not_asked_to_go_on(folder, seer, monkeypatch):
    """They hear no question, so "Continue" would bring the same caption again; control above."""
    source, seen = photos(folder, 2), []
    real, load = answerers.build_prompt, answerers.load_model

    def loaded(args):
        model = load(args)
        model.template = "minigpt4_caption"
        return model
    monkeypatch.setattr(answerers, "load_model", loaded)
    monkeypatch.setattr(answerers, "build_prompt", lambda turns, *rest: seen.append(turns) or real(
        turns, *rest))
    run("curate", source, "--model", seer, "--max-tokens", 30, "--out", folder / "o.json")
    assert [len(t) for t in seen] == [1, 1]


def test_a_caption_that_fills_the_context_is_no_caption(folder, seer, monkeypatch, capsys):
    """It broke off there, as it would at --max-tokens; control: the context it was made for."""
    source, load = photos(folder, 2), answerers.load_model
    words = "caption", source, "--model", seer, "--max-tokens", 512, "--out"
    assert run(*words, folder / "whole.json") == 0

    def narrow(args):
        model = load(args)
        config = model.llm.config
        model.llm.config = dataclasses.replace(config, context=model.patches + 60)
        return model
    monkeypatch.setattr(answerers, "load_model", narrow)
    run(*words, folder / "cut.json")
    lost = [row.get("reject") for row in lines(folder / "cut.json")]
    assert "cut off" in lost
    assert not any(row.get("reject") for row in lines(folder / "whole.json"))


def test_a_caption_with_a_control_token_is_dropped():
    """A written </s> would be learned as an end in the middle of a sentence."""
    args = SimpleNamespace(what="caption", prompt="Describe it.")
    assert to_turns(args, "x", "A sign.", {}) == ["Describe it.", "A sign."]
    with pytest.raises(data.BadData, match="control token"):
        to_turns(args, "x", "A sign. </s> USER: hi", {})


def test_another_endpoint_is_another_author(folder, monkeypatch):
    """Local servers call every model "default"."""
    words, keys = coco(folder, 2), []
    monkeypatch.setattr(answerers, "ask_endpoint", lambda args, jobs, journal: keys.append(
        [job.key for job in jobs]))
    for url in ("http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1", "http://127.0.0.1:1/v1"):
        run("conversation", *words, "--endpoint", url, "--endpoint-model", "default",
            "--out", folder / "o.json")
    assert keys[0] == keys[2] != keys[1] and len(keys[0]) == 2


def test_final_file_is_whole_or_not_there(folder, monkeypatch):
    """A disk that fills while OUT is written leaves the old OUT, and every answer."""
    words = "detail", "--toy", 3, "--images", folder / "i", "--out", folder / "o.json"
    assert run(*words) == 0
    old = (folder / "o.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(files, "fsync_path", full)
        assert run(*words[:2], 5, *words[3:]) == 3
    assert (folder / "o.json").read_bytes() == old and len(lines(folder / "o.json")) == 5
    assert run(*words[:2], 5, *words[3:]) == 0 and len(rows(folder / "o.json")) == 5
