"""Reported faults of loading: what folders say, and what was passed over. The right values come
from transformers, or from the rule that the test states."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
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
from decoding.loading import cast_for_cpu
from formats.checkpoints import export, load_into, save_weights
from formats.errors import UsageError
from formats import names, unused
from formats.export import save_tokenizer
from trainer.build import init_from_bert, load_projector

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def change(folder, new=None, drop=()):
    """Rewrite the weights of a folder: `new` tensors added, those that match `drop` left out."""
    table = {k: v for k, v in data.load_weights(folder).items() if k not in drop}
    save_weights(folder, table | (new or {}))


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
    module = official if ours.projector_type != "qformer" else queries
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
    save_weights(tmp_path, table)
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
    assert again.llm.config.tie_embeddings == ours.llm.config.tie_embeddings
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
        assert ours.config.tie_embeddings == (head != "another")
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
    assert vlm_gap(ours, model) <= LIMIT and not ours.llm.config.tie_embeddings


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
    c = qformer.Config(
        width=32,
        depth=2,
        heads=2,
        mlp=48,
        num_queries=3,
        vision_width=32,
        vocab=len(queries.READER),
    )
    bert = shaken(transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=c.vocab - 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=c.context)))
    bert.save_pretrained(tmp_path)
    state = bert.state_dict()
    both = {f"cls.predictions.decoder.{k}": state[f"cls.predictions.decoder.{k}"].clone()
            for k in ("weight", "bias")}
    change(tmp_path, both)
    model = qformer.Blip2Stage1(
        clip.Config(32, 2, 2, 48, 1e-6, 24, 8, eva=True, has_final_block=False), c
    )
    init_from_bert(model, tmp_path)
    name = f"cls.predictions.decoder.{which}"
    change(tmp_path, {name: both[name] + 1})
    with pytest.raises(data.BadModel, match=f"decoder.{which} is left unused as tied"):
        init_from_bert(model, tmp_path)
    lavis = {f"Qformer.bert.embeddings.word_embeddings.weight": torch.ones(3, 2),
             "Qformer.cls.predictions.bias": torch.ones(3),
             "Qformer.cls.predictions.decoder.weight": torch.ones(3, 2),
             "Qformer.cls.predictions.decoder.bias": torch.ones(3)}
    part = torch.nn.Module()
    part.word, part.bias = (torch.nn.Parameter(torch.zeros(n)) for n in ((3, 2), (3,)))
    table = {"word": list(lavis)[0], "bias": list(lavis)[1]}
    load_into(part, table, lavis, unused.STAGE1)
    lavis[f"Qformer.cls.predictions.decoder.{which}"] *= 2
    with pytest.raises(data.BadModel, match=f"decoder.{which} is left unused as tied"):
        load_into(part, table, lavis, unused.STAGE1)


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


# ------------------------------------------------------------------------------- B15: indexes

def write_index(folder, table):
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": table}))


def put(tensors, file):
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def shards(folder, *parts):
    """model-1.safetensors ..., without an index."""
    (folder / "model.safetensors").unlink()
    for i, part in enumerate(parts, 1):
        put(part, folder / f"model-{i}.safetensors")


@pytest.fixture
def tiny_llama(tmp_path):
    model = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**official.TONGUE)))
    model.save_pretrained(tmp_path)
    return tmp_path, {k: v.clone() for k, v in data.load_weights(tmp_path).items()}


def llama_gap(folder):
    with torch.no_grad():
        return gap(llama.Llama.from_pretrained(folder)(IDS), theirs(folder)(IDS).logits)


def test_tensors_that_the_index_does_not_list_are_loaded(tiny_llama):
    folder, table = tiny_llama
    first = {k: table[k] for k in list(table)[::2]}
    second = {k: table[k] for k in list(table)[1::2]}
    shards(folder, first, second)
    listed = {k: f"model-{i}.safetensors" for i, part in ((1, first), (2, second)) for k in part}
    del listed["model.norm.weight"], listed["lm_head.weight"]
    write_index(folder, listed)
    assert llama_gap(folder) <= LIMIT


def test_index_entries_that_nobody_needs(tiny_llama):
    folder, table = tiny_llama
    shards(folder, table)
    ghost = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_index(folder, dict.fromkeys([*table, ghost], "model-1.safetensors"))
    assert llama_gap(folder) <= LIMIT
    lost = {k: v for k, v in table.items() if k != "model.norm.weight"}     # but one that we need
    put(lost, folder / "model-1.safetensors")
    with pytest.raises(data.BadModel, match="norm.weight is missing.* names model-1.safetensors"):
        llama.Llama.from_pretrained(folder)


@pytest.mark.parametrize("name_it", [True, False])
def test_an_overlay_wins(tiny_llama, name_it):
    folder, table = tiny_llama
    over = {"model.norm.weight": -table["model.norm.weight"]}
    shards(folder, table, over)
    listed = dict.fromkeys(table, "model-1.safetensors")
    listed["anything"] = listed["model.norm.weight"] = "model-2.safetensors"
    if not name_it:
        del listed["model.norm.weight"]
    write_index(folder, listed)
    assert llama_gap(folder) <= LIMIT
    loaded = llama.Llama.from_pretrained(folder)
    assert torch.equal(loaded.norm.weight, over["model.norm.weight"])
    # an index that names the other file: transformers takes the last all the same
    write_index(folder, listed | {"model.norm.weight": "model-1.safetensors"})
    with pytest.raises(data.BadModel, match="norm.weight is in model-2.safetensors too"):
        llama.Llama.from_pretrained(folder)
    put({"model.norm.weight": table["model.norm.weight"]}, folder / "model-2.safetensors")
    assert llama_gap(folder) <= LIMIT                   # the same values: no matter


def test_a_whole_set_of_shards_needs_no_index(tiny_llama):
    """What the one-line conversion of pytorch_model-00001-of-00002.bin ... leaves."""
    folder, table = tiny_llama
    (folder / "model.safetensors").unlink()
    for i in range(2):
        part = {k: table[k] for k in list(table)[i::2]}
        put(part, folder / f"pytorch_model-0000{i + 1}-of-00002.safetensors")
    assert all(torch.equal(v, table[k]) for k, v in data.load_weights(folder).items())
    (folder / "pytorch_model-00002-of-00002.safetensors").unlink()
    (folder / "pytorch_model-00003-of-00003.safetensors").write_bytes(
        (folder / "pytorch_model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(data.BadModel, match="not a whole set of shards"):
        data.load_weights(folder)


# ------------------------------------------------------------------------------- B15: tokens

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TEXTS = "a<image>b[PAD]<pad>c<x>d", "plain words", "<x><x> <image>"


def write_added(folder, added=(), decoder=(), older=None, **config):
    """Tokens of tokenizer.json, of added_tokens_decoder, of added_tokens.json: [(token, id)]."""
    folder.mkdir(exist_ok=True)
    write_words(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] += [{"id": i, "content": t, "special": True, **FLAGS} for t, i in added]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    said = json.loads((folder / "tokenizer_config.json").read_text()) | config
    if decoder:
        said["added_tokens_decoder"] = {str(i): {"content": t, "special": True, **FLAGS}
                                        for t, i in decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    if older:
        (folder / "added_tokens.json").write_text(json.dumps(older))
    return folder


ADDED = [dict(), dict(added=[("<image>", 120)]), dict(added=[("<image>", 120), ("<pad>", 121)]),
         dict(added=[("[PAD]", 110)], pad_token="[PAD]"), dict(decoder=[("<image>", 110)]),
         dict(decoder=[("<image>", 120), ("<pad>", 115)]), dict(older={"<image>": 110, "<x>": 111}),
         dict(older={"<image>": 120}), dict(pad_token="[PAD]"),
         dict(additional_special_tokens=["<image>", "<x>"]),
         dict(extra_special_tokens={"image_token": "<image>"}),
         dict(added=[("<image>", 110)], decoder=[("<image>", 110), ("<x>", 111)]),
         dict(decoder=[("<image>", 110)], pad_token="[PAD]"),
         dict(decoder=[("<image>", 110)], pad_token={"__type": "AddedToken", "content": "<pad>",
                                                    **FLAGS})]


@pytest.mark.parametrize("how", ADDED, ids=str)
def test_added_tokens_have_transformers_ids(tmp_path, how):
    folder = write_added(tmp_path / "a", **how)
    ours, hf = data.Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)

    def agree(ours, hf):
        for text in TEXTS:
            ids = hf(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, bos=False) == ids
        assert len(ours) == len(hf) and ours.pad == hf.pad_token_id
        for token in ("<image>", "<pad>", "[PAD]", "<x>"):
            assert ours.added(token) == hf.get_added_vocab().get(token)
    agree(ours, hf)
    (tmp_path / "b").mkdir()
    save_tokenizer(ours, tmp_path / "b")           # and both read the same from ours
    agree(data.Tokenizer(tmp_path / "b"),
          transformers.AutoTokenizer.from_pretrained(tmp_path / "b"))
    assert ours.encode("<image>", bos=False, special=False) != [ours.added("<image>")]


def test_special_tokens_map_of_older_folders(tmp_path):
    folder = write_added(tmp_path / "a", added=[("<pad>", 110)])
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    assert data.Tokenizer(folder).pad == hf.pad_token_id == 110


@pytest.mark.parametrize("token", ["[PAD]", "<image>", "<other>"])
def test_tokens_without_a_row_are_unused_or_refused(tmp_path, token):
    """The model has 128 rows; 18 tokens fill them, one more has none."""
    write_vlm(tmp_path, "llava")
    fill = [(f"<f{i}>", 110 + i) for i in range(18)]
    write_added(tmp_path, fill + [(token, 128)], pad_token=token)
    ours = projector.VLM.from_pretrained(tmp_path)
    assert len(ours.tokenizer) == 129 and ours.tokenizer.pad == 0
    ids = ours.tokenizer.encode(f"a {token} b")
    assert max(ids) < 128 and ids[:3] == ours.tokenizer.encode("a ")[:3]
    assert vlm_gap(ours, theirs(tmp_path)) <= LIMIT
    for used in (dict(eos_token=token), dict(bos_token=token)):
        write_added(tmp_path, fill + [(token, 128)], **used)
        with pytest.raises(data.BadModel, match=re.escape(repr(token)) + " is number 128, the mod"):
            projector.VLM.from_pretrained(tmp_path)
    write_added(tmp_path, fill + [("<|im_start|>", 128)])               # the template writes it
    with pytest.raises(data.BadModel, match="im_start.* is number 128"):
        projector.VLM.from_pretrained(tmp_path)


def test_a_saved_model_has_rows_for_image_and_pad(tmp_path, monkeypatch):
    """Vicuna's 32,000 rows have none; transformers looks both up before it replaces them."""
    monkeypatch.setitem(official.TONGUE, "vocab_size", 110)
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**official.EYE)).save_pretrained(
        tmp_path / "clip")
    official.write_official(official.their_model("llava"), tmp_path / "a", "llava",
                            tmp_path / "clip")
    ours = projector.VLM.from_pretrained(tmp_path / "a")
    ours.save_pretrained(tmp_path / "b")
    assert vlm_gap(ours, theirs(tmp_path / "b")) <= LIMIT
    again = projector.VLM.from_pretrained(tmp_path / "b")
    assert again.llm.config.vocab == 112 and len(again.tokenizer) == 112


