"""qformer.py: its masks, its numbers against transformers, its losses against sums done by hand.

Each parity trap (a mistake that loads and runs) is sprung once: the same comparison, with the
mistake put in, must fail clearly."""
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

import clip
import data
import qformer
from kernels.attention import visible
from qformer import QFormer, itc, itg, itm
from tiny import LIMIT, edit, gap, loaded, same_tensors, shaken, span_errors
from formats.checkpoints import export, load_into, save_weights
from formats import names, unused
from formats.errors import exit_status
from formats.folders import init_weights
from formats.bert import BertTokenizer, SPECIAL, wordpiece_tokenizer
from qformer import Blip2Stage1
from toy import world as toy_world
from toy.texts import captions
from toy.world import make_scene
from trainer.build import drop_text_branch, init_from_bert, new_blip2_stage1

ROOT = Path(__file__).parents[1]
TEXTS = ["a red circle", "a blue square and a red star", "two green stars"]
EYE = clip.Config(32, 2, 4, 48, 1e-6, 28, 14, eva=True, has_final_block=False)
CLEAR = 1e-3                    # a sprung trap is at least this far off
Q = 5


def small(**other):
    c = dict(
        width=24, depth=3, heads=3, mlp=40, num_queries=Q, vision_width=32, vocab=60, context=40
    )
    return qformer.Config(**c | other)


def their_config(**vision):
    return transformers.Blip2Config(
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, image_size=28, patch_size=14) | vision,
        qformer_config=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
                            intermediate_size=40, vocab_size=60, max_position_embeddings=40,
                            use_qformer_text_input=True),
        text_config=dict(model_type="opt", vocab_size=20, hidden_size=16, num_hidden_layers=1,
                         ffn_dim=8, num_attention_heads=2, word_embed_proj_dim=16),
        num_query_tokens=Q, image_text_hidden_size=16)


