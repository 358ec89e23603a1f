"""Who the customer is, by each source, and everything that must not pass for somebody."""

from __future__ import annotations

import base64
import json
import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.authentication import BaseUser, SimpleUser, UnauthenticatedUser
from starlette.requests import HTTPConnection

from respan_guard.customer import Customer
from respan_guard.errors import ConfigurationError, InvalidInput
from respan_guard.middleware.identity import Identified, Identify, describe, sources


async def find(identify: Identify, body: dict[str, Any] | None = None, **scope: Any) -> Identified | None:
    """Ask the sources in order, as the door does."""
    scope = {"type": "http", "headers": [], **scope}
    for source in sources(identify):
        found: Any = source.find(scope, body or {})
        if found is not None and not isinstance(found, Identified):
            found = await found
        if found is not None:
            return Identified(*found)
    return None


async def who(identify: Identify, body: dict[str, Any] | None = None, **scope: Any) -> Any:
    """Only the customer."""
    found = await find(identify, body, **scope)
    return None if found is None else found.customer


def encoded(params: Any) -> bytes:
    """A params header's value."""
    return base64.b64encode(json.dumps(params).encode())


# -- the server's word -----------------------------------------------------------------------------


async def test_user() -> None:
    """`scope["user"]` that is authenticated names the customer; Starlette's anonymous user names nobody."""
    assert await who("user", user=SimpleUser("org_1")) == "org_1"
    assert await who("user", user=UnauthenticatedUser()) is None
    assert await who("user", user=None) is None
    assert await who("user", user=SimpleNamespace(is_authenticated=True, identity="")) is None
    assert await who("user", user=SimpleNamespace(identity=uuid.UUID(int=7))) == str(uuid.UUID(int=7))
    assert await who("user", user=SimpleNamespace(is_authenticated=False, identity="org_1")) is None


async def test_no_user_in_scope_names_the_middleware_order() -> None:
    """A missing user is a mistake of the setup, not a 401 for everybody."""
    with pytest.raises(ConfigurationError, match=r"AuthenticationMiddleware must run before .* added last runs first"):
        await who("user")


async def test_a_user_without_identity_is_a_mistake_of_the_setup() -> None:
    """A user class that has no identity is named."""

    class Anyone(BaseUser):
        is_authenticated = True

    for user in (Anyone(), SimpleNamespace(name="x")):
        with pytest.raises(ConfigurationError, match="identity"):
            await who("user", user=user)


async def test_state() -> None:
    """`request.state.NAME` names the customer; absent or empty, nobody."""
    assert await who("state:org", state={"org": "org_1"}) == "org_1"
    assert await who("state:org", state={"org": 42}) == 42
    assert await who("state:org", state={"other": "x"}) is None
    assert await who("state:org", state={"org": ""}) is None
    assert await who("state:org") is None


async def test_callables() -> None:
    """Sync and async callables get the connection and may answer with an id, a Customer or None."""

    def sync(connection: HTTPConnection) -> str | None:
        return connection.headers.get("x-key")

    async def asynchronous(connection: HTTPConnection) -> Customer:
        return Customer(customer_identifier=connection.headers["x-key"], rate_limit=5)

    class Callable:
        async def __call__(self, connection: HTTPConnection) -> int:
            return 7

    headers = [(b"x-key", b"org_1")]
    assert await who(sync, headers=headers) == "org_1"
    assert await who(sync) is None
    assert (await who(asynchronous, headers=headers)).rate_limit == 5
    assert await who(Callable()) == 7


async def test_what_a_callable_raises_is_untouched() -> None:
    """An exception of the app's callable is the app's, by identity."""
    error = LookupError("no such key")

    def broken(connection: HTTPConnection) -> str:
        raise error

    with pytest.raises(LookupError) as raised:
        await who(broken)
    assert raised.value is error


