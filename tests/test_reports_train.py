"""Samples of several pictures, samples that teach nothing, bad samples, and early ends of a run."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import (HERE, flags, here, lines, parts, refused, run, server, sha,  # noqa: F401
                        unchanged_process)
from tiny import loaded

import data
import train
from toy.world import SIDE
from train import parse_args as parse
from trainer.build import new_vlm
from trainer.lengths import sample_lengths
from trainer.loader import Samples
from trainer.run_folder import Run


def talk(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def album(tmp_path):
    """write(rows): a data file, and the flags that name it; pictures 0.png to 7.png are there."""
    dice = random.Random(0)
    for i in range(8):
        small = Image.new("RGB", (8, 8))
        small.putdata([tuple(dice.randrange(256) for _ in range(3)) for _ in range(64)])
        small.resize((64, 64)).save(tmp_path / f"{i}.png")

    def write(rows, name="album.json"):
        (tmp_path / name).write_text(json.dumps(rows))
        return ["--data", tmp_path / name, "--images", tmp_path]
    return write


def seen(i, image=None, answer="A plain colour."):
    return {"id": str(i), "image": image or f"{i}.png",
            "conversations": talk("What is it?\n<image>", answer)}


def text(i, answer="Yes."):
    return {"id": f"text {i}", "conversations": talk("Say yes", answer)}


def eight(**changed):
    """Eight samples with pictures; changed: {"s3": row} for sample 3."""
    return [changed.get(f"s{i}", seen(i)) for i in range(8)]


# ---------------------------------------------------------------------------- several pictures

TWO = {"id": "two", "image": ["0.png", "1.png"], "conversations": talk(
    "Here <image> and there <image>: which is darker?", "The first one.")}


def test_two_pictures_have_the_loss_of_transformers(flags, run, album, parts, tmp_path):
    """The pixels of both are spliced, in the order of the marks."""
    from transformers import LlavaForConditionalGeneration
    new_vlm(parts / "clip", parts / "llama").save_pretrained(tmp_path / "start")
    theirs = loaded(LlavaForConditionalGeneration, tmp_path / "start")
    words = data.Tokenizer(tmp_path / "start")
    image, places = words.added("<image>"), (SIDE // 16) ** 2

    def official(names):
        ids, labels = data.encode(TWO["conversations"], "v1", words, 2)
        wide = [([image] * places, [data.IGNORE] * places) if i == data.IMAGE else ([i], [label])
                for i, label in zip(ids, labels)]
        row, target = ([x for pair in wide for x in pair[k]] for k in (0, 1))
        pixels = torch.cat([data.preprocess(Image.open(tmp_path / name), SIDE, "pad")
                            for name in names])
        with torch.no_grad():
            return float(theirs(input_ids=torch.tensor([row]), labels=torch.tensor([target]),
                                pixel_values=pixels).loss)
    assert sum(i == data.IMAGE for i in data.encode(TWO["conversations"], "v1", words, 2)[0]) == 2
    right, wrong = official(TWO["image"]), official(TWO["image"][::-1])
    assert abs(right - wrong) > 1e-4                        # the order can be seen
    for way in ((), ("--pack", 400)):
        out = tmp_path / f"run{len(way)}"
        result = run(flags(out, *album([TWO, TWO]), "--from", tmp_path / "start", "--dtype", "fp32",
                           *way, steps=2, lone=False))
        assert result.code == 0, result.err
        assert lines(out / "metrics.jsonl")[0]["loss"] == pytest.approx(right, abs=2e-5)


def test_every_picture_is_counted(flags, run, album, parts, tmp_path):
    given = album([TWO, TWO])
    job = train.vlm_job(parse(flags(tmp_path / "a", *given)), tmp_path, "cpu")
    (micro,) = job.batches(0)
    places, length = job.batches.num_image_tokens, len(job.batches.text(0)[0])
    assert micro.pixels.shape[0] == 4 and [c[2] for c in micro.counts] == [2, 2]
    assert job.batches.size(job.batches.text(0)[0]) == length - 2 + 2 * places
    assert job.count_flops(micro)[0] == 2 * (length - 2 + 2 * places)          # tokens of the log
    size = length - 2 + 2 * places
    assert run(flags(tmp_path / "b", *given, "--pack", size, steps=2)).code == 0
    refused(run(flags(tmp_path / "c", *given, "--pack", size - 1, steps=2)), 3, f"{size:,} tokens",
            "--pack")
    shown = run(flags(None, *given, "--show-batch", 1))
    assert shown.code == 0 and "2 pictures" in shown.out and shown.out.count("<image>") == 2
    args = parse(flags(None, *given))
    assert sample_lengths(args)[1][0][3] == 2                           # the forecast's
    words = Samples(parse(flags(None, *album([TWO, text(1)])))).rows.words
    assert [n > 0 for n in words] == [True, False]                      # the order's


def test_a_picture_too_few_is_refused(flags, run, album, tmp_path):
    broken = {**TWO, "image": ["0.png", "1.png", "2.png"]}
    refused(run(flags(tmp_path / "run", *album([TWO, broken, TWO]))), 3, "row 2", "3 pictures", "2")


# ------------------------------------------------------------------------- nothing to learn

def test_samples_that_teach_nothing_are_counted_and_named(flags, run, album, tmp_path):
    """7 of 8, each once in two epochs, whoever makes the micro-batches."""
    rows = [seen(0)] + [seen(i, answer="") for i in range(1, 8)]
    made = set()
    for workers in (0, 2):
        out = tmp_path / f"run{workers}"
        result = run(flags(out, *album(rows), "--batch", 8, "--workers", workers, steps=2))
        assert result.code == 0
        found = lines(out / "nothing_to_learn.jsonl")
        assert sorted(x["sample"] for x in found) == list(range(1, 8))
        assert {x["step"] for x in found} == {1} and all("sample" in x["why"] for x in found)
        (line,) = [x for x in result.err.splitlines() if "taught nothing" in x]
        assert "taught nothing: 7 (" in line and "sample " in line and str(out) in line
        made.add(sha(out))
    assert len(made) == 1
    full = run(flags(tmp_path / "full", *album(eight()), "--batch", 8, steps=2))
    assert "taught nothing" not in full.err                             # the control
    assert not (tmp_path / "full/nothing_to_learn.jsonl").exists()


def test_the_count_is_exact_after_a_kill(flags, run, album, tmp_path):
    rows = [seen(i, answer="" if i in (1, 3, 6) else "Red.") for i in range(8)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = *album(rows), "--seed", 1, "--batch", 4
    assert run(flags(whole, *more)).code == 0
    assert run(flags(cut, *more), signal=(2, signal.SIGTERM)).code == 143
    with open(cut / "nothing_to_learn.jsonl", "a") as f:                # as if killed in step 4
        f.write(json.dumps({"step": 5, "sample": 0, "where": "", "why": "x"}) + '\n{"step": 6, "w')
    result = run(flags(cut, *more, "--resume", "auto"))
    assert result.code == 0 and "taught nothing: 3 (" in result.err
    assert lines(cut / "nothing_to_learn.jsonl") == lines(whole / "nothing_to_learn.jsonl")
    assert sha(cut) == sha(whole)


@pytest.mark.parametrize("more, rows, words", [
    (("--max-length", 52), [seen(0), seen(1)], "--max-length 52"),
    (("--official-quirks",), [text(0, "say </s> now"), text(1, "a </s> b")], "--official-quirks"),
    ((), [text(0, ""), text(1, "")], "answer")], ids=["cut", "masked", "empty"])
def test_an_empty_step_names_its_cause(flags, run, album, tmp_path, more, rows, words):
    result = run(flags(tmp_path / "run", *album(rows), *more))
    refused(result, 3, "nothing to train on", words)
    others = {"--max-length", "--official-quirks"} - {more[0] if more else ""}
    assert not any(flag in result.err for flag in others)


def test_a_row_too_short_for_all_is_named(flags, run, album, tmp_path):
    refused(run(flags(tmp_path / "run", *album([seen(0), seen(1)]), "--pack", 20)), 3, "--pack 20")
    refused(run(flags(tmp_path / "skip", *album([seen(0), seen(1)]), "--pack", 20,
                      "--on-bad-sample", "skip")), 3, "--pack 20", "not one")


# ------------------------------------------------------------------------------ bad samples

SKIP = "--on-bad-sample", "skip"
BAD_SHAPES = {
    "image null": {"id": "x", "image": None, "conversations": talk("<image>\nQ", "A")},
    "null answer": {"id": "x", "conversations": [{"from": "human", "value": "Q"},
                                                 {"from": "gpt", "value": None}]},
    "a foreign part": {"id": "x", "messages": [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
        {"role": "assistant", "content": "A"}]},
    "a tool's turn": {"id": "x", "conversations": [{"from": "tool", "value": "Q"}]},
    "no turns": {"id": "x"}, "a number": 7, "no mark": {**seen(1), "conversations": talk("Q", "A")},
    "speakers": {"id": "x", "conversations": talk("Q", "A") + talk("Q", "A")[1:]}}


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_a_row_of_a_bad_shape_is_refused_at_the_start_or_left_out(flags, run, album, tmp_path,
                                                                  shape):
    """It is row 8, which a run of one step of two may never meet."""
    rows = eight(s7=BAD_SHAPES[shape])
    refused(run(flags(tmp_path / "run", *album(rows), steps=1)), 3, "row 8", "1 of 8",
            "--on-bad-sample skip")
    assert not (tmp_path / "run/config.json").exists()
    result = run(flags(tmp_path / "skip", *album(rows), *SKIP, "--batch", 4, steps=2))
    assert result.code == 0, result.err
    (told,) = lines(tmp_path / "skip/bad_samples.jsonl")
    assert told["step"] == 0 and told["sample"] == 7 and "row 8" in told["where"]
    assert "left out as bad: 1 (" in result.err


def test_the_first_few_bad_rows_are_named_and_all_are_counted(flags, run, album, tmp_path):
    rows = [BAD_SHAPES["null answer"]] * 5 + eight()
    result = run(flags(tmp_path / "run", *album(rows)))
    refused(result, 3, "5 of 13", "row 1", "row 3", "2 more")
    assert "row 4" not in result.err


GONE = dict(s3=seen(3, "gone.png"))


@pytest.mark.parametrize("more", [("--batch", 4, "--accum", 4), ("--batch", 4, "--accum", 2),
                                  ("--batch", 1), ("--batch", 4, "--pack", 70),
                                  ("--batch", 8, "--workers", 2, "--pack", 70)],
                         ids=["alone in its micro-batch", "beside another", "alone in its step",
                              "alone in its row", "workers"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8"])
def test_a_bad_picture_is_passed_over_wherever_it_stands(flags, run, album, tmp_path, more,
                                                         optimizer):
    argv = flags(tmp_path / "run", *album(eight(**GONE)), *more, *SKIP, "--clip", 0,
                 "--optimizer", optimizer, steps=8)
    result = run(argv)
    assert result.code == 0, result.err
    (told,) = lines(tmp_path / "run/bad_samples.jsonl")
    assert told["sample"] == 3 and "gone.png" in told["why"]
    losses = [x["loss"] for x in lines(tmp_path / "run/metrics.jsonl")]
    assert [x is None for x in losses].count(True) == (more == ("--batch", 1))
    assert all(x > 1 for x in losses if x is not None)
    assert (tmp_path / "run/loss.png").exists()
    for path in (tmp_path / "run/model").glob("*.safetensors"):
        assert all(t.isfinite().all() for t in data.load_weights(path).values())


def test_a_step_without_a_usable_sample_moves_nothing(flags, album, tmp_path):
    """Not even by AdamW's momentum; the rate goes on falling. With a picture it does move."""
    for number, (rows, still) in enumerate(((eight(**GONE), True), (eight(), False))):
        out = tmp_path / str(number)
        out.mkdir()
        more = *album(rows), *SKIP, "--batch", 1, "--warmup", 0
        args = parse(flags(out, *more, steps=8))
        at = [Samples(args).number(i) for i in range(8)].index(3)
        job = train.vlm_job(args, out, "cpu")
        kept, real = {}, job.batches

        def batches(step):
            kept[step] = [p.detach().clone() for p in job.trained().values()]
            return real(step)
        job.batches = batches
        assert train.train_loop(job, Run(out, args)) == 0
        kept[8] = [p.detach().clone() for p in job.trained().values()]
        same = [all(map(torch.equal, kept[i], kept[i + 1])) for i in range(8)]
        assert same[at] == still and not any(same[:at] + same[at + 1:])


