"""BLIP-2's second stage with an OPT and with a FlanT5: what is trained on, what trains, the plan.

The toy world and its CLIP, a random Q-Former, and random tiny language models.
"""
import json

import pytest
import torch
import transformers
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import data
import projector
import train
from formats.checkpoints import load_weights
from formats.errors import UsageError
from llms.opt import Opt
from llms.t5 import T5
from test_blip2_llms import byte_words, piece_words, their_model
from trainer import stacks
from trainer.forecast import activation_bytes, flops_per_sample, meta_model
from trainer.machine import prepare
from trainer.samples import lesson, split_caption

PLAN = "--recipe blip2 --stage 2 --plan --base 7b"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a language model alone}"""
    root = tmp_path_factory.mktemp("language-models")
    for kind, words, more in (("opt", byte_words, {"max_position_embeddings": 512}),
                              ("t5", piece_words, {})):
        their_model(kind, **more).language_model.save_pretrained(root / kind)
        words(root / kind, None)
    first = train.build_blip2_stage1(train.parse_args(["--recipe", "blip2", "--stage", "1"]))
    first.save_pretrained(root / "stage1")          # before its first step
    return {name: root / name for name in ("opt", "t5", "stage1")}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """What the toy's runs write down of four scenes takes longer than three steps."""
    monkeypatch.setattr(train, "generate", lambda *a, **more: iter((5, 6, 7)))


def run(out, folders, kind, *more):
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    try:
        return train.main(train.parse_args([
            "--recipe", "blip2", "--stage", "2", "--from", str(folders["stage1"]), "--llm",
            str(folders[kind]), "--steps", "3", "--batch", "4", "--caption-style", "short",
            "--output-dir", str(out), "--device", "cpu", *more]))
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------ the training

@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2(folders, tmp_path, kind):
    """The language model is frozen to the bit, the rest moves; packing changes nothing; a run that
    is resumed ends with the same bits; the model loads, and knows its template."""
    assert run(tmp_path / "a", folders, kind) == 0
    weights, before = load_weights(tmp_path / "a/model"), load_weights(folders[kind])
    for name in before:
        now = weights[f"language_model.{name}"]
        assert torch.equal(now[:len(before[name])], before[name])
    model = projector.VLM.from_pretrained(tmp_path / "a/model")
    assert model.template == f"blip2_{kind}" and model.llm.kind == kind
    assert model.stop_ids == {5 if kind == "opt" else 1}    # OPT's newline: what it was taught
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["stage_row"]["template"] == f"blip2_{kind}"
    losses = [json.loads(row)["loss"] for row in (tmp_path / "a/metrics.jsonl").open()]
    assert len(losses) == 3 and len(set(losses)) == 3

    assert run(tmp_path / "b", folders, kind, "--pack", "256") == 0
    packed = [json.loads(row)["loss"] for row in (tmp_path / "b/metrics.jsonl").open()]
    assert packed == pytest.approx(losses, rel=1e-4)

    # step 2 was saved; the run goes on from there
    (tmp_path / "c").mkdir()
    assert run(tmp_path / "c", folders, kind, "--save-every", "2") == 0
    (tmp_path / "c/model/config.json").unlink()
    for file in (tmp_path / "c/model").iterdir():
        file.unlink()
    (tmp_path / "c/model").rmdir()
    for file in (tmp_path / "c/step-000003").iterdir():
        file.unlink()
    (tmp_path / "c/step-000003").rmdir()
    assert run(tmp_path / "c", folders, kind, "--save-every", "2", "--resume", "auto") == 0
    again = load_weights(tmp_path / "c/model")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    start = load_weights(folders["stage1"])
    assert not torch.equal(weights["query_tokens"], start["query_tokens"])


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_in_bf16_and_recomputed(folders, tmp_path, kind):
    """Under autocast, with each policy: the losses are near, and equal where the numbers are."""
    losses = {}
    for flags in (("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "bf16", "--checkpoint",
                                                            "full")):
        out = tmp_path / "-".join(flags).strip("-")
        assert run(out, folders, kind, "--steps", "2", *flags) == 0
        losses[flags] = [json.loads(row)["loss"] for row in (out / "metrics.jsonl").open()]
    exact, half, recomputed = losses.values()
    assert half == pytest.approx(exact, rel=.05) and half != exact
    assert recomputed == pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("recipe, more", [("llava-1.5", ()), ("minigpt4", ("--qformer", "x"))])
