"""instruct.prompts: what an author is told and shown before it writes about a picture.

    system text: what to write, and in which form     SYSTEM_PROMPTS, FORM
    up to three invented pictures, each with its text   FEW_SHOT
    what is known of the picture                        image_context

[LLaVA] 2304.08485 section 3 and its appendix has the idea: captions and boxes stand for a picture
that the author never sees. The words here are ours.
"""
import functools

CONTEXT_CAPTIONS = "Some people looked at a picture, and each wrote a sentence about it. "
CONTEXT_BOXES = ("Below them stands where its objects are, as name: [left, top, right, bottom] in "
                 "parts of width and height. ")
SYSTEM_PROMPTS = {
    "conversation": CONTEXT_CAPTIONS +
        "Answer as somebody who has that picture before their eyes. Write down a talk in which a "
        "person asks and you reply: what things there are, how many, of what colour, what they do, "
        "where they are and how they lie to each other. Each question must have a sure answer: the "
        "thing can be seen, or surely is not there. Then come one or two questions for which one "
        "has to know more than the picture shows; reply to those at length. Do not mention the "
        "sentences that you were given.",
    "detail": CONTEXT_CAPTIONS + CONTEXT_BOXES +
        "Write one paragraph that tells all there is to see, as if the picture lay before you. "
        "Turn the numbers into words such as 'on the left' or 'behind', say how many there are of "
        "a thing, and repeat neither the numbers nor the fact that you were given any.",
    "reasoning": CONTEXT_CAPTIONS + CONTEXT_BOXES +
        "Make up one hard question about what the picture means: why something is done, what may "
        "happen next, what is risky or useful. It needs both the picture and knowledge of the "
        "world, and must not give away what can be seen. Then reply step by step as somebody who "
        "sees the picture. Mention neither sentences nor numbers."}
FORM = "\n\nUse this form and write nothing around it:\n"
REPAIR_PROMPT = (
    "You get a text that should describe a picture. Leave out what is said a second time, "
    "stray signs and anything that is not English. Finish or leave out sentences that break "
    "off. Change nothing else. Reply with the text alone, even if nothing was wrong with it.")
CONTINUE_PROMPT = "Continue"                # [MiniGPT-4] section 3.2
# Three invented pictures: (captions, boxes, conversation, description, question and reply).
FEW_SHOT = (
    (("A woman cuts bread on a wooden counter.", "Somebody makes breakfast in a bright kitchen.",
      "A cat watches a woman who slices a loaf.", "A grey cat sits beside a kitchen counter.",
      "A woman with a knife, a loaf and two bowls."),
     (("person", (.31, .08, .662, .97)), ("cat", (.702, .55, .88, .93)),
      ("knife", (.44, .51, .53, .575)), ("bowl", (.12, .522, .2, .59)),
      ("bowl", (.215, .53, .287, .594))),
     (("What is the woman doing?", "She is cutting a loaf of bread on the counter."),
      ("Which animal is in the kitchen?", "A grey cat is sitting beside the counter."),
      ("How many bowls are there?", "There are two bowls."),
      ("Is there a dog?", "No, the only animal is the cat."),
      ("Why might the cat be waiting there?", "Cats learn quickly that food falls where people cook"
       ". It may hope for a crumb, or simply keep company with somebody it knows.")),
     "A woman stands in the middle of a bright kitchen and cuts a loaf of bread on a wooden "
     "counter. To her left, close together, are two bowls. On the right a grey cat sits low beside "
     "the counter and looks up at her.",
     ("What should the woman be careful about?", "She is holding a sharp knife while an animal is "
      "within reach. Cats jump without warning, and one that lands on the counter could push her "
      "arm. She would do well to keep the cat away until the loaf is cut.")),
    (("People wait for a bus in the rain.", "Three umbrellas at a bus stop on a grey day.",
      "A red bus comes towards people with umbrellas.", "A wet street with a bus and a bicycle.",
      "A bicycle leans against the bus stop sign."),
     (("bus", (.52, .2, .985, .76)), ("person", (.1, .4, .19, .88)), ("person", (.2, .41, .29, .9)),
      ("person", (.33, .39, .41, .87)), ("bicycle", (.01, .58, .11, .9))),
     (("What is the weather like?", "It is raining, and the street is wet."),
      ("What colour is the bus?", "The bus is red."),
      ("How many people are waiting?", "Three people are waiting, each under an umbrella."),
      ("Where is the bicycle?", "It leans against the sign of the bus stop, on the far left."),
      ("Why may the cyclist have stopped?", "Riding in the rain is slippery and cold. The owner may"
       " have decided to leave the bicycle and go on by bus.")),
     "It is a rainy day. On the left three people stand in a row under umbrellas, and at the very "
     "edge a bicycle leans against the sign of the bus stop. From the right a large red bus comes "
     "along the wet street and fills almost half of the view.",
     ("What will these people probably do in a moment?", "They stand in a row at a stop while the "
      "vehicle they wait for is already close. As it halts they will close their umbrellas, let "
      "others get off and step in, glad to be out of the rain.")),
    (("A boy flies a kite on the beach.", "A dog runs after a child at the sea.",
      "A yellow kite high above the sand.", "A child and a dog play on an empty beach.",
      "A boy with a kite looks up to the sky."),
     (("person", (.42, .6, .5, .91)), ("dog", (.6, .75, .71, .9)), ("kite", (.2, .05, .31, .17))),
     (),
     "A boy stands near the middle of an empty beach and looks up at a yellow kite, which flies "
     "high on the left. A little to his right a dog runs towards him over the sand.",
     ("What does the scene tell about the wind?", "Such a toy stays up only if air moves past it "
      "steadily, and near the sea that is common. Since it flies far to one side of the boy, the "
      "wind blows towards that side, strongly enough to carry it and hold the line tight.")))


def format_qa(pairs):
    """[(question, answer)] in LLaVA's blocks."""
    return "\n===\n".join(f"Question:\n===\n{q}\n===\nAnswer:\n===\n{a}" for q, a in pairs)


def image_context(kind, captions, boxes):
    """What is known of a picture, as text: captions, an empty line, name: [x1, y1, x2, y2]."""
    lines = list(captions)
    # quirk: official conversations show no boxes, and 2 examples, not 3
    if boxes and kind != "conversation":
        lines.append("")
        for name, box in boxes:
            lines.append(f"{name}: [{', '.join(str(round(v, 3)) for v in box)}]")
    return "\n".join(lines)


@functools.cache
def few_shot_messages(kind, shots):
    """((role, text), ...): what to do, and examples. One tuple, shared by all requests of a run."""
    forms = {"conversation": FORM + format_qa([("...", "...")] * 2),
             "reasoning": FORM + format_qa([("...", "...")]), "detail": ""}
    messages = [("system", SYSTEM_PROMPTS[kind] + forms[kind])]
    most = 2 if kind == "conversation" else 3
    for captions, boxes, pairs, text, hard_pair in FEW_SHOT[:min(shots, most)]:
        answers = {"conversation": format_qa(pairs), "detail": text,
                   "reasoning": format_qa([hard_pair])}
        messages.append(("user", image_context(kind, captions, boxes)))
        messages.append(("assistant", answers[kind]))
    return tuple(messages)