def theirs_in(folder, seed=0):
    """A tiny BLIP-2 of transformers in a folder, with words."""
    theirs = shaken(transformers.Blip2ForImageTextRetrieval(their_config()), seed)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "LayerNorm.weight" in name:                  # which `shaken` does not know
                p.add_(1)
    theirs.save_pretrained(folder)
    BertTokenizer.build(TEXTS).save(folder)
    return theirs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs) with the same weights; look, do not touch."""
    folder = tmp_path_factory.mktemp("blip2")
    theirs = theirs_in(folder)
    return Blip2Stage1.from_pretrained(folder), theirs


def similarity(model, pixels, ids, mask):
    """Pictures (B, 3, S, S) and texts (N, T) -> (B, N) cosines, without temperature."""
    image = model.encode_image(model.ln_vision(model.encode_vision(pixels)))
    return qformer.max_query_similarity(image, model.encode_text(ids, mask))


def match_logit(model, pixels, ids, mask):
    """B pictures, each with its text -> (B, 2) logits of "no" and "yes"."""
    return model.itm_logits(model.ln_vision(model.encode_vision(pixels)), ids, mask)


def score(model, pixels, ids, mask):
    """B pictures, each with its text -> (B,): raw match logit + cosine, as published."""
    cosine = similarity(model, pixels, ids, mask).diagonal()
    return match_logit(model, pixels, ids, mask)[:, 1] + cosine


def batch(seed=1):
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (3, 7), generator=dice)
    mask = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
    return torch.randn(3, 3, 28, 28, generator=dice), ids.where(mask, 0), mask


# --------------------------------------------------------------------------------------- masks

def test_masks_are_as_the_docstring_draws_them():
    rows = [re.findall(r"(?:[#.] ){5}[#.]", line) for line in qformer.__doc__.splitlines()]
    rows = [row for row in rows if row]
    assert len(rows) == 6 and all(len(row) == 3 for row in rows)
    for i, rule in enumerate((itc, itm, itg)):
        seen = [" ".join(".#"[v] for v in row) for row in visible(rule, 6, 6, n=2).tolist()]
        assert [row[i] for row in rows] == seen
        assert seen != [" ".join(".#"[v] for v in row) for row in visible(rule, 6, 6, n=3).tolist()
                        ] or rule is itm                            # control: n matters


def test_no_mask_is_true_outside_its_span():
    for rule in (itc, itm, itg):
        assert span_errors(rule, (rule.keys, rule.queries)) == 0
    assert span_errors(itg, (itc.keys, itc.queries)) and span_errors(itc, (itm.keys, itm.queries))


# ---------------------------------------------------------------------- parity with transformers

@torch.no_grad()
def passes(model, theirs):
    """Worst differences {pass: gap}: pictures alone, words alone, both, ITC, ITM."""
    pixels, ids, mask = batch()
    features = model.ln_vision(model.encode_vision(pixels))
    sight = theirs.vision_model(pixels).last_hidden_state
    queries = theirs.query_tokens.expand(3, -1, -1)
    alone = theirs.qformer(query_embeds=queries, encoder_hidden_states=sight)
    words = theirs.qformer(query_embeds=theirs.embeddings(input_ids=ids), query_length=0,
                           attention_mask=mask.long())
    both = theirs.qformer(query_embeds=theirs.embeddings(input_ids=ids, query_embeds=queries),
                          query_length=Q, encoder_hidden_states=sight,
                          attention_mask=F.pad(mask.long(), (Q, 0), value=1))
    inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    contrast = theirs(**inputs).logits_per_image
    match = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    return {"eye": gap(features, sight),
            "pictures": gap(model.qformer(features), alone.last_hidden_state),
            "words": gap(model.qformer(None, ids, itc, mask), words.last_hidden_state),
            "both": gap(model.qformer(features, ids, itm, mask), both.last_hidden_state),
            "itc": gap(similarity(model, pixels, ids, mask), contrast),
            "itm": gap(match_logit(model, pixels, ids, mask), match),
            "score": gap(score(model, pixels, ids, mask), contrast.diagonal() + match[:, 1])}


def test_a_retriever_of_transformers_in_ours(pair):
    assert max(passes(*pair).values()) <= LIMIT


def test_from_transformers_and_back(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    theirs = loaded(transformers.Blip2ForImageTextRetrieval, tmp_path)
    assert same_tensors(theirs, pair[1]) and max(passes(pair[0], theirs).values()) <= LIMIT
    again = Blip2Stage1.from_pretrained(tmp_path)
    assert same_tensors(again, pair[0])                     # head and temperature too
    weights = data.load_weights(tmp_path / "pretraining.safetensors")
    assert set(weights) == {"temp", *(f"Qformer.cls.predictions.{x}" for x in (
        "bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight",
        "transform.LayerNorm.bias"))}
    picture = toy_world.draw(make_scene(1), 90).crop((0, 0, 90, 60))
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)(
        picture, return_tensors="pt").pixel_values
    ours = data.preprocess(picture, 28, "squash")
    assert torch.equal(pixels, ours)


# trap: (which pass notices, what to do to a fresh model of ours). Numbers are section 10's.
def positions_behind_the_queries(model, monkeypatch):
    weight = model.qformer.position.weight
    weight.copy_(weight.roll(-Q, 0))


def no_norm_over_the_queries(model, monkeypatch):
    norm = model.qformer.norm
    model.qformer.norm.forward = lambda x: torch.cat(
        (x[:, :Q], clip.layer_norm(x[:, Q:], norm.weight, norm.bias, norm.eps)), 1)


def cross_in_every_block(model, monkeypatch):
    model.qformer.blocks[1].cross = model.qformer.blocks[0].cross


def words_cross_too(model, monkeypatch):
    def forward(self, x, n, features, allow, attention_mask, past_kv):
        x, kv = self.attention(x, x, allow, n, attention_mask, past_kv)
        x = self.cross(x, features)[0] if n and self.cross is not None else x
        return torch.cat((self.mlp(x[:, :n]), self.text_mlp(x[:, n:])), 1), kv
    monkeypatch.setattr(qformer.Block, "forward", forward)


def one_mlp_for_all(model, monkeypatch):
    for block in model.qformer.blocks:
        block.text_mlp = block.mlp


def padding_is_seen(model, monkeypatch):
    attend = qformer.attention
    monkeypatch.setattr(
        qformer,
        "attention",
        lambda q, k, v, allow, n, start, attention_mask: attend(q, k, v, allow, n, start, None),
    )


def words_see_words_before_them(model, monkeypatch):
    monkeypatch.setattr(qformer, "itm", itg)


def tanh_gelu(model, monkeypatch):
    monkeypatch.setattr(qformer, "gelu", lambda x: F.gelu(x, approximate="tanh"))


def mean_of_queries(model, monkeypatch):
    monkeypatch.setattr(qformer, "max_query_similarity",
                        lambda i, t: torch.einsum("bqe,ne->bqn", i, t).mean(1))


def mean_of_probabilities(model, monkeypatch):
    def itm_logits(self, features, ids, mask):
        x = self.qformer(features, ids, itm, mask)
        return self.itm_head(x[:, :Q]).softmax(-1).mean(1).log()
    monkeypatch.setattr(Blip2Stage1, "itm_logits", itm_logits)


def eps_of_lavis(model, monkeypatch):
    model.ln_vision.eps = 1e-2          # 1e-5 for 1e-6 is the same mistake, too small to be seen


@pytest.mark.parametrize("trap, notices", [
    (positions_behind_the_queries, "words both itc itm"),                               # 1
    (no_norm_over_the_queries, "pictures both itc itm"),                                # 1
    (cross_in_every_block, "pictures both itc itm"), (words_cross_too, "both itm"),     # 2
    (eps_of_lavis, "eye"), (mean_of_queries, "itc"),                                    # 4, 5
    (mean_of_probabilities, "itm"), (words_see_words_before_them, "itm"),               # 6
    (one_mlp_for_all, "words both"), (padding_is_seen, "words both itm"), (tanh_gelu, "words")])
def test_a_trap_that_is_sprung_is_seen(pair, tmp_path, monkeypatch, trap, notices):
    pair[0].save_pretrained(tmp_path)
    model = Blip2Stage1.from_pretrained(tmp_path)
    with torch.no_grad():
        trap(model, monkeypatch)
    found = passes(model, pair[1])
    least = CLEAR / 100 if trap is tanh_gelu else CLEAR
    print(trap.__name__, {k: f"{v:.1e}" for k, v in found.items()})
    assert all(found[name] > least for name in notices.split()), found
    if trap is not eps_of_lavis:
        assert found["eye"] <= LIMIT


def test_cross_attention_looks_at_features_of_the_eyes_width(pair):
    blocks = pair[0].qformer.blocks
    assert [b.cross is not None for b in blocks] == [True, False, True]
    assert blocks[0].cross.kv.weight.shape == (2 * 24, 32)
    assert blocks[0].attention.kv.weight.shape == (2 * 24, 24)


def test_the_queries_do_not_see_words_under_itc_and_itg(pair):
    q, (_, ids, mask) = pair[0].qformer, batch()
    features = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone, words = q(features), q(None, ids, itc, mask)
        assert gap(q(features, ids, itc, mask)[:, :Q], alone) <= LIMIT
        assert gap(q(features, ids, itc, mask)[:, Q:], words) <= LIMIT
        assert gap(q(features, ids, itg, mask)[:, :Q], alone) <= LIMIT
        assert gap(q(features, ids, itm, mask)[:, :Q], alone) > CLEAR
        assert gap(q(features, ids, itg, mask)[:, Q:], words) > CLEAR


@torch.no_grad()
def test_captions_by_one_mask_and_by_kept_queries_are_the_same(pair):
    """Trap 7: under itg the queries' keys and values may be made once and kept."""
    q, (_, ids, mask) = pair[0].qformer, batch()
    features = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    store = []
    q(features, allow=itc, store=store)
    assert [k.shape for k, _ in store] == [(3, Q, 3, 8)] * 3
    joint = q(features, ids, itg, mask)[:, Q:]
    assert gap(q(None, ids, itg, mask, past_key_values=store), joint) <= LIMIT
    assert gap(q(None, ids, itg, mask), joint) > CLEAR                              # no queries
    assert gap(q(None, ids, itm, mask, past_key_values=store), joint) > CLEAR  # not causal
    wrong = [store[0], *[(k.flip(0), v.flip(0)) for k, v in store[1:]]]
    assert gap(q(None, ids, itg, mask, past_key_values=wrong), joint) > CLEAR  # not its own
    for bad in (dict(features=None), dict(features=features, ids=ids, past_key_values=store),
                dict(features=None, ids=torch.ones(1, 41, dtype=torch.long))):
        with pytest.raises(ValueError, match="QFormer"):
            q(**bad)