@pytest.mark.parametrize("answer", [b"org", True, 1.5, ["org"], {"customer_identifier": "x"}])
async def test_a_callable_that_answers_nonsense_is_named(answer: Any) -> None:
    """A wrong answer's type says which callable gave it and what is right."""

    def key_table(connection: HTTPConnection) -> Any:
        return answer

    with pytest.raises(ConfigurationError, match=r"key_table.* must return a str, a Customer or None"):
        await who(key_table)


# -- the client's word -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"org_1", "org_1"),
        (b" \torg_1 ", "org_1"),
        ("é".encode(), "é"),
        ("é".encode("latin-1"), "é"),
        (b"a, b", "a, b"),
        (b"", None),
        (b"  ", None),
    ],
)
async def test_header(value: bytes, expected: str | None) -> None:
    """A header is UTF-8, else Latin-1; a comma is just a character; nothing in it is nobody."""
    assert await who("header:X-Customer-ID", headers=[(b"x-customer-id", value)]) == expected


async def test_only_the_named_header_counts() -> None:
    """Other spellings are other headers, and the forwarding headers have no say of their own."""
    others = [b"x_customer_id", b"customer-id", b"x-customer-id2", b"x-forwarded-user", b"forwarded", b"connection"]
    assert await who("header:x-customer-id", headers=[(name, b"x-customer-id") for name in others]) is None


async def test_a_header_sent_twice_is_refused() -> None:
    """Which of two values counts is not ours to guess, even if they agree."""
    for values in ((b"a", b"b"), (b"a", b"a"), (b"", b"a")):
        with pytest.raises(InvalidInput, match="once"):
            await who("header:x-id", headers=[(b"x-id", value) for value in values])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"customer_identifier": "top"}, "top"),
        ({"customer_identifier": 42}, 42),
        ({"customer_params": {"customer_identifier": "inner"}, "customer_identifier": "top"}, "inner"),
        ({"customer_params": {"rate_limit": 5}, "customer_identifier": "top"}, "top"),
        ({"respan_params": {"customer_identifier": "respan"}, "customer_identifier": "top"}, "respan"),
        ({"respan_params": json.dumps({"customer_identifier": "text"}), "customer_identifier": "top"}, "text"),
        ({"keywordsai_params": {"customer_identifier": "old"}, "customer_identifier": "top"}, "old"),
        (
            {"keywordsai_params": {"customer_identifier": "old"}, "respan_params": {"customer_identifier": "new"}},
            "new",
        ),
        ({"customer_params": None, "customer_identifier": None}, None),
        ({"user": "u", "metadata": {"user_id": "m"}}, None),
        ({}, None),
    ],
)
async def test_body(body: dict[str, Any], expected: Any) -> None:
    """The body's fields by Respan's precedence; OpenAI's and Anthropic's user fields are not customers."""
    assert await who("body", body) == expected


async def test_precedence_between_header_and_body() -> None:
    """Body `respan_params` before the header before the body's own fields, in whichever order they are named."""
    header = [(b"x-data-respan-params", encoded({"customer_identifier": "header"}))]
    top = {"customer_identifier": "top"}
    for identify in (["respan-params", "body"], ["body", "respan-params"]):
        assert await who(identify, top) == "top"
        assert await who(identify, top, headers=header) == "header"
        assert await who(identify, top | {"respan_params": {"customer_identifier": "r"}}, headers=header) == "r"
    assert await who("body", top, headers=header) == "top", "the header counts only if it is named"
    assert await who("respan-params", top) is None, "the body counts only if it is named"


