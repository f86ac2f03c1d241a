"""Reports about prompts: a folder's own chat template and ends, and ours in other tools' hands.

The right values are transformers': its rendering of the same Jinja, its tokenizer's ids."""
import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import clip
import data
import formats.templates
import generate as g
import llama
import train
from projector import VLM
from decoding.stopping import stop_ids
from formats.errors import exit_status
from formats.chat_templates import ChatTemplate
from instruct import answerers
from train import parse_args as parse

TOY = Path(data.__file__).parent / "toy/weights/llama"
EYE = clip.Config(width=32, depth=2, heads=4, mlp=48, eps=1e-5, image_size=24, patch_size=8)
NAMED = [name for name in data.TEMPLATES
         if data.TEMPLATES[name].style in ("two", "chat", "llama2", "single")]
USERS = {"user": "human", "assistant": "gpt"}
TALKS = [[("user", "<image>\nWhat is it?")],
         [("user", "<image>\nWhat is it?"), ("assistant", "A cat."), ("user", "Sure?")],
         [("user", "Why?")], [("user", "<image>")],
         [("user", "Why?"), ("assistant", "No."), ("user", "<image>\n é 日本\n\n a")]]

# Written as the hub's are, in words of our own.
SAID = ("{% for c in m['content'] if c['type'] == 'image' %}<image>{{ '\\n' }}{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}")
HUB = {"vicuna": "{% for m in messages %}{{ m['role'].upper() + ': ' }}" + SAID + "{{ ' ' }}"
                 "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
       "mistral": "{% for m in messages %}{% if m['role'] == 'user' %}[INST] " + SAID + " [/INST]"
                  "{% else %} " + SAID + "</s> {% endif %}{% endfor %}",
       "llama_3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
                  "'<|end_header_id|>\\n\\n' }}" + SAID + "<|eot_id|>{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>"
                  "\\n\\n' }}{% endif %}",
       "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}" + SAID
                 + "<|im_end|>{% endfor %}{% if add_generation_prompt %}"
                 "{{ '<|im_start|>assistant\\n' }}{% endif %}",
       "qwen": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}" + SAID
               + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|im_start|>assistant\\n' }}{% endif %}",
       "phi": "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ '\\n' }}" + SAID
              + "{{ '<|end|>\\n' }}{% endfor %}<|assistant|>{{ '\\n' }}"}
NEAR = {"vicuna": "v1", "mistral": "mistral_instruct", "llama_3": "llama_3",
        "chatml": "chatml_direct", "qwen": "qwen_1_5"}
SPECIALS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
            "<|end|>", "<|user|>", "<|assistant|>"]


