"""The readers of other people's files, each with a folder of something to read.

Of a target one file is changed at random (soak/hostile.py), and `read(folder)` must end in a result
or in a UserError."""

import io
import json
import shutil
import socket
import urllib.request
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

import data
from evaluate import karpathy
from evaluate.benchmarks import parse_choice, parse_choice_leniently, read_pope, read_scienceqa
from evaluate.judge import parse_scores
from evaluate.judge import read_questions as read_bench
from evaluate.vqa import read_questions as read_vqa
from formats.bert import BertTokenizer
from formats.checkpoints import load_weights, save_weights
from formats.errors import BadData, UserError
from generate import build_prompt, generate
from instruct.endpoint import ChatEndpoint, RequestRefused, RetryableError
from instruct.parsing import parse_reply, repaired_or_reject
from instruct.sources import read_coco
from projector import VLM
from qformer import Blip2Stage1
from toy.texts import description
from toy.world import draw, make_scene
from trainer.build import new_vlm
from trainer.rows import Rows
from trainer.samples import encode_sample, sample_pieces


@dataclass(frozen=True)
class Target:
    """files: of its folder, those that are changed. form: how, see soak/hostile.py. amount: inputs
    of a piece of work."""
    name: str
    files: tuple
    form: str
    read: object
    amount: int


# ------------------------------------------------------------------------------------ the readers

def read_weights(folder):
    weights = load_weights(folder)
    return [weights[name].shape for name in weights]


def read_model(folder):
    """Load, ask about a grey picture, and write two tokens."""
    model = VLM.from_pretrained(folder)
    ids = build_prompt(["What is it?"], model.template, model.tokenizer)
    pixels = torch.zeros(1, 3, model.image_size, model.image_size)
    return list(generate(model, ids, pixels, max_new_tokens=2))


def read_tokenizer(folder):
    tokenizer = data.Tokenizer(folder)
    return tokenizer.decode(tokenizer.encode("<s> What is a red star? </s>"))


def read_qformer(folder):
    model = Blip2Stage1.from_pretrained(folder)
    return BertTokenizer(folder).encode(["a red star"]), model.temp


def read_picture(folder):
    (path,) = folder.iterdir()
    image = data.load_image(path)
    return data.preprocess(image, 32, "pad")


def read_training_rows(folder):
    """Rows as a run reads them, and their ids and labels."""
    (path,) = folder.glob("rows.*")
    rows = Rows(path, lambda sample: sample_pieces(sample, "v1"))
    for number in range(len(rows)):
        if number not in rows.bad:
            try:
                encode_sample(rows[number], "v1", tokenizer_of(folder), 16)
            except BadData:
                pass
    rows.refuse()
    return len(rows)


TOKENIZERS = {}


def tokenizer_of(folder):
    """The unchanged tokenizer of the seeds."""
    source = folder.parents[1] / "seeds/llava"
    if source not in TOKENIZERS:
        TOKENIZERS[source] = data.Tokenizer(source)
    return TOKENIZERS[source]


def read_coco_files(folder):
    return read_coco(Namespace(captions=folder / "captions.json", instances=folder / "boxes.json",
                               images=folder, limit=None, what="detail", follow_links=False))


def read_caption_file(folder):
    (path,) = folder.glob("*.json")
    return karpathy.read_pictures(path, folder)


def read_questions(folder):
    """VQA's, POPE's, ScienceQA's and LLaVA-Bench's."""
    read_vqa(Namespace(questions=folder / "vqa.json", annotations=folder / "vqa_answers.json",
                       images=folder))
    read_pope(Namespace(questions=[folder / "coco_pope_random.json"]))
    read_scienceqa(Namespace(problems=folder / "problems.json", splits=folder / "splits.json",
                             split="test", form="CQM-A"))
    return read_bench(Namespace(questions=folder / "bench.jsonl", context=folder / "context.jsonl",
                                references=folder / "references.jsonl"))


def read_reply(folder):
    """What a language model wrote: a review, an answer, a conversation, a description."""
    text = (folder / "reply.txt").read_bytes().decode("utf-8", "surrogateescape")
    parse_scores(text)
    parse_choice(text, 2)
    parse_choice_leniently(text, ["a cat", "a dog"])
    for kind in ("conversation", "detail", "reasoning"):
        try:
            parse_reply(kind, text)
        except BadData:
            pass
    return repaired_or_reject(text, 3)


