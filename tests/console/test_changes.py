"""Changes by forms that meet others, forms that lack fields, and what is nobody's to change."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import httpx2
import pytest

from respan_guard import Customer, Guard, Usage
from respan_guard.console import Console
from respan_guard.customers import Customers
from respan_guard.errors import InvalidInput, RevisionConflict

from .support import SAME, client_of, token_in


async def edited(guard: Guard, **fields: str) -> dict[str, str]:
    """The form of ann's page, with what was typed into it."""
    page = client_of(guard, open_to_all=True).get("/user?id=ann").text
    form = {"id": "ann", "token": token_in(page)}
    for name, text in re.findall(r'name="was_([a-z_]+)" value="([^"]*)"', page):
        form[f"was_{name}"] = form[name] = text
    return form | fields


async def test_of_two_editors_of_a_field_the_second_is_asked(guard: Guard) -> None:
    """Both values are shown and nothing is changed; saved again, what was typed holds. The same value is no quarrel."""
    await guard.put_customer(Customer(customer_identifier="ann", name="Ann"))
    client = client_of(guard, open_to_all=True)
    second = await edited(guard, total_budget="500", name="Ann B")
    first = await edited(guard, total_budget="50")
    assert client.post("/user-save", data=first, headers=SAME).status_code == 303
    answer = client.post("/user-save", data=second, headers=SAME)
    assert answer.status_code == 409
    assert "Total budget: now &#34;50&#34;, you typed &#34;500&#34;." in answer.text
    assert 'name="total_budget" type="text" value="500"' in answer.text
    assert 'name="was_total_budget" value="50"' in answer.text
    stored = await guard.get_customer("ann")
    assert stored is not None
    assert (stored.total_budget, stored.name) == (Decimal(50), "Ann")
    again = client.post("/user-save", data=second | {"was_total_budget": "50"}, headers=SAME)
    assert again.headers["location"] == "user?id=ann&done=saved"
    stored = await guard.get_customer("ann")
    assert stored is not None
    assert (stored.total_budget, stored.name) == (Decimal(500), "Ann B")
    same = client.post("/user-save", data=first | {"total_budget": "500"}, headers=SAME)
    assert same.headers["location"] == "user?id=ann&done=saved"


@pytest.mark.parametrize("path", ["user-save", "user-block"])
async def test_a_form_without_its_field_changes_nothing(guard: Guard, path: str) -> None:
    """No limit is lifted, and nobody unblocked, by what was not sent."""
    await guard.put_customer(Customer(customer_identifier="ann", total_budget=5, blocked=True))
    form = await edited(guard)
    del form["total_budget"]
    answer = client_of(guard, open_to_all=True).post(f"/{path}", data=form, headers=SAME)
    assert answer.status_code == 400
    stored = await guard.get_customer("ann")
    assert stored is not None
    assert (stored.total_budget, stored.blocked) == (Decimal(5), True)


async def test_of_two_who_make_a_customer_one_does(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, too: the other is told, and has changed nothing."""
    token = token_in(client_of(guard, open_to_all=True).get("/user-new").text)
    both, row = asyncio.Barrier(2), Customers._row

    async def together(self: Customers, *args: Any) -> Any:
        found = await row(self, *args)
        await both.wait()
        return found

    monkeypatch.setattr(Customers, "_row", together)
    forms = [{"period_budget": "10", "budget_duration": "daily"}, {"rate_limit": "5"}]
    transport = httpx2.ASGITransport(app=Console(guard, open_to_all=True))
    async with httpx2.AsyncClient(transport=transport, base_url="http://console.example", headers=SAME) as client:
        shared = {"token": token, "customer_identifier": "acme"}
        answers = await asyncio.gather(*(client.post("/user-new", data=shared | form) for form in forms))
    assert sorted(answer.status_code for answer in answers) == [303, 400]
    monkeypatch.undo()
    stored = await guard.get_customer("acme")
    assert stored is not None
    assert (stored.period_budget is None) is (stored.rate_limit is not None)


@pytest.mark.parametrize("path", ["user-save", "user-block", "user-new"])
async def test_a_customer_that_others_change_all_the_time(
    guard: Guard, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is an answer that says so, not an error."""
    await guard.put_customer(Customer(customer_identifier="ann"))
    form = await edited(guard, name="A", blocked="1", customer_identifier="eve")

    async def never(*_: object, **__: object) -> None:
        raise RevisionConflict("changed by others all the time")

    monkeypatch.setattr(Customers, "_change", never)
    answer = client_of(guard, open_to_all=True).post(f"/{path}", data=form, headers=SAME)
    assert answer.status_code == 409


async def test_nobody_and_the_deleted_are_no_customers(guard: Guard) -> None:
    """They have no budget to be over and no forms, and are not counted; nobody is made under such a name."""
    for who, cost in ((None, 6), ("gone", 7), ("fine", 1)):
        await guard.record(Usage(model="m", cost=cost), who)
    await guard.delete_customer("gone")
    client = client_of(guard, open_to_all=True)
    rows: list[Mapping[str, Any]] = client.get("/users.json").json()
    [label] = [row["customer_identifier"] for row in rows if row["customer_identifier"] not in ("", "fine")]
    assert {row["state"] for row in rows} == {"ok"}
    facts = {row["customer_identifier"]: (row["period_budget_usd"], row["rate_limit"]) for row in rows}
    assert facts == {"": (None, None), label: (None, None), "fine": ("5", 60)}
    assert client.get("/users.json?state=over").json() == []
    page = client.get("/").text
    assert 'title="0 of all customers at 80 % of a budget or more, and not blocked"' in page
    tile = re.search(r'Active customers</a></h2>\s*<p class="value" title="[^"]*; 1 known">1</p>', page)
    assert tile is not None, re.findall(r"Active customers.{200}", page, re.DOTALL)
    for who in (label, ""):
        page = client.get(f"/user?id={who}").text
        assert "user-save" not in page
        assert "user-block" not in page
    token = token_in(client.get("/user-new").text)
    for path in ("user-save", "user-block", "user-delete"):
        form = {"token": token, "id": label, "blocked": "1", "confirm": label}
        assert client.post(f"/{path}", data=form, headers=SAME).status_code == 404
    new = {"token": token, "customer_identifier": "deleted-0123456789abcdef"}
    assert client.post("/user-new", data=new, headers=SAME).status_code == 400


async def test_a_customer_is_created_once(guard: Guard) -> None:
    """Also one that was put without any field; one that was only seen is new."""
    await guard.record(Usage(model="m", cost=1), "seen")
    await guard.customers.create(Customer(customer_identifier="seen"))
    with pytest.raises(InvalidInput, match="there is a customer"):
        await guard.customers.create(Customer(customer_identifier="seen", total_budget=Decimal(5)))
