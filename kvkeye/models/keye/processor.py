"""Messages to what the model and the scheduler take: token ids, position ids, pixel values, media keys.

Everything comes from the checkpoint's JSON files. Knows the two versions' prompt layouts; decoding and sizing of media
are `kvkeye.media`'s. Uses the `tokenizers` library only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from kvkeye.errors import ConfigError, RequestError
from kvkeye.media.decode.decoder import Decoder
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.job import LoadedMedia
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.patches import MediaKey, patchify
from kvkeye.models.keye.chat import ChatTemplate, Conversation, MediaItem, Shield, normalise
from kvkeye.models.keye.config import KeyeConfig, read_json
from kvkeye.models.keye.positions import MediaGrid, MediaKind, mrope_positions
from kvkeye.models.keye.preprocessor import Preprocessor

log = logging.getLogger("kvkeye.processor")

KEY_LAYOUT = "kvkeye media 2"  # changes when the meaning of pixel values changes


@dataclass(frozen=True)
class MediaInput:
    """One picture or clip of a prompt.

    pixel_values      [N, 588] of the processor's pixel_dtype, normalised patches in raster order
    grids             (t, gh, gw) in patches: one for a picture or a Preview clip, one per frame for a 1.5 clip
    key               blake3 of everything that the features and positions depend on
    spans             (first token, number of tokens) of its pads in the prompt, one per grid
    seconds_per_grid  seconds between the frames of a Preview clip
    joint             attention always spans one grid, never several
    timestamps        seconds, one per frame of a 1.5 clip; None where the clock is unknown
    frame_types       0 slow, 1 fast, one per frame of a 1.5 clip
    """

    kind: MediaKind
    pixel_values: torch.Tensor
    grids: list[tuple[int, int, int]]
    key: bytes
    spans: list[tuple[int, int]]
    seconds_per_grid: float | None = None
    joint: bool = True
    timestamps: tuple[float, ...] | None = None
    frame_types: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def blocks(self) -> list[MediaGrid]:
        """The same grids as the model and the position rule take them."""
        return [MediaGrid(self.kind, grid, self.seconds_per_grid) for grid in self.grids]


@dataclass(frozen=True)
class ProcessedPrompt:
    """positions: int64 [3, n]; the token decoded at cache length n has position n + position_delta on all axes."""

    token_ids: list[int]
    positions: torch.Tensor
    position_delta: int
    media: list[MediaInput] = field(default_factory=list)


class KeyeProcessor:
    """Tokenizer, chat template and media rules of one checkpoint. Safe to call from several threads.

    Files are decoded by `decoder`, by default in worker processes that start with the first file; `close` ends them.
    """

    def __init__(
        self,
        config: KeyeConfig,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        preprocessor: Preprocessor,
        generation_defaults: Mapping[str, Any] | None = None,
        limits: MediaLimits | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.config, self.tokenizer, self.template = config, tokenizer, template
        self.preprocessor = preprocessor
        self.generation_defaults: dict[str, Any] = dict(generation_defaults or {})
        self.limits = limits or MediaLimits()
        self.decoder = decoder or MediaDecoder()
        self.max_tokens = config.text.max_position_embeddings
        self.pixel_dtype = torch.float32  # or bf16, where the model rounds to it anyway
        self.eos_token_ids = _eos_token_ids(config, self.generation_defaults)
        self._pads = {"image": config.image_token_id, "video": config.video_token_id}
        self._frame = self._fast_start = self._fast_end = -1
        if config.version == "1.5":
            self._frame, self._fast_start, self._fast_end = (
                _single_id(tokenizer, text) for text in ("<|frame|>", "<|fast_start|>", "<|fast_end|>")
            )
        self._special = self._special_tokens()

    @classmethod
    def from_folder(
        cls, folder: str | Path, limits: MediaLimits | None = None, media_workers: int | None = None
    ) -> KeyeProcessor:
        """Reads config, tokenizer, chat template, preprocessor and generation files. Raises ConfigError.

        `media_workers`: processes that decode files; 0 decodes in this one; default: a core each, at most 4.
        """
        folder = Path(folder)
        config = KeyeConfig.from_folder(folder)
        generation = folder / "generation_config.json"
        return cls(
            config,
            load_tokenizer(folder),
            ChatTemplate.from_folder(folder),
            Preprocessor.from_folder(folder, config),
            read_json(generation) if generation.exists() else None,
            limits,
            MediaDecoder(media_workers),
        )

    def close(self) -> None:
        """Ends the decoding processes. May be called again."""
        if isinstance(self.decoder, MediaDecoder):
            self.decoder.close()

    def process(
        self, messages: Sequence[Mapping[str, Any]], mode: str | None = None, add_generation_prompt: bool = True
    ) -> ProcessedPrompt:
        """A conversation, ready to run.

        Args     mode  "think", "no_think", or "auto" and None for the model's own choice
        Raises   RequestError, MediaError
        """
        if self.template is None:
            raise ConfigError("KeyeProcessor: built without a chat template; pass one, or use process_text.")
        conversation = normalise(messages, mode)
        self._check_counts(conversation)
        shield = Shield(self._special)
        text = self.template.render(shield.hide(conversation.messages), add_generation_prompt)
        ids = self._encode_pieces(shield.split(text))
        self._check_pads(ids, conversation.media)
        return self._assemble(ids, conversation.media)

    def process_text(self, text: str) -> ProcessedPrompt:
        """Raw prompt text, special tokens honoured, without media."""
        if not isinstance(text, str):
            raise RequestError(f"prompt: a {type(text).__name__}; required is a string.", param="prompt")
        ids = self._encode(text)
        self._check_pads(ids, [])
        return self._assemble(ids, [])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, is_literal in pieces:
            # A special token's string, cut after its first character, is no special token any more.
            ids += self._encode(text[:1]) + self._encode(text[1:]) if is_literal else self._encode(text)
        return ids

    def _special_tokens(self) -> list[str]:
        """Strings that users must not be able to spell: all flagged special, and those that lay out media."""
        added = self.tokenizer.get_added_tokens_decoder()
        structural = {*self._pads.values(), self.config.vision_start_token_id, self.config.vision_end_token_id}
        structural |= {self._frame, self._fast_start, self._fast_end}
        return [token.content for token_id, token in added.items() if token.special or token_id in structural]

    def _check_counts(self, conversation: Conversation) -> None:
        for kind, most in (("image", self.limits.max_images), ("video", self.limits.max_videos)):
            count = sum(item.kind == kind for item in conversation.media)
            if count > most:
                raise RequestError(
                    f"messages: {count} {kind}s; at most {most} per request. Send fewer.", param="messages"
                )

    def _check_pads(self, ids: Sequence[int], media: Sequence[MediaItem]) -> None:
        for kind, pad in self._pads.items():
            shown, given = ids.count(pad), sum(item.kind == kind for item in media)
            if shown != given:
                raise RequestError(
                    f"messages: the prompt has {shown} {kind} places for {given} {kind}s. Send pictures and clips as "
                    "content items; the checkpoint's chat template must render a place for each.",
                    param="messages",
                )

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.max_tokens:
            raise RequestError(
                f"messages: the prompt needs {num_tokens} tokens; the context holds {self.max_tokens}. Shorten "
                "the text, or lower max_pixels of pictures, fps, max_frames or total_pixels of clips.",
                param="messages",
            )

    def _assemble(self, ids: list[int], media: Sequence[MediaItem]) -> ProcessedPrompt:
        """Replaces each pad by its item's tokens, in order."""
        out: list[int] = []
        inputs: list[MediaInput] = []
        queues = {kind: iter([item for item in media if item.kind == kind]) for kind in self._pads}
        kinds = {pad: kind for kind, pad in self._pads.items()}
        # Independent of the text, so that a clip keeps its size, and its cached features, from turn to turn.
        room = int(0.9 * self.max_tokens) // max(sum(item.kind == "video" for item in media), 1)
        for token in ids:
            kind = kinds.get(token)
            if kind is None:
                out.append(token)
            else:
                inputs.append(self._load(next(queues[kind]), len(ids), room, out))
        self._check_length(len(out))
        blocks = [(start, grid) for item in inputs for (start, _), grid in zip(item.spans, item.blocks)]
        vision = self.config.vision
        positions, delta = mrope_positions(len(out), blocks, vision.spatial_merge_size, vision.tokens_per_second)
        return ProcessedPrompt(out, positions, delta, inputs)

    def _load(self, item: MediaItem, num_text: int, room: int, out: list[int]) -> MediaInput:
        """Reads one item and appends its tokens to `out`."""
        used = len(out)
        loaded = load_media(
            item.kind,
            item.source,
            item.options,
            self.preprocessor.media,
            self.limits,
            item.where,
            lambda tokens: self._check_length(max(used, num_text) + tokens),
            room,
            self.decoder,
        )
        vision = self.config.vision
        patch = vision.patch_size
        sizes = loaded.sizes
        grids = [(len(g), rows // patch, columns // patch) for g, (rows, columns) in zip(loaded.groups, sizes)]
        lengths = [MediaGrid(item.kind, grid).num_tokens(vision.spatial_merge_size) for grid in grids]
        spans = self._lay_out(loaded, lengths, out)
        return MediaInput(
            kind=item.kind,
            pixel_values=patchify(
                loaded.groups, patch, self.preprocessor.mean, self.preprocessor.std, sizes, self.pixel_dtype
            ),
            grids=grids,
            key=self._key(loaded),
            spans=spans,
            seconds_per_grid=loaded.seconds_per_grid,
            timestamps=loaded.timestamps,
            frame_types=loaded.frame_types,
        )

    def _lay_out(self, loaded: LoadedMedia, lengths: Sequence[int], out: list[int]) -> list[tuple[int, int]]:
        """Appends pads, and around the frames of a 1.5 clip the frame token, its time and the marks of fast frames."""
        pad = self._pads[loaded.kind]
        spans = []
        for k, length in enumerate(lengths):
            fast = False
            if loaded.frame_types is not None:
                fast = loaded.frame_types[k] == 1
                time = "" if loaded.timestamps is None else f"{loaded.timestamps[k]:.1f}"
                out += [self._frame, *self._encode(time), *([self._fast_start] if fast else [])]
            spans.append((len(out), length))
            out += [pad] * length
            if fast:
                out.append(self._fast_end)
        return spans

    def _key(self, loaded: LoadedMedia) -> bytes:
        key = MediaKey().add(KEY_LAYOUT).add(self.config.version).add(loaded.kind)
        key.add(self.preprocessor.mean).add(self.preprocessor.std).add(self.config.vision.patch_size)
        key.add(loaded.seconds_per_grid).add(loaded.timestamps).add(loaded.frame_types)
        return key.add(loaded.resize_to).add(loaded.groups).digest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """`tokenizer.json` of a checkpoint. Raises ConfigError."""
    path = Path(folder) / "tokenizer.json"
    read_json(path)  # errors that name the file, before the library's own
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path}: not readable as a tokenizer: {error}. Download the file again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _single_id(tokenizer: Tokenizer, text: str) -> int:
    token = tokenizer.token_to_id(text)
    if token is None:
        raise ConfigError(
            f"tokenizer.json: {text!r} is not one token; clips of version 1.5 need it. "
            "Use the checkpoint's own tokenizer."
        )
    return int(token)


def _eos_token_ids(config: KeyeConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Stop tokens of config.json and of generation_config.json, each once."""
    given = generation.get("eos_token_id")
    extra = given if isinstance(given, list) else [] if given is None else [given]
    for token in extra:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.text.vocab_size:
            raise ConfigError(f"generation_config.json: eos_token_id={given!r}; required are ids of the vocabulary.")
    return tuple(dict.fromkeys((*config.eos_token_ids, *extra)))
