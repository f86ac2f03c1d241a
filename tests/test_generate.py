"""generate.py: cache, batch, sampler and beams against slow and obvious versions."""
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import clip
import data
import generate as g
import llama
import projector
from tiny import shaken
from decoding.beam import beam_search
from decoding.caption_journal import files_of_model
from decoding.chat import trim_history
from decoding.flags import parse, prompt_error
from decoding.pictures import load_picture
from decoding.stopping import stop_ids, Stops
from formats.errors import UsageError, UserError, exit_status
from formats.pictures import FORMATS

ROOT = Path(__file__).parents[1]
TONGUE = dict(width=32, depth=2, heads=4, kv_heads=2, mlp=48)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer in LLaMA's layout: three specials, 256 bytes, then characters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁",
              *map(chr, range(33, 127)), "▁A", "▁U"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [*enumerate(tokens[:3]), *enumerate(("<image>", "<pad>"), len(tokens))]
    spec = {"version": "1.0", "normalizer": None,
            "added_tokens": [{"id": i, "content": t, "special": True, **flags} for i, t in special],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                              "split": False},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                      "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": [["▁", "A"], ["▁", "U"]]}}
    folder = tmp_path_factory.mktemp("words")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    return data.Tokenizer(folder)


@pytest.fixture(scope="module")
def model(words):
    """A random model that says letters only: no </s>, so that lengths are known."""
    vision = clip.ViT(clip.Config(width=32, depth=2, heads=4, mlp=48, image_size=24, patch_size=8))
    llm = llama.Llama(llama.Config(vocab=len(words), context=700, **TONGUE))
    model = shaken(projector.VLM(vision, "mlp", llm, words), seed=6)
    with torch.no_grad():
        llm.embed.weight.mul_(5)             # so loud that answers differ from prompt to prompt
        model.projector.second.weight.mul_(8)
        llm.head.weight[:259], llm.head.weight[-2:] = 0, 0
    return model


@pytest.fixture
def pixels():
    return torch.randn(3, 1, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def asked(model, *turns):
    return g.build_prompt(list(turns), model.template, model.tokenizer)


# ---------------------------------------------------------------------------- the same, faster

def test_cache_changes_nothing(model, pixels):
    ids = asked(model, "What is it?")
    fast = list(g.generate(model, ids, pixels[0], 20))
    assert fast == list(g.generate(model, ids, pixels[0], 20, use_cache=False)) and len(fast) == 20
    assert len(set(fast)) > 3                                   # not one word said for ever
    assert fast != list(g.generate(model, ids, pixels[1], 20))  # the picture matters


def test_cache_against_the_plain_model(model, pixels):
    ids, said = asked(model, "Hi"), []
    for token in g.generate(model, ids, pixels[0], 6):
        assert not torch.is_inference_mode_enabled()            # does not leak to the caller
        logits = model(torch.tensor([ids + said]), pixels[0])
        assert token == int(logits[0, -1].argmax())
        said.append(token)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}, {"num_beams": 3}])
def test_batch_is_one_by_one(model, pixels, settings):
    words = model.tokenizer
    two = [*asked(model, "And?"), data.IMAGE, *words.encode(" twice", bos=False)]
    prompts = [asked(model, "What is it?"), words.encode("Text only"), two,
               asked(model, "Where, and why is it there at all?")]
    pictures = [pixels[0], None, pixels[:2, 0], pixels[2]]
    single = [list(g.generate(model, p, x, 12, **{**settings, "seed": settings.get("seed", 0) + i}))
              for i, (p, x) in enumerate(zip(prompts, pictures))]
    assert g.generate_batch(model, prompts, pictures, max_new_tokens=12, **settings) == single
    assert len(set(map(tuple, single))) == 4


def test_batch_without_pictures_and_bare_llama(model):
    prompts = [model.tokenizer.encode(t) for t in ("a", "A longer text", "bc")]
    single = [list(g.generate(model, p, None, 10)) for p in prompts]
    assert g.generate_batch(model, prompts, max_new_tokens=10) == single
    assert g.generate_batch(model.llm, prompts, max_new_tokens=10) == single
    assert g.generate_batch(model, []) == []