@pytest.mark.parametrize("what", [{"added_tokens_decoder": {"x": {"content": "a"}}},
                                  {"added_tokens_decoder": {"110": "a"}},
                                  {"added_tokens_decoder": {"110": {"content": 3}}},
                                  {"pad_token": 3}, {"additional_special_tokens": 7},
                                  {"added_tokens_decoder": 3}], ids=str)
def test_what_is_no_token_is_refused(tmp_path, what):
    write_added(tmp_path, **what)
    with pytest.raises(data.BadModel, match="not a tokenizer"):
        data.Tokenizer(tmp_path)


# ------------------------------------------------------------------------------- B17

def test_a_folder_with_the_older_tokenizer_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    with pytest.raises(data.BadModel, match="only tokenizer.model.*AutoTokenizer") as info:
        data.Tokenizer(tmp_path)
    code = re.search(r'python -c "(.*)"', str(info.value))[1]
    compile(code, "line", "exec")
    assert f"T.from_pretrained('{tmp_path}').save_pretrained('{tmp_path}')" in code


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model-00001-of-00002.bin",
                                                           "pytorch_model-00002-of-00002.bin"]])
def test_the_conversion_that_is_named_works(tiny_llama, names):
    """What a user is told to run is run here: with it the folder loads."""
    folder, table = tiny_llama
    (folder / "model.safetensors").unlink()
    for i, name in enumerate(names):
        torch.save({k: table[k] for k in list(table)[i::len(names)]}, folder / name)
    torch.save([1], folder / "training_args.bin")
    with pytest.raises(data.BadModel, match="only pickled weights") as info:
        llama.Llama.from_pretrained(folder)
    line = str(info.value)
    assert "\n" not in line
    subprocess.run([sys.executable, "-c", re.search(r'python -c "(.*)"', line)[1]], check=True)
    loaded = data.load_weights(folder)
    assert loaded.keys() == table.keys() and all(torch.equal(loaded[k], table[k]) for k in table)
    llama.Llama.from_pretrained(folder)


