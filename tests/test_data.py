"""data.py against records of the official code, hand-made cases, and files damaged on purpose.

The records and the real tokenisers are third-party data that lie outside the project; where they
are missing those tests skip, and the hand-made cases below still check every rule.
"""
import gzip
import io
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
from data import IGNORE, IMAGE
from formats.checkpoints import export, load_into, resolve, save_weights
from formats.errors import Offline, TrainingFailed, UsageError, exit_status
from formats.templates import chat_template
from formats.pictures import picture_path
from formats.strict_json import read_config
from trainer.samples import encode_as_official

SHARED = Path(__file__).parents[2] / "shared"
GOLDENS, REAL = SHARED / "goldens", SHARED / "tokenizers"
needs_goldens = pytest.mark.skipif(not GOLDENS.exists(), reason=f"{GOLDENS} is not here")
needs_real = pytest.mark.skipif(not (REAL / "llama").exists(), reason=f"{REAL} is not here")


def talk(*values):
    return [{"from": "gpt" if i % 2 else "human", "value": v} for i, v in enumerate(values)]


def spec(legacy=False):
    """A LLaMA-like tokenizer.json small enough to read: characters, a few merges, bytes."""
    letters = [chr(c) for c in range(33, 127)]
    merges = [("▁", "U"), ("▁", "A"), ("▁U", "S"), ("U", "S"), ("#", "#"), ("▁", "▁")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters,
              *("".join(m) for m in merges)]
    special = [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False} for i, t in enumerate(tokens[:3])]
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0", "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if legacy else None,
        "pre_tokenizer": None if legacy else
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Sequence", "decoders": [
            back, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {t: i for i, t in enumerate(tokens)},
                  "merges": [list(m) for m in merges]}}


