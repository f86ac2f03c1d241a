"""evaluate.cider: CIDEr-D, by which captions are judged.    [CIDEr] 1411.5726

    caption --words--> n-grams of 1 to 4 words, each weighed by how rare it is (tf-idf)
    score of a picture = 10 * mean over its references and the four n of

        sum over n-grams of min(candidate, reference) * reference
        --------------------------------------------------------- * exp(-(length difference)² / 72)
                   |candidate| * |reference|

The document frequency of an n-gram is the number of pictures one of whose references holds it, and
the idf is log(pictures) - log(frequency): so a score depends on the whole set, and one picture
alone scores 0. quirk: the "length" of cider_scorer.py is the number of word pairs.

The words are those of the official tool, the Stanford tokenizer in lower case without punctuation,
in a small form: `words` says what of it is here.
Source: pycocoevalcap, cider/cider_scorer.py and tokenizer/ptbtokenizer.py.
"""
import math
import re
from collections import Counter

SIZES = 1, 2, 3, 4
SIGMA = 6.0

# what the official tool removes behind the tokenizer. quirk: its brackets are in capitals, the
# tokens in lower case: so -lrb- and -rrb- stay
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
               "gimme": "gim me", "lemme": "lem me"}
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "prof", "inc", "corp", "ltd"}
NEGATION, ENDING = re.compile(r"(?<=\w)(n't)$"), re.compile(r"(?<=\w)('(?:s|re|ve|ll|d|m))$")
TOKEN = re.compile(r"""
    \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s|am|pm|\w+)?   # 3.5  1,000  10:30  1/2  3rd  50s
  | (?:[a-z]\.){2,}                                 # u.s.
  | (?:[^\W_]+\.)+(?:com|net|org|edu)\b             # www.example.com
  | [^\W_]+(?:[-'&@/][^\W_]+)*                      # man  black-and-white  don't  at&t
  | \.\.+ | --+                                     # ...  --
  | \S""", re.VERBOSE)


def words(text):
    """The tokens of a caption, as the official tool counts them: lower case; don't is do n't and
    dog's is dog 's; a word with hyphens is one; punctuation is gone.

    Not here: the tokenizer's longer lists of abbreviations, and its rules for addresses and
    emoticons."""
    text = text.lower().replace("\n", " ").translate(str.maketrans("’‘“”", "''\"\""))
    tokens = []
    for match in TOKEN.finditer(text):
        token = match.group()
        if token in BRACKETS:
            tokens.append(BRACKETS[token])
            continue
        if re.fullmatch(r"\.\.+", token):
            token = "..."
        if match.end() < len(text) and text[match.end()] == "." and token in ABBREVIATIONS:
            token += "."                    # its period is a token of its own, and is dropped
        parts = SPLIT_WORDS.get(token, token)
        parts = NEGATION.sub(r" \1", parts)
        parts = ENDING.sub(r" \1", parts)
        tokens += parts.split()
    return [token for token in tokens if token not in PUNCTUATION and token != '"']


def ngrams(tokens):
    """{n-gram: count} of 1 to 4 tokens."""
    counts = Counter()
    for n in SIZES:
        for i in range(len(tokens) - n + 1):
            counts[tuple(tokens[i:i + n])] += 1
    return counts


def weigh(counts, frequency, log_pictures):
    """([{n-gram: tf-idf}] by n, [norm] by n, number of word pairs) of one caption."""
    vectors, norms, pairs = [{} for _ in SIZES], [0.0] * len(SIZES), 0
    for gram, count in counts.items():
        n = len(gram) - 1
        weight = count * (log_pictures - math.log(max(1, frequency[gram])))
        vectors[n][gram] = weight
        norms[n] += weight ** 2
        if n == 1:
            pairs += count
    return vectors, [math.sqrt(norm) for norm in norms], pairs


def similarity(candidate, reference):
    """Mean over n of the clipped cosine of two captions as `weigh` gives them."""
    total = 0.0
    for n in range(len(SIZES)):
        vector, other = candidate[0][n], reference[0][n]
        product = sum(min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0)
                      for gram, weight in vector.items())
        if candidate[1][n] and reference[1][n]:
            product /= candidate[1][n] * reference[1][n]
        total += product * math.exp(-(candidate[2] - reference[2]) ** 2 / (2 * SIGMA ** 2))
    return total / len(SIZES)


def cider_d(candidates, references):
    """[score] of each picture: candidates [caption], references [[caption]]. Their mean is the
    figure of a set; papers print it times 100."""
    mine = [ngrams(words(text)) for text in candidates]
    theirs = [[ngrams(words(text)) for text in texts] for texts in references]
    frequency = Counter()
    for captions in theirs:
        frequency.update(set().union(*captions))
    log_pictures = math.log(len(theirs))
    scores = []
    for counts, captions in zip(mine, theirs, strict=True):
        candidate = weigh(counts, frequency, log_pictures)
        sums = [similarity(candidate, weigh(caption, frequency, log_pictures))
                for caption in captions]
        scores.append(10 * sum(sums) / len(sums))
    return scores
