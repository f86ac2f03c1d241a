"""clip.py, llama.py and projector.py against transformers, on tiny models with random weights.

The rule: logits differ by at most 1e-5 of the largest logit, in fp32. Every rule has a control:
the same comparison with one well-known mistake put in (exact GELU, interleaved RoPE, the last
layer) must fail it clearly.
"""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import clip
import data
import llama
import projector
from tiny import LIMIT, edit, gap, loaded, same_tensors, shaken, write_words
from formats.checkpoints import save_weights
from formats.export import image_token_id
from toy.world import draw, make_scene
from trainer.build import new_vlm

EYE = clip.Config(width=32, depth=3, heads=4, mlp=48, eps=1e-5, image_size=24, patch_size=8)
READER = clip.Config(width=24, depth=2, heads=3, mlp=40, vocab=50, context=16, eos_id=49)
TONGUE = llama.Config(vocab=120, width=32, depth=3, heads=4, kv_heads=2, mlp=48, eps=1e-5,
                      rope_theta=5000.0, context=128)
LLAMAS = {"mha": {"kv_heads": 4}, "gqa": {}, "mqa tied": {"kv_heads": 1, "tie_embeddings": True},
          "tied": {"tie_embeddings": True}, "wide heads": {"head_size": 16},
          "llama3": {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 64)},
          "linear": {"rope_scaling": ("linear", 4.0)}}


# ------------------------------------------------------------------------------- CLIP

PIXELS = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
TEXTS = torch.tensor([[48, 3, 4, 49, 0, 0, 0], [48, 7, 49, 0, 0, 0, 0], [48, 9, 8, 7, 6, 5, 49]])


def our_clip(end=49):
    reader = clip.Config(**{**vars(READER), "eos_id": end})
    return shaken(clip.CLIP(EYE, reader, 20))


def their_clip_config(end=49):
    return transformers.CLIPConfig(
        projection_dim=20,
        vision_config=dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                           intermediate_size=48, image_size=24, patch_size=8, projection_dim=20),
        text_config=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                         intermediate_size=40, vocab_size=50, max_position_embeddings=16,
                         eos_token_id=end, bos_token_id=48, pad_token_id=0, projection_dim=20))


@torch.no_grad()
def clip_gap(ours, theirs):
    """The worst of image embeddings, text embeddings and similarity."""
    a, b = ours.encode_image(PIXELS), ours.encode_text(TEXTS)
    out = theirs(input_ids=TEXTS, pixel_values=PIXELS)
    return max(gap(a, out.image_embeds), gap(b, out.text_embeds),
               gap(a @ b.T * ours.logit_scale.exp(), out.logits_per_image))


@torch.no_grad()
def vit_gap(ours, theirs):
    return gap(ours(PIXELS), theirs(PIXELS, output_hidden_states=True).hidden_states[-2])


@pytest.mark.parametrize("end", [49, 2])            # 2: old files, where it means "the largest id"
def test_our_clip_in_transformers(tmp_path, end):
    ours = our_clip(end)
    ours.save_pretrained(tmp_path)
    assert clip_gap(ours, loaded(transformers.CLIPModel, tmp_path)) <= LIMIT
    assert same_tensors(ours, clip.CLIP.from_pretrained(tmp_path))


@pytest.mark.parametrize("end", [49, 2])
def test_their_clip_in_ours(tmp_path, end):
    theirs = shaken(transformers.CLIPModel(their_clip_config(end)), 1)
    theirs.save_pretrained(tmp_path)
    assert clip_gap(clip.CLIP.from_pretrained(tmp_path), theirs) <= LIMIT
    assert vit_gap(clip.ViT.from_pretrained(tmp_path), theirs.vision_model) <= LIMIT


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_their_vision_tower_alone_in_ours(tmp_path, prefix):
    theirs = shaken(transformers.CLIPVisionModel(their_clip_config().vision_config), 2)
    theirs.save_pretrained(tmp_path)
    table = {prefix + k.removeprefix("vision_model."): v
             for k, v in data.load_weights(tmp_path).items()}
    table[prefix + "embeddings.position_ids"] = torch.arange(10)[None]      # a buffer of old files
    save_weights(tmp_path, table)
    assert vit_gap(clip.ViT.from_pretrained(tmp_path), theirs) <= LIMIT