def write_tokenizer(folder, legacy=False, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec(legacy)))
    config = {"legacy": legacy, "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return data.Tokenizer(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {flag: write_tokenizer(root / str(flag), flag) for flag in (False, True)}


@pytest.fixture(scope="module")
def real():
    return {"legacy_false": data.Tokenizer(REAL / "llama"),
            "legacy_true": data.Tokenizer(REAL / "llama-legacy")}


def pieces(tokenizer, ids):
    return ["<image>" if i == IMAGE else tokenizer._lib.id_to_token(i) for i in ids]


def learned(tokenizer, labels):
    return tokenizer._lib.decode([i for i in labels if i != IGNORE], skip_special_tokens=False)


# ------------------------------------------------------------------------------- records

@needs_goldens
@needs_real
def test_text_goldens(real):
    records = json.loads(gzip.open(GOLDENS / "text.json.gz").read())["goldens"]
    seen = {"plain": 0, "warning": 0, "error": 0}
    for r in records:
        what = f"{r['template']} {r['tokenizer']} {r['case']}"
        args = r["conversation"], r["template"], real[r["tokenizer"]], r["has_image"]
        if r.get("error"):
            seen["error"] += 1
            with pytest.raises(data.BadData) as info:
                data.encode(*args)
            assert "\n" not in str(info.value)
            continue
        ids, labels = encode_as_official(*args)
        assert (ids, labels) == (r["input_ids"], r["labels"]), what
        ids, labels = data.encode(*args)
        assert ids == r["input_ids"], what
        if r["warning"]:
            seen["warning"] += 1
            answers = [t["value"] for t in r["conversation"] if t["from"] == "gpt" and t["value"]]
            assert any(l != IGNORE for l in labels) == bool(answers), what
        else:
            seen["plain"] += 1
            assert labels == r["labels"], what
    assert seen["plain"] > 100 and seen["warning"] > 20 and seen["error"] > 20


@needs_goldens
@needs_real
def test_prompt_goldens(real):
    table = json.loads((GOLDENS / "prompts.json").read_text())
    for r in table["prompts"]:
        if r["conv"] not in ("default", "v0"):      # those two carry a worked example we leave out
            assert data.prompt(talk(*r["messages"]), r["conv"]) == r["prompt"], r["conv"]
        for key in set(real) & set(r):
            assert data.prompt_ids(r["prompt"], real[key]) == r[key]
            if r["conv"] not in ("default", "v0"):
                assert (
                    data.prompt_tokens(talk(*r["messages"], None), r["conv"], real[key]) == r[key]
                )
    for r in table["tokenizer_image_token"]:
        for key in real:
            assert data.prompt_ids(r["text"], real[key]) == r[key]


@needs_goldens
def test_image_goldens_to_the_bit():
    table = np.load(GOLDENS / "images.npz")
    assert len(table.files) >= 10
    for key in table.files:
        name, how = key.split("/")
        image = data.load_image(GOLDENS / "images" / f"{name}.png")
        x = data.preprocess(image, int(how[-3:]), how[:-3]).numpy()
        want = table[key].reshape(x.shape)
        assert x.dtype == np.float32, key
        assert np.array_equal(x.view(np.uint32), want.view(np.uint32)), key


@needs_goldens
def test_anyres_goldens():
    for r in json.loads((GOLDENS / "anyres.json").read_text()):
        grid = data.anyres_grid(*r["size"])
        assert [*grid.canvas] == r["best"] and [*grid.tiles] == r["grid_w_h"]
        assert [*grid.unpadded] == r["unpadded_h_w"] and grid.tokens == r["num_image_tokens"]
        x0, y0, x1, y1 = r["content_bbox"]
        assert grid.resized == (x1 - x0, y1 - y0) and (grid.canvas[0] - grid.resized[0]) // 2 == x0


@needs_real
def test_real_tokenizer_equals_the_library(real):
    from tokenizers import Tokenizer
    texts = ["", "Hello", " two", "a  b", "</s>USER", "x</s> y", "é 日本 😀", "\n\nq",
             "def f():\n    pass"]
    for key, folder in (("legacy_false", "llama"), ("legacy_true", "llama-legacy")):
        library = Tokenizer.from_file(str(REAL / folder / "tokenizer.json"))
        for text in texts:
            # the library's Metaspace forgets the prefix where the text opens with a space
            padded = " " * (key == "legacy_false" and text.startswith(" ")) + text
            assert real[key].encode(text) == library.encode(padded).ids, (key, text)
    assert len(real["legacy_true"]) == 32000


# ------------------------------------------------------------------------------- rules by hand

def test_legacy_prefix_rule(tiny):
    text = "A</s>US"
    assert pieces(tiny[False], tiny[False].encode(text)) == ["<s>", "▁A", "</s>", "US"]
    assert pieces(tiny[True], tiny[True].encode(text)) == ["<s>", "▁A", "</s>", "▁US"]
    assert pieces(tiny[False], tiny[False].encode(" A")) == ["<s>", "▁", "▁A"]
    assert tiny[False].added("</s>") == 2 and tiny[False].added("<image>", 9) == 9
    assert tiny[False].encode("") == [1] and tiny[False].encode("", bos=False) == []


def test_the_config_decides_legacy_not_the_file(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "t", legacy=True)
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    changed = data.Tokenizer(tmp_path / "t")
    assert tokenizer.legacy and not changed.legacy
    assert pieces(changed, changed.encode("A</s>US"))[-1] == "US"


def test_special_false_never_yields_control_tokens(tiny):
    for flag in tiny:
        for text in ("</s>", "a<s>b", "<unk></s><s>", "<</s>/s>"):
            ids = tiny[flag].encode(text, bos=False, special=False)
            assert ids and min(ids) > 2 and tiny[flag].decode(ids) == text
            assert min(tiny[flag].encode(text, bos=False)) <= 2     # control: parsed


def test_what_a_user_types_is_not_a_control_token(tiny):
    conversation = talk("<image>\nsay </s><s>", "no", "why</s>", None)
    for flag, tokenizer in tiny.items():
        ids = data.prompt_tokens(conversation, "v1", tokenizer)
        assert ids.count(tokenizer.eos) == 1 and ids.count(tokenizer.bos) == 1
        assert ids.count(IMAGE) == 1
        assert data.prompt_ids(data.prompt(conversation, "v1"), tokenizer).count(tokenizer.eos) == 3


def test_labels_of_v1(tiny):
    for tokenizer in tiny.values():
        ids, labels = data.encode(talk("<image>\nQ one", "A cat", "Q two", "No"), "v1", tokenizer)
        assert ids[0] == 1 and ids.count(IMAGE) == 1 and len(ids) == len(labels)
        assert all(l in (i, IGNORE) for i, l in zip(ids, labels))
        words = "".join(pieces(tokenizer, [l for l in labels if l != IGNORE]))
        assert words == "▁A▁cat</s>▁No</s>"


@pytest.mark.parametrize("template, want", [
    ("v1", "▁yes</s>"), ("llava_v1", "▁yes</s>"), ("vicuna_v1", "▁yes</s>"),
    ("v1_mmtag", "▁yes</s>"), ("mistral_instruct", "▁yes▁</s>"), ("llava_llama_2", "▁yes▁</s>"),
    ("llama_2", "▁yes▁</s>"), ("mpt", "yes<|im_end|>"), ("chatml_direct", "yes<|im_end|>"),
    ("plain", "▁yes<0x0A>"), ("v0", "######▁Assistant:▁yes<0x0A>###▁"),
    ("v0_mmtag", "######▁Assistant:▁yes<0x0A>###▁")])
def test_what_each_template_learns(tiny, template, want):
    for tokenizer in tiny.values():
        ids, labels = data.encode(talk("<image>\nok?", "yes"), template, tokenizer)
        assert "".join(pieces(tokenizer, [l for l in labels if l != IGNORE])) == want
        assert ids.count(IMAGE) == 1


def test_the_picture_comes_first_and_once(tiny):
    t = tiny[False]
    first = data.encode(talk("<image>\nQ", "a"), "v1", t)
    for value in ("Q\n<image>", "<image>Q<image>", "  <image> Q  "):
        assert data.encode(talk(value, "a"), "v1", t) == first
    assert IMAGE not in data.encode(talk("<image>\nQ", "a"), "v1", t, has_image=False)[0]
    assert data.encode(talk("a", "b", "<image>", "d"), "v1", t)[0].count(IMAGE) == 1
    assert data.prompt_ids("a<image>\n", t)[-3:] == [IMAGE, *t.encode("\n", bos=False)]


def test_samples_the_official_code_drops_in_silence(tiny):
    for tokenizer in tiny.values():
        bad = talk("Q", "say </s> now")
        assert learned(tokenizer, data.encode(bad, "v1", tokenizer, False)[1]).count("</s>") == 2
        assert set(encode_as_official(bad, "v1", tokenizer, False)[1]) == {IGNORE}
        good = talk("Q", "A")                                                            # control
        assert data.encode(good, "v1", tokenizer, False) == \
            encode_as_official(good, "v1", tokenizer, False)
        assert set(data.encode(talk("Q", ""), "v1", tokenizer, False)[1]) == {IGNORE}
        middle = data.encode(talk("Q", "", "R", "S"), "v1", tokenizer, False)[1]
        assert "".join(pieces(tokenizer, [l for l in middle if l != IGNORE])) == "▁S</s>"
        odd = data.encode(talk("Q", "A", "R"), "v1", tokenizer, False)[1]
        assert "".join(pieces(tokenizer, [l for l in odd if l != IGNORE])) == "▁A</s>"


def test_roles(tiny):
    t = tiny[False]
    alias = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    assert data.encode(alias, "v1", t, False) == data.encode(talk("Q", "A"), "v1", t, False)
    late = [{"from": "gpt", "value": "Hi"}, *talk("Q", "A")]
    assert data.encode(late, "v1", t, False) == data.encode(talk("Q", "A"), "v1", t, False)
    for conversation, template in [
            ([*talk("Q"), *talk("R", "A")], "v1"), ([{"from": "cat", "value": "x"}], "v1"),
            (talk("Q", "A"), "plain"), (talk("<image>", "a", "b", "c"), "plain"),
            (talk("", "A"), "llama_2"), (talk("Q", "A"), "v9"),
            ([{"value": "x"}], "v1"), ([3], "v1")]:
        with pytest.raises(data.BadData):
            data.encode(conversation, template, t)
    assert data.encode([*talk("Q"), *talk("R", "A")], "v0", t, False)       # v0 takes any order


def test_prompts_by_hand():
    assert data.prompt(talk("Q"), "v1").endswith("user's questions. USER: Q ASSISTANT:")
    for template, end in [
            ("v1", " USER: Q ASSISTANT: A</s>USER: R ASSISTANT:"),
            ("mistral_instruct", "[INST] Q [/INST] A </s>[INST] R [/INST]"),
            ("llama_2", "<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]"),
            ("chatml_direct", "<|im_start|>user\nR<|im_end|><|im_start|>assistant\n")]:
        for last in ([], [None], [""]):
            assert data.prompt(talk("Q", "A", "R", *last), template).endswith(end)
    assert data.prompt(talk("Q"), "mistral_instruct") == "[INST] Q [/INST]"
    assert data.prompt(talk("Q"), "llava_v0").endswith("questions.###Human: Q###Assistant:")
    assert data.prompt(talk("<image>\nQ"), "plain") == "<image>"
    with pytest.raises(data.BadData):
        data.prompt([], "v1")


def test_collate():
    ids, labels = data.collate([([1, 5, 6], [IGNORE, 5, 6]), ([1], [IGNORE])], pad=0)
    assert ids.tolist() == [[1, 5, 6], [1, 0, 0]] and ids.dtype == torch.int64
    assert labels.tolist() == [[IGNORE, 5, 6], [IGNORE] * 3]
    with pytest.raises(data.BadData):
        data.collate([], 0)


def test_damaged_tokenizers(tmp_path):
    write_tokenizer(tmp_path / "t")
    path, text = tmp_path / "t/tokenizer.json", json.dumps(spec())
    rng, refused = random.Random(0), 0
    for _ in range(300):
        letters = list(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(letters))
            letters[at:at + rng.randint(0, 3)] = rng.choice('{}[]",:0a9\\')
        path.write_text("".join(letters))
        try:
            data.Tokenizer(tmp_path / "t").encode("a test </s> é")
        except data.BadModel as error:
            refused += 1
            assert "tokenizer.json" in str(error)
    assert refused > 100
    for vocabulary in ({"a": 4294967295}, {"a": "0"}, [], {}):
        model = spec()["model"] | {"vocab": vocabulary}
        path.write_text(json.dumps(spec() | {"added_tokens": [], "model": model}))
        with pytest.raises(data.BadModel):
            data.Tokenizer(tmp_path / "t")
    path.unlink()
    with pytest.raises(data.BadModel, match="no such file"):
        data.Tokenizer(tmp_path / "t")


# ------------------------------------------------------------------------------- pictures

def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def scene(mode="RGB", size=(40, 30)):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_2000_damaged_pictures_raise_only_bad_image():
    rng = random.Random(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    originals = [encoded(scene(m), k) for m, k in [
        ("RGB", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"),
        ("RGB", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM")]]
    originals += [encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
                  encoded(scene(), "TIFF", compression="tiff_lzw"),
                  encoded(scene(), "JPEG", exif=turned)]
    fine = refused = 0
    for i in range(2000):
        raw = bytearray(rng.choice(originals))
        kind = i % 4
        if kind == 0:
            del raw[rng.randrange(len(raw)):]
        else:
            for _ in range(rng.randint(1, 20)):
                at = rng.randrange(min(len(raw), 100 if kind == 1 else len(raw)))
                raw[at] = rng.randrange(256)
        try:
            image = data.load_image(io.BytesIO(bytes(raw)))
            assert image.mode == "RGB"
            fine += 1
        except data.BadImage as error:
            assert "\n" not in str(error)
            refused += 1
    assert fine > 100 and refused > 500


def test_pictures_that_must_be_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "half.png").write_bytes(encoded(scene(), "PNG")[:-500])
    (tmp_path / "x.ppm").write_bytes(encoded(scene(), "PPM"))
    Image.new("1", (13000, 13000)).save(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("none.png", "empty.png", "text.png", "half.png", "x.ppm", "bomb.png", "pipe.png",
                 "", "nul\0.png"):
        with pytest.raises(data.BadImage) as info:
            data.load_image(tmp_path / name if name else tmp_path)
        assert "\n" not in str(info.value)
    with pytest.raises(data.BadImage, match="megapixels"):
        data.load_image(str(tmp_path / "bomb.png"))


def test_modes_are_shown_as_a_viewer_would(tmp_path):
    def pixel(image, kind="PNG", **options):
        return data.load_image(io.BytesIO(encoded(image, kind, **options))).getpixel((0, 0))
    assert pixel(Image.fromarray(np.full((4, 4), 40000, np.uint16))) == (156, 156, 156)
    assert pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))[0] in (126, 127, 128)
    assert pixel(Image.new("LA", (4, 4), (9, 0))) == (255, 255, 255)
    assert pixel(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == (10, 20, 30)
    assert pixel(palette, transparency=1) == (255, 255, 255)
    assert pixel(Image.new("L", (4, 4), 7)) == (7, 7, 7)
    assert pixel(Image.new("1", (4, 4), 1)) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG") == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    assert pixel(frames[0], "GIF", save_all=True, append_images=frames[1:]) == (255, 0, 0)
    exif, wide = Image.Exif(), Image.new("RGB", (20, 10))
    exif[0x0112] = 6
    assert data.load_image(io.BytesIO(encoded(wide, "JPEG", exif=exif))).size == (10, 20)
    wide.save(tmp_path / "lies.png", "JPEG")
    assert data.load_image(tmp_path / "lies.png").size == (20, 10)


def test_preprocess_by_hand():
    white = ((1 - np.array(data.MEAN)) / data.STD).astype(np.float32)
    wide = Image.new("RGB", (20, 10), "white")
    x = data.preprocess(wide, 8, "pad")
    assert x.shape == (1, 3, 8, 8) and x.dtype == torch.float32
    assert torch.allclose(x[0, :, 4, 4], torch.tensor(white), atol=1e-6)
    assert x[0, :, 0, 0].abs().max() < 0.1          # the mean, but for bicubic ringing
    x = data.preprocess(wide, 8, "square")
    assert torch.allclose(x[0, :, 0, 0], torch.tensor(white), atol=1e-6)
    tiles = data.preprocess(wide, 8, "anyres")
    assert tiles.shape == (3, 3, 8, 8)                          # the overview, then 2 across
    assert torch.allclose(tiles[0, :, 0, 0], torch.tensor(white), atol=1e-6)
    with pytest.raises(UsageError):
        data.preprocess(wide, 8, "round")
    with pytest.raises(data.BadImage):
        data.preprocess(Image.new("RGB", (50000, 1)), 336, "pad")
    with pytest.raises(data.BadImage):
        data.preprocess(Image.new("RGB", (50000, 1)), 336, "square")


def test_anyres_counts():
    for size, tokens in {(640, 480): 2340, (480, 640): 2352, (672, 672): 2928, (1920, 1080): 1948,
                         (500, 2000): 1944, (336, 336): 1176, (1000, 1): 576, (1, 1000): 648,
                         (37, 19): 876}.items():
        assert data.anyres_grid(*size).tokens == tokens, size


# ------------------------------------------------------------------------------- weights

def test_round_trip_single_and_sharded(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"b": base[:3], "a": base[3:], "c": torch.randn(2, 2).bfloat16(), "d": base.t(),
               "e": torch.tensor(3), "f": base, "g": base}
    for limit in (10 ** 9, 60):
        save_weights(tmp_path, tensors, limit)
        loaded = data.load_weights(tmp_path)
        assert list(loaded) == sorted(tensors) and len(loaded) == 7
        assert all(torch.equal(loaded[k], tensors[k]) and loaded.shape(k) == tensors[k].shape
                   for k in tensors)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert (len(files) == 1) == (limit > 60)
        umask = os.umask(0)
        os.umask(umask)
        assert all(stat.S_IMODE(f.stat().st_mode) == 0o666 & ~umask for f in files)
    save_weights(tmp_path, {"z": base})                    # no stale shard or index survives
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["z"]


def raw(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize("content", [
    b"", b"\0", raw({}, length=2 ** 63), raw({}, length=100_000_001),
    raw({"a": entry([4], 16)}, b"x"),
    raw({"a": entry([2 ** 62, 2 ** 62], 16)}, bytes(16)), raw({"a": entry([0, 2 ** 50], 0)}),
    raw({"a": entry([-1], 4)}, bytes(4)), raw({"a": entry([4], 4)}, bytes(4)), raw([1]),
    raw({"a": 1}),
    raw({"a": entry([1], 4, "X9")}, bytes(4)), raw(b"[" * 100_000),
    raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    raw({"a": entry([1], 4)}, struct.pack("<f", float("nan"))),
    raw({"a": entry([1], 4)}, struct.pack("<f", float("inf")))],
    ids=lambda content: f"{len(content)}bytes")
def test_crafted_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(data.BadModel, match="model.safetensors") as info:
        list(data.load_weights(tmp_path).values())
    assert "\n" not in str(info.value)


def test_500_damaged_safetensors(tmp_path):
    save_file({f"t{i}": torch.randn(3, 5) for i in range(4)}, tmp_path / "good.safetensors")
    good, rng, refused = (tmp_path / "good.safetensors").read_bytes(), random.Random(0), 0
    path = tmp_path / "model.safetensors"
    for i in range(500):
        content = bytearray(good)
        if i % 5 == 0:
            del content[rng.randrange(len(content)):]
        for _ in range(rng.randint(1, 5)):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.unlink(missing_ok=True)                            # never write into a mapped file
        path.write_bytes(content)
        try:
            list(data.load_weights(tmp_path).values())
        except data.BadModel:
            refused += 1
    assert 250 < refused < 500
    path.unlink()
    path.write_bytes(good)
    assert len(list(data.load_weights(tmp_path).values())) == 4         # control


def test_damaged_index(tmp_path):
    save_weights(tmp_path, {"a": torch.ones(9), "b": torch.ones(9)}, 40)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for table in ({"a": "../x.safetensors"}, {"a": 3}, [], {}, {**good, "b": "gone.safetensors"}):
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(data.BadModel):
            data.load_weights(tmp_path)


def test_pickles_are_refused_unopened(tmp_path):
    with pytest.raises(data.BadModel, match="no model.safetensors"):
        data.load_weights(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(data.BadModel, match="pickled"):
        data.load_weights(tmp_path)
    assert not canary.exists()


def test_resolve(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    import huggingface_hub

    def no_network(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(Offline) as info:
        resolve("nobody/nothing")
    assert info.value.code == 4 and "\n" not in str(info.value)
    for bad in ("no-such-folder", "a/b/c", "../x", str(tmp_path / "gone"), ""):
        if bad:
            with pytest.raises(data.BadModel):
                resolve(bad)


def test_read_config(tmp_path):
    path = tmp_path / "config.json"
    for text in ("[]", "{", '{"a": NaN}', "[" * 100_000, '{"a": %s}' % ("9" * 5000),
                 " " * 1_000_001):
        path.write_text(text)
        with pytest.raises(data.BadModel, match="config.json"):
            read_config(tmp_path)
    path.write_text('{"a": 1}')
    assert read_config(tmp_path) == {"a": 1}
    path.unlink()
    with pytest.raises(data.BadModel, match="no such file"):
        read_config(tmp_path)


class Net(torch.nn.Module):
    NAMES = {"blocks.{}.qkv.weight": ("m.{}.q.weight", "m.{}.k.weight", "m.{}.v.weight"),
             "blocks.{}.out.weight": "m.{}.o.weight", "scale": "s"}
    ROWS = {"blocks.{}.qkv.weight": [4, 2, 2]}

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({
            "qkv": torch.nn.Linear(4, 8, bias=False), "out": torch.nn.Linear(4, 4, bias=False)})
            for _ in range(2))
        self.scale = torch.nn.Parameter(torch.randn(()))


def test_fill_and_export_are_inverse(tmp_path):
    one, two = Net(), Net()
    table = export(one, Net.NAMES, Net.ROWS)
    assert set(table) == {f"m.{i}.{w}.weight" for i in "01" for w in "qkvo"} | {"s"}
    assert table["m.1.k.weight"].shape == (2, 4)
    assert torch.equal(table["m.0.v.weight"], one.blocks[0]["qkv"].weight[6:])
    save_weights(tmp_path, table)
    for source in (table, data.load_weights(tmp_path)):
        assert load_into(two, Net.NAMES, source) is two
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
        torch.nn.init.zeros_(two.scale)
    half = load_into(Net().bfloat16(), Net.NAMES, table)
    assert half.scale.dtype == torch.bfloat16 and torch.equal(half.scale, one.scale.bfloat16())
    with torch.device("meta"):
        empty = Net()
        empty.tied = empty.blocks[0]["out"]
    load_into(empty, Net.NAMES, table)
    assert torch.equal(empty.blocks[1]["qkv"].weight, one.blocks[1]["qkv"].weight)
    assert empty.tied.weight is empty.blocks[0]["out"].weight


def test_fill_refuses_before_it_copies():
    net = Net()
    before = [p.clone() for p in net.parameters()]
    good = {k: torch.zeros_like(v) for k, v in export(net, Net.NAMES, Net.ROWS).items()}
    lost = {k: v for k, v in good.items() if k != "m.1.k.weight"}
    for weights, names, words in [
            (lost, Net.NAMES, ["m.1.k.weight", "missing"]),
            (good | {"z.bias": torch.zeros(1)}, Net.NAMES, ["z.bias", "no place"]),
            (good | {"s": torch.zeros(3)}, Net.NAMES, ["s:", "(3,)", "()"]),
            (good | {"m.1.v.weight": torch.zeros(3, 4)}, Net.NAMES, ["(3, 4)", "(8, 4)"]),
            (good | {"m.1.v.weight": torch.zeros(2, 5)}, Net.NAMES, ["(2, 5)", "(8, 4)"]),
            (good, {"scale": "s"}, ["blocks.0", "no name"])]:
        with pytest.raises(data.BadModel) as info:
            load_into(net, names, weights)
        assert all(word in str(info.value) for word in words), str(info.value)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    load_into(net, Net.NAMES, good | {"z.bias": torch.zeros(1)}, {r"z\..*": "not used here"})
    assert not any(p.any() for p in net.parameters())


# ------------------------------------------------------------------------------- data on disk

GOOD = {"id": "1", "image": "a.jpg", "conversations": talk("<image>\nQ", "A"), "model": "kept"}


def test_read_conversations(tmp_path):
    path, rows = tmp_path / "x.json", [GOOD, {"conversations": talk("é", "b")}]
    line = "\n".join(json.dumps(r) for r in rows)
    whole = json.dumps(rows)
    for text in (whole, json.dumps(rows, indent=2).replace("\n", "\r\n"), line, "\ufeff" + whole,
                 line.replace("\n", "\r\n") + "\r\n\r\n", "\ufeff" + line):
        path.write_bytes(text.encode())
        got = data.read_conversations(path)
        assert got[0] == GOOD
        assert got[1]["conversations"] == rows[1]["conversations"] and got[1]["id"]


@pytest.mark.parametrize("text, where", [
    ("", "no samples"), ("[]", "no samples"), ("[1]", "row 1"), ('"x"', "row 1"), ("{", "line 1"),
    ('{"a": 1}', "row 1"), ("[" * 200_000, "x.json"), ('[{"conversations": []}]', "row 1"),
    ('[{"conversations": 3}]', "row 1"), ('[{"conversations": [3]}]', "row 1"),
    ('[{"conversations": [{"from": "human"}]}]', "row 1"),
    ('[{"conversations": [{"from": ["human"], "value": "x"}]}]', "row 1"),
    ('[{"conversations": [{"from": "dog", "value": "x"}]}]', "row 1"),
    ('[{"conversations": [{"from": "gpt", "value": 3}]}]', "row 1"),
    ('[{"conversations": [{"from": "gpt", "value": "\\ud800"}]}]', "row 1"),
    ('[{"x": NaN}]', "NaN"), ('[{"x": %s}]' % ("9" * 5000), "x.json"),
    ('[{"image": 3, "conversations": [{"from": "gpt", "value": "x"}]}]', "row 1"),
    (json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n{", "line 3"),
    (json.dumps([GOOD, GOOD, {}]), "row 3")])
def test_malformed_conversations(tmp_path, text, where):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(data.BadData, match=where) as info:
        data.read_conversations(path)
    assert "x.json" in str(info.value) and "\n" not in str(info.value)


def test_files_that_are_not_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe[\0]\0")
    for path in (tmp_path / "x.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(data.BadData):
            data.read_conversations(path)


def test_picture_paths_stay_inside(tmp_path):
    root, secret = tmp_path / "images", tmp_path / "secret.jpg"
    (root / "sub").mkdir(parents=True)
    secret.write_bytes(b"x")
    (root / "sub/a.jpg").write_bytes(b"x")
    (root / "in.jpg").symlink_to(root / "sub/a.jpg")
    (root / "out.jpg").symlink_to(secret)
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "away").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    assert picture_path(root, "sub/a.jpg").read_bytes() == b"x"
    assert picture_path(root, "in.jpg").is_file()
    for name in (str(secret), str(root / "sub/a.jpg"), "../secret.jpg", "out.jpg",
                 "sub/../../secret.jpg", "away/secret.jpg",
                 "", "nul\0.jpg", "none.jpg", "sub", "pipe", "loop.jpg", "x" * 5000, "/dev/zero",
                 "..\\secret.jpg", "C:\\x.jpg", "\\\\host\\x.jpg"):
        with pytest.raises(data.BadData):
            picture_path(root, name)


# ------------------------------------------------------------------------------- failures

def test_guarded(capsys):
    def raising(error):
        def main():
            raise error
        return main
    for error, code in [(UsageError("two\nlines"), 2), (data.BadImage("x"), 3),
                        (data.BadModel("x"), 3), (data.BadData("x"), 3), (Offline("x"), 4),
                        (TrainingFailed("x"), 1), (MemoryError(), 1), (OSError(28, "full"), 1),
                        (OSError(13, "denied", "f"), 3), (OSError(30, "read-only"), 3),
                        (torch.OutOfMemoryError("gpu"), 1)]:
        assert exit_status(raising(error)) == code
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
        with pytest.raises(type(error)):
            exit_status(raising(error), debug=True)
    assert exit_status(raising(KeyboardInterrupt())) == 130
    assert exit_status(lambda: None) == 0 and exit_status(lambda: 2) == 2
    with pytest.raises(KeyError):                           # a bug of ours keeps its traceback
        exit_status(raising(KeyError("x")))


def test_the_demo_runs(capsys):
    assert data.main() == 0
    assert "with loss" in capsys.readouterr().out


def test_the_chat_template_for_others_writes_what_prompt_writes():
    """transformers renders chat_template.jinja; ours is data.prompt: the same text."""
    import jinja2
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}]
    ours = [{"from": "human", "value": "<image>\nOne?"}, {"from": "gpt", "value": "Two."},
            {"from": "human", "value": "Sure?"}]
    for name in ("v1", "llava_v1"):
        made = jinja2.Template(chat_template(data.TEMPLATES[name]), keep_trailing_newline=True)
        said = made.render(messages=talk, add_generation_prompt=True)
        assert said == data.prompt(ours, name)
    assert (
        jinja2.Template(chat_template(data.TEMPLATES["plain"])).render(messages=talk[:1])
        == "<image>One?"
    )


# ---------------------------------------------------------------- what files do not say

@pytest.mark.parametrize("opens", [True, False])
def test_a_bos_that_only_the_post_processor_writes(tmp_path, opens):
    """LLaMA-3's config has no add_bos_token; control: a file that opens with nothing."""
    import tokenizers
    lib = tokenizers.Tokenizer(tokenizers.models.BPE())
    lib.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = tokenizers.decoders.ByteLevel()
    lib.train_from_iterator(["What is it? A cat. "] * 3, tokenizers.trainers.BpeTrainer(
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"]))
    if opens:
        lib.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    lib.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}))
    words = data.Tokenizer(tmp_path)
    theirs = lib.encode("What is it?").ids
    assert words.encode("What is it?") == theirs and (theirs[0] == 0) == opens


def test_no_chat_template_rather_than_a_wrong_one():
    ours = data.TEMPLATES
    assert chat_template(ours["v1"]) and chat_template(ours["plain"]) == (
        chat_template(ours["minigpt4_caption"]))
    for name in ("minigpt4", "instructblip"):
        assert data.TEMPLATES[name].style not in ("two", "plain")
        assert chat_template(ours[name]) is None


def test_a_caption_is_a_question_and_an_answer():
    words = data.Tokenizer(Path(data.__file__).parent / "toy/weights/llama")
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A star."}]
    assert data.encode(talk, "plain", words)
    with pytest.raises(data.BadData, match="one gpt turn"):
        data.encode([talk[0], {**talk[1], "from": "human"}], "plain", words)


def test_a_long_strip_is_not_made_a_huge_square(monkeypatch):
    """Controls: a shorter strip, and a wide picture with as large a square."""
    from formats import pictures
    monkeypatch.setattr(pictures, "LARGE", 400 ** 2)
    with pytest.raises(data.BadImage, match="401×401 intermediate is too large: crop"):
        data.preprocess(Image.new("RGB", (24, 401)), 32, "pad")
    for shape in ((24, 400), (26, 401)):
        assert data.preprocess(Image.new("RGB", shape), 32, "pad").shape == (1, 3, 32, 32)


@pytest.mark.parametrize("more", [0, 7, 20, 1000])
def test_an_error_is_no_longer_than_a_line_may_be(more, capsys):
    """With the word error: before it; its end, which says what to do, is kept."""
    from formats.errors import exit_status, LONGEST_LINE

    def fails():
        raise data.BadData("x" * (LONGEST_LINE - 20 + more) + " do this")

    assert exit_status(fails) == 3
    said = capsys.readouterr().err
    assert len(said.rstrip("\n")) <= LONGEST_LINE and said.endswith("x do this\n")
    assert said.startswith("error: xxx")


def test_ctrl_c_while_a_tensor_is_read(tmp_path, monkeypatch):
    """It comes behind the library, which would make another error of it; a handler of one's own is
    asked, too. Control: without it another error is raised."""
    from formats import checkpoints
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    weights, presses = data.load_weights(tmp_path), [1]

    class Swallows:
        """As safetensors does it."""
        def __init__(self, *args, **more):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *what):
            pass

        def get_tensor(self, name):
            try:
                for _ in presses:
                    signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None
            return torch.ones(3)

    monkeypatch.setattr(checkpoints, "safe_open", Swallows)
    seen = []
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            weights["a"]
        signal.signal(signal.SIGINT, lambda *_: seen.append(True))
        assert bool((weights["a"] == 1).all()) and seen == [True]
        presses.clear()
        assert bool((weights["a"] == 1).all()) and seen == [True]
        monkeypatch.setattr(checkpoints, "interrupted_later", nullcontext)
        presses.append(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(ValueError, match="shape"):                  # control
            weights["a"]
    finally:
        signal.signal(signal.SIGINT, ours)


MEMORY = """
import random, sys
import data, tokenizers
tokenizer, dice = data.Tokenizer("toy/weights/llama"), random.Random(0)
if sys.argv[1] == "kept":
    tokenizer._lib.model._resize_cache(10_000)
words = "red blue green star circle cross top left centre right a the is".split()
sizes = []
for _ in range(3):
    for _ in range(1500):
        tokenizer.encode(" ".join(dice.choices(words, k=30)))
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
print(sizes[2] - sizes[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory as Linux tells it")
def test_texts_that_were_encoded_are_not_kept():
    """Control: the library keeps them by itself, and memory grows with every sample."""
    grown = {}
    for how in ("as it is", "kept"):
        found = subprocess.run([sys.executable, "-c", MEMORY, how], capture_output=True, text=True,
                               cwd=Path(__file__).parents[1], check=True)
        grown[how] = int(found.stdout)
    assert grown["as it is"] < 500_000 and grown["kept"] > 2_000_000, grown