class Canned:
    """In the place of a connection: what is sent to it is forgotten, and the answer is canned."""

    def __init__(self, answer):
        self.answer = answer

    def sendall(self, what):
        pass

    def makefile(self, mode):
        return io.BytesIO(self.answer)

    def settimeout(self, seconds):
        pass

    def setsockopt(self, *values):
        pass

    def close(self):
        pass


def read_http_answer(folder):
    """The answer of a server to one request."""
    answer = (folder / "answer.http").read_bytes()
    real, socket.create_connection = socket.create_connection, lambda *a, **b: Canned(answer)
    try:
        endpoint = ChatEndpoint(Namespace(key_env="SOAK_KEY", endpoint="http://127.0.0.1:9/v1",
                                          timeout=5, what="detail"))
        endpoint.http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return endpoint.read(endpoint.post(b"{}"))
    except (RetryableError, RequestRefused) as error:
        raise UserError(str(error.args[0])) from None       # asked again later, or left out
    finally:
        socket.create_connection = real


PICTURES = {"png": {}, "jpeg": {}, "webp": {}, "gif": {}, "bmp": {}, "tiff": {}, "avif": {}}
TARGETS = (
    Target("safetensors", ("model.safetensors",), "safetensors", read_weights, 4000),
    Target("safetensors index", ("model.safetensors.index.json",), "json", read_weights, 2000),
    Target("config.json", ("config.json",), "json", read_model, 300),
    Target("config.json of a Q-Former", ("config.json",), "json", read_qformer, 300),
    Target("generation_config.json", ("generation_config.json",), "json", read_model, 300),
    Target("processor_config.json", ("processor_config.json", "preprocessor_config.json"), "json",
           read_model, 300),
    Target("tokenizer_config.json", ("tokenizer_config.json",), "json", read_model, 300),
    Target("tokenizer.json", ("tokenizer.json",), "json", read_tokenizer, 300),
    Target("chat template", ("chat_template.jinja",), "jinja", read_model, 100),
    *(Target(f"{kind} picture", (f"picture.{kind}",), "bytes", read_picture, 4000)
      for kind in PICTURES),
    Target("LLaVA JSON", ("rows.json",), "json", read_training_rows, 2000),
    Target("LLaVA JSON lines", ("rows.jsonl",), "lines", read_training_rows, 2000),
    Target("COCO files", ("captions.json", "boxes.json"), "json", read_coco_files, 4000),
    Target("Karpathy's file", ("dataset_coco.json",), "json", read_caption_file, 4000),
    Target("benchmark questions", ("vqa.json", "vqa_answers.json", "coco_pope_random.json",
                                   "problems.json", "splits.json", "bench.jsonl", "context.jsonl",
                                   "references.jsonl"), "lines", read_questions, 2000),
    Target("model replies", ("reply.txt",), "text", read_reply, 4000),
    Target("HTTP answer", ("answer.http",), "http", read_http_answer, 2000))
BY_NAME = {target.name: target for target in TARGETS}


# -------------------------------------------------------------------------------------- the seeds

