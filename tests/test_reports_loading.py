"""Reported faults of loading: what folders say, and what was passed over. The right values come
from transformers, or from the rule that the test states."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import clip
import data
import generate
import llama
import projector
import qformer
import test_official as official
import test_qformer_vlm as queries
from tiny import LIMIT, edit, gap, shaken, write_words

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def change(folder, new=None, drop=()):
    """Rewrite the weights of a folder: `new` tensors added, those that match `drop` left out."""
    table = {k: v for k, v in data.load_weights(folder).items() if k not in drop}
    data.save_weights(folder, table | (new or {}))


def write_vlm(folder, family):
    """A folder of transformers' tiny model of one of the four kinds."""
    if family.startswith(("llava", "next")):
        official.write(official.their_model(family), folder, "A", family)
    else:
        queries.write(queries.their_model(family), folder)
    return folder


def theirs(folder):
    """What transformers loads from the folder."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder).eval()


def vlm_gap(ours, other):
    module = official if ours.kind != "qformer" else queries
    return module.vlm_gap(ours, other)


# ------------------------------------------------------------------------------- A3: ties

TIES = {"neither": (None, None), "top": (True, None), "text": (None, True), "both": (True, True),
        "top alone, text denies": (True, False)}


@pytest.mark.parametrize("said", TIES)
@pytest.mark.parametrize("head", ["another", "the same", "absent"])
@pytest.mark.parametrize("family", ["llava", "next", "next mistral", "blip2", "instructblip"])
def test_ties_are_read_as_transformers_reads_them(tmp_path, family, head, said):
    write_vlm(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    for place, value in zip((config, config["text_config"]), TIES[said]):
        place.pop("tie_word_embeddings", None)
        if value is not None:
            place["tie_word_embeddings"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "language_model.lm_head.weight"
    table = dict(data.load_weights(tmp_path).items())
    if head == "the same":
        table[name] = table["language_model.model.embed_tokens.weight"].clone()
    elif head == "absent":
        del table[name]
    data.save_weights(tmp_path, table)
    tied = {"llava": any(TIES[said]), "next": TIES[said][0]}.get(family.split()[0], TIES[said][1])
    if head == "absent" and not tied:                   # transformers draws a head at random
        with pytest.raises(data.BadModel, match="lm_head.weight is missing"):
            projector.VLM.from_pretrained(tmp_path)
        return
    ours = projector.VLM.from_pretrained(tmp_path)
    assert vlm_gap(ours, theirs(tmp_path)) <= LIMIT
    assert (ours.llm.head.weight is ours.llm.embed.weight) == bool(tied and head != "another")
    ours.save_pretrained(tmp_path / "again")            # and it is written as it is
    again = projector.VLM.from_pretrained(tmp_path / "again")
    assert again.llm.config.tied == ours.llm.config.tied
    assert torch.equal(again.llm.head.weight, ours.llm.head.weight)
    assert vlm_gap(ours, theirs(tmp_path / "again")) <= LIMIT


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@pytest.mark.parametrize("head", ["another", "the same", "alone"])
def test_a_tied_llama_with_a_head_in_its_file(tmp_path, kind, head):
    """`alone`: the one tensor stands under the head's name, and the embedding is that."""
    config = getattr(transformers, f"{kind}Config")(**official.TONGUE, tie_word_embeddings=True)
    shaken(getattr(transformers, f"{kind}ForCausalLM")(config)).save_pretrained(tmp_path)
    embed = data.load_weights(tmp_path)["model.embed_tokens.weight"].clone()
    other = embed.roll(1, 0) if head == "another" else embed
    change(tmp_path, {"lm_head.weight": other}, ["model.embed_tokens.weight"] * (head == "alone"))
    ours, model = llama.Llama.from_pretrained(tmp_path), theirs(tmp_path)
    with torch.no_grad():
        right = model(IDS).logits
        assert gap(ours(IDS), right) <= LIMIT
        assert ours.config.tied == (head != "another")
        ours.save_pretrained(tmp_path / "again")
        assert gap(theirs(tmp_path / "again")(IDS).logits, right) <= LIMIT
        if head == "another":                           # control: a tie would be heard
            ours.head.weight = ours.embed.weight
            assert gap(ours(IDS), right) > .1


def test_an_official_llava_keeps_its_own_head(tmp_path):
    model = official.their_model("llava")
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**official.EYE)).save_pretrained(
        tmp_path / "clip")
    official.write_official(model, tmp_path / "a", "llava", tmp_path / "clip")
    edit(tmp_path / "a", tie_word_embeddings=True)
    ours = projector.VLM.from_pretrained(tmp_path / "a")
    assert vlm_gap(ours, model) <= LIMIT and not ours.llm.config.tied


