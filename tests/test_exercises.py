"""exercises/: the project's own functions pass, classic mistakes are called by their names.

The functions in WRITTEN are a reader's: they share no code with exercises/."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exercises import __main__ as program
from exercises.checking import call, check, difference, judge
from exercises.index import EXERCISES
from kernels import attention, full

ROOT = Path(__file__).parents[1]
# what a reader writes below the signature: right, then with two classic mistakes and what is said.
# A mistake is (what is replaced, by what, part of the line that names it)
WRITTEN = {
    1: ("""import torch.nn.functional as F
def embed_patches(pixels, weight):
    return F.conv2d(pixels, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
""", (".transpose(1, 2)", "", "the vectors stand in columns"),
        (".flatten(2)", ".transpose(2, 3).flatten(2)", "column by column")),
    2: ("""import torch
def add_positions(patches, cls, position):
    cls = cls.expand(len(patches), 1, len(cls))
    return torch.cat((cls, patches), 1) + position
""", ("(cls, patches)", "(patches, cls)", "the class token stands last"),
        ("torch.cat((cls, patches), 1) + position",
         "torch.cat((cls, patches + position[:-1]), 1)", "off by one")),
    3: ("""def quick_gelu(x):
    return x / (1 + (-1.702 * x).exp())
""", ("-1.702", "-1.0", "SiLU"), ("return x /", "return 1 /", "the sigmoid alone")),
    4: ("""def label_mask(segments, tokenizer):
    text = "".join(piece for piece, _ in segments)
    learn = [has_loss for piece, has_loss in segments for _ in piece]
    ids, labels = [tokenizer.bos], [-100]
    for token, at in tokenizer.encode_with_offsets(text):
        ids.append(token)
        labels.append(token if learn[at] else -100)
    return ids, labels
""", ("token if learn[at] else -100", "token", "label stands on the prompt"),
        ("return ids, labels", "return ids, labels[1:] + [-100]", "shifted by one"),
        ("else -100", "else 0", "the label is 0"),
        ("    return ids", "    labels = [-100 if i < len(ids) - 1 else x for i, x in "
                           "enumerate(labels)]\n    return ids", "only the last piece has loss"),
        # of each token the last character
        ("    for token, at in tokenizer.encode_with_offsets(text):\n",
         "    pairs = tokenizer.encode_with_offsets(text)\n"
         "    ends = [at - 1 for _, at in pairs[1:]] + [len(text) - 1]\n"
         "    for (token, _), at in zip(pairs, ends):\n", "here the last one does")),
    5: ("""import torch
def splice(ids, text_embeds, image_embeds, labels):
    x, y, n = [], [], 0
    for i, vector, label in zip(ids.tolist(), text_embeds, labels):
        if i == -200:
            x.extend(image_embeds[n])
            y.extend([torch.tensor(-100)] * len(image_embeds[n]))
            n += 1
        else:
            x.append(vector)
            y.append(label)
    return torch.stack(x), torch.stack(y)
""", ("            n += 1\n        else:", "            n += 1\n        if True:",
       "the IMAGE token itself is still there"),
        ("[torch.tensor(-100)]", "[torch.tensor(0)]", "labels are 0")),
    6: ("""import torch
def rope(x, position_ids, base):
    D = x.shape[-1]
    angle = position_ids[:, :, None, None] * base ** (-2 * torch.arange(D // 2) / D)
    a, b = x[..., :D // 2], x[..., D // 2:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
""", ("x[..., :D // 2], x[..., D // 2:]", "x[..., ::2], x[..., 1::2]", None),
        ("position_ids[:", "(position_ids + 1)[:", "off by one")),
    7: ("""import torch
def cache_step(q, k, v, k_cache, v_cache, length):
    k_cache[:, length], v_cache[:, length] = k[:, 0], v[:, 0]
    k, v = k_cache[:, :length + 1], v_cache[:, :length + 1]
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** .5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
""", (":length + 1]", ":]", "it sees the whole buffer"),
        (" / q.shape[-1] ** .5", "", "not divided by sqrt(D)")),
    8: ("""def itc(q, k, n):
    return ((q < n) & (k < n)) | ((q >= n) & (k >= n))
def itm(q, k, n):
    return (q > -1) & (k > -1)
def itg(q, k, n):
    return (k < n) | ((k <= q) & (q >= n))
""", ("(k < n) | ((k <= q) & (q >= n))", "(q < n) | ((q <= k) & (k >= n))", "transposed"),
        ("k <= q", "k < q", "does not see itself"),
        ("(k < n)) | ((q >= n) & (k >= n))", "(k < n))", "itc: text sees nothing"),
        ("((q < n) & (k < n)) |", "", "itc: the queries see nothing"),
        ("(k < n) | ((k <= q) & (q >= n))", "((k < n) | (k <= q)) & (q >= n)",
         "itg: the queries see nothing"),
        ("return (k < n) | ", "return (k < n) | (q < n) | ", "itg: the queries see the text"),
        ("k <= q", "q <= k", "causal the wrong way round"),
        ("(q > -1) & (k > -1)", "True", "itm returns True: it must be a (5, 5) bool tensor"),
        ("(q > -1) & (k > -1)", "q > -1", r"itm has shape (5, 1), expected (5, 5)"),
        ("(q > -1) & (k > -1)", "__import__('torch').ones(len(q), k.shape[1]).bool()",
         "itm must answer for one q and one k, too"),
        ("(q > -1) & (k > -1)", "1 + 0 * (q + k)", "itm is torch.int64, it must be torch.bool")),
    9: ("""import torch
def itc_loss(image, text, temp):
    s = torch.stack([(x @ text.T).amax(0) for x in image]) / temp
    target = .9 * torch.eye(len(s)) + .1 / len(s)
    rows, columns = -(target * s.log_softmax(1)).sum(1), -(target * s.log_softmax(0)).sum(0)
    return (rows.mean() + columns.mean()) / 2
""", ("amax(0)", "mean(0)", "mean over the queries"),
        ("(rows.mean() + columns.mean()) / 2", "rows.mean()", "only pictures look")),
    10: ("""import torch
def hard_negatives(to_text, to_image, same, seed=0):
    u = torch.rand(len(same), 2, generator=torch.Generator().manual_seed(seed)).T
    out = torch.full((2, len(same)), -1)
    for side, scores in enumerate((to_image, to_text)):
        for i in range(len(same)):
            if not same[i].all():
                w = scores[i].exp() * ~same[i]
                out[side, i] = int((w.cumsum(0) > u[side, i] * w.sum()).nonzero()[0])
    return out
""", (" * ~same[i]", "", "its own negative"),
         ("(to_image, to_text)", "(to_text, to_image)", "images and texts are exchanged")),
    11: ("""def token_weights(learned, groups):
    size = len(learned) // groups
    sums = [sum(learned[i * size:(i + 1) * size]) for i in range(groups)]
    return [1 / (groups * sums[i // size]) if sums[i // size] else 0 for i in range(len(learned))]
""", ("(groups * sums[i // size])", "sum(learned)", "mean over all tokens of the step"),
         ("1 / (groups * ", "1 / (1 * ", "divide by `groups`")),
    12: ("""import torch
def fold(q, k, v, m, l, acc):
    s = q @ k.T * q.shape[-1] ** -.5
    new = torch.maximum(m, s.max(1, keepdim=True).values)
    alpha = torch.exp(m - new)
    p = torch.exp(s - new)
    return new, l * alpha + p.sum(1, keepdim=True), acc * alpha + p @ v
def finish(m, l, acc):
    return acc / l, m + torch.log(l)
""", ("acc * alpha", "acc", "acc is not corrected"),
         ("l * alpha", "l", "l is not corrected"),
         ("torch.maximum(m, s.max(1, keepdim=True).values)", "s.max(1, keepdim=True).values",
          "the maximum of the new tile alone"),
         ("torch.maximum(m, s.max(1, keepdim=True).values)", "torch.maximum(m, s.max())",
          "that of all rows"),
         ("m - new", "new - m", "alpha is upside down"),
         ("torch.log(l)", "torch.log2(l)", "logarithm to base 2"),
         ("m + torch.log(l)", "(m + torch.log(l)) * 1.442695", "logarithm to base 2"),
         ("return new, l * alpha + p.sum(1, keepdim=True), acc * alpha + p @ v",
          "return m, l + 1, acc + s.softmax(1) @ v", "these are averaged"),
         ("acc / l", "acc", "acc is not divided by l"),
         ("s.max(1, keepdim=True)", "s.max(1)", "if not for keepdim=True"),
         ("l * alpha + p.sum(1, keepdim=True)", "(l * alpha)[:, 0] + p.sum(1)",
          "fold: l has shape (3,), not (3, 1): keepdim=True"),
         ("return new, l", "return l", "fold must return m, l, acc"),
         ("return acc", "acc", "finish returns None"),
         ("return new", "new", "fold returns None")),
}
NEIGHBOURS = """
def neighbours(x, position_ids, base):
    D = x.shape[-1]
    angle = position_ids[:, :, None, None] * base ** (-torch.arange(0, D, 2) / D)
    y, a, b = torch.empty_like(x), x[..., ::2], x[..., 1::2]
    y[..., ::2], y[..., 1::2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return y
rope = neighbours
"""


def verdict_on(number, text, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return check(EXERCISES[number], path)


@pytest.mark.parametrize("number", range(1, 13))
def test_the_projects_own_function_is_right(number):
    exercise = EXERCISES[number]
    verdict = judge(exercise, exercise.real, Path(exercise.file))
    assert verdict.state == "right", verdict.text
    assert exercise.solution in verdict.text


@pytest.mark.parametrize("number", WRITTEN)
def test_a_readers_function_is_right_and_its_mistakes_are_named(number, tmp_path):
    right, *mistakes = WRITTEN[number]
    assert verdict_on(number, right, tmp_path).state == "right"
    for old, new, name in mistakes:
        assert old in right
        verdict = verdict_on(number, right.replace(old, new), tmp_path)
        assert verdict.state == "wrong" and "\n" not in verdict.text
        assert name is None or name in verdict.text, verdict.text


def test_neighbours_for_halves_is_named(tmp_path):
    assert "the pairs are neighbours" in verdict_on(6, WRITTEN[6][0] + NEIGHBOURS, tmp_path).text


@pytest.mark.parametrize("number", range(1, 13))
def test_every_mistake_is_called_by_its_own_name(number):
    exercise = EXERCISES[number]
    assert len({name for name, _ in exercise.mistakes}) >= 2
    for name, mistake in exercise.mistakes:
        verdict = judge(exercise, mistake, Path(exercise.file))
        assert verdict.state == "wrong" and name in verdict.text, (name, verdict.text)


def test_a_mistake_that_nobody_knows_is_told_by_its_first_difference(tmp_path):
    """Control: no name is made up."""
    text = WRITTEN[9][0].replace("amax(0)", "amin(0)")
    verdict = verdict_on(9, text, tmp_path)
    assert re.fullmatch(r"wrong: loss is [\d.]+, expected [\d.]+; 1 of 1 are wrong", verdict.text)
    line = verdict_on(5, WRITTEN[5][0].replace("torch.stack(y)", "torch.stack(y).flip(0)"),
                      tmp_path).text
    assert line.startswith("wrong: labels[0] is")


@pytest.mark.parametrize("number", range(1, 13))
def test_what_is_not_written_yet_says_so(number):
    exercise = EXERCISES[number]
    verdict = check(exercise)
    assert verdict.state == "not written"
    assert verdict.text == f"not written yet: write it in exercises/{exercise.file}"
    assert len((ROOT / "exercises" / exercise.file).read_text().splitlines()) <= 30


@pytest.mark.parametrize("text, said", [
    ("def quick_gelu(x)\n    return x", r"it raises SyntaxError: .*\(line 1 of mine.py\)"),
    ("def quick_gelu(x):\n    return y", r"it raises NameError: .*\(line 2 of mine.py\)"),
    ("def gelu(x):\n    return x", "there is no function quick_gelu in mine.py"),
    ("def quick_gelu(x):\n    x.sigmoid()", "it returns None"),
    ("def quick_gelu(x):\n    return x[:1]", r"y has shape \(1,\), expected \(49,\): 48 too few"),
    ("def quick_gelu(x):\n    return 'y'", "it must return y, as numbers or tensors"),
    ("def quick_gelu(x):\n    return x / 0", "overflowed")])
def test_what_else_may_go_wrong_is_one_line(text, said, tmp_path):
    verdict = verdict_on(3, text, tmp_path)
    assert verdict.state == "wrong" and "\n" not in verdict.text
    assert re.search(said, verdict.text), verdict.text


def test_the_tiles_one_by_one_are_the_projects_attention():
    """The kernel's `fold` needs a GPU: the formulas beside `attention` on all keys at once."""
    exercise = EXERCISES[12]
    for q, tiles in exercise.cases():
        k, v = (torch.cat(parts) for parts in zip(*tiles))
        out = attention(q[None, :, None], k[None, :, None], v[None, :, None], full)[0, :, 0]
        lse = torch.logsumexp(q @ k.T * q.shape[-1] ** -.5, -1, keepdim=True)
        right = call(exercise, exercise.real, (q, tiles))
        assert difference([("out", out), ("lse", lse)], right) is None
        assert difference([("out", out.flip(0)), ("lse", lse)], right)          # control


def test_no_call_of_fold_sees_two_tiles():
    """So one softmax over all keys cannot pass."""
    exercise, sizes = EXERCISES[12], []

    def watched(name, *arguments):
        if name == "fold":
            sizes.append(len(arguments[1]))
        return exercise.real(name, *arguments)
    assert judge(exercise, watched, Path(exercise.file)).state == "right"
    assert sizes == [len(k) for _, tiles in exercise.cases() for k, _ in tiles]

    def one_softmax(name, q, k, v, *state):     # what a reader could do with one tile alone
        s = q @ k.T * q.shape[-1] ** -.5
        return s[:, :1], torch.ones(len(q), 1), s.softmax(-1) @ v
    assert judge(exercise, lambda name, *arguments: one_softmax(name, *arguments)
                 if name == "fold" else exercise.real(name, *arguments),
                 Path(exercise.file)).state == "wrong"


def test_a_small_wrong_mask_is_drawn_beside_the_right_one(tmp_path):
    verdict = verdict_on(8, WRITTEN[8][0].replace("k <= q", "k < q"), tmp_path)
    assert verdict.drawing.split("\n") == [
        "   itg, n = 2: yours     right",
        "   # # . . .             # # . . .",
        "   # # . . .             # # . . .",
        "   # # . . .             # # # . .",
        "   # # # . .             # # # # .",
        "   # # # # .             # # # # #"]
    assert not verdict_on(8, WRITTEN[8][0], tmp_path).drawing
    exercise = EXERCISES[8]
    nine = torch.ones(9, 9).bool()
    assert exercise.drawing([("mask", nine)], [("mask", nine)], ("itm", nine, nine, 2)) == ""


def test_a_mask_that_fits_a_mistake_in_some_cases_only_is_not_called_by_its_name(tmp_path):
    """A control: causal where n is not 1, one bit less where it is."""
    text = WRITTEN[8][0].replace("(q > -1) & (k > -1)", "(k <= q) & ((k < 3) | (n > 1))")
    assert "causal" not in verdict_on(8, text, tmp_path).text
    text = WRITTEN[8][0].replace("(q > -1) & (k > -1)", "k <= q")
    assert "causal" in verdict_on(8, text, tmp_path).text


def test_a_label_is_named_by_its_token(tmp_path):
    text = WRITTEN[4][0].replace("token if learn[at] else -100", "token if learn[at] else -7")
    assert "labels[0], the token '<s>', is -100" in verdict_on(
        4, WRITTEN[4][0].replace("[tokenizer.bos], [-100]", "[tokenizer.bos], [5]"),
        tmp_path).text.replace("is 5, expected -100", "is -100")
    assert re.search(r"labels\[1\], the token '[^']+', is -7", verdict_on(4, text, tmp_path).text)


def test_exercise_4_has_tokens_that_cross_a_border_of_loss():
    """Without them a rule of the last character would be right."""
    count = 0
    for segments, tokenizer in EXERCISES[4].cases():
        text = "".join(text for text, _ in segments)
        learn = [learn for text, learn in segments for _ in text]
        starts = [at for _, at in tokenizer.encode_with_offsets(text)]
        for first, after in zip(starts, [*starts[1:], len(text)]):
            count += len({*learn[first:after]}) > 1
    assert count >= 3


def test_and_between_masks_is_explained(tmp_path):
    text = WRITTEN[8][0].replace("(k <= q) & (q >= n)", "k <= q and q >= n")
    assert "`and`, `or`, `not`" in verdict_on(8, text, tmp_path).text


def test_small_differences_count_and_rounding_does_not():
    """Control of the tolerance, on exercise 3: GELU is off by at most 0.02."""
    exercise = EXERCISES[3]
    (x,) = exercise.cases()[0]
    right = call(exercise, exercise.real, (x,))
    assert difference(call(exercise, lambda x: exercise.real(x.double()), (x,)), right) is None
    assert difference(call(exercise, lambda x: exercise.real(x) + 2e-3, (x,)), right)


def test_no_case_is_changed_by_another_call():
    for exercise in EXERCISES.values():
        one, other = exercise.cases(), exercise.cases()
        for a, b in zip(one, other):
            for x, y in zip(a, b):
                assert not torch.is_tensor(x) or torch.equal(x, y)


# ------------------------------------------------------------------------------ the program

def run(*words):
    return program.main(program.parse(list(words)))


def test_exit_status_and_line(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(WRITTEN[8][0])
    assert run("8", "--file", str(path)) == 0
    assert capsys.readouterr().out.startswith(" 8 masks: right on 9 inputs")
    path.write_text(WRITTEN[8][0].replace("k <= q", "k < q"))
    assert run("8", "--file", str(path)) == 1
    out = capsys.readouterr().out
    assert out.startswith(" 8 masks: wrong: itg: off by one")
    assert out.count("\n") == 1 + 1 + 5                     # the line, and the drawing of 5 x 5
    assert run("8") == 1


def test_without_a_number_all_are_listed(capsys):
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line[:2]) for line in lines] == list(range(1, 13))


@pytest.mark.parametrize("words", [["13"], ["0"], ["four"], ["--file", "x.py"],
                                   ["1", "2", "--file", "x.py"], ["1", "--file", "nowhere.py"]])
def test_a_wrong_command_line_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        program.parse(words)
    assert end.value.code == 2


def test_the_command_and_its_help():
    """Help without torch: it must answer at once."""
    code = ("import runpy, sys; sys.argv = ['exercises', '--help']\n"
            "try: runpy.run_module('exercises', run_name='__main__')\n"
            "except SystemExit: pass\nassert 'torch' not in sys.modules")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and "usage: python -m exercises" in out.stdout


def test_the_index_lists_all_and_links_to_the_book():
    text = (ROOT / "exercises/README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+\.py)` .*\(\.\./docs/book\.html#([\w.]+)\)", text, re.M)
    assert [(int(number), file) for number, file, _ in rows] == [
        (exercise.number, exercise.file) for exercise in EXERCISES.values()]
    for _, _, place in rows:                    # the book has a place for each definition
        file = f"{place.split('.')[0]}.py"
        if place.startswith("kernels"):
            file = "kernels/attention.py"
        assert re.search(rf"(def|class) {place.split('.')[-1]}\b", (ROOT / file).read_text()), place
