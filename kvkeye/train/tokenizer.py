"""Builds the small tokenizer of the bundled checkpoints: whole template words, single bytes for all else.

The pre-tokenizer pattern and the special-token strings are the family's; the vocabulary is our own. A pre-token that
is in the vocabulary is one token, any other is spelled by bytes, so rendered words are spelled letter by letter.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from kvkeye.train.questions import corpus

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of the family's ids; True where the family's tokenizer flags the token as special.
SPECIAL_TOKENS: tuple[tuple[str, bool], ...] = (
    ("<|endoftext|>", True),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    *((f"<|{name}_{end}|>", False) for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    ("<tool_call>", False),
    ("</tool_call>", False),
    *(
        (f"<|{name}|>", False)
        for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
    *((f"<|{name}_{end}|>", False) for name in ("point", "ocr_text", "clip_time") for end in ("start", "end")),
)
VOCAB_MULTIPLE = 64
_CHAT_WORDS = (
    "user",
    "assistant",
    "system",
    "/no",
    "/think",
    "no",
    "_",
    "think",
    "\n",
    "yes",
    "You",
    " are",
    " a",
    " helpful",
)


def build_tokenizer() -> Tokenizer:
    """The tokenizer: ids 0..255 are bytes, then whole words in alphabetical order, then the special tokens."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary = {glyph: i for i, glyph in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {piece for text in (*corpus(), *_CHAT_WORDS) for piece, _ in split.pre_tokenize_str(text)}
    for word in sorted(words - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in SPECIAL_TOKENS])
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizer_config.json` that belongs to it."""
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for text, special in SPECIAL_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
