"""python generate.py with a BLIP-2 as it was published: the demos' settings, --caption, folders."""
import json

import pytest
import torch
from PIL import Image

import data
import generate
import projector
from decoding.defaults import folder_settings
from decoding.flags import parse
from decoding.loading import load_model, prepare_for_inference
from formats.errors import UsageError
from test_blip2_llms import answers, byte_words, piece_words, their_model, their_prompts
from tiny import gap

QUESTION = "Question: what is this? Answer:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (folder, transformers' model)}, a picture, and a folder of two."""
    root = tmp_path_factory.mktemp("cli")
    made = {}
    for kind, words in (("opt", byte_words), ("t5", piece_words)):
        theirs = their_model(kind)
        theirs.save_pretrained(root / kind)
        words(root / kind, None)
        made[kind] = root / kind, theirs
    (root / "photos").mkdir()
    for i, colour in enumerate(("red", "green")):
        Image.new("RGB", (40, 30), colour).save(root / f"photos/{i}.png")
    return {**made, "photos": root / "photos", "picture": root / "photos/0.png"}


@pytest.fixture(autouse=True)
def stdin_of_a_test(monkeypatch):
    """pytest's has no encoding to change."""
    monkeypatch.setattr(generate, "accept_any_bytes", lambda: None)


def say(folders, kind, *arguments, capsys, folder=None):
    """(what generate.py prints, its notes)."""
    capsys.readouterr()
    line = [str(folders["picture"]), *arguments, "--model", str(folder or folders[kind][0]),
            "--device", "cpu", "--dtype", "fp32"]
    generate.main(parse(line))
    out = capsys.readouterr()
    return out.out.strip(), out.err


@torch.no_grad()
def said_by_theirs(folders, kind, text, **settings):
    """transformers' answer, up to the ids at which we stop."""
    folder, theirs = folders[kind]
    ours = projector.VLM.from_pretrained(folder)
    pixels = ours.pixels(data.load_image(folders["picture"]))
    inputs = their_prompts(folder, [text], True)
    ends = sorted(generate.Stops(ours).ids)
    out = theirs.generate(pixels, **inputs, eos_token_id=ends, pad_token_id=1, **settings)
    ids = answers(out, inputs, kind)[0].tolist()
    return ours.tokenizer.decode([i for i in ids if i not in ends]).strip()


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_settings_of_the_demos(folders, kind, capsys):
    """5 beams and 30 tokens, and a line that says so; a flag wins; greedy is another answer."""
    text, notes = say(folders, kind, QUESTION, capsys=capsys)
    assert "--num-beams 5" in notes and "--max-new-tokens 30" in notes
    assert text == said_by_theirs(folders, kind, QUESTION, num_beams=5, max_new_tokens=30)
    greedy, notes = say(folders, kind, QUESTION, "--num-beams", "1", "--max-new-tokens", "8",
                        capsys=capsys)
    assert "as this model is published" not in notes
    assert greedy == said_by_theirs(folders, kind, QUESTION, max_new_tokens=8) != text
    shorter, notes = say(folders, kind, QUESTION, "--max-new-tokens", "9", "--length-penalty",
                         "-1", capsys=capsys)
    assert "as this model is published: --num-beams 5\n" in notes
    assert shorter == said_by_theirs(folders, kind, QUESTION, num_beams=5, max_new_tokens=9,
                                     length_penalty=-1.0)
    drawn, notes = say(folders, kind, QUESTION, "--temperature", "1", capsys=capsys)
    assert "--num-beams" not in notes


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_caption_without_a_question(folders, kind, capsys, tmp_path):
    text, _ = say(folders, kind, "--caption", capsys=capsys)
    assert text == said_by_theirs(folders, kind, "", num_beams=5, max_new_tokens=30)
    generate.main(parse([str(folders["photos"]), "--caption", "--out", str(tmp_path / "o.json"),
                         "--model", str(folders[kind][0]), "--device", "cpu"]))
    rows = json.loads((tmp_path / "o.json").read_text())
    assert len(rows) == 2 and rows[0]["conversations"][1]["value"] == text


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_folder_wins_over_the_demos(folders, kind, tmp_path, capsys):
    for file in folders[kind][0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({
        "num_beams": 2, "max_new_tokens": 6, "length_penalty": 0.0, "no_repeat_ngram_size": 0}))
    text, notes = say(folders, kind, QUESTION, folder=tmp_path, capsys=capsys)
    assert "--num-beams 2" in notes and "--length-penalty 0.0" in notes
    assert text == said_by_theirs(folders, kind, QUESTION, num_beams=2, max_new_tokens=6,
                                  length_penalty=0.0)


