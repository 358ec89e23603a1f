"""The command line: what it prints, what it changes, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from respan_guard import Customer, Guard, Usage
from respan_guard.cli.app import app

CUSTOMER = {
    "customer_identifier",
    "name",
    "email",
    "metadata",
    "group_identifier",
    "rate_limit",
    "budget_duration",
    "period_budget",
    "total_budget",
    "period_start",
    "period_end",
    "period_anchor",
    "markup_percentage",
    "blocked",
    "time_zone",
}
HOSTILE = "\u202e[bold red]evil[/] \u200b"
HOSTILE_MODEL = "\x1b[31mred\x1b[0m [/] \u202emodel"


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current directory, no settings of the machine, and one SQLite file."""
    for name in [name for name in os.environ if name.upper().startswith("RESPAN_GUARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESPAN_GUARD_STORAGE", f"sqlite:///{tmp_path}/guard.db")


def run(*arguments: str, code: int = 0, typed: str | None = None) -> Result:
    """Run a command and check how it ends."""
    result = CliRunner().invoke(app, list(arguments), input=typed)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def answer(*arguments: str, code: int = 0) -> Any:
    """What a command prints with --json."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def filled() -> None:
    """A store with two customers and three calls on two days."""

    async def fill() -> None:
        async with Guard() as guard:
            await guard.put_customer(
                Customer(customer_identifier="org_1", name="Acme", rate_limit=60, period_budget=5, markup_percentage=10)
            )
            first, second = datetime(2026, 3, 1, 12, tzinfo=UTC), datetime(2026, 3, 2, 12, tzinfo=UTC)
            calls = [
                ("org_1", Usage("gpt-4o", 1000, 10, cost=Decimal("0.000000001"), time=first)),
                ("org_1", Usage("gpt-4o-mini", 500, 5, cost=Decimal("0.25"), time=second)),
                ("org_2", Usage("gpt-4o", 1, 1, cost=Decimal("1.5"), time=second)),
            ]
            for customer, usage in calls:
                await guard.record(usage, customer)

    asyncio.run(fill())


# -- the frame ---------------------------------------------------------------------------------------


def test_the_command_runs_as_a_module() -> None:
    """`python -m respan_guard` is the command, in a real process, and tells its version."""
    done = subprocess.run(
        [sys.executable, "-m", "respan_guard", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == version("respan-guard")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    """Where the extra is not installed, one line says how to get it, with exit code 2 and no traceback."""
    code = f"import sys; sys.modules[{missing!r}] = None; from respan_guard.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "respan-guard's command line is an extra: pip install 'respan-guard[cli]'\n"


def test_it_lists_its_commands() -> None:
    """Help names every command."""
    shown = run("--help").stdout
    for command in ("demo", "check", "customers", "usage", "verify", "prune", "prices"):
        assert command in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify", "--storage", "nosuch://x"), "nosuch"),
        (("usage", "--storage", "guard.db"), "storage must be a URL"),
        (("usage", "--by", "colour"), "usage is summed by customer, model, day"),
        (("usage", "--since", "2026-03-02", "--until", "2026-03-02"), "--until must be after --since"),
        (("customers", "set", "a\nb", "--rate-limit", "5"), "control character"),
        (("customers", "set", "a", "--period-budget", "-5"), "period_budget"),
        (("customers", "set", "a", "--period-budget", "nan"), "period_budget"),
        (("customers", "set", "a", "--budget-duration", "fortnightly"), "budget_duration"),
        (("customers", "set", "a", "--rate-limit", "often"), "rate_limit"),
        (("customers", "set", "a", "--metadata", "{"), "--metadata is no JSON"),
        (("customers", "set", "a", "--metadata", "[1]"), "--metadata must be a JSON object"),
        (("customers", "set", "a", "--unset", "colour"), "no such field"),
        (("customers", "set", "a", "--unset", "rate-limit", "--rate-limit", "5"), "both set and unset"),
        (("customers", "set", "a"), "nothing to change"),
        (("prune",), "--before YYYY-MM-DD or --older-than DAYS"),
        (("prune", "--before", "2026-01-01", "--older-than", "5"), "not both"),
        (("prune", "--older-than", "a while"), "--older-than must be a number of days"),
        (("prune", "--before", "9999-01-01"), "records of 40 days are kept"),
        (("prune", "--before", f"{datetime.now(UTC):%Y-%m-%d}"), "records of 40 days are kept"),
        (("prune", "--older-than", "39"), "--older-than must be a number of days from 40"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_asked_wrongly_it_says_so(arguments: tuple[str, ...], said: str) -> None:
    """Input that can't be used ends with exit code 2 and a line on standard error, none on standard output."""
    result = run(*arguments, code=2)
    assert said in result.stderr
    assert result.stderr.startswith("respan-guard: ")
    assert result.stdout == ""


def test_a_bad_setting_ends_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable stops the command that would have ignored it."""
    monkeypatch.setenv("RESPAN_GUARD_MDOE", "off")
    assert "did you mean RESPAN_GUARD_MODE?" in run("customers", "list", code=2).stderr


@pytest.mark.parametrize("command", [("usage",), ("verify",), ("customers", "list"), ("prune", "--older-than", "90")])
def test_a_misspelt_path_is_no_empty_store(command: tuple[str, ...], tmp_path: Path) -> None:
    """Commands that look at a store fail where there is none, and don't make one."""
    result = run(*command, "--storage", f"sqlite:///{tmp_path}/gaurd.db", code=1)
    assert f"there is no store yet at {tmp_path}/gaurd.db" in result.stderr
    assert not (tmp_path / "gaurd.db").exists()


# -- check ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("filled")
def test_check_shows_settings_with_their_source(tmp_path: Path) -> None:
    """Every setting is shown with its value and where that is from, and what the store says of itself."""
    Path("respan_guard.toml").write_text('time_zone = "Asia/Tokyo"\n')
    found = answer("check")
    assert found["ok"] is True
    assert found["error"] is None
    assert found["settings"]["storage"] == {
        "value": f"sqlite:///{tmp_path}/guard.db",
        "source": "environment RESPAN_GUARD_STORAGE",
    }
    assert found["settings"]["time_zone"] == {"value": "Asia/Tokyo", "source": "respan_guard.toml"}
    assert found["settings"]["default_hold"] == {"value": "0", "source": "default"}
    assert set(found["storage"]) == {"url", "schema", "durable", "facts", "warnings"}
    assert found["storage"]["durable"] is True
    shown = run("check").stdout
    assert "Asia/Tokyo" in shown
    assert "respan_guard.toml" in shown
    assert "all right" in shown


def test_check_finds_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that can't work is what check is there to find: exit code 1, and the error says which."""
    monkeypatch.setenv("RESPAN_GUARD_MODE", "shaddow")
    found = answer("check", code=1)
    assert found["ok"] is False
    assert "RESPAN_GUARD_MODE" in found["error"]
    assert "RESPAN_GUARD_MODE" in run("check", code=1).stdout


def test_check_finds_storage_that_does_not_work(tmp_path: Path) -> None:
    """A file that is no database is found, and the settings are shown all the same."""
    (tmp_path / "guard.db").write_bytes(b"this is no database" * 1000)
    found = answer("check", code=1)
    assert found["ok"] is False
    assert found["storage"] is None
    assert found["settings"]["mode"]["value"] == "enforce"


def test_check_finds_a_journal_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where records wait in an outage is shown and tried before there is one, and nothing is left there."""
    monkeypatch.setenv("RESPAN_GUARD_JOURNAL_DIR", str(tmp_path / "journal"))
    assert answer("check")["journal"] == str(tmp_path / "journal")
    assert "journal" in run("check").stdout
    assert list((tmp_path / "journal").glob("*.probe")) == []
    monkeypatch.setenv("RESPAN_GUARD_JOURNAL_DIR", "/dev/null")
    found = answer("check", code=1)
    assert found["ok"] is False
    assert found["error"].startswith("no usage records can wait in /dev/null")
    assert "set journal_dir" in found["error"]


def test_check_shows_no_password() -> None:
    """The storage URL's password is in no output, not even where the URL can't work."""
    result = run("check", "--storage", "nosuch://user:s3cret@host/db", code=1)
    assert "s3cret" not in result.output
    assert "***" in result.output


# -- customers -----------------------------------------------------------------------------------------


def test_set_show_list_delete() -> None:
    """A customer's fields are set, changed one by one, removed, listed, and erased."""
    made = answer(
        "customers", "set", "org_1", "--name", "Acme", "--rate-limit", "100", "--period-budget", "12.50",
        "--budget-duration", "monthly", "--metadata", '{"plan": "pro"}', "--blocked",
    )  # fmt: skip
    assert set(made) == CUSTOMER
    assert (made["name"], made["rate_limit"], made["period_budget"]) == ("Acme", 100, "12.5")
    assert made["metadata"] == {"plan": "pro"}
    assert made["blocked"] is True
    changed = answer("customers", "set", "org_1", "--unset", "rate-limit", "--not-blocked", "--total-budget", "0.1")
    assert (changed["rate_limit"], changed["blocked"], changed["total_budget"]) == (None, False, "0.1")
    assert changed["period_budget"] == "12.5"
    listed = answer("customers", "list")
    assert [row["customer_identifier"] for row in listed] == ["org_1"]
    shown = answer("customers", "show", "org_1")
    assert [limit["name"] for limit in shown["status"]["limits"]] == ["period_budget", "total_budget"]
    assert shown["status"]["limits"][0]["remaining"] == "12.5"
    assert answer("customers", "delete", "org_1", "--yes") == {"customer_identifier": "org_1", "deleted": True}
    assert "is not known" in run("customers", "show", "org_1", code=1).stderr


def test_changes_are_audited_with_who_made_them() -> None:
    """A change by the command line is in the audit under the user's name."""
    run("customers", "set", "org_1", "--rate-limit", "5")

    async def audit() -> list[str]:
        async with Guard() as guard:
            return [row.actor for row in await guard.lane().call(lambda backend: backend.audit())]

    assert [actor.partition(":")[0] for actor in asyncio.run(audit())] == ["cli"]


def test_deleting_asks_first() -> None:
    """Without --yes a customer is erased only after a yes."""
    run("customers", "set", "org_1", "--rate-limit", "5")
    run("customers", "delete", "org_1", typed="n\n", code=1)
    run("customers", "show", "org_1")
    run("customers", "delete", "org_1", typed="y\n")
    run("customers", "show", "org_1", code=1)


def test_deleting_nobody_fails() -> None:
    """Erasing a customer that is not there is no success."""
    run("customers", "set", "somebody", "--rate-limit", "5")
    assert "is not known" in run("customers", "delete", "nobody", "--yes", code=1).stderr


@pytest.mark.usefixtures("filled")
def test_a_list_says_that_there_is_more() -> None:
    """A list cut by --limit says so on standard error; sorting and searching are the store's."""
    result = run("customers", "list", "--limit", "1", "--sort", "cost", "--descending", "--json")
    assert [row["customer_identifier"] for row in json.loads(result.stdout)] == ["org_2"]
    assert "there are more" in result.stderr
    assert [row["name"] for row in answer("customers", "list", "--search", "acm")] == ["Acme"]
    assert run("customers", "list", "--limit", "2").stderr == ""


@pytest.mark.usefixtures("filled")
def test_a_listed_customer_has_its_sums() -> None:
    """The list has every field and all-time sums; money is a decimal string, with and without markup."""
    row = answer("customers", "list", "--search", "org_1")[0]
    sums = {"first_seen", "last_seen", "active_days", "requests", "calls", "cost", "cost_with_markup"}
    assert set(row) == {*CUSTOMER, *sums, "input_tokens", "output_tokens", "unpriced"}
    assert row["cost"] == "0.250000001"
    assert row["cost_with_markup"] == "0.2750000011"
    assert row["calls"] == 2


def test_text_from_outside_can_not_act_on_the_terminal() -> None:
    """Markup in a name is shown as it is, and characters that turn or hide text are shown as escapes."""
    run("customers", "set", "[red]org[/red]", "--name", HOSTILE)
    shown = run("customers", "list").stdout
    assert "[red]org[/red]" in shown
    assert "\\u202e[bold red]evil[/]" in shown
    assert not set("\u202e\u200b\x1b") & set(shown)
    assert answer("customers", "list")[0]["name"] == HOSTILE


# -- usage ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("filled")
def test_usage_by_customer_model_and_day() -> None:
    """Usage is summed by what is asked for, exactly, and filtered by customer and days."""
    assert {row["customer_identifier"]: row["cost"] for row in answer("usage")} == {
        "org_1": "0.250000001",
        "org_2": "1.5",
    }
    by_model = answer("usage", "--by", "model")
    assert {row["model"]: (row["calls"], row["cost"], row["cost_with_markup"]) for row in by_model} == {
        "gpt-4o": (2, "1.500000001", "1.5000000011"),
        "gpt-4o-mini": (1, "0.25", "0.275"),
    }
    assert by_model[0]["customer_identifier"] is None
    by_day = answer("usage", "--by", "day", "--customer", "org_1")
    assert [(row["day"], row["cost"]) for row in by_day] == [("2026-03-01", "0.000000001"), ("2026-03-02", "0.25")]
    first = answer("usage", "--by", "customer", "--by", "model", "--since", "2026-03-01", "--until", "2026-03-02")
    assert [(row["customer_identifier"], row["model"]) for row in first] == [("org_1", "gpt-4o")]
    assert answer("usage", "--since", "2030-01-01") == []


@pytest.mark.usefixtures("filled")
def test_usage_as_a_table_has_a_total() -> None:
    """People see the total, to the nano-dollar, and with the customers' markup."""
    shown = run("usage", "--by", "model").stdout
    assert "1.750000001" in shown
    assert "1.7750000011" in shown
    assert "gpt-4o-mini" in shown
    assert run("usage", "--customer", "nobody").stdout == "no usage\n"
    total = run("usage", "--by", "model").stdout.split("total")[1].split()
    assert total[-4:] == ["1.750000001", "1.7750000011", "0", "0"]


def test_a_model_name_can_not_act_on_the_terminal() -> None:
    """A model name is a client's text: escape sequences in it are shown, not obeyed."""

    async def fill() -> None:
        async with Guard() as guard:
            await guard.record(Usage(HOSTILE_MODEL, cost=Decimal(1)), "org_1")

    asyncio.run(fill())
    shown = run("usage", "--by", "model").stdout
    assert not {"\x1b", "\u202e"} & set(shown)
    assert "[/]" in shown


# -- verify and prune ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("filled")
def test_verify_finds_a_changed_sum(tmp_path: Path) -> None:
    """A store whose sums follow from its records passes; one with a sum changed by hand does not, exit code 1."""
    assert answer("verify") == {"ok": True, "discrepancies": []}
    assert run("verify").stdout == "every sum is what its records add up to\n"
    with sqlite3.connect(tmp_path / "guard.db") as connection:
        connection.execute("UPDATE rollups SET cost = cost + 1")
    connection.close()
    found = answer("verify", code=1)
    assert found["ok"] is False
    assert set(found["discrepancies"][0]) == {"what", "where", "stored", "recomputed"}
    assert found["discrepancies"][0]["what"] in run("verify", code=1).stdout


@pytest.mark.usefixtures("filled")
def test_prune_deletes_records_and_keeps_sums() -> None:
    """Records before the day go, their sums stay, and verify agrees; a second time there is nothing to do."""
    before = answer("usage", "--by", "model", "--by", "day")
    assert answer("prune", "--before", "2026-03-02") == {"before": "2026-03-02", "deleted": 1}
    assert answer("prune", "--before", "2026-03-02")["deleted"] == 0
    assert answer("usage", "--by", "model", "--by", "day") == before
    assert answer("verify")["ok"] is True
    assert "2 records booked before" in run("prune", "--older-than", "40 days").stdout


@pytest.mark.usefixtures("filled")
def test_reading_deletes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `retention` set, only prune deletes: a report must not. Prune without options then uses it."""
    monkeypatch.setenv("RESPAN_GUARD_RETENTION", "40")
    run("usage")
    assert answer("prune")["deleted"] == 3


def test_a_guard_that_is_off_still_has_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mode="off"` stops the app's guard, not the people who look after its store."""
    monkeypatch.setenv("RESPAN_GUARD_MODE", "off")
    run("customers", "set", "org_1", "--rate-limit", "5")
    assert answer("customers", "show", "org_1")["rate_limit"] == 5
    assert answer("check")["settings"]["mode"]["value"] == "off"


# -- prices --------------------------------------------------------------------------------------------


def test_prices_of_a_known_model() -> None:
    """A model's price is shown with where it is from."""
    assert "genai-prices" in json.dumps(answer("prices", "gpt-4o-mini"))
    assert "gpt-4o-mini" in run("prices", "gpt-4o-mini").stdout


def test_prices_of_an_unknown_model() -> None:
    """A model without a price is exit code 1, and the answer says how to give it one."""
    assert "prices" in run("prices", "no-such-model-7", code=1).stderr


def test_prices_of_a_model_with_its_own_price(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price from the settings comes before those of genai-prices."""
    monkeypatch.setenv("RESPAN_GUARD_PRICES", '{"gpt-4o-mini": {"input": 123.5, "output": 1}}')
    assert "123.5" in run("prices", "gpt-4o-mini").stdout


# -- documentation -------------------------------------------------------------------------------------


def test_check_asks_the_storage_of_rates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rates live elsewhere and nobody answers there, something is wrong; its password stays where it is."""
    monkeypatch.setenv("RESPAN_GUARD_RATE_LIMIT_STORAGE", "redis://:hunter2@127.0.0.1:1/0")
    told = run("check", code=1).output
    assert "does not answer" in told
    assert "hunter2" not in told


@pytest.mark.usefixtures("filled")
def test_the_kill_switch_is_thrown_shown_and_taken_back() -> None:
    """By command: it says where it stands, `check` warns of it, and a word that is no mode is misuse."""
    assert answer("switch") == {"switch": None}
    thrown = answer("switch", "off", "--reason", "everything is refused")["switch"]
    assert (thrown["mode"], thrown["reason"]) == ("off", "everything is refused")
    assert thrown["actor"].startswith("cli")
    assert answer("check")["switch"] == thrown
    told = run("check").stdout
    assert "switched to off since" in told
    assert "everything is refused" in told
    assert "mode must be one of enforce, shadow, off or configured" in run("switch", "on", code=2).stderr
    assert answer("switch", "configured") == {"switch": None}


def test_bytes_that_are_no_text_are_asked_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reason or a filter that no store can keep is misuse, and switches nothing; a user's name is made to fit."""
    answer("customers", "set", "c1", "--name", "n")
    assert "reason must not hold" in run("switch", "off", "--reason", "\udcff", code=2).stderr
    assert answer("switch") == {"switch": None}
    assert "model must not hold" in run("usage", "--model", "\udcff", code=2).stderr
    monkeypatch.setenv("LOGNAME", "\udcff")
    assert answer("switch", "off")["switch"]["actor"] == "cli:?"
    assert answer("switch", "configured") == {"switch": None}


def keys(value: Any) -> set[str]:
    """The names of all members of a JSON value, but for those that are data."""
    if isinstance(value, list):
        return {name for item in value for name in keys(item)}
    if not isinstance(value, dict):
        return set()
    data = {"settings", "facts", "metadata", "rates", "long_input", "service_tiers"}
    return set(value) | {name for key, item in value.items() if key not in data for name in keys(item)}


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("check", ("check",)),
        ("customers list", ("customers", "list")),
        ("customers show", ("customers", "show", "org_1")),
        ("customers set", ("customers", "set", "org_1", "--name", "New")),
        ("customers delete", ("customers", "delete", "org_1", "--yes")),
        ("usage", ("usage",)),
        ("prune", ("prune", "--before", "2026-03-01")),
        ("switch", ("switch", "shadow", "--reason", "a try")),
        ("prices", ("prices", "gpt-4o-mini")),
        ("export forget", ("export", "forget", "keeper")),
    ],
)
def test_json_has_the_documented_keys(command: str, arguments: tuple[str, ...]) -> None:
    """What --json prints has the keys that docs/cli.md names, and no others."""
    rows = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8").partition("## JSON")[2]
    documented = {
        name: set(re.findall(r"`([a-z_]+)`", text)) - {"null"}
        for name, text in re.findall(r"^\| `([a-z ]+)` \| (.*) \|$", rows, re.MULTILINE)
    }
    expected = documented[command]
    if command in ("customers list", "customers show"):
        expected |= documented["customers set"]
    if command == "check":
        expected -= {"value", "source"}
    assert keys(answer(*arguments)) == expected
