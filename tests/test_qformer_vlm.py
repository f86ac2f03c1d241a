"""Models with a Q-Former in the middle: EVA, BLIP-2 and InstructBLIP before a LLaMA, MiniGPT-4.

Random tiny models of transformers, read by us and written back: logits within 1e-5 of the largest,
32 of 32 greedy tokens. The quirks that load without an error each have a test in which they are
missed on purpose, and the comparison must notice.
"""
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from formats import configs, names
import clip
import data
import generate
import llama
import projector
import qformer
from tiny import LIMIT, edit, gap, loaded, same_tensors, shaken, write_words
from decoding.flags import parse
from formats.checkpoints import export, save_weights
from formats.conversations import MINIGPT4_INSTRUCTIONS, blip_caption
from formats.errors import UsageError
from formats.bert import BertTokenizer
from trainer.build import load_projector, new_blip2_stage1, new_vlm

S, Q = 24, 5                                    # side of the pictures: 3 x 3 patches; queries
EYE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
           image_size=S, patch_size=8)
ASKS = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
            max_position_embeddings=64, encoder_hidden_size=32)
TONGUE = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, intermediate_size=48, rms_norm_eps=1e-5,
              max_position_embeddings=1024, pad_token_id=0)
KINDS = {"blip2": ("Blip2", {}), "blip2 tied": ("Blip2", {"tie_word_embeddings": True}),
         "instructblip": ("InstructBlip", {})}
WORDS = Path(__file__).parents[2] / "shared/tokenizers/llama-legacy"
published = pytest.mark.skipif(not WORDS.exists(), reason="needs LLaMA's published tokenizer")
READER = BertTokenizer.build(["What is in the picture? How many stars are there?"])
PIXELS = torch.randn(2, 3, S, S, generator=torch.Generator().manual_seed(1))
ASKED = "What is in it?", "How many stars are there, and where?"
IMAGE = 110                                     # the placeholder in transformers' ids