def test_a_projector_that_is_a_pickle(tmp_path):
    """LLaVA publishes mm_projector.bin: the line converts it, and then it is loaded."""
    write_vlm(tmp_path / "a", "llava")
    ours = projector.VLM.from_pretrained(tmp_path / "a")
    table = export(ours.projector, {k.removeprefix("projector."): v
                                    for k, v in names.LLAVA_PROJECTOR.items()})
    numbers = {"linear_1": "0", "linear_2": "2"}
    torch.save({re.sub(r"multi_modal_projector\.(linear_.)", lambda m: "model.mm_projector."
                       + numbers[m[1]], k): v + 1 for k, v in table.items()},
               tmp_path / "mm_projector.bin")
    with pytest.raises(data.BadModel, match="mm_projector.bin: pickled weights") as info:
        load_projector(ours, tmp_path / "mm_projector.bin")
    subprocess.run([sys.executable, "-c", re.search(r'python -c "(.*)"', str(info.value))[1]],
                   check=True)
    before = ours.projector.first.weight.clone()
    load_projector(ours, tmp_path / "mm_projector.safetensors")
    assert torch.equal(ours.projector.first.weight, before + 1)


def test_hub_ids_with_pickles_and_the_older_tokenizer(tmp_path):
    """Of a hub id only json and safetensors are fetched: the line names the hub id."""
    snapshot = tmp_path / "models--lmsys--vicuna-7b-v1.5/snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    shown = "^lmsys/vicuna-7b-v1.5: only "
    with pytest.raises(data.BadModel, match=f"{shown}tokenizer.model") as info:
        data.Tokenizer(snapshot)
    assert f"T.from_pretrained('lmsys/vicuna-7b-v1.5').save_pretrained('{snapshot}')" in str(
        info.value)
    with pytest.raises(data.BadModel, match="^lmsys/vicuna-7b-v1.5: no model.safetensors on the"):
        data.load_weights(snapshot)
    (snapshot / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(data.BadModel, match=f"{shown}pickled.*hf download lmsys/vicuna-7b") as info:
        data.load_weights(snapshot)
    assert "glob('vicuna-7b-v1.5/pytorch_model*.bin')" in str(info.value)
    assert "\n" not in str(info.value)


MODULES = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "down_proj": "mlp.down_proj"}


