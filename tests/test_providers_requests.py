"""Requests: what a call asks for, and a bound for its input that holds."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respan_guard.providers import Call, call_from_request
from respan_guard.providers.base import TOOLS_OVERHEAD

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG" * 100_000).decode()
B64 = base64.b64encode(b"x" * 300_000).decode()
USER = {"role": "user", "content": "Hello"}


def call(path: str, body: dict[str, Any]) -> Call:
    """The call, which must be one."""
    found = call_from_request(path, body)
    assert found is not None
    return found


def chat(*content: Any, **more: Any) -> Call:
    """A chat with one message of these parts."""
    return call(
        "/v1/chat/completions", {"model": "gpt-4o", "messages": [{"role": "user", "content": [*content]}], **more}
    )


@pytest.mark.parametrize(
    ("path", "body", "provider", "operation", "model"),
    [
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": [USER]}, "openai", "chat", "gpt-4o"),
        ("/api/v1/chat/completions/", {"model": "a/b", "messages": [USER]}, "openai", "chat", "a/b"),
        ("/v1/responses", {"model": "gpt-5", "input": "Hi"}, "openai", "chat", "gpt-5"),
        ("/v1/responses/compact", {"model": "gpt-5", "input": "Hi"}, "openai", "chat", "gpt-5"),
        ("/v1/responses/compact", {"model": "gpt-5", "previous_response_id": "resp_1"}, "openai", "chat", "gpt-5"),
        ("/v1/decisions", {"model": "gpt-6-luna", "input": "x", "questions": []}, "openai", "decision", "gpt-6-luna"),
        ("/v1/completions", {"model": "davinci-002", "prompt": "Hi"}, "openai", "text_completion", "davinci-002"),
        ("/v1/embeddings", {"model": "e", "input": ["a"]}, "openai", "embeddings", "e"),
        (
            "/v1/images/generations",
            {"model": "gpt-image-1", "prompt": "x"},
            "openai",
            "image_generation",
            "gpt-image-1",
        ),
        ("/v1/audio/speech", {"model": "tts", "input": "x", "voice": "v"}, "openai", "text_to_speech", "tts"),
        ("/openai/deployments/mine/chat/completions", {"messages": [USER]}, "azure", "chat", "mine"),
        ("/openai/deployments/d/embeddings", {"input": "x"}, "azure", "embeddings", "d"),
        (
            "/openai/deployments/gpt-4/chat/completions",
            {"model": "gpt-4o-mini", "messages": [USER], "models": ["gpt-4o-mini"]},
            "azure",
            "chat",
            "gpt-4",
        ),
        ("/OpenAI/Deployments/d/embeddings", {"model": "m", "input": "x"}, "azure", "embeddings", "d"),
        ("/api/v1/chat/completions", {"models": ["a", "b"], "messages": [USER]}, "openai", "chat", "a"),
        ("/v1/messages", {"model": "claude", "messages": [USER], "max_tokens": 5}, "anthropic", "chat", "claude"),
        (
            "/v1beta/models/gemini-2.5-pro:generateContent",
            {"contents": []},
            "google",
            "generate_content",
            "gemini-2.5-pro",
        ),
        (
            "/v1/projects/p/locations/l/publishers/google/models/gemini-2.5-pro:streamGenerateContent",
            {"contents": [{"parts": [{"text": "x"}]}]},
            "google",
            "generate_content",
            "gemini-2.5-pro",
        ),
        ("/v1beta/models/emb:embedContent", {"content": {"parts": [{"text": "x"}]}}, "google", "embeddings", "emb"),
        ("/ask", {"model": "gpt-4o", "messages": [USER]}, "openai", "chat", "gpt-4o"),
        ("/ask", {"model": "claude", "messages": [USER], "system": "s"}, "anthropic", "chat", "claude"),
        ("/ask", {"model": "gpt-5", "input": "Hi"}, "openai", "chat", "gpt-5"),
        ("/ask", {"contents": [{"parts": [{"text": "x"}]}]}, "google", "generate_content", ""),
        ("/ask", {"model": "davinci-002", "prompt": "Hi"}, "openai", "text_completion", "davinci-002"),
        ("/ask", {"model": "davinci-002", "prompt": [1, 2]}, "openai", "text_completion", "davinci-002"),
        ("/ask", {"model": "gpt-image-1", "prompt": "Hi"}, "openai", "image_generation", "gpt-image-1"),
        ("/ask", {"model": "gpt-5", "prompt": {"id": "pmpt_1"}}, "openai", "chat", "gpt-5"),
    ],
)
def test_recognises_calls(path: str, body: dict[str, Any], provider: str, operation: str, model: str) -> None:
    """A call is known by the end of its path, and on unknown paths by the shape of its body."""
    found = call(path, body)
    assert (found.provider, found.operation, found.model) == (provider, operation, model)


@pytest.mark.parametrize("end", ["\n", "/\n", " ", "%0A", "%20", "?a=1", "?a=/x/", ";a=1", "#", "/.", "//", "/x/.."])
@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", {"model": "davinci-002", "prompt": "Hi", "max_tokens": 7}, "text_completion"),
        ("/v1/Completions", {"model": "davinci-002", "prompt": ["Hi"], "max_tokens": 7}, "text_completion"),
        ("/v1/chat/completions", {"model": "gpt-4o", "messages": [USER], "max_tokens": 7}, "chat"),
        ("/V1/CHAT/COMPLETIONS", {"model": "gpt-4o", "messages": [USER], "max_tokens": 7}, "chat"),
        ("/v1/messages", {"model": "claude", "messages": [USER], "max_tokens": 7}, "chat"),
        ("/m/gemini-2.0-flash:generateContent", {"generationConfig": {"maxOutputTokens": 7}}, "generate_content"),
        ("/m/gemini-2.0-flash:GenerateContent", {"generationConfig": {"maxOutputTokens": 7}}, "generate_content"),
    ],
)
def test_what_follows_a_path_makes_no_difference(path: str, body: dict[str, Any], operation: str, end: str) -> None:
    """A path that routers, servers or providers take for another one is read as that one: clients choose paths."""
    found = call(path + end, body)
    assert (found.operation, found.max_output_tokens) == (operation, 7)
    assert found.model in ("davinci-002", "gpt-4o", "claude", "gemini-2.0-flash")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/ask", {"question": "What is it?"}),
        ("/ask", {"model": "gpt-4o"}),
        ("/ask", {"messages": [USER]}),
        ("/ask", {"model": 4, "messages": [USER]}),
        ("/ask", {}),
        ("/v1/messages", {"text": "a chat app's own messages"}),
        ("/v1/moderations", {"model": "omni-moderation-latest", "input": "x"}),
        ("/v1/messages/count_tokens", {"model": "claude", "messages": [USER]}),
        ("/v1beta/models/g:countTokens", {"contents": []}),
        ("/v1/responses/input_tokens", {"model": "gpt-5", "input": "x"}),
    ],
)
def test_other_bodies_are_no_calls(path: str, body: dict[str, Any]) -> None:
    """What says nothing of an LLM call, or costs nothing, is no call."""
    assert call_from_request(path, body) is None


@pytest.mark.parametrize(
    ("path", "more", "cap"),
    [
        ("/v1/chat/completions", {"max_tokens": 7}, 7),
        ("/v1/chat/completions", {"max_completion_tokens": 8}, 8),
        ("/v1/chat/completions", {"max_tokens": 7, "max_completion_tokens": 8}, 8),
        ("/v1/chat/completions", {"max_output_tokens": 1}, None),
        ("/v1/chat/completions", {"max_tokens": 0}, 0),
        ("/v1/chat/completions", {"max_tokens": -1}, None),
        ("/v1/chat/completions", {"max_tokens": None}, None),
        ("/v1/chat/completions", {"max_tokens": True}, None),
        ("/v1/chat/completions", {"max_tokens": 10**30}, None),
        ("/v1/chat/completions", {"max_tokens": float("nan")}, None),
        ("/v1/chat/completions", {"max_tokens": float("inf")}, None),
        ("/v1/chat/completions", {"max_tokens": 1.5}, None),
        ("/v1/chat/completions", {"max_tokens": "9000"}, 9000),
        ("/v1/chat/completions", {"max_tokens": 9000.0}, 9000),
        ("/v1/chat/completions", {"max_tokens": {"a": 1}}, None),
        ("/v1/chat/completions", {}, None),
        ("/v1/responses", {"max_output_tokens": 9}, 9),
        ("/v1/responses", {"max_tokens": 9}, None),
        ("/v1/completions", {"max_tokens": 9}, 9),
        ("/v1/embeddings", {}, 0),
        ("/v1/messages", {"max_tokens": 10, "thinking": {"type": "enabled", "budget_tokens": 5}}, 10),
        ("/m:generateContent", {"generationConfig": {"maxOutputTokens": 11}}, 11),
        ("/m:generateContent", {"generation_config": {"max_output_tokens": 11}}, 11),
        ("/m:generateContent", {"generationConfig": []}, None),
        ("/m:generateContent", {"generationConfig": {"maxOutputTokens": 1, "max_output_tokens": 11}}, 11),
        (
            "/m:generateContent",
            {"generationConfig": {"maxOutputTokens": 1}, "generation_config": {"maxOutputTokens": 11}},
            11,
        ),
    ],
)
def test_caps_on_output(path: str, more: dict[str, Any], cap: int | None) -> None:
    """Only the name that an API obeys sets a cap; what is no number is absent."""
    assert call(path, {"model": "m", "messages": [USER], **more}).max_output_tokens == cap


@pytest.mark.parametrize(
    ("path", "more", "choices"),
    [
        ("/v1/chat/completions", {"n": 3}, 3),
        ("/v1/chat/completions", {"n": 0}, 1),
        ("/v1/chat/completions", {"n": "x"}, 1),
        ("/v1/completions", {"n": 2, "best_of": 5}, 5),
        ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, 6),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 2),
        ("/v1/completions", {"prompt": []}, 1),
        ("/m:generateContent", {"generationConfig": {"candidateCount": 4}}, 4),
        ("/v1/responses", {"n": 7}, 1),
    ],
)
def test_choices(path: str, more: dict[str, Any], choices: int) -> None:
    """Every answer asked for is paid for."""
    found = call(path, {"model": "m", "messages": [USER], "max_tokens": 10, **more})
    assert found.choices == choices
    assert found.output_tokens_bound(100) in (10 * choices, 100 * choices)


@pytest.mark.parametrize(
    ("path", "more", "stream", "wants_usage"),
    [
        ("/v1/chat/completions", {}, False, True),
        ("/v1/chat/completions", {"stream": True}, True, False),
        ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ("/v1/chat/completions", {"stream": True, "stream_options": "yes"}, True, False),
        ("/v1/chat/completions", {"stream": "true"}, False, True),
        ("/v1/responses", {"stream": True}, True, True),
        ("/v1/messages", {"stream": True}, True, True),
        ("/models/g:streamGenerateContent", {}, True, True),
    ],
)
def test_streams_and_whether_usage_will_come(path: str, more: dict[str, Any], stream: bool, wants_usage: bool) -> None:
    """Only OpenAI's older streams leave usage out unless asked."""
    found = call(path, {"model": "m", "messages": [USER], **more})
    assert (found.stream, found.wants_usage) == (stream, wants_usage)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def utf8(value: Any) -> int:
    """Bytes of all text in a JSON value, keys included."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(utf8(k) + utf8(v) for k, v in value.items())
    return sum(map(utf8, value)) if isinstance(value, list) else 0


@given(st.sampled_from(["/chat/completions", "/responses", "/messages", "/m:generateContent"]), JSON, JSON)
def test_input_bound_covers_every_byte_of_text(path: str, content: Any, tools: Any) -> None:
    """No token is smaller than a byte, so the bound is at least the bytes of all that reaches the model."""
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "tools": tools}
    found = call(path, body)
    assert found.input_tokens_bound >= utf8(content) + utf8(tools)


@given(
    JSON.filter(lambda value: isinstance(value, dict)),
    st.sampled_from(["/chat/completions", "/messages", "/x", "/a:generateContent"]),
)
def test_any_json_is_read_without_error(body: Any, path: str) -> None:
    """Whatever JSON object comes in, the answer is a call or None."""
    found = call_from_request(path, body)
    assert found is None or found.input_tokens_bound > 0


def test_deep_nesting_does_not_recurse() -> None:
    """100,000 levels of nesting are walked, in content and in tools."""
    deep: Any = "x"
    for _ in range(100_000):
        deep = [{"a": deep}]
    found = call("/v1/chat/completions", {"model": "m", "messages": [{"content": deep}], "tools": deep})
    assert found.input_tokens_bound > 400_000


def test_too_many_values_are_not_walked_to_the_end() -> None:
    """A body of more than a million values is given up, and says that not all of it was seen."""
    found = call("/v1/chat/completions", {"model": "m", "messages": [USER], "logit_bias": [0] * 1_100_000})
    assert found.hidden


def test_images_are_no_text() -> None:
    """A base64 image counts as an image, whatever its bytes; the same text in a message counts as text."""
    part = {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}
    found = chat({"type": "text", "text": "What is it?"}, part)
    assert found.input_tokens_bound < 5_000
    assert found.has_images
    assert not found.hidden
    assert chat({"type": "text", "text": PNG}).input_tokens_bound > len(PNG)
    two = chat(part, part)
    assert 2 * 1_445 <= two.input_tokens_bound < 10_000


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("gpt-4o", 1_445),
        ("gpt-4o-mini", 48_169),
        ("openai/gpt-4o-mini-2024-07-18", 48_169),
        ("gpt-4.1-nano", 3_779),
        ("gpt-5.4", 16_200),
    ],
)
def test_images_of_openai_are_bounded_by_model(model: str, tokens: int) -> None:
    """The bound of an image is at least the most that OpenAI's documentation gives for the model."""
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    body = {"model": model, "messages": [{"role": "user", "content": [part]}]}
    assert tokens <= call("/v1/chat/completions", body).input_tokens_bound <= tokens * 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]}),
        (
            "/v1/messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64}}
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "content": [
                                    {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
                                ],
                            }
                        ],
                    },
                ]
            },
        ),
        ("/g:generateContent", {"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": B64}}]}]}),
        ("/g:generateContent", {"contents": [{"parts": [{"inline_data": {"mime_type": "image/png", "data": B64}}]}]}),
    ],
)
def test_images_in_each_format(path: str, body: dict[str, Any]) -> None:
    """Every format's images are recognised, nested ones too."""
    found = call(path, {"model": "gpt-4o", **body})
    assert found.has_images
    assert not found.hidden
    assert 1_600 < found.input_tokens_bound < 12_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [USER],
                "tools": [
                    {
                        "type": "function",
                        "function": {"parameters": {"default": {"type": "image_url", "image_url": B64}}},
                    }
                ],
            },
        ),
        (
            "/v1/messages",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "input": {"type": "image", "source": {"data": B64}}}],
                    }
                ]
            },
        ),
        (
            "/v1/messages",
            {
                "messages": [USER],
                "tools": [{"input_schema": {"type": "image", "source": {"type": "base64", "data": B64}}}],
            },
        ),
        (
            "/g:generateContent",
            {
                "contents": [
                    {"parts": [{"functionCall": {"args": {"inlineData": {"mimeType": "image/png", "data": B64}}}}]}
                ]
            },
        ),
        ("/g:generateContent", {"contents": [], "tools": [{"inlineData": {"mimeType": "image/png", "data": B64}}]}),
        ("/v1/messages", {"messages": [{"content": [{"type": "document", "source": {"type": "text", "data": B64}}]}]}),
    ],
)
def test_text_that_looks_like_an_image_is_text(path: str, body: dict[str, Any]) -> None:
    """Where the provider reads text, a part dressed up as an image hides none of it."""
    assert call(path, {"model": "gpt-4o", **body}).input_tokens_bound > len(B64)