# ------------------------------------------------------------------------------- A3: reasons

@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [clip.CLIP, clip.ViT])
def test_position_ids_must_count(tmp_path, kind, dtype):
    small = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    config = transformers.CLIPConfig(
        text_config=dict(**small, vocab_size=99, eos_token_id=98), projection_dim=20,
        vision_config=dict(official.EYE, image_size=304))
    shaken(transformers.CLIPModel(config)).save_pretrained(tmp_path)
    name, n = "vision_model.embeddings.position_ids", 1 + 38 ** 2
    change(tmp_path, {name: torch.arange(n)[None].to(dtype)})
    kind.from_pretrained(tmp_path)                      # half precision rounds, and may
    for wrong in (torch.arange(n).flip(0)[None].to(dtype), torch.zeros(1, n, dtype=dtype)):
        change(tmp_path, {name: wrong})
        with pytest.raises(data.BadModel, match=re.escape(f"{name} is left unused as a buffer")):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inv_freq_must_be_what_config_says(tmp_path, dtype, scaling):
    config = transformers.LlamaConfig(**official.TONGUE)
    shaken(transformers.LlamaForCausalLM(config)).save_pretrained(tmp_path)
    if scaling:
        edit(tmp_path, rope_scaling=scaling, rope_parameters={"rope_theta": 1e4, **scaling})
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = 10000 ** (-torch.arange(4) / 4)
    for good in (right, right / 4) if scaling else (right,):
        change(tmp_path, {name: good.to(dtype)})
        llama.Llama.from_pretrained(tmp_path)
    for wrong in (5e5 ** (-torch.arange(4) / 4), right / 2, right[:2]):
        change(tmp_path, {name: wrong.to(dtype)})
        with pytest.raises(data.BadModel, match="inv_freq is left unused as recomputed"):
            llama.Llama.from_pretrained(tmp_path)


def test_inv_freq_inside_a_llava(tmp_path):
    write_vlm(tmp_path, "llava")
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path, {name: 10000 ** (-torch.arange(4) / 4)})
    projector.VLM.from_pretrained(tmp_path)
    change(tmp_path, {name: 500 ** (-torch.arange(4) / 4)})
    with pytest.raises(data.BadModel, match="inv_freq is left unused"):
        projector.VLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_caption_head_called_tied_must_be(tmp_path, which):
    """LAVIS and BERT write the decoder beside the embedding it is tied to."""
    c = qformer.Config(width=32, depth=2, heads=2, mlp=48, queries=3, vision=32, vocab=len(
        queries.READER))
    bert = shaken(transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=c.vocab - 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=c.context)))
    bert.save_pretrained(tmp_path)
    state = bert.state_dict()
    both = {f"cls.predictions.decoder.{k}": state[f"cls.predictions.decoder.{k}"].clone()
            for k in ("weight", "bias")}
    change(tmp_path, both)
    model = qformer.Retriever(clip.Config(32, 2, 2, 48, 1e-6, 24, 8, eva=True, tail=False), c)
    qformer.begin_as_bert(model, tmp_path)
    name = f"cls.predictions.decoder.{which}"
    change(tmp_path, {name: both[name] + 1})
    with pytest.raises(data.BadModel, match=f"decoder.{which} is left unused as tied"):
        qformer.begin_as_bert(model, tmp_path)
    lavis = {f"Qformer.bert.embeddings.word_embeddings.weight": torch.ones(3, 2),
             "Qformer.cls.predictions.bias": torch.ones(3),
             "Qformer.cls.predictions.decoder.weight": torch.ones(3, 2),
             "Qformer.cls.predictions.decoder.bias": torch.ones(3)}
    part = torch.nn.Module()
    part.word, part.bias = (torch.nn.Parameter(torch.zeros(n)) for n in ((3, 2), (3,)))
    table = {"word": list(lavis)[0], "bias": list(lavis)[1]}
    data.fill(part, table, lavis, qformer.Retriever.IGNORE)
    lavis[f"Qformer.cls.predictions.decoder.{which}"] *= 2
    with pytest.raises(data.BadModel, match=f"decoder.{which} is left unused as tied"):
        data.fill(part, table, lavis, qformer.Retriever.IGNORE)


# ------------------------------------------------------------------------------- A4: processors

S = official.S
SQUARE = {"height": S, "width": S}
PHOTO = official.picture((50, 37))
PLAIN = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
         "rescale_factor": 1 / 255, "image_mean": list(data.MEAN), "image_std": list(data.STD),
         "resample": 3}