def write_adapter(folder, prefix="language_model.model.", base=None, rank=4, **config):
    """PEFT's layout, by hand; returns {module: (A, B)}."""
    folder.mkdir(exist_ok=True)
    dice, pairs = torch.Generator().manual_seed(3), {}
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 48)}
    for layer in range(3):
        for name, path in MODULES.items():
            out, into = shapes[name]
            pairs[f"{prefix}layers.{layer}.{path}"] = (
                torch.randn(rank, into, generator=dice) * into ** -.5,
                .2 * torch.randn(out, rank, generator=dice))
    table = {}
    for module, (A, B) in pairs.items():
        table[f"base_model.model.{module}.lora_A.weight"] = A
        table[f"base_model.model.{module}.lora_B.weight"] = B
    safetensors.torch.save_file(table, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "fan_in_fan_out": False,
            "bias": "none", "base_model_name_or_path": base and str(base), "use_rslora": False,
            "target_modules": list(MODULES), "task_type": "CAUSAL_LM", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return pairs


def by_hand(folder, pairs, scale):
    """transformers' model of the folder, with scale(module) B A added to its weights."""
    model = theirs(folder)
    modules = {names.canonical(f"{k}.weight"): m for k, m in model.named_modules()}
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            modules[names.canonical(f"{name}.weight")].weight += scale(name) * (B @ A)
    return model


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.",
                                    "model."])
