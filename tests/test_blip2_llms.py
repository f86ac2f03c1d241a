"""BLIP-2 as it was published, with an OPT and with a FlanT5, against transformers.

Random tiny models of transformers with an EVA tower, read by us: logits, losses, gradients, greedy
tokens, beams, sampling's distribution, batches with padding; and written back.
"""
import json

import pytest
import torch
import transformers
from transformers import OPTConfig, T5Config

import data
import generate
import projector
from formats.checkpoints import load_weights, save_weights
from formats.errors import UserError
from test_llms import OPT, T5_SIZES
from test_qformer_vlm import ASKS, EYE, loud, PIXELS, Q
from tiny import edit, gap, LIMIT, loaded, same_tensors

IMAGE = 90                                  # the placeholder in transformers' ids
SIZES = {"opt": {**OPT, "max_position_embeddings": 128, "eos_token_id": 94},
         "t5": {**T5_SIZES, "bos_token_id": 1, "eos_token_id": 1}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QUESTIONS = "Question: what is this? Answer:", "a", "Question: how many are there? Answer:"


def byte_words(folder, bos):
    """A byte-level tokenizer as OPT's (GPT-2's), 90 tokens and <image>."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", "Ċ", *map(chr, range(39, 123))]
    write(folder, {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [],
                   "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False},
          tokens[:4], BYTES, BYTES, ["</s>", "$A"])


def piece_words(folder, bos):
    """A unigram tokenizer as T5's, 90 tokens and <image>."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(37, 123))]
    spaced = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    write(folder, {"type": "Unigram", "unk_id": 2, "byte_fallback": False,
                   "vocab": [[t, -float(i)] for i, t in enumerate(tokens)]},
          tokens[:3], {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, spaced]},
          spaced, ["$A", "</s>"])


def write(folder, model, special, splitter, decoder, form):
    """tokenizer.json and tokenizer_config.json; form: what stands around a text, $A."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": t, "special": True, **flags} for i, t in enumerate(special)]
    added.append({"id": IMAGE, "content": "<image>", "special": True, **flags})
    end = {"id": "</s>", "ids": [special.index("</s>")], "tokens": ["</s>"]}
    parts = [{"Sequence": {"id": "A", "type_id": 0}} if part == "$A"
             else {"SpecialToken": {"id": part, "type_id": 0}} for part in form]
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "normalizer": None, "added_tokens": added, "pre_tokenizer": splitter,
        "decoder": decoder, "model": model, "post_processor": {
            "type": "TemplateProcessing", "single": parts, "special_tokens": {"</s>": end},
            "pair": parts + [{"Sequence": {"id": "B", "type_id": 1}}]}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>", **({"bos_token": "</s>"} if form[0] == "</s>" else {})}))


def their_model(kind, **changes):
    text = {"opt": OPTConfig, "t5": T5Config}[kind](**{**SIZES[kind], **changes})
    model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
        vision_config=dict(EYE), qformer_config=dict(ASKS), text_config=text,
        num_query_tokens=Q, image_token_index=IMAGE))
    if kind == "t5":
        llm = model.language_model
        llm.lm_head.weight = torch.nn.Parameter(torch.empty_like(llm.lm_head.weight))
    loud(model)
    with torch.no_grad():           # or it says one word for ever
        if kind == "t5":
            llm.shared.weight.mul_(9)
            llm.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(9)
        else:
            decoder = model.language_model.model.decoder
            decoder.embed_positions.weight.mul_(9)
            decoder.final_layer_norm.weight[::2] *= -1
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: (folder, transformers' model, ours)}"""
    root, made = tmp_path_factory.mktemp("blip2"), {}
    for kind, words in (("opt", byte_words), ("t5", piece_words)):
        theirs = their_model(kind)
        theirs.save_pretrained(root / kind)
        words(root / kind, None)
        made[kind] = root / kind, theirs, projector.VLM.from_pretrained(root / kind)
    return made


def prompt(model, text):
    return generate.build_prompt([text], model.template, model.tokenizer)


