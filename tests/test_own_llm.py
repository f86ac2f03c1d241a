"""A language model of one's own in a run: its template, rates, tokenizer, end, and text alone."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from PIL import Image

import data
import generate as g
import llama
import train
from decoding.flags import parse as parse_generate
from decoding.loading import load_model, prepare_for_inference
from formats import words
from formats.errors import exit_status, UsageError
from formats.strict_json import read_config
from kernels.quantize import Laid
from projector import VLM
from test_train import flags, here, parts, run, server, unchanged_process  # noqa: F401
from tiny import shaken, write_words
from train import parse_args as parse
from trainer import doctor, machine, rates, start
from trainer.doctor import TokenCounter
from trainer.doctor_flags import parse as parse_doctor
from trainer.lengths import sample_lengths

# the chat template of SmolLM2-Instruct, word for word; then of nobody
SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
           "Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
           "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|im_start|>assistant\n' }}{% endif %}")
BARE = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}")
STRANGE = "{% for m in messages %}<<{{ m['role'] }}>> {{ m['content'] }} {% endfor %}"
CHATML = "<|im_start|>", "<|im_end|>"


def language_model(folder, chat_template=SMOLLM2, specials=CHATML, **config):
    """A folder of a tiny LLaMA whose tokenizer is one letter a token, with control tokens."""
    folder.mkdir(parents=True)
    write_words(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    flags = {k: v for k, v in spec["added_tokens"][0].items() if k not in ("id", "content")}
    spec["added_tokens"] += [{"id": 110 + i, "content": token, **flags}
                             for i, token in enumerate(specials)]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if chat_template:
        settings["chat_template"] = chat_template
    if specials:
        settings["eos_token"] = specials[1]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = dict(vocab=128, width=32, depth=2, heads=2, kv_heads=1, mlp=64, context=1024)
    model = shaken(llama.Llama(llama.Config(**{**sizes, "eos": 111, **config})))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("own") / "smol")


def prepared(*argv):
    """args as a run has them, before anything is loaded."""
    args = parse([*map(str, argv), "--threads", "1"])
    machine.prepare(args, train.set_trainable)
    return args


# ------------------------------------------------------------------------------------- templates

@pytest.mark.parametrize("chat_template, specials, found", [
    (SMOLLM2, CHATML, "smollm2"), (SMOLLM2.replace("SmolLM", "X"), CHATML, "chatml_direct"),
    (BARE, CHATML, "chatml_direct"), (None, CHATML, "chatml_direct"), (None, (), "v1"),
    (STRANGE, (), start.UNKNOWN), (STRANGE, CHATML, "chatml_direct"),
    (None, ("<|start_header_id|>", "<|end_header_id|>"), "llama_3")],
    ids=["SmolLM2", "other system text", "no system text", "vocabulary", "Vicuna", "unknown",
         "unknown ChatML", "LLaMA-3"])
def test_stage_2_is_trained_in_the_language_models_own_template(tmp_path, capsys, chat_template,
                                                                specials, found):
    """A flag, MiniGPT-4's own template and captions are left alone."""
    folder = language_model(tmp_path / "llm", chat_template, specials)
    assert start.own_template(folder) == found
    new = "--stage", 2, "--from", "none", "--llm", folder
    known = "v1" if found == start.UNKNOWN else found
    assert prepared(*new).row.template == known
    said = capsys.readouterr().err
    assert said.count("\n") == (found != "v1") and known in said + "v1"
    assert ("none of ours" in said) == (found == start.UNKNOWN)
    asked = prepared(*new, "--template", "llama_2")
    assert asked.row.template == "llama_2" and not capsys.readouterr().err
    captions = prepared("--stage", 1, "--llm", folder)
    assert (captions.row.template, captions.llm_template) == ("plain", found)
    assert prepared("--stage", 1, "--recipe", "minigpt4", "--llm", folder
                    ).row.template == "minigpt4_caption"