@pytest.mark.parametrize(
    ("respan", "header", "top", "expected"),
    [
        (None, {"customer_identifier": "h"}, {"customer_params": {"customer_identifier": "t"}}, "h"),
        ({"customer_identifier": "r"}, {"customer_params": {"customer_identifier": "h"}}, {}, "r"),
        ({"customer_params": {"customer_identifier": "rp"}, "customer_identifier": "r"}, None, {}, "rp"),
        ({}, {"customer_params": {"customer_identifier": "hp"}, "customer_identifier": "h"}, {}, "hp"),
        ({"customer_params": {"rate_limit": 5}}, None, {"customer_identifier": "t"}, "t"),
        ({"customer_identifier": None}, {}, {"customer_params": {"customer_identifier": "t"}}, "t"),
    ],
)
async def test_the_first_place_that_names_a_customer_decides(respan: Any, header: Any, top: Any, expected: str) -> None:
    """Places are asked one after another; only within one do `customer_params` go before what stands beside them."""
    body = top if respan is None else top | {"respan_params": respan}
    headers = [] if header is None else [(b"x-data-respan-params", encoded(header))]
    assert await who(["respan-params", "body"], body, headers=headers) == expected


async def test_params_of_another_customer_are_not_this_ones() -> None:
    """Limits that come along with another name are not taken over; those without a name, or with the same one, are."""
    header = [(b"x-data-respan-params", encoded({"customer_identifier": "a"}))]
    identify = ["respan-params", "body"]
    for params, expected in (
        ({"customer_identifier": "b", "rate_limit": 9}, None),
        ({"customer_identifier": "a", "rate_limit": 9}, {"rate_limit": 9}),
        ({"rate_limit": 9}, {"rate_limit": 9}),
    ):
        assert await find(identify, {"customer_params": params}, headers=header) == ("a", expected)
    beside = {"customer_params": {"rate_limit": 9}, "customer_identifier": "b"}
    assert await find(identify, beside, headers=header) == ("a", None)


async def test_params_in_text_are_bounded() -> None:
    """`respan_params` as text is JSON within JSON, which nobody has weighed."""
    with pytest.raises(InvalidInput, match="at most 65,536"):
        await who("body", {"respan_params": "[" + "[]," * 30_000 + "0]"})


@pytest.mark.parametrize("name", [b"x-data-respan-params", b"x-data-keywordsai-params"])
async def test_params_header_in_base64_and_plain(name: bytes) -> None:
    """Both spellings of the header, base64 (standard, URL-safe, unpadded) or plain JSON."""
    params = {"customer_identifier": "ø??>>", "customer_params": {"rate_limit": 5}}
    raw = json.dumps(params, ensure_ascii=False).encode()
    standard = base64.b64encode(raw)
    for value in (standard, base64.urlsafe_b64encode(raw), standard.rstrip(b"="), raw, b" " + standard + b" "):
        found = await find("respan-params", headers=[(name, value)])
        assert found == ("ø??>>", {"rate_limit": 5})


@pytest.mark.parametrize("other", ["a", "b"])
async def test_both_params_headers_are_refused(other: str) -> None:
    """The header's old and new name are one header, which may come once: which of two counts is not ours to guess."""
    names = (b"x-data-respan-params", b"x-data-keywordsai-params")
    headers = [(names[0], encoded({"customer_identifier": "a"})), (names[1], encoded({"customer_identifier": other}))]
    for pair in (headers, headers[::-1]):
        with pytest.raises(InvalidInput, match="again"):
            await who("respan-params", headers=pair)


@pytest.mark.parametrize(
    "value",
    [
        b"%%%",
        b"abc",
        b"",
        encoded(["a"]),
        encoded("a"),
        encoded(7),
        b'{"customer_identifier": ',
        b'{"customer_identifier": "a", "customer_identifier": "b"}',
        base64.b64encode(b"\xff\xfe"),
        base64.b64encode(b"[" * 40_000),
        b"A" * 100_000,
        encoded({"customer_params": [1]}),
        encoded({"customer_params": "x"}),
    ],
)
async def test_bad_params_headers_are_refused(value: bytes) -> None:
    """A params header that can't be read is refused, not ignored: it may have meant somebody else."""
    with pytest.raises(InvalidInput):
        await who("respan-params", headers=[(b"x-data-respan-params", value)])