def loud(model, seed=4):
    """shaken(), with the norms that transformers spells in capitals around 1 as well."""
    shaken(model, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm.weight" in name:
                p.add_(1)
            if name.endswith("embed_tokens.weight"):
                p.mul_(5)                       # or the last word hardly matters to the next
        for p in (p for n, p in model.named_parameters() if n.endswith("model.norm.weight")):
            p[::2] *= -1                        # or a tied head says one word for ever
    return model


def their_model(kind, text=None, seed=4):
    """A random Blip2- or InstructBlipForConditionalGeneration."""
    name, changes = KINDS[kind]
    text = text or transformers.LlamaConfig(**TONGUE | changes)
    config = getattr(transformers, f"{name}Config")(
        vision_config=dict(EYE), qformer_config=dict(ASKS, vocab_size=len(READER)),
        text_config=text, num_query_tokens=Q, image_token_index=IMAGE)
    return loud(getattr(transformers, f"{name}ForConditionalGeneration")(config), seed)


def write(model, folder):
    """What transformers saves, with tokenizers."""
    model.save_pretrained(folder)
    write_words(folder)
    if "Instruct" in type(model).__name__:
        READER.save(folder / "qformer_tokenizer")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: (folder, transformers' model)}, and a folder of a LLaMA."""
    root = tmp_path_factory.mktemp("qformer")
    made = {}
    for kind in KINDS:
        model = their_model(kind)
        made[kind] = write(model, root / kind), model
    tongue = shaken(llama.Llama(llama.Config(vocab=110, width=32, depth=2, heads=4, kv_heads=2,
                                             mlp=48, eps=1e-5, context=1024)))
    tongue.save_pretrained(root / "llama")
    write_words(root / "llama")
    return made | {"llama": root / "llama"}


def row(model, text, answer=()):
    """Our ids of a question about a picture, and the answer's."""
    return generate.build_prompt([text], model.template, model.tokenizer) + list(answer)


def their_inputs(ids, texts, pixels):
    """The same for transformers, one row."""
    flat = [x for i in ids for x in ([IMAGE] * Q if i == data.IMAGE else [i])]
    out = {"input_ids": torch.tensor([flat]), "pixel_values": pixels,
           "attention_mask": torch.ones(1, len(flat), dtype=torch.long)}
    if texts:
        read, mask = READER.encode(list(texts), 128, left=True)
        out |= {"qformer_input_ids": read, "qformer_attention_mask": mask.long()}
    return out


@torch.no_grad()
def vlm_gap(ours, theirs, i=0, ids=None):
    text = ASKED[i]
    mine = row(ours, text) if ids is None else ids
    inputs = their_inputs(row(ours, text), [text] * bool(ours.qformer_tokenizer), PIXELS[i:i + 1])
    return gap(ours(torch.tensor([mine]), PIXELS[i:i + 1]), theirs(**inputs).logits)


# ------------------------------------------------------------------------------- the eye

@torch.no_grad()
def eye_gap(ours, theirs, pixels=PIXELS, **how):
    """Our tower and the norm behind it against transformers' tower, which holds that norm."""
    post = theirs.vision_model.post_layernorm
    x = F.layer_norm(ours(pixels), (32,), post.weight, post.bias, post.eps)
    return gap(x, theirs.vision_model(pixels, **how).last_hidden_state)


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_eva_tower_is_transformers(folders, kind, monkeypatch):
    folder, theirs = folders[kind]
    ours = clip.ViT.from_pretrained(folder)
    assert ours(PIXELS).shape == (2, 10, 32)                        # the class token is kept
    assert ours.config.eva and not ours.config.has_final_block and ours.config.eps == 1e-6
    assert eye_gap(ours, theirs) <= LIMIT
    monkeypatch.setattr(clip, "gelu", clip.quick_gelu)              # trap 4: exact GELU,
    assert eye_gap(ours, theirs) > 100 * LIMIT
    monkeypatch.undo()
    blocks = ours.blocks
    ours.blocks = blocks[:-1]                                       # all of its blocks,
    assert eye_gap(ours, theirs) > 100 * LIMIT
    ours.blocks = blocks
    forward = clip.ViT.forward                                      # and no norm at the end
    monkeypatch.setattr(clip.ViT, "forward", lambda self, x: F.layer_norm(
        forward(self, x), (32,), torch.linspace(1, 2, 32)))
    assert eye_gap(ours, theirs) > 100 * LIMIT


def test_trap_4_the_class_token_is_read(folders, monkeypatch):
    folder, theirs = folders["blip2"]
    ours = projector.VLM.from_pretrained(folder)
    assert vlm_gap(ours, theirs) <= LIMIT
    forward = clip.ViT.forward
    monkeypatch.setattr(clip.ViT, "forward", lambda self, x: forward(self, x)[:, 1:])
    assert vlm_gap(ours, theirs) > 100 * LIMIT


def test_trap_4_the_eps_of_ln_vision(tmp_path, folders):
    """LAVIS has 1e-5, transformers the tower's 1e-6: told apart, and carried along."""
    folder, theirs = folders["blip2"]
    ours = projector.VLM.from_pretrained(folder)
    assert ours.projector.norm.eps == 1e-6
    x = ours.vision(PIXELS).detach() * 1e-2                 # so faint that eps is heard
    right = F.layer_norm(x, (32,), ours.projector.norm.weight, ours.projector.norm.bias, 1e-6)
    assert gap(ours.projector.norm(x), right) <= LIMIT
    ours.projector.norm.eps = 1e-5
    assert gap(ours.projector.norm(x), right) > 10 * LIMIT
    ours.save_pretrained(tmp_path)
    assert projector.VLM.from_pretrained(tmp_path).projector.norm.eps == 1e-5
    for lie in ("small", 0, None):
        edit(tmp_path, ln_vision_eps=lie)
        with pytest.raises(data.BadModel, match="ln_vision_eps"):
            projector.VLM.from_pretrained(tmp_path)


def lavis(model):
    """transformers' tower under LAVIS' names, its k bias left out as there."""
    table = {}
    for name, tensor in model.vision_model.state_dict().items():
        name = (name.replace("embeddings.class_embedding", "cls_token")
                .replace("embeddings.position_embedding", "pos_embed")
                .replace("embeddings.patch_embedding", "patch_embed.proj")
                .replace("encoder.layers", "blocks").replace("layer_norm", "norm")
                .replace("self_attn.projection", "attn.proj").replace("self_attn", "attn"))
        if name.endswith("qkv.bias"):
            at = "visual_encoder." + name.removesuffix("qkv.bias")
            table[at + "q_bias"], table[at + "v_bias"] = tensor[:32].clone(), tensor[64:].clone()
        elif name.startswith("post_layernorm"):
            table[name.replace("post_layernorm", "ln_vision")] = tensor
        else:
            table["visual_encoder." + name] = tensor
    return table


def test_trap_3_lavis_names_with_no_bias_for_k(tmp_path, folders, monkeypatch):
    theirs = their_model("blip2")
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0         # as in the published files
    theirs.save_pretrained(tmp_path)
    save_weights(tmp_path, lavis(theirs) | {"query_tokens": torch.ones(1, Q, 24)})
    assert eye_gap(clip.ViT.from_pretrained(tmp_path), theirs) <= LIMIT
    k = clip.ViT.from_pretrained(tmp_path).blocks[0].qkv.bias[32:64]
    assert not k.any()
    table = dict(names.EVA_LAVIS)                        # sprung: q, v, nothing
    q, zeros, v = table["blocks.{}.qkv.bias"]
    for wrong in ((q, v, zeros), (v, zeros, q)):
        monkeypatch.setattr(names, "EVA_LAVIS", table | {"blocks.{}.qkv.bias": wrong})
        assert eye_gap(clip.ViT.from_pretrained(tmp_path), theirs) > 100 * LIMIT


@torch.no_grad()
def test_positions_are_stretched_at_load(folders, monkeypatch):
    folder, theirs = folders["blip2"]
    ours, small = clip.ViT.from_pretrained(folder).resize(40), clip.ViT.from_pretrained(folder)
    pixels = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    assert ours.config.image_size == 40 and ours.position.shape == (1, 26, 32)
    assert torch.equal(ours.position[:, 0], small.position[:, 0])           # [cls] has no place
    assert eye_gap(ours, theirs, pixels, interpolate_pos_encoding=True) <= LIMIT
    half = clip.ViT.from_pretrained(folder, torch.bfloat16).resize(40).position
    assert gap(half.float(), ours.position) < .02 and half.dtype == torch.bfloat16
    interpolate = F.interpolate
    for way in (dict(mode="bilinear", align_corners=False),
                dict(mode="bicubic", align_corners=True)):
        monkeypatch.setattr(F, "interpolate", lambda x, size, **_: interpolate(x, size, **way))
        wrong = clip.ViT.from_pretrained(folder).resize(40)
        monkeypatch.undo()
        assert eye_gap(wrong, theirs, pixels, interpolate_pos_encoding=True) > 100 * LIMIT
    for lie in (-5, 4, "40", 10 ** 9):
        with pytest.raises(data.BadModel):
            clip.ViT.from_pretrained(folder).resize(lie)


@pytest.mark.parametrize("kind, config", [
    ("blip-2", transformers.Blip2VisionConfig()),
    ("instructblip", transformers.InstructBlipVisionConfig())])
def test_fields_left_out_are_vit_g(kind, config):
    for vision in ({}, {"model_type": config.model_type}):
        c = clip.Config(**configs.vision_tower({"model_type": kind, "vision_config": vision}))
        assert (c.width, c.depth, c.heads, c.mlp, c.eps, c.image_size, c.patch_size) == (
            config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
            config.intermediate_size, config.layer_norm_eps, config.image_size, config.patch_size)
        assert c.eva and not c.has_final_block and c.depth == 39
    assert clip.Config(**configs.vit_from_hf(configs.vit_to_hf(c))) == c
    with torch.device("meta"):
        count = sum(p.numel() for p in clip.ViT(c).parameters())
    assert count == 985_952_256 - 2 * 1408              # of the whole in transformers: ln_vision
    for lie in ({"hidden_act": "quick_gelu"}, {"qkv_bias": False}, {"hidden_size": -1},
                {"image_size": [224, 224]}):
        with pytest.raises(data.BadModel):
            clip.Config(**configs.vision_tower({"model_type": kind, "vision_config": lie}))


# ------------------------------------------------------------------------------- whole models

@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers(folders, kind):
    folder, theirs = folders[kind]
    ours = projector.VLM.from_pretrained(folder)
    assert (ours.projector_type, ours.template, ours.aspect) == (
        "qformer",
        kind.split()[0],
        "squash",
    )
    assert ours.num_image_tokens() == Q and ours.num_image_tokens((640, 480)) == Q
    for i in range(2):
        assert vlm_gap(ours, theirs, i) <= LIMIT
    ids = torch.tensor([row(ours, ASKED[0])])
    with torch.no_grad():                               # control: the picture matters
        assert gap(ours(ids, PIXELS[1:])[:, -1], ours(ids, PIXELS[:1])[:, -1]) > 100 * LIMIT


def greedy(ours, theirs, i, new=32):
    text = ASKED[i]
    ids, pixels = row(ours, text), PIXELS[i:i + 1]
    said = list(generate.generate(ours, ids, pixels, new, eos=-1))
    theirs.language_model.generation_config.eos_token_id = None
    theirs.language_model.generation_config.pad_token_id = 0
    told = theirs.generate(**their_inputs(ids, [text] * bool(ours.qformer_tokenizer), pixels),
                           max_new_tokens=new, do_sample=False)[0, -new:].tolist()
    assert len(said) == len(told) == new and len(set(told)) > 3
    return sum(a == b for a, b in zip(said, told))


@pytest.mark.parametrize("kind", KINDS)
def test_32_greedy_tokens_are_transformers(folders, kind):
    folder, theirs = folders[kind]
    ours = projector.VLM.from_pretrained(folder)
    assert [greedy(ours, theirs, i) for i in range(2)] == [32, 32]
    rows = [row(ours, text) for text in ASKED]          # side by side, of different lengths
    pictures = [PIXELS[:1], PIXELS[1:]]
    both = generate.generate_batch(ours, rows, pictures, max_new_tokens=12, eos=-1)
    assert both == [list(generate.generate(ours, ids, x, 12, eos=-1))
                    for ids, x in zip(rows, pictures)]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_load_in_transformers_and_come_back(tmp_path, folders, kind):
    ours = projector.VLM.from_pretrained(folders[kind][0])
    ours.save_pretrained(tmp_path / "a")
    name = f"{KINDS[kind][0]}ForConditionalGeneration"
    theirs = loaded(getattr(transformers, name), tmp_path / "a")
    assert vlm_gap(ours, theirs) <= LIMIT
    again = projector.VLM.from_pretrained(tmp_path / "a")
    assert same_tensors(ours, again)
    assert (again.template, again.aspect) == (ours.template, "squash")
    again.save_pretrained(tmp_path / "b")               # and nothing drifts
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) >= 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    loud(theirs, 9).save_pretrained(tmp_path / "c")     # and by way of transformers
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "c" / file).write_bytes((tmp_path / "a" / file).read_bytes())
    READER.save(tmp_path / "c/qformer_tokenizer")
    assert vlm_gap(projector.VLM.from_pretrained(tmp_path / "c"), theirs) <= LIMIT


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_their_processor_gives_the_same_ids_and_pixels(tmp_path, folders, kind):
    ours = projector.VLM.from_pretrained(folders[kind][0])
    ours.save_pretrained(tmp_path)
    processor = getattr(transformers, f"{KINDS[kind][0]}Processor").from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    text = ASKED[0] if ours.qformer_tokenizer else ""
    told = processor(images=image, text=text, return_tensors="pt")
    ids = row(ours, ASKED[0])
    flat = [x for i in ids for x in ([ours.image_token] * Q if i == data.IMAGE else [i])]
    assert told["input_ids"][0].tolist() == flat        # with BOS where it stands in ours
    assert flat[:Q] == [ours.image_token] * Q and flat[Q] == ours.tokenizer.bos
    if ours.qformer_tokenizer:
        read, _ = ours.qformer_tokenizer.encode([text], 128)
        assert told["qformer_input_ids"].tolist() == read.tolist()
    pil = transformers.BlipImageProcessorPil.from_pretrained(tmp_path)
    pixels = pil(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, ours.pixels(image))
    assert gap(data.preprocess(image, S, "pad"), ours.pixels(image)) > .1       # control