def test_the_toys_own_language_model_needs_no_word(capsys):
    assert prepared("--stage", 2, "--from", "none").row.template == "v1"
    assert prepared("--stage", 2, "--plan", "--base", "small").row.template == "smollm2"
    assert "smollm2" in capsys.readouterr().err
    assert prepared("--stage", 2, "--plan", "--base", "7b").row.template == "v1"
    assert not capsys.readouterr().err


def test_stage_1_remembers_what_stage_2_needs(flags, smol, parts, tmp_path, capsys):  # noqa: F811
    """The folder of a captioner holds no conversation format: its config.json names it."""
    new = "--vision", parts / "clip", "--llm", smol, "--sample-every", 0
    assert here(flags(tmp_path / "stage1", *new, stage=1, steps=1, lone=False)) == 0
    first = read_config(tmp_path / "stage1/model")
    assert (first["template"], first["llm_template"]) == ("plain", "smollm2")
    assert here(flags(tmp_path / "stage2", "--sample-every", 0, steps=2, lone=False)) == 0
    assert "--template smollm2" in capsys.readouterr().err
    second, model = tmp_path / "stage2/model", VLM.from_pretrained(tmp_path / "stage2/model")
    config = read_config(second)
    assert config["template"] == model.template == "smollm2" and "llm_template" not in config
    assert read_config(tmp_path / "stage2")["stage_row"]["template"] == "smollm2"
    # an answer ends in one token, which has loss
    ids, labels = data.encode([{"from": "human", "value": "<image>\nQ"},
                               {"from": "gpt", "value": "A"}], model.template, model.tokenizer)
    assert 111 in labels and 111 in data.end_ids(model.template, model.tokenizer)
    for name in ("chat_template.json", "chat_template.jinja"):      # a processor's, a tokenizer's
        assert "SmolLM" in (second / name).read_text()
    # resumed it is the same run; without what stage 1 wrote down, the vocabulary decides
    assert here(flags(tmp_path / "stage2", "--sample-every", 0, "--resume", "auto", steps=2,
                      lone=False)) == 0
    del first["llm_template"]
    (tmp_path / "stage1/model/config.json").write_text(json.dumps(first))
    assert start.own_template(tmp_path / "stage1/model") == "chatml_direct"
    assert start.own_template(second) == "smollm2"


def test_a_saved_chatml_model_has_a_processors_template(smol, tmp_path):
    """transformers' processor renders the prompt that we write, from lists of parts."""
    from transformers import AutoProcessor
    model = start_vlm(smol)
    model.save_pretrained(tmp_path / "model")
    model.template = "qwen_1_5"
    model.save_pretrained(tmp_path / "qwen")
    VLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    # a folder with the language model's own chat template, which takes texts and is none of ours
    own = tmp_path / "own"
    model.save_pretrained(own)
    config = read_config(own)
    del config["template"]
    (own / "config.json").write_text(json.dumps(config))
    (own / "chat_template.json").unlink()
    (own / "chat_template.jinja").write_text(SMOLLM2.replace("SmolLM", "X"))
    loaded = VLM.from_pretrained(own)
    assert loaded.template not in data.TEMPLATES
    loaded.save_pretrained(tmp_path / "saved")
    again = VLM.from_pretrained(tmp_path / "saved")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"}]
    for name, template in (("model", "smollm2"), ("qwen", "qwen_1_5"), ("again", "smollm2"),
                           ("saved", loaded.template), ("saved", again.template)):
        processor, turns = AutoProcessor.from_pretrained(tmp_path / name), []
        for turn, role in zip(talk, ("user", "assistant", "user")):
            text = turn["value"].removeprefix("<image>\n")
            parts = [{"type": "image"}] if text != turn["value"] else []
            turns.append({"role": role, "content": [*parts, {"type": "text", "text": text}]})
        wanted = data.prompt(talk, template)
        assert processor.apply_chat_template(turns, add_generation_prompt=True) == wanted, name