def instruct_in(folder):
    theirs = shaken(transformers.InstructBlipForConditionalGeneration(
        transformers.InstructBlipConfig(
            vision_config=their_config().vision_config.to_dict() | {
                "model_type": "instructblip_vision_model"},
            qformer_config=their_config().qformer_config.to_dict() | {
                "model_type": "instructblip_qformer"},
            text_config=dict(model_type="llama", vocab_size=20, hidden_size=16, head_dim=8,
                             num_hidden_layers=1, intermediate_size=8, num_attention_heads=2,
                             num_key_value_heads=2), num_query_tokens=Q)))
    theirs.save_pretrained(folder)
    return theirs


@torch.no_grad()
def test_the_qformer_of_an_instructblip(tmp_path):
    """Trap 8: the same norm under another name."""
    theirs, (_, ids, mask) = instruct_in(tmp_path), batch()
    edit(tmp_path, "qformer_config", use_qformer_text_input=True)
    ours = QFormer.from_pretrained(tmp_path)
    features = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    told = theirs.qformer(
        input_ids=ids, query_embeds=theirs.query_tokens.expand(3, -1, -1),
        attention_mask=F.pad(mask.long(), (Q, 0), value=1),
        encoder_hidden_states=features).last_hidden_state
    assert gap(ours(features, ids, itm, mask), told) <= LIMIT
    assert gap(ours(features, ids, itg, mask), told) > CLEAR
    assert names.qformer(data.load_weights(tmp_path)) is names.QFORMER_INSTRUCT
    sprung = QFormer(ours.config)
    with pytest.raises(data.BadModel, match="embeddings.word_embeddings.weight is missing"):
        load_into(sprung, names.QFORMER, data.load_weights(tmp_path), unused.QFORMER)
    # control of the control, and what saving hands back
    load_into(sprung, names.QFORMER_INSTRUCT, data.load_weights(tmp_path), unused.QFORMER)
    table = export(sprung, names.QFORMER_INSTRUCT)
    assert all(torch.equal(v, table[k]) for k, v in theirs.state_dict().items() if k in table)
    assert len(table) == sum(k.startswith(("qformer.", "query")) for k in theirs.state_dict())


@torch.no_grad()
def test_the_qformer_of_a_second_stage_has_no_words(pair, tmp_path):
    config = their_config()
    config.qformer_config.use_qformer_text_input = False
    theirs = shaken(transformers.Blip2ForConditionalGeneration(config), 3)
    theirs.save_pretrained(tmp_path)
    ours = QFormer.from_pretrained(tmp_path)
    features = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    told = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1),
                          encoder_hidden_states=features).last_hidden_state
    assert ours.config.vocab == 0 and gap(ours(features), told) <= LIMIT
    with pytest.raises(ValueError, match="room for 0"):
        ours(features, torch.ones(3, 2, dtype=torch.long))
    # out of a first stage, loaded without words or rid of them
    pair[0].save_pretrained(tmp_path / "first")
    bare = QFormer.from_pretrained(tmp_path / "first", text=False)
    whole = QFormer.from_pretrained(tmp_path / "first")
    want = whole(features)
    assert torch.equal(bare(features), want) and torch.equal(
        drop_text_branch(whole)(features), want
    )
    assert same_tensors(bare, whole) and bare.config == whole.config and bare.config.vocab == 0


# ---------------------------------------------------------------------------------- LAVIS names