def test_an_adapter_is_added_to_its_base(tmp_path, family, prefix):
    base = write_vlm(tmp_path / "base", family)
    pairs = write_adapter(tmp_path / "lora", prefix, base)
    right = by_hand(base, pairs, lambda module: 2)
    plain = theirs(base)
    for ours in (projector.VLM.from_pretrained(tmp_path / "lora"),
                 projector.VLM.from_pretrained(tmp_path / "lora", base=base)):
        assert vlm_gap(ours, right) <= LIMIT
        assert vlm_gap(ours, plain) > 100 * LIMIT       # control: the adapter is heard
    ours.save_pretrained(tmp_path / "whole")            # merged, once and for all
    assert vlm_gap(projector.VLM.from_pretrained(tmp_path / "whole"), right) <= LIMIT


@pytest.mark.parametrize("config, scale", [
    ({"use_rslora": True}, lambda m: 8 / 2), ({"lora_alpha": 3}, lambda m: 3 / 4),
    ({"alpha_pattern": {"q_proj": 1}}, lambda m: .25 if m.endswith("q_proj") else 2),
    ({"alpha_pattern": {r"layers\.0\..*q_proj": 1}},
     lambda m: .25 if "layers.0." in m and m.endswith("q_proj") else 2),
    ({"rank_pattern": {".*": 4}, "r": 64}, lambda m: 2),
    ({"rank_pattern": {"q_proj": 4, "v_proj": 4, "mlp.down_proj": 4}, "r": 9, "lora_alpha": 4},
     lambda m: 1)])
def test_the_scale_of_an_adapter(tmp_path, config, scale):
    base = write_vlm(tmp_path / "base", "llava")
    pairs = write_adapter(tmp_path / "lora", base=base, **config)
    ours = projector.VLM.from_pretrained(tmp_path / "lora")
    assert vlm_gap(ours, by_hand(base, pairs, scale)) <= 3 * LIMIT      # large weights: more sums


@pytest.mark.parametrize("config", [
    {"use_dora": True}, {"fan_in_fan_out": True}, {"peft_type": "IA3"}, {"lora_bias": True},
    {"init_lora_weights": "pissa"}, {"r": 8}, {"r": "4"}, {"lora_alpha": 0}, {"rank_pattern": 7},
    {"layer_replication": [[0, 2]]}, {"alpha_pattern": {"q_proj": -1}}, {"rank_pattern": {"(": 4}},
    {"target_parameters": ["a"]}], ids=str)
