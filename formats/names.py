"""TODO"""

import re

from formats.errors import BadModel

ZEROS = "(zeros)"               # in a weight table: a piece that is in no file
# Every way in which the tensors of a LLaVA have been spelled, rewritten step by step to the first,
# which `save_pretrained` writes. The prefixes and vision_model. come and go independently.
#   2023-25  language_model.model.*   multi_modal_projector.linear_1   vision_tower.vision_model.*
#   4.52-    model.language_model.*, lm_head, model.multi_modal_projector.*, model.vision_tower.*
#   5.x      as the first, without vision_model.
#   official model.layers.*, model.mm_projector.0, model.vision_tower.vision_tower.vision_model.*
LLAVA_SPELLINGS = [(re.compile(old), new) for old, new in (
    (r"^model\.(?=(language_model|multi_modal_projector|mm_projector|vision_tower)\.)", ""),
    (r"^model\.(?=image_newline$)", ""),
    (r"^(vision_tower\.)+(vision_model\.)?", "vision_tower.vision_model."),
    (r"^(language_model\.|model\.)(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^mm_projector\.(0\.)?(?=weight|bias)", "multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."))]


def canonical(name):
    """A tensor's name in the first spelling."""
    for old, new in LLAVA_SPELLINGS:
        name = old.sub(new, name)
    return name


def canonical_names(weights):
    """{our spelling of a tensor's name: the file's}. Raises BadModel if two are the same."""
    table = {}
    for name in weights:
        ours = canonical(name)
        if ours in table:
            raise BadModel(f"tensors {table[ours]} and {name} are the same one in two "
                                "spellings: take the checkpoint from one source")
        table[ours] = name
    return table