def test_exact_gelu_breaks_clip(tmp_path, monkeypatch):
    ours = our_clip()
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.CLIPModel, tmp_path)
    monkeypatch.setattr(clip, "quick_gelu", F.gelu)
    assert clip_gap(ours, theirs) > 100 * LIMIT
    assert vit_gap(ours.vision, theirs.vision_model) > 100 * LIMIT


def test_clip_with_exact_gelu_is_refused(tmp_path):
    our_clip().save_pretrained(tmp_path)
    edit(tmp_path, "vision_config", hidden_act="gelu")
    with pytest.raises(data.BadModel, match="gelu"):
        clip.CLIP.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------- LLaMA

SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
IDS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(3))


def our_llama(**changes):
    model = shaken(llama.Llama(llama.Config(**{**vars(TONGUE), **changes})))
    with torch.no_grad():
        model.norm.weight[::2] *= -1            # or a tied head says the last word again for ever
    return model


@torch.no_grad()
def llama_gap(ours, theirs):
    return gap(ours(IDS), theirs(IDS).logits)


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_our_llama_in_transformers(tmp_path, changes):
    ours = our_llama(**changes)
    ours.save_pretrained(tmp_path)
    assert ("lm_head.weight" in data.load_weights(tmp_path)) != ours.config.tie_embeddings
    assert llama_gap(ours, loaded(transformers.LlamaForCausalLM, tmp_path)) <= LIMIT
    again = llama.Llama.from_pretrained(tmp_path)
    assert same_tensors(ours, again) and again.config == ours.config
    assert (again.head.weight is again.embed.weight) == ours.config.tie_embeddings


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_their_llama_in_ours(tmp_path, changes):
    kind, *values = changes.get("rope_scaling", ("default",))
    theirs = shaken(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=120,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=changes.get("kv_heads", 2),
                intermediate_size=48,
                rms_norm_eps=1e-3,
                head_dim=changes.get("head_size", 8),
                tie_word_embeddings=changes.get("tie_embeddings", False),
                rope_parameters={
                    "rope_theta": 700.0,
                    "rope_type": kind,
                    **dict(zip(SCALING, values)),
                },
            )
        ),
        4,
    )
    theirs.save_pretrained(tmp_path)
    assert llama_gap(llama.Llama.from_pretrained(tmp_path), theirs) <= LIMIT
    config = json.loads((tmp_path / "config.json").read_text())     # controls, one lie at a time
    lies = [{"rms_norm_eps": 1e-6}, {"rope_parameters": {"rope_theta": 900.0}},
            {"num_attention_heads": 8, "num_key_value_heads": 2 * changes.get("kv_heads", 2),
             "head_dim": changes.get("head_size", 8) // 2}]
    for lie in lies + [{"rope_parameters": {"rope_theta": 700.0}}] * bool(values):
        (tmp_path / "config.json").write_text(json.dumps(config | lie))
        assert llama_gap(llama.Llama.from_pretrained(tmp_path), theirs) > 10 * LIMIT, lie


def test_rope_base_of_old_and_new_configs(tmp_path):
    ours = our_llama()
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for drop in ("rope_theta", "rope_parameters"):          # flat in old files, nested in new ones
        (tmp_path / "config.json").write_text(json.dumps(
            {k: v for k, v in config.items() if k != drop}))
        assert llama.Llama.from_pretrained(tmp_path).config.rope_theta == 5000
        assert llama_gap(ours, loaded(transformers.LlamaForCausalLM, tmp_path)) <= LIMIT


def interleaved(x, cos, sin, inplace=False):
    """RoPE by the paper's pairing, channels (0, 1) (2, 3) ..."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    return x.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2))


def test_interleaved_rope_breaks_llama(tmp_path, monkeypatch):
    ours = our_llama()
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlamaForCausalLM, tmp_path)
    monkeypatch.setattr(llama, "rope", interleaved)
    assert llama_gap(ours, theirs) > 100 * LIMIT


@torch.no_grad()
def greedy(model, ids, new, cached):
    """`new` tokens behind ids (1, T), each the most likely."""
    ids, start = ids[0].tolist(), ids.shape[1]
    cache = llama.KVCache(model.config, 1, start + new, model.embed.weight) if cached else None
    for step in range(new):
        seen = ids[-1:] if cached and step else ids
        ids.append(int(model(torch.tensor([seen]), cache)[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_32_greedy_tokens_equal_transformers(tmp_path, changes):
    ours = our_llama(**changes)
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlamaForCausalLM, tmp_path)
    theirs.generation_config.eos_token_id = None            # go on to the full length
    theirs.generation_config.pad_token_id = 0
    for row in IDS[:, None]:
        told = theirs.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=32,
                               do_sample=False)[0, row.shape[1]:].tolist()
        assert len(told) == 32
        assert greedy(ours, row, 32, cached=True) == told
        assert greedy(ours, row, 32, cached=False) == told
        assert len(set(told)) > 3                           # and not one word all over


@torch.no_grad()
@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS)
def test_cache_gives_the_same_logits_in_any_pieces(changes):
    model = our_llama(**changes)
    whole = model(IDS)
    for sizes in ((11,), (1,) * 11, (4, 1, 6)):
        cache, pieces = llama.KVCache(model.config, 2, 11, model.embed.weight), []
        for piece in IDS.split(sizes, 1):
            pieces.append(model(piece, cache))
        assert gap(torch.cat(pieces, 1), whole) <= LIMIT
    with pytest.raises(ValueError, match="12 positions, room for 11"):
        model(IDS[:, :1], cache)


@torch.no_grad()
def test_left_padding_with_positions_changes_nothing():
    model, short = our_llama(), IDS[1:, :7]
    padded = torch.cat((torch.full((1, 4), 5), short), 1)
    attention_mask = torch.arange(11)[None] >= 4
    position_ids = (torch.arange(11) - 4).clamp(min=0)[None]
    alone = model(short)
    assert gap(model(padded, None, position_ids, attention_mask)[:, 4:], alone) <= LIMIT
    cache = llama.KVCache(model.config, 1, 12, model.embed.weight, attention_mask)
    assert gap(model(padded, cache, position_ids)[:, 4:], alone) <= LIMIT
    more = model(torch.tensor([[9]]), cache, torch.tensor([[7]]))
    assert gap(more, model(torch.cat((short, torch.tensor([[9]])), 1))[:, -1:]) <= LIMIT
    assert gap(model(padded, None, position_ids)[:, 4:], alone) > 100 * LIMIT  # control: no mask


# ------------------------------------------------------------------------------- LLaVA

@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny CLIP and, by name, of tiny LLaMAs with a tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    our_clip().save_pretrained(root / "clip")
    for name, changes in {
        "llama": {"vocab": 110},
        "tied": {"vocab": 110, "tie_embeddings": True},
    }.items():
        our_llama(**changes).save_pretrained(root / name)
        write_words(root / name)
    return root


def vlm(parts, bridge, tongue="llama", **options):
    model = new_vlm(parts / "clip", parts / tongue, bridge, **options)
    with torch.no_grad():
        for p in model.projector.parameters():                 # biases must matter too
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)), alpha=.1)
    return model.eval()


ROW = torch.tensor([[1, 40, 41, data.IMAGE, 42, 43, 44, 45]])


def their_row(model):
    """Our ids as transformers wants them: the image's token once for each patch."""
    row = ROW[0].tolist()
    at = row.index(data.IMAGE)
    return torch.tensor(
        [row[:at] + [image_token_id(model.tokenizer)] * model.patches + row[at + 1 :]]
    )


@torch.no_grad()
def vlm_gap(ours, theirs, pixels=PIXELS[:1]):
    return gap(ours(ROW, pixels),
               theirs(input_ids=their_row(ours), pixel_values=pixels).logits)


@pytest.mark.parametrize("bridge, tongue", [("mlp", "llama"), ("linear", "llama"),
                                            ("mlp", "tied")])
def test_our_llava_in_transformers(tmp_path, parts, bridge, tongue):
    ours = vlm(parts, bridge, tongue)
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlavaForConditionalGeneration, tmp_path)
    assert vlm_gap(ours, theirs) <= LIMIT
    with torch.no_grad():                                       # without a picture
        assert gap(ours(IDS % 100), theirs(input_ids=IDS % 100).logits) <= LIMIT
        other = ours(ROW, PIXELS[1:2])                          # control: the picture matters
    assert gap(other[:, -1], ours(ROW, PIXELS[:1])[:, -1].detach()) > 1000 * LIMIT


@pytest.mark.parametrize("bridge, tongue", [("mlp", "llama"), ("linear", "llama"),
                                            ("mlp", "tied")])
def test_our_llava_comes_back_the_same(tmp_path, parts, bridge, tongue):
    ours = vlm(parts, bridge, tongue, template="plain", aspect="square")
    ours.save_pretrained(tmp_path)
    again = projector.VLM.from_pretrained(tmp_path)
    assert same_tensors(ours, again) and len(again.tokenizer) == 112
    assert (again.projector_type, again.template, again.aspect) == (bridge, "plain", "square")
    assert image_token_id(again.tokenizer) == image_token_id(ours.tokenizer) == 110
    assert torch.equal(ours(ROW, PIXELS[:1]), again(ROW, PIXELS[:1]))
    again.save_pretrained(tmp_path / "again")                   # and nothing drifts
    for file in sorted(p.name for p in tmp_path.iterdir() if p.is_file()):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_our_llava_saved_again_by_transformers_comes_back(tmp_path, parts):
    vlm(parts, "mlp", template="plain").save_pretrained(tmp_path / "ours")
    theirs = loaded(transformers.LlavaForConditionalGeneration, tmp_path / "ours")
    shaken(theirs, 6).save_pretrained(tmp_path / "theirs")
    transformers.AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs")
    again = projector.VLM.from_pretrained(tmp_path / "theirs")
    assert again.template == "plain" and len(again.tokenizer) == 112
    assert vlm_gap(again, theirs) <= LIMIT


def test_last_layer_instead_of_second_last_breaks_llava(tmp_path, parts, monkeypatch):
    ours = vlm(parts, "mlp")
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlavaForConditionalGeneration, tmp_path)
    second_last = clip.ViT.forward
    monkeypatch.setattr(clip.ViT, "forward",
                        lambda self, pixels: self.blocks[-1](second_last(self, pixels)))
    assert vlm_gap(ours, theirs) > 100 * LIMIT