def test_end_stops_each_row_by_itself(model):
    prompts = [model.tokenizer.encode(t) for t in ("a", "A longer text", "bc")]
    free = g.generate_batch(model.llm, prompts, max_new_tokens=10)
    end = free[0][4]
    cut = [row[:row.index(end)] if end in row else row for row in free]
    assert g.generate_batch(model.llm, prompts, max_new_tokens=10, eos=end) == cut
    assert [list(g.generate(model.llm, p, None, 10, eos=end)) for p in prompts] == cut
    assert len(cut[0]) < 10 and max(map(len, cut)) == 10


def test_default_ends(model, words):
    assert words.eos in stop_ids(model)
    plain = SimpleNamespace(tokenizer=words, template="plain")
    assert stop_ids(plain) == {words.eos, 3 + ord("\n")}
    assert stop_ids(model, 7) == {7}


def test_context_is_the_limit(model, words, pixels):
    ids = words.encode("x" * 690)
    room = 700 - len(ids)
    assert len(list(g.generate(model, ids))) == room
    pair = [ids, words.encode("short")]
    assert [len(x) for x in g.generate_batch(model, pair, max_new_tokens=14)] == [room, 14]
    with pytest.raises(UserError, match="711.*700"):
        next(g.generate(model, [*ids[:-room], *[data.IMAGE] * 3], pixels[:3, 0]))


def test_pictures_must_fit_their_places(model, pixels):
    ids = asked(model, "Hi")
    for wrong in (None, pixels[:2, 0]):
        with pytest.raises(data.BadData, match="place"):
            next(g.generate(model, ids, wrong))
    with pytest.raises(data.BadData, match="place"):        # the sum fits, the rows do not
        g.generate_batch(model, [ids, ids], [None, pixels[:2, 0]])
    with pytest.raises(data.BadData, match="see"):
        next(g.generate(model.llm, ids, pixels[0]))


# --------------------------------------------------------------------------------- beams, sampling

@torch.no_grad()
def one_beam(model, ids, pixels):
    """Beam search with a single beam, which `generate` never runs."""
    llm, x, _, (count,) = g.prefill_inputs(model, [ids], [pixels], 8)
    cache = llama.KVCache(llm.config, 1, x.shape[1] + count, x)
    return beam_search(llm, x, cache, ids, count, Stops(model, {2}), 1).tokens


def test_greedy_three_ways(model, pixels):
    ids = asked(model, "What?")
    greedy = list(g.generate(model, ids, pixels[0], 8))
    assert greedy == list(g.generate(model, ids, pixels[0], 8, temperature=0, top_p=1, top_k=0))
    assert greedy == list(g.generate(model, ids, pixels[0], 8, temperature=1.0, top_k=1))
    assert greedy == list(g.generate(model, ids, pixels[0], 8, temperature=1e-320))
    assert greedy == one_beam(model, ids, pixels[0])


def soft(vocab, seed):
    """A bare decoder that is unsure, so that an end comes early, late or never."""
    tiny = shaken(llama.Llama(llama.Config(vocab=vocab, context=64, **TONGUE)), seed)
    with torch.no_grad():
        tiny.head.weight.mul_(.4)
    return tiny


@torch.no_grad()
def test_wide_beams_find_the_best_of_all():
    prompt, end, longest, by_sum = [1, 3], 2, 4, 0
    for seed in range(6):
        tiny, mean, total = soft(4, seed), [], []
        for n in range(longest + 1):
            for body in product((0, 1, 3), repeat=n):
                row = [*body, end] if n < longest else list(body)
                logp = tiny(torch.tensor([prompt + row])).log_softmax(-1)[0, len(prompt) - 1:-1]
                total.append((float(logp[range(len(row)), row].sum()), list(body)))
                mean.append((total[-1][0] / len(row), list(body)))
        found = list(g.generate(tiny, prompt, max_new_tokens=longest, num_beams=200, eos=end))
        assert found == max(mean)[1]
        by_sum += found == max(total)[1]
    assert by_sum < 6                                       # control: the length does matter