def test_most_bad_counts_samples_and_not_visits(flags, run, album, tmp_path):
    rows = eight(s3=seen(3, "gone.png"), s5=seen(5, "lost.png"), s6=BAD_SHAPES["image null"])
    more = *album(rows), *SKIP, "--batch", 8
    result = run(flags(tmp_path / "a", *more, "--most-bad", 3, steps=4))
    assert result.code == 0 and len(lines(tmp_path / "a/bad_samples.jsonl")) == 3
    refused(run(flags(tmp_path / "b", *more, "--most-bad", 2, steps=4)), 3, "--most-bad 2")
    refused(run(flags(tmp_path / "c", *more, "--most-bad", 0, steps=4)), 3, "--most-bad 0")
    assert run(flags(tmp_path / "d", *more, "--most-bad", 3, steps=4),
               signal=(2, signal.SIGTERM)).code == 143
    assert run(flags(tmp_path / "d", *more, "--most-bad", 3, "--resume", "auto", steps=4)).code == 0
    assert lines(tmp_path / "d/bad_samples.jsonl") == lines(tmp_path / "a/bad_samples.jsonl")
    assert sha(tmp_path / "a") == sha(tmp_path / "d")


def test_a_file_of_bad_samples_alone_is_refused(flags, run, album, tmp_path):
    rows = [seen(i, "gone.png") for i in range(8)]
    refused(run(flags(tmp_path / "run", *album(rows), *SKIP, "--batch", 4, steps=9)), 3, "not one")


