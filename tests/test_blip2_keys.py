"""Names and shapes of the published BLIP-2s: tests/keys/blip2/, which our tables cover both ways.

The lists are built from transformers' architectures at the published sizes, not from the files,
which we did not download. Alone: `python tests/test_blip2_keys.py` writes the lists and prints the
parity table of docs/weights.md.
"""
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import projector
from formats import language_models
from formats.checkpoints import check_tensors, expand_names, LAYER
from formats.families import read_vlm_config

KEYS = ROOT / "tests/keys/blip2"
OPT = transformers.OPTConfig, dict(vocab_size=50304, num_hidden_layers=32, num_attention_heads=32,
                                   word_embed_proj_dim=None)
T5 = transformers.T5Config, dict(vocab_size=32128, d_kv=64, num_layers=24, dense_act_fn="gelu",
                                 feed_forward_proj="gated-gelu", tie_word_embeddings=False)
# 50,304 rows: OPT's 50,265 tokens and <image>, in whole blocks of 64
MODELS = {
    "blip2-opt-2.7b": (*OPT, dict(hidden_size=2560, ffn_dim=10240)),
    "blip2-opt-6.7b": (*OPT, dict(hidden_size=4096, ffn_dim=16384)),
    "blip2-flan-t5-xl": (*T5, dict(d_model=2048, d_ff=5120, num_heads=32)),
    "blip2-flan-t5-xxl": (*T5, dict(d_model=4096, d_ff=10240, num_heads=64))}


def their_config(name):
    kind, common, own = MODELS[name]
    return transformers.Blip2Config(vision_config={}, qformer_config={},
                                    text_config=kind(**common, **own))


def their_shapes(name):
    """{name: shape} of the tensors that transformers writes: a tied one is written once."""
    with torch.device("meta"):
        model = transformers.Blip2ForConditionalGeneration(their_config(name))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in list(shapes):
        if re.search(r"(encoder|decoder)\.embed_tokens\.weight$", key) and "t5" in name:
            del shapes[key]
    if "opt" in name:
        del shapes["language_model.lm_head.weight"]
    return shapes


def ranges(shapes):
    """The lines of a list: layers that have a tensor of one name and shape are one line."""
    groups = {}
    for key, shape in shapes.items():
        # the first number is the layer's
        layer = LAYER.search(key)
        pattern = key if layer is None else f"{key[:layer.start()]}{{}}{key[layer.end():]}"
        groups.setdefault((pattern, shape), []).append(None if layer is None else int(layer[0]))
    for (pattern, shape), layers in groups.items():
        size = "x".join(map(str, shape))
        while layers:
            first = last = layers.pop(0)
            step = 1
            if first is not None and layers and layers[0] - first == 2:     # every second layer
                yield f"{pattern.replace('{}', str(first))} {size}"
                continue
            while layers and layers[0] == last + step:
                last = layers.pop(0)
            number = first if first == last else f"{{{first}-{last}}}"
            yield f"{pattern.replace('{}', str(number))} {size}"