def test_what_the_queries_are_asked(folders):
    """The instruction comes out of the ids; without it, or with another's, the answer differs."""
    ours = projector.VLM.from_pretrained(folders["instructblip"][0])
    ids, labels = data.encode([{"from": "human", "value": f"<image>\n{ASKED[1]}"},
                               {"from": "gpt", "value": "Two."}], "instructblip", ours.tokenizer)
    ids, labels = torch.tensor([ids]), torch.tensor([labels])
    assert ours.qformer_text(ids, labels) == [ASKED[1]]
    assert ours.qformer_text(ids) == [ASKED[1] + " Two."]  # control: the answer is not to be read
    short = torch.tensor([row(ours, ASKED[0])])
    both = torch.cat((ids, F.pad(short, (0, ids.shape[1] - short.shape[1]), value=9)))
    attention_mask = torch.ones_like(both).bool()
    attention_mask[1, short.shape[1]:] = False
    assert ours.qformer_text(both, None, attention_mask)[1] == ASKED[0]
    with torch.no_grad():
        named = ours(short, PIXELS[:1], questions=[ASKED[0]])
        assert torch.equal(named, ours(short, PIXELS[:1]))
        assert gap(ours(short, PIXELS[:1], questions=[ASKED[1]]), named) > 100 * LIMIT
        # packed into one row, each text has its own
        packed, learned = torch.cat((ids, short), 1), F.pad(labels, (0, short.shape[1]), value=-100)
        sizes = [ids.shape[1], short.shape[1]]
        told = ours.embed(packed, PIXELS, learned, lengths=sizes)[0]
        assert torch.equal(told, ours.embed(packed, PIXELS, learned, lengths=sizes,
                                            questions=[ASKED[1], ASKED[0]])[0])
        pair = ours.encode_images(PIXELS, questions=ASKED)        # and padding is not read
        assert gap(pair[0], ours.encode_images(PIXELS[:1], questions=ASKED[:1])[0]) <= LIMIT
        ours.always_run_vision = True                         # text alone, on one of several ranks
        assert gap(ours(torch.tensor([[1, 5, 6]])), ours.llm(torch.tensor([[1, 5, 6]]))) <= LIMIT
        ours.always_run_vision = False
    long = " ".join(["stars"] * 200 + ["where?"])       # too long: its end counts, as officially
    assert READER.encode([long], 128, left=True)[0][0].tolist() != READER.encode([long], 128)[0][
        0].tolist()
    with torch.no_grad():
        assert gap(ours.encode_images(PIXELS[:1], questions=[long])[0], ours.encode_images(
            PIXELS[:1], questions=[long.removesuffix("where?")])[0]) > 100 * LIMIT