def stopped_at_two(flags, run, album, tmp_path, rows, *more):
    """A run of batches of 2 that was stopped after two steps; the order of its samples."""
    out = tmp_path / "run"
    argv = flags(out, *album(rows), *more, steps=4)
    order = [Samples(parse(argv)).number(i) for i in range(8)]
    assert run(argv, signal=(1, signal.SIGTERM)).code == 143
    return out, order


@pytest.mark.parametrize("order", ["shuffled", "modality"])
def test_a_corrected_row_does_not_forbid_to_go_on(flags, run, album, tmp_path, order):
    rows = eight(s3=BAD_SHAPES["image null"], s6=text(6))
    more = *SKIP, "--order", order
    out, before = stopped_at_two(flags, run, album, tmp_path, rows, *more)
    fixed = eight(s3=seen(3, answer="Red and green and blue and much longer than it was."),
                  s6=text(6))
    argv = flags(out, *album(fixed), "--order", order, "--resume", "auto", steps=4)
    result = run(argv)
    assert result.code == 0, result.err
    assert not lines(out / "bad_samples.jsonl")         # it is bad no more
    # written otherwise is not changed
    (tmp_path / "album.json").write_text(json.dumps(fixed, indent=3))
    assert run(argv).code == 0


def test_rows_that_were_used_must_stay(flags, run, album, tmp_path):
    out, order = stopped_at_two(flags, run, album, tmp_path, eight())
    on = lambda rows: run(flags(out, *album(rows), "--resume", "auto", steps=4))
    used, free = order[1], order[7]
    result = on(eight(**{f"s{used}": seen(used, answer="Changed.")}))
    refused(result, 3, f"row {used + 1}", f"sample {used}", "another --data file", "--overwrite")
    result = on(eight(**{f"s{used}": seen(used, image=f"{free}.png")}))
    refused(result, 3, f"row {used + 1}", "another --data file")
    refused(on(eight() + [seen(0)]), 3, "another --data file", "9", "8")
    result = on(eight(**{f"s{free}": seen(free, answer="Changed.")}))
    assert result.code == 0, result.err


