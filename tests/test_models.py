"""The parts against formulas written out here in plain loops: kernels, splice, losses, copying."""
import math
import random

import pytest
import torch

import clip
import data
import kernels
import llama
import projector
from data import IGNORE, IMAGE
from kernels.attention import visible
from toy.induction import init_induction_heads

TINY = llama.Config(vocab=60, width=32, depth=2, heads=4, kv_heads=2, mlp=48, context=64)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(a, b, limit=1e-5):
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= limit


# ------------------------------------------------------------------------------- masks, attention

def grid(allow, rows, columns, n=0, start=0):
    """A rule as rows of # (seen) and . (hidden)."""
    return "\n".join("".join(".#"[v] for v in row)
                     for row in visible(allow, rows, columns, n, start).tolist())


def test_causal_sees_itself_and_what_came_before():
    assert grid(kernels.causal, 4, 4) == "#...\n##..\n###.\n####"


def test_causal_behind_a_cache_counts_from_where_it_starts():
    assert grid(kernels.causal, 2, 5, start=3) == "####.\n#####"


def test_full_sees_everything():
    assert grid(kernels.full, 2, 3) == "###\n###"


def reference(q, k, v, allow, n=0, start=0, attention_mask=None):
    """Attention one query at a time, in double precision; rows that see nothing are left at 0."""
    B, T, H, D = q.shape
    out = torch.zeros(B, T, H, D, dtype=torch.double)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * k.shape[2] // H
                seen = [s for s in range(k.shape[1]) if bool(allow(start + t, s, n))
                        and (attention_mask is None or bool(attention_mask[b, s]))]
                weights = [math.exp(float(q[b, t, h].double() @ k[b, s, g].double()) / D ** .5)
                           for s in seen]
                for w, s in zip(weights, seen):
                    out[b, t, h] += w / sum(weights) * v[b, s, g].double()
    return out.float()


@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T, S, start", [(5, 5, 0), (2, 7, 5), (3, 9, 4)])
@pytest.mark.parametrize("rule", [kernels.causal, kernels.full, lambda q, k, n: (k < n) | (k == q)])
def test_attention_equals_the_loop(H, G, T, S, start, rule):
    q, k, v = noise(2, T, H, 6), noise(2, S, G, 6, seed=1), noise(2, S, G, 6, seed=2)
    attention_mask = torch.ones(2, S, dtype=torch.bool)
    attention_mask[1, 1:3] = False
    for padding in (None, attention_mask):
        ours = kernels.attention(q, k, v, rule, n=2, start=start, attention_mask=padding)
        assert near(ours, reference(q, k, v, rule, 2, start, padding))
    wrong = kernels.attention(q, k.flip(1), v, rule, n=2, start=start)          # control
    assert not near(wrong, reference(q, k, v, rule, 2, start), .01)


