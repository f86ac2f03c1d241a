"""--lora R --quantize int4: gradients beside a dense layer's, what is kept, what is saved."""

import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import llama
import projector
import train
from test_plan import asked, kept_for_backward, model_of, tiny
from test_train import flags, here, parts, run, server, sha, unchanged_process  # noqa: F401
from tiny import gap, LIMIT, shaken
from kernels import quantize
from kernels.quantize import encode, frozen_linear, written_in, written_out
from train import parse_args as parse
from trainer import qlora
from trainer.forecast import (activation_bytes, choose_row_and_policy, flops_per_sample,
                              static_bytes, usable_bytes)
from trainer.lengths import MIXED
from trainer.lora import add_lora, LoRALinear, merge_lora
from trainer.qlora import add_additions, code_bytes, coded_weights, QLoRALinear, weights_in

QLORA = "--lora", 4, "--quantize", "int4"


def lora_of(kind, bits=4, rank=4):
    """A tiny LLaMA with LoRA that does something beside frozen weights: "coded", "dense" (what the
    codes stand for) or "before" (what was coded)."""
    model = shaken(llama.Llama(llama.Config(110, 64, 2, 4, 2, 172)))
    if kind == "dense":
        for block in model.blocks:
            for name in ("qkv", "out", "gate_up", "down"):
                weight = getattr(block, name).weight
                weight.data = written_out(*encode(weight.data, bits))[:, :weight.shape[1]]
    make = LoRALinear
    if kind == "coded":
        make = lambda *args: QLoRALinear(*args, bits=bits)
    add_lora(model, rank, kind=make)
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            p.data.normal_(0, .1, generator=torch.Generator().manual_seed(len(name)))
    return model


def gradients(model, ids, fast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        loss = model(ids).float().logsumexp(-1).square().mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, loss.detach()


IDS = torch.arange(5, 65).view(2, 30)


# ---------------------------------------------------------------------------- forward and backward

@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(64, 128), (1500, 128), (40, 300), (7, 5)], ids=str)
def test_the_gradient_of_x_is_that_of_a_dense_layer(bits, shape):
    """In fp32 to its last bits, in fp64 the same. Control: one code that is another."""
    dice = torch.Generator().manual_seed(0)
    codes, scales = encode(torch.randn(shape, generator=dice), bits)
    dense = written_out(codes, scales)[:, :shape[1]]
    assert torch.equal(written_in(codes, scales, shape[1], torch.float32), dense)
    x = torch.randn(3, 2, shape[1], generator=dice, requires_grad=True)
    dy = torch.randn(3, 2, shape[0], generator=dice)
    y = frozen_linear(x, codes, scales)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = F.linear(x.double(), dense.double())
    assert gap(y.detach().double(), exact.detach()) < 1e-6
    assert gap(dx.double(), dy.double() @ dense.double()) < 1e-6
    codes[-1, 0] ^= 3
    (other,) = torch.autograd.grad(frozen_linear(x, codes, scales), x, dy)
    assert gap(other, dx) > 1e-4


def test_nothing_is_kept_but_the_codes():
    """No x, no written weight: of a frozen layer backward needs neither."""
    codes, scales = encode(torch.randn(64, 256), 4)
    x, kept = torch.randn(5, 256, requires_grad=True), []

    def pack(t):
        kept.append(t)
        return t
    with saved_tensors_hooks(pack, lambda t: t):
        frozen_linear(x, codes, scales)
        assert [t.data_ptr() for t in kept] == [codes.data_ptr(), scales.data_ptr()]
        kept.clear()
        F.linear(x, written_in(codes, scales, 256, torch.float32))          # control
        assert any(t.numel() == 64 * 256 for t in kept)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "autocast"])
