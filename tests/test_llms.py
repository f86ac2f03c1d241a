"""OPT and FlanT5 against transformers: logits, caches, padding, losses, and what is refused.

Random tiny models of transformers, read by us: logits within 1e-5 of the largest.
"""
import json

import pytest
import torch
import transformers

import data
import generate
from formats.checkpoints import load_weights, save_weights
from kernels import biased
from kernels.attention import document_spans
from llama import KVCache
from llms.opt import Opt
from llms.t5 import T5
from tiny import edit, gap, LIMIT, loaded, same_tensors, shaken

OPT = dict(vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
           max_position_embeddings=64, word_embed_proj_dim=32)
T5_SIZES = dict(vocab_size=96, d_model=32, d_kv=12, d_ff=48, num_layers=3, num_decoder_layers=2,
                num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)


def ids(*shape, seed=0):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def their_opt(**changes):
    return shaken(transformers.OPTForCausalLM(transformers.OPTConfig(**{**OPT, **changes})))


def their_t5(own_head=True, **changes):
    """A FlanT5. transformers ties the head of every new T5: a file is made in which it is not."""
    config = transformers.T5Config(**{**T5_SIZES, **changes})
    model = transformers.T5ForConditionalGeneration(config)
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    shaken(model)
    with torch.no_grad():           # distances must matter
        for stack in (model.encoder, model.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(3)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: (folder, transformers' model, ours)}"""
    root, made = tmp_path_factory.mktemp("llms"), {}
    for kind, theirs, ours in (("opt", their_opt(), Opt), ("t5", their_t5(), T5)):
        theirs.save_pretrained(root / kind)
        made[kind] = root / kind, theirs, ours.from_pretrained(root / kind)
    return made


def mask_of(lengths, left=True):
    """(B, longest) bool, False at padding."""
    longest = max(lengths)
    at = torch.arange(longest)[None]
    sizes = torch.tensor(lengths)[:, None]
    return at >= longest - sizes if left else at < sizes


# ------------------------------------------------------------------------------------- OPT alone

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_opt_logits(models, length):
    _, theirs, ours = models["opt"]
    x = ids(2, length)
    assert gap(ours(x), theirs(x).logits) <= LIMIT


@torch.no_grad()
def test_opt_counts_positions_over_the_mask(models):
    _, theirs, ours = models["opt"]
    x, mask = ids(3, 9), mask_of([9, 4, 1])
    want = theirs(x, attention_mask=mask.long()).logits
    assert gap(ours(x, attention_mask=mask)[mask], want[mask]) <= LIMIT
    # padding on the right does not move anything, either
    right = mask_of([9, 4, 1], left=False)
    want = theirs(x, attention_mask=right.long()).logits
    assert gap(ours(x, attention_mask=right)[right], want[right]) <= LIMIT
    # sprung: positions that count the padding
    counted = ours(x, None, torch.arange(9)[None], mask)
    want = theirs(x, attention_mask=mask.long()).logits
    assert gap(counted[mask], want[mask]) > 100 * LIMIT


@torch.no_grad()
def test_opt_cache_step_by_step(models):
    _, theirs, ours = models["opt"]
    x, mask = ids(3, 12), mask_of([12, 10, 7])          # prompts of 6, 4 and 1
    want = theirs(x, attention_mask=mask.long()).logits
    cache = KVCache(ours.config, 3, 12, ours.embed.weight, mask[:, :6])
    got = [ours(ours.embed(x[:, :6]), cache)]
    for t in range(6, 12):
        got.append(ours(x[:, t:t + 1], cache))
    assert gap(torch.cat(got, 1)[mask], want[mask]) <= LIMIT


def test_opt_is_traps(models, monkeypatch):
    """What loads without an error and gives other numbers."""
    _, theirs, ours = models["opt"]
    x = ids(1, 8)
    with torch.no_grad():
        want = theirs(x).logits
        for offset in (0, 1):
            monkeypatch.setattr("llms.opt.OFFSET", offset)
            assert gap(ours(x), want) > 100 * LIMIT
        monkeypatch.undo()
        ours.blocks[0].norm1.eps = 1e-2
        assert gap(ours(x), want) > 100 * LIMIT
        ours.blocks[0].norm1.eps = 1e-5
        assert gap(ours(x), want) <= LIMIT


def test_opt_has_positions_for_so_many_tokens(models):
    ours = models["opt"][2]
    assert ours(ids(1, 64)).shape == (1, 64, 96)
    with pytest.raises(data.BadData, match="65 tokens.*64 positions") as info:
        ours(ids(1, 65))
    assert "\n" not in str(info.value)
    padded = torch.arange(70)[None] > 5         # padding is not counted
    assert ours(ids(1, 70), attention_mask=padded).shape == (1, 70, 96)


# -------------------------------------------------------------------------------------- T5 alone

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_t5_logits(models, length):
    _, theirs, ours = models["t5"]
    x, y = ids(2, length), ids(2, 41 - length, seed=1)
    assert gap(ours(x, y), theirs(input_ids=x, decoder_input_ids=y).logits) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_t5_with_padding(models, left):
    _, theirs, ours = models["t5"]
    x, y, mask = ids(3, 9), ids(3, 5, seed=1), mask_of([9, 4, 1], left)
    want = theirs(input_ids=x, attention_mask=mask.long(), decoder_input_ids=y).logits
    assert gap(ours(x, y, mask), want) <= LIMIT
    assert gap(ours(x, y), want) > 100 * LIMIT


@torch.no_grad()
def test_t5_cache_step_by_step(models):
    _, theirs, ours = models["t5"]
    x, y, mask = ids(3, 9), ids(3, 30, seed=1), mask_of([9, 4, 1])
    start = torch.zeros(3, 1, dtype=torch.long)
    y = torch.cat((start, y), 1)
    want = theirs(input_ids=x, attention_mask=mask.long(), decoder_input_ids=y).logits
    prompt = ours.embed(x)
    cache = KVCache(ours.config, 3, 9 + 31, prompt, mask)
    got = [ours.next_logits(prompt, cache)]
    for t in range(1, 31):
        got.append(ours.next_logits(y[:, t:t + 1], cache))
    assert gap(torch.stack(got, 1), want) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32, 128), (8, 20), (6, 7), (64, 200)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_of_distances(shape, both_ways):
    attention = transformers.models.t5.modeling_t5.T5Attention
    distance = torch.arange(-300, 301)
    want = attention._relative_position_bucket(distance, both_ways, *shape)
    assert torch.equal(biased.bucket(distance, *shape, both_ways), want)


def test_t5_is_traps(models, monkeypatch):
    _, theirs, ours = models["t5"]
    x, y = ids(1, 12), ids(1, 10, seed=1)
    with torch.no_grad():
        want = theirs(input_ids=x, decoder_input_ids=y).logits
        both = ours.encoder_bias, ours.decoder_bias
        for name, wrong in zip(("decoder_bias", "encoder_bias"), both):
            right = getattr(ours, name)
            setattr(ours, name, wrong)
            assert gap(ours(x, y), want) > 100 * LIMIT
            setattr(ours, name, right)
        plain = biased.biased_attention
        monkeypatch.setattr("llms.t5.biased_attention",         # scores divided by sqrt(D)
                            lambda q, k, v, bias: plain(q * 12 ** -.5, k, v, bias))
        assert gap(ours(x, y), want) > 100 * LIMIT
        monkeypatch.undo()
        ours.decoder[0].mlp.approximate = "none"                # the exact GELU
        assert gap(ours(x, y), want) > 10 * LIMIT
        ours.decoder[0].mlp.approximate = "tanh"
        assert gap(ours(x, y), want) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(dense_act_fn="gelu"), dict(tie_word_embeddings=True),
                                     dict(decoder_start_token_id=7)])