def start_vlm(llm, template="smollm2"):
    """A VLM in front of a language model's folder, with a tower that knows nothing."""
    import clip
    tower = clip.ViT(clip.Config(32, 2, 2, 64, image_size=32, patch_size=16))
    return VLM(tower, "mlp", llama.Llama.from_pretrained(llm), data.Tokenizer(llm), template).eval()


# ----------------------------------------------------------------------------------------- rates

def test_rates_follow_the_size_of_the_language_model(smol, parts, flags, tmp_path,  # noqa: F811
                                                     monkeypatch, capsys):
    """The toy's for a small one, and where a projector trains alone; the published ones for a large
    one that trains; a flag wins."""
    lora = "--stage", 2, "--from", "none", "--lora", 8, "--llm", smol
    small = prepared(*lora).row
    assert (small.lr, small.projector_lr) == (10 * 1.5e-3, 1.5e-3)
    assert "as published" not in capsys.readouterr().err
    weights = sum(p.numel() for p in llama.Llama.from_pretrained(smol).parameters())
    found = rates.trained_weights(parse([*map(str, lora)]), train.set_trainable)
    assert weights < found < 2 * weights                            # LoRA's own beside them
    monkeypatch.setattr(rates, "LARGE", weights)
    large = prepared(*lora).row
    assert (large.lr, large.projector_lr, large.batch, large.clip) == (2e-4, 2e-5, small.batch, 1)
    assert "--lr 0.0002 (projector 2e-05) as published" in capsys.readouterr().err
    assert prepared(*lora, "--lr", 1e-3).row.lr == 1e-3
    captions = prepared("--stage", 1, "--llm", smol).row
    assert (captions.lr, captions.muon) == (1.2e-2, 0)              # a projector of 5,000 weights
    assert "by AdamW alone, --muon 0, not the toy's 0.01" in capsys.readouterr().err
    assert prepared("--stage", 1, "--llm", smol, "--muon", .02).row.muon == .02
    assert "AdamW alone" not in capsys.readouterr().err
    described = prepared("--stage", 1, "--recipe", "sharegpt4v", "--from", "none", "--llm", smol)
    assert described.row.lr == 2e-5
    whole = prepared("--stage", 2, "--from", "none", "--llm", smol, "--data", "x.json",
                     "--show-batch", 1).row
    assert whole.lr == 2e-5
    # stage 2 finds the language model in stage 1's folder
    start_vlm(smol, "plain").save_pretrained(tmp_path / "stage1/model")
    after = prepared("--stage", 2, "--output-dir", tmp_path / "stage2", "--lora", 8).row
    assert after.lr == 2e-4
    monkeypatch.setattr(rates, "LARGE", found + 1)                  # control: the limit itself
    assert prepared(*lora).row.lr == small.lr
    assert prepared("--stage", 1, "--llm", smol).row.muon == .01
    whole = rates.trained_weights(parse(["--stage", "2", "--from", "none"]), train.set_trainable)
    assert 1_000_000 < whole < 2_000_000


@pytest.mark.parametrize("given, published, asked", [
    ((), "--lr 0.0002 (projector 2e-05) as published, not the toy's", ""),
    (("--lr", .015), "--projector-lr 2e-05 as published, not the toy's",
     "--lr 0.015 as given (published: 0.0002)"),
    (("--projector-lr", 2e-4), "--lr 0.0002 as published, not the toy's",
     "--projector-lr 0.0002 as given (published: 2e-05)"),
    (("--lr", 1e-3, "--projector-lr", 1e-4), "",
     "--lr 0.001 (projector 0.0001) as given (published: 0.0002, 2e-05)"),
    (("--decay", .1), "--lr 0.0002 (projector 2e-05) as published, not the toy's",
     "--decay 0.1 as given (published: 0)")], ids=["none", "lr", "projector", "both", "decay"])