def write_text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def training_rows():
    rows = []
    for i in range(4):
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nDescribe this image"},
            {"from": "gpt", "value": description(make_scene(i))}]})
    rows[1]["image"] = ["a.png", "b.png"]
    rows[1]["conversations"][0]["value"] = "<image><image>\nWhat differs?"
    rows[2] = {"messages": [{"role": "system", "content": "You are terse."},
                            {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                            {"role": "assistant", "content": "No."}]}
    rows[3] = {"image": "3.png", "caption": ["a star", "a red star"]}
    return rows


def write_questions(folder):
    """The files of `read_questions`; JSON lines where the benchmark has them."""
    def lines(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)

    write_text(folder / "vqa.json", {"data_subtype": "val2014", "questions": [
        {"image_id": 1, "question": "What is it?", "question_id": 10}]})
    write_text(folder / "vqa_answers.json", {"annotations": [
        {"question_id": 10, "answer_type": "other", "answers": [{"answer": "a cat"}] * 10}]})
    write_text(folder / "coco_pope_random.json", lines([
        {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}]))
    write_text(folder / "problems.json", {"7": {
        "question": "Which?", "choices": ["a", "b"], "hint": "", "answer": 1, "image": None,
        "subject": "natural science", "grade": "grade3", "lecture": "", "solution": "",
        "task": "closed choice"}})
    write_text(folder / "splits.json", {"test": ["7"]})
    write_text(folder / "bench.jsonl", lines([
        {"question_id": 1, "image": "1.jpg", "text": "What is it?", "category": "conv"}]))
    write_text(folder / "context.jsonl", lines([
        {"image": "1.jpg", "caption": "a cat", "instances": [
            {"category": "cat", "bbox": [0.1, 0.2, 0.5, 0.6]}]}]))
    write_text(folder / "references.jsonl", lines([{"question_id": 1, "text": "A cat."}]))


def write_template(model, folder):
    """A model whose chat template stands in chat_template.jinja alone, and is none of ours."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        for key in ("chat_template", "template"):       # the second is our own, in config.json
            content.pop(key, None)
        path.write_text(json.dumps(content))
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}Human:
{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>
{% else %}{{ c['text'] }}{% endif %}{% endfor %}
{% else %}Robot: {{ m['content'][0]['text'] }}</s>{% endif %}{% endfor %}
{% if add_generation_prompt %}Robot:{% endif %}"""
REPLY = """<think>What do I see?</think>Sure, here is the conversation:

===
Question: What is it?
===
Answer: It is a red star on a striped background. There are two objects in all.
===
"""
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "A red star is there."},
                       "finish_reason": "stop"}], "usage": {"prompt_tokens": 9,
                                                            "completion_tokens": 5}}


def write_seeds(folder, world):
    """A folder for each target, with something valid to read. world: see soak/kinds.py."""
    folder, world = Path(folder), Path(world)
    torch.set_num_threads(1)
    model = new_vlm(world / "clip", world / "llama")
    model.save_pretrained(folder / "llava")
    write_template(folder / "llava", folder / "template")
    tensors = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4, dtype=torch.bfloat16),
               "c": torch.arange(5)}
    save_weights(folder / "weights", tensors)
    save_weights(folder / "shards", tensors, max_bytes=30)
    for kind, options in PICTURES.items():
        (folder / kind).mkdir()
        image = draw(make_scene(3))
        if kind == "gif":
            image = image.quantize(16)
        image.save(folder / kind / f"picture.{kind}", kind.upper(), **options)
    image = Image.new("RGBA", (9, 5), (10, 20, 30, 128))
    rows = training_rows()
    write_text(folder / "rows/rows.json", rows)
    write_text(folder / "lines/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    boxes = {"categories": [{"id": 1, "name": "star"}], "annotations": [
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40]}]}
    captions = {"images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
                "annotations": [{"image_id": 1, "caption": "a red star"}] * 2}
    write_text(folder / "coco/captions.json", captions)
    write_text(folder / "coco/boxes.json", boxes)
    image.save(folder / "coco/1.png")
    write_text(folder / "karpathy/dataset_coco.json", {"images": [
        {"filename": "1.jpg", "filepath": "val2014", "split": "test", "cocoid": 1,
         "sentences": [{"raw": "a red star"}, {"raw": "one star"}]}]})
    write_questions(folder / "questions")
    write_text(folder / "replies/reply.txt", REPLY)
    body = json.dumps(ANSWER)
    write_text(folder / "http/answer.http", "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
               f"Content-Length: {len(body)}\r\n\r\n{body}")


# {target: the folder of its seeds}
FOLDERS = {"safetensors": "weights", "safetensors index": "shards", "chat template": "template",
           "tokenizer.json": "llava", "config.json of a Q-Former": "qformer", "LLaVA JSON": "rows",
           "LLaVA JSON lines": "lines", "COCO files": "coco", "Karpathy's file": "karpathy",
           "benchmark questions": "questions", "model replies": "replies", "HTTP answer": "http",
           **{f"{kind} picture": kind for kind in PICTURES}}


def seed_folder(seeds, world, target):
    """Where the unchanged files of a target are; a whole model where no other is named."""
    name = FOLDERS.get(target.name, "llava")
    return Path(world) / name if name == "qformer" else Path(seeds) / name