def test_trap_8_the_norm_of_the_embeddings_has_two_names(tmp_path, folders):
    for kind, right, wrong in (
            ("instructblip", "qformer.embeddings.layernorm.", "qformer.layernorm."),
            ("blip2", "qformer.layernorm.", "qformer.embeddings.layernorm.")):
        folder, theirs = folders[kind]
        assert any(k.startswith(right) for k in data.load_weights(folder))
        write(theirs, tmp_path / kind)
        table = {k.replace(right, wrong): v for k, v in theirs.state_dict().items()}
        save_weights(tmp_path / kind, table)
        with pytest.raises(data.BadModel, match=right.replace(".", r"\.") + "weight is missing"):
            projector.VLM.from_pretrained(tmp_path / kind)


def test_trap_9_pictures_stand_before_bos(folders):
    for kind in ("blip2", "instructblip"):
        folder, theirs = folders[kind]
        ours = projector.VLM.from_pretrained(folder)
        ids = row(ours, ASKED[0])
        assert ids[:2] == [data.IMAGE, ours.tokenizer.bos]
        assert vlm_gap(ours, theirs, ids=[ids[1], ids[0], *ids[2:]]) > 100 * LIMIT
    assert row(ours, "") and generate.build_prompt(["hi"], "minigpt4_caption", ours.tokenizer)[
        :2
    ] == [ours.tokenizer.bos, data.IMAGE]                     # MiniGPT-4: behind it


@pytest.mark.parametrize("text", [
    transformers.OPTConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, ffn_dim=32,
                           num_attention_heads=4, word_embed_proj_dim=32),
    transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)],
    ids=["opt", "t5"])
