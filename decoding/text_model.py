"""decoding/text_model.py: a language model alone, asked like a VLM that is shown no picture.

    python generate.py --text "What is the capital of France?" --model FOLDER     one answer
    python generate.py --text --model FOLDER                                      a chat

FOLDER holds a LLaMA or a Mistral, which is asked as its own chat template says, else as the tokens
of its vocabulary suggest; or a VLM, which answers about text as well."""

from torch import nn

import data
import llama
from formats.chat_templates import end_ids, folder_template
from formats.checkpoints import resolve
from formats.errors import UsageError
from formats.families import template_of_vocabulary
from formats.strict_json import read_config

CAPTIONERS = "plain", "instruct", "continued", "prefixed"       # styles without a text-only prompt


class TextModel(nn.Module):
    """A llama.Llama with its tokenizer and template: what generate.py needs of a VLM."""
    aspect = "none"                                 # no pictures

    def __init__(self, llm, tokenizer, template, stop_ids=frozenset()):
        super().__init__()
        self.llm, self.tokenizer = llm, tokenizer
        self.template, self.stop_ids = template, stop_ids

    def embed(self, ids, pixels, labels, attention_mask, left=True, sizes=None, questions=None):
        """ids (B, T) -> embeddings (B, T, C) and the rest, as VLM.embed without pictures."""
        return self.llm.embed(ids), labels, attention_mask

    def pixels(self, image):
        raise UsageError("this is a language model alone, which sees no pictures: ask about text, "
                         "or give a model/ folder of a run with --model")

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id of a LLaMA or Mistral. Raises BadModel, Offline."""
        folder = resolve(folder)
        llm, tokenizer = llama.Llama.from_pretrained(folder, dtype), data.Tokenizer(folder)
        template = folder_template(folder, tokenizer, data.TEMPLATES, data.prompt)
        template = template or template_of_vocabulary(tokenizer)
        tokenizer.fit(llm.config.vocab, template)
        return cls(llm, tokenizer, template, frozenset(end_ids(folder, read_config(folder)))).eval()


def is_language_model(folder):
    """Does the folder hold a language model alone? Raises BadModel, Offline."""
    return read_config(resolve(folder)).get("model_type") in ("llama", "mistral")


def check_answers_text(model):
    """Raises UsageError for a model that knows pictures and captions, and no questions."""
    if data.template_of(model.template).style in CAPTIONERS:
        raise UsageError(f"--text: this model (template {model.template}) writes about pictures "
                         "only: give one, or another --model")