def test_t5_settings_are_obeyed(tmp_path, changes):
    theirs = their_t5(**changes)
    theirs.save_pretrained(tmp_path)
    ours = T5.from_pretrained(tmp_path)
    x = ids(2, 7)
    start = torch.full((2, 1), theirs.config.decoder_start_token_id)
    assert gap(ours(x), theirs(input_ids=x, decoder_input_ids=start).logits) <= LIMIT
    assert ours.config.scale_outputs == ("tie_word_embeddings" in changes)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("beams", [1, 5])
def test_text_alone_is_written_as_theirs(models, kind, beams):
    """A language model without a picture: 32 tokens."""
    _, theirs, ours = models[kind]
    x = ids(1, 6)
    out = theirs.generate(input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=32,
                          min_new_tokens=32, num_beams=beams, eos_token_id=-1)
    mine = generate.generate(ours, x[0].tolist(), max_new_tokens=32, num_beams=beams, eos=-1)
    assert list(mine) == out[0, -32:].tolist()


# -------------------------------------------------------------------------------- files and heads

@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_saved_as_it_was_read(models, tmp_path, kind):
    folder, theirs, ours = models[kind]
    ours.save_pretrained(tmp_path)
    assert load_weights(tmp_path).keys() == load_weights(folder).keys()
    back = loaded(type(theirs), tmp_path)
    assert same_tensors(back, theirs)
    assert same_tensors(type(ours).from_pretrained(tmp_path), ours)
    x = ids(1, 5)
    more = {} if kind == "opt" else {"decoder_input_ids": x}
    assert torch.equal(back(input_ids=x, **more).logits, theirs(input_ids=x, **more).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_file_decides_about_the_head(models, tmp_path, kind):
    """config.json says tied, and the file holds another head: the file's."""
    folder, theirs, ours = models[kind]
    theirs.save_pretrained(tmp_path)
    weights = dict(load_weights(tmp_path))
    edit(tmp_path, tie_word_embeddings=True)
    weights["lm_head.weight"] = weights[ours.table["embed.weight"]].flip(0).contiguous()
    save_weights(tmp_path, weights)
    other = type(ours).from_pretrained(tmp_path)
    assert not other.config.tie_embeddings
    assert torch.equal(other.head.weight, other.embed.weight.flip(0))
    x = ids(1, 5)
    more = {} if kind == "opt" else {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
    back = type(theirs).from_pretrained(tmp_path).eval()
    assert gap(other(x), back(input_ids=x, **more).logits) <= LIMIT
    # the same once more, or none at all: tied
    for head in (weights[ours.table["embed.weight"]].clone(), None):
        weights["lm_head.weight"] = head
        save_weights(tmp_path, {name: w for name, w in weights.items() if w is not None})
        assert type(ours).from_pretrained(tmp_path).config.tie_embeddings


def test_t5_in_float16_keeps_its_wide_sums(models, tmp_path):
    folder, theirs, ours = models["t5"]
    for dtype in (torch.float16, torch.bfloat16):
        half = T5.from_pretrained(folder, dtype)
        back = type(theirs).from_pretrained(folder, dtype=dtype).eval()
        wide = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
        their_wide = {n for n, p in back.named_parameters() if p.dtype == torch.float32}
        assert len(wide) == len(their_wide) == (5 if dtype == torch.float16 else 0)
        assert all(name.endswith("mlp.down.weight") for name in wide)
        x, y = ids(1, 9), ids(1, 6)
        with torch.no_grad():
            exact = theirs(input_ids=x, decoder_input_ids=y).logits
            rounded = gap(back(input_ids=x, decoder_input_ids=y).logits.float(), exact)
            assert gap(half(x, y).float(), exact) <= 2 * rounded
        half.save_pretrained(tmp_path / str(dtype))
        kinds = load_weights(tmp_path / str(dtype))
        assert {str(kinds[n].dtype) for n in kinds if "wo" not in n} == {str(dtype)}


@pytest.mark.parametrize("kind, changes, words", [
    ("opt", dict(activation_function="gelu"), "activation_function 'gelu'"),
    ("opt", dict(do_layer_norm_before=False), "do_layer_norm_before"),
    ("opt", dict(word_embed_proj_dim=16), "word_embed_proj_dim 16.*350m"),
    ("opt", dict(enable_bias=False), "enable_bias"),
    ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
    ("opt", dict(num_attention_heads=5), "heads"),
    ("opt", dict(hidden_size=2 ** 30, word_embed_proj_dim=2 ** 30), "width"),
    ("opt", dict(model_type="bart"), "'bart'"),
    ("t5", dict(feed_forward_proj="relu"), "T5 1.0"),
    ("t5", dict(feed_forward_proj="gated-silu"), "gated-silu"),
    ("t5", dict(dense_act_fn="silu"), "dense_act_fn"),
    ("t5", dict(relative_attention_num_buckets=7), "buckets"),
    ("t5", dict(relative_attention_max_distance=4), "max_distance"),
    ("t5", dict(model_type="bart"), "'bart'"),
    ("t5", dict(eos_token_id="end"), "eos_token_id"),
    ("t5", dict(decoder_start_token_id=96), "start")])
def test_bad_configs_are_one_line(models, tmp_path, kind, changes, words):
    folder, _, ours = models[kind]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))    # and no weights
    with pytest.raises(data.BadModel, match=words) as info:
        type(ours).from_pretrained(tmp_path)
    assert "\n" not in str(info.value)


