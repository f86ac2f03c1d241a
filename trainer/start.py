"""trainer/start.py: where a run starts, and the template that belongs to its language model.

    base_models     the vision tower and the LLaMA of new models
    stage_before    the finished model that a stage starts from, or "none"
    output_folders  where the run writes
    llm_folder      the folder or hub id whose tokenizer and language model the run has
    set_template    the conversation format of stage 2: the language model's own

    --from FOLDER, or stage 1's model/ beside the run      its tokenizer, its template
    --llm FOLDER, or the base's                            the same of a language model alone

A language model has learned one conversation format: ChatML's models know <|im_end|> as the end of
an answer, and </s> as three letters. Stage 2 of LLaVA is written for Vicuna, whose format is v1. In
front of another language model that one's own format is trained, as it is recognised when a model
is loaded (formats/chat_templates.py); --template says otherwise. Captions have no format: so stage
1 only keeps the name for stage 2, as "llm_template" in its model's config.json.
"""

import os
from dataclasses import replace
from pathlib import Path

import data
from formats import language_models
from formats.adapters import open_model
from formats.chat_templates import folder_template
from formats.errors import note, UsageError
from formats.families import family_of_config, template_of_vocabulary
from formats.folders import SHIPPED_QFORMER
from formats.hub import resolve
from formats.strict_json import read_config
from trainer.flags import BASES, EVA, KNOWN_KINDS, LLAVA_TOWER

HERE = Path(__file__).parents[1]
# of the language models that bases name: a plan needs no network
KNOWN_TEMPLATES = {BASES["small"][1]: "smollm2"}
UNKNOWN = "none of ours"            # in place of the name of a chat template that we do not know


def base_models(args):
    """(vision tower, LLaMA) of a run: folders or hub ids. The toy's are in this repository."""
    vision, llm = BASES[args.base]
    if args.base == "toy":
        vision, llm = HERE / vision, HERE / llm
    elif args.row.projector_type == "qformer":
        vision = EVA
    elif args.recipe == "llava" and args.base != "small":
        vision = LLAVA_TOWER
    return args.vision or vision, args.llm or llm


# ------------------------------------------------------------------------ the model it starts from

def output_folders(args):
    """The folders that the command writes, one after the other: stage 0 has one for each part."""
    if args.stage == 0:
        top = Path(args.output_dir or "runs/toy/stage0")
        # the Q-Former is trained on the two that are shipped
        parts = ("clip", "llama") if args.part == "both" else (args.part,)
        return [top / part for part in parts]
    task = f"-{args.task}" if args.task else ""
    return [Path(args.output_dir or f"runs/{args.base}/{args.recipe}/stage{args.stage}{task}")]


def set_start(args, out):
    """Where stage 2 of blip2 starts: from --qformer; or the toy's from the shipped Q-Former, where
    there is no stage 1 beside the run's folder. Set before the flags are written down: a resumed
    run then starts from the same one, or is refused."""
    if (args.recipe, args.stage) != ("blip2", 2):
        return
    before = out.parent / "stage1/model"
    args.start = args.start or args.qformer
    if args.start is None and args.base == "toy" and not before.exists():
        args.start = SHIPPED_QFORMER
        note(f"starts from the shipped Q-Former, {SHIPPED_QFORMER}: there is no {before}")


def stage_before(args, out):
    """The model of the stage before, beside the run's folder `out`, or "none" for a stage that
    begins with new parts. Stage 1 of sharegpt4v starts from llava-1.5's stage 1."""
    if args.stage == 2:
        return out.parent / "stage1/model"
    if args.recipe == "sharegpt4v":
        return out.absolute().parents[1] / "llava-1.5/stage1/model"
    return "none"


def chosen_start(args, out):
    """Folder or hub id of the model that a stage starts from; "none": from new parts."""
    return str(args.start or stage_before(args, out))


def start_folder(args):
    """The folder or hub id of the whole model that the run starts from. None for new parts, or
    where the stage before has not been run: then --plan and --show-batch go by the parts."""
    # parts beside a whole model are refused, or it is not there yet
    if args.recipe == "blip2" or args.llm or args.vision:
        return None
    start = chosen_start(args, output_folders(args)[0])
    if start == "none" or args.start is None and not Path(start).exists():
        return None
    return start


