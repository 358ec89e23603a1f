"""The OpenAPI document, attacked: nothing that fits it, or does not, makes a 5xx or an answer it does not describe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from respan_guard import Customer, Guard, Usage
from respan_guard.api import RespanAPI
from respan_guard.testing import FakeClock
from respan_guard.testing.serving import serve

from .support import DOCUMENT, KEY

schema = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    ignored_auth,
    unsupported_method,
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An API with something to show, on a real server."""
    guard = Guard("memory://", clock=FakeClock(), store_content=True, trust_customer_params=True)
    guard.sync.put_customer(Customer(customer_identifier="ann", name="Ann", period_budget=5))
    for number in range(5):
        guard.sync.record(Usage(model="gpt-4o-mini", input_tokens=number), "ann")
    with serve(RespanAPI(guard, api_key=KEY)) as found:
        yield found
    assert guard.sync.verify() == []


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent(case: schemathesis.Case[Any], url: str) -> None:
    """No server error, and every answer is in the document."""
    besides = []
    if case.path.endswith("block/"):  # an id may end so, too: PATCH and DELETE of that path are about another user
        besides = [unsupported_method]
    elif case.path.endswith("bulk/"):  # takes the good rows and tells of the others
        besides = [negative_data_rejection]
    case.call_and_validate(
        base_url=url, headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS, excluded_checks=besides
    )


def test_the_document_is_sound() -> None:
    """Every operation has an id of its own, and all that is defined is used."""
    names = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names)) == 21
    text = repr(DOCUMENT)
    for name in DOCUMENT["components"]["schemas"]:
        assert f"#/components/schemas/{name}'" in text