def test_keeping_the_class_token_breaks_llava(tmp_path, parts, monkeypatch):
    ours = vlm(parts, "mlp")
    ours.save_pretrained(tmp_path)
    theirs = loaded(transformers.LlavaForConditionalGeneration, tmp_path)
    forward = clip.ViT.forward                  # see() drops row 0; put it where it drops nothing
    monkeypatch.setattr(clip.ViT, "forward", lambda self, x: forward(self, x).roll(1, 1))
    assert vlm_gap(ours, theirs) > 100 * LIMIT


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_processor_loads_and_sees_the_same_picture(tmp_path, parts, aspect):
    ours = vlm(parts, "mlp", aspect=aspect)
    ours.save_pretrained(tmp_path)
    for kind in (transformers.AutoProcessor, transformers.LlavaProcessor):
        processor = kind.from_pretrained(tmp_path)
        assert type(processor).__name__ == "LlavaProcessor"
        for picture in (draw(make_scene(0)), draw(make_scene(1), side=24),
                        Image.fromarray(np.random.default_rng(0).integers(
                            0, 256, (37, 37, 3), dtype=np.uint8))):
            batch = processor(images=picture, text="USER: <image>\nHi!", return_tensors="pt")
            assert torch.equal(batch["pixel_values"], data.preprocess(picture, 24, aspect))
        ids = batch["input_ids"][0].tolist()
        assert ids.count(image_token_id(ours.tokenizer)) == ours.patches == 9
        rest = [i for i in ids if i != image_token_id(ours.tokenizer)]
        assert rest[-3:] == ours.tokenizer.encode("Hi!", bos=False)[-3:]


