"""decoding/chat.py: questions and answers in the terminal, and more pictures on the way.

    > What is it?                 a question: `reply` writes the answer
    > /image cat.png              a picture in front of the next question, behind those before
    > /reset                      forget all but the newest pictures
    > /save talk.json             the conversation as LLaVA JSON
    > /quit

What goes wrong in a turn ends that turn only. When the context is full, the oldest turns go."""

import os
import sys
from bisect import bisect_left
from pathlib import Path

from decoding.flags import prompt_error
from decoding.pictures import check_context, image_turns, join_pictures, load_pictures
from decoding.prompt import build_prompt, prompt_length
from formats.errors import note, UsageError, UserError
from formats.files import write_json
from formats.llava_rows import llava_row


def accept_any_bytes():
    """A byte that is no UTF-8 on stdin becomes an error line, and does not stop the program."""
    sys.stdin.reconfigure(errors="surrogateescape")
    sys.stdout.reconfigure(errors="replace")


def without_oldest(turns, groups, count):
    """The turns and their pictures {turn: group} without the `count` oldest questions and their
    answers. If no turn that is left has pictures, the first gets the newest of those before."""
    left = {turn - 2 * count: group for turn, group in groups.items() if turn >= 2 * count}
    if groups and not left:
        left = {0: groups[max(groups)]}
    return turns[2 * count:], left


def trim_history(model, turns, groups, max_new_tokens):
    """The newest turns that fit the context with an answer behind them, at least the last, and
    their pictures: see `without_oldest`."""
    context = model.llm.config.context
    limit = context - min(max_new_tokens, context // 4)

    def fits(count):
        kept, left = without_oldest(turns, groups, count)
        ids = build_prompt(kept, model.template, model.tokenizer, image_turns(left))
        return prompt_length(model, ids, join_pictures(left)[1]) <= limit
    if len(turns) < 2 or fits(0):
        return turns, groups
    # a prompt is a text to tokenize, so of a long talk only a few are tried
    count = bisect_left(range(len(turns) // 2), True, 1, key=fits)
    note(f"note: the context of {context} places is full: the oldest {count} question(s) and "
         "answer(s) are forgotten")
    return without_oldest(turns, groups, count)


def add_picture(model, groups, turn, path):
    """The groups with one more picture in this turn, behind those that it has; {0: its group}
    alone if the model takes no more. Raises as `check_context` does."""
    new = load_pictures(model, [path])
    both = new
    if turn in groups:
        pixels, sizes = join_pictures({0: groups[turn], 1: new})
        both = pixels, sizes, [*groups[turn][2], path]
    after = {**groups, turn: both}
    try:
        build_prompt(["?"] * (turn + 1), model.template, model.tokenizer, image_turns(after))
    except UsageError as error:
        note(f"note: {error}: the talk begins anew with this one")
        return {0: new}
    check_context(model, both)
    return after


def relative_names(paths):
    """The folder that holds all the files, and their names in it."""
    paths = list(map(os.path.abspath, paths))
    root = os.path.commonpath(list(map(os.path.dirname, paths)))
    return root, [Path(path).relative_to(root).as_posix() for path in paths]


def save_conversation(path, turns, groups):
    """Write LLaVA JSON, with the pictures of the turns that have been asked."""
    asked, paths = {}, []
    for turn in sorted(groups):
        if turn < len(turns):                       # the next question has pictures already
            asked[turn] = groups[turn]
            paths += groups[turn][2]
    if not paths:
        write_json(path, [llava_row(None, turns, ())])
        return note(f"saved: {path}")
    root, names = relative_names(paths)
    if len(names) == 1:                             # one picture: LLaVA's form, a name and no list
        write_json(path, [llava_row(names[0], turns, image_turns(asked))])
        note(f"saved: {path}")
    else:
        write_json(path, [llava_row(names, turns, image_turns(asked))])
        note(f"saved: {path}, its pictures are in {root}")


class Chat:
    """A conversation: `turns` of person and model alternately, `groups` {turn: picture group}.

    A method for each command; each takes what stands behind the command's name."""

    def __init__(self, model, groups, args, reply):
        """groups: the pictures before the first question, {} if there are none. reply(model, turns,
        groups, args) prints an answer and returns it."""
        self.model, self.args, self.reply = model, args, reply
        self.turns, self.groups = [], dict(groups)
        self.commands = {"/image": self.image, "/reset": self.reset, "/save": self.save}

    def image(self, path):
        """One more picture in front of the next question."""
        self.groups = add_picture(self.model, self.groups, len(self.turns), path)
        if len(self.turns) not in self.groups:      # the model takes one picture: begin anew
            self.turns = []

    def reset(self, _):
        """Forget all but the newest pictures."""
        newest = self.groups[max(self.groups)] if self.groups else None
        self.turns, self.groups = [], {0: newest} if newest else {}

    def save(self, path):
        """Write the conversation so far."""
        if not path or not self.turns:
            self.unknown(path)
        save_conversation(path, self.turns, self.groups)

    def unknown(self, _):
        raise UsageError("the commands are /image PATH, /reset, /save FILE (once something has "
                         "been said), /quit")

    def question(self, text):
        """Have it answered, after the turns that fit the context."""
        kept, groups = trim_history(self.model, self.turns + [text], self.groups,
                                    self.args.max_new_tokens)
        answer = self.reply(self.model, kept, groups, self.args)
        # only now: an answer that failed leaves the conversation as it was
        self.turns, self.groups = kept + [answer], groups

    def handle(self, text):
        """One line of input: a command or a question. Raises UserError."""
        if wrong := prompt_error(text):
            raise UsageError(wrong)
        command, _, argument = text.partition(" ")
        if command.startswith("/"):
            self.commands.get(command, self.unknown)(argument.strip())
        else:
            self.question(text)


def chat(model, groups, args, reply):
    """Lines from stdin until it ends or says /quit; returns the exit status."""
    conversation = Chat(model, groups, args, reply)
    note("chat: /image PATH (one more picture, behind those before)  /reset  /save FILE  /quit")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
            if text.partition(" ")[0] == "/quit" and not prompt_error(text):
                return 0
            if text:
                conversation.handle(text)
        except EOFError:
            return 0
        except UserError as error:
            note(f"error: {error}")
