"""formats/bert.py: the tokenizers of the Q-Former, which is BERT's, and of the toy CLIP.

BERT cuts lower-cased words into the longest known pieces (WordPiece): circles -> circle ##s.
"""

import json
from collections import Counter
from pathlib import Path

import tokenizers
import torch
from torch import nn

from formats.errors import BadData, BadModel
from formats.tokenizers import read_tokenizer

SPECIAL = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"


def wordpiece_tokenizer(tokens):
    """BERT's tokenizer over a list of tokens: lower case, no accents, words cut into pieces."""
    lib = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    lib.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    lib.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    lib.decoder = tokenizers.decoders.WordPiece()
    lib.add_special_tokens(list(SPECIAL))
    lib.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        [(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")])
    return lib


class BertTokenizer:
    """Texts to ids and back, as BERT does it. .pad .cls .sep .dec: ids; len(): rows for all ids.

    [DEC] is BLIP's: it takes the place of [CLS] where a caption is written. A folder without it
    (BERT's own) gets it as the next free id, 30522."""

    def __init__(self, folder):
        """From tokenizer.json or vocab.txt of a folder. Raises BadModel."""
        folder = Path(folder)
        if (folder / "tokenizer.json").exists() or not (folder / "vocab.txt").exists():
            read_tokenizer(folder)                              # refuses what is damaged
            lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            lib.no_truncation()
            lib.no_padding()
        else:
            try:
                tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            except ValueError as error:
                raise BadModel(f"{folder}/vocab.txt: {error}: replace the file") from None
            if len(set(tokens)) != len(tokens) or set(SPECIAL) - set(tokens):
                raise BadModel(f"{folder}/vocab.txt: a token twice, or one of "
                                    f"{' '.join(SPECIAL)} missing: replace the file")
            lib = wordpiece_tokenizer(tokens)
        self._take(lib, folder)

    def _take(self, lib, where):
        ids = [lib.token_to_id(token) for token in ("[PAD]", "[CLS]", "[SEP]")]
        if None in ids:
            raise BadModel(f"{where}: its tokenizer has no [PAD], [CLS] or [SEP]; give BERT's")
        base = lib.get_vocab_size(with_added_tokens=False)
        if lib.get_vocab_size() == base:
            lib.add_special_tokens(["[DEC]"])
        # whatever else was added since, <image> for one, the row behind BERT's is that of [DEC]
        self.dec = lib.token_to_id("[DEC]") or base
        self.pad, self.cls, self.sep = ids
        self.size = max(base, self.dec + 1)
        lib.encode_special_tokens = True            # a caption that says "[SEP]" says just that
        self.lib = lib

    @classmethod
    def build(cls, texts, size=30000):
        """A vocabulary of `texts`: their characters, so that every word can be spelled, and their
        most frequent words."""
        splits = wordpiece_tokenizer(list(SPECIAL))
        tally = Counter(word for text in texts for word, _ in splits.pre_tokenizer.pre_tokenize_str(
            splits.normalizer.normalize_str(text)))
        letters = sorted({c for word in tally for c in word})
        often = sorted(tally, key=lambda word: (-tally[word], word))
        tokens = dict.fromkeys((*SPECIAL, *letters, *("##" + c for c in letters), *often))
        words = cls.__new__(cls)
        words._take(wordpiece_tokenizer(list(tokens)[:size - 1]), "BertTokenizer.build")
        return words

    def __len__(self):
        return self.size

    def check_fits(self, rows):
        """Returns self. Raises BadModel if an embedding of `rows` rows is too small for the ids."""
        if len(self) > rows:
            raise BadModel(f"the tokenizer has {len(self)} tokens, the Q-Former {rows} rows; take "
                           "both from one place")
        return self

    def encode(self, texts, length=32, left=False):
        """Texts to ids (B, T) and mask (B, T) bool, False at padding: [CLS] words [SEP], of which
        `length` tokens are kept, the last words if left. Official lengths: 32 in training, 35 in
        retrieval, 128, left, for InstructBLIP, which may be asked without words: [CLS] [SEP], as
        in transformers. Elsewhere a text without words raises BadData."""
        rows = []
        for i, text in enumerate([texts] if type(texts) is str else texts):
            try:
                row = self.lib.encode(text, add_special_tokens=False).ids
            except TypeError:
                raise BadData(f"text {i}: {text!r:.60} is not Unicode text: save it as valid "
                                   "UTF-8") from None
            if not row and not left:
                raise BadData(f"text {i}: {text!r:.60} holds no word: a picture cannot be "
                                   "compared with nothing; leave it out")
            row = row[2 - length:] if left else row[:length - 2]
            rows.append(torch.tensor([self.cls, *row, self.sep]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        size = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < size[:, None]

    def decode(self, ids):
        return self.lib.decode([int(i) for i in ids])

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.lib.save(str(folder / "tokenizer.json"))
        names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep",
                                                                   "mask")}
        (folder / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "BertTokenizer", **names, "bos_token": "[DEC]",
            "do_lower_case": True, "padding_side": "right", "model_max_length": 512},
            indent=2) + "\n")


def toy_clip_tokenizer(folder):
    """The toy CLIP's tokenizer: a function from texts to ids (B, T), padded behind the end."""
    import tokenizers
    words = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    words.enable_padding(pad_id=0)
    return lambda texts: torch.tensor([e.ids for e in words.encode_batch(list(texts))])