def test_adapters_of_another_kind_are_refused_by_name(tmp_path, config):
    base = write_vlm(tmp_path / "base", "llava")
    write_adapter(tmp_path / "lora", base=base)
    projector.VLM.from_pretrained(tmp_path / "lora")                    # control
    write_adapter(tmp_path / "lora", base=base, **config)
    key = next(iter(config)).replace("alpha_pattern", "lora_alpha|alpha_pattern")
    with pytest.raises(data.BadModel, match=key) as info:
        projector.VLM.from_pretrained(tmp_path / "lora")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("extra, told", [
    ({"base_model.model.language_model.model.layers.9.self_attn.q_proj.lora_A.weight":
      torch.ones(4, 32), "base_model.model.language_model.model.layers.9.self_attn.q_proj.lora_B."
      "weight": torch.ones(32, 4)}, "layers.9.self_attn.q_proj"),
    ({"base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight":
      torch.ones(4, 32)}, "up_proj has lora_A alone"),
    ({"base_model.model.language_model.model.layers.0.mlp.up_proj.lora_A.weight":
      torch.ones(4, 48), "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_B.weight":
      torch.ones(32, 4)}, "up_proj is .32, 48., the base's .48, 32."),
    ({"base_model.model.language_model.model.layers.0.mlp.up_proj.lora_magnitude_vector":
      torch.ones(4)}, "lora_magnitude_vector"),
    ({"base_model.model.language_model.model.layers.0.mlp.up_proj.bias": torch.ones(48)},
     "up_proj.bias")], ids=lambda x: x if type(x) is str else "")
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path, extra, told):
    base = write_vlm(tmp_path / "base", "llava")
    write_adapter(tmp_path / "lora", base=base)
    file = tmp_path / "lora/adapter_model.safetensors"
    table = {k: v.clone() for k, v in data.load_weights(file).items()}
    safetensors.torch.save_file(table | extra, file)
    with pytest.raises(data.BadModel, match=told):
        projector.VLM.from_pretrained(tmp_path / "lora")


def test_modules_saved_whole_and_embeddings(tmp_path):
    base = write_vlm(tmp_path / "base", "llava")
    pairs = write_adapter(tmp_path / "lora", base=base)
    file = tmp_path / "lora/adapter_model.safetensors"
    table = {k: v.clone() for k, v in data.load_weights(file).items()}
    dice = torch.Generator().manual_seed(5)
    head = torch.randn(128, 32, generator=dice) * .2
    A, B = torch.randn(4, 128, generator=dice), torch.randn(32, 4, generator=dice)
    at = "base_model.model.language_model."
    safetensors.torch.save_file(table | {
        f"{at}lm_head.modules_to_save.weight": head, f"{at}model.embed_tokens.lora_embedding_A": A,
        f"{at}model.embed_tokens.lora_embedding_B": B}, file)
    right = by_hand(base, pairs, lambda module: 2)
    with torch.no_grad():
        right.lm_head.weight.copy_(head)
        right.model.language_model.embed_tokens.weight += 2 * (B @ A).T
    assert vlm_gap(projector.VLM.from_pretrained(tmp_path / "lora"), right) <= LIMIT


def test_llavas_own_lora_folder(tmp_path):
    """config.json of the whole, the projector apart, and Vicuna as the base."""
    model = official.their_model("llava")
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**official.EYE))
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "clip")
    official.write_official(model, tmp_path / "whole", "llava", tmp_path / "clip",
                            with_tower=False)
    table = {k: v.clone() for k, v in data.load_weights(tmp_path / "whole").items()}
    base, lora = tmp_path / "vicuna", tmp_path / "lora"
    save_weights(base, {k: v for k, v in table.items() if "projector" not in k})
    write_words(base)
    pairs = write_adapter(lora, "model.", "lmsys/vicuna-7b-v1.5")
    shutil.copy(tmp_path / "whole/config.json", lora)
    rest = {f"base_model.model.{k}": v for k, v in table.items() if "projector" in k}
    torch.save(rest, lora / "non_lora_trainables.bin")
    with pytest.raises(data.BadModel, match="non_lora_trainables.bin: pickled") as info:
        projector.VLM.from_pretrained(lora, base=base)
    subprocess.run([sys.executable, "-c", re.search(r'python -c "(.*)"', str(info.value))[1]],
                   check=True)
    ours = projector.VLM.from_pretrained(lora, base=base)
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            module = model.get_submodule(name.replace("model.", "model.language_model.", 1))
            module.weight += 2 * (B @ A)
    assert vlm_gap(ours, model) <= LIMIT and ours.aspect == "pad"
    (lora / "adapter_model.safetensors").unlink()
    torch.save({}, lora / "adapter_model.bin")
    with pytest.raises(data.BadModel, match="adapter_model.bin: pickled"):
        projector.VLM.from_pretrained(lora, base=base)