@pytest.mark.parametrize(
    ("form", "low", "high"), [("wav", 1_000, 4_000), ("mp3", 9_600, 20_000), ("opus", 70_000, 80_000)]
)
def test_audio_is_bounded_by_its_length(form: str, low: int, high: int) -> None:
    """Audio counts by the longest time that its bytes can last, 32 tokens a second at most."""
    found = chat({"type": "input_audio", "input_audio": {"data": B64, "format": form}})
    assert low < found.input_tokens_bound < high
    assert found.has_audio
    assert not found.hidden
    gemini = {"contents": [{"parts": [{"inlineData": {"mimeType": f"audio/{form}", "data": B64}}]}]}
    assert call("/g:generateContent", gemini).has_audio


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"content": [{"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}}]}]},
        ),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}),
        ("/v1/responses", {"input": "x", "conversation": "conv_1"}),
        ("/v1/responses", {"prompt": {"id": "pmpt_1"}}),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("/v1/responses", {"input": [{"content": [{"type": "input_file", "file_url": "https://example.com/a.pdf"}]}]}),
        ("/v1/messages", {"messages": [USER], "container": "container_1"}),
        (
            "/v1/messages",
            {
                "messages": [
                    {"content": [{"type": "document", "source": {"type": "url", "url": "https://example.com"}}]}
                ]
            },
        ),
        (
            "/v1/messages",
            {
                "messages": [
                    {
                        "content": [
                            {
                                "type": "document",
                                "source": {"type": "base64", "media_type": "application/pdf", "data": B64},
                            }
                        ]
                    }
                ]
            },
        ),
        (
            "/g:generateContent",
            {"contents": [{"parts": [{"fileData": {"fileUri": "https://example.com", "mimeType": "video/mp4"}}]}]},
        ),
        ("/g:generateContent", {"contents": [{"parts": [{"inlineData": {"mimeType": "video/mp4", "data": B64}}]}]}),
        ("/g:generateContent", {"contents": [], "cachedContent": "cachedContents/1"}),
    ],
)
def test_input_that_the_request_does_not_show_is_told(path: str, body: dict[str, Any]) -> None:
    """Stored conversations, documents and files by address: the call says that the model reads more than is seen."""
    assert call(path, {"model": "m", **body}).hidden