@pytest.mark.parametrize("content, words", [
    ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3"), ({"min_length": 8}, "min_length 8"),
    ({"num_beams": 0}, "num-beams must"), ({"num_beams": "many"}, "number"),
    ({"do_sample": True, "top_p": 2}, "top-p"), ({"bad_words_ids": [[1]]}, "bad_words_ids")])
def test_what_a_folder_may_not_say(tmp_path, content, words):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(data.BadModel, match=words) as info:
        folder_settings(tmp_path, False)
    assert "\n" not in str(info.value)


def test_what_a_folder_may_say(tmp_path, capsys):
    def settings(first_is_start=False, **content):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return folder_settings(tmp_path, first_is_start)
    assert settings() == settings(eos_token_id=5, pad_token_id=1, use_cache=True) == {}
    assert settings(do_sample=True, top_p=.9) == {"temperature": 1.0, "top_k": 50, "top_p": .9,
                                                  "num_beams": 1}
    assert settings(True, max_length=20) == {"max_new_tokens": 19}
    assert settings(max_length=20) == {} and "--max-new-tokens" in capsys.readouterr().err


def test_caption_is_for_captioners(folders, capsys):
    with pytest.raises(SystemExit):
        parse(["x.png", "What?", "--caption"])
    assert "leave the question out" in capsys.readouterr().err
    args = parse(["x.png", "--caption", "--model", str(folders["opt"][0]), "--template", "v1",
                  "--device", "cpu"])
    with pytest.raises(UsageError, match="answers questions"):
        load_model(args)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_float16_is_kept_where_transformers_keeps_it(folders, kind, tmp_path):
    """A folder in fp16: Q-Former and T5's wo in fp32; saved again as it was."""
    folder, theirs = folders[kind]
    back = type(theirs).from_pretrained(folder, dtype=torch.float16)
    wide = sum(p.dtype == torch.float32 for p in back.parameters())
    ours = projector.VLM.from_pretrained(folder, torch.float16)
    names = [n for n, p in ours.named_parameters() if p.dtype == torch.float32]
    assert all("projector.qformer." in n or n.endswith("mlp.down.weight") for n in names)
    ours.save_pretrained(tmp_path)
    kinds = data.load_weights(tmp_path)
    assert sum(kinds[n].dtype == torch.float32 for n in kinds) == wide > 0
    assert kinds.dtype == torch.float16
    # control: bf16 has fp32's range, and nothing is kept
    half = projector.VLM.from_pretrained(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = torch.tensor([generate.build_prompt([QUESTION], ours.template, ours.tokenizer)])
    with torch.no_grad():
        exact = projector.VLM.from_pretrained(folder)
        pixels = ours.pixels(data.load_image(folders["picture"]))
        assert gap(ours(ids, pixels).float(), exact(ids, pixels)) < .02


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_quantized_weights_keep_their_biases(folders, kind):
    """int8 is near, and so is the layout that a CPU reads fastest; without biases it is not."""
    folder, _ = folders[kind]
    exact = projector.VLM.from_pretrained(folder)
    pixels = exact.pixels(data.load_image(folders["picture"]))
    ids = torch.tensor([generate.build_prompt([QUESTION], exact.template, exact.tokenizer)])
    want = exact(ids, pixels)
    laid = prepare_for_inference(projector.VLM.from_pretrained(folder))
    assert gap(laid(ids, pixels), want) < 1e-5
    coded = prepare_for_inference(projector.VLM.from_pretrained(folder), "int8")
    near = gap(coded(ids, pixels), want)
    assert near < .1
    if kind == "opt":
        for part in coded.llm.modules():
            if getattr(part, "bias", None) is not None and hasattr(part, "codes"):
                part.bias.zero_()
        assert gap(coded(ids, pixels), want) > 3 * near