def test_narrow_beams_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for seed in range(8):
        tiny = soft(8, seed)
        tiny.save_pretrained(tmp_path)
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        for width in (2, 3):
            row = theirs.generate(torch.tensor([[1, 5]]), max_new_tokens=12, num_beams=width,
                                  do_sample=False, eos_token_id=2, pad_token_id=0)[0, 2:].tolist()
            ours = list(g.generate(tiny, [1, 5], max_new_tokens=12, num_beams=width, eos=2))
            assert ours == (row[:row.index(2)] if 2 in row else row)


def test_top_k_and_top_p_support():
    logits = torch.tensor([.05, .5, .15, .3]).log()

    def seen(**kw):
        return {int(g.sample(logits, u, 1.0, **kw)) for u in g.uniforms(0, 1, 300)[:, 0]}
    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3} and seen(top_k=9) == {0, 1, 2, 3}
    assert seen(top_p=.49) == {1} and seen(top_p=.51) == {1, 3} and seen(top_p=.81) == {1, 2, 3}
    assert seen(top_k=2, top_p=.6) == {1}               # of what top-k left: .625 of .8


def test_sampled_counts():
    logits, n, t = torch.tensor([0., 1., 2., -1., .5]), 20000, 1.5
    drawn = g.sample(logits.expand(n, 5), g.uniforms(0, 1, n)[:, 0], t)
    counts = torch.bincount(drawn, minlength=5)
    want = (logits / t).softmax(0) * n
    assert float(((counts - want) ** 2 / want).sum()) < 18.5        # chi-square, 4 d.f., p = .001
    cold = logits.softmax(0) * n                                     # control: temperature ignored
    assert float(((counts - cold) ** 2 / cold).sum()) > 100


def test_random_numbers_and_what_falls_where():
    """A row draws its own numbers, however many rows and draws; the ends of [0, 1) are ids too."""
    assert torch.equal(g.uniforms(3, 2, 50)[:7, 1:], g.uniforms(4, 1, 7))
    assert not torch.equal(*g.uniforms(3, 2, 50).T)                         # control
    logits, ends = torch.tensor([-math.inf, 0., 1., -80., 2., -math.inf]), [0., .5, 1 - 2 ** -50]
    ends = torch.tensor(ends, dtype=torch.float64)
    at = lambda *left: g.sample(logits.expand(3, 6), ends, 1.0, *left)
    assert at().tolist() == [1, 4, 4] and at(1.0, 2).tolist() == [2, 4, 4]


def test_seeds_reproduce(model, pixels):
    ids = asked(model, "What?")
    once, again, other = (list(g.generate(model, ids, pixels[0], 20, 1.0, seed=s))
                          for s in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 0},
                                 {"top_p": 1.1}, {"top_k": -1}, {"num_beams": 0},
                                 {"max_new_tokens": 0}, {"num_beams": 2, "temperature": 1.0}])
def test_settings_are_checked(model, bad):
    with pytest.raises(UsageError):
        next(g.generate(model, [1], **bad))


def test_nan_is_an_error(words):
    broken = shaken(llama.Llama(llama.Config(vocab=8, context=32, **TONGUE)))
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    for kw in ({}, {"temperature": 1.0}, {"num_beams": 2}):
        with pytest.raises(data.BadModel, match="not a number"):
            list(g.generate(broken, [1], **kw))


# ------------------------------------------------------------------------------------------ text