@pytest.mark.parametrize(
    ("path", "body", "runs"),
    [
        ("/v1/chat/completions", {"messages": [USER], "web_search_options": {}}, None),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]}, None),
        ("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}], "max_tool_calls": 3}, 3),
        ("/v1/responses", {"input": "x", "tools": [{"type": "mcp", "server_url": "https://example.com"}]}, None),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f"}], "max_tool_calls": 3}, 0),
        ("/v1/messages", {"messages": [USER], "tools": [{"type": "web_search_20250305", "name": "s"}]}, None),
        ("/v1/messages", {"messages": [USER], "mcp_servers": [{"url": "https://example.com"}]}, None),
        (
            "/v1/messages",
            {
                "messages": [USER],
                "tools": [
                    {"type": "web_search_20250305", "name": "s", "max_uses": 2},
                    {"type": "web_fetch_20250910", "name": "f", "max_uses": 3},
                    {"name": "mine", "input_schema": {}},
                ],
            },
            5,
        ),
        ("/g:generateContent", {"contents": [], "tools": [{"googleSearch": {}}]}, None),
    ],
)
def test_tools_of_the_provider_are_told(path: str, body: dict[str, Any], runs: int | None) -> None:
    """Search, interpreters and MCP: how often they may be used, None where the request sets no number."""
    found = call(path, {"model": "m", **body})
    assert found.tool_runs == runs
    assert not found.hidden


