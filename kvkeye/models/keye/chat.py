"""Messages to prompt text: OpenAI-style content, the checkpoint's own chat template, the mode suffix.

Text that a user writes never becomes a special token: each place where it spells one is hidden while the template is
rendered and handed over as literal text. Knows no token ids, and decodes no media.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvkeye.errors import ConfigError, RequestError
from kvkeye.media.options import Kind, MediaOptions
from kvkeye.models.keye.config import read_json

ROLES = ("system", "user", "assistant", "tool")
MODES = {None: "", "auto": "", "think": "/think", "no_think": "/no_think"}
_SOURCES: dict[str, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class MediaItem:
    """A picture or clip of a conversation, not yet read. `where` names it in error messages."""

    kind: Kind
    source: object
    options: MediaOptions
    where: str


@dataclass(frozen=True)
class Conversation:
    """Messages as the template sees them (role; text, or a list of typed items), and the media in order."""

    messages: list[dict[str, Any]]
    media: list[MediaItem]


def normalise(messages: Sequence[Mapping[str, Any]], mode: str | None = None) -> Conversation:
    """Checks messages and separates their media.

    `content` is text or a list of {"type": "text", "text"}, {"type": "image", "image": source},
    {"type": "image_url", "image_url": source or {"url": source}} and the same with video; options of a picture or clip
    stand beside the source, beside the url, or in `preprocess_kwargs`. `mode` "think" or "no_think" appends its suffix
    to the last user text.

    Raises RequestError naming the message and the item
    """
    if mode not in MODES:
        raise RequestError(f"mode={mode!r}; required is one of think, no_think, auto or None.", param="mode")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages: empty or no list; give at least one message.", param="messages")
    media: list[MediaItem] = []
    seen = [_message(message, f"messages[{k}]", media) for k, message in enumerate(messages)]
    if MODES[mode]:
        _append_to_last_user(seen, MODES[mode])
    for message in seen:  # plain templates take text only as a string
        if all(item["type"] == "text" for item in message["content"]):
            message["content"] = "".join(item["text"] for item in message["content"])
    return Conversation(seen, media)


def _message(message: object, where: str, media: list[MediaItem]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: a {type(message).__name__}; required is an object.", param="messages")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"{where}: role={role!r}; required is one of {', '.join(ROLES)}.", param="messages")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    if not isinstance(content, (list, tuple)) or not content:
        raise RequestError(f"{where}: content is no text and no list of items; give one.", param="messages")
    items = [_item(item, f"{where}.content[{k}]", media) for k, item in enumerate(content)]
    return {"role": role, "content": items}


def _item(item: object, where: str, media: list[MediaItem]) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise RequestError(f"{where}: a {type(item).__name__}; required is an object.", param="messages")
    kind = item.get("type") or next((name for name in ("text", *_SOURCES) if name in item), None)
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise RequestError(f"{where}: text={item.get('text')!r}; required is a string.", param="messages")
        return {"type": "text", "text": item["text"]}
    name = next(
        (name for name, media_kind in _SOURCES.items() if name in item and media_kind == _SOURCES.get(str(kind))), None
    )
    if name is None:
        raise RequestError(
            f"{where}: type={kind!r} with fields {sorted(map(str, item))}; known are text, {', '.join(_SOURCES)}, each "
            "with a field of its name.",
            param="messages",
        )
    media.append(_media_item(item, name, where))
    return {"type": _SOURCES[name]}


def _media_item(item: Mapping[str, Any], name: str, where: str) -> MediaItem:
    source = item[name]
    options = {key: value for key, value in item.items() if key not in ("type", name)}
    if isinstance(source, Mapping):
        options.update({key: value for key, value in source.items() if key != "url"})
        source = source.get("url")
    if source is None:
        raise RequestError(f"{where}: {name} names no source; give a path, a data: URI or an object.", param="messages")
    extra = options.pop("preprocess_kwargs", None)
    if isinstance(extra, Mapping):
        options.update(extra)
    elif extra is not None:
        raise RequestError(f"{where}: preprocess_kwargs={extra!r}; required is an object.", param="preprocess_kwargs")
    kind = _SOURCES[name]
    return MediaItem(kind, source, MediaOptions.parse(kind, options, where), where)


def _append_to_last_user(messages: list[dict[str, Any]], suffix: str) -> None:
    """After the last text of the last user message, without a space; a message without text gets one."""
    user = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if user is None:
        raise RequestError("messages: a mode is set but there is no user message. Add one.", param="mode")
    text = next((item for item in reversed(user["content"]) if item["type"] == "text"), None)
    if text is None:
        user["content"].append({"type": "text", "text": suffix})
    else:
        text["text"] += suffix


class Shield:
    """Hides special-token strings that stand in users' text from the tokenizer."""

    def __init__(self, special: Iterable[str]) -> None:
        longest_first = sorted(special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._nonce = f"\0{secrets.token_hex(8)}:"  # not to be guessed, so that text cannot imitate it
        self._marks = re.compile(f"({re.escape(self._nonce)}[0-9]+\0)")
        self._hidden: list[str] = []

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of normalised messages with a mark in place of each special-token string."""
        return [{"role": message["role"], "content": self._content(message["content"])} for message in messages]

    def _content(self, content: Any) -> Any:
        if isinstance(content, str):
            return self._spelled.sub(self._mark, content)
        return [{**item, "text": self._content(item["text"])} if item["type"] == "text" else item for item in content]

    def _mark(self, found: re.Match[str]) -> str:
        self._hidden.append(found.group())
        return f"{self._nonce}{len(self._hidden) - 1}\0"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered prompt; True where the piece is a hidden string, to be encoded as plain text."""
        pieces = self._marks.split(rendered)
        found = [(piece, False) for piece in pieces]
        for k in range(1, len(pieces), 2):
            found[k] = (self._hidden[int(pieces[k][len(self._nonce) : -1])], True)
        return [piece for piece in found if piece[0]]


class ChatTemplate:
    """A checkpoint's Jinja chat template, run in a sandbox."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise_exception
        self.tokens, self.where = dict(tokens), where
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{where}: the chat template does not compile: {error}. Download it again.") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate:
        """chat_template.json, else chat_template.jinja, else the one in tokenizer_config.json."""
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        tokens = {name: value for name, value in settings.items() if name.endswith("_token") and isinstance(value, str)}
        if (folder / "chat_template.json").exists():
            name, source = "chat_template.json", read_json(folder / "chat_template.json").get("chat_template")
        elif (folder / "chat_template.jinja").exists():
            name, source = "chat_template.jinja", (folder / "chat_template.jinja").read_text(encoding="utf-8")
        else:
            name, source = "tokenizer_config.json", settings.get("chat_template")
        if isinstance(source, list):  # named templates
            source = next((entry.get("template") for entry in source if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            raise ConfigError(
                f"{folder}: no chat template in chat_template.json, chat_template.jinja or tokenizer_config.json. "
                "Download the checkpoint's chat_template.json."
            )
        return cls(source, tokens, f"{folder / name}")

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Prompt text of normalised messages. Raises RequestError where the template rejects them."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self.tokens)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RequestError(
                f"messages: the chat template of {self.where} rejects them: {error}.", param="messages"
            ) from None


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