def test_the_note_tells_published_rates_from_given_ones(smol, monkeypatch, capsys, given, published,
                                                        asked):
    monkeypatch.setattr(rates, "LARGE", 1000)
    prepared("--stage", 2, "--from", "none", "--lora", 4, "--llm", smol, *given)
    (said,) = [x for x in capsys.readouterr().err.splitlines() if "weights are trained" in x]
    head, _, rest = said.partition(" weights are trained: ")
    assert head.endswith(" M") and rest == "; ".join(filter(None, (published, asked)))


@pytest.mark.parametrize("recipe, stage, kept", [
    ("minigpt4", 1, "--lr 0.06, --warm-lr 0, --min-lr 0.003, the toy's (published: 0.0001, 1e-06, "
                    "8e-05)"),
    ("minigpt4", 2, "--lr 0.06, --warm-lr 0, --min-lr 0.001, the toy's (published: 3e-05, 1e-06, "
                    "1e-05)"),
    ("blip2", 2, "--lr 0.002, --muon 0.01, --warm-lr 0, --min-lr 0.0002, the toy's (published: "
                 "0.0001, 0, 1e-06, 1e-05)")])
def test_a_q_formers_projector_before_a_large_language_model(smol, monkeypatch, capsys, recipe,
                                                             stage, kept):
    """It keeps the toy's rates, never without a word. Controls: before a small language model
    nothing is said, and what a flag gives is not the toy's."""
    new = ["--recipe", recipe, "--stage", stage, "--llm", smol]
    if (recipe, stage) == ("minigpt4", 2):
        new += ["--from", "none"]
    toy = prepared(*new).row
    assert toy == parse([*map(str, new)]).row or recipe == "blip2"          # but for its template
    assert "published" not in capsys.readouterr().err
    weights = sum(p.numel() for p in llama.Llama.from_pretrained(smol).parameters())
    monkeypatch.setattr(rates, "LARGE", weights)
    monkeypatch.setattr(rates, "trained_weights", lambda *_: weights - 1)   # smol is smaller
    assert prepared(*new).row == toy
    assert f"M weights: {kept}; flags give others" in capsys.readouterr().err
    asked = prepared(*new, "--lr", 6e-3, "--min-lr", 1e-4).row
    assert (asked.lr, asked.min_lr, asked.warm_lr) == (6e-3, 1e-4, 0)
    said = capsys.readouterr().err
    assert "--warm-lr 0, the toy's" in said and "--lr" not in said and "--min-lr" not in said
    monkeypatch.setattr(rates, "LARGE", weights + 1)        # control: the limit itself
    assert prepared(*new).row == toy and "published" not in capsys.readouterr().err


# ------------------------------------------------------------------- before a run: whose tokens?

def test_show_batch_reads_the_models_own_tokens(smol, flags, tmp_path, capsys):     # noqa: F811
    """--llm needs no --from none where nothing is trained; --from brings its own tokenizer."""
    assert here(["--stage", "2", "--llm", str(smol), "--show-batch", "1"]) == 0
    by_llm = capsys.readouterr().out
    assert by_llm.count("<|im_start|>") >= 3 and "▁" in by_llm
    start_vlm(smol, "smollm2").save_pretrained(tmp_path / "stage1/model")
    for argv in (["--from", tmp_path / "stage1/model"], ["--output-dir", tmp_path / "stage2"]):
        assert here(["--stage", "2", "--show-batch", "1", *map(str, argv)]) == 0
        # <image> and <pad> are added tokens now; they stand in no sample
        assert capsys.readouterr().out.split("\n")[1:] == by_llm.split("\n")[1:]
    assert here(["--stage", "2", "--from", "none", "--show-batch", "1"]) == 0
    assert "<|im_start|>" not in capsys.readouterr().out                            # control
    with pytest.raises(SystemExit):                                                 # to be trained
        parse(["--stage", "2", "--llm", str(smol)])


def doctored(capsys, *argv):
    """What `data.py` prints of a command."""
    code = exit_status(lambda: doctor.run(parse_doctor([*map(str, argv)])))
    return code, *capsys.readouterr()


