"""formats/llava_rows.py: the pictures of a question, and a talk as a row of LLaVA's JSON.

    2 pictures, "Is <image> like <image>?"    as many marks: each picture stands where its mark does
    2 pictures, "Are they alike?"             no marks: both stand in front of the question
    1 picture,  "What does <image> do?"       one picture stands in front; the mark is a typed word
"""

from formats.conversations import IMAGE_TOKEN


def marks_its_pictures(text, pictures):
    """Does a question with several pictures have a mark for each?"""
    return pictures > 1 and text.count(IMAGE_TOKEN) == pictures


def llava_row(name, turns, shown=(0,)):
    """One LLaVA sample of texts of person and model alternately, the person's first.

    shown: numbers of turns, one for each picture, which stands at the front of that turn, or at its
    mark. name: of the picture, or a list with one for each, or None. In a file any <image> is a
    picture, so a typed one gets a space."""
    conversation, identity = [], name if type(name) is str else (name or "0")[0]
    for i, text in enumerate(turns):
        pictures = list(shown).count(i)
        if not marks_its_pictures(text, pictures):
            text = f"{IMAGE_TOKEN}\n" * pictures + text.replace(IMAGE_TOKEN, "< image>")
        conversation.append({"from": ("human", "gpt")[i % 2], "value": text})
    image = {} if name is None else {"image": name}
    return {"id": identity, **image, "conversations": conversation}
