"""Splits a Keye answer into reasoning and content while it streams. Works on decoded text; knows no tokens.

`<analysis>` and `<think>` bodies are reasoning; `<answer>` bodies and what stands outside all tags are content.
Tags are removed, white space next to a tag is dropped, and everything else is kept to the letter. Outside a body every
tag counts (a stray closing tag is dropped); inside a body only its own closing tag does, so an answer may talk about
tags.
"""

from __future__ import annotations

REASONING_TAGS = ("analysis", "think")
_OPENING = {f"<{name}>": f"</{name}>" for name in (*REASONING_TAGS, "answer")}
_OUTSIDE = (*_OPENING, *_OPENING.values())
_LONGEST = max(map(len, _OUTSIDE))
_ANSWER_END = "</answer>"
SEPARATOR = "\n"  # between two bodies of one kind


class _Channel:
    """One of the two outputs: holds back white space until it is known not to stand next to a tag."""

    def __init__(self) -> None:
        self.space = ""
        self.after_tag = False
        self.started = False
        self.delta: list[str] = []

    def write(self, text: str) -> None:
        body = text.lstrip() if self.after_tag else text
        if not body:
            return
        if self.after_tag:
            self.delta += [SEPARATOR] if self.started else []
            self.after_tag = False
        stripped = body.rstrip()
        if stripped:
            self.delta += (self.space, stripped)
            self.space = ""
            self.started = True
        self.space += body[len(stripped) :]

    def tag(self) -> None:
        self.space = ""
        self.after_tag = True

    def end(self) -> None:
        self.delta.append(self.space)
        self.space = ""

    def take(self) -> str:
        delta = "".join(self.delta)
        self.delta = []
        return delta


class OutputParser:
    """Feed it decoded text in pieces of any size; any cutting gives the same two texts.

    raw            pass everything through as content
    starts_within  "think" where the prompt already opened that tag
    """

    def __init__(self, raw: bool = False, starts_within: str | None = None) -> None:
        self.raw = raw
        self.pending = ""  # may be the beginning of a tag
        self.closing = None if starts_within is None else f"</{starts_within}>"
        self.reasoning, self.content = _Channel(), _Channel()
        if self.closing is not None:
            self.reasoning.tag()

    def feed(self, text: str) -> tuple[str, str]:
        """(new reasoning, new content)."""
        if self.raw:
            return "", text
        text = self.pending + text
        at = 0
        while at < len(text):
            start = text.find("<", at)
            start = len(text) if start < 0 else start
            self._channel().write(text[at:start])
            at = start
            tags = _OUTSIDE if self.closing is None else (self.closing,)
            tag = next((tag for tag in tags if text.startswith(tag, at)), None)
            if tag is not None:
                self._switch(tag)
                at += len(tag)
            elif len(text) - at < _LONGEST and any(tag.startswith(text[at:]) for tag in tags):
                break
            else:
                self._channel().write(text[at : at + 1])
                at += 1
        self.pending = text[at:]
        return self.reasoning.take(), self.content.take()

    def finish(self) -> tuple[str, str]:
        """The rest: an unfinished tag is text, an unclosed body is what it is."""
        self._channel().write(self.pending)
        self.pending = ""
        self._channel().end()
        return self.reasoning.take(), self.content.take()

    def _channel(self) -> _Channel:
        return self.content if self.closing in (None, _ANSWER_END) else self.reasoning

    def _switch(self, tag: str) -> None:
        self._channel().tag()
        self.closing = _OPENING.get(tag)
        self._channel().tag()


def parse_output(text: str, raw: bool = False, starts_within: str | None = None) -> tuple[str, str]:
    """(reasoning, content) of a whole answer."""
    parser = OutputParser(raw, starts_within)
    reasoning, content = parser.feed(text)
    tail_reasoning, tail_content = parser.finish()
    return reasoning + tail_reasoning, content + tail_content
