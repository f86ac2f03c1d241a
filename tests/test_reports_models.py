"""What users reported of configs, sliding windows, CLIP's text tower, InstructBLIP's questions and
the requirement files. Right values come from transformers, or the official rule named there."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.requirements import Requirement
from PIL import Image

from formats import configs
import clip
import data
import evaluate
import generate
import instruct
import llama
import projector
import test_compile
import train
from kernels.attention import document_spans
from test_qformer_vlm import ASKED, PIXELS, READER, folders      # noqa: F401 (a fixture)
from tiny import LIMIT, edit, gap, loaded, shaken, write_words
from decoding.attention_map import attention_to_patches
from decoding.captions import caption_folder
from decoding.cuda_graph import StaticCache
from evaluate import benchmarks
from evaluate.benchmarks import model_answers
from evaluate.toy import answers
from formats.errors import UserError
from instruct.journal import Request
from trainer.build import new_vlm
from trainer.loader import MicroBatches

ROOT = Path(__file__).parents[1]
TONGUE = dict(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5,
              max_position_embeddings=256)


def config(**values):
    return llama.Config(**configs.llama_from_hf({**TONGUE, **values}))


# ------------------------------------------------------------------------- the requirement files

def required(path):
    lines = [line.split("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    return {r.name: r for r in map(Requirement, (x for x in lines if x and x[0] != "-"))}


def test_the_tests_ask_for_the_triton_that_torch_brings():
    """torch 2.13.0 of the package index requires triton==3.7.1 on Linux; its CPU wheel, none."""
    assert str(required("requirements.txt")["torch"].specifier) == "==2.13.0"
    triton = required("tests/requirements.txt")["triton"]
    assert triton.specifier.contains("3.7.1") and triton.marker.evaluate({"sys_platform": "linux"})
    assert not triton.marker.evaluate({"sys_platform": "darwin"})       # no wheels there
    assert {"3.6.0", "3.7.1", test_compile.INSTALLED} <= {*test_compile.VERSIONS,
                                                           test_compile.INSTALLED}


def test_some_transformers_serves_every_python():
    """5.20.2 is the last release for Python 3.10, and what the other Pythons get is ours."""
    theirs = required("tests/requirements.txt")["transformers"]
    assert theirs.marker is None and theirs.specifier.contains("5.20.2")
    assert theirs.specifier.contains("5.23.0") and not theirs.specifier.contains("6.0")


# ------------------------------------------------------------------------------- the config

@pytest.mark.parametrize("values, context", [
    ({}, 256),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1024),        # as Vicuna-16k's
    ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, 2048),     # as LongChat-32k's
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, 640),
    # who names the length before apart has multiplied already, or has not
    ({"max_position_embeddings": 1024, "rope_scaling": {
        "rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0,
                       "original_max_position_embeddings": 256}}, 1024),
    ({"rope_scaling": {"rope_type": "linear", "factor": .5}}, 256),
    ({"rope_scaling": {"rope_type": "default"}}, 256),
    # the length after is what a llama3 says
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, 256),
    ({"model_type": "mistral", "sliding_window": 16}, 256),
    ({"model_type": "mistral"}, 256),
    ({"model_type": "mistral", "sliding_window": 16, "max_position_embeddings": 2 ** 17}, 2 ** 17),
    ({"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2.0}}, 512)])
def test_the_context(values, context):
    """FastChat's get_context_length: int(factor * max_position_embeddings)."""
    made = config(**values)
    assert made.context == context
    assert (
        llama.Config(**configs.llama_from_hf(configs.llama_to_hf(made))) == made
    )  # saved, it loads so again


def test_a_context_that_the_factor_does_not_divide_survives():
    for old in (4096, 4097, 1000, 333):
        for factor in (1.5, 2.5, 3.0, 4.0, 7.3):
            made = config(max_position_embeddings=old, rope_scaling={"type": "linear",
                                                                     "factor": factor})
            assert made.context == int(old * factor)
            assert llama.Config(**configs.llama_from_hf(configs.llama_to_hf(made))) == made


@pytest.mark.parametrize("values", [
    {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 700.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 700.0}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 700.0},
    {"rope_theta": 700.0}, {}])
def test_theta_is_where_transformers_finds_it(values):
    theirs = transformers.LlamaConfig(**TONGUE, **json.loads(json.dumps(values)))
    assert config(**values).rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "one object",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"rope_scaling": [4]}, "one object"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0"),
        ({"model_type": "mistral", "sliding_window": -4}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": True}, "sliding_window"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": "4"},
            "context",
        ),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_what_is_not_known_is_refused_by_name(values, said):
    with pytest.raises(data.BadModel, match=said) as told:
        config(**values)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("eos", [[97, 98], 97, [98], None])