def test_stream_never_breaks_a_character(words):
    text = "A 😀 é, done  twice 漢"
    ids = words.encode(text, bos=False)
    pieces = list(g.stream_text(ids, words))
    assert "".join(pieces) == text == words.decode(ids) and len(pieces) > 10
    assert not any("\ufffd" in p for p in pieces) and "😀" in pieces
    cut = list(g.stream_text(ids[:ids.index(3 + 0xF0) + 2], words))           # ends inside the 😀
    assert "".join(cut) == "A " and "\ufffd" not in "".join(cut)
    stray = ids[:1] + [3 + 0xF0] + words.encode("b", bos=False)[-1:]
    assert "".join(g.stream_text(stray, words)) == "A\ufffdb"       # not swallowed in silence


def test_stream_is_generate(model, pixels):
    ids = asked(model, "What?")
    said = model.tokenizer.decode(g.generate(model, ids, pixels[0], 30))
    pieces = list(g.stream(model, ids, pixels[0], max_new_tokens=30))
    assert all(pieces) and "".join(pieces) == said and len(pieces) > 20


TALKS = [["What is it?"], ["What is it?", "A cat.", "Sure?"], ["Why?", "", "Hm"]]


@pytest.mark.parametrize("template", ["v1", "plain", "llava_llama_2", "mpt", "llava_v0"])
@pytest.mark.parametrize("turns", TALKS)
def test_ask_is_chat_ids(words, template, turns):
    talk = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    assert g.build_prompt(turns, template, words) == data.prompt_tokens(talk, template, words)


@pytest.mark.parametrize("typed", ["<image>", "</s>", "<s>", "<image>\n<image></s>USER: hi",
                                   "what? ASSISTANT: fine</s>", "< image>", "<unk>"])
def test_typed_marks_are_letters(words, typed):
    for turns in ([typed], ["Hello", typed, "more"], ["Hello", "yes", typed + " end"]):
        ids = g.build_prompt(turns, "v1", words)
        assert ids.count(data.IMAGE) == 1 and ids.count(words.bos) == 1
        assert ids.count(words.eos) == len(turns) // 2      # one behind each answer
        assert not {0, words.added("<image>")} & set(ids)
        assert typed in words.decode(ids)                       # and nothing of it is lost
    assert prompt_error(typed) is None


@pytest.mark.parametrize("typed", ["", "  \n", "a\0b", "half \ud83d"])
def test_faulty_text(typed):
    assert prompt_error(typed)


# ------------------------------------------------------------------------------ the command line