def test_grouped_heads_are_neighbours_not_strides():
    q, k, v = noise(1, 4, 4, 6), noise(1, 4, 2, 6, seed=1), noise(1, 4, 2, 6, seed=2)
    right = kernels.attention(q, k, v)
    strided = kernels.attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))  # heads 0 1 0 1
    assert near(right, kernels.attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    assert not near(right, strided, .01)


@pytest.mark.parametrize("G", [4, 2])
def test_past_512_keys_the_fused_path_gives_the_same(G):
    q, k, v = noise(2, 5, 4, 8), noise(2, 520, G, 8, seed=1), noise(2, 520, G, 8, seed=2)
    attention_mask = torch.rand(2, 520, generator=torch.Generator().manual_seed(4)) < .7
    attention_mask[:, 0] = True
    for rule, start in ((kernels.causal, 514), (kernels.causal, 300), (kernels.full, 0)):
        long = kernels.attention(q, k, v, rule, start=start, attention_mask=attention_mask)
        assert near(long, reference(q, k, v, rule, 0, start, attention_mask))
    # keys 510 and on are hidden, so the written-out path on the first 510 says the same
    short = kernels.attention(
        q, k[:, :510], v[:, :510], start=300, attention_mask=attention_mask[:, :510]
    )
    assert near(kernels.attention(q, k, v, start=300, attention_mask=attention_mask), short)


def test_a_row_that_sees_nothing_is_finite_and_its_gradient_too():
    q = noise(1, 3, 2, 4).requires_grad_()
    k, v = noise(1, 3, 2, 4, seed=1), noise(1, 3, 2, 4, seed=2)
    attention_mask = torch.tensor([[False, True, True]])
    out = kernels.attention(q, k, v, attention_mask=attention_mask)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


def test_attention_of_the_wrong_shapes_is_refused():
    for q, k in ((noise(1, 2, 3, 4), noise(1, 2, 2, 4)), (noise(1, 2, 2, 4), noise(1, 2, 2, 6))):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.attention(q, k, k)


# ------------------------------------------------------------------------------- the small ones

def test_rms_norm_divides_by_the_root_mean_square():
    x, w = noise(3, 5, 8), noise(8, seed=1)
    for eps in (1e-6, .5):
        by_hand = torch.stack([row / math.sqrt(sum(float(a) ** 2 for a in row) / 8 + eps) * w
                               for row in x.flatten(0, 1)]).view_as(x)
        assert near(kernels.rms_norm(x, w, eps), by_hand)
    assert not near(kernels.rms_norm(x, w, 1e-6), kernels.layer_norm(x, w, w * 0, 1e-6), .01)


def test_rms_norm_of_bfloat16_counts_in_fp32():
    x = torch.full((1, 4096), 300.0)                    # the sum of squares overflows 16-bit floats
    assert near(kernels.rms_norm(x.half(), torch.ones(4096).half(), 1e-6).float(),
                torch.ones(1, 4096), 1e-3)
    assert kernels.rms_norm(x.bfloat16(), torch.ones(4096).bfloat16(), 1e-6).dtype == torch.bfloat16


def test_swiglu_gates_with_its_first_half():
    x = noise(4, 6)
    gate, up = x[:, :3], x[:, 3:]
    assert near(kernels.swiglu(x), gate / (1 + (-gate).exp()) * up)
    assert not near(kernels.swiglu(x), up / (1 + (-up).exp()) * gate, .01)


def test_quick_gelu_is_near_gelu_and_is_not_it():
    x = torch.linspace(-3, 3, 50)
    assert near(kernels.quick_gelu(x), x / (1 + (-1.702 * x).exp()))
    assert .005 < float((kernels.quick_gelu(x) - torch.nn.functional.gelu(x)).abs().max()) < .03


def turned(x, position_ids, base=100.0):
    return kernels.rope(x, *kernels.rope_table(position_ids, x.shape[-1], base))


def test_rope_turns_pairs_of_half_split_channels():
    x, D = noise(1, 3, 1, 8), 8
    y = turned(x, torch.tensor([[0, 1, 5]]))
    for t, position in enumerate((0, 1, 5)):
        for m in range(4):
            a, b = float(x[0, t, 0, m]), float(x[0, t, 0, m + 4])
            angle = position * 100 ** (-2 * m / D)
            assert float(y[0, t, 0, m]) == pytest.approx(
                a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert float(y[0, t, 0, m + 4]) == pytest.approx(
                b * math.cos(angle) + a * math.sin(angle), abs=1e-5)
    interleaved = torch.stack((y[..., :4], y[..., 4:]), -1).flatten(-2)
    other = turned(torch.stack((x[..., :4], x[..., 4:]), -1).flatten(-2), torch.tensor([[0, 1, 5]]))
    assert not near(interleaved, other, .01)            # control: the other pairing differs


def test_rope_makes_q_k_depend_on_the_distance_alone():
    q, k = noise(1, 1, 1, 16), noise(1, 1, 1, 16, seed=1)

    def product(i, j):
        return float((turned(q, torch.tensor([[i]])) * turned(k, torch.tensor([[j]]))).sum())
    for shift in (1, 7, 100):
        assert product(3 + shift, 5 + shift) == pytest.approx(product(3, 5), abs=1e-4)
    assert abs(product(3, 5) - product(3, 6)) > .01     # control: the distance does matter
    assert float(turned(q, torch.tensor([[9]])).norm()) == pytest.approx(float(q.norm()), abs=1e-5)


# ------------------------------------------------------------------------------- splice

def spliced(ids, words, features, labels, attention_mask, left):
    """splice() one token at a time."""
    features, rows = list(features), []
    for b in range(len(ids)):
        x, y = [], []
        for t in range(len(ids[b])):
            if not attention_mask[b, t]:
                continue
            if ids[b, t] == IMAGE:
                picture = features.pop(0)
                x += list(picture)
                y += [IGNORE] * len(picture)
            else:
                x.append(words[b, t])
                y.append(int(labels[b, t]))
        rows.append((x, y))
    longest, C = max(len(x) for x, _ in rows), words.shape[-1]
    out = torch.zeros(len(ids), longest, C), torch.full((len(ids), longest), IGNORE), \
        torch.zeros(len(ids), longest, dtype=torch.bool)
    for b, (x, y) in enumerate(rows):
        at = longest - len(x) if left else 0
        for i, (vector, label) in enumerate(zip(x, y)):
            out[0][b, at + i], out[1][b, at + i], out[2][b, at + i] = vector, label, True
    return out


def splice_case(seed):
    """Random rows with none to three pictures of any length, and padding in any place."""
    dice = random.Random(seed)
    B, T = dice.randint(1, 4), dice.randint(2, 9)
    ids = torch.tensor([[dice.randint(0, 50) for _ in range(T)] for _ in range(B)])
    for b in range(B):
        for t in dice.sample(range(T), dice.randint(0, min(3, T))):
            ids[b, t] = IMAGE
    attention_mask = torch.tensor([[dice.random() < .8 for _ in range(T)] for _ in range(B)])
    attention_mask[0, 0] = True
    labels = torch.where(torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < .5,
                         ids.clamp(min=0), IGNORE)
    pictures = int(((ids == IMAGE) & attention_mask).sum())
    features = [noise(dice.randint(1, 6), 5, seed=seed + i) for i in range(pictures)]
    return ids, noise(B, T, 5, seed=seed), features, labels, attention_mask


@pytest.mark.parametrize("left", [False, True])
def test_splice_equals_the_loop(left):
    pictures = 0
    for seed in range(150):
        ids, words, features, labels, attention_mask = splice_case(seed)
        pictures += len(features)
        ours = projector.splice(ids, words, features, labels, attention_mask, left)
        for a, b in zip(ours, spliced(ids, words, features, labels, attention_mask, left)):
            assert torch.equal(a, b), seed
    assert pictures > 200
    other = spliced(ids, words, features, labels, attention_mask, not left)               # control
    assert any(not torch.equal(a, b) for a, b in zip(ours, other)) or attention_mask.all()


def test_splice_drawn():
    ids = torch.tensor([[5, IMAGE, 6, 0], [7, 8, 9, IMAGE]])
    attention_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    words = ids[..., None].clamp(min=0).float()
    x, y, there = projector.splice(ids, words, [torch.tensor([[.1], [.2]]), torch.tensor([[.3]])],
                                   ids.clamp(min=0), attention_mask, left=True)
    assert near(x[..., 0], torch.tensor([[5, .1, .2, 6], [7, 8, 9, .3]]))
    assert y.tolist() == [[5, IGNORE, IGNORE, 6], [7, 8, 9, IGNORE]] and there.all()


def test_splice_without_any_picture_is_the_words():
    ids = torch.tensor([[5, 6], [7, 8]])
    words = noise(2, 2, 3)
    x, y, there = projector.splice(ids, words, [])
    assert torch.equal(x, words) and (y == IGNORE).all() and there.all()


@pytest.mark.parametrize("given", [0, 1, 3])
def test_too_few_or_too_many_pictures_names_both_numbers(given):
    ids = torch.tensor([[5, IMAGE, 6], [7, IMAGE, 9]])
    with pytest.raises(data.BadData, match=f"2 <image>.* {given} pictures"):
        projector.splice(ids, noise(2, 3, 4), [noise(2, 4)] * given)


def test_splice_passes_gradients_to_words_and_pictures():
    ids = torch.tensor([[5, IMAGE, 6]])
    words, picture = noise(1, 3, 4).requires_grad_(), noise(2, 4).requires_grad_()
    projector.splice(ids, words, [picture])[0].sum().backward()
    assert picture.grad.eq(1).all() and words.grad.sum(-1).tolist() == [[4, 0, 4]]


# ------------------------------------------------------------------------------- losses

def test_contrastive_loss_by_hand():
    # pictures 0, 1; texts 0, 1, 2. Text 2 is true of picture 0 as well, though it stands with 1.
    scores = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0]])
    truth = torch.tensor([[True, False, True], [False, True, True]])
    pairs = torch.tensor([[0, 0], [1, 1], [1, 2]])
    e = math.exp
    to_text = [math.log(e(2) + e(1)) - 2, math.log(e(3) + e(0)) - 3, math.log(e(1) + e(0)) - 1]
    to_picture = [math.log(e(2) + e(0)) - 2, math.log(e(3) + e(1)) - 3, math.log(e(1)) - 1]
    by_hand = (sum(to_text) / 3 + sum(to_picture) / 3) / 2
    assert float(clip.contrastive_loss(scores, truth, pairs)) == pytest.approx(by_hand, abs=1e-6)
    naive = torch.tensor([[True, False, False], [False, True, True]])
    assert float(clip.contrastive_loss(scores, naive, pairs)) > by_hand + .1    # control


