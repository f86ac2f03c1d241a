"""llms/: language models that are no LLaMAs, with llama.Llama's interface: opt.py and t5.py."""

from llama import Config as LlamaConfig
from llama import Llama
from llms.opt import Config as OptConfig
from llms.opt import Opt
from llms.t5 import Config as T5Config
from llms.t5 import T5

# kind, as formats/language_models.py names it -> (model, its Config)
MODELS = {"llama": (Llama, LlamaConfig), "opt": (Opt, OptConfig), "t5": (T5, T5Config)}


def build(kind, sizes):
    """The language model of a kind; sizes: the fields of its Config."""
    model, config = MODELS[kind]
    return model(config(**sizes))