def check_is_here(args, name):
    """Refuse to plan with what would have to be downloaded."""
    if args.plan and not Path(name).is_dir():
        raise UsageError(f"--plan: {name} is no folder, and its sizes are not known here; give "
                         "a folder with its config.json")


def start_family(args):
    """The formats.families.Family of the whole model that the run starts from, by its small files;
    None for new parts. Raises BadModel, Offline, UsageError."""
    start = start_folder(args)
    if start is None:
        return None
    check_is_here(args, start)
    return family_of_config(open_model(start)[1])       # of an adapter, its base's


def llm_folder(args):
    """The folder or hub id whose tokenizer and language model the run has."""
    return start_folder(args) or base_models(args)[1]


# ------------------------------------------------------------------------------------- templates

def blip2_template(args):
    """The template of BLIP-2's stage 2 for this run's language model. Raises BadModel, Offline."""
    kind = "llama"                              # of every base
    if args.llm in KNOWN_KINDS:
        kind = KNOWN_KINDS[args.llm]
    elif args.llm and (Path(args.llm).is_dir() or not args.plan):   # a plan downloads nothing
        kind = language_models.kind_of(read_config(resolve(args.llm)))
    return language_models.BLIP2_TEMPLATES[kind]


def own_template(folder):
    """The conversation format that the language model in a folder has learned: a name of
    data.TEMPLATES, or UNKNOWN. Raises BadModel, Offline."""
    tokenizer_folder, config_folder, _ = open_model(folder)
    return template_of_files(tokenizer_folder, read_config(config_folder))


def template_of_files(tokenizer_folder, config):
    """The same, of a folder with the tokenizer and of config.json: {} where there is none."""
    if "llm_template" in config:                # of a stage 1 of ours
        name = config["llm_template"]
        return name if name in data.TEMPLATES else UNKNOWN
    name = str(config.get("template"))
    if data.template_of(name).style not in ("own", "plain"):
        return name                             # of a stage 2 of ours
    tokenizer = data.Tokenizer(tokenizer_folder)
    found = folder_template(tokenizer_folder, tokenizer, data.TEMPLATES, data.prompt)
    if found in data.TEMPLATES and data.TEMPLATES[found].style != "plain":
        return str(found)                       # without a system text of its own: ours is trained
    text = config.get("text_config")
    if found is None and isinstance(text, dict) and text.get("model_type") == "mistral":
        return "mistral_instruct"               # of a LLaVA, as it is loaded
    by_vocabulary = template_of_vocabulary(tokenizer)
    is_alone = "text_config" not in config      # a whole model with its own template is refused
    if found in (None, "plain") or is_alone and by_vocabulary != "v1":
        return by_vocabulary
    return UNKNOWN


def known_template(args):
    """`own_template` of the run's language model; None where a plan would have to download it."""
    folder = llm_folder(args)
    is_base = folder in (BASES[args.base][1], HERE / BASES["toy"][1])
    if is_base or args.plan and not Path(folder).is_dir():
        return KNOWN_TEMPLATES.get(folder, "v1")
    return own_template(folder)


def set_template(args):
    """Set args.row.template, where the recipe's is v1 and no flag asks for it, to the language
    model's own; args.llm_template is what stage 1 writes down."""
    args.llm_template = None
    row = args.row
    if not row.template or row.projector_type == "qformer":
        return
    if args.template is None or row.template == "plain":
        args.llm_template = known_template(args)
    if row.template != "v1" or args.template or args.llm_template == "v1":
        return
    if args.llm_template == UNKNOWN:
        tell(f"note: {llm_folder(args)}: its chat template is none of ours; the recipe's is v1, "
             f"--template takes another: {', '.join(data.TEMPLATES)}")
        return
    tell(f"note: --template {args.llm_template}, in which the language model has learned to answer "
         "(the recipe's is v1)")
    args.row = replace(row, template=args.llm_template)


def tell(line):
    """A note of the first rank."""
    if os.environ.get("RANK", "0") == "0":
        note(line)