def test_gradients_of_lora_are_those_beside_the_dense_weights(bits, fast):
    """To the last bits of fp32; beside the weights from before coding they are others."""
    found, loss = gradients(lora_of("coded", bits), IDS, fast)
    dense, dense_loss = gradients(lora_of("dense", bits), IDS, fast)
    before = gradients(lora_of("before"), IDS, fast)[0]
    names = [n for n in dense if n.endswith((".a", ".b"))]
    assert len(names) == 2 * 4 * 2 and found.keys() == dense.keys()
    limit = LIMIT if not fast else 2e-2             # bf16 rounds 8 bits, in other places
    for name in names:
        assert gap(found[name], dense[name]) <= limit, name
        assert gap(before[name], dense[name]) > 5 * LIMIT, name
    assert float((loss - dense_loss).abs()) <= limit * float(dense_loss)


def test_a_wrong_backward_is_seen(monkeypatch):
    """Controls: scales of other groups in backward, or the weight of the layer before."""
    dense = gradients(lora_of("dense"), IDS)[0]
    right, calls = quantize.written_in, []

    def wrong(codes, scales, C, dtype):
        calls.append(1)
        if len(calls) % 2:
            return right(codes, scales, C, dtype)
        return right(codes, scales.flip(0), C, dtype) * 1.001
    monkeypatch.setattr(quantize, "written_in", wrong)
    found = gradients(lora_of("coded"), IDS)[0]
    assert max(gap(found[n], dense[n]) for n in dense if n.endswith(".a")) > 10 * LIMIT


def test_policies_of_checkpoint_change_no_bit():
    ends = []
    for policy in (None, "none", "attention", "full"):
        model = lora_of("coded")
        model.checkpoint = policy
        ends.append(gradients(model, IDS)[0])
    for other in ends[1:]:
        assert all(torch.equal(ends[0][n], other[n]) for n in ends[0])


def test_only_the_additions_are_parameters():
    model = lora_of("coded")
    for block in model.blocks:
        for layer in (block.qkv, block.out, block.gate_up, block.down):
            assert {n for n, _ in layer.named_parameters()} == {"a", "b"}
            assert layer.codes.dtype == torch.uint8 and not layer.codes.requires_grad
    plain = lora_of("before")
    assert weights_in(model) == sum(p.numel() for p in plain.parameters())
    frozen = sum(p.numel() for n, p in plain.named_parameters()
                 if "blocks" in n and p.dim() > 1 and not n.endswith((".a", ".b")))
    assert coded_weights(model) == frozen and coded_weights(plain) == code_bytes(plain) == 0


# ---------------------------------------------------------------------------------- what is saved

def test_merged_is_what_was_trained_and_not_the_start_with_an_addition(tmp_path):
    model, start = lora_of("coded"), lora_of("before")
    with torch.no_grad():
        trained = model(IDS)
        assert {n for n, _ in merge_lora(model).named_parameters()} == {
            n for n, _ in llama.Llama(model.config).named_parameters()}
        assert gap(model(IDS), trained) <= LIMIT
        assert gap(merge_lora(start)(IDS), trained) > 100 * LIMIT               # control
    model.save_pretrained(tmp_path)
    assert gap(llama.Llama.from_pretrained(tmp_path)(IDS).detach(), trained) <= LIMIT


def test_a_stopped_run_ends_with_the_same_bits(flags, run, tmp_path):           # noqa: F811
    """Resumed it codes the same weights again; int8, LoRA alone and another seed end elsewhere."""
    argv = lambda name, *more: flags(tmp_path / name, *QLORA, *more)
    assert run(argv("whole")).code == 0
    assert run(argv("cut"), signal=(3, signal.SIGTERM)).code == 143
    stopped = run(argv("cut", "--resume", "auto"))
    assert stopped.code == 0 and "written out" in stopped.out
    assert run(argv("int8", "--quantize", "int8")).code == 0
    plain = run(flags(tmp_path / "dense", *QLORA[:2]))
    assert plain.code == 0 and "written out" not in plain.out
    assert sha(tmp_path / "cut") == sha(tmp_path / "whole")
    assert len({sha(tmp_path / name) for name in ("whole", "int8", "dense")}) == 3
    refused = run(argv("whole", "--quantize", "int8", "--resume", "auto"))
    assert refused.code == 3 and "--quantize" in refused.err
    # a checkpoint holds the additions alone, and the model is one like any other
    saved = load_file(tmp_path / "whole/step-000006/trained.safetensors")
    assert all(n.startswith("projector.") or n.endswith((".a", ".b")) for n in saved)
    model = projector.VLM.from_pretrained(tmp_path / "whole/model")
    assert not coded_weights(model)