def test_the_doctor_lays_rows_out_as_training_does(smol, tmp_path, capsys):
    """The same tokens with loss as --show-batch prints; without --llm, and for Vicuna, v1."""
    rows = [{"id": "1", "conversations": [{"from": "human", "value": "Is it red?"},
                                          {"from": "gpt", "value": "Yes."}]}]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(rows))
    vicuna = language_model(tmp_path / "vicuna", None, ())
    for llm, name in ((smol, "smollm2"), (vicuna, "v1")):
        assert here(["--stage", "2", "--llm", str(llm), "--show-batch", "1", "--data", str(file),
                     "--images", str(tmp_path)]) == 0
        trained = capsys.readouterr().out.split("\n")[1]
        code, said, _ = doctored(capsys, "show", file, "--llm", llm)
        assert code == 0 and f"template {name}\n{trained}\n" in said
        assert ("<|im_start|>" in trained) == (llm == smol)
        code, said, _ = doctored(capsys, "check", file, "--llm", llm)
        assert code == 0 and f"; template {name};" in said
        # a flag wins: the control
        said = doctored(capsys, "show", file, "--llm", llm, "--template", "llama_2")[1]
        assert "template llama_2\n" in said and trained not in said
    assert "template v1\n" in doctored(capsys, "show", file)[1]
    # its weights are not needed, and its config.json is not either
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((smol / name).read_bytes())
    assert "; template smollm2;" in doctored(capsys, "check", file, "--llm", bare)[1]


def test_the_doctor_says_where_it_does_not_know_the_template(tmp_path, capsys):
    folder, file = language_model(tmp_path / "llm", STRANGE, ()), tmp_path / "x.json"
    file.write_text(json.dumps([{"conversations": [{"from": "human", "value": "Q?"},
                                                   {"from": "gpt", "value": "A"}]}]))
    code, said, err = doctored(capsys, "show", file, "--llm", folder)
    assert code == 0 and "template v1\n" in said
    assert "none of ours" in err and "--template" in err and err.count("\n") == 1
    assert not doctored(capsys, "show", file, "--llm", folder, "--template", "v1")[2]


def test_the_plan_counts_the_models_own_tokens(smol, tmp_path, capsys):
    start_vlm(smol, "smollm2").save_pretrained(tmp_path / "stage1/model")
    counts = {}
    for name, argv in {"toy": [], "llm": ["--llm", smol], "from": ["--from", tmp_path /
                       "stage1/model"], "before": ["--output-dir", tmp_path / "stage2"]}.items():
        assert here(["--stage", "2", "--plan", *map(str, argv)]) == 0
        shown = capsys.readouterr().out.split("tokens a sample")[0].split()[-1]
        kinds = sample_lengths(prepared("--stage", 2, "--plan", *argv))[1]
        counts[name] = sum(share * text for share, text, _, _ in kinds)
        patches = 4 if name in ("from", "before") else 64           # of the tower, of a picture
        assert int(shown) == round(counts[name] + patches)
    assert counts["llm"] == counts["from"] == counts["before"] > 3 * counts["toy"]


# ------------------------------------------------------------------------------ described scenes

@pytest.mark.parametrize("every, steps", [(None, [0, 1, 2, 4, 6]), (4, [0, 4, 6]), (0, []),
                                          (99, [0, 6])])
def test_scenes_are_described_when_it_is_asked(flags, tmp_path, every, steps):     # noqa: F811
    more = [] if every is None else ["--sample-every", every]
    assert here(flags(tmp_path / "run", *more)) == 0
    found = tmp_path / "run/samples.jsonl"
    lines = found.read_text().splitlines() if found.exists() else []
    assert [json.loads(line)["step"] for line in lines] == [s for s in steps for _ in range(4)]
    # it changes no bit: a finished run may be resumed with another
    assert here(flags(tmp_path / "run", "--resume", "auto", "--sample-every", 1)) == 0


@pytest.mark.parametrize("argv", [["--base", "7b", "--data", "x"], ["--data", "x"],
                                  ["--recipe", "blip2"]])