def test_a_text_that_is_also_true_is_not_pushed_away():
    scores = noise(2, 3).requires_grad_()
    pairs = torch.tensor([[0, 0], [1, 1], [1, 2]])
    for also, pushed in ((True, False), (False, True)):
        truth = torch.tensor([[True, False, also], [False, True, True]])
        grad, = torch.autograd.grad(clip.contrastive_loss(scores, truth, pairs), scores)
        assert (float(grad[0, 2]) > 1e-4) == pushed
        assert grad[0, 0] < 0 and grad[1, 1] < 0                # the right ones are pulled


def test_contrastive_loss_is_clips_when_nothing_else_is_true():
    scores, diagonal = noise(5, 5), torch.eye(5, dtype=torch.bool)
    pairs = torch.arange(5)[:, None].expand(-1, 2)
    target, entropy = torch.arange(5), torch.nn.functional.cross_entropy
    expected = (entropy(scores, target) + entropy(scores.T, target)) / 2
    assert near(clip.contrastive_loss(scores, diagonal, pairs), expected)


def test_late_score_is_the_best_patch():
    patches, phrases = noise(2, 3, 4), noise(5, 4, seed=1)
    by_hand = torch.tensor([[max(float(p @ t) for p in picture) for t in phrases]
                            for picture in patches])
    assert near(clip.filip_scores(patches, phrases), by_hand)


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    eye = clip.ViT(clip.Config(width=16, depth=3, heads=2, mlp=24, image_size=16, patch_size=8))
    return projector.VLM(eye, "mlp", llama.Llama(TINY), tokenizer=None)