def test_trap_11_the_eyes_of_a_blip2_with_opt_or_t5(tmp_path, folders, text):
    """Its vision tower and Q-Former are taken to a LLaMA; that its T5 is T5 1.0, and refused as a
    language model, does not matter. (With their own: tests/test_blip2_llms.py.)"""
    theirs = their_model("blip2", text)
    write(theirs, tmp_path)
    if text.model_type == "t5":
        with pytest.raises(data.BadModel, match="T5 1.0") as info:
            projector.VLM.from_pretrained(tmp_path)
        assert "\n" not in str(info.value)
    ours = new_vlm(None, folders["llama"], "qformer", "blip2", "squash",
                                    qformer=tmp_path).eval()
    told = theirs.get_image_features(PIXELS)
    with torch.no_grad():
        asks = ours.projector.qformer(ours.projector.norm(ours.vision(PIXELS)))
        assert gap(asks, told.qformer_outputs.last_hidden_state) <= LIMIT
        assert (
            gap(torch.stack(ours.encode_images(PIXELS)), told.pooler_output) > 0.1
        )  # not its projection
        load_projector(ours, tmp_path)                      # unless one asks for it
        assert gap(torch.stack(ours.encode_images(PIXELS)), told.pooler_output) <= LIMIT


def test_an_instructblip_with_opt_is_refused_in_one_line(tmp_path, folders):
    folder = folders["instructblip"][0]
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    edit(tmp_path, text_config={})                      # what transformers documents: OPT
    with pytest.raises(data.BadModel, match="'opt', and only llama, mistral") as info:
        projector.VLM.from_pretrained(tmp_path)
    assert "\n" not in str(info.value) and "--stage 2 --from" in str(info.value)


# ------------------------------------------------------------------------------- MiniGPT-4

def talk(question, answer=None, mark="<image>\n"):
    turns = [{"from": "human", "value": mark + question}]
    return turns + [{"from": "gpt", "value": answer}] * (answer is not None)


@published
def test_trap_10_the_pieces_of_a_prompt_are_tokenised_one_by_one():
    words = data.Tokenizer(WORDS)
    alone = lambda text: words.encode(text, bos=False)
    assert (
        MINIGPT4_INSTRUCTIONS[0] == "Describe this image in detail."
        and len(MINIGPT4_INSTRUCTIONS) == 4
    )
    for question in MINIGPT4_INSTRUCTIONS:
        before, behind = "###Human: <Img>", f"</Img> {question} ###Assistant: "
        ids, labels = data.encode(talk(question, "A cat."), "minigpt4", words)
        assert ids == [1, *alone(before), data.IMAGE, *alone(behind), *alone("A cat.###")]
        n = len(alone("A cat.###"))
        assert labels == [data.IGNORE] * (len(ids) - n) + ids[-n:]
        assert ids != [1, *alone(before), data.IMAGE, *alone(behind + "A cat.###")]     # sprung
        system = data.TEMPLATES["minigpt4"].system
        asked = data.prompt_tokens(talk(question), "minigpt4", words)
        assert asked == [1, *alone(f"{system}###Human: <Img>"), data.IMAGE,
                         *alone(f"</Img> {question}###Assistant: ")]
        assert asked == generate.build_prompt([question], "minigpt4", words)
    # stage 1: nothing is asked
    ids, labels = data.encode(talk("?", "a cat"), "minigpt4_caption", words)
    assert ids == [1, data.IMAGE, *alone("a cat\n")] and labels == [-100, -100, *ids[2:]]
    assert data.prompt_tokens(talk("?"), "minigpt4_caption", words) == [1, data.IMAGE]
    for turns, picture in ((talk("a", "b") + talk("c", "d"), True), (talk("a"), True),
                           (talk("a", "b"), False)):
        for template in ("minigpt4", "instructblip"):
            with pytest.raises(data.BadData, match="one question and one answer"):
                data.encode(turns, template, words, picture)


@published
def test_a_chat_of_minigpt4_goes_on_behind_its_answers():
    words = data.Tokenizer(WORDS)
    system = data.TEMPLATES["minigpt4"].system
    text = data.prompt(talk("What?", "A cat.") + talk("Sure?", mark=""), "minigpt4")
    assert text == (f"{system}###Human: <Img><image></Img> What?###Assistant: A cat.###Human: "
                    "Sure?###Assistant: ")
    typed = ["What is <image>?", "</s>", "And ###Assistant: ?"]
    ids = generate.build_prompt(typed, "minigpt4", words)
    assert ids.count(data.IMAGE) == 1 and words.eos not in ids      # what is typed is letters
    assert "What is <image>?" in words.decode(ids) and "</s>" in words.decode(ids)


@published
def test_blip2_learns_bos_and_instructblip_its_answer_only():
    words = data.Tokenizer(WORDS)
    alone = lambda text: words.encode(text, bos=False)
    ids, labels = data.encode(talk("thrown away", "a cat"), "blip2", words)
    assert ids == [data.IMAGE, 1, *alone("a cat\n")] and labels == [data.IGNORE, *ids[1:]]
    assert data.prompt_tokens(talk("x"), "blip2", words) == [data.IMAGE, 1]
    ids, labels = data.encode(talk("What is it?", "A cat."), "instructblip", words)
    answer = [*alone("A cat."), words.eos]
    assert ids == [data.IMAGE, 1, *alone("What is it?"), *answer]
    assert labels == [data.IGNORE] * (len(ids) - len(answer)) + answer
    asked = data.prompt_tokens(talk("What is it?"), "instructblip", words)
    assert (
        asked
        == ids[: -len(answer)]
        == generate.build_prompt(["What is it?"], "instructblip", words)
    )
    assert generate.build_prompt(["a", "b", "What is it?"], "instructblip", words) == asked
    assert generate.build_prompt(["<image> </s>"], "instructblip", words).count(data.IMAGE) == 1
    assert data.encode(talk("Hi", "Ho", mark=""), "instructblip", words, False)[0][0] == 1
    for template in ("blip2", "minigpt4_caption"):
        with pytest.raises(data.BadData, match=f"{template} needs <image>"):
            data.encode(talk("a", "b", mark=""), template, words)