def test_their_chat_template_writes_our_prompt(tmp_path, parts):
    vlm(parts, "mlp").save_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    told = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
         {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}],
        add_generation_prompt=True)
    talk = [{"from": who, "value": text} for who, text in (
        ("human", "<image>\nWhat?"), ("gpt", "A star."), ("human", "Sure?"))]
    assert told == data.prompt(talk, "v1")


# ------------------------------------------------------------------------------- lies and losses

LIES = [10 ** 12, -1, 0, "32", None, [32], 1.5, True]


@pytest.mark.parametrize("value", LIES, ids=repr)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size"])
def test_lying_sizes_are_refused_before_memory_is_taken(tmp_path, parts, key, value):
    for name, kind, path in (("clip", clip.CLIP, ["vision_config"]),
                             ("clip", clip.CLIP, ["text_config"]),
                             ("clip", clip.ViT, ["vision_config"]), ("llama", llama.Llama, [])):
        folder = tmp_path / f"{kind.__name__}{''.join(path)}"
        shutil.copytree(parts / name, folder)
        kind.from_pretrained(folder)                            # control: it was fine
        edit(folder, *path, **{key: value})
        with pytest.raises(data.BadModel) as info:
            kind.from_pretrained(folder)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("value", [10 ** 12, -1, "20", None], ids=repr)
