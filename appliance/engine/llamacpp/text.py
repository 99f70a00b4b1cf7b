"""Text to tokens and back, and chat messages to tokens, with one model's vocabulary.

Invariant: a special token comes from a template's literal text (or an explicit parse_special), never from a message.
Threading: any thread; llama.cpp's vocabulary is read only and every call owns its buffers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llama_cpp import llama_cpp as ll

from appliance.chat.tools import MARKERS
from appliance.engine.llamacpp.template import ChatTemplate
from appliance.errors import RequestError

_SPECIAL = ll.LLAMA_TOKEN_ATTR_CONTROL | ll.LLAMA_TOKEN_ATTR_UNKNOWN
_NO_TOKEN = -1


class Text:
    def __init__(self, model: Any, metadata: Mapping[str, str]) -> None:
        self._vocab = ll.llama_model_get_vocab(model)
        self.vocab_tokens = int(ll.llama_vocab_n_tokens(self._vocab))
        attributes = [ll.llama_vocab_get_attr(self._vocab, token) for token in range(self.vocab_tokens)]
        self.end_tokens = frozenset(
            token for token in range(self.vocab_tokens) if ll.llama_vocab_is_eog(self._vocab, token)
        )
        special = {token: self._text(token) for token, attribute in enumerate(attributes) if attribute & _SPECIAL}
        self._markers = {token: text.encode() for token, text in special.items() if text in MARKERS}
        self._bos = ll.llama_vocab_bos(self._vocab)
        source = metadata.get("tokenizer.chat_template")
        self.has_chat_template = bool(source)
        self._template = ChatTemplate(
            source,
            bos=self._text(self._bos),
            eos=self._text(ll.llama_vocab_eos(self._vocab)),
            special=[text for text in special.values() if text],
        )
        self.tools = self._template.tools
        self.piece = lru_cache(maxsize=1 << 16)(self._piece)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError("text holds a lone surrogate: it is not valid Unicode") from None
        room = len(data) + 8
        while True:
            tokens = (ll.llama_token * room)()
            n = ll.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
            if n >= 0:
                return tokens[:n]
            room = -n

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> list[int]:
        tokens: list[int] = []
        for text, literal in self._template.render(messages, tools, options):
            tokens += self.tokenize(text, add_special=False, parse_special=literal)
        wants_bos = self._bos != _NO_TOKEN and ll.llama_vocab_get_add_bos(self._vocab)
        if wants_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)  # the template may have written it already: never twice
        return tokens

    def _piece(self, token: int) -> bytes:
        if token in self._markers:
            return self._markers[token]
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = ll.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def _text(self, token: int) -> str:
        if token == _NO_TOKEN:
            return ""
        return (ll.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")