def test_captions_of_the_web_are_cleaned():
    assert blip_caption('A "Red"  (big) Star; #1!\n') == "a red big star 1"
    assert blip_caption("it's 50% off, a-b") == "it's 50% off, a-b"
    assert blip_caption(" ".join(["word"] * 60)).split() == ["word"] * 50
    assert blip_caption("...") == ""


@published
def test_the_official_ids_of_instructblip(tmp_path):
    """bos = eos = unk = </s>, whatever Vicuna says: sequences start with 2, and 0 is 2."""
    (tmp_path / "tokenizer.json").write_text((WORDS / "tokenizer.json").read_text())
    config = json.loads((WORDS / "tokenizer_config.json").read_text())
    plain = data.Tokenizer(WORDS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | dict.fromkeys(
        ("bos_token", "eos_token", "unk_token"), "</s>")))
    words = data.Tokenizer(tmp_path)
    ids = generate.build_prompt(["What is it?"], "instructblip", words)
    assert ids[:2] == [data.IMAGE, 2]
    assert words.decode([0, 450, 0], skip_special=False) == "</s> The</s>"
    assert plain.decode([0, 450], skip_special=False) == "<unk> The"            # control


# ------------------------------------------------------------------------------- where it stops

class Script:
    """Stands in for a model: what each row says is written down."""

    def __init__(self, words, rows, monkeypatch, template="minigpt4"):
        self.tokenizer, self.template, self.rows, self.step = words, template, rows, -1
        monkeypatch.setattr(generate, "prefill_inputs", lambda model, prompts, *_: (
            self, torch.zeros(len(rows), 1, 4), torch.ones(len(rows), 1).bool(), [99] * len(rows)))
        monkeypatch.setattr(generate, "KVCache", lambda *_: SimpleNamespace())
        self.config, self.embed = None, SimpleNamespace(weight=torch.zeros(1))

    def next_logits(self, *_):
        self.step += 1
        return torch.stack([F.one_hot(torch.tensor((row + [2] * 99)[self.step]), 32000).float()
                            for row in self.rows])

    def answers(self):
        said = generate.generate_batch(self, [[1]] * len(self.rows), max_new_tokens=99)
        return ["".join(generate.stream_text(x, self.tokenizer)) for x in said]


@published
def test_minigpt4_ends_at_three_hashes_in_any_spelling(monkeypatch):
    words = data.Tokenizer(WORDS)
    alone = lambda text: words.encode(text, bos=False)
    one, two = alone("A cat. ###"), alone("A cat.###Human: more")
    assert one[-1] == 835 and two[3:5] == [2277, 29937]             # the two published spellings
    bytes_ = [*alone("A cat."), *(words._lib.token_to_id("<0x23>"),) * 3, *alone("more")]
    rows = [one + alone("more"), two, bytes_, alone("A # and ## b. #1") + [2],
            alone("Item ##") + [2]]
    want = ["A cat.", "A cat.", "A cat.", "A # and ## b. #1", "Item ##"]
    assert Script(words, rows, monkeypatch).answers() == want
    told = [[x for x in row if x != 2] for row in rows[:1]]
    assert Script(words, rows, monkeypatch, "v1").answers()[0] == words.decode(told[0])    # control
    for row, text in zip(rows, want):
        script = Script(words, [row], monkeypatch)
        pieces = list(generate.stream(script, [1], max_new_tokens=99))
        assert "".join(pieces) == text
    script = Script(words, [two], monkeypatch)                      # nothing more is computed
    script.answers()
    assert script.step == 4