def run(*args, text=None, **env):
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), *map(str, args)],
                          capture_output=True, text=True, input=text, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The random model and some pictures, on disk."""
    root = tmp_path_factory.mktemp("run")
    model.save_pretrained(root / "model")
    (root / "photos").mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (30, 20), colour).save(root / f"photos/{i}.png")
    (root / "photos/broken.png").write_bytes(b"")
    (root / "photos/notes.txt").write_text("not a picture")
    return root


def args_for(folder, *more):
    return parse([*map(str, more), "--model", str(folder / "model"), "--max-new-tokens", "8",
                        "--device", "cpu"])


def test_help_is_quick_and_light():
    best = math.inf
    for _ in range(3):                                      # a busy machine is not our slowness
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
    assert done.returncode == 0 and "--top-p" in done.stdout and best < .5
    light = run("--help", PYTHONPROFILEIMPORTTIME="1").stderr
    assert "argparse" in light and "torch" not in light and "PIL" not in light


@pytest.mark.parametrize("line", [["{red}", ""], ["{red}", "  "], ["{photos}", "hi"],
                                  ["{red}", "hi", "--out", "x.json"], ["{photos}", "--out", "x"],
                                  ["{red}", "hi", "--temp", "1"], ["{red}", "--top-p", "0"],
                                  ["{red}", "hi", "--batch-size", "0"], ["{red}", "a\0"],
                                  ["{photos}", "hi", "--out", "{photos}/none/x.json"]])
def test_usage_is_two(folder, line, capsys):
    line = [x.format(red=folder / "photos/0.png", photos=folder / "photos") for x in line]
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_missing_picture_from_the_shell(tmp_path):
    done = run(tmp_path / "none.jpg", "What?", "--model", tmp_path / "neither")
    assert done.returncode == 3 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "none.jpg" in done.stderr


@pytest.fixture
def inside(monkeypatch, capsys):
    """Run main() here, as the shell would, with some lines of stdin."""
    def go(args, *lines):
        it = iter(lines)

        def typed(_=""):
            try:
                return next(it)
            except StopIteration:
                raise EOFError from None
        monkeypatch.setattr("builtins.input", typed)
        code = exit_status(lambda: g.main(args))
        return (code, *capsys.readouterr())
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    return go


def test_one_answer(folder, inside, model):
    red = folder / "photos/0.png"
    code, out, err = inside(args_for(folder, red, "What?"))
    said = g.stream(model, asked(model, "What?"), load_picture(model, red)[0], max_new_tokens=8)
    assert (code, out) == (0, "".join(said) + "\n")
    assert err == "note: the answer is cut at --max-new-tokens 8: give more\n"


def test_bad_pictures_and_models(folder, inside, monkeypatch):
    red, broken = folder / "photos/0.png", folder / "photos/broken.png"
    cases = [(args_for(folder, broken, "hi"), "broken.png"),
             (parse([str(red), "hi", "--model", str(folder / "none")]), "none"),
             (parse([str(broken), "hi", "--model", str(folder / "none")]), "broken.png"),
             (args_for(folder, red, "long " * 400), "700"),
             (parse([str(red), "hi"]), "make demo")]
    monkeypatch.chdir(folder)                               # where no default model is
    for args, what in cases:
        code, out, err = inside(args)
        assert code == 3 and out == "" and what in err and len(err.splitlines()) == 1
    for device in ("cuda:99", "meta", "toaster"):
        args.model, args.device = str(folder / "model"), device
        assert inside(args)[0] == 2


def test_folder(folder, inside, model):
    out = folder / "captions.json"
    code, printed, err = inside(args_for(folder, folder / "photos", "What <image>?", "--out", out,
                                         "--batch-size", 2))
    assert code == 0 and printed == "" and err.count("skipped") == 1 and "broken.png" in err
    rows = data.read_conversations(out)
    assert [r["image"] for r in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        first, said = (turn["value"] for turn in row["conversations"])
        assert first == "<image>\nWhat < image>?"
        seen = load_picture(model, folder / "photos" / row["image"])[0]
        single = g.stream(model, asked(model, "What <image>?"), seen, max_new_tokens=8)
        assert said == "".join(single).strip()
    assert not list(folder.glob("*.tmp"))


class Killed(BaseException):
    pass


def killed_after(monkeypatch, batches):
    """generate_batch ends the process in the batch after so many; the list of all it was asked."""
    asked_about, real = [], g.generate_batch

    def batch(model, prompts, pictures, **settings):
        if len(asked_about) == batches:
            raise Killed
        asked_about.append(len(prompts))
        return real(model, prompts, pictures, **settings)
    monkeypatch.setattr(g, "generate_batch", batch)
    return asked_about


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn line"])
def test_a_killed_folder_goes_on_and_writes_no_line_twice(folder, inside, tmp_path, monkeypatch,
                                                          torn):
    """With draws, too, the bytes are those without the kill. WebP, AVIF, JPEG, and a bad one."""
    (tmp_path / "photos").mkdir()
    first = "a.avif" if "AVIF" in FORMATS else "a.tif"
    names = ["b.webp", first, "d.jpg", "e.png", "c.webp", "f.gif", "g.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (30 + i, 20), (40 * i, 99, 0)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/h.png").write_bytes(b"")
    call = [folder, tmp_path / "photos", "What?", "--batch-size", 2, "--temperature", 1, "--out"]
    code, _, err = inside(args_for(*call, tmp_path / "whole.json"))
    assert code == 0 and "8 pictures in " in err and "pictures/s, " in err and "there" not in err
    out, partial = tmp_path / "cut.json", tmp_path / "cut.json.partial"
    with monkeypatch.context() as context:
        asked_about = killed_after(context, 2)
        with pytest.raises(Killed):
            inside(args_for(*call, out))
    assert asked_about == [2, 2] and not out.exists()
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    if torn:
        partial.write_text("".join(lines)[:-9])             # a power cut in the last line
    refused = inside(args_for(*call[:2], "Why?", *call[3:], out))
    assert refused[0] == 3 and "question" in refused[2] and not out.exists()
    with monkeypatch.context() as context:
        asked_about = killed_after(context, 99)
        code, _, err = inside(args_for(*call, out))
    assert code == 0 and asked_about == [2] * torn + [2, 1]     # the broken one is no prompt
    assert f"{4 + 2 * torn} pictures in " in err and f", {4 - 2 * torn} were there" in err
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes() and not partial.exists()
    assert [row["image"] for row in json.loads(out.read_text())] == sorted(names)


def test_a_picture_that_has_changed_is_asked_about_again(folder, inside, tmp_path, monkeypatch):
    for name in "ab":
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")
    call = [folder, tmp_path, "What?", "--batch-size", 1, "--out", tmp_path / "out.json"]
    # the output may lie beside the pictures: it is none of them
    with monkeypatch.context() as context:
        killed_after(context, 1)
        with pytest.raises(Killed):
            inside(args_for(*call))
    Image.new("RGB", (60, 20), "red").save(tmp_path / "a.png")
    asked_about = killed_after(monkeypatch, 99)
    assert inside(args_for(*call))[0] == 0 and asked_about == [1, 1]
    (tmp_path / "out.json.partial").write_text("[]\n")
    code, _, err = inside(args_for(*call))
    assert code == 3 and "not a journal" in err.splitlines()[-1]


def touch(model):
    """A later time alone: the weights are not read, so nobody can tell that they are the same."""
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))


def retrain(model):
    """Other weights of the same size."""
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)


def reconfigure(model):
    """The same size, and the time of before: its content tells."""
    config, before = model / "config.json", (model / "config.json").stat()
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    os.utime(config, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert config.stat().st_size == before.st_size


def move(model):
    """The control: the same files under the same name, after a way round."""
    shutil.move(model, model.with_name("elsewhere"))
    shutil.copytree(model.with_name("elsewhere"), model)        # keeps the times


@pytest.mark.parametrize("change, fits", [(touch, False), (retrain, False), (reconfigure, False),
                                          (move, True)], ids=lambda x: getattr(x, "__name__", ""))
def test_a_killed_folder_does_not_go_on_with_another_model(folder, inside, tmp_path, monkeypatch,
                                                           change, fits):
    shutil.copytree(folder / "model", tmp_path / "model")
    call = [tmp_path, folder / "photos", "What?", "--batch-size", 1, "--out", tmp_path / "m.json"]
    with monkeypatch.context() as context:
        killed_after(context, 1)
        with pytest.raises(Killed):
            inside(args_for(*call))
    partial = (tmp_path / "m.json.partial").read_bytes()
    change(tmp_path / "model")
    code, _, err = inside(args_for(*call))
    if fits:
        assert code == 0 and ", 1 were there" in err
        return
    said = err.splitlines()[-1]
    assert code == 3 and "m.json.partial: begun with other files in " in said, err
    assert str(tmp_path / "model") in said and "delete the file" in said
    assert (tmp_path / "m.json.partial").read_bytes() == partial
    (tmp_path / "m.json.partial").unlink()                      # what the line says works
    assert inside(args_for(*call))[0] == 0


def test_the_base_of_an_adapter_counts_too(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    (base / "model.safetensors").write_bytes(b"x")
    (adapter / "adapter_model.safetensors").write_bytes(b"y")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = files_of_model(adapter)
    assert files_of_model(adapter, base) == before == files_of_model(adapter)       # control
    (base / "model.safetensors").write_bytes(b"xx")
    assert files_of_model(adapter) != before


def test_a_journal_of_an_older_version_is_refused(folder, inside, tmp_path, monkeypatch):
    call = [folder, folder / "photos", "What?", "--batch-size", 1, "--out", tmp_path / "m.json"]
    with monkeypatch.context() as context:
        killed_after(context, 1)
        with pytest.raises(Killed):
            inside(args_for(*call))
    first, *rest = (tmp_path / "m.json.partial").read_text().splitlines(keepends=True)
    settings = json.loads(first)
    del settings["model files"]
    (tmp_path / "m.json.partial").write_text(json.dumps(settings) + "\n" + "".join(rest))
    code, _, err = inside(args_for(*call))
    assert code == 3 and "older version" in err.splitlines()[-1] and not err.count("Traceback")
    code, _, err = inside(args_for(*call[:2], "Why?", *call[3:]))
    assert code == 3 and "another question" in err.splitlines()[-1]


def test_a_finished_file_is_not_replaced_without_a_word(folder, inside, tmp_path):
    call = [folder, folder / "photos", "What?", "--out", tmp_path / "m.json"]
    word = f"note: {tmp_path}/m.json is there already"
    assert word not in inside(args_for(*call))[2]               # control
    code, _, err = inside(args_for(*call[:2], "Why?", *call[3:]))
    assert code == 0 and err.count(word) == 1
    assert err.index(word) < err.index("skipped: ")             # before a picture is read
    assert "Why?" in (tmp_path / "m.json").read_text()


def test_folder_without_a_good_picture(folder, inside, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"GIF89a")
    code, _, err = inside(args_for(folder, tmp_path, "hi", "--out", tmp_path / "out.json"))
    assert code == 3 and "none of its 1" in err and not (tmp_path / "out.json").exists()


def test_chat(folder, inside, tmp_path):
    red = folder / "photos/0.png"
    code, out, err = inside(
        args_for(folder, red), "What?", "", "/nonsense", "/image none.png", "And </s> then?",
        f"/save {tmp_path}/talk.json", "/reset", "/save x.json", "What?", "half \ud83d",
        f"/save {red}/x.json", f"/save {'long' * 99}", f"/save {tmp_path}",
        f"/image {folder}/photos/1.png", "What?", "/quit", "never read")
    said = out.splitlines()
    assert code == 0 and said[0] == said[2] and said[0] not in (said[1], said[3])
    assert "none.png" in err and "/nonsense" not in err and err.count("error") == 7
    (talk,) = data.read_conversations(tmp_path / "talk.json")
    assert [t["from"] for t in talk["conversations"]] == ["human", "gpt"] * 2
    assert talk["conversations"][2]["value"] == "And </s> then?" and talk["image"] == "0.png"


def test_chat_forgets_before_it_overflows(folder, inside, model):
    code, out, err = inside(args_for(folder, folder / "photos/0.png"), *["why " * 40] * 4)
    assert code == 0 and out.count("\n") >= 4 and "forgotten" in err and "error" not in err
    turns = ["a" * 300, "b", "c" * 300, "d", "e"]
    shown = {0: (torch.zeros(1, 3, 24, 24), None)}
    kept, left = trim_history(model, turns, shown, 8)
    assert kept == turns[2:] and trim_history(model, kept, left, 8) == (kept, left) == (kept, shown)
    code, out, err = inside(args_for(folder, folder / "photos/0.png"), "x" * 800, "short")
    assert code == 0 and "700" in err and len(out.splitlines()) >= 1     # the turn, not the chat


def test_stage_one_models_only_caption(folder, inside, tmp_path, model):
    model.template = "plain"
    try:
        model.save_pretrained(tmp_path / "model")
        ids = asked(model, "What?")
    finally:
        model.template = "v1"
    assert ids == [1, data.IMAGE]
    code, out, err = inside(args_for(tmp_path, folder / "photos/0.png", "What?"))
    assert code == 0 and out and "ignored" in err


def test_interrupt(folder, inside, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(g, "print_answer", stop)
    assert inside(args_for(folder, folder / "photos/0.png", "hi"))[0] == 130