def test_with_eight_bit_states_in_bf16_too(flags, tmp_path):                    # noqa: F811
    argv = flags(tmp_path / "run", *QLORA, "--optimizer", "adamw8", "--clip", 0, "--pack", 256,
                 "--checkpoint", "attention", "--offload-optimizer", steps=2)
    assert here(argv) == 0
    assert {x.dtype for x in load_file(tmp_path / "run/model/model.safetensors").values()} == {
        torch.bfloat16}


@pytest.mark.parametrize("argv, words", [
    (["--quantize", "int4"], "--lora"), (["--lora", "4", "--quantize", "int2"], "int2"),
    (["--stage", "1", "--lora", "4", "--quantize", "int4"], "stage 2")])
def test_flags_that_do_not_go_together(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--stage", "2", *argv])
    err = capsys.readouterr().err
    assert left.value.code == 2 and words in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------ the forecast

def test_bytes_and_flops_of_7b():
    """6.476 G weights in codes: half a byte and 4 bytes of step and lowest for 32 of them."""
    args, plain = asked("--lora", 128, "--quantize", "int4"), asked("--lora", 128)
    model, dense = model_of(args), model_of(plain)
    blocks = 32 * (4096 * 12288 + 4096 * 4096 + 4096 * 22016 + 11008 * 4096)
    assert coded_weights(model) == blocks and code_bytes(model) == blocks * (.5 + 4 / 32)
    assert code_bytes(model_of(asked("--lora", 128, "--quantize", "int8"))) == (
        blocks + 4 * 32 * (12288 + 4096 + 22016 + 4096))
    less = static_bytes(dense, plain)["weights"] - static_bytes(model, args)["weights"]
    assert less == pytest.approx(blocks * (2 - .5 - 4 / 32))
    assert static_bytes(model, args)["moments"] == static_bytes(dense, plain)["moments"]
    for policy in ("none", "attention", "full"):
        assert flops_per_sample(model)(324, 180, 1, policy) == pytest.approx(
            flops_per_sample(dense)(324, 180, 1, policy), rel=1e-12)
    assert choose_row_and_policy(model, args, MIXED, usable_bytes(12)) is not None
    assert choose_row_and_policy(dense, plain, MIXED, usable_bytes(12)) is None
    # the largest layer is written out for its product: 90 M weights in bf16
    assert qlora.written_out_bytes(model, 2) == 2 * 22016 * 4096
    # each GPU of several holds all codes
    halves = [static_bytes(model, args, gpus)["weights"] - code_bytes(model) for gpus in (1, 2)]
    assert halves[1] == pytest.approx(halves[0] / 2)


@pytest.mark.parametrize("fast", [False, True], ids=["fp32", "autocast"])
def test_bytes_kept_for_backward(fast):
    """As forecast within 4 % under each policy, codes aside, as weights are."""
    model, B, T = tiny(), 3, 90
    add_additions(model.llm, parse(["--stage", "2", *map(str, QLORA)]))
    train.set_trainable(model, ("projector", "llm"), 4)
    for policy in (None, "none", "attention", "full"):
        said = activation_bytes(model, B * (T + 15), B * 40, B, policy, 4, 4 - 2 * fast,
                                kernels=False)[0]
        own = (*model.parameters(), *model.buffers())           # buffers: codes and scales
        kept = kept_for_backward(model, B, T, policy, fast, own)
        assert said == pytest.approx(kept, rel=.04), policy