def test_a_lying_projection_is_refused(tmp_path, parts, value):
    shutil.copytree(parts / "clip", tmp_path / "clip")
    edit(tmp_path / "clip", projection_dim=value)
    with pytest.raises(data.BadModel):
        clip.CLIP.from_pretrained(tmp_path / "clip")


@pytest.mark.parametrize("values", [
    {"hidden_act": "gelu"}, {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, {"rope_parameters": 3},
    {"attention_bias": True}, {"head_dim": -2}, {"head_dim": "8"}, {"tie_word_embeddings": "no"},
    {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": "linear"},
    {"rope_theta": -1}, {"rms_norm_eps": "small"}, {"num_key_value_heads": 3}], ids=str)
def test_a_llama_of_another_kind_is_refused(tmp_path, parts, values):
    shutil.copytree(parts / "llama", tmp_path / "llama")
    edit(tmp_path / "llama", **values)
    with pytest.raises(data.BadModel):
        llama.Llama.from_pretrained(tmp_path / "llama")


@pytest.mark.parametrize("path, value", [
    (("text_config", "hidden_size"), 10 ** 12), (("text_config", "hidden_size"), 64),
    (("vision_config", "hidden_size"), 64), (("vision_config", "image_size"), -5),
    (("text_config", "vocab_size"), "110"), (("text_config", "vocab_size"), 100),
    (("text_config",), "llama"), (("vision_config",), 7), (("model_type",), "qwen"),
    (("template",), "no-such"), (("template",), ["v1"]), (("vision_feature_layer",), -1),
    (("image_aspect_ratio",), "no-such"), (("vision_feature_select_strategy",), "full")], ids=str)
def test_a_lying_llava_is_refused(tmp_path, parts, path, value):
    vlm(parts, "mlp").save_pretrained(tmp_path)
    projector.VLM.from_pretrained(tmp_path)
    edit(tmp_path, *path[:-1], **{path[-1]: value})
    with pytest.raises(data.BadModel):
        projector.VLM.from_pretrained(tmp_path)


@pytest.fixture
def folders(tmp_path, parts):
    for name in ("clip", "llama"):
        shutil.copytree(parts / name, tmp_path / name)
    vlm(parts, "mlp").save_pretrained(tmp_path / "vlm")
    return tmp_path


WANTED = [
    ("clip", clip.CLIP, "text_model.encoder.layers.1.mlp.fc2.bias"),
    ("clip", clip.ViT, "vision_model.encoder.layers.2.self_attn.k_proj.weight"),
    ("llama", llama.Llama, "model.layers.2.self_attn.v_proj.weight"),
    ("llama", llama.Llama, "lm_head.weight"),
    ("vlm", projector.VLM, "multi_modal_projector.linear_2.bias"),
    ("vlm", projector.VLM, "language_model.model.norm.weight")]


@pytest.mark.parametrize("name, kind, tensor", WANTED, ids=[w[2] for w in WANTED])
def test_a_missing_tensor_is_named(folders, name, kind, tensor):
    table = dict(data.load_weights(folders / name).items())
    kind.from_pretrained(folders / name)
    del table[tensor]
    save_weights(folders / name, table)
    with pytest.raises(data.BadModel, match=f"{tensor} is missing"):
        kind.from_pretrained(folders / name)


@pytest.mark.parametrize("name, kind", [("clip", clip.CLIP), ("clip", clip.ViT),
                                        ("llama", llama.Llama), ("vlm", projector.VLM)])
@pytest.mark.parametrize("tensor", ["foreign.weight", "vision_model.foreign", "model.layers.3.x",
                                    "language_model.model.layers.0.self_attn.q_proj.bias"])
def test_a_foreign_tensor_is_named(folders, name, kind, tensor):
    table = dict(data.load_weights(folders / name).items())
    save_weights(folders / name, {**table, tensor: torch.zeros(2)})
    with pytest.raises(data.BadModel, match=tensor):
        kind.from_pretrained(folders / name)
