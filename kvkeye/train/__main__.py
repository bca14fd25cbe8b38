"""Scores a folder: a checkpoint trained on scenes, or a pipeline trained on clips. `kvkeye train RECIPE` trains.

python -m kvkeye.train evaluate FOLDER [count=500] [card=true] [quantization=int8]
python -m kvkeye.train evaluate PIPELINE [count=192] [card=true]
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from kvkeye.train.recipe import parse_overrides


def evaluate_folder(folder: Path, count: int, card: bool, quantization: str | None = None) -> None:
    """Prints the table of held-out and shifted scores; with `card` writes the model card too.

    quantization: "int8" scores the model with the weights that an engine with that option computes with.
    """
    import torch

    from kvkeye.layers import quantize_weights
    from kvkeye.models.keye.processor import load_tokenizer
    from kvkeye.models.keye.weights import load_model
    from kvkeye.train.card import write_card
    from kvkeye.train.data import ChatEncoder
    from kvkeye.train.evaluate import evaluate, table

    model, encoder = load_model(folder, torch.float32, "cpu"), ChatEncoder(load_tokenizer(folder))
    if quantization == "int8":
        quantize_weights(model.language)
    elif quantization is not None:
        raise SystemExit(f"quantization={quantization}: expected int8")
    scores = evaluate(model, encoder, "held_out", count, blind=True) + evaluate(model, encoder, "shifted", count)
    print(table(scores))
    if card:
        write_card(folder, scores)


def evaluate_clips(folder: Path, count: int, card: bool) -> None:
    """Prints the scores of a pipeline's own clips; with `card` writes the model card too."""
    from kvkeye.train.clips.card import write_card
    from kvkeye.train.clips.evaluate import evaluate, table

    scores = evaluate(folder, count)
    print(table(scores))
    if card:
        write_card(folder, scores)


def main(arguments: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if len(arguments) < 2 or arguments[0] != "evaluate":
        raise SystemExit(__doc__)
    options = parse_overrides(arguments[2:])
    folder, card = Path(arguments[1]), bool(options.get("card", False))
    if (folder / "model_index.json").is_file():
        evaluate_clips(folder, int(options.get("count", 192)), card)
    else:
        evaluate_folder(folder, int(options.get("count", 500)), card, options.get("quantization"))


if __name__ == "__main__":
    main(sys.argv[1:])