# ------------------------------------------------------------------------------ many ranks

def torchrun(argv):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         HERE / "train.py", *argv], capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


def test_two_ranks_pass_over_what_one_does(flags, run, album, tmp_path):
    """Micro-batches, and a whole step, in which nobody is left, on either rank."""
    rows = eight(s1=seen(1, "gone.png"), s2=seen(2, "gone.png"), s4=seen(4, answer=""),
                 s5=BAD_SHAPES["image null"], s6=text(6))
    more = *album(rows), *SKIP, "--accum", 1, "--dtype", "fp32", "--optimizer", "adamw"
    one, two = tmp_path / "one", tmp_path / "two"
    for seed in range(99):                              # an order with a step of bad samples alone
        argv = flags(one, *more, "--seed", seed, steps=8)
        samples = Samples(parse(argv))
        steps = [{samples.number(i) for i in (2 * s, 2 * s + 1)} for s in range(4)]
        if {1, 2} in steps and any(len(s & {1, 2, 4, 5}) == 1 for s in steps):
            break
    assert {1, 2} in steps
    assert run(argv).code == 0
    code, said = torchrun(flags(two, *more, "--seed", seed, steps=8))
    assert code == 0, said
    for name in ("bad_samples.jsonl", "nothing_to_learn.jsonl"):
        key = lambda x: (x["step"], x["sample"])
        assert sorted(lines(one / name), key=key) == sorted(lines(two / name), key=key), name
    a, b = ([x["loss"] for x in lines(out / "metrics.jsonl")] for out in (one, two))
    assert [x is None for x in a] == [x is None for x in b] and None in a
    assert said.count("left out as bad: 3 (") == 1
    refusal = torchrun(flags(tmp_path / "three", *more, "--most-bad", 1, "--seed", seed, steps=8))
    assert refusal[0] and "--most-bad 1" in refusal[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_leaves_without_pythons_own_end(ranks):
    """At that end gloo's threads may abort the process. Alone it ends as every program does."""
    code = ("import atexit, sys; from trainer.distributed import leave; "
            "atexit.register(print, 'its own end'); sys.stdout.write('said '); leave(3)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "WORLD_SIZE": str(ranks)})
    assert (done.returncode, done.stdout) == (3, "said its own end\n" if ranks == 1 else "said ")


# ------------------------------------------------------------------- early ends, and workers

def program(argv):
    return subprocess.run([sys.executable, HERE / "train.py", *argv], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_no_traceback_follows_an_early_end_with_workers(flags, album, tmp_path):
    rows = eight(s3=seen(3, "gone.png"))
    done = program(flags(tmp_path / "a", *album(rows), "--workers", 2, steps=9))
    assert done.returncode == 3 and "gone.png" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags(
        tmp_path / "b", *album(eight()), "--workers", 2, steps=10 ** 5)], text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log = tmp_path / "b/metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 1:
            break
        time.sleep(.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in said, said


LOOKS = """
import json, os, re, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import train
from trainer.loader import Samples

def own():
    found = open("/proc/self/smaps_rollup").read()
    return 1024 * sum(map(int, re.findall(r"Private_\\w+: +(\\d+)", found)))

class Looker(torch.utils.data.Dataset):
    samples = Samples(train.parse_args(json.loads(sys.argv[2])))

    def __getitem__(self, many):
        before = own()
        seen = sum(len(self.samples.read(i)[1]) for i in range(many))
        return seen, own() - before

loader = torch.utils.data.DataLoader(Looker(), batch_size=None, sampler=[int(sys.argv[3])],
                                     num_workers=1, multiprocessing_context="fork")
print(json.dumps(next(iter(loader))))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_workers_share_the_file(flags, tmp_path):
    """A worker that has looked at every row has far less to itself than the file is long."""
    rows = [text(i, "word " * 40 + str(i)) for i in range(40_000)]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    size = os.path.getsize(tmp_path / "long.json")
    argv = flags(None, "--data", tmp_path / "long.json")
    done = subprocess.run([sys.executable, "-c", LOOKS, HERE, json.dumps(argv), str(len(rows))],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seen, grown = json.loads(done.stdout)
    assert seen == 2 * len(rows) and size > 8e6
    assert grown < size / 3, (grown, size)


@pytest.mark.parametrize("own", [False, True])
def test_nan_is_named_as_the_log_counts(flags, run, album, tmp_path, own):
    """The log has steps 1, 2 and 3; the one that fails is step 4."""
    out = tmp_path / "run"
    argv = flags(out, *(album(eight()) if own else ()))
    refused(run(argv, nan=3), 1, "step 4", "nan")
    assert [x["step"] for x in lines(out / "metrics.jsonl")] == [1, 2, 3]
    (path,) = out.glob("nan-step-*.json")
    told = json.loads(path.read_text())
    assert path.name == "nan-step-4.json" and told["step"] == 4
    samples = Samples(parse(argv))
    ids = [str(samples.number(i)) for i in (6, 7)]
    assert told["samples"] == (ids if own else [6, 7])


# ------------------------------------------------------------------------------ --show-batch

@pytest.mark.parametrize("rows, more", [
    (eight(s2={**seen(2), "conversations": talk("No mark", "A")}), ()),
    (eight(s2=BAD_SHAPES["null answer"]), ()),
    (eight(**{f"s{i}": seen(i, "gone.png") for i in range(8)}), ()),
    (eight(), ("--pack", 20)), (eight(), ("--max-length", 3)),
    (eight(), ("--train", "nobody"))], ids=["no mark", "shape", "picture", "pack", "cut", "part"])
def test_show_batch_refuses_what_training_refuses(flags, run, album, tmp_path, rows, more):
    argv = lambda *rest: flags(tmp_path / "run", *album(rows), *more, *rest)
    trained, shown = run(argv()), run(argv("--show-batch", 8))
    refused(shown, trained.code)
    assert trained.code in (2, 3)
    assert shown.err.splitlines()[-1] == trained.err.splitlines()[-1]


def test_show_batch_says_what_is_left_out(flags, run, album):
    rows = eight(s2=seen(2, "gone.png"), s4=BAD_SHAPES["null answer"], s5=seen(5, answer=""))
    shown = run(flags(None, *album(rows), *SKIP, "--show-batch", 8))
    assert shown.code == 0
    assert shown.out.count("left out") == 2 and shown.out.count("teaches nothing") == 1