@pytest.mark.parametrize(
    "body",
    [
        {"customer_params": "org_1"},
        {"customer_params": ["org_1"]},
        {"respan_params": "{"},
        {"respan_params": [1]},
        {"respan_params": '{"customer_identifier": "a", "customer_identifier": "b"}'},
        {"respan_params": {"customer_params": 7}},
    ],
)
async def test_bad_body_params_are_refused(body: dict[str, Any]) -> None:
    """Params of the wrong shape are refused with the name of the field."""
    with pytest.raises(InvalidInput, match=r"params|twice"):
        await who("body", body)


async def test_params_come_along_without_the_identifier() -> None:
    """What else `customer_params` says goes to the guard, which decides what to believe."""
    body = {"customer_params": {"customer_identifier": "org_1", "rate_limit": 100, "name": "Acme"}}
    assert await find("body", body) == ("org_1", {"rate_limit": 100, "name": "Acme"})
    assert body["customer_params"]["customer_identifier"] == "org_1", "the body itself is left as it is"


async def test_provider_user_fields_are_opt_in() -> None:
    """OpenAI's and Anthropic's end-user fields count only by name."""
    assert await who("openai-user", {"user": "u"}) == "u"
    assert await who("openai-user", {"user": "u", "safety_identifier": "s"}) == "s"
    assert await who("anthropic-user", {"metadata": {"user_id": "m"}}) == "m"
    assert await who("anthropic-user", {"metadata": "m"}) is None
    assert await who(["openai-user", "anthropic-user"], {"metadata": {"user_id": "m"}}) == "m"


@pytest.mark.parametrize("value", [{"a": 1}, ["x"], [], {}, 1.5, True, False, float("nan"), "a\x00b", "x" * 300, " "])
async def test_an_end_user_is_a_string_or_a_number(value: Any) -> None:
    """What is no id is refused here as it is elsewhere, not written out and taken for one."""
    for identify, body in (
        ("openai-user", {"user": value}),
        ("openai-user", {"safety_identifier": value, "user": "u"}),
        ("anthropic-user", {"metadata": {"user_id": value}}),
    ):
        with pytest.raises(InvalidInput):
            await who(identify, body)
    assert await who("openai-user", {"user": 7}) == "7"
    assert await who("openai-user", {"safety_identifier": "", "user": "u"}) == "u"


# -- lists and mistakes ----------------------------------------------------------------------------


async def test_the_first_that_knows_wins() -> None:
    """Sources are asked in order, and later ones aren't asked once somebody knows."""
    asked: list[str] = []

    def last(connection: HTTPConnection) -> str:
        asked.append("last")
        return "fallback"

    identify: list[Any] = ["state:org", "header:x-id", last]
    assert await who(identify, state={"org": "s"}, headers=[(b"x-id", b"h")]) == "s"
    assert await who(identify, headers=[(b"x-id", b"h")]) == "h"
    assert asked == []
    assert await who(identify) == "fallback"


@pytest.mark.parametrize(
    "bad",
    ["users", "header:", "header:x y", "header:é", "state:", "state:a-b", "state", "", [], 7, [None], ["user", 3], {}],
)
def test_unknown_sources_are_errors(bad: Any) -> None:
    """A name that is no source is an error that lists or guesses what was meant."""
    with pytest.raises(ConfigurationError, match="source"):
        sources(bad)


def test_which_sources_need_the_body() -> None:
    """Only sources that look into the body make the door read it."""
    assert [bool(one.names) for one in sources(["user", "header:x", "state:y", "respan-params"])] == [False] * 4
    assert all(one.names for one in sources(["openai-user", "anthropic-user"]))
    assert [bool(one.names) for one in sources(["respan-params", "body"])] == [True]


def test_description() -> None:
    """Sources have names for the log."""
    assert describe(["user", test_description]) == "user, test_description"  # type: ignore[list-item]  # a name is all
    assert describe("body") == "body"
