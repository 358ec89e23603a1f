"""The bounds of a request's input hold against OpenAI's own tokenizers, which `bpe-openai` carries with it.

Anthropic and Google publish none for their present models; they too work on bytes, or fall back to them, which is
all that the bound stands on (see `respan_guard.providers.base`).
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from respan_guard.providers import call_from_request
from respan_guard.providers.base import utf8_size

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it reads its tables in a way that Python 3.11 deprecates
    import bpe_openai  # type: ignore[import-untyped]

ENCODINGS = {name: bpe_openai.get_encoding(name) for name in ("cl100k_base", "o200k_base")}
# Rare words, scripts that take many tokens a character, emoji in sequences, white space, control characters.
ODD = [
    "日本語",
    "नमस्ते",
    "🏳️‍🌈👩‍👩‍👧",
    "ﷺ",
    "\u200b\u200d",
    "\t \n\r",
    "ẅ̸̛̱",
    "\x00\x7f",
    "𒐫",
    "a" * 50,
    "=" * 33,
    "ᏣᎳᎩ",
    "<|endoftext|>",
]
texts = st.lists(st.one_of(st.text(max_size=40), st.sampled_from(ODD)), max_size=12).map("".join)


def tokens(text: str, encoding: str) -> int:
    """How many tokens a text has."""
    return len(ENCODINGS[encoding].encode(text, disallowed_special=()))


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_a_text_has_no_more_tokens_than_bytes(encoding: str, text: str) -> None:
    """Each token covers at least one byte."""
    assert tokens(text, encoding) <= utf8_size(text)


messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=6
)
tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.sampled_from(["f", "get_weather"]), "description": texts, "parameters": st.just({})}
            ),
        }
    ),
    max_size=3,
)


@pytest.mark.parametrize(("model", "encoding"), [("gpt-4o", "o200k_base"), ("gpt-4", "cl100k_base")])
@settings(max_examples=80, deadline=None)
@given(given_messages=messages, given_tools=tools)
def test_a_chat_is_charged_for_no_more_than_its_bound(
    model: str, encoding: str, given_messages: list[dict[str, Any]], given_tools: list[dict[str, Any]]
) -> None:
    """By OpenAI's own rule: 3 tokens and role and content per message, 3 for the reply, and the tools' definitions."""
    body = {"model": model, "messages": given_messages, "tools": given_tools}
    call = call_from_request("/v1/chat/completions", json.loads(json.dumps(body)))
    assert call is not None
    charged = 3 + sum(3 + tokens(m["role"], encoding) + tokens(m["content"], encoding) for m in given_messages)
    charged += sum(12 + tokens(json.dumps(tool, ensure_ascii=False), encoding) for tool in given_tools)
    assert charged <= call.input_tokens_bound


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 200_000), max_size=300), split=st.booleans())
def test_token_arrays_are_charged_for_no_more_than_their_bound(ids: list[int], split: bool) -> None:
    """Embeddings of ready-made tokens, in one array or several: each number is one token."""
    body = {"model": "text-embedding-3-small", "input": [ids, ids] if split else ids}
    call = call_from_request("/v1/embeddings", body)
    assert call is not None
    assert len(ids) * (1 + split) <= call.input_tokens_bound