def test_decisions_count_their_input_for_each_question() -> None:
    """The input is evaluated for every question, so the bound is as many times as large."""
    body = {"model": "gpt-6-luna", "input": "x" * 1_000, "questions": [{"type": "predicate", "question": "y"}] * 7}
    assert call("/v1/decisions", body).input_tokens_bound > 7_000


def test_a_predicted_answer_is_held_as_output() -> None:
    """A prediction that turns out wrong is charged as output, beyond what `max_tokens` allows."""
    found = chat("x", prediction={"type": "content", "content": "y" * 1_000}, max_tokens=10)
    assert found.output_tokens_bound(4_096) > 1_010


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/v1/messages", {"messages": [USER], "tools": [{"name": "f", "input_schema": {}}]}),
        ("/v1/messages", {"messages": [USER], "tools": [{"type": "bash_20250124", "name": "bash"}]}),
        ("/g:generateContent", {"contents": [], "tools": [{"functionDeclarations": [{"name": "f"}]}]}),
    ],
)
def test_tools_of_the_app_are_bounded(path: str, body: dict[str, Any]) -> None:
    """Tools that the app runs itself add their schema and the provider's prompt for tools, no more."""
    found = call(path, {"model": "m", **body})
    assert not found.hidden
    assert found.tool_runs == 0
    assert found.input_tokens_bound > TOOLS_OVERHEAD


def test_service_tiers_and_audio_answers() -> None:
    """The tier asked for and audio output, which change the price, are told."""
    assert chat(service_tier="flex").service_tier == "flex"
    assert chat(service_tier=7).service_tier is None
    assert call("/v1/messages", {"messages": [USER], "speed": "fast"}).service_tier == "fast"
    assert chat(modalities=["text", "audio"]).has_audio
    assert not chat().has_audio
    gemini = {"contents": [], "generationConfig": {"responseModalities": ["AUDIO"]}}
    assert call("/g:generateContent", gemini).has_audio


def test_what_never_reaches_the_model_does_not_count() -> None:
    """Metadata and customer_params are no input."""
    plain = chat().input_tokens_bound
    assert chat(metadata={"k": "v" * 500}, customer_params={"name": "n" * 500}).input_tokens_bound == plain