def their_prompts(folder, texts, left):
    """input_ids and attention_mask as Blip2Processor makes them: the text padded, then the image's
    placeholders in front of it."""
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    words.padding_side = "left" if left else "right"
    coded = words(list(texts), padding=True, return_tensors="pt")
    marks = torch.full((len(texts), Q), IMAGE)
    return {"input_ids": torch.cat((marks, coded["input_ids"]), 1),
            "attention_mask": torch.cat((torch.ones_like(marks), coded["attention_mask"]), 1)}


def answers(out, inputs, kind):
    """transformers' new ids."""
    return out[:, 1:] if kind == "t5" else out[:, inputs["input_ids"].shape[1]:]


# ------------------------------------------------------------------------------------- logits

@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("text", ["", *QUESTIONS])
def test_logits(models, kind, text):
    folder, theirs, ours = models[kind]
    ids = prompt(ours, text)
    inputs = their_prompts(folder, [text], True)
    assert inputs["input_ids"][0, Q:].tolist() == ids[1:]       # the tokenizer's own, whole
    more = {}
    if kind == "t5":
        more["decoder_input_ids"] = torch.tensor([[0, 5, 9]])
    want = theirs(pixel_values=PIXELS[:1], **inputs, **more).logits
    more = {} if kind == "opt" else {"decoder_ids": more["decoder_input_ids"]}
    assert gap(ours(torch.tensor([ids]), PIXELS[:1], **more), want) <= LIMIT
    # sprung: the image behind the text
    assert gap(ours(torch.tensor([ids[1:] + ids[:1]]), PIXELS[:1], **more), want) > 100 * LIMIT


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_what_a_folder_says(models, kind):
    folder, _, ours = models[kind]
    assert ours.template == f"blip2_{kind}" and ours.llm.kind == kind
    assert ours.tokenizer.bos == (2 if kind == "opt" else None)
    start = [data.IMAGE, 2] if kind == "opt" else [data.IMAGE]
    assert prompt(ours, "")[:2] == (start + [1])[:2]
    # as the files say, and no id more: transformers goes on behind OPT's newline
    assert generate.Stops(ours).ids.keys() == ({94} if kind == "opt" else {1})


# ------------------------------------------------------------------------------------- decoding

