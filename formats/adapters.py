"""formats/adapters.py: LoRA adapters in PEFT's layout, and LLaVA's, added to the weights of a base
while it is loaded.

    adapter_config.json           r, lora_alpha, the base's name
    adapter_model.safetensors     base_model.model.<module>.lora_A.weight (r, C_in)
                                  base_model.model.<module>.lora_B.weight (C_out, r)
    config.json                   LLaVA's LoRA folders only: of the whole model
    non_lora_trainables           LLaVA's too: the projector, trained in full

    W becomes W + (lora_alpha / r) B A                  rslora: lora_alpha / sqrt(r)   [LoRA]

Anything else is refused by name. [LoRA] 2106.09685; PEFT's peft/tuners/lora/layer.py;
haotian-liu/LLaVA llava/model/builder.py.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from formats.checkpoints import load_weights
from formats.errors import BadModel, Offline, UsageError
from formats.hub import CONVERT, resolve
from formats.names import canonical
from formats.strict_json import read_config

PREFIX = "base_model.model."
# settings of PEFT that change the result and are not built here: {key: values that are allowed}
PLAIN = {"peft_type": ("LORA",), "fan_in_fan_out": (False, None), "use_dora": (False, None),
         "use_qalora": (False, None), "lora_bias": (False, None), "megatron_config": (None,),
         "layer_replication": (None,), "alora_invocation_tokens": (None,),
         "target_parameters": (None, [])}
KEY = re.compile(r"(.+)\.(lora_A|lora_B)\.(?:default\.)?weight"
                 r"|(.+)\.(lora_embedding_A|lora_embedding_B)(?:\.default)?")


class Adapter:
    """One adapter's folder. `base`: what it says it was trained on, or None."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = c = read_config(folder, "adapter_config.json")
        for key, values in PLAIN.items():
            if key in c and c[key] not in values:
                self.refuse(key, c[key], "not built here")
        if str(c.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda")):
            self.refuse("init_lora_weights", c["init_lora_weights"], "which changes the base too; "
                        "convert it to a plain LoRA with PEFT's save_pretrained")
        base = c.get("base_model_name_or_path")
        self.base = base if type(base) is str and base else None
        self.pairs, self.whole = {}, {}     # {module: {"A": tensor, "B": tensor}}, {name: tensor}
        for file in ("non_lora_trainables", "adapter_model"):
            self._sort(self._read(file))
        for module, pair in self.pairs.items():
            if set(pair) not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
                raise BadModel(f"{self.folder}: module {module} has {' and '.join(pair)} alone: "
                               "download the adapter again")

    def refuse(self, key, value, why):
        raise BadModel(f"{self.folder / 'adapter_config.json'} says {key} {value!r}, {why}: merge "
                       "it into its base where it was made (PEFT's merge_and_unload)")

    def _read(self, name) -> Mapping:
        """{name: tensor} of one of the folder's two weight files."""
        safe, old = (self.folder / f"{name}.{end}" for end in ("safetensors", "bin"))
        if safe.exists():
            return load_weights(safe)
        if old.exists():
            raise BadModel(f"{old}: pickled weights, which can run code: convert them once: "
                           + CONVERT % old)
        if name == "adapter_model":
            raise BadModel(f"{safe}: no such file: download the adapter again")
        return {}

    def _sort(self, tensors):
        for name in tensors:
            inner = name.removeprefix(PREFIX)
            found = KEY.fullmatch(inner)
            if found:
                module, part = found[1] or found[3], found[2] or found[4]
                self.pairs.setdefault(module, {})[part] = tensors[name]
            elif "lora_" in inner or not inner.endswith(
                    (".weight", ".bias", "image_newline", "class_embedding")):
                raise BadModel(f"{self.folder}: tensor {name} is of no LoRA that is built here: "
                               "merge it where it was made (PEFT's merge_and_unload)")
            else:
                inner = inner.replace(".modules_to_save.default.", ".")
                self.whole[inner.replace(".modules_to_save.", ".")] = tensors[name]

    def _setting(self, key, pattern_key, module):
        """r or lora_alpha of a module: that of the first pattern that fits its name, or all's."""
        patterns = self.config.get(pattern_key) or {}
        try:
            value = next((value for pattern, value in patterns.items()
                          if re.match(rf"(.*\.)?({pattern})$", module)), self.config.get(key))
        except (AttributeError, re.error):
            self.refuse(pattern_key, patterns, "which is no pattern")
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(key, value, "which is not a positive number")
        return value

    def scale(self, module, rank):
        r = self._setting("r", "rank_pattern", module)
        if r != rank:
            self.refuse("r", r, f"but {module}.lora_A has {rank} rows")
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def shape(self, module):
        """Of what is added to the module's weight. Raises BadModel."""
        A, B = (self.pairs[module][part].shape for part in sorted(self.pairs[module]))
        if len(A) != 2 or len(B) != 2 or B[1] != A[0]:
            raise BadModel(f"{self.folder}: {module}: lora_A {tuple(A)} and lora_B {tuple(B)} are "
                           "no pair of matrices: download the adapter again")
        self.scale(module, A[0])
        return (A[1], B[0]) if "lora_embedding_A" in self.pairs[module] else (B[0], A[1])

    def addition(self, module):
        """What is added to the module's weight, in fp32."""
        A, B = (self.pairs[module][part].float() for part in sorted(self.pairs[module]))
        added = self.scale(module, A.shape[0]) * (B @ A)
        return added.T if "lora_embedding_A" in self.pairs[module] else added


class Adapted(Mapping):
    """The weights of a base with an adapter added, computed when a tensor is asked for.

    The adapter's names are found among the base's by their canonical spelling (formats/names.py).
    Raises BadModel for a tensor of the adapter that the base does not have."""

    def __init__(self, weights, adapter):
        self.weights, self.adapter = weights, adapter
        names = {canonical(name): name for name in weights}
        self.modules, self.whole = {}, {}               # by the base's names
        for module in adapter.pairs:
            name = canonical(f"{module}.weight")
            if name not in names:
                raise BadModel(f"{adapter.folder}: the adapter changes {module}, which the base "
                               "does not have: name its own base (--model-base)")
            self.modules[names[name]] = module
            shape, added = weights.shape(names[name]), adapter.shape(module)
            if shape != added:
                raise BadModel(f"{adapter.folder}: the adapter's {module} is {added}, the base's "
                               f"{shape}: name its own base (--model-base)")
        for name, tensor in adapter.whole.items():
            self.whole[names.get(canonical(name), name)] = tensor

    def __getitem__(self, name):
        tensor = self.whole[name] if name in self.whole else self.weights[name]
        if name not in self.modules:
            return tensor
        return tensor.float() + self.adapter.addition(self.modules[name])

    def shape(self, name) -> tuple:
        return tuple(self.whole[name].shape) if name in self.whole else self.weights.shape(name)

    @property
    def dtype(self):
        return self.weights.dtype

    def __contains__(self, name):
        return name in self.whole or name in self.weights

    def __iter__(self):
        return iter(sorted({*self.weights, *self.whole}))

    def __len__(self):
        return len({*self.weights, *self.whole})


# --------------------------------------------------------------------------- whole or adapter

def is_adapter(folder) -> bool:
    """A folder with an adapter and no whole model beside it."""
    if not (folder / "adapter_config.json").exists():
        return False
    whole = "model.safetensors", "model.safetensors.index.json"
    return not any((folder / name).exists() for name in whole)


def open_model(folder_or_hub_id, base=None):
    """(folder with the tokenizer, folder with config.json, weights) of a whole model, or of an
    adapter's folder and its base. LLaVA's adapters hold the config.json of the whole, PEFT's none.

    base: of an adapter; None: the one that it names. Raises BadModel, Offline, UsageError."""
    folder = resolve(folder_or_hub_id)
    if not is_adapter(folder):
        if base is not None:
            raise UsageError(f"--model-base {base}: {folder} is a whole model, no LoRA adapter; "
                             "leave the base out")
        return folder, folder, load_weights(folder)
    adapter = Adapter(folder)
    if base is None and adapter.base is None:
        raise UsageError(f"{folder}: a LoRA adapter that does not name its base; give it as well "
                         "(--model-base)")
    base, weights = open_base(adapter, base)
    tokenizer_folder = folder if (folder / "tokenizer.json").exists() else base
    config_folder = folder if (folder / "config.json").exists() else base
    return tokenizer_folder, config_folder, Adapted(weights, adapter)


def open_base(adapter, base):
    """(folder, weights) of an adapter's base; None: of the one that it names, which may have moved
    since. Raises BadModel, Offline."""
    try:
        folder = resolve(base or adapter.base)
        return folder, load_weights(folder)
    except (BadModel, Offline) as error:
        if base is not None:
            raise
        raise type(error)(
            f"{adapter.folder}: a LoRA adapter, and the base that it names is not to be used "
            f"({error}): give generate.py the base where it is now (--model-base), or correct "
            "base_model_name_or_path in adapter_config.json") from None
