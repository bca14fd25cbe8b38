"""Draws fresh scenes that no training run has seen and asks the bundled model about them.

For each picture and clip: question, expected answer, answer as it comes, statistics. The pictures are written to a
folder that is named first; `--seed` repeats a run. Where video pipelines are bundled, two long clips follow, one from a
sentence (VideoMerge) and one from a picture (k-step search), each with a report whose strip shows its frames.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeye.cli import exits, options
from kvkeye.cli.bundled import PIPELINES, resolve_model
from kvkeye.cli.session import Session, open_session, statistics_line
from kvkeye.cli.terminal import AnswerPrinter, count
from kvkeye.utils.assets import ASSETS

if TYPE_CHECKING:
    from kvkeye.cli.drawings import Drawing
    from kvkeye.train.questions import Turn

MAX_TOKENS = 200  # the longest canonical answer has fewer


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same scenes again (default: a random one)")
    parser.add_argument("--pictures", type=int, default=3, metavar="N", help="pictures to draw (default: 3)")
    parser.add_argument("--clips", type=int, default=1, metavar="N", help="clips to draw (default: 1)")
    parser.add_argument(
        "--video", type=float, default=10.0, metavar="S", help="seconds of each long clip, 0 for none (default: 10)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where everything goes (default: a new temporary folder)")
    parser.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=f"longest answer (default: {MAX_TOKENS})"
    )
    options.add_engine(parser)
    parser.set_defaults(temperature=0.0, mode=None)


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.pictures, arguments.clips) < 0 or arguments.pictures + arguments.clips == 0:
        given = f"--pictures {arguments.pictures} --clips {arguments.clips}"
        raise exits.CommandError(f"{given}: numbers of at least 0 are required, and one above it.", exits.USAGE)
    model = resolve_model(arguments.model)
    seed = secrets.randbelow(1 << 32) if arguments.seed is None else arguments.seed
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="kvkeye-demo-")).expanduser()
    from kvkeye.cli.drawings import draw

    print(f"seed {seed}; pictures in {folder}", flush=True)
    drawings = draw(seed, arguments.pictures, arguments.clips, folder)
    arguments.seed = None  # answers are greedy
    scores = []
    with open_session(arguments, model) as session:
        for drawing in drawings:
            print(f"\n{drawing.title}", flush=True)
            scores += [_ask(session, drawing, turn) for turn in drawing.turns]
        stats = session.llm.stats()
    print(f"\ncorrect {sum(score == 1.0 for score in scores)}/{len(scores)}")
    print(
        f"{count(stats.num_steps, 'step')}, {stats.num_prompt_tokens} prompt tokens of which {stats.num_cached_tokens} "
        f"came from the cache, {stats.num_generated_tokens} answer tokens"
    )
    if arguments.video > 0 and all((ASSETS / name).is_dir() for name in PIPELINES):
        from kvkeye.cli.demo_video import long_clips

        return long_clips(seed, arguments.video, folder)
    return exits.OK


def _ask(session: Session, drawing: Drawing, turn: Turn) -> float:
    """Asks one question and prints what is expected and what comes; returns the score of the answer."""
    from kvkeye.train.questions import score

    print(f"  question  {turn.question}\n  expected  {turn.answer}\n  answer    ", end="", flush=True)
    printer = AnswerPrinter(aside=sys.stdout)
    content = [drawing.item, {"type": "text", "text": turn.question}]
    try:
        output = session.ask(
            [{"role": "user", "content": content}], lambda delta: printer.write(delta.reasoning, delta.text)
        )
    finally:
        printer.end()
    result = score(turn, output.outputs[0].text)
    verdict = "right" if result == 1.0 else f"{result:.0%} of the facts" if result > 0 else "wrong"
    print(f"  {verdict:<10}{statistics_line(output)}", flush=True)
    return result