def test_where_an_adapter_cannot_be_used(tmp_path):
    base = write_vlm(tmp_path / "base", "llava")
    write_adapter(tmp_path / "lora")
    with pytest.raises(UsageError, match="does not name its base.*--model-base"):
        projector.VLM.from_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="is a whole model, no LoRA adapter"):
        projector.VLM.from_pretrained(base, base=base)
    for load in (data.load_weights, clip.ViT.from_pretrained, llama.Llama.from_pretrained):
        (tmp_path / "lora/config.json").write_text("{}")
        with pytest.raises(data.BadModel, match="a LoRA adapter, no whole model"):
            load(tmp_path / "lora")


def test_generate_takes_the_base(tmp_path):
    base = write_vlm(tmp_path / "base", "llava")
    write_adapter(tmp_path / "lora")
    PHOTO.save(tmp_path / "a.png")
    said = [sys.executable, ROOT / "generate.py", tmp_path / "a.png", "Hi", "--model"]
    more = ["--max-new-tokens", "3", "--device", "cpu"]
    done = subprocess.run([*said, tmp_path / "lora", "--model-base", base, *more],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*said, base, "--model-base", base, *more], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "--model-base" in done.stderr


# ------------------------------------------------------------------------------- B16

def test_an_overflow_is_called_one(tmp_path):
    """Finite fp16 weights whose products are not: bf16 and fp32 hold them."""
    write_vlm(tmp_path, "llava")
    model = projector.VLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for block in model.llm.blocks:
            block.out.weight.mul_(30000 / block.out.weight.abs().max())
    model.to(torch.float16).save_pretrained(tmp_path)
    ids = [1, 40, data.IMAGE, 41]
    half = projector.VLM.from_pretrained(tmp_path)
    assert half.llm.embed.weight.dtype == torch.float16         # and loads: all are finite
    pixels = half.pixels(PHOTO)
    for beams in (1, 2):
        with pytest.raises(data.BadModel, match="weights are whole.*float16; take --dtype bf16"):
            list(generate.generate(half, ids, pixels, 4, num_beams=beams))
    for dtype in (torch.bfloat16, torch.float32):
        whole = projector.VLM.from_pretrained(tmp_path, dtype)
        assert len(list(generate.generate(whole, ids, pixels, 4, eos=-1))) == 4
    half.llm.norm.weight.data[0] = float("nan")                 # control: damage is called damage
    with pytest.raises(data.BadModel, match="weights are damaged"):
        list(generate.generate(half, ids, pixels, 4))


@pytest.mark.parametrize("has, kind, becomes", [
    (True, "float16", "bfloat16"), (False, "float16", "float16"), (True, "bfloat16", "bfloat16"),
    (True, "float32", "float32")])
def test_dtype_auto_on_a_gpu(tmp_path, monkeypatch, capsys, has, kind, becomes):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has)
    write_vlm(tmp_path, "llava")
    model = projector.VLM.from_pretrained(tmp_path, getattr(torch, kind))
    capsys.readouterr()
    made = cast_for_cpu(model, torch.device("cuda"))
    assert {str(p.dtype) for p in made.parameters()} == {f"torch.{becomes}"}
    assert capsys.readouterr().err.count("\n") == (kind != becomes)


def test_the_folder_of_a_run_instead_of_its_model(tmp_path):
    """The line names the model inside, or says that the run has not finished."""
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(data.BadModel, match="not finished") as info:
        data.load_weights(tmp_path)
    assert f"then give {tmp_path / 'model'}" in str(info.value)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(data.BadModel, match=f"give {tmp_path / 'model'}$"):
        data.load_weights(tmp_path)
    (tmp_path / "run.json").unlink()                    # control: no run, and no model inside
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(data.BadModel, match="no model.safetensors"):
        data.load_weights(tmp_path)