BATCH = torch.tensor([[1, IMAGE, 5, 6, 7, 2], [1, 8, IMAGE, 9, 2, 0]])
LABELS = torch.tensor([[IGNORE, IGNORE, IGNORE, 6, 7, 2], [IGNORE, 8, IGNORE, 9, 2, IGNORE]])
KEEP = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()


def test_loss_on_supervised_rows_equals_the_loss_from_all_logits(vlm):
    pixels = noise(2, 3, 16, 16)
    x, labels, _ = vlm.embed(BATCH, pixels, LABELS, KEEP)
    logits = vlm.llm(x)
    rows = [(b, t) for b in range(2) for t in range(1, labels.shape[1]) if labels[b, t] != IGNORE]
    assert len(rows) == 6
    by_hand = torch.stack([logits[b, t - 1].logsumexp(0) - logits[b, t - 1, labels[b, t]]
                           for b, t in rows]).mean()
    loss = vlm.loss(BATCH, LABELS, pixels, KEEP)
    assert near(loss, by_hand)
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert not near(loss, unshifted, 1e-3)                                      # control
    assert not near(loss, vlm.loss(BATCH, LABELS, -pixels, KEEP), 1e-4)         # it looks


def test_padding_changes_neither_loss_nor_gradient(vlm):
    pixels = noise(2, 3, 16, 16)
    more = torch.full((2, 3), 11)
    losses = [vlm.loss(BATCH, LABELS, pixels, KEEP),
              vlm.loss(torch.cat((BATCH, more), 1), torch.cat((LABELS, more * 0 + IGNORE), 1),
                       pixels, torch.cat((KEEP, more > 99), 1))]
    grads = [torch.autograd.grad(loss, vlm.projector.first.weight)[0] for loss in losses]
    assert near(*losses) and near(*grads) and grads[0].abs().max() > 1e-4