@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("text", ["", QUESTIONS[0]])
def test_greedy(models, kind, text):
    folder, theirs, ours = models[kind]
    inputs = their_prompts(folder, [text], True)
    out = theirs.generate(PIXELS[:1], **inputs, max_new_tokens=32, min_new_tokens=32,
                          eos_token_id=-1)
    mine = list(generate.generate(ours, prompt(ours, text), PIXELS[:1], 32, eos=-1))
    assert mine == answers(out, inputs, kind)[0].tolist() and len(set(mine)) > 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_answer_ends_where_theirs_does(models, tmp_path, kind):
    """At the EOS of text_config, whatever it is; and of generation_config.json, if that has one."""
    folder, theirs, ours = models[kind]
    inputs, ids = their_prompts(folder, [QUESTIONS[0]], True), prompt(ours, QUESTIONS[0])
    whole = list(generate.generate(ours, ids, PIXELS[:1], 32, eos=-1))
    end = whole[7]
    theirs.save_pretrained(tmp_path)
    (byte_words if kind == "opt" else piece_words)(tmp_path, None)
    edit(tmp_path, "text_config", eos_token_id=end)
    for file in ({}, {"eos_token_id": end}, {"eos_token_id": [end, 3]}):
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
        back = type(theirs).from_pretrained(tmp_path).eval()
        out = answers(back.generate(PIXELS[:1], **inputs, max_new_tokens=32), inputs, kind)[0]
        mine = list(generate.generate(projector.VLM.from_pretrained(tmp_path), ids, PIXELS[:1], 32))
        assert mine == whole[:whole.index(end)] == out.tolist()[:-1] and out[-1] == end


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 0.0])
def test_beams(models, kind, length_penalty):
    folder, theirs, ours = models[kind]
    ends = set()
    for text in ("", *QUESTIONS):
        for i in (0, 1):
            inputs = their_prompts(folder, [text], True)
            ids = prompt(ours, text)
            first = list(generate.generate(ours, ids, PIXELS[i:i + 1], 12, eos=-1))
            end = first[i + 2]                      # an id that is likely, so that answers end
            out = theirs.generate(PIXELS[i:i + 1], **inputs, max_new_tokens=12, num_beams=5,
                                  length_penalty=length_penalty, eos_token_id=end, pad_token_id=1)
            want = answers(out, inputs, kind)[0].tolist()
            want = want[:want.index(end)] if end in want else want
            mine = list(generate.generate(ours, ids, PIXELS[i:i + 1], 12, num_beams=5, eos=end,
                                          length_penalty=length_penalty))
            assert mine == want
            ends.add(len(mine))
    assert length_penalty < 1 or len(ends) > 1      # some were cut, some ended


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_repetition_penalty(models, kind, beams):
    """Of an OPT the prompt counts as said, of a T5 the start token does."""
    folder, theirs, ours = models[kind]
    inputs, ids = their_prompts(folder, [QUESTIONS[0]], True), prompt(ours, QUESTIONS[0])
    out = theirs.generate(PIXELS[:1], **inputs, max_new_tokens=16, min_new_tokens=16,
                          eos_token_id=-1, repetition_penalty=1.5, num_beams=beams)
    mine = [list(generate.generate(ours, ids, PIXELS[:1], 16, eos=-1, num_beams=beams,
                                   repetition_penalty=p)) for p in (1.5, 1.0)]
    assert mine[0] == answers(out, inputs, kind)[0].tolist() != mine[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_batch_with_padding(models, kind):
    folder, theirs, ours = models[kind]
    texts, pixels = QUESTIONS, PIXELS[[0, 1, 0]]
    inputs = their_prompts(folder, texts, left=kind == "opt")
    out = theirs.generate(pixels, **inputs, max_new_tokens=20, min_new_tokens=20, eos_token_id=-1)
    mine = generate.generate_batch(ours, [prompt(ours, text) for text in texts],
                                   [pixels[i:i + 1] for i in range(3)], max_new_tokens=20, eos=-1)
    assert [list(row) for row in mine] == answers(out, inputs, kind).tolist()
    alone = [list(generate.generate(ours, prompt(ours, t), pixels[i:i + 1], 20, eos=-1))
             for i, t in enumerate(texts)]
    assert alone == [list(row) for row in mine]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_sampling_draws_from_their_distribution(models, kind):
    """Of the first token, 600 draws at temperature 1 with top-p .8: the share of each id."""
    folder, theirs, ours = models[kind]
    inputs = their_prompts(folder, [""], True)
    more = {} if kind == "opt" else {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    p = theirs(pixel_values=PIXELS[:1], **inputs, **more).logits[0, -1].double().softmax(-1)
    order = p.argsort(descending=True)
    keep = order[:int((p[order].cumsum(0) - p[order] < .8).sum())]
    share = torch.zeros_like(p)
    share[keep] = p[keep] / p[keep].sum()
    rows = generate.generate_batch(ours, [prompt(ours, "")] * 600, [PIXELS[:1]] * 600,
                                   max_new_tokens=1, temperature=1.0, top_p=.8, eos=-1)
    drawn = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=96) / 600
    assert float((drawn - share).abs().sum()) / 2 < .15 and not drawn[share == 0].any()


def test_a_t5_needs_its_cache(models):
    ours = models["t5"][2]
    with pytest.raises(data.UsageError, match="use_cache"):
        next(generate.generate(ours, prompt(ours, ""), PIXELS[:1], 3, use_cache=False))
    opt = models["opt"][2]
    both = [list(generate.generate(opt, prompt(opt, "a"), PIXELS[:1], 9, use_cache=c, eos=-1))
            for c in (True, False)]
    assert both[0] == both[1]


def test_a_prompt_that_is_too_long(models):
    ours = models["opt"][2]
    with pytest.raises(UserError, match="context has 128"):
        next(generate.generate(ours, prompt(ours, "a" * 130), PIXELS[:1]))
    # to the last position, and no further
    answer = generate.generate(ours, prompt(ours, "a" * 100), PIXELS[:1], 99, eos=-1)
    assert len(list(answer)) == 128 - 100 - 1 - Q and answer.finish_reason == "context"
    # a long row in a batch does not stop a short one
    rows = [prompt(ours, "a" * 100), prompt(ours, "a")]
    both = generate.generate_batch(ours, rows, [PIXELS[:1]] * 2, max_new_tokens=60, eos=-1)
    assert [len(row) for row in both] == [22, 60]
    assert list(both[1]) == list(generate.generate(ours, rows[1], PIXELS[:1], 60, eos=-1))


# --------------------------------------------------------------------------------- loss, gradients

@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients(models, kind, packed):
    """Captions of different lengths; the gradients of queries and projection, as in stage 2."""
    folder, theirs, ours = models[kind]
    texts = ("a cat", "on a mat"), ("one", "two three")
    talks = [[{"from": "human", "value": "<image>\n" + ("" if kind == "opt" else q)},
              {"from": "gpt", "value": a}] for q, a in texts]
    pairs = [data.encode(talk, ours.template, ours.tokenizer) for talk in talks]
    shown = [[i for i in ids if i != data.IMAGE] for ids, _ in pairs]
    marks = [IMAGE] * Q
    longest = max(map(len, shown))
    if kind == "opt":           # the whole row; loss on the caption, its BOS and its newline
        assert [labels[1:] for _, labels in pairs] == shown and shown[0][-1] == 5
        rows = [marks + s + [1] * (longest - len(s)) for s in shown]
        labels = [[-100] * Q + s + [-100] * (longest - len(s)) for s in shown]
    else:                       # the encoder reads the prefix, the decoder writes the suffix
        cut = [sum(label == data.IGNORE for label in labels) - 1 for _, labels in pairs]
        assert all(s[c - 1] == 1 == s[-1] for s, c in zip(shown, cut))      # both end in </s>
        most = max(cut)
        rows = [marks + s[:c] + [0] * (most - c) for s, c in zip(shown, cut)]
        most = max(len(s) - c for s, c in zip(shown, cut))
        labels = [s[c:] + [-100] * (most - len(s) + c) for s, c in zip(shown, cut)]
    ids = torch.tensor(rows)
    mask = torch.tensor([[1] * (Q + n) + [0] * (ids.shape[1] - Q - n)
                         for n in (map(len, shown) if kind == "opt" else cut)])
    for model in (theirs, ours):
        model.requires_grad_(False)
        model.zero_grad()
    kept = [theirs.query_tokens, theirs.language_projection.weight]
    mine = [ours.projector.qformer.query_tokens, ours.projector.proj.weight]
    for p in kept + mine:
        p.requires_grad_(True)
    want = theirs(pixel_values=PIXELS, input_ids=ids, attention_mask=mask,
                  labels=torch.tensor(labels)).loss
    if packed:
        row, target = (torch.tensor([pairs[0][i] + pairs[1][i]]) for i in (0, 1))
        loss = ours.loss(row, target, PIXELS, lengths=[len(pairs[0][0]), len(pairs[1][0])])
    else:
        row, target = data.collate(pairs, ours.tokenizer.pad)
        real = torch.arange(row.shape[1]) < torch.tensor([[len(p[0])] for p in pairs])
        loss = ours.loss(row, target, PIXELS, real)
    assert abs(float(loss.detach() - want.detach())) <= 1e-6 * float(want.detach())
    want.backward()
    loss.backward()
    for a, b in zip(mine, kept):
        assert float((a.grad - b.grad).abs().max() / b.grad.abs().max()) <= 1e-5
    for p in kept + mine:
        p.requires_grad_(False)
        p.grad = None


# -------------------------------------------------------------------------------------- the files

@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_saved_and_loaded_by_both(models, tmp_path, kind):
    folder, theirs, ours = models[kind]
    ours.save_pretrained(tmp_path)
    back = loaded(type(theirs), tmp_path)
    assert same_tensors(back, theirs)
    assert load_weights(tmp_path).keys() == load_weights(folder).keys()
    again = projector.VLM.from_pretrained(tmp_path)
    assert same_tensors(again, ours) and again.template == ours.template
    assert prompt(again, QUESTIONS[0]) == prompt(ours, QUESTIONS[0])
    theirs_say = their_prompts(tmp_path, QUESTIONS[:1], True)["input_ids"][0]
    assert theirs_say[Q:].tolist() == prompt(ours, QUESTIONS[0])[1:]
    c = json.loads((tmp_path / "config.json").read_text())
    assert c["image_token_index"] == IMAGE and c["num_query_tokens"] == Q
    assert c["use_decoder_only_language_model"] == (kind == "opt")
    # transformers stops where we do
    ends = c["text_config"]["eos_token_id"]
    assert set(ends if type(ends) is list else [ends]) == set(generate.Stops(ours).ids)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_an_old_folder(models, tmp_path, kind):
    """No image token in config.json and tokenizer.json, no num_query_tokens in the processor."""
    folder, theirs, _ = models[kind]
    theirs.save_pretrained(tmp_path)
    (byte_words if kind == "opt" else piece_words)(tmp_path, None)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<image>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    c = json.loads((tmp_path / "config.json").read_text())
    del c["image_token_index"]
    (tmp_path / "config.json").write_text(json.dumps(c))
    ours = projector.VLM.from_pretrained(tmp_path)
    assert list(generate.generate(ours, prompt(ours, "a"), PIXELS[:1], 9)) == list(
        generate.generate(models[kind][2], prompt(ours, "a"), PIXELS[:1], 9))
    # without an EOS in the files: OPT's newline, T5's </s>
    edit(tmp_path, "text_config", eos_token_id=None)
    (tmp_path / "generation_config.json").write_text("{}")
    silent = projector.VLM.from_pretrained(tmp_path)
    assert generate.Stops(silent).ids.keys() == {5 if kind == "opt" else 1}
    ours.save_pretrained(tmp_path / "new")
    c = json.loads((tmp_path / "new/config.json").read_text())
    assert c["image_token_index"] == IMAGE and c["text_config"]["vocab_size"] == 96


@torch.no_grad()
@pytest.mark.parametrize("holds", ["the head alone", "both"])
def test_a_tied_file_may_hold_the_head(models, tmp_path, holds):
    """OPT's, as old files have it; a head that differs is another model's."""
    folder, theirs, ours = models["opt"]
    theirs.save_pretrained(tmp_path)
    byte_words(tmp_path, None)
    weights = dict(load_weights(tmp_path))
    embed = "language_model.model.decoder.embed_tokens.weight"
    weights["language_model.lm_head.weight"] = weights[embed].clone()
    if holds == "the head alone":
        del weights[embed]
    save_weights(tmp_path, weights)
    again = projector.VLM.from_pretrained(tmp_path)
    assert again.llm.config.tie_embeddings and same_tensors(again, ours)
    weights.pop("language_model.lm_head.weight")
    weights.pop(embed, None)
    save_weights(tmp_path, weights)
    with pytest.raises(data.BadModel, match="embed_tokens"):
        projector.VLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_files_head_wins(tmp_path):
    """config.json says tied, the file holds another head: the file's."""
    theirs = their_model("t5", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    piece_words(tmp_path, None)
    edit(tmp_path, "text_config", tie_word_embeddings=True)
    ours = projector.VLM.from_pretrained(tmp_path)
    assert torch.equal(ours.llm.head.weight, theirs.language_model.lm_head.weight)
    assert ours.llm.config.scale_outputs
    inputs = their_prompts(tmp_path, ["a"], True)
    want = theirs(pixel_values=PIXELS[:1], **inputs, decoder_input_ids=torch.tensor([[0]])).logits
    assert gap(ours(torch.tensor([prompt(ours, "a")]), PIXELS[:1]), want) <= LIMIT


@pytest.mark.parametrize("kind, changes, words", [
    ("opt", dict(activation_function="gelu"), "activation_function"),
    ("t5", dict(feed_forward_proj="relu"), "T5 1.0"),
    ("t5", dict(model_type="bart"), "'bart'"),
    ("opt", dict(model_type="gpt2"), "'gpt2'"),
    ("opt", dict(do_layer_norm_before=False), "do_layer_norm_before")])
def test_other_language_models_are_refused_in_one_line(models, tmp_path, kind, changes, words):
    folder, _, _ = models[kind]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, "text_config", **changes)
    with pytest.raises(data.BadModel, match=words) as info:
        projector.VLM.from_pretrained(tmp_path)
    assert "\n" not in str(info.value)
