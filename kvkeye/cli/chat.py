"""Talks about pictures and clips in the terminal, or with whatever is piped in, line by line.

/image FILE and /video FILE add to the next question; /reset forgets everything said; /stats shows times and counts;
/save FILE writes the conversation as JSON; /help; /quit. Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeye.cli import exits, options
from kvkeye.cli.bundled import resolve_model
from kvkeye.cli.session import Message, Session, open_session, statistics_line
from kvkeye.cli.terminal import AnswerPrinter, count
from kvkeye.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from kvkeye.engine.outputs import Delta

PROMPT = "> "


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--fps", type=options.positive, metavar="N", help="frames per second that are looked at")
    options.add_sampling(parser)
    options.add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    model = resolve_model(arguments.model)
    with open_session(arguments, model) as session:
        chat = Chat(session, model, arguments.fps)
        chat.say(f"{model.name}; /help lists the commands")
        while not chat.is_over:
            line = _read_line()
            if line is None:
                break
            chat.handle(line)
    return exits.OK


def _read_line() -> str | None:
    """The next line without its end; None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  # gives input() a history and editing keys

    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


class Chat:
    """A conversation and the commands on it. A turn that fails changes nothing but that its attachments are gone."""

    def __init__(self, session: Session, model: Path, fps: float | None) -> None:
        self.is_over = False
        self._session, self._model, self._fps = session, model, fps
        self._messages: list[Message] = []
        self._attached: list[dict[str, Any]] = []
        self._last: str | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "image": lambda path: self._attach("image", path),
            "video": lambda path: self._attach("video", path),
            "reset": self._reset,
            "stats": self._stats,
            "save": self._save,
            "help": self._help,
            "quit": self._quit,
        }

    def say(self, text: str) -> None:
        """A remark of the program, not of the model."""
        print(text, file=sys.stderr, flush=True)

    def handle(self, line: str) -> None:
        """One line of input: a command or a question."""
        line = line.strip()
        if not line:
            return
        try:
            if line.startswith("/"):
                self._command(*line[1:].partition(" ")[::2])
            else:
                self._ask(line)
        except (RequestError, CapacityError, exits.CommandError) as error:
            self.say(str(error))

    def _command(self, name: str, rest: str) -> None:
        if name not in self._commands:
            raise RequestError(f"/{name}: unknown; known are {', '.join('/' + known for known in self._commands)}.")
        self._commands[name](rest.strip())

    def _ask(self, question: str) -> None:
        attached, self._attached = self._attached, []
        content: Any = [*attached, {"type": "text", "text": question}] if attached else question
        messages = [*self._messages, {"role": "user", "content": content}]
        printer, pieces = AnswerPrinter(), list[str]()

        def show(delta: Delta) -> None:
            pieces.append(delta.text)
            printer.write(delta.reasoning, delta.text)

        try:
            self._last = statistics_line(self._session.ask(messages, show))
        except KeyboardInterrupt:
            self._last = None
            printer.end()
            self.say("stopped")
        finally:
            printer.end()
        # Reasoning is not sent back.
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _attach(self, kind: str, path: str) -> None:
        if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
            path = path[1:-1]
        if not path:
            raise RequestError(f"/{kind}: no file named; write /{kind} FILE.")
        self._attached.append(options.media_item(kind, path, self._fps))
        self.say(f"{count(len(self._attached), 'attachment')} for the next question")

    def _reset(self, rest: str) -> None:
        self._messages, self._attached = [], []
        self.say("forgotten")

    def _stats(self, rest: str) -> None:
        if self._last is not None:
            self.say(f"last answer: {self._last}")
        stats = asdict(self._session.llm.stats())
        self.say("engine: " + ", ".join(f"{name[4:]} {n}" for name, n in stats.items() if name.startswith("num_")))

    def _save(self, path: str) -> None:
        if not path:
            raise RequestError("/save: no file named; write /save FILE.")
        text = json.dumps({"model": str(self._model), "messages": self._messages}, indent=2, ensure_ascii=False)
        try:
            Path(path).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"/save {path}: {error.strerror}. Choose another file.") from None
        self.say(f"saved {count(len(self._messages), 'message')} to {path}")

    def _help(self, rest: str) -> None:
        self.say((__doc__ or "").partition("\n\n")[2].strip())

    def _quit(self, rest: str) -> None:
        self.is_over = True