def test_a_batch_with_nothing_to_train_on_raises(vlm):
    for labels in (torch.full_like(BATCH, IGNORE), LABELS.new_full((2, 6), IGNORE).index_fill_(
            1, torch.tensor([0]), 1)):          # the first token is predicted from nothing
        with pytest.raises(data.BadData, match="nothing to train on"):
            vlm.loss(BATCH, labels, noise(2, 3, 16, 16))


def test_text_without_a_picture_has_a_loss(vlm):
    ids = BATCH.where(BATCH != IMAGE, 3)
    assert vlm.loss(ids, LABELS).isfinite() and vlm(ids).shape == (2, 6, 60)


def test_a_frozen_eye_builds_no_graph_and_the_bridge_still_learns(vlm):
    vlm.vision.requires_grad_(False)
    try:
        vlm.zero_grad()
        vlm.loss(BATCH, LABELS, noise(2, 3, 16, 16), KEEP).backward()
        assert all(p.grad is None for p in vlm.vision.parameters())
        assert all(p.grad.abs().max() > 0 for p in vlm.projector.parameters())
    finally:
        vlm.vision.requires_grad_(True)


def test_linear_cross_entropy_with_weights_is_the_weighted_sum():
    x, head, labels = noise(4, 8), noise(10, 8, seed=1), torch.tensor([1, 9, 0, 3])
    each = torch.nn.functional.cross_entropy(x @ head.T, labels, reduction="none")
    w = torch.tensor([1.0, 0, .5, 2])
    assert near(kernels.linear_cross_entropy(x, head, labels), each.mean())
    assert near(kernels.linear_cross_entropy(x, head, labels, w), (each * w).sum())


@pytest.mark.parametrize("tied", [False, True])
def test_growing_keeps_the_old_rows_and_averages_the_new(tied):
    torch.manual_seed(1)
    model = llama.Llama(llama.Config(**{**vars(TINY), "tie_embeddings": tied}))
    ids, old = torch.tensor([[3, 4, 5]]), model.embed.weight.detach().clone()
    before = model(ids)
    model.resize_embeddings(64)
    assert near(model(ids)[..., :60], before) and model.config.vocab == 64
    assert near(model.embed.weight[60:], old.mean(0).expand(4, -1))
    assert (model.head.weight is model.embed.weight) == tied


# ------------------------------------------------------------------------------- start_copying

def looks_back(model, head, delta, monkeypatch, T=24):
    """Share of positions at which this head of layer 0 attends most to `delta` tokens back."""
    caught = []
    real = llama.self_attention
    monkeypatch.setattr(llama, "self_attention",
                        lambda q, k, v, *a, **o: (caught.append((q, k)), real(q, k, v, *a, **o))[1])
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab, (8, T),
                            generator=torch.Generator().manual_seed(2)))
    monkeypatch.undo()
    q, k = caught[0]
    scores = q[:, :, head] @ k[:, :, head * k.shape[2] // q.shape[2]].transpose(1, 2)
    seen = scores.masked_fill(~visible(kernels.causal, T, T), -torch.inf).softmax(-1)
    hit = seen.argmax(-1)[:, delta:] == torch.arange(T - delta)
    return float(hit.float().mean()), float(seen.diagonal(-delta, 1, 2).mean())


@pytest.fixture(scope="module")
def copier():
    """The shape of the toy's language model, which start_copying is written for."""
    torch.manual_seed(0)
    return llama.Llama(llama.Config(300, 128, 5, 4, 4, 64, 1e-5, 1e5, 1024))


@pytest.mark.parametrize("head, delta", [(0, 1), (1, 2), (2, 3)])
def test_start_copying_makes_heads_that_look_one_to_three_back(copier, monkeypatch, head, delta):
    model = llama.Llama(copier.config)
    init_induction_heads(model)
    for at in range(5):
        share, weight = looks_back(model, head, at, monkeypatch)
        assert (share > .55 and weight > .55) if at == delta else (share < .3 and weight < .3)
        assert looks_back(copier, head, at, monkeypatch)[1] < .3                # control: plain


def test_start_copying_depends_on_its_seed_alone(copier):
    made = []
    for junk, seed in ((1, 0), (2, 0), (3, 1)):
        torch.manual_seed(junk)
        model = llama.Llama(copier.config)
        init_induction_heads(model, seed)
        made.append(model.state_dict())
    assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])
    assert not torch.equal(made[0]["embed.weight"], made[2]["embed.weight"])