# ------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize("packed", [False, True])
def test_t5_reads_the_prompt_and_writes_the_answer(models, packed):
    """One row holds both; transformers is given them apart."""
    _, theirs, ours = models["t5"]
    sizes, tokens = [(5, 4), (3, 6), (1, 1)], ids(3, 9)
    labels = torch.full((3, 9), data.IGNORE)
    prompt, answer = torch.zeros(3, 5, dtype=torch.long), torch.full((3, 6), data.IGNORE)
    for i, (a, b) in enumerate(sizes):
        labels[i, a:a + b] = tokens[i, a:a + b]
        prompt[i, :a], answer[i, :b] = tokens[i, :a], tokens[i, a:a + b]
    mask = mask_of([a + b for a, b in sizes], left=False)
    want = theirs(input_ids=prompt, attention_mask=mask_of([5, 3, 1], left=False).long(),
                  labels=answer)
    x = ours.embed(tokens)
    if packed:
        x, labels = x[mask][None], labels[mask][None]
        spans = document_spans([[a + b for a, b in sizes]])
        hidden, targets = ours.predictions(x, labels, None, spans)
    else:
        hidden, targets = ours.predictions(x, labels, mask)
    assert torch.equal(targets, answer[answer != data.IGNORE])
    with torch.no_grad():
        logits = ours.head(hidden)
        assert gap(logits, want.logits[answer != data.IGNORE]) <= LIMIT
        loss = torch.nn.functional.cross_entropy(logits, targets)
        assert abs(float(loss - want.loss)) <= 1e-6 * float(want.loss)


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("policy", ["none", "attention", "full"])
@pytest.mark.parametrize("trains", [False, True])
def test_what_backward_recomputes_changes_no_gradient(models, kind, policy, trains):
    """Of the embeddings that come from outside, and of the language model where it trains."""
    ours = models[kind][2]
    labels = ids(2, 9)
    labels[:, :4] = data.IGNORE
    found = []
    for ours.checkpoint in (None, policy):
        ours.requires_grad_(trains)
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        hidden, targets = ours.predictions(x, labels)
        torch.nn.functional.cross_entropy(ours.head(hidden), targets).backward()
        grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert bool(grads) == trains and x.grad[:, :4].abs().sum() > 0
        found.append({**grads, "x": x.grad})
        ours.zero_grad()
    ours.checkpoint = None
    ours.requires_grad_(False)
    plain, other = found
    assert plain.keys() == other.keys()
    if trains and kind == "t5":
        assert {"encoder_bias.weight", "decoder_bias.weight"} <= plain.keys()
    for name in plain:
        assert torch.allclose(other[name], plain[name], 1e-4, 1e-6), name


def test_a_folder_with_older_tokenizer_files_is_told_how_to_go_on(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    words = "only vocab.json and merges.txt.*AutoTokenizer"
    with pytest.raises(data.BadModel, match=words) as info:
        data.Tokenizer(tmp_path)
    assert "\n" not in str(info.value)
