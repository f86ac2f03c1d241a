"""Other people's programs on a folder that train.py has written: transformers' pipeline says what
generate.py says; what lm-eval, vLLM and llama.cpp's converter read is there. The last three are not
installed: what they read was looked up in their sources (docs/weights.md names them).
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import data
import generate as g
from test_generate import model, words          # noqa: F401  fixtures

transformers = pytest.importorskip("transformers")

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):                                             # noqa: F811
    """Folder of the random model of test_generate, which writes letters."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(saved):
    return json.loads((saved / "config.json").read_text())


def ours(model, turns, images, count=12):                                       # noqa: F811
    """Greedy text of this program."""
    ids = g.build_prompt(turns, model.template, model.tokenizer, (0,) * len(images))
    pixels = torch.cat([model.pixels(image) for image in images]) if images else None
    return "".join(g.stream(model, ids, pixels, max_new_tokens=count)).strip()


# --------------------------------------------------------------------------------- transformers

def message(text, *images):
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def ask(saved):
    return transformers.pipeline("image-text-to-text", model=str(saved), device="cpu")


def noise(seed):
    """A picture of coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((48, 36), Image.Resampling.NEAREST)


@pytest.mark.parametrize("text, scenes", [
    (QUESTION, (0,)), ("Hi!\nAnd who are you?", (1,)), ("Which of the two?", (2, 3))])
def test_the_pipeline_says_what_we_say(saved, model, ask, text, scenes):        # noqa: F811
    images = [noise(i) for i in scenes]
    said = ask(text=message(text, *images), max_new_tokens=12, return_full_text=False)
    wanted = ours(model, [text], images)
    assert len(wanted) > 5 and said[0]["generated_text"].strip() == wanted
    # control: another picture, another text
    others = {ask(text=message(text, *[noise(i)] * len(images)), max_new_tokens=12,
                  return_full_text=False)[0]["generated_text"].strip() for i in range(10, 16)}
    assert others - {wanted}


def test_a_text_begins_with_bos_there_too(saved, model):                        # noqa: F811
    """The tokenizer of this test has no post-processor, as LLaMA's oldest files: it gets one."""
    source = json.loads((model.tokenizer.folder / "tokenizer.json").read_text())
    assert not source.get("post_processor") and model.tokenizer.add_bos
    processor = transformers.AutoProcessor.from_pretrained(saved)
    prompt = data.prompt([{"from": "human", "value": "Hi"}], "v1")
    found = processor(text=prompt)["input_ids"]
    assert (found[0] if isinstance(found[0], list) else found) == model.tokenizer.encode(prompt)


def test_interleaved_parts_in_the_pipeline(saved, model, ask):                  # noqa: F811
    images = [noise(i) for i in (2, 3)]
    content = [{"type": "text", "text": "Is "}, {"type": "image", "image": images[0]},
               {"type": "text", "text": " like "}, {"type": "image", "image": images[1]},
               {"type": "text", "text": "?"}]
    said = ask(text=[{"role": "user", "content": content}], max_new_tokens=12,
               return_full_text=False)
    assert said[0]["generated_text"].strip() == ours(model, ["Is <image> like <image>?"], images)


# ------------------------------------------------------------------------------------- lm-eval

def lm_eval_content(text):
    """A question of a task as lm-eval hands it to the template (lm_eval/models/hf_vlms.py,
    interleave): cut at <image>, empty texts left out."""
    content = []
    for i, piece in enumerate(text.split("<image>")):
        if i:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return content


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?", "<image>\n<image>\nWhich?",
                                  "Is <image> like <image>?", "What is it?\n<image>"])
