"""llms/: language models that are no LLaMAs, with llama.Llama's interface: opt.py and t5.py."""

from formats import language_models
from formats.checkpoints import resolve
from formats.strict_json import read_config
from llama import Config as LlamaConfig
from llama import Llama
from llms.opt import Config as OptConfig
from llms.opt import Opt
from llms.t5 import Config as T5Config
from llms.t5 import T5

# kind, as formats/language_models.py names it -> (model, its Config)
MODELS = {"llama": (Llama, LlamaConfig), "opt": (Opt, OptConfig), "t5": (T5, T5Config)}


def config_of(kind, sizes):
    """The Config of a kind; sizes: its fields."""
    return MODELS[kind][1](**sizes)


def new(config):
    """The language model of a Config, with random weights."""
    models = {config_class: model for model, config_class in MODELS.values()}
    return models[type(config)](config)


def build(kind, sizes):
    """The language model of a kind; sizes: the fields of its Config."""
    return new(config_of(kind, sizes))


def from_pretrained(folder, dtype=None):
    """A LLaMA, Mistral, OPT or FlanT5 of a folder or hub id; see llama.Llama.from_pretrained."""
    folder = resolve(folder)
    model, _ = MODELS[language_models.kind_of(read_config(folder))]
    return model.from_pretrained(folder, dtype)