def test_end_ids_may_be_a_list_and_stay(tmp_path, eos):
    theirs = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **TONGUE, bos_token_id=96, eos_token_id=eos)))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama.Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = loaded(transformers.LlamaForCausalLM, tmp_path / "ours").config
    assert (again.bos_token_id, again.eos_token_id) == (96, eos)


def test_a_stretched_model_writes_past_the_length_before(tmp_path):
    ours = shaken(llama.Llama(config(max_position_embeddings=16, rope_scaling={
        "type": "linear", "factor": 4.0})))
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlamaForCausalLM, tmp_path)
    ids = torch.randint(3, 100, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert gap(ours(ids), theirs(ids).logits) <= LIMIT
    assert len(list(generate.generate(ours, ids[0, :40].tolist(), max_new_tokens=99))) == 24
    with pytest.raises(UserError, match="context has 64"):
        list(generate.generate(ours, ids[0].tolist() * 2))


# ------------------------------------------------------------------------------- the window

WINDOW = 5


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def mistral(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    theirs = shaken(transformers.MistralForCausalLM(transformers.MistralConfig(
        **TONGUE, sliding_window=WINDOW, attn_implementation=request.param)))
    theirs.save_pretrained(folder)
    return folder, llama.Llama.from_pretrained(folder), theirs


def draw(*shape):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(7))


def widened(model):
    """The same model without a window: the control."""
    wide = llama.Llama(replace(model.config, window=None)).eval()
    wide.load_state_dict(model.state_dict())
    return wide


@torch.no_grad()
def test_prefill_sees_the_window(mistral):
    _, ours, theirs = mistral
    for T in (WINDOW, WINDOW + 1, 40):
        ids = draw(2, T)
        assert gap(ours(ids), theirs(ids).logits) <= LIMIT
        assert (gap(widened(ours)(ids), theirs(ids).logits) > 100 * LIMIT) == (T > WINDOW)
    ids = draw(1, 600)                                  # where PyTorch's fused operation takes over
    with torch.no_grad():
        assert gap(ours(ids), theirs(ids).logits) <= LIMIT


def stepped(model, ids, attention_mask, prompt, held=False):
    """Logits of the places behind the prompt, one by one with a cache; held: by the device."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = llama.KVCache(model.config, len(ids), ids.shape[1] + 3, model.embed.weight,
                        attention_mask[:, :prompt])
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    model(ids[:, :prompt], cache, position_ids[:, :prompt])
    if held:
        cache = StaticCache(cache)
    return torch.cat([model(ids[:, t:t + 1], cache, position_ids[:, t:t + 1])
                      for t in range(prompt, ids.shape[1])], 1)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("prompt", [3, 12])
@torch.no_grad()
def test_step_by_step_with_a_cache_and_left_padding(mistral, prompt, held):
    _, ours, theirs = mistral
    ids, attention_mask = draw(3, 24), torch.ones(3, 24, dtype=torch.bool)
    attention_mask[1, :1], attention_mask[2, :prompt - 1] = False, False
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    told = theirs(ids, attention_mask=attention_mask.long(), position_ids=position_ids).logits
    # the whole row at once, then a place at a time
    for got in (ours(ids, position_ids=position_ids, attention_mask=attention_mask)[:, prompt:],
                stepped(ours, ids, attention_mask, prompt, held)):
        assert gap(got, told[:, prompt:]) <= LIMIT
    assert (
        gap(stepped(widened(ours), ids, attention_mask, prompt, held), told[:, prompt:])
        > 100 * LIMIT
    )


@torch.no_grad()
def test_a_chunk_behind_a_cache_sees_its_window(mistral):
    _, ours, theirs = mistral
    ids = draw(2, 30)
    cache = llama.KVCache(ours.config, 2, 30, ours.embed.weight)
    parts = [ours(part, cache) for part in ids.split([4, 11, 1, 14], 1)]
    assert gap(torch.cat(parts, 1), theirs(ids).logits) <= LIMIT


def test_packed_documents_see_their_own_windows(mistral):
    """Each text as if it stood alone, with gradients, under every policy of checkpointing."""
    _, ours, theirs = mistral
    texts = [draw(1, n) for n in (17, 3, 20)]
    row, found = torch.cat(texts, 1), {}
    for policy in (None, "attention", "full"):
        ours.checkpoint = policy
        ours.zero_grad()
        x = ours.head(ours.hidden(row, doc_spans=document_spans([[17, 3, 20]])))
        x.square().mean().backward()
        found[policy] = x.detach(), ours.blocks[0].qkv.weight.grad.clone()
        assert torch.equal(found[policy][1], found[None][1])
    ours.checkpoint = None
    with torch.no_grad():
        alone = torch.cat([theirs(ids).logits for ids in texts], 1)
        assert gap(found[None][0], alone) <= LIMIT
        wide = widened(ours)
        assert gap(wide.head(wide.hidden(row, doc_spans=document_spans([[17, 3, 20]]))), alone
                   ) > 100 * LIMIT
    ours.zero_grad()
    (sum(theirs(ids).logits.square().sum() for ids in texts) / row.numel() / 100).backward()
    rows = [theirs.model.layers[0].self_attn.get_submodule(f"{p}_proj").weight.grad for p in "qkv"]
    assert gap(found[None][1], torch.cat(rows)) <= 10 * LIMIT
    theirs.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_written_text_is_theirs(mistral, settings):
    _, ours, theirs = mistral
    ids = draw(1, 9)
    told = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None,
                           num_beams=settings.get("num_beams", 1), pad_token_id=0)[0, 9:].tolist()
    mine = list(generate.generate(ours, ids[0].tolist(), max_new_tokens=20, **settings))
    assert mine == told and len(mine) == 20
    assert list(generate.generate(widened(ours), ids[0].tolist(), max_new_tokens=20,
                                  **settings)) != told                  # control


@torch.no_grad()
def test_a_window_is_saved_and_loads_again(mistral, tmp_path):
    _, ours, theirs = mistral
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", WINDOW)
    assert written["max_position_embeddings"] == 256
    again, ids = loaded(transformers.AutoModelForCausalLM, tmp_path), draw(2, 30)
    assert type(again) is transformers.MistralForCausalLM
    assert gap(again(ids).logits, theirs(ids).logits) <= LIMIT
    assert llama.Llama.from_pretrained(tmp_path).config == ours.config
    widened(ours).save_pretrained(tmp_path)                             # control
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("bridge", ["mlp", "qformer"])
@torch.no_grad()
def test_a_windowed_mistral_in_a_vlm_is_saved_and_loads_again(
    mistral,
    folders,
    tmp_path,  # noqa: F811
    bridge,
):
    """Also behind a Q-Former, where only a LLaMA was let in; and a picture falls out of sight."""
    source = tmp_path / "mistral"
    mistral[1].save_pretrained(source)
    write_words(source)
    blip2 = folders["blip2"][0]
    if bridge == "qformer":
        made = new_vlm(None, source, "qformer", "minigpt4", "squash",
                                        qformer=blip2)
        pixels = PIXELS[:1]
    else:
        eye = shaken(transformers.CLIPModel(transformers.CLIPConfig(
            vision_config=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                               intermediate_size=48, image_size=24, patch_size=8),
            text_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                             intermediate_size=48))))
        eye.save_pretrained(tmp_path / "clip")
        made, pixels = new_vlm(tmp_path / "clip", source), PIXELS[:1]
    made.save_pretrained(tmp_path / "vlm")
    again = projector.VLM.from_pretrained(tmp_path / "vlm")
    assert again.llm.config == made.llm.config and again.llm.config.window == WINDOW
    ids = torch.tensor([[1, data.IMAGE, *range(5, 30)]])
    want = made(ids, pixels)
    assert gap(again(ids, pixels), want) <= LIMIT
    made.llm = widened(made.llm)
    assert gap(made(ids, pixels), want) > 100 * LIMIT                   # control


@torch.no_grad()
def test_what_an_answer_looked_at_lies_in_its_window(mistral, tmp_path):
    """generate.looked makes attention again, and its mask is the model's."""
    folder = tmp_path / "llm"
    mistral[1].save_pretrained(folder)
    write_words(folder)
    eye = shaken(clip.CLIP(clip.Config(32, 3, 4, 48, image_size=24, patch_size=8),
                           clip.Config(32, 1, 4, 48, vocab=50, context=8, eos_id=49), 16))
    eye.save_pretrained(tmp_path / "clip")
    vlm = new_vlm(tmp_path / "clip", folder)
    ids, pixels = [1, data.IMAGE, *range(5, 15)], PIXELS[:1]
    assert (
        float(attention_to_patches(vlm, ids, [7, 8], pixels, 0).abs().sum()) == 0
    )  # 10 tokens back
    assert float(attention_to_patches(vlm, ids[:4], [7, 8], pixels, 0).sum()) > 0
    vlm.llm = widened(vlm.llm)
    assert float(attention_to_patches(vlm, ids, [7, 8], pixels, 0).sum()) > 0            # control


# ------------------------------------------------------------------------- CLIP's text tower

@pytest.fixture()
def towers(tmp_path):
    def make(end):
        theirs = shaken(transformers.CLIPModel(transformers.CLIPConfig(
            projection_dim=16, vision_config=dict(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                image_size=24, patch_size=8, projection_dim=16),
            text_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                             intermediate_size=48, vocab_size=60, max_position_embeddings=8,
                             eos_token_id=59, bos_token_id=58, projection_dim=16))))
        theirs.save_pretrained(tmp_path)
        edit(tmp_path, "text_config", eos_token_id=end)
        return clip.CLIP.from_pretrained(tmp_path), theirs
    return make


