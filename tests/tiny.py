"""Tiny models and tokenizers for tests, and how closeness to another library is measured."""
import json

import torch

import clip
import data
import llama
from kernels.attention import visible
from toy.parts import llama_tokenizer
from toy.world import SIDE

LIMIT = 1e-5            # of the largest value, in fp32


def shaken(model, seed=0):
    """Weights large enough that every part matters; the libraries' own are almost silent."""
    dice = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        with torch.no_grad():
            p.normal_(0, p.shape[-1] ** -.5 if p.dim() > 1 else .1, generator=dice)
            if p.dim() == 1 and "norm" in name and "weight" in name:
                p.add_(1)
    return model.eval()


def gap(ours, theirs):
    """Largest difference, in units of the largest value."""
    assert ours.shape == theirs.shape and theirs.isfinite().all() and theirs.abs().max() > .01
    return float((ours - theirs).abs().max() / theirs.abs().max())


def loaded(kind, folder):
    """A model of transformers, which must have found a home for every tensor and no gap."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model.eval()


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def span_errors(rule, sides, size=9):
    """Every block of positions: what is True outside first .. last or False in inner .. outer."""
    wrong = 0
    for n in range(size + 1):
        seen = visible(rule, size, size, n)
        for matrix, span in zip((seen, seen.T), sides):
            for lo in range(size):
                for hi in range(lo + 1, size + 1):
                    first, last, inner, outer = span(lo, hi, n, size)
                    block = matrix[lo:hi]
                    wrong += int(block[:, :max(first, 0)].sum() + block[:, max(last, 0):].sum())
                    wrong += int((~block[:, max(inner, 0):max(outer, 0)]).sum())
    return wrong


def edit(folder, *path, **values):
    """Change config.json of a folder, inside the nested object that `path` leads to."""
    file = folder / "config.json"
    inner = config = json.loads(file.read_text())
    for key in path:
        inner = inner[key]
    inner.update(values)
    file.write_text(json.dumps(config))


def write_words(folder):
    """A tokenizer of 110 tokens in LLaMA's manner: one character each, and special tokens."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(33, 127))]
    tokens += [f"<{i}>" for i in range(110 - len(tokens))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": t, "special": True, **flags}
                         for i, t in enumerate(tokens[:3])],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                          "split": False},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                    "split": False},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False,
                  "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "add_bos_token": True,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>",
        "model_max_length": 128, "padding_side": "right"}))


def write_parts(folder):
    """A CLIP and a LLaMA that know nothing and are very small, for runs of the toy's stages."""
    torch.manual_seed(1)
    (folder / "llama").mkdir()
    llama_tokenizer(folder / "llama")
    rows = -(-len(data.Tokenizer(folder / "llama")) // 64) * 64
    llama.Llama(llama.Config(rows, 32, 2, 2, 1, 64, 1e-5, 1e4, 1024)
                ).save_pretrained(folder / "llama")
    clip.CLIP(clip.Config(32, 2, 2, 64, image_size=SIDE, patch_size=16),
              clip.Config(32, 1, 2, 64, vocab=20, context=8, eos_id=19), 16
              ).save_pretrained(folder / "clip")
    return folder