def test_templates_from_strings_and_from_cut_strings(saved, text):
    """lm-eval: `hf` renders texts by the tokenizer, `hf-multimodal` cut texts by the processor."""
    shots = [("user", "How many?"), ("assistant", "Two."), ("user", text)]
    talk = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": words}
            for role, words in shots]
    if text.endswith("<image>"):                    # one picture moves to the front of its turn
        talk[-1]["value"] = "<image>\nWhat is it?"
    wanted = data.prompt(talk, "v1")
    processor = transformers.AutoProcessor.from_pretrained(saved)
    cut = [{"role": role, "content": lm_eval_content(words)} for role, words in shots]
    assert processor.apply_chat_template(cut, add_generation_prompt=True) == wanted
    if not text.endswith("<image>"):
        plain = [{"role": role, "content": words} for role, words in shots]
        assert processor.apply_chat_template(plain, add_generation_prompt=True) == wanted
        tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
        alone = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert alone.removeprefix(tokenizer.bos_token or "").lstrip() == wanted


def test_lm_eval_finds_the_place_of_a_picture(saved, config):
    """It decodes config.image_token_id (or _index) to the text that stands for a picture."""
    processor = transformers.AutoProcessor.from_pretrained(saved)
    number = transformers.AutoConfig.from_pretrained(saved).image_token_index
    assert processor.tokenizer.decode([number]) == "<image>" == processor.image_token
    assert config["image_token_index"] == number


# ---------------------------------------------------------------------------------------- vLLM

VLLM = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True}


def test_vllm_finds_what_it_reads(saved, config, model):                        # noqa: F811
    """vllm/model_executor/models/llava.py: fields of config.json, prefixes of the tensors."""
    for key, value in VLLM.items():
        assert config[key] == value, key
    text, vision = config["text_config"], config["vision_config"]
    assert text["architectures"] == ["LlamaForCausalLM"] and text["model_type"] == "llama"
    assert vision["model_type"] == "clip_vision_model"
    for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "hidden_act"):
        assert key in vision, key
    with safe_open(saved / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {key.split(".")[0] for key in keys} == {
        "language_model", "multi_modal_projector", "vision_tower"}
    assert "language_model.model.embed_tokens.weight" in keys
    assert "language_model.lm_head.weight" in keys
    assert "vision_tower.vision_model.embeddings.class_embedding" in keys
    # its dummy prompt is the picture's token as text; the count of places comes from the config
    side = vision["image_size"] // vision["patch_size"]
    assert side ** 2 == model.patches == config["image_seq_length"]
    processor = json.loads((saved / "processor_config.json").read_text())
    assert processor["patch_size"] == vision["patch_size"]
    assert processor["vision_feature_select_strategy"] == "default"


# ------------------------------------------------------------------------------------ llama.cpp

LLAMA_CPP = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
             "vocab_size", "head_dim")


def test_llama_cpps_converter_finds_the_language_model(saved, config):
    """convert_hf_to_gguf.py on a LlavaForConditionalGeneration takes the text part alone: sizes of
    text_config, tensors behind language_model., and the tokenizer of tokenizer.json."""
    for key in LLAMA_CPP:
        assert key in config["text_config"], key
    files = {path.name for path in saved.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= files
    text = config["text_config"]
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = {name.removeprefix("language_model."): file.get_slice(name).get_shape()
                 for name in file.keys() if name.startswith("language_model.")}
    layer = "model.layers.{}.{}.weight"
    parts_of = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm",
                "post_attention_layernorm")
    wanted = {layer.format(i, part) for i in range(text["num_hidden_layers"]) for part in parts_of}
    assert set(names) == wanted | {"model.embed_tokens.weight", "model.norm.weight",
                                   "lm_head.weight"}
    assert names["model.embed_tokens.weight"][0] == text["vocab_size"]
    # LlamaHfVocab: a BPE with byte fallback and a decoder that is a sequence
    spec = json.loads((saved / "tokenizer.json").read_text())
    assert spec["model"]["type"] == "BPE" and spec["model"]["byte_fallback"]
    assert spec["decoder"]["type"] == "Sequence"
    assert max(token["id"] for token in spec["added_tokens"]) < text["vocab_size"]