@torch.no_grad()
def test_a_text_above_the_context_is_refused(towers):
    ours, _ = towers(59)
    ours.encode_text(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 59]]))
    with pytest.raises(ValueError, match="9 tokens.*positions for 8: cut the text") as told:
        ours.encode_text(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 59]]))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("end", [[59], [59, 57], [57, 59]])
@torch.no_grad()
def test_end_ids_of_a_text_may_be_a_list(towers, tmp_path, end):
    """Any of them ends the text, the first one found."""
    ours, theirs = towers(end)
    ids = torch.tensor([[1, 5, 9, 59, 0], [1, 7, 59, 0, 0]])
    told = F.normalize(theirs.text_projection(theirs.text_model(ids).pooler_output), dim=-1)
    assert gap(ours.encode_text(ids), told) <= LIMIT
    other = ids.where(ids != 59, 57)
    assert (gap(ours.encode_text(other), F.normalize(theirs.text_projection(theirs.text_model(
        other).last_hidden_state[[0, 1], [3, 2]]), dim=-1)) <= LIMIT) == (57 in end)
    ours.save_pretrained(tmp_path / "again")
    again = clip.CLIP.from_pretrained(tmp_path / "again")
    assert {*again.text.config.eos_ids} == {*end}
    assert torch.equal(again.encode_text(ids), ours.encode_text(ids))