def words_in(folder, kind="first", specials=()):
    """A tokenizer of the toy's vocabulary. every: legacy; hub: as Vicuna 1.5's is, whose file says
    Prepend and whose config says not legacy; lies: the other way round."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads((TOY / "tokenizer.json").read_text())
    config = json.loads((TOY / "tokenizer_config.json").read_text())
    size = len(spec["model"]["vocab"])
    flags = {k: v for k, v in spec["added_tokens"][0].items() if k not in ("id", "content")}
    spec["added_tokens"] += [{"id": size + i, "content": token, **flags}
                             for i, token in enumerate(specials)]
    if kind in ("every", "hub"):
        spec["pre_tokenizer"], spec["normalizer"] = None, {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    config["legacy"] = kind in ("every", "lies")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return data.Tokenizer(folder)


def tiny(words, template="v1", **options):
    tongue = llama.Config(vocab=len(words) + 64, width=16, depth=1, heads=2, kv_heads=2, mlp=16,
                          eps=1e-5, rope_theta=1e4, context=512)
    torch.manual_seed(0)
    return VLM(clip.ViT(EYE), "mlp", llama.Llama(tongue), words, template, **options).eval()


def stranger(folder, jinja=None, kind="first", files=(), model_type="llama", **generation):
    """A folder as other tools save it: nothing of ours in config.json. files: {name: content}."""
    tiny(words_in(folder.parent / f"{folder.name}-words", kind, SPECIALS)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["template"]
    config["text_config"]["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["normalizer"] = None if kind == "first" else spec["normalizer"]
    for token in spec["added_tokens"]:
        token["normalized"] = False
    if kind in ("hub", "lies"):                 # the file's rule is not the config's
        before = json.loads((folder.parent / f"{folder.name}-words/tokenizer.json").read_text())
        spec |= {key: before[key] for key in ("normalizer", "pre_tokenizer")}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    for name, content in dict(files).items():
        (folder / name).write_text(json.dumps(content))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def ours(talk):
    return [{"from": USERS.get(role, role), "value": text} for role, text in talk]


def theirs(talk, form="list"):
    """Messages for transformers: contents as texts, or as lists of parts."""
    def parts(text):
        found = [{"type": "image"}] if text.startswith("<image>") else []
        text = text.removeprefix("<image>").removeprefix("\n")
        return found + [{"type": "text", "text": text}] * bool(text)
    return [{"role": role, "content": parts(text) if form == "list" else text}
            for role, text in talk]


def processor_ids(processor, messages, mark, pictures, **more):
    """Ids of a processor, each picture as one."""
    text = processor.apply_chat_template(messages, **more)
    image = [Image.new("RGB", (24, 24))] * pictures
    begun = text.startswith("<s>")              # what apply_chat_template(tokenize=True) asks
    ids = processor(text=text, images=image or None, add_special_tokens=not begun)["input_ids"]
    ids = ids[0] if isinstance(ids[0], list) else ids
    groups = [(i, list(group)) for i, group in itertools.groupby(ids)]
    return [i for i, group in groups for _ in (group[:1] if i == mark else group)]


def with_mark(ids, mark):
    return [mark if i == data.IMAGE else i for i in ids]


# ------------------------------------------------------------------- our templates, for others

@pytest.mark.parametrize("kind", ["first", "every", "hub", "lies"])
@pytest.mark.parametrize("name", NAMED)
def test_other_tools_ask_in_our_ids(tmp_path, name, kind):
    model = tiny(words_in(tmp_path / "words", kind), name)
    model.save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    again = data.Tokenizer(tmp_path / "model")
    for talk, form in itertools.product(TALKS, ("text", "list")):
        want = with_mark(data.prompt_tokens(ours(talk), name, model.tokenizer), model.image_token)
        assert with_mark(data.prompt_tokens(ours(talk), name, again), model.image_token) == want
        told = theirs(talk, form)
        assert words.apply_chat_template(told, add_generation_prompt=True, tokenize=True,
                                         return_dict=False) == want
        text = processor.apply_chat_template(told, add_generation_prompt=True)
        assert text == data.prompt(ours(talk), name)
        assert processor_ids(processor, told, model.image_token, want.count(model.image_token),
                             add_generation_prompt=True) == want


@pytest.mark.parametrize("name", ["v1", "chatml_direct", "llava_llama_2", "llama_3", "qwen_1_5"])
def test_other_tools_read_whole_talks_as_training_does(tmp_path, name):
    model = tiny(words_in(tmp_path / "words"), name)
    model.save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    talk = [*TALKS[1], ("assistant", "Yes.")]
    want = with_mark(data.encode(ours(talk), name, model.tokenizer)[0], model.image_token)
    for form in ("text", "list"):
        assert words.apply_chat_template(theirs(talk, form), tokenize=True,
                                         return_dict=False) == want


@pytest.mark.parametrize("name", [n for n in NAMED if data.TEMPLATES[n].system])
def test_a_system_turn_replaces_the_system_text(tmp_path, name):
    model = tiny(words_in(tmp_path / "words"), name)
    model.save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    t = data.TEMPLATES[name]
    want = data.prompt(ours(TALKS[1]), name).replace(t.system, "Be brief.")
    assert want != data.prompt(ours(TALKS[1]), name)
    for form in ("text", "list"):
        told = theirs([("system", "Be brief."), *TALKS[1]], form)
        said = words.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
        assert said.removeprefix("<s>").removeprefix(" ") == want


def test_no_system_turn_where_the_model_knows_none(tmp_path):
    tiny(words_in(tmp_path / "words"), "mistral_instruct").save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="no system turn"):
        words.apply_chat_template(theirs([("system", "Be brief."), *TALKS[2]]), tokenize=False)


def test_a_captioner_is_never_asked_nothing(tmp_path):
    model = tiny(words_in(tmp_path / "words"), "plain", aspect="square")
    model.save_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ask = lambda told: words.apply_chat_template(told, tokenize=True, return_dict=False)
    want = with_mark(data.prompt_tokens(ours([("user", "<image>")]), "plain", model.tokenizer),
                     model.image_token)
    text = [{"role": "user", "content": "What is 2 and 2?"}]
    for form in ("text", "list"):
        assert ask(theirs([("user", "<image>")], form)) == want
        assert ask(theirs([("user", "What is 2 and 2?")], form)) == model.tokenizer.encode(
            "What is 2 and 2?")
    pair = [("user", "<image>"), ("assistant", "a cat")]
    for form in ("text", "list"):
        assert ask(theirs(pair, form)) == with_mark(
            data.encode(ours(pair), "plain", model.tokenizer)[0], model.image_token)
    assert words.apply_chat_template(text, tokenize=False).endswith("What is 2 and 2?")


@pytest.mark.parametrize("name", ["plain", *NAMED])
def test_what_we_wrote_is_recognised(tmp_path, name):
    """Without our key in config.json, too; aliases come back as the first name."""
    tiny(words_in(tmp_path / "words"), name).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.pop("template") == name
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    again = VLM.from_pretrained(tmp_path / "model").template
    assert type(again) is str and data.TEMPLATES[again] == data.TEMPLATES[name]
    (tmp_path / "model/chat_template.json").unlink()        # the tokenizer's own is left
    again = VLM.from_pretrained(tmp_path / "model").template
    assert type(again) is str and data.TEMPLATES[again] == data.TEMPLATES[name]


# ------------------------------------------------------------------- a folder's own template

@pytest.mark.parametrize("model_type, rule", [("llama", "first"), ("llama", "every"),
                                              ("llama", "hub"), ("mistral", "lies")])
@pytest.mark.parametrize("kind", HUB)
def test_a_folder_is_asked_in_its_own_words(tmp_path, capsys, kind, model_type, rule):
    folder = stranger(tmp_path / "model", HUB[kind], rule, model_type=model_type)
    model = VLM.from_pretrained(folder)
    told = capsys.readouterr().err
    assert ("none of ours" in told) == (kind not in NEAR) and told.count("\n") <= 1
    assert model.template == NEAR.get(kind, "chat_template.jinja")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for talk in TALKS:
        want = processor_ids(processor, theirs(talk), model.image_token,
                             "<image>" in str(talk), add_generation_prompt=True)
        got = data.prompt_tokens(ours(talk), model.template, model.tokenizer)
        assert with_mark(got, model.image_token) == want
    assert g.build_prompt(["What is it?"], model.template, model.tokenizer) == data.prompt_tokens(
        ours(TALKS[0]), model.template, model.tokenizer)


def test_a_template_that_is_exactly_ours_is_ours(tmp_path):
    """Not letter by letter: it writes the same. Control: one that differs in later turns."""
    system = data.TEMPLATES["v1"].system
    jinja = ("{{ bos_token + '" + system.replace("'", "\\'") + " ' }}{% for m in messages %}"
             "{{ 'USER' if m.role == 'user' else 'ASSISTANT' }}: " + SAID
             + "{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}ASSISTANT:")
    assert type(VLM.from_pretrained(stranger(tmp_path / "a", jinja)).template) is str
    other = VLM.from_pretrained(stranger(tmp_path / "b", jinja.replace("</s>", "; "))).template
    assert other == "v1" and isinstance(other, ChatTemplate)


def test_our_key_wins_over_the_template(tmp_path):
    folder = stranger(tmp_path / "model", HUB["llama_3"])
    assert VLM.from_pretrained(folder).template == "llama_3"            # control
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "template": "llava_v0"}))
    assert VLM.from_pretrained(folder).template == "llava_v0"


@pytest.mark.parametrize("model_type, specials, want", [
    ("llama", [], "v1"), ("mistral", [], "mistral_instruct"), ("llama", SPECIALS[:3], "llama_3"),
    ("llama", SPECIALS[3:5], "chatml_direct")])
def test_a_folder_without_template_is_asked_as_its_tokens_say(tmp_path, model_type, specials,
                                                              want):
    folder = tmp_path / "model"
    tiny(words_in(tmp_path / "words", "first", specials)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["template"]
    config["text_config"]["model_type"] = model_type
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert VLM.from_pretrained(folder).template == want


def test_which_file_counts_is_transformers_rule(tmp_path):
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": HUB["mistral"]}]
    cases = [({"tokenizer_config.json": HUB["llama_3"]}, "llama_3"),
             ({"tokenizer_config.json": named}, "mistral_instruct"),
             ({"tokenizer_config.json": HUB["llama_3"], "chat_template.jinja": HUB["vicuna"]},
              "v1"),
             ({"chat_template.jinja": HUB["vicuna"], "chat_template.json": HUB["chatml"]},
              "chatml_direct"),
             ({"chat_template.json": HUB["chatml"], "processor_config.json": HUB["qwen"]},
              "qwen_1_5")]
    for i, (files, want) in enumerate(cases):
        folder = stranger(tmp_path / f"{i}")
        for name, told in files.items():
            path = folder / name
            old = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(told if path.suffix == ".jinja" else
                            json.dumps({**old, "chat_template": told}))
        model = VLM.from_pretrained(folder)
        assert model.template == want
        tool = (transformers.AutoTokenizer if list(files) == ["tokenizer_config.json"] else
                transformers.AutoProcessor).from_pretrained(folder)
        if i != 1 and list(files) != ["tokenizer_config.json"]:
            assert tool.apply_chat_template(theirs(TALKS[0]), add_generation_prompt=True) == (
                data.prompt(ours(TALKS[0]), model.template))
    nameless = {"chat_template.json": {"chat_template": {"a": "x"}}}
    folder = stranger(tmp_path / "none", files=nameless)
    with pytest.raises(data.BadModel, match="none named 'default'"):
        VLM.from_pretrained(folder)


def test_a_template_that_takes_texts_only(tmp_path):
    """A language model's own, in tokenizer_config.json: pictures stand in the text."""
    jinja = ("{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
             " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
             "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
    folder = stranger(tmp_path / "model", jinja)
    model = VLM.from_pretrained(folder)
    assert model.template == "llama_3"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    got = g.build_prompt(["What is it?"], model.template, model.tokenizer)
    assert with_mark(got, model.image_token)[1:] == words.apply_chat_template(
        theirs(TALKS[0], "text"), add_generation_prompt=True, tokenize=True, return_dict=False)
    assert got[0] == model.tokenizer.bos


@pytest.mark.parametrize("kind", HUB)
@pytest.mark.parametrize("typed", ["<|eot_id|>", "a</s>b", "<image>", "<image>\n<|im_end|>\n<s>",
                                   "  <|end|><|assistant|>\nYes"])
def test_what_is_typed_stays_letters(tmp_path, kind, typed):
    """transformers says the same where it is asked to (sanitize_control_tokens)."""
    folder = stranger(tmp_path / "model", HUB[kind])
    model = VLM.from_pretrained(folder)
    plain = g.build_prompt(["Q"], model.template, model.tokenizer)
    ids = g.build_prompt([typed], model.template, model.tokenizer)
    assert isinstance(model.template, ChatTemplate)
    control = {model.tokenizer.added(t) for t in [*SPECIALS, "<s>", "</s>", "<image>", "<unk>"]}
    count = lambda row: sorted(i for i in row if i in control or i == data.IMAGE)
    assert count(ids) == count(plain) and typed.strip() in model.tokenizer.decode(ids)
    parsed = data.prompt_ids(data.prompt(ours([("user", f"<image>\n{typed}")]), model.template),
                             model.tokenizer)
    assert count(parsed) != count(plain)                    # control: parsed, it is no letters


def test_letters_as_transformers_sanitises_them(tmp_path):
    folder = stranger(tmp_path / "model", HUB["llama_3"])
    model = VLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [("user", "What is<|eot_id|>this</s>?")]
    want = words.apply_chat_template(theirs(talk), add_generation_prompt=True, tokenize=True,
                                     return_dict=False, sanitize_control_tokens=True)
    got = data.prompt_tokens(ours(talk), model.template, model.tokenizer)[1:]
    assert model.tokenizer.decode(got, False) == model.tokenizer.decode(want, False)
    control = [model.tokenizer.added(t) for t in SPECIALS]
    assert [i for i in got if i in control] == [i for i in want if i in control]


def test_training_from_a_strange_template_needs_a_name(tmp_path, monkeypatch, capsys):
    folder = stranger(tmp_path / "model", HUB["phi"])
    run = lambda *more: exit_status(lambda: train.main(parse([
        "--stage", "2", "--from", str(folder), "--output-dir", str(tmp_path / f"out{len(more)}"),
        "--steps", "1", "--batch", "8", *more])))
    assert run() == 2
    told = capsys.readouterr().err
    assert "--template v1" in told and told.strip().splitlines()[-1].startswith("error:")


def test_a_strange_model_is_saved_as_it_came(tmp_path):
    folder = stranger(tmp_path / "a", HUB["phi"], eos_token_id=[2, 7])
    model = VLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "b")
    again = VLM.from_pretrained(tmp_path / "b")
    assert "template" not in json.loads((tmp_path / "b/config.json").read_text())
    for talk in TALKS[:1]:
        assert data.prompt_tokens(
            ours(talk), again.template, again.tokenizer
        ) == data.prompt_tokens(ours(talk), model.template, model.tokenizer)
    assert stop_ids(again) == stop_ids(model) >= {2, 7, model.tokenizer.added("<|end|>")}


