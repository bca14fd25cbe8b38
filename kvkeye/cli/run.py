"""Answers one question about pictures or clips. The answer goes to stdout as it comes, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeye.cli import exits, options
from kvkeye.cli.bundled import resolve_model
from kvkeye.cli.session import OnPrepared, Session, open_session, statistics, statistics_line
from kvkeye.cli.terminal import AnswerPrinter

if TYPE_CHECKING:
    from kvkeye.engine import RequestOutput
    from kvkeye.engine.prepare import Prepared


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "kvkeye run [MODEL] [--image FILE]... [--video FILE]... [options] QUESTION"
    parser.add_argument("words", nargs="+", metavar="[MODEL] QUESTION", help=options.MODEL_HELP)
    options.add_media(parser).add_argument(
        "--show-frames", metavar="OUT.png", help="write a contact sheet of what the model is shown"
    )
    options.add_sampling(parser)
    options.add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer")


def run(arguments: argparse.Namespace) -> int:
    name, question = _words(arguments.words)
    model = resolve_model(name)
    content = [options.media_item(kind, path, arguments.fps) for kind, path in arguments.media or ()]
    if arguments.fps is not None and all(item["type"] != "video" for item in content):
        raise exits.CommandError(f"--fps {arguments.fps:g}: there is no --video that it could apply to.", exits.USAGE)
    write_sheet = _sheet_writer(arguments)
    content.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": content}]
    with open_session(arguments, model) as session:
        if arguments.json:
            output = session.ask(messages, on_prepared=write_sheet)
            print(json.dumps(_result(model, question, output)))
            return exits.OK
        printer = AnswerPrinter()
        try:
            output = session.ask(
                messages, lambda delta: printer.write(delta.reasoning, delta.text), on_prepared=write_sheet
            )
        finally:
            printer.end()
    print(statistics_line(output), file=sys.stderr)
    return exits.OK


def _sheet_writer(arguments: argparse.Namespace) -> OnPrepared | None:
    """Writes the contact sheet; refused here where that cannot work. None where none is asked for."""
    if arguments.show_frames is None:
        return None
    if not arguments.media:
        raise exits.CommandError("--show-frames: there is no --image or --video to show.", exits.USAGE)
    from kvkeye.cli import contact_sheet

    path = contact_sheet.check_path(arguments.show_frames)
    names = [Path(source).name for _, source in arguments.media]

    def write(session: Session, prepared: Prepared) -> None:
        items = contact_sheet.items_of(names, prepared.media, *session.normalisation)
        sheet = contact_sheet.contact_sheet(items)
        try:
            sheet.save(path)
        except OSError as error:
            raise exits.CommandError(f"--show-frames {path}: {error.strerror or error}.", exits.USAGE) from None
        for item in items:
            print(item.title, file=sys.stderr)
        print(f"contact sheet of {sheet.width} x {sheet.height} pixels in {path}", file=sys.stderr, flush=True)

    return write


def _words(words: list[str]) -> tuple[str | None, str]:
    """(model or None, question)."""
    if len(words) > 2:
        raise exits.CommandError(
            f"{len(words)} words: {' '.join(words)!r}; required is [MODEL] QUESTION. Put the question in quotes.",
            exits.USAGE,
        )
    if len(words) == 1 and (Path(words[0]) / "config.json").is_file():
        raise exits.CommandError(f"{words[0]!r} is a model; a QUESTION is required. Add it in quotes.", exits.USAGE)
    return (words[0] if len(words) == 2 else None), words[-1]


def _result(model: Path, question: str, output: RequestOutput) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "model": str(model),
        "question": question,
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "token_ids": answer.token_ids,
        "statistics": statistics(output),
    }