@torch.no_grad()
def test_a_list_of_the_old_wrong_id_reads_as_that_id_does(towers):
    ids = torch.tensor([[1, 5, 9, 59, 0], [1, 2, 59, 0, 0]])
    (one, _), (many, _) = towers(2), towers([2])
    assert torch.equal(one.encode_text(ids), many.encode_text(ids))


@pytest.mark.parametrize("end", [[], ["a"], None, 5.0, [True], {}])
def test_other_end_ids_are_refused(towers, end):
    with pytest.raises(data.BadModel, match="eos_token_id"):
        towers(end)


# ------------------------------------------------------------------- what InstructBLIP is asked

TYPED = "Wh\u00e4t is \u4e2d\u200bin it?", "\u200b", "\u4e2d\u6587", "How many  STARS?"


@pytest.fixture()
def reads(folders, monkeypatch):                                        # noqa: F811
    """An InstructBLIP, and what its Q-Former was given since."""
    model, given = projector.VLM.from_pretrained(folders["instructblip"][0]), []
    encode = model.qformer_tokenizer.encode

    def noted(texts, *rest, **named):
        given.extend(texts)
        return encode(texts, *rest, **named)
    monkeypatch.setattr(model.qformer_tokenizer, "encode", noted)
    return model, given


@pytest.mark.parametrize("text", TYPED[:3])
def test_ids_do_not_give_back_what_was_typed(reads, text):
    """The control of the tests below; and what is known of ids alone is read as before."""
    model, given = reads
    ids = generate.build_prompt([text], model.template, model.tokenizer)
    lost = model.qformer_text(torch.tensor([ids]))[0]
    assert lost != text
    list(generate.generate(model, [*ids], PIXELS[:1], max_new_tokens=1))
    assert given == [lost]
    given.clear()
    generate.generate_batch(model, [ids, [*ids]], [PIXELS[:1]] * 2, max_new_tokens=1)
    assert given == [lost, lost]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generate_hands_on_what_was_typed(reads, settings):
    model, given = reads
    for text in TYPED:
        ids = generate.build_prompt([text], model.template, model.tokenizer)
        given.clear()
        list(generate.generate(model, ids, PIXELS[:1], max_new_tokens=2, **settings))
        assert given == [text]
    given.clear()
    rows = [generate.build_prompt([text], model.template, model.tokenizer) for text in TYPED[:2]]
    generate.generate_batch(model, rows, [PIXELS[:1]] * 2, max_new_tokens=2, **settings)
    assert given == list(TYPED[:2])