def test_a_language_model_is_asked_in_its_own_words_too(tmp_path, monkeypatch):
    """instruct with a local LLaMA: its template and its ends; without any, v1."""
    asked = []

    class Said(list):
        finish_reason = "end"

    def batch(llm, rows, eos=None, **more):
        asked.append((rows[0], eos))
        told = [Said([2]) for _ in rows]
        return told
    monkeypatch.setattr(answerers, "generate_batch", batch)
    words = words_in(tmp_path / "llm", "first", SPECIALS)
    tongue = llama.Config(vocab=len(words), width=16, depth=1, heads=2, kv_heads=2, mlp=16,
                          eps=1e-5, rope_theta=1e4, context=512)
    llama.Llama(tongue).save_pretrained(tmp_path / "llm")
    (tmp_path / "llm/generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    job = SimpleNamespace(request=[("system", "Be brief."), ("user", "Why?")])
    args = SimpleNamespace(llm=str(tmp_path / "llm"), template=None, dtype="fp32", device="cpu",
                           batch_size=1, max_tokens=4, temperature=0.0, seed=0)
    monkeypatch.setattr(answerers, "unanswered_chunks", lambda jobs, *rest: [(0, jobs)])
    talk = [("user", "Be brief.\n\nWhy?")]
    list(answerers.from_llama(args, [job], None))
    assert asked[-1] == (data.prompt_tokens(ours(talk), "v1", words, 0), {2, 9})
    (tmp_path / "llm/chat_template.jinja").write_text(HUB["llama_3"])
    list(answerers.from_llama(args, [job], None))
    told = transformers.AutoTokenizer.from_pretrained(tmp_path / "llm").apply_chat_template(
        theirs(talk), add_generation_prompt=True, tokenize=True, return_dict=False)
    assert asked[-1] == ([1, *told], {2, 9, words.added("<|eot_id|>")})


# ------------------------------------------------------------------- templates that do harm

HARM = {"hangs": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "fills": "{{ 'a' * 10 ** 11 }}", "doubles": "{% set n = namespace(x='ab') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "pads": "{{ '%1000000000d' % 3 }}", "syntax": "{% for %}", "raises": "{{ raise_exception"
        "('no') }}", "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "reaches": "{{ messages.__class__.__mro__ }}", "ns": "{{ namespace(__class__=1) }}",
        "wrong": "{{ messages[7].x.y }}"}


@pytest.mark.parametrize("kind", HARM)
def test_a_harmful_template_is_one_line(tmp_path, kind, monkeypatch):
    import formats.jinja_process
    monkeypatch.setattr(formats.jinja_process, "SECONDS", 3.0)
    folder = stranger(tmp_path / "model", HARM[kind])
    start = time.monotonic()
    model = VLM.from_pretrained(folder)
    with pytest.raises(data.BadModel, match="--template NAME") as info:
        g.build_prompt(["What?"], model.template, model.tokenizer)
    assert "\n" not in str(info.value) and time.monotonic() - start < 30
    model.template = "v1"                                   # what --template v1 does
    assert g.build_prompt(["What?"], model.template, model.tokenizer)
    fine = VLM.from_pretrained(stranger(tmp_path / "fine", HUB["vicuna"]))
    assert g.build_prompt(["What?"], fine.template, fine.tokenizer)  # the next one is served again


# ------------------------------------------------------------------- where answers end

def said_by(model, row):
    """A model that says the ids of this row, whatever it is asked."""
    llm = model.llm
    steps = iter(row)

    def logits(_, x, *rest):
        out = torch.full((len(x), llm.config.vocab), -9.0)
        out[:, next(steps)] = 9.0
        return out
    return logits


@pytest.mark.parametrize("told, want", [([2, 11, 12], {2, 11, 12}), (11, {2, 11}), (None, {2})])
def test_every_end_of_the_folder_ends_an_answer(tmp_path, monkeypatch, told, want):
    folder = stranger(tmp_path / "model", HUB["vicuna"], eos_token_id=told, bos_token_id=1)
    model = VLM.from_pretrained(folder)
    assert stop_ids(model) == want
    for end in want:
        monkeypatch.setattr(type(model.llm), "next_logits", said_by(model, [40, 41, end, 42, 43]))
        assert list(g.generate(model, [1, 5], None, 5)) == [40, 41]
    model.save_pretrained(tmp_path / "again")
    assert stop_ids(VLM.from_pretrained(tmp_path / "again")) == want
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id
    assert set([saved] if type(saved) is int else saved) == want


@pytest.mark.parametrize("bad", ["2", [2, "x"], {"a": 1}, 1.5, [True]])
def test_ends_that_are_no_ids(tmp_path, bad):
    folder = stranger(tmp_path / "model", HUB["vicuna"], eos_token_id=bad)
    with pytest.raises(data.BadModel, match="eos_token_id"):
        VLM.from_pretrained(folder)


def test_ends_of_config_where_there_is_no_generation_config(tmp_path):
    folder = stranger(tmp_path / "model", HUB["vicuna"])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [2, 19]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    assert stop_ids(VLM.from_pretrained(folder)) == {2, 19}


@pytest.mark.parametrize("name", NAMED)
def test_the_template_s_end_is_saved(tmp_path, name):
    model = tiny(words_in(tmp_path / "words", "first", SPECIALS), name)
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model/generation_config.json").read_text())["eos_token_id"]
    assert set([saved] if type(saved) is int else saved) == stop_ids(model)
    end = model.tokenizer.added(data.TEMPLATES[name].stop)
    assert end is None or end in stop_ids(model)


def test_a_captioner_s_newline_does_not_end_answers_later(tmp_path):
    model = tiny(words_in(tmp_path / "words"), "plain", aspect="square")
    newline = model.tokenizer.encode("\n", bos=False)[-1]
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/generation_config.json").read_text())[
        "eos_token_id"] == [2, newline]
    again = VLM.from_pretrained(tmp_path / "model")
    assert stop_ids(again) == {2, newline}
    again.template = "v1"                                   # stage 2
    assert stop_ids(again) == {2}


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_text_that_is_a_token(tmp_path, monkeypatch, beams):
    model = tiny(words_in(tmp_path / "words", "first", SPECIALS))
    end = model.tokenizer.added("<|eot_id|>")
    row = [40, 41, end, 42, 43]
    for stop, want in (((), row), (["<|eot_id|>"], row[:2]), ("<|eot_id|>", row[:2])):
        monkeypatch.setattr(type(model.llm), "next_logits", said_by(model, row))
        assert list(g.generate(model, [1, 5], None, 5, num_beams=beams, stop=stop)) == want


def test_v0_says_that_the_example_is_left_out():
    source = Path(formats.templates.__file__).read_text()
    before = source[:source.index('"llava_v0": row(')].splitlines()[-5:]
    assert "quirk" in "".join(before) and "renewable energy" in "".join(before)