def test_other_recipes_refuse_them_before_they_are_loaded(folders, tmp_path, recipe, more):
    (tmp_path / "llm").mkdir()
    config = (folders["opt"] / "config.json").read_text()
    (tmp_path / "llm/config.json").write_text(config)               # and no weights
    args = train.parse_args(["--recipe", recipe, "--stage", "1", "--llm", str(tmp_path / "llm"),
                             "--from", "none", *more])
    with pytest.raises(UsageError, match="'opt'.*blip2_opt") as info:
        train.make_job(args, tmp_path / "out", "cpu")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_show_batch(folders, tmp_path, capsys, kind):
    assert run(tmp_path, folders, kind, "--show-batch", "1") == 0
    out = capsys.readouterr().out
    assert ("[</s>]" in out.split("<image>")[1][:8]) == (kind == "opt")
    if kind == "t5":
        prefix, suffix = out.split("</s> [")[0], out.split("</s> [")[1]
        assert "[" not in prefix.split("<image>")[1] and suffix.rstrip().endswith("[</s>]")


# ---------------------------------------------------------------------------------------- the text

def test_a_caption_is_cut_between_the_first_word_and_the_middle():
    words = [f"w{i}" for i in range(9)]
    cuts = set()
    for draw in range(200):
        prefix, rest = split_caption(" ".join(words), draw)
        assert f"{prefix} {rest}".split() == words
        cuts.add(len(prefix.split()))
    assert cuts == {1, 2, 3, 4}
    assert split_caption("one", 0) == ("", "one") and split_caption("a b", 3) == ("a", "b")
    # the same sample is cut in the same place again, another epoch's elsewhere
    assert split_caption(" ".join(words), "0-5") == split_caption(" ".join(words), "0-5")
    assert len({split_caption(" ".join(words), f"0-{i}") for i in range(20)}) > 1


def test_the_lesson_of_a_flan_t5(folders):
    sample = {"id": 1, "image": "x.png", "conversations": [
        {"from": "human", "value": "<image>\nDescribe it"},
        {"from": "gpt", "value": "A Cat, on: a mat."}]}
    human, gpt = lesson(sample, "blip2_t5", "0-1")
    assert human["value"].startswith("<image>\n") and "Describe" not in human["value"]
    whole = human["value"].removeprefix("<image>\n") + " " + gpt["value"]
    assert whole == "a cat, on a mat"                   # cleaned, as web captions are
    tokenizer = data.Tokenizer(folders["t5"])
    ids, labels = data.encode([human, gpt], "blip2_t5", tokenizer)
    assert ids[0] == data.IMAGE and ids.count(1) == 2 == 1 + labels.count(1)
    assert [i for i, label in zip(ids, labels) if label != data.IGNORE] == (
        tokenizer.encode(gpt["value"], bos=False) + [1])


# ---------------------------------------------------------------------------------------- the plan

