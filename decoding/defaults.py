"""decoding/defaults.py: what the command line leaves open, for a BLIP-2 with an OPT or a FlanT5.

    a flag of the command line                   always wins
    generation_config.json of the folder         num_beams, max_new_tokens, length_penalty ...
    the official demos of BLIP-2                 5 beams, 30 tokens, length penalty 1

Other models are greedy with 256 tokens, and so is every model that is called from Python. A key of
generation_config.json that changes the answer and is not known here is refused.
Source: salesforce/LAVIS, blip2_opt.py and blip2_t5.py, `generate`; transformers 5.23,
generation/configuration_utils.py."""

from decoding.flags import settings_error
from formats.checkpoints import resolve
from formats.errors import BadModel, note
from formats.strict_json import read_config

DEMO = {"num_beams": 5, "max_new_tokens": 30, "length_penalty": 1.0}
KNOWN = ("num_beams", "max_new_tokens", "length_penalty", "repetition_penalty")
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}      # transformers' own, if it samples
# settings that are not known here, with the values under which they do nothing
NEUTRAL = {
    "min_length": (0, 1), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "encoder_repetition_penalty": (1.0,),
    "early_stopping": (False,), "num_beam_groups": (1,), "diversity_penalty": (0.0,),
    "num_return_sequences": (1,), "typical_p": (1.0,), "min_p": (0.0,), "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,), "renormalize_logits": (False,), "guidance_scale": (1, 1.0),
    "bad_words_ids": (), "sequence_bias": (), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "penalty_alpha": (0.0,)}


def folder_settings(folder, first_is_start):
    """The settings of `generate` that generation_config.json names. Raises BadModel.

    first_is_start: does the answer begin with a start token, which max_length counts? Else it
    counts the prompt, whose length is not known here."""
    name = "generation_config.json"
    c = {key: value for key, value in read_config(folder, name, missing_ok=True).items()
         if value is not None}
    for key, values in NEUTRAL.items():
        if key in c and c[key] not in values:
            raise BadModel(f"{folder}/{name}: {key} {str(c[key])[:80]} is not known here: take "
                           "it out, if the answers may be others")
    found = {key: c[key] for key in KNOWN if key in c}
    if "max_length" in c and "max_new_tokens" not in c:
        if first_is_start and type(c["max_length"]) is int:
            found["max_new_tokens"] = c["max_length"] - 1
        else:
            note(f"note: {folder}/{name}: max_length {c['max_length']} counts the prompt: give "
                 "--max-new-tokens instead")
    if c.get("do_sample"):
        found |= {key: c.get(key, default) for key, default in SAMPLING.items()}
        found.setdefault("num_beams", 1)
    try:
        wrong = settings_error(**found)
    except TypeError:
        wrong = "a number is expected"
    if wrong:
        raise BadModel(f"{folder}/{name}: {found}: {wrong}; correct it")
    return found


def apply_defaults(model, args):
    """Fill args and args.settings where no flag was given, and say so in a line."""
    if model.llm.kind == "llama" or not hasattr(args, "given"):
        return
    wanted = {**DEMO, **folder_settings(resolve(args.model), model.llm.kind == "t5")}
    if "temperature" in args.given and args.temperature:        # beams are not drawn
        wanted["num_beams"] = 1
    wanted = {name: value for name, value in wanted.items() if name not in args.given}
    if args.page:                       # it shows an answer word by word, which beams do not have
        wanted["num_beams"] = 1
    beams = wanted.get("num_beams", args.num_beams)
    if beams == 1:
        wanted.pop("length_penalty", None)
    else:                                                       # asked for by a flag: no draw
        wanted = {name: value for name, value in wanted.items() if name not in SAMPLING}
    wanted = {name: value for name, value in wanted.items() if args.settings[name] != value}
    if not wanted:
        return
    args.settings.update(wanted)
    for name, value in wanted.items():
        setattr(args, name, value)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items())
    note(f"note: as this model is published: {flags}")