def test_every_way_to_ask_hands_on_what_was_typed(reads, monkeypatch, tmp_path):
    """generate.py's answer, chat and captions; evaluate.py's and instruct.py's models."""
    model, given = reads
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    pixels = PIXELS[:1]
    args = SimpleNamespace(seed=0, settings={"max_new_tokens": 2}, attention=None, verbose=False,
                           num_beams=1, batch_size=2, prompt=TYPED[0], out=str(tmp_path / "o.json"),
                           max_new_tokens=2, model=str(tmp_path), model_base=None, quantize=None,
                           dtype="fp32")
    generate.print_answer(model, [TYPED[2]], {0: (pixels, None)}, args)
    assert given == [TYPED[2]]
    given.clear()
    generate.print_answer(model, ["a", "b", TYPED[0]], {0: (pixels, None)}, args)
    assert given == [TYPED[0]]                          # it knows one question: the last
    given.clear()
    caption_folder(model, [tmp_path / "a.png"] * 2, args, generate.generate_batch)
    assert given == [TYPED[0]] * 2
    given.clear()
    answers(model, list(TYPED[:2]), PIXELS, 2)
    assert given == list(TYPED[:2])
    given.clear()
    monkeypatch.setattr(benchmarks, "load_model", lambda args: model)
    jobs = [Request(str(i), "a.png", str(i), text) for i, text in enumerate(TYPED)]
    asked = SimpleNamespace(model="m", batch_size=4, images=tmp_path, max_new_tokens=2,
                            follow_links=False)
    list(model_answers(asked, jobs, {}))
    assert given == list(TYPED)


def test_a_question_without_words_is_cls_and_sep_as_in_transformers(tmp_path):
    READER.save(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    for text in TYPED:
        ids, mask = READER.encode([text], 128, left=True)
        assert ids[0].tolist() == theirs(text)["input_ids"] and mask.all()
    assert READER.encode(["\u200b"], left=True)[0].tolist() == [[READER.cls, READER.sep]]
    with pytest.raises(data.BadData, match="holds no word"):            # a caption must hold one
        READER.encode(["\u200b"])


def test_training_reads_the_samples_question(reads):
    """The loss is that of the question as it was typed, in rows and packed."""
    model, given = reads
    talks = [[{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Two."}]
             for text in TYPED[:2]]
    assert [data.question(talk) for talk in talks] == list(TYPED[:2])
    rows = [data.encode(talk, "instructblip", model.tokenizer) for talk in talks]
    ids, labels = data.collate(rows, 0)
    attention_mask = torch.arange(ids.shape[1]) < torch.tensor([[len(r[0])] for r in rows])
    model.loss(ids, labels, PIXELS, attention_mask, questions=[data.question(t) for t in talks])
    assert given == list(TYPED[:2])


def test_batches_carry_the_questions(reads):
    model, _ = reads
    talks = [[{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Two."}]
             for text in (*TYPED[:2], ASKED[0], "no picture")]

    class Samples:
        def sample(self, index):
            if index == 3:
                return {"conversations": [{"from": "human", "value": "no picture"}, talks[3][1]]}
            return {"image": "picture", "conversations": talks[index]}

        def instruction(self, index):
            return ""

        def read(self, index):
            sample = self.sample(index)
            return sample.get("image"), sample["conversations"]

        def pictures(self, sample):
            return [Image.new("RGB", (9, 9))] if "image" in sample else []

        def name(self, index):
            return str(index)

        def fault(self, index):
            return None

    row = SimpleNamespace(batch=4, loss_groups=1, template="instructblip", image_aspect="squash")
    for pack in (0, 400):
        args = SimpleNamespace(row=row, pack=pack, accum=1, official_quirks=False, max_length=0,
                               on_bad_sample="error", workers=0)
        micro = MicroBatches(Samples(), model, args)[0, 0]
        assert sorted(micro.questions) == sorted([*TYPED[:2], ASKED[0]])
        model.qformer_tokenizer, reader = None, model.qformer_tokenizer
        assert MicroBatches(Samples(), model, args)[0, 0].questions is None
        model.qformer_tokenizer = reader