@torch.no_grad()
def test_beams_end_at_a_text_as_at_a_token(folders):
    ours = projector.VLM.from_pretrained(folders["blip2"][0])
    ids = generate.build_prompt(["Hi"], "minigpt4", ours.tokenizer)
    free = list(generate.generate(ours, ids, PIXELS[:1], 40, eos=-1))
    token = next(i for i in free[3:] if ours.tokenizer.decode([i]).isalpha())  # a letter it says
    found = lambda ends, stop=(): list(generate.generate(ours, ids, PIXELS[:1], 40, num_beams=3,
                                                         eos=ends, stop=stop))
    assert found({2}, ours.tokenizer.decode([token])) == found({2, token})
    assert token in found({2}) and token not in found({2, token})   # control: it matters


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_the_command_line_answers_as_transformers_does(tmp_path, folders, kind, monkeypatch,
                                                       capsys):
    folder, theirs = folders[kind]
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (31, 44, 3), dtype=np.uint8)).save(
        tmp_path / "img.png")

    def told(*question, typed=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        args = parse([str(tmp_path / "img.png"), *question, "--model", str(folder),
                                   "--max-new-tokens", "16", "--device", "cpu"])
        assert not generate.main(args)
        return capsys.readouterr()
    out, err = told(ASKED[0])
    ours = projector.VLM.from_pretrained(folder)
    pixels = ours.pixels(data.load_image(tmp_path / "img.png"))
    config = theirs.language_model.generation_config
    ends = [2] + [ours.tokenizer.encode("\n", bos=False)[-1]] * (kind == "blip2")
    config.eos_token_id, config.pad_token_id = ends, 0
    said = theirs.generate(
        **their_inputs(row(ours, ASKED[0]), [ASKED[0]] * bool(ours.qformer_tokenizer), pixels),
        max_new_tokens=16,
        do_sample=False,
    )[0, -16:]
    said = [i for i in said.tolist() if i not in ends]
    assert len(said) > 3 and out.strip() == ours.tokenizer.decode(said).strip()
    assert ("knows pictures and captions" in err) == (kind == "blip2")
    talked = told(typed=f"What?\n{ASKED[0]}\n").out     # in a chat it is asked the last question
    assert talked.strip().endswith(out.strip())


@torch.no_grad()
def test_bf16_is_close(folders):
    for kind in ("blip2", "instructblip"):
        exact = projector.VLM.from_pretrained(folders[kind][0])
        ours = projector.VLM.from_pretrained(folders[kind][0], torch.bfloat16)
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        ids = torch.tensor([row(ours, ASKED[0])])
        assert 1e-4 < gap(ours(ids, PIXELS[:1]).float(), exact(ids, PIXELS[:1])) < .05


# ------------------------------------------------------------------------------- parts

@pytest.fixture(scope="module")
def retriever(tmp_path_factory, folders):
    """A BLIP-2 of stage 1 with EVA's eye, and its folder."""
    config = qformer.Config(
        24, 4, 3, 40, num_queries=Q, vision_width=32, vocab=len(READER), context=64
    )
    made = new_blip2_stage1(folders["blip2"][0], READER, config, shared=16)
    folder = tmp_path_factory.mktemp("retriever")
    made.save_pretrained(folder)
    return made, folder


@torch.no_grad()
def test_stage_2_goes_on_from_stage_1(tmp_path, folders, retriever):
    stage1, folder = retriever
    ours = new_vlm(None, folders["llama"], "qformer", "blip2", "squash",
                                    qformer=folder).eval()
    seen = stage1.qformer(stage1.ln_vision(stage1.vision(PIXELS)))
    assert gap(ours.projector.qformer(ours.projector.norm(ours.vision(PIXELS))), seen) <= LIMIT
    assert not ours.projector.qformer.config.vocab and ours.qformer_tokenizer is None
    own = [name for name, _ in ours.projector.named_parameters()]
    assert not any("token." in name or "text_mlp" in name or "position" in name for name in own)
    assert {"proj.weight", "norm.bias"} < {*own}
    assert ours.get_submodule("projector.proj") is ours.projector.proj
    again = new_vlm(None, folders["llama"], "qformer", "blip2", "squash",
                                     qformer=qformer.Blip2Stage1.from_pretrained(folder)).eval()
    assert same_tensors(ours, again)                    # a module and its folder are one
    other = new_vlm(None, folders["llama"], "qformer", "blip2", "squash", 1,
                                     qformer=folder)
    assert torch.equal(other.projector.norm.weight, ours.projector.norm.weight)
    assert not torch.equal(other.projector.proj.weight, ours.projector.proj.weight)  # the seed's
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.Blip2ForConditionalGeneration, tmp_path)
    assert ours.image_token == IMAGE
    assert vlm_gap(ours, theirs) <= LIMIT


def test_parts_from_a_lavis_file(tmp_path, folders):
    folder, theirs = folders["blip2"]
    ours = projector.VLM.from_pretrained(folder)
    save_weights(tmp_path, lavis(theirs) | export(ours.projector.qformer, names.QFORMER_LAVIS) | {
        "t5_proj.weight": torch.ones(32, 24), "temp": torch.ones(())})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    made = new_vlm(None, folders["llama"], "qformer", "minigpt4", "squash",
                                    qformer=tmp_path)
    assert made.projector.norm.eps == 1e-5 and ours.projector.norm.eps == 1e-6
    made.projector.norm.eps = 1e-6
    with torch.no_grad():                               # k's bias is lost, and nothing else is
        assert gap(made.projector.norm(made.vision(PIXELS)),
                   ours.projector.norm(ours.vision(PIXELS))) <= LIMIT
        x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(made.projector.qformer(x), ours.projector.qformer(x))


def test_a_projection_is_taken_where_the_task_goes_on(folders):
    folder = folders["blip2"][0]
    with_it = data.load_weights(folder)["language_projection.weight"]
    parts = lambda template, source=folder: new_vlm(
        None, folders["llama"], "qformer", template, "squash", qformer=source)
    assert torch.equal(parts("blip2").projector.proj.weight, with_it)
    assert not torch.equal(parts("minigpt4_caption").projector.proj.weight, with_it)
    ours = parts("instructblip", folders["instructblip"][0])
    assert ours.qformer_tokenizer and ours.projector.qformer.config.vocab == len(READER)
    ids = torch.tensor([generate.build_prompt([ASKED[0]], "instructblip", ours.tokenizer)])
    assert ours(ids, PIXELS[:1]).isfinite().all()