def test_what_describes_no_scene_refuses_the_switch(argv, capsys):
    for value, is_refused in (("3", True), ("0", False)):
        call = ["--stage", "1", *argv, "--sample-every", value]
        if is_refused:
            with pytest.raises(SystemExit):
                parse(call)
            assert "--sample-every" in capsys.readouterr().err
        else:
            parse(call)
    with pytest.raises(SystemExit):
        parse(["--stage", "1", "--sample-every", "-1"])


# ---------------------------------------------------------------------------- the doctor's count

CORPUS = ["The quick brown fox", "don't  stop", "line\nline\n\n end", "x = [1, 23]\n\tdef f():",
          "한국어 문장입니다.", "emoji 😀 👍🏽", "tabs\t\tand   spaces ", " 12 345,678.90", "  ", "\n \n",
          "<|im_end|> typed", "\u00a0wide\u3000space", "\x1c control \x1f", "ça va naïve", "'s 't"]


def byte_level(folder, pattern=None, digits=False, last=True):
    """A byte-level BPE tokenizer of 600 tokens, trained on CORPUS, in a folder."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
    lib = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [Digits(individual_digits=True)] if digits else []
    if pattern:
        steps.append(Split(Regex(pattern), "isolated"))
    steps.append(ByteLevel(add_prefix_space=False, use_regex=last))
    lib.pre_tokenizer = Sequence(steps) if len(steps) > 1 else steps[0]
    lib.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|im_start|>", "<|im_end|>"])
    lib.train_from_iterator(CORPUS * 20, trainer)
    folder.mkdir()
    lib.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    return data.Tokenizer(folder)


@pytest.mark.parametrize("kind", [{}, {"digits": True}, {"pattern": words.LLAMA_3, "last": False},
                                  {"pattern": words.PATTERNS[1], "last": False}],
                         ids=["GPT-2", "SmolLM2", "LLaMA-3", "Qwen-2"])
def test_byte_level_texts_are_counted_by_words(tmp_path, kind):
    """The same number of tokens for every text, and a word is looked up once."""
    tokenizer = byte_level(tmp_path / "words", **kind)
    counter, dice = TokenCounter(tokenizer), __import__("random").Random(0)
    assert counter.cut is words.cut_behind_words
    wrong = 0
    for i in range(400):
        text = "".join(dice.choices([*CORPUS, " ", "  ", "\n", ".", "a"], k=dice.randint(1, 7)))
        parts = [data.Segment("", start="bos"), data.Segment(text, learn=True)]
        whole = len(data.tokenize_segments(parts, tokenizer, 0)[0])
        assert counter.of(parts, 0) == whole, text
        pieces = words.cut_before_spaces(text)          # control: LLaMA's places are not theirs
        wrong += sum(len(tokenizer.library_pairs(piece)) for piece in pieces) != len(
            tokenizer.library_pairs(text))
    assert wrong > 20


def test_other_patterns_are_tokenized_in_full(tmp_path):
    for i, pattern in enumerate([r"\S+ \S+|\s", r".{3}"]):
        assert not TokenCounter(byte_level(tmp_path / str(i), pattern, last=False)).apart
    spec = json.loads((tmp_path / "0/tokenizer.json").read_text())
    assert words.word_cutter({**spec, "model": {**spec["model"], "dropout": .1}}) is None


def test_a_byte_level_file_is_checked_as_fast_as_another(tmp_path):
    """Three times the speed of the library and more, which was 399 rows a second."""
    tokenizer = byte_level(tmp_path / "words", digits=True)
    text = " ".join(CORPUS * 8)
    parts = [data.Segment(text, learn=True)]
    counter, seconds = TokenCounter(tokenizer), []
    counter.of(parts, 0)
    for count in (lambda: counter.of(parts, 0),
                  lambda: data.tokenize_segments(parts, tokenizer, 0)):
        began = time.process_time()
        for _ in range(30):
            count()
        seconds.append(time.process_time() - began)
    assert 3 * seconds[0] < seconds[1]


# --------------------------------------------------------------------------------- a model alone

def test_a_bare_llama_ends_at_its_own_end(smol, tmp_path):
    """generation_config.json's ids go before config.json's, as in transformers; eos wins."""
    model = llama.Llama.from_pretrained(smol)
    free = list(g.generate(model, [1, 50, 60], max_new_tokens=12, eos=frozenset()))
    end = free[5]
    cut = free[:free.index(end)]
    assert list(g.generate(model, [1, 50, 60], max_new_tokens=12, eos=end)) == cut
    folder = language_model(tmp_path / "other")
    for name, ids in (("config.json", end), ("generation_config.json", [end, 127])):
        config = read_config(folder, name, missing_ok=True)
        (folder / name).write_text(json.dumps({**config, "eos_token_id": ids}))
        model = llama.Llama.from_pretrained(folder)
        answer = g.generate(model, [1, 50, 60], max_new_tokens=12)
        assert list(answer) == cut and answer.finish_reason == "end"
        assert g.generate_batch(model, [[1, 50, 60]], max_new_tokens=12) == [cut]
    assert model.config.eos == (end, 127)
    none = replace(model.config, eos=None)
    model.config = none
    assert len(list(g.generate(model, [1, 50, 60], max_new_tokens=12))) == 12


def test_llama_continues_a_text_with_a_folder_of_ones_own(smol, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["llama.py", "The red", str(smol)])
    assert not llama.main()
    said = capsys.readouterr().out
    assert said.splitlines()[0].endswith("weights; 9 tokens in") and "The red" in said
    monkeypatch.setattr("sys.argv", ["llama.py", "The red", str(tmp_path)])
    assert exit_status(llama.main) == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["-h"], 0), (["--model", "x"], 2),
                                         (["a", "b", "c"], 2)])
def test_llama_answers_help_and_refuses_flags(words, code):
    done = subprocess.run([sys.executable, "-X", "importtime", llama.__file__, *words],
                          capture_output=True, text=True)
    said = done.stdout if code == 0 else done.stderr
    assert done.returncode == code and "usage: llama.py" in said and "weights;" not in said
    assert "argparse" in done.stderr and "torch" not in done.stderr     # so at once


def ask(folder, *argv, typed=None, monkeypatch=None):
    """generate.py with --text in this process; typed: lines of a chat."""
    if typed is not None:
        lines = iter(typed)
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
    return g.main(parse_generate(["--text", *argv, "--model", str(folder),
                                  "--max-new-tokens", "5"]))


def test_a_question_about_text_alone(smol, tmp_path, capsys, monkeypatch):
    """A LLaMA's folder and a VLM's answer the same; a captioner is refused."""
    monkeypatch.setattr(g, "accept_any_bytes", lambda: None)
    ask(smol, "What is it?")
    alone = capsys.readouterr().out
    assert alone.strip()
    model = load_model(parse_generate(["--text", "x", "--model", str(smol)]))
    assert model.template == "smollm2" and model.stop_ids == {111}
    prompt = g.build_prompt(["What is it?"], "smollm2", model.tokenizer, ())
    want = model.tokenizer.decode(list(g.generate(model, prompt, max_new_tokens=5)))
    assert alone.strip() == want.strip()
    start_vlm(smol).save_pretrained(tmp_path / "vlm")
    ask(tmp_path / "vlm", "What is it?")
    assert capsys.readouterr().out == alone
    start_vlm(smol, "plain").save_pretrained(tmp_path / "captions")
    with pytest.raises(UsageError, match="about pictures only"):
        ask(tmp_path / "captions", "What is it?")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(data.BadModel, match="--text"):              # and without --text it is told
        g.main(parse_generate([str(tmp_path / "a.png"), "What?", "--model", str(smol)]))


def test_a_chat_about_text_alone(smol, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(g, "accept_any_bytes", lambda: None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    saved = tmp_path / "talk.json"
    typed = ["What is it?", f"/image {tmp_path / 'a.png'}", "And now?", f"/save {saved}", "/reset",
             f"/save {saved}", "Again?", "/quit"]
    assert ask(smol, typed=typed, monkeypatch=monkeypatch) == 0
    err = capsys.readouterr().err
    assert "sees no pictures" in err and err.count("error:") == 2   # nothing to save after /reset
    (row,) = json.loads(saved.read_text())
    assert "image" not in row and [t["value"] for t in row["conversations"]][::2] == [
        "What is it?", "And now?"]


@pytest.mark.parametrize("argv", [
    ["--text", "a question", "two"], ["--text", "--page"], ["--text", "x", "--caption"],
    ["--text", "x", "--attention", "a.png"], ["--text", "x", "--out", "a.json"], ["--text", " "],
    ["--text", "x", "--batch-size", "2"]])
def test_text_alone_takes_no_pictures(argv, capsys):
    with pytest.raises(SystemExit) as leaving:
        parse_generate(argv)
    assert leaving.value.code == 2 and capsys.readouterr().err


def test_large_fp32_weights_are_laid_out_on_request_only(smol, monkeypatch):
    import decoding.loading as loading
    kinds = lambda model: {type(part) for part in model.modules()}
    monkeypatch.setattr(loading, "LAID_BYTES", 1000)
    vlm = lambda: start_vlm(smol)
    assert Laid not in kinds(prepare_for_inference(vlm()))
    if torch.backends.mkldnn.is_available():
        assert Laid in kinds(prepare_for_inference(vlm(), lay_out=True))
        monkeypatch.setattr(loading, "LAID_BYTES", 10 ** 9)
        assert Laid in kinds(prepare_for_inference(vlm()))
    args = parse_generate(["--text", "x", "--lay-out", "--model", str(smol)])
    assert args.lay_out and isinstance(args, argparse.Namespace)
    assert load_model(args).llm.config.width == 32 and Path(smol).is_dir()


@pytest.mark.parametrize("more, told", [
    (["--quantize", "int8"], "nothing for the language model: its weights are in int8"),
    (["--dtype", "bf16"], "is for fp32 weights, and these are bfloat16"), ([], "")], ids=str)
def test_a_layout_that_changes_nothing_is_told(smol, capsys, more, told):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("laid out by oneDNN")
    for argv in (["--lay-out", *more], more):
        args = parse_generate(["--text", "x", "--model", str(smol), *argv, "--device", "cpu"])
        load_model(args, args.quantize)
        said = [x for x in capsys.readouterr().err.splitlines() if "--lay-out" in x]
        assert len(said) == bool(told and "--lay-out" in argv) and all(told in x for x in said)


def test_a_layout_is_for_a_cpu(smol, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    load_model(parse_generate(["--text", "x", "--model", str(smol), "--lay-out"]))
    assert "--lay-out is for a CPU with oneDNN" in capsys.readouterr().err


def test_starting_the_process_that_renders_takes_no_time_off_a_template(tmp_path, monkeypatch):
    """On a busy machine it took ten seconds, and the template was another one."""
    from formats import jinja_process
    monkeypatch.setattr(jinja_process, "SECONDS", 3.)
    monkeypatch.setattr(jinja_process.sys, "executable", slow_python(tmp_path, 4))
    jinja_process._process.cache_clear()
    assert jinja_process.render("{{ x }}", {"x": "y"}) == "y"
    jinja_process._process(jinja_process.os.getpid()).kill()
    jinja_process._process.cache_clear()


def slow_python(folder, seconds):
    """A Python that takes so long to start."""
    import sys
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nsleep {seconds}\nexec {sys.executable} \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def test_int4_says_what_it_costs(smol, capsys):
    """Control: int8, which hardly changes the answers, does not."""
    for codes, is_said in (("int4", True), ("int8", False)):
        prepare_for_inference(start_vlm(smol), codes)
        assert ("perplexity" in capsys.readouterr().err) == is_said