LAVIS = [(re.compile(old), new) for old, new in (
    (r"^vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
    (r"^vision_model\.post_layernorm", "ln_vision"),
    (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
    (r"layer_norm(?=[12]\.)", "norm"), (r"self_attn\.projection", "attn.proj"),
    (r"self_attn\.qkv\.weight", "attn.qkv.weight"),
    (r"^embeddings\.", "Qformer.bert.embeddings."),
    (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
    (r"^qformer\.", "Qformer.bert."), (r"(?<=attention)\.attention\.", ".self."),
    (r"^vision_projection", "vision_proj"), (r"^text_projection", "text_proj"))]


def lavis_in(folder, theirs, eye=True):
    """The same weights as LAVIS would have named them, and what only LAVIS has."""
    table, dice = {}, torch.Generator().manual_seed(7)
    for name, tensor in theirs.state_dict().items():
        for old, new in LAVIS:
            name = old.sub(new, name)
        if name.endswith("qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert not k.any()
            at = name.replace("self_attn.qkv.bias", "attn.")
            table |= {at + "q_bias": q.clone(), at + "v_bias": v.clone()}
        else:
            table[name] = tensor
    at, word = "Qformer.cls.predictions.", table["Qformer.bert.embeddings.word_embeddings.weight"]
    made = {"transform.dense.weight": (24, 24), "transform.dense.bias": (24,), "bias": (60,),
            "transform.LayerNorm.weight": (24,), "transform.LayerNorm.bias": (24,)}
    table |= {at + k: torch.randn(shape, generator=dice) for k, shape in made.items()}
    table |= {"temp": torch.tensor(.05), at + "decoder.weight": word.clone(),
              at + "decoder.bias": table[at + "bias"].clone(),
              "Qformer.bert.embeddings.position_ids": torch.arange(40)[None]}
    save_weights(folder, {k: v for k, v in table.items()
                               if eye or not k.startswith("visual_encoder.")})
    return table


def test_lavis_names(tmp_path):
    theirs = theirs_in(tmp_path / "hf", 4)
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0             # trap 3: k has no bias
    theirs.save_pretrained(tmp_path / "hf")
    hf = Blip2Stage1.from_pretrained(tmp_path / "hf")
    for eye in (True, False):
        table = lavis_in(tmp_path / "hf", theirs, eye)
        if not eye:
            with pytest.raises(data.BadModel, match="frozen vision tower"):
                Blip2Stage1.from_pretrained(tmp_path / "hf")
            hf.save_pretrained(tmp_path / "eye")
        ours = Blip2Stage1.from_pretrained(
            tmp_path / "hf", vision=None if eye else tmp_path / "eye"
        )
        assert ours.ln_vision.eps == 1e-5 and hf.ln_vision.eps == 1e-6              # trap 4
        theirs.vision_model.post_layernorm.eps = 1e-5
        assert max(passes(ours, theirs).values()) <= LIMIT
        assert torch.equal(ours.temp, table["temp"])
        assert torch.equal(ours.lm_head.dense.weight,
                           table["Qformer.cls.predictions.transform.dense.weight"])
        ours.save_pretrained(tmp_path / "again")
        again = Blip2Stage1.from_pretrained(tmp_path / "again")
        assert again.ln_vision.eps == 1e-5 and same_tensors(again, ours)
    table["Qformer.bert.extra"] = torch.ones(1)
    save_weights(tmp_path / "hf", table)
    with pytest.raises(data.BadModel, match="Qformer.bert.extra"):
        Blip2Stage1.from_pretrained(tmp_path / "hf")


# --------------------------------------------------------------------------------------- losses

# three pairs, two queries, two dimensions: unit vectors whose products are easy
IMAGE = torch.tensor([[[1., 0], [0, 1]], [[0, 1.], [.6, .8]], [[-1., 0], [0, -1]]])
TEXT = torch.tensor([[1., 0], [0, 1], [.6, .8]])
COSINE = torch.tensor([[1., 1, .8],             # max of 1 and 0, of 0 and 1, of .6 and .8
                       [.6, 1, 1],              # max of 0 and .6, of 1 and .8, of .8 and .36+.64
                       [0, 0, -.6]])            # max of -1 and 0, of 0 and -1, of -.6 and -.8
OWN = torch.eye(3, dtype=torch.bool)


def by_hand(logits, target):
    return sum(-t * (x - math.log(sum(map(math.exp, logits)))) for x, t in zip(logits, target))


def test_itc_by_hand():
    temp = torch.tensor(.5)
    both = qformer.similarities(IMAGE, TEXT, IMAGE, TEXT, temp)
    assert torch.allclose(both[0], COSINE / .5) and torch.allclose(both[1], COSINE.T / .5)
    # label smoothing .1 of three: 14/15 for the right one, 1/30 for each of the others
    hit, miss = 14 / 15, 1 / 30
    to_text = (by_hand([2, 2, 1.6], [hit, miss, miss]) + by_hand([1.2, 2, 2], [miss, hit, miss])
               + by_hand([0, 0, -1.2], [miss, miss, hit])) / 3
    to_image = (by_hand([2, 1.2, 0], [hit, miss, miss]) + by_hand([2, 2, 0], [miss, hit, miss])
                + by_hand([1.6, 2, -1.2], [miss, miss, hit])) / 3
    want = (to_text + to_image) / 2
    assert math.isclose(float(qformer.itc_loss(*both, OWN)), want, rel_tol=1e-6)
    torch_says = sum(F.cross_entropy(x, torch.arange(3), label_smoothing=.1) for x in both) / 2
    assert math.isclose(float(torch_says), want, rel_tol=1e-6)
    # what would be wrong: no smoothing, the mean over queries, a temperature that multiplies
    assert abs(float(qformer.itc_loss(*both, OWN, smoothing=0.)) - want) > .01
    mean = torch.einsum("bqe,ne->bqn", IMAGE, TEXT).mean(1) / temp
    assert abs(float(qformer.itc_loss(mean, mean.T, OWN)) - want) > .01
    assert abs(float(qformer.itc_loss(both[0] / 4, both[1] / 4, OWN)) - want) > .01
    # the first two texts are the same: their pictures share the target
    twins = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    half = .45 + 1 / 30
    shared = sum(by_hand(x, t) for x, t in zip((*both[0].tolist(), *both[1].tolist()), 2 * (
        [half, half, miss], [half, half, miss], [miss, miss, hit]))) / 6
    assert math.isclose(float(qformer.itc_loss(*both, twins)), shared, rel_tol=1e-6)


def test_the_temperature_divides_and_is_not_clamped():
    for value in (1e-4, -.5, 20.):
        temp = torch.tensor(value, requires_grad=True)
        to_text, _ = qformer.similarities(IMAGE, TEXT, IMAGE, TEXT, temp)
        # trap 5: with a negative one, the best query must have been taken before
        assert torch.allclose(to_text, COSINE / value)
        to_text.sum().backward()
        assert math.isclose(float(temp.grad), -float(COSINE.sum()) / value ** 2, rel_tol=1e-4)
    after = (torch.einsum("bqe,ne->bqn", IMAGE, TEXT) / -.5).amax(1)
    assert not torch.allclose(after, COSINE / -.5)                                  # control


def test_gathered_features_carry_no_gradient():
    """Pictures learn from picture-to-text alone, texts from text-to-picture alone (section 3)."""
    image, text = IMAGE.clone().requires_grad_(), TEXT.clone().requires_grad_()
    temp = torch.tensor(.5)

    def gradients(loss, *leaves):
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    both = qformer.similarities(
        image, text, qformer.all_gather(image), qformer.all_gather(text), temp
    )
    assert [g is None for g in gradients(F.cross_entropy(both[0], OWN.float()), image, text)
            ] == [False, True]
    both = qformer.similarities(
        image, text, qformer.all_gather(image), qformer.all_gather(text), temp
    )
    assert [g is None for g in gradients(F.cross_entropy(both[1], OWN.float()), image, text)
            ] == [True, False]
    leaky = qformer.similarities(image, text, image, text, temp)                    # trap 5, sprung
    assert None not in gradients(F.cross_entropy(leaky[0], OWN.float()), image, text)


def test_hard_negatives_by_hand():
    to_text = torch.tensor([[9., 1, 1], [0, 9, 1], [2, 2, 9]])
    to_image = torch.tensor([[9., 0, 0], [3, 9, -50], [0, 0, 9]])
    u = torch.rand(3, 2, generator=torch.Generator().manual_seed(5)).tolist()
    want = []
    for side, rows in enumerate((to_image, to_text)):
        columns = []
        for i, row in enumerate(rows.tolist()):
            weights = [math.exp(x) * (j != i) for j, x in enumerate(row)]
            at, mass = u[i][side] * sum(weights), 0
            for j, weight in enumerate(weights):
                mass += weight
                if at < mass:
                    columns.append(j)
                    break
        want.append(columns)
    assert qformer.hard_negatives(to_text, to_image, OWN, seed=5).tolist() == want
    # the rows of a later rank, and the same draw whatever was drawn before
    torch.manual_seed(99)
    later = qformer.hard_negatives(to_text[1:], to_image[1:], OWN[1:], seed=5, first=1)
    assert later.tolist() == [row[1:] for row in want]
    drawn = torch.stack([qformer.hard_negatives(to_text, to_image, OWN, s) for s in range(400)])
    assert not (drawn == torch.arange(3)).any()                     # never the right one
    assert (drawn[:, 0, 1] == 0).all()                              # e^-50 against e^3
    share = float((drawn[:, 1, 1] == 2).float().mean())             # e against 1: .731
    assert abs(share - 1 / (1 + math.exp(-1))) < .07
    # no text but its own is wrong for the first; everything is right for the second
    same = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    assert qformer.hard_negatives(to_text, to_image, same).tolist() == [[2, -1, 0]] * 2


def test_itm_by_hand():
    logits = torch.tensor([[0., 5], [0, 2], [1, 0],         # mine with mine: yes
                           [0., 0], [2, 0], [0, 1],         # my text, a wrong picture: no
                           [1., 1], [0, 3], [0, 0]])        # a wrong text, my picture: no
    log = lambda no, yes, right: math.log(math.exp(no) + math.exp(yes)) - (yes if right else no)
    rows = [log(*row, i < 3) for i, row in enumerate(logits.tolist())]
    drawn = torch.tensor([[1, 2, 0], [2, 0, 1]])
    assert math.isclose(float(qformer.itm_loss(logits, drawn)), sum(rows) / 9, rel_tol=1e-6)
    # trap 6, sprung: no and yes exchanged, or the rows of the right pairs last
    assert abs(float(qformer.itm_loss(logits.flip(1), drawn)) - sum(rows) / 9) > .01
    assert abs(float(qformer.itm_loss(logits.roll(3, 0), drawn)) - sum(rows) / 9) > .01
    # the second has no wrong picture and the third no wrong text: left out of the mean
    few = torch.tensor([[1, -1, 0], [2, 0, -1]])
    assert math.isclose(float(qformer.itm_loss(logits, few)),
                        (sum(rows) - rows[4] - rows[8]) / 7, rel_tol=1e-6)


def test_itg_by_hand():
    """[DEC] a b [SEP] and [DEC] a [SEP] pad: three and two words are learned."""
    weight, bias = torch.tensor([[1., 0], [0, 1], [1, 1], [0, 0]]), torch.tensor([0., .5, 0, -1])
    x = torch.tensor([[[1., 0], [0, 1], [1, 1], [9, 9]], [[0, 2.], [1, 0], [9, 9], [9, 9]],
                      [[0., 0], [9, 9], [9, 9], [9, 9]]])
    ids = torch.tensor([[3, 0, 1, 2], [3, 1, 2, 0], [3, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    row = lambda a, b, right: by_hand([a, b + .5, a + b, -1],
                                      [.9 * (i == right) + .025 for i in range(4)])
    rows = [row(1, 0, 0), row(0, 1, 1), row(1, 1, 2), row(0, 2, 1), row(1, 0, 2), row(0, 0, 2)]
    got = float(qformer.itg_loss(x, weight, bias, ids, mask))
    assert math.isclose(got, sum(rows) / 6, rel_tol=1e-6)
    # what would be wrong: no bias, no smoothing, padding learned, labels not shifted
    for wrong in (dict(bias=torch.zeros(4)), dict(smoothing=0.), dict(mask=torch.ones_like(mask)),
                  dict(ids=ids.roll(1, 1))):
        given = dict(x=x, weight=weight, bias=bias, ids=ids, mask=mask) | wrong
        assert abs(float(qformer.itg_loss(**given)) - got) > .01


def fresh(**other):
    """A small Retriever at random, and three pairs for it. No folder, no picture files."""
    words = BertTokenizer.build(TEXTS)
    model = Blip2Stage1(EYE, small(vocab=len(words), **other), 16)
    model.tokenizer = words.check_fits(len(words))
    shaken(model, 13)
    with torch.no_grad():
        model.temp.fill_(.3)
    ids, mask = words.encode(TEXTS)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return model, pixels, ids, mask


def test_the_three_losses_of_a_batch(monkeypatch):
    """The pieces in the order of section 3, put together once more by hand."""
    model, pixels, ids, mask = fresh()
    shown = []
    monkeypatch.setattr(
        Blip2Stage1,
        "itm_logits",
        lambda self, f, i, m, real=Blip2Stage1.itm_logits: (
            shown.append((f, i, m)),
            real(self, f, i, m),
        )[1],
    )
    made = model.losses(pixels, ids, mask, seed=4)
    features = model.ln_vision(model.vision(pixels))
    cosine = similarity(model, pixels, ids, mask)
    both = cosine / model.temp, cosine.T / model.temp
    assert torch.allclose(made["itc"], qformer.itc_loss(*both, OWN))
    drawn = qformer.hard_negatives(*both, OWN, 4)
    (seen, asked, kept), = shown
    # trap 6: texts mine, mine, wrong; pictures mine, wrong, mine
    assert torch.allclose(seen, torch.cat((features, features[drawn[0]], features)), atol=1e-6)
    assert torch.equal(asked, torch.cat((ids, ids, ids[drawn[1]])))
    assert torch.equal(kept, torch.cat((mask, mask, mask[drawn[1]])))
    logits = torch.cat([match_logit(model, pixels[p], ids[t], mask[t]) for p, t in (
        (slice(None), slice(None)), (drawn[0], slice(None)), (slice(None), drawn[1]))])
    labels = torch.tensor([1] * 3 + [0] * 6)
    assert torch.allclose(made["itm"], F.cross_entropy(logits, labels))
    # trap 7: [DEC] in the place of [CLS], one joint pass under itg
    begun = torch.cat((torch.full((3, 1), model.tokenizer.dec), ids[:, 1:]), 1)

    def caption_loss(first):
        x = model.lm_head(model.qformer(features, first, itg, mask)[:, Q:])
        scores = x @ model.qformer.token.weight.T + model.lm_head.bias
        labels = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=.1)
    assert torch.allclose(made["itg"], caption_loss(begun))
    assert not torch.allclose(made["itg"], caption_loss(ids), atol=1e-3)            # [CLS]: wrong
    # each loss alone is the same number
    for name in made:
        alone = model.losses(pixels, ids, mask, seed=4, only=(name,))
        assert list(alone) == [name] and torch.equal(alone[name], made[name])
    with pytest.raises(ValueError, match="none of itc"):
        model.losses(pixels, ids, mask, only=("itc", "mlm"))


def test_a_step_is_a_function_of_its_inputs():
    model, pixels, ids, mask = fresh()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = model.losses(pixels, ids, mask, seed=0)
    assert torch.equal(torch.get_rng_state(), before)               # nobody's dice were thrown
    torch.manual_seed(2)
    two = model.train().losses(pixels, ids, mask, seed=0)
    assert all(torch.equal(one[k], two[k]) for k in one)
    others = {float(model.losses(pixels, ids, mask, seed=s, only=("itm",))["itm"].detach())
              for s in range(8)}
    assert len(others) > 1                                          # control: the seed counts


def test_gradients_flow_where_they_should(monkeypatch):
    model, pixels, ids, mask = fresh()
    sum(model.losses(pixels, ids, mask).values()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("vision."), name
    reached = {}
    for name in ("itc", "itm", "itg"):
        model.zero_grad()
        model.losses(pixels, ids, mask, only=(name,))[name].backward()
        reached[name] = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
        # queries and the norm behind the eye learn from all three, captions through kept k and v
        assert model.qformer.query_tokens.grad.abs().sum() > 0 < model.ln_vision.weight.grad.norm()
    assert reached == {"itc": {"ln_vision", "qformer", "vision_proj", "text_proj", "temp"},
                       "itm": {"ln_vision", "qformer", "itm_head"},
                       "itg": {"ln_vision", "qformer", "lm_head"}}
    model.zero_grad()
    asked = QFormer.forward
    monkeypatch.setattr(QFormer, "forward", lambda self, *a, past_key_values=None, **k: asked(
        self, *a, past_key_values=past_key_values and [
            (x.detach(), y.detach()) for x, y in past_key_values], **k))
    model.losses(pixels, ids, mask, only=("itg",))["itg"].backward()
    assert model.qformer.query_tokens.grad is None                                  # control


def test_the_negatives_teach_the_norm_behind_the_eye(monkeypatch):
    """LAVIS gathers pictures with gradient; here their norm runs again. The same gradient."""
    model, pixels, ids, mask = fresh()
    loss = model.losses(pixels, ids, mask, only=("itm",))["itm"]
    got, = torch.autograd.grad(loss, [model.ln_vision.weight])
    cosine = similarity(model, pixels, ids, mask) / model.temp
    drawn = qformer.hard_negatives(cosine, cosine.T, OWN, 0)

    def whole(detached):
        f = model.ln_vision(model.vision(pixels))
        wrong = f[drawn[0]].detach() if detached else f[drawn[0]]
        logits = model.itm_logits(torch.cat((f, wrong, f)), torch.cat((ids, ids, ids[drawn[1]])),
                               torch.cat((mask, mask, mask[drawn[1]])))
        loss = qformer.itm_loss(logits, drawn)
        return torch.autograd.grad(loss, [model.ln_vision.weight])[0]
    assert gap(got, whole(False)) <= LIMIT and gap(got, whole(True)) > CLEAR


# ------------------------------------------------------------------------------------ two ranks

def two_ranks(out):
    """What torchrun starts, twice: four pairs, two a rank, their texts of unlike length."""
    model, pixels, texts = four()
    dist = torch.distributed
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    ids, mask = model.tokenizer.encode(texts[mine])
    made = model.losses(pixels[mine], ids, mask, seed=6, only=("itc", "itm"))
    own = pixels[mine, 0, 0, 0].clone().requires_grad_()
    everyone = qformer.all_gather(own)
    sum(made.values()).backward()
    grads = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    for g in grads.values():
        dist.all_reduce(g)                          # the mean over ranks, as DDP takes it
    torch.save({"losses": {k: float(v) for k, v in made.items()}, "grads": grads,
                "shape": tuple(ids.shape), "all": everyone, "learns": everyone.requires_grad},
               f"{out}/{rank}.pt")
    # all words alike, on every rank: refused on every rank
    same, kept = model.tokenizer.encode(["a red circle"] * 2)
    try:
        model.losses(pixels[mine], same, kept)
    except data.BadData as error:
        Path(f"{out}/{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def four():
    model, *_ = fresh()
    dice = torch.Generator().manual_seed(8)
    return model, torch.randn(4, 3, 28, 28, generator=dice), [
        "a red circle", "red stars", "two green stars and a blue circle", "a blue square"]


def test_two_ranks_are_one_process_with_all_pairs(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         __file__, str(tmp_path)], capture_output=True, text=True, timeout=300, env=env)
    assert told.returncode == 0, told.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    assert ranks[0]["shape"] != ranks[1]["shape"]
    model, pixels, texts = four()
    ids, mask = model.tokenizer.encode(texts)
    made = model.losses(pixels, ids, mask, seed=6, only=("itc", "itm"))
    sum(made.values()).backward()
    for name, value in ((k, v.item()) for k, v in made.items()):
        mean = sum(r["losses"][name] for r in ranks) / 2
        assert math.isclose(mean, value, rel_tol=1e-5)
        assert abs(ranks[0]["losses"][name] - value) > 1e-3      # control: each has its own
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == ranks[0]["grads"].keys()
    for name, g in grads.items():
        assert float((ranks[0]["grads"][name] - g).abs().max()) <= 1e-5 * max(
            1e-2, float(g.abs().max())), name
    for r in ranks:
        assert torch.equal(r["all"], pixels[:, 0, 0, 0]) and not r["learns"]
    assert all("no negatives" in (tmp_path / f"{r}.txt").read_text() for r in (0, 1))
    # control: two processes that do not gather find other losses
    apart = [model.losses(pixels[s], ids[s], mask[s], seed=6, only=("itc",))["itc"].item()
             for s in (slice(2), slice(2, 4))]
    assert abs(sum(apart) / 2 - made["itc"].item()) > 1e-2


# ------------------------------------------------------------------------------------ beginning

def test_a_new_one_begins_as_published(tmp_path):
    words = BertTokenizer.build(TEXTS)
    clip.CLIP(clip.Config(32, 3, 4, 48, 1e-5, 28, 14), clip.Config(24, 1, 3, 40, vocab=50,
                                                                  context=16, eos_id=49), 20
              ).save_pretrained(tmp_path / "clip")
    c = small(width=768, heads=12, vocab=len(words))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = new_blip2_stage1(tmp_path / "clip", words, c)
    assert torch.equal(before, torch.get_rng_state())               # nobody's dice were thrown
    std = {n: float(p.detach().std()) for n, p in model.named_parameters()
           if p.dim() > 1 and not n.startswith("vision.") and p.numel() > 10000}
    assert len(std) > 20 and all(abs(s - .02) < .001 for s in std.values()), std
    assert model.temp.item() == pytest.approx(.07) and not any(
        p.requires_grad for p in model.vision.parameters())
    for block in model.qformer.blocks:
        assert same_tensors(block.mlp, block.text_mlp)
        assert not torch.equal(block.attention.q.weight, model.qformer.blocks[0].mlp.up.weight[:768]
                               ) and block.attention.norm.weight.eq(1).all()
        assert block.attention.q.bias.eq(0).all()
    assert model.lm_head.bias.eq(0).all() and model.vision.config.depth == 2           # docked
    twin = new_blip2_stage1(tmp_path / "clip", words, c)
    assert same_tensors(twin, model)
    assert not same_tensors(new_blip2_stage1(tmp_path / "clip", words, c, seed=1), model)
    # a CLIP as the eye comes back as it was
    model.save_pretrained(tmp_path / "made")
    again = Blip2Stage1.from_pretrained(tmp_path / "made")
    pixels, (ids, mask) = batch()[0], words.encode(TEXTS)
    with torch.no_grad():
        assert same_tensors(again, model) and torch.equal(
            score(again, pixels, ids, mask), score(model, pixels, ids, mask))
    with pytest.raises(data.BadModel, match="one width"):
        new_blip2_stage1(tmp_path / "clip", words, small(vision_width=40, vocab=len(words)))
    with pytest.raises(data.BadModel, match="rows"):
        new_blip2_stage1(tmp_path / "clip", words, small(vocab=len(words) - 1))


@pytest.mark.parametrize("old", [False, True])
def test_a_new_one_begins_as_bert(tmp_path, old):
    """Without sentence types, a BERT is the words' side of a Q-Former: the same numbers."""
    bert = shaken(transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=59, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=40)))
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()
    bert.save_pretrained(tmp_path)
    if old:                                         # bert-base-uncased's own spelling
        save_weights(tmp_path, {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias",
                                                                     "LayerNorm.beta"): v
            for k, v in bert.state_dict().items()})
    _, _, ids, mask = fresh()
    model = Blip2Stage1(EYE, small(), 16)
    init_weights(model, 24)
    dec = model.qformer.token.weight[59].clone()
    init_from_bert(model, tmp_path)
    with torch.no_grad():
        told = bert.bert(ids, attention_mask=mask.long())
        said = model.qformer(None, ids, itc, mask)
        assert gap(said, told.last_hidden_state) <= LIMIT
        words = F.linear(
            model.lm_head(said), model.qformer.token.weight[:59], model.lm_head.bias[:59]
        )
        assert gap(words, bert(ids, attention_mask=mask.long()).prediction_logits) <= LIMIT
        assert torch.equal(model.qformer.token.weight[59], dec)                      # [DEC] is new
    table = dict(data.load_weights(tmp_path)) | {"bert.extra": torch.ones(1)}
    save_weights(tmp_path, table)
    with pytest.raises(data.BadModel, match="bert.extra"):
        init_from_bert(model, tmp_path)


# ---------------------------------------------------------------------------------------- words

BERT = [*SPECIAL, "a", "red", "circle", "##s", "left", "of", "cafe", ",", "[", "]", "sep"]


def test_words_of_a_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(BERT) + "\n")
    words = BertTokenizer(tmp_path)
    assert (words.pad, words.cls, words.sep, words.dec, len(words)) == (0, 2, 3, 16, 17)
    ids, mask = words.encode(["A red Circles, café", "left"])
    assert ids.tolist() == [[2, 5, 6, 7, 8, 12, 11, 3], [2, 9, 3, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 8, [True] * 3 + [False] * 5]
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    assert theirs(["A red Circles, café", "left"], padding=True)["input_ids"] == ids.tolist()
    # a caption cannot give commands
    assert words.encode("a [SEP] left")[0].tolist() == [[2, 5, 13, 15, 14, 9, 3]]
    assert words.encode("purple")[0].tolist() == [[2, 1, 3]]
    # truncation keeps the [SEP]; InstructBLIP keeps the end of an instruction
    long = "red " * 2499 + "left"
    assert len(long) == 10_000
    ids, mask = words.encode(long)
    assert ids.tolist() == [[2, *[6] * 30, 3]] and bool(mask.all())
    assert words.encode(long, 35)[0].shape == (1, 35)
    assert words.encode(long, 5, left=True)[0].tolist() == [[2, 6, 6, 9, 3]]
    words.save(tmp_path / "saved")
    again = BertTokenizer(tmp_path / "saved")
    assert again.dec == 16 and len(again) == 17                     # not a second time
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("a red circle").input_ids == again.encode("a red circle")[0][0].tolist()
    assert theirs.bos_token_id == 16 and theirs.decode([5, 6, 7, 8]) == "a red circles"
    # the hub's files may know <image> as well, before or behind [DEC]: no caption can say it
    for i, (more, dec) in enumerate(((["[DEC]", "<image>"], 16), (["<image>"], 16))):
        lib = wordpiece_tokenizer(BERT)
        lib.add_special_tokens(more)
        (tmp_path / str(i)).mkdir()
        lib.save(str(tmp_path / str(i) / "tokenizer.json"))
        hub = BertTokenizer(tmp_path / str(i))
        assert (hub.dec, len(hub)) == (dec, 17)
        assert int(hub.encode("a <image> circle")[0].max()) < 16
    (tmp_path / "vocab.txt").write_text("\n".join(BERT[1:]))
    with pytest.raises(data.BadModel, match="missing"):
        BertTokenizer(tmp_path)


def test_words_made_on_the_spot(tmp_path):
    texts = [t for i in range(50) for t in captions(make_scene(i))]
    words = BertTokenizer.build(texts)
    vocabulary = words.lib.get_vocab()
    assert [vocabulary[t] for t in (*SPECIAL, "[DEC]")] == [0, 1, 2, 3, 4, len(words) - 1]
    ids, _ = words.encode(texts, 64)
    assert not (ids == vocabulary["[UNK]"]).any() and len(words) < 200
    assert [words.decode(row) for row in ids] == [t.lower() for t in texts]
    assert BertTokenizer.build(texts).lib.to_str() == words.lib.to_str()
    assert len(BertTokenizer.build(texts, size=40)) == 40
    # a word made of known letters is spelled, another is not known
    assert words.decode(words.encode("tardigrade")[0][0]) == "tardigrade"
    assert vocabulary["[UNK]"] in words.encode("ßpin")[0][0].tolist()


# ------------------------------------------------------------------------------------- bad input

def test_texts_without_words_are_refused():
    words = BertTokenizer.build(TEXTS)
    for bad in ("", "   ", "\n\t", "\u200b"):
        with pytest.raises(data.BadData, match="text 1: .* holds no word") as told:
            words.encode(["a red circle", bad])
        assert "\n" not in str(told.value)
    with pytest.raises(data.BadData, match="UTF-8"):
        words.encode(["\ud800"])
    assert words.encode(["a red circle", "."])[0].shape[0] == 2      # control


def test_batches_without_negatives():
    model, pixels, ids, mask = fresh()
    one = pixels[:1], ids[:1, :5], mask[:1, :5]
    for given in (one, (pixels, ids[:1].expand(3, -1), mask[:1].expand(3, -1))):
        with pytest.raises(data.BadData, match="no negatives: .*larger batch") as told:
            model.losses(*given)
        assert "\n" not in str(told.value)
        made = model.losses(*given, only=("itc", "itg"))            # these are defined
        assert all(v.isfinite() for v in made.values())
    # one pair alone has nothing to be told apart from
    assert model.losses(*one, only=("itc",))["itc"].item() == pytest.approx(0, abs=1e-6)
    assert similarity(model, *one).shape == (1, 1) and match_logit(model, *one).shape == (1, 2)
    # one picture twice: by its owner
    with pytest.raises(data.BadData):
        model.losses(pixels, ids, mask, image_ids=torch.tensor([7, 7, 7]))
    twice = model.losses(pixels, ids, mask, image_ids=torch.tensor([7, 7, 1]))
    assert twice["itc"].item() != model.losses(pixels, ids, mask)["itc"].item()


def test_two_of_three_captions_alike():
    """They are no negatives of each other; the third is everyone's, and has both."""
    model, pixels, ids, mask = fresh()
    ids, mask = ids[[0, 0, 1]], mask[[0, 0, 1]]
    shown = []
    draw = qformer.hard_negatives
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qformer, "hard_negatives", lambda *a: shown.append(draw(*a)) or shown[-1])
        for seed in range(5):
            model.losses(pixels, ids, mask, seed=seed)
    assert all(d[:, :2].eq(2).all() and d[:, 2].lt(2).all() for d in shown)


def test_nonsense_in_a_config_is_one_line(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    whole = (tmp_path / "config.json").read_text()
    for path, values, says in (
        (("qformer_config",), {"hidden_size": 10**9}, "width"),
        (("qformer_config",), {"num_attention_heads": 5}, "divide"),
        (("qformer_config",), {"hidden_act": "relu"}, "gelu"),
        (("qformer_config",), {"layer_norm_eps": 0}, "eps"),
        (("qformer_config",), {"cross_attention_frequency": 0}, "cross_attention_freq"),
        (("qformer_config",), {"cross_attention_frequency": 3}, "no place"),
        (("qformer_config",), {"num_hidden_layers": 4}, "missing"),
        (("qformer_config",), {"use_qformer_text_input": False}, "vocabulary"),
        (("qformer_config",), {"vocab_size": 8}, "rows"),
        (("vision_config",), {"hidden_size": 48}, "width|disagree"),
        ((), {"num_query_tokens": "32"}, "num_queries"),
        ((), {"num_query_tokens": 6}, "disagree"),
        ((), {"image_text_hidden_size": -1}, "image_text"),
        ((), {"ln_vision_eps": "x"}, "eps"),
        ((), {"qformer_config": 3}, "object"),
        ((), {"model_type": "llava"}, "no Q-Former"),
    ):
        edit(tmp_path, *path, **values)
        with pytest.raises(data.BadModel, match=says) as told:
            Blip2Stage1.from_pretrained(tmp_path)
        assert "\n" not in str(told.value)
        (tmp_path / "config.json").write_text(whole)
    Blip2Stage1.from_pretrained(tmp_path)                             # control


def test_half_precision_is_the_eyes_alone(pair, tmp_path):
    pair[0].save_pretrained(tmp_path)
    half = Blip2Stage1.from_pretrained(tmp_path, torch.float16)
    kinds = {(n.split(".")[0] == "vision", p.dtype) for n, p in half.named_parameters()}
    assert kinds == {(True, torch.float16), (False, torch.float32)}
    pixels, ids, mask = batch()
    with torch.no_grad():
        found = gap(score(half, pixels, ids, mask), score(pair[0], pixels, ids, mask))
    assert 1e-7 < found < .02


# ----------------------------------------------------------------------------- the command line

def test_the_command_line(pair, tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["qformer.py", *map(str, args)])
        return exit_status(qformer.main), *capsys.readouterr()
    model, image = tmp_path / "model", tmp_path / "img.png"
    pair[0].save_pretrained(model)
    toy_world.draw(make_scene(3), 64).save(image)
    capsys.readouterr()
    code, out, err = run(image, *TEXTS[:2], "--model", model)
    assert code == 0 and not err
    rows = [line.split(maxsplit=3) for line in out.splitlines()[1:]]
    assert [row[3] for row in rows] == TEXTS[:2]
    pixels = data.preprocess(data.load_image(image), 28, "squash").repeat(2, 1, 1, 1)
    ours = Blip2Stage1.from_pretrained(model)
    ids, mask = ours.tokenizer.encode(TEXTS[:2])
    with torch.no_grad():
        want = (similarity(ours, pixels, ids, mask).diagonal(),
                match_logit(ours, pixels, ids, mask).softmax(1)[:, 1],
                score(ours, pixels, ids, mask))
    for i, row in enumerate(rows):
        assert all(abs(float(a) - float(b[i])) < .006 for a, b in zip(row, want))
    for args, exit_code, says in (
            ((image,), 2, "no caption"), ((image, "", "--model", model), 3, "holds no word"),
            ((tmp_path / "none.png", "a", "--model", model), 3, "none.png"),
            ((image, "a", "--model", tmp_path / "nowhere"), 3, "nowhere")):
        code, _, err = run(*args)
        assert code == exit_code and says in err and err.count("\n") == 1


def test_alone_it_draws_the_masks():
    told = subprocess.run([sys.executable, ROOT / "qformer.py"], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count("\n   ") >= 24 + 3
    assert "   # # # # # . . .\n" in told.stdout and "(1, 8, 64)" in told.stdout


if __name__ == "__main__":
    two_ranks(sys.argv[1])