def test_minigpt4_projection_alone(tmp_path, folders):
    ours = new_vlm(None, folders["llama"], "qformer", "minigpt4", "squash",
                                    qformer=folders["blip2"][0])
    made = {"llama_proj.weight": torch.randn(32, 24), "llama_proj.bias": torch.randn(32),
            "Qformer.bert.embeddings.position_ids": torch.arange(9)[None]}      # rides along
    save_weights(tmp_path / "full", made)
    before = ours.projector.qformer.query_tokens.clone()
    load_projector(ours, tmp_path / "full")
    assert torch.equal(ours.projector.proj.weight, made["llama_proj.weight"])
    assert torch.equal(ours.projector.proj.bias, made["llama_proj.bias"])
    assert torch.equal(ours.projector.qformer.query_tokens, before)
    # LLaMA-2's MiniGPT-4 has no Q-Former: four patches of 1408 side by side
    save_weights(tmp_path / "v2", {**made, "llama_proj.weight": torch.randn(32, 5632)})
    with pytest.raises(data.BadModel, match=r"llama_proj.weight: shape \(32, 5632\)"):
        load_projector(ours, tmp_path / "v2")
    save_weights(tmp_path / "none", {"other": torch.ones(1)})
    with pytest.raises(data.BadModel, match="language_projection.weight is missing"):
        load_projector(ours, tmp_path / "none")


def test_a_clip_eye_is_saved_whole_and_refused_by_transformers(tmp_path, folders):
    """transformers' BLIP-2 has no norm before the blocks: better refused than answered wrongly."""
    eye = clip.Config(width=32, depth=3, heads=4, mlp=48, image_size=S, patch_size=8)
    reads = clip.Config(width=24, depth=1, heads=3, mlp=40, vocab=50, context=16, eos_id=49)
    shaken(clip.CLIP(eye, reads, 20)).save_pretrained(tmp_path / "clip")
    asks = qformer.QFormer(qformer.Config(24, 4, 3, 40, num_queries=Q, vision_width=32, vocab=0))
    ours = new_vlm(tmp_path / "clip", folders["llama"], "qformer", "blip2",
                                    "squash", qformer=asks).eval()
    full = clip.ViT.from_pretrained(tmp_path / "clip")
    assert len(full.blocks) == 3 and len(ours.vision.blocks) == 2
    assert torch.equal(full(PIXELS), ours.vision(PIXELS))           # the second-last block's, both
    ours.save_pretrained(tmp_path / "vlm")
    again = projector.VLM.from_pretrained(tmp_path / "vlm")
    assert same_tensors(ours, again)
    ids = torch.tensor([[data.IMAGE, 1, 40]])
    assert torch.equal(ours(ids, PIXELS[:1]), again(ids, PIXELS[:1]))
    assert torch.equal(clip.ViT.from_pretrained(tmp_path / "vlm")(PIXELS), full(PIXELS))
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "vlm")
    with pytest.raises(UsageError, match="squash"):
        new_vlm(tmp_path / "clip", folders["llama"], "qformer", "blip2", "pad",
                                 qformer=asks)
    wide = qformer.QFormer(qformer.Config(24, 4, 3, 40, num_queries=Q, vision_width=48, vocab=0))
    with pytest.raises(data.BadModel, match="width 48, the vision tower's have 32"):
        new_vlm(tmp_path / "clip", folders["llama"], "qformer", "blip2",
                                 "squash", qformer=wide)


def test_a_toy_begins_in_the_channels_that_words_use(folders, tmp_path):
    tongue = shaken(llama.Llama(llama.Config(vocab=128, width=32, depth=1, heads=4, kv_heads=4,
                                             mlp=48)))
    with torch.no_grad():
        tongue.embed.weight.normal_(0, 2, generator=torch.Generator().manual_seed(0))
        tongue.embed.weight[:, 8:] = 0
    tongue.save_pretrained(tmp_path)
    write_words(tmp_path)
    ours = new_vlm(None, tmp_path, "qformer", "minigpt4", "squash",
                                    qformer=folders["blip2"][0])
    proj, loudness = ours.projector.proj.weight, tongue.embed.weight.std()
    assert not proj[8:].any() and proj[:8].all() and not ours.projector.proj.bias.any()
    heard = ours.projector.proj(torch.randn(1000, 24, generator=torch.Generator().manual_seed(1)))
    assert .8 < heard.std() / loudness < 1.25


def test_a_tensor_is_read_anew_each_time_it_is_asked_for(tmp_path):
    save_weights(tmp_path, {"a": torch.ones(4)})
    weights = data.load_weights(tmp_path)
    first = weights["a"]
    first.zero_()                                       # changes this tensor, not the file
    del first
    assert weights["a"].sum() == 4
    assert data.load_weights(tmp_path)["a"].sum() == 4


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
@pytest.mark.parametrize("path, value", [
    (("num_query_tokens",), 10 ** 12), (("num_query_tokens",), Q + 1), (("qformer_config",), 7),
    (("qformer_config", "hidden_size"), 36), (("vision_config",), None), (("text_config",), []),
    (("vision_config", "hidden_size"), "32"), (("vision_config", "num_hidden_layers"), 2),
    (("template",), "no-such"), (("image_aspect_ratio",), "pad")], ids=str)
def test_a_lying_config_is_refused(tmp_path, folders, kind, path, value):
    for file in folders[kind][0].rglob("*.*"):
        to = tmp_path / file.relative_to(folders[kind][0])
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(file.read_bytes())
    projector.VLM.from_pretrained(tmp_path)             # control: it was fine
    edit(tmp_path, *path[:-1], **{path[-1]: value})
    with pytest.raises(data.BadModel) as info:
        projector.VLM.from_pretrained(tmp_path)
    assert "\n" not in str(info.value)