def listed(name):
    """{name: shape} of a list."""
    table = {}
    for line in (KEYS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        key, shape = line.split(" ")
        layers = re.search(r"\{(\d+)-(\d+)\}", key)
        span = range(int(layers[1]), int(layers[2]) + 1) if layers else [None]
        for i in span:
            one = key if i is None else key.replace(layers[0], str(i))
            table[one] = tuple(map(int, shape.split("x")))
    return table


class Shapes(dict):
    """Stands in for LazyWeights: {name: shape}."""

    def shape(self, name):
        return self[name]


def ours(name, folder):
    """Our model of these sizes, without memory."""
    (folder / "config.json").write_text(json.dumps(their_config(name).to_dict()))
    family = read_vlm_config(folder, json.loads((folder / "config.json").read_text()))
    if "t5" in name:                # to_dict calls it tied: of files, the head in them decides
        family.llm["tie_embeddings"] = False
    with torch.device("meta"):
        return projector.Blip2.from_family(family, None, "blip2_opt"), family


@pytest.mark.parametrize("name", MODELS)
def test_the_lists_are_what_transformers_has(name):
    assert listed(name) == their_shapes(name)


@pytest.mark.parametrize("name", MODELS)
def test_our_tables_cover_them_both_ways(name, tmp_path):
    model, family = ours(name, tmp_path)
    table, shapes = expand_names(model, model.names()), Shapes(listed(name))
    if family.llm["tie_embeddings"]:
        assert "llm.head.weight" not in table               # it is the embedding
    check_tensors(model, table, shapes)
    used = [part for parts in table.values() for part in parts]
    assert len(used) == len(set(used)) and set(used) == shapes.keys()
    # control: one shape that is wrong, one name that is missing
    key = next(key for key in shapes if "mlp" in key)
    for wrong in ({**shapes, key: (1, 1)}, {k: v for k, v in shapes.items() if k != key}):
        with pytest.raises(projector.data.BadModel, match=re.escape(key)):
            check_tensors(model, table, Shapes(wrong))


def test_what_old_files_hold_besides(tmp_path):
    """Duplicates of tied tensors, and T5's bias that no layer uses: left out, for a reason."""
    weights = {"language_model.shared.weight": torch.ones(3, 2),
               "language_model.lm_head.weight": torch.zeros(3, 2)}
    sizes = {"tie_embeddings": False}
    _, ignore, sizes = language_models.choose_head("t5", sizes, weights, "language_model.")
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.block.0."
                "layer.1.EncDecAttention.relative_attention_bias.weight"):
        assert any(re.fullmatch(p, f"language_model.{key}") for p in ignore)
    for key in ("encoder.embed_tokens.bias", "decoder.block.1.layer.1.EncDecAttention."
                "relative_attention_bias.weight", "lm_head.weight"):
        assert not any(re.fullmatch(p, f"language_model.{key}") for p in ignore)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_docs(name):
    text = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    told = re.search(rf"^\| `{re.escape(name)}` \| (\d+) \| (\d+) \|", text, re.M)
    assert (int(told[1]), int(told[2])) == (len(listed(name)), 0)


def main():
    from test_blip2_llms import (byte_words, piece_words, prompt, QUESTIONS, their_model,
                                 their_prompts)
    from test_qformer_vlm import PIXELS
    from tiny import gap
    import generate
    transformers.logging.set_verbosity_error()
    for name in MODELS:
        lines = [f"# Salesforce/{name}: built from transformers' architecture, not from the files"]
        lines += ranges(their_shapes(name))
        (KEYS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print("| model | keys used | ignored | max difference | greedy tokens |\n|---|---|---|---|---|")
    for kind, words in (("opt", byte_words), ("t5", piece_words)):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            theirs, folder = their_model(kind), Path(folder)
            theirs.save_pretrained(folder)
            words(folder, None)
            model = projector.VLM.from_pretrained(folder)
            inputs, ids = their_prompts(folder, [QUESTIONS[0]], True), prompt(model, QUESTIONS[0])
            more, mine = {}, {}
            if kind == "t5":
                more = {"decoder_input_ids": torch.tensor([[0, 5, 9]])}
                mine = {"decoder_ids": more["decoder_input_ids"]}
            want = theirs(pixel_values=PIXELS[:1], **inputs, **more).logits
            worst = gap(model(torch.tensor([ids]), PIXELS[:1], **mine), want)
            out = theirs.generate(PIXELS[:1], **inputs, max_new_tokens=32, min_new_tokens=32,
                                  eos_token_id=-1)[0, -32:].tolist()
            said = list(generate.generate(model, ids, PIXELS[:1], 32, eos=-1))
            same = sum(a == b for a, b in zip(out, said))
        for name in MODELS:
            if kind in name:
                print(f"| `{name}` | {len(listed(name))} | 0 | {worst:.1e} | {same} of 32 |")


if __name__ == "__main__":
    main()