SIZES = {"facebook/opt-2.7b": 2_651_596_800, "facebook/opt-6.7b": 6_658_473_984,
         "google/flan-t5-xl": 2_849_757_184, "google/flan-t5-xxl": 11_135_332_352}


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_knows_the_published_sizes(name, capsys):
    args = train.parse_args([*PLAN.split(), "--llm", name])
    prepare(args, train.set_trainable)
    assert args.row.template == ("blip2_opt" if "opt" in name else "blip2_t5")
    train.print_plan(args, train.set_trainable)
    out = capsys.readouterr().out
    assert f"{SIZES[name] / 1e6:,.1f} M" in out and "fits into" in out
    assert "150,000 steps" in out               # of 1,024: as many as 80,000 of 1,920, the paper's
    model = meta_model(args, train.set_trainable)
    assert sum(p.numel() for p in model.llm.parameters()) == SIZES[name]
    # transformers' own count
    if "opt" in name:
        config = transformers.OPTConfig(
            hidden_size=model.llm.config.width, ffn_dim=model.llm.config.mlp, num_hidden_layers=32,
            num_attention_heads=32)
        make = transformers.OPTForCausalLM
    else:
        c = model.llm.config
        config = transformers.T5Config(
            d_model=c.width, d_ff=c.mlp, num_layers=24, num_heads=c.heads, vocab_size=32128,
            feed_forward_proj="gated-gelu")
        make = transformers.T5ForConditionalGeneration
    with torch.device("meta"):
        theirs = make(config)
    count = sum(p.numel() for p in theirs.parameters())
    if "t5" in name and theirs.lm_head.weight is theirs.shared.weight:
        count += theirs.lm_head.weight.numel()          # FlanT5's is a head of its own
    assert count == SIZES[name]


@pytest.mark.parametrize("changes, words", [
    ({"activation_function": "gelu"}, "activation_function"), ({"model_type": "bart"}, "'bart'")])
def test_language_models_that_are_refused(folders, tmp_path, changes, words):
    """Before memory is taken: the folder has no weights."""
    config = json.loads((folders["opt"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    (tmp_path / "tokenizer.json").write_bytes((folders["opt"] / "tokenizer.json").read_bytes())
    with pytest.raises(data.BadModel, match=words) as info:
        run(tmp_path / "out", {**folders, "other": tmp_path}, "other")
    assert "\n" not in str(info.value)


def test_a_folder_is_planned_by_its_config(folders, capsys):
    args = train.parse_args([*PLAN.split(), "--llm", str(folders["t5"])])
    prepare(args, train.set_trainable)
    train.print_plan(args, train.set_trainable)
    assert args.row.template == "blip2_t5" and "llm" in capsys.readouterr().out
    args = train.parse_args([*PLAN.split(), "--llm", "someone/unknown"])
    prepare(args, train.set_trainable)
    with pytest.raises(UsageError, match="someone/unknown is no folder"):
        train.print_plan(args, train.set_trainable)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_flops_are_those_of_the_products(folders, kind):
    """Against PyTorch's own counter, of one sample's forward in the language model."""
    llm = {"opt": Opt, "t5": T5}[kind].from_pretrained(folders[kind])
    S, T = 12, 9
    x = torch.randn(1, S, 32)
    # the counter does not see fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if kind == "t5":
            llm(x, torch.ones(1, T, dtype=torch.long))
        else:
            llm(torch.randn(1, S + T, 32))

    class Model:                        # what the forecast asks of a VLM
        def num_image_tokens(self):
            return 0
    model = Model()
    args = train.parse_args([*PLAN.split(), "--llm", str(folders[kind])])
    whole = meta_model(args, train.set_trainable)
    model.llm, model.vision, model.patches, model.projector = (
        whole.llm, whole.vision, 1, torch.nn.Linear(1, 1, bias=False))
    forward = flops_per_sample(model)(S + T, T, 0)[0]
    head = 2 * 32 * 96 * (S * (kind == "opt"))          # the counter ran it on the whole row
    # attention of a causal stack is half of what PyTorch computes
    causal = sum(2 * n * n * 4 * llm.config.head_dim * stack.depth
                 for stack in stacks.stacks(llm) if stack.causal
                 for n in [stack.tokens(S + T, T)])
    assert forward + head + causal == counter.get_total_flops()


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_memory_grows_with_the_tokens_that_are_read(folders, kind):
    args = train.parse_args([*PLAN.split(), "--llm", str(folders[kind])])
    model = meta_model(args, train.set_trainable)
    for policy in ("none", "attention", "full", None):
        few, many = (activation_bytes(model, n, n // 2, 1, policy)[0] for n in (1000, 2000))
        assert few < many < 2 * few + 1