def write_processor(folder, family, nested=False, **changes):
    """The processor files of a family, as the hub has them, with changes; None takes a key out."""
    kind = {"llava": "Llava", "next": "LlavaNext"}.get(family.split()[0], "Blip")
    said = PLAIN | {"image_processor_type": f"{kind}ImageProcessor", "size": SQUARE}
    if kind != "Blip":
        said |= {"size": {"shortest_edge": S}, "crop_size": SQUARE, "do_center_crop": True}
    if kind == "LlavaNext":
        said |= {"image_grid_pinpoints": official.PINPOINTS, "do_pad": True}
    said = {k: v for k, v in (said | changes).items() if v is not None}
    (folder / "processor_config.json").unlink(missing_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    if nested:                                          # and the older file says something else
        wrong = said | {"do_normalize": False, "size": {"shortest_edge": 7}}
        (folder / "preprocessor_config.json").write_text(json.dumps(wrong))
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {family: write_vlm(root / family, family)
            for family in ("llava", "next", "blip2", "instructblip")}


def their_pixels(folder):
    """The processor's, by Pillow: the torchvision one rounds differently."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=PHOTO, return_tensors="pt")["pixel_values"]
    return pixels[0] if pixels.dim() == 5 else pixels


SAME = {"llava": [
    {}, {"do_pad": True}, {"do_pad": False}, {"size": S}, {"crop_size": S}, {"size": SQUARE},
    {"size": SQUARE, "do_pad": True}, {"size": SQUARE, "do_center_crop": False},
    {"size": [S, S]}, {"do_pad": True, "do_center_crop": False}, {"do_convert_rgb": False},
    {"rescale_factor": 0.00392156862745098}, {"image_mean": None, "image_std": None},
    {"resample": None, "do_normalize": None, "do_center_crop": None},
    {"image_processor_type": "CLIPImageProcessor"}, {"do_flip_channel_order": False},
    {"image_processor_type": "CLIPImageProcessor", "do_pad": True},
    {"image_processor_type": "CLIPImageProcessorFast"},
    {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
    {"image_processor_type": "BlipImageProcessor", "size": SQUARE, "do_center_crop": False,
     "crop_size": None}, {"pad_size": {"height": 99, "width": 99}, "do_pad": True}],
    "next": [{}, {"do_pad": False}, {"do_resize": False}, {"do_center_crop": False},
             {"size": SQUARE}, {"size": S, "crop_size": S}, {"image_grid_pinpoints":
                                                             official.PINPOINTS}],
    "blip2": [{}, {"size": S}, {"do_pad": True}, {"do_center_crop": True, "crop_size": SQUARE},
              {"do_pad": True, "pad_size": S}, {"image_processor_type": "CLIPImageProcessor",
                                                "crop_size": S}]}
SAME["instructblip"] = SAME["blip2"]


@pytest.mark.parametrize("nested", [False, True], ids=["old file", "nested"])
@pytest.mark.parametrize("family, changes", [(f, c) for f in SAME for c in SAME[f]], ids=str)
def test_processor_keys_that_are_obeyed(published, family, changes, nested):
    folder = write_processor(published[family], family, nested, **changes)
    ours = projector.VLM.from_pretrained(folder)
    assert torch.equal(ours.pixels(PHOTO), their_pixels(folder))
    ours.save_pretrained(folder / "again")              # and written so that they are again
    assert torch.equal(ours.pixels(PHOTO), their_pixels(folder / "again"))
    again = projector.VLM.from_pretrained(folder / "again")
    assert torch.equal(ours.pixels(PHOTO), again.pixels(PHOTO))


OTHER = [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5},
         {"image_mean": [.5, .5, .5]}, {"image_std": [.5, .5, .5]}, {"image_mean": .5},
         {"resample": 2}, {"size": {"shortest_edge": S + 8}}, {"size": S - 8},
         {"size": {"height": S, "width": S + 8}}, {"do_flip_channel_order": True},
         {"size": {"longest_edge": S}}, {"image_processor_type": "SiglipImageProcessor"},
         {"do_normalize": "no"}, {"size": "large"}, {"image_mean": [.5]}]
REFUSED = {"llava": OTHER + [{"do_center_crop": False}, {"do_resize": False}, {"crop_size": S - 8},
                             {"image_processor_type": "LlavaNextImageProcessor"},
                             {"image_processor_type": "CLIPImageProcessor", "do_pad": True,
                              "pad_size": 2 * S}],
           "next": OTHER + [{"crop_size": S - 8}, {"image_grid_pinpoints": [[S, 2 * S]]},
                            {"image_grid_pinpoints": official.PINPOINTS[::-1]},
                            {"image_processor_type": "CLIPImageProcessor"}],
           "blip2": OTHER + [{"size": {"shortest_edge": S}}, {"do_resize": False},
                             {"do_center_crop": True, "crop_size": S - 8},
                             {"do_pad": True, "pad_size": 2 * S}]}
REFUSED["instructblip"] = REFUSED["blip2"]


@pytest.mark.parametrize("nested", [False, True], ids=["old file", "nested"])
@pytest.mark.parametrize("family, changes", [(f, c) for f in REFUSED for c in REFUSED[f]], ids=str)
def test_processor_keys_that_are_refused_by_name(published, family, changes, nested):
    folder = write_processor(published[family], family, nested, **changes)
    with pytest.raises(data.BadModel) as info:
        projector.VLM.from_pretrained(folder)
    line = str(info.value)
    assert "\n" not in line and any(key in line for key in changes)
    assert ("preprocessor_config" in line) != nested


@pytest.mark.parametrize("family, outer", [
    ("llava", {"patch_size": 14}), ("llava", {"num_additional_image_tokens": 0}),
    ("llava", {"vision_feature_select_strategy": "cls"}), ("next", {"patch_size": 14}),
    ("llava", {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 1}),
    ("blip2", {"num_query_tokens": 32}), ("instructblip", {"num_query_tokens": 1})], ids=str)
def test_places_of_a_picture_that_are_not_its_places(published, family, outer):
    """transformers would write other numbers of <image> into the text, and stop there."""
    folder = write_processor(published[family], family)
    good = {"patch_size": 8, "num_additional_image_tokens": 1, "num_query_tokens": queries.Q,
            "vision_feature_select_strategy": "default", "image_token": "<image>"}
    file = folder / "processor_config.json"
    for right in (good, {"patch_size": 8}, {"vision_feature_select_strategy": "full",
                                            "num_additional_image_tokens": 0}):
        file.write_text(json.dumps(right))
        projector.VLM.from_pretrained(folder)
    file.write_text(json.dumps(good | outer))
    with pytest.raises(data.BadModel, match="|".join(outer)):
        projector.VLM.from_pretrained(folder)
    file.unlink()


def test_our_config_and_the_processor_must_agree(tmp_path, published):
    """image_aspect_ratio is ours; transformers goes by do_pad, whichever of the two was edited."""
    write_processor(published["llava"], "llava", do_pad=True)
    projector.VLM.from_pretrained(published["llava"]).save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        said = json.loads((tmp_path / name).read_text())
        said.get("image_processor", said)["do_pad"] = False
        (tmp_path / name).write_text(json.dumps(said))
    with pytest.raises(data.BadModel, match="do_pad False.*image_aspect_ratio pad"):
        projector.VLM.from_pretrained(tmp_path)
    edit(tmp_path, image_aspect_ratio="square")
    assert torch.equal(projector.VLM.from_pretrained(tmp_path).pixels(PHOTO),
                       their_pixels(tmp_path))


@pytest.mark.parametrize("changes", [
    {"do_normalize": False}, {"image_mean": [.5, .5, .5]}, {"do_rescale": False},
    {"size": S + 8}, {"resample": 2}, {"do_center_crop": False}], ids=str)
def test_a_clip_with_other_pictures_is_refused(tmp_path, changes):
    """The official code shows pictures as the tower's own processor says."""
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**official.EYE)).save_pretrained(
        tmp_path / "clip")
    model = official.their_model("llava")
    official.write_official(model, tmp_path / "llava", "llava", tmp_path / "clip")
    hub = {"feature_extractor_type": "CLIPFeatureExtractor", "size": S, "crop_size": S,
           "do_center_crop": True, "do_resize": True, "do_normalize": True, "resample": 3,
           "image_mean": list(data.MEAN), "image_std": list(data.STD)}
    file = tmp_path / "clip/preprocessor_config.json"
    file.write_text(json.dumps(hub))
    clip.ViT.from_pretrained(tmp_path / "clip")
    projector.VLM.from_pretrained(tmp_path / "llava")
    file.write_text(json.dumps(hub | changes))
    for load in (lambda: clip.ViT.from_pretrained(tmp_path / "clip"),
                 lambda: projector.VLM.from_pretrained(tmp_path / "llava")):
        with pytest.raises(data.BadModel, match=next(iter(changes))):
            load()


@pytest.mark.parametrize("layer", [-2, [-2], 2, [2], -1, 3, [-2, -1], [2, 1]], ids=str)
def test_the_layer_may_be_counted_from_either_end(published, layer):
    folder = write_processor(published["llava"], "llava")
    edit(folder, vision_feature_layer=layer)
    if layer in (-2, [-2], 2, [2]):
        assert vlm_gap(projector.VLM.from_pretrained(folder), theirs(folder)) <= LIMIT
    else:
        with pytest.raises(data.BadModel, match="vision_feature_layer"):
            projector.VLM.from_pretrained(folder)
    edit(folder, vision_feature_layer=-2)
