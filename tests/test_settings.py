"""Settings: where each comes from, and what is said about those that can't work."""

from __future__ import annotations

import os
import traceback
import typing
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from respan_guard.clock import SystemClock
from respan_guard.errors import ConfigurationError
from respan_guard.settings import DEFAULT_LIMIT_FIELDS, GuardOptions, Settings, mask_url


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and no setting from the machine that runs the tests."""
    for name in [name for name in os.environ if name.upper().startswith("RESPAN_GUARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_are_those_of_the_documentation() -> None:
    """With nothing set, every option has its documented default, from the source "default"."""
    settings = Settings.load()
    expected: dict[str, Any] = {
        "storage": "sqlite:///respan_guard.db",
        "mode": "enforce",
        "default_limits": None,
        "app_budgets": None,
        "model_budgets": None,
        "hold": "upper_bound",
        "default_hold": Decimal(0),
        "default_max_output_tokens": 4096,
        "prices": {},
        "unknown_price": "reject",
        "time_zone": "UTC",
        "namespace": "default",
        "retention": None,
        "storage_timeout": None,
        "budget_failure": "closed",
        "rate_limit_failure": "local",
        "local_share": 0.1,
        "rate_limit_storage": None,
        "rate_limit_strategy": "sliding-window-counter",
        "hold_ttl": 600.0,
        "budget_status_code": 402,
        "show_amounts": False,
        "unknown_customers": "admit",
        "trust_customer_params": False,
        "missing_usage": "hold",
        "store_content": False,
        "journal_dir": None,
        "max_cached_customers": 10_000,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert isinstance(settings.clock, SystemClock)
    assert set(Settings.model_fields) == {*expected, "clock"}
    assert {source for _, source in settings.sources().values()} == {"default"}


def test_typed_options_are_the_settings() -> None:
    """`GuardOptions` types every setting but `storage`, which is positional."""
    assert {*typing.get_type_hints(GuardOptions), "storage"} == set(Settings.model_fields)


def test_keyword_beats_environment_beats_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each option comes whole from the first source that has it, and `sources` says which."""
    (tmp_path / "respan_guard.toml").write_text('mode = "shadow"\ntime_zone = "Asia/Tokyo"\nnamespace = "file"\n')
    monkeypatch.setenv("RESPAN_GUARD_MODE", "off")
    monkeypatch.setenv("RESPAN_GUARD_NAMESPACE", "environment")
    settings = Settings.load(mode="enforce")
    assert (settings.mode, settings.namespace, settings.time_zone) == ("enforce", "environment", "Asia/Tokyo")
    sources = settings.sources()
    assert sources["mode"] == ("enforce", "keyword")
    assert sources["namespace"] == ("environment", "environment RESPAN_GUARD_NAMESPACE")
    assert sources["time_zone"] == ("Asia/Tokyo", "respan_guard.toml")
    assert sources["hold"] == ("upper_bound", "default")


def test_limits_of_two_sources_are_not_mixed(tmp_path: Path) -> None:
    """A keyword's `default_limits` replaces the file's whole table: nobody gets a limit no source spells out."""
    (tmp_path / "respan_guard.toml").write_text("[default_limits]\nrate_limit = 10\ntotal_budget = 3\n")
    assert Settings.load().default_limits == {"rate_limit": 10, "total_budget": "3"}
    assert Settings.load(default_limits={"rate_limit": 60}).default_limits == {"rate_limit": 60}


def test_storage_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Guard(None)` and `Guard()` are the same: the environment still counts."""
    monkeypatch.setenv("RESPAN_GUARD_STORAGE", "memory://")
    assert Settings.load(storage=None).storage == "memory://"


def test_another_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RESPAN_GUARD_CONFIG` names the file to read instead of ./respan_guard.toml."""
    (tmp_path / "respan_guard.toml").write_text('mode = "off"\n')
    other = tmp_path / "other.toml"
    other.write_text('mode = "shadow"\n')
    monkeypatch.setenv("RESPAN_GUARD_CONFIG", str(other))
    assert Settings.load().sources()["mode"] == ("shadow", str(other))


def test_stray_files_switch_nothing_off(tmp_path: Path) -> None:
    """Neither a `.env` nor a `pyproject.toml` is read, nor a file in a parent directory."""
    (tmp_path / ".env").write_text("RESPAN_GUARD_MODE=off\n")
    (tmp_path / "pyproject.toml").write_text('[tool.respan_guard]\nmode = "off"\n')
    (tmp_path.parent / "respan_guard.toml").write_text('mode = "off"\n')
    try:
        assert Settings.load().mode == "enforce"
    finally:
        (tmp_path.parent / "respan_guard.toml").unlink()


def test_environment_reads_numbers_booleans_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in the environment are text, and tables are JSON."""
    monkeypatch.setenv("RESPAN_GUARD_HOLD", "0.05")
    monkeypatch.setenv("RESPAN_GUARD_SHOW_AMOUNTS", "true")
    monkeypatch.setenv("RESPAN_GUARD_RETENTION", "400 days")
    monkeypatch.setenv("RESPAN_GUARD_BUDGET_STATUS_CODE", "429")
    monkeypatch.setenv("RESPAN_GUARD_DEFAULT_LIMITS", '{"rate_limit": "5/second"}')
    monkeypatch.setenv("RESPAN_GUARD_APP_BUDGETS", '{"budget_duration": "daily", "period_budget": 500}')
    monkeypatch.setenv("RESPAN_GUARD_TEST_REDIS_URL", "redis://localhost")
    settings = Settings.load()
    assert settings.app_budgets == {"budget_duration": "daily", "period_budget": "500"}
    assert settings.hold == Decimal("0.05")
    assert settings.show_amounts is True
    assert settings.retention == 400
    assert settings.budget_status_code == 429
    assert settings.default_limits == {"rate_limit": "5/second"}


@pytest.mark.parametrize("text", ["400", "400 days", " 400 days ", "400days"])
def test_retention_is_days(text: str) -> None:
    """Retention is a number of days, with or without the word."""
    assert Settings.load(retention=text).retention == 400


def test_a_float_amount_is_its_decimal_form() -> None:
    """A hold of 0.1 is a tenth of a dollar, not the binary number next to it."""
    assert Settings.load(hold=0.1).hold == Decimal("0.1")


def test_a_newline_behind_the_url_is_dropped() -> None:
    """A URL read from a secret's file may end with a newline."""
    assert Settings.load(storage="memory://\n").storage == "memory://"


def test_settings_do_not_change() -> None:
    """A guard's settings are fixed when it is made."""
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().mode = "off"  # type: ignore[misc]  # the point of the test


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mdoe": "shadow"}, r"mdoe is no option of Guard; did you mean mode\?"),
    ({"rate": "5/minute"}, r"rate is no option of Guard; (did you mean|known:)"),
    ({"xyzzy": 1}, r"xyzzy is no option of Guard; known: storage, mode, "),
    ({"mode": "shaddow"}, r'mode must be "enforce", "shadow" or "off", got \'shaddow\''),
    ({"mode": None}, r"mode must be .* got None"),
    ({"mode": False}, r"mode must be .* got False"),
    ({"storage": "guard.db"}, r'storage must be a URL like "sqlite:///guard.db" or "memory://", got \'guard.db\''),
    ({"storage": ""}, r"storage must be a URL"),
    ({"storage": 7}, r"storage must be a URL"),
    ({"hold": "upperbound"}, r'hold must be "upper_bound", "none" or an amount of USD from 0, got \'upperbound\''),
    ({"hold": -1}, r"hold must be .* must not be negative"),
    ({"hold": "NaN"}, r"hold must be .* finite"),
    ({"hold": float("inf")}, r"hold must be .* finite"),
    ({"hold": True}, r"hold must be "),
    ({"default_hold": "ten"}, r"default_hold must be an amount of USD from 0"),
    ({"default_hold": 10**8}, r"default_hold must be .* at most 9,000,000"),
    ({"default_max_output_tokens": 0}, r"default_max_output_tokens must be a number of tokens from 1, got 0"),
    ({"default_max_output_tokens": True}, r"default_max_output_tokens must be .* got True: got a boolean"),
    ({"default_max_output_tokens": 1.5}, r"default_max_output_tokens must be "),
    ({"prices": "cheap"}, r"prices must be prices by model like"),
    ({"prices": {1: {"input": 1}}}, r"prices must be prices by model like"),
    ({"unknown_price": "ignore"}, r'unknown_price must be "reject" or "flag"'),
    ({"time_zone": "Mars/Olympus"}, r"time_zone must be .* got 'Mars/Olympus': there is no such zone"),
    ({"time_zone": "America"}, r"time_zone must be .* there is no such zone"),
    ({"time_zone": "../../etc/passwd"}, r"time_zone must be .* there is no such zone"),
    ({"time_zone": "localtime"}, r"time_zone must be .* got 'localtime': it is another zone on each machine"),
    ({"time_zone": 2}, r"time_zone must be .* there is no such zone"),
    ({"namespace": ""}, r"namespace must be 1 to 64 letters"),
    ({"namespace": "a b"}, r"namespace must be 1 to 64 letters"),
    ({"namespace": "a\n"}, r"namespace must be 1 to 64 letters"),
    ({"retention": 39}, r'retention must be a number of days from 40 like 400 or "400 days", got 39'),
    ({"retention": "13 months"}, r"retention must be a number of days from 40"),
    ({"retention": True}, r"retention must be "),
    ({"storage_timeout": 0}, r"storage_timeout must be a number of seconds above 0"),
    ({"storage_timeout": float("nan")}, r"storage_timeout must be "),
    ({"storage_timeout": True}, r"storage_timeout must be "),
    ({"hold_ttl": 0.5}, r"hold_ttl must be a number of seconds from 1 to 86400"),
    ({"budget_status_code": 200}, r"budget_status_code must be a status from 400 to 499, like 402 or 429, got 200"),
    ({"budget_status_code": "Payment Required"}, r"budget_status_code must be "),
    ({"show_amounts": "perhaps"}, r"show_amounts must be true or false, got 'perhaps'"),
    ({"unknown_customers": "deny"}, r'unknown_customers must be "admit" or "refuse"'),
    ({"trust_customer_params": "body"}, r"trust_customer_params must be true or false"),
    ({"missing_usage": "zero"}, r'missing_usage must be "hold", "estimate" or "flag"'),
    ({"journal_dir": 3}, r"journal_dir must be the path of a directory"),
    ({"max_cached_customers": 0}, r"max_cached_customers must be a number from 1"),
    ({"clock": "now"}, r"clock must be an object with now_ms\(\) and monotonic\(\)"),
    ({"app_budgets": 500}, r"app_budgets must be budgets like .* that is no mapping"),
    ({"app_budgets": {"period_budjet": 5}}, r"app_budgets .* 'period_budjet' is no budget; did you mean period_budget"),
    ({"app_budgets": {"rate_limit": 5}}, r"app_budgets .* 'rate_limit' is no budget"),
    ({"app_budgets": {}}, r"app_budgets .* neither a period_budget nor a total_budget"),
    ({"app_budgets": {"budget_duration": "daily"}}, r"app_budgets .* neither a period_budget nor a total_budget"),
    ({"model_budgets": {"total_budget": -1}}, r"model_budgets must be budgets like .* total_budget"),
    ({"model_budgets": {"time_zone": "UTC", "total_budget": 1}}, r"model_budgets .* 'time_zone' is no budget"),
    ({"default_limits": 60}, r"default_limits must be limits of a customer like"),
    ({"default_limits": {"rate_limt": 60}}, r"default_limits .* 'rate_limt' is no limit; did you mean rate_limit\?"),
    ({"default_limits": {"name": "Acme"}}, r"default_limits .* 'name' is no limit"),
    ({"default_limits": {"customer_identifier": "a"}}, r"default_limits .* 'customer_identifier' is no limit"),
    ({"default_limits": {"rate_limit": "often"}}, r"default_limits must be .* rate_limit"),
    ({"default_limits": {"period_budget": -5}}, r"default_limits must be .* period_budget"),
    ({"default_limits": {"budget_duration": "fortnightly", "period_budget": 5}}, r"default_limits .* budget_duration"),
    (
        {"default_limits": {"period_budget": 5, "period_start": "2026-02-01", "period_end": "2026-01-01"}},
        r"default_limits must be .* period_end",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: str(value)[:60])
def test_a_bad_option_is_named(options: Mapping[str, Any], message: str) -> None:
    """A name or value that can't work is an error that says what was wrong and what would be right."""
    with pytest.raises(ConfigurationError, match=message):
        Settings.load(**options)


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("RESPAN_GUARD_MOD", "off", r"RESPAN_GUARD_MOD is no setting; did you mean RESPAN_GUARD_MODE\?"),
        ("respan_guard_mdoe", "off", r"respan_guard_mdoe is no setting; did you mean RESPAN_GUARD_MODE\?"),
        ("RESPAN_GUARD_DEFAULT_LIMITS__RATE_LIMIT", "5", r"is no setting; did you mean RESPAN_GUARD_DEFAULT_LIMITS\?"),
        ("RESPAN_GUARD_CLOCK", "utc", r"RESPAN_GUARD_CLOCK can't be set in the environment; pass clock= to Guard"),
        ("RESPAN_GUARD_STORAGE", "", r"RESPAN_GUARD_STORAGE is empty; give it a value or unset it"),
        ("RESPAN_GUARD_MODE", "Off!", r"mode must be .* got 'Off!' \(environment RESPAN_GUARD_MODE\)"),
        (
            "RESPAN_GUARD_DEFAULT_LIMITS",
            "rate_limit=5",
            r"default_limits must be .* as JSON \(environment RESPAN_GUARD_DEFAULT_LIMITS\)",
        ),
        ("RESPAN_GUARD_PRICES", "{", r"RESPAN_GUARD_PRICES must be .* as JSON"),
        ("RESPAN_GUARD_DEFAULT_MAX_OUTPUT_TOKENS", "many", r"got 'many' \(environment RESPAN_GUARD_DEFAULT_MAX"),
        ("RESPAN_GUARD_CONFIG", "missing.toml", r"settings file missing.toml can't be read: No such file"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown, empty or unreadable environment variable is an error that names it."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigurationError, match=message):
        Settings.load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"mdoe = 'off'", r"mdoe in respan_guard.toml is no setting; did you mean mode\?"),
        (b"mode = off", r"respan_guard.toml is no TOML: .*line 1"),
        (b"mode = '\xff'", r"respan_guard.toml is no TOML"),
        (b"[respan_guard]\nmode = 'off'", r"respan_guard in respan_guard.toml is no setting"),
        (b"clock = 'utc'", r"clock can't be set in respan_guard.toml; pass clock= to Guard"),
        (b"hold_ttl = 0", r"hold_ttl must be .* got 0 \(respan_guard.toml\)"),
        (b"[default_limits]\nperiod_budget = nan", r"default_limits must be .* period_budget"),
    ],
)
def test_a_bad_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    """A file with an unknown name, a bad value or no TOML is an error that says where."""
    (tmp_path / "respan_guard.toml").write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        Settings.load()


def test_all_bad_options_are_told_at_once() -> None:
    """One error tells about every value that can't work."""
    with pytest.raises(ConfigurationError, match=r"mode must be .*; hold_ttl must be "):
        Settings.load(mode="on", hold_ttl=0)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:s3cret@host/0", "redis://:***@host/0"),
        ("redis://user:s3cret@host/0", "redis://user:***@host/0"),
        ("redis://user:s3:cre@t@host/0", "redis://user:***@host/0"),
        ("redis://s3cret@host/0", "redis://***@host/0"),
        ("postgresql://user:s3/c:re@t@host/db", "postgresql://…"),
        ("redis://user:/s3cret@host", "redis://…"),
        ("redis://:s3cret", "redis://…"),
        ("mongodb+srv://user:s3cret@h1,h2/db", "mongodb+srv://user:***@h1,h2/db"),
        ("postgresql:/user:s3cret@host/db", "…"),
        ("user:s3cret@host/db", "…"),
        ("host=h password=s3cret", "…"),
        ("guard.db", "guard.db"),
        ("redis+unix:///run/a@b.sock", "redis+unix:///run/a@b.sock"),
        (
            "postgresql://h1,h2:5433/db?target_session_attrs=any&x=s3cret",
            "postgresql://h1,h2:5433/db?target_session_attrs=any&…",
        ),
        ("postgresql://user@host/db?password=s3cret&sslmode=require", None),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
        ("sqlite:////var/lib/a@b.db", "sqlite:////var/lib/a@b.db"),
        ("memory://", "memory://"),
    ],
)
def test_passwords_are_masked(url: str, masked: str | None) -> None:
    """A URL is shown without its password, and as its scheme alone where it is in doubt what the password is."""
    shown = mask_url(url)
    assert shown == (masked or "postgresql://user@host/db?password=***&…")
    assert "s3" not in shown


@pytest.mark.parametrize("url", ["redis://user:s3cret@host/0", "postgresql:user:s3cret@host/db"])
def test_no_password_in_anything_shown(url: str) -> None:
    """Neither repr, `sources` nor an error's traceback shows a password."""
    try:
        settings = Settings.load(storage=url)
        shown = f"{settings!r} {settings} {settings.sources()}"
    except ConfigurationError:
        shown = traceback.format_exc()
    assert "s3cret" not in shown
    assert "***" in shown or "…" in shown


OF_A_SERVICE = [
    "RESPAN_GUARD_SERVICE_HOST",
    "RESPAN_GUARD_SERVICE_PORT",
    "RESPAN_GUARD_SERVICE_PORT_HTTP",
    "RESPAN_GUARD_SERVICE_PORT_HTTP_METRICS",
    "RESPAN_GUARD_PORT",
    "RESPAN_GUARD_PORT_8080_TCP",
    "RESPAN_GUARD_PORT_8080_TCP_PROTO",
    "RESPAN_GUARD_PORT_8080_TCP_PORT",
    "RESPAN_GUARD_PORT_8080_TCP_ADDR",
    "RESPAN_GUARD_PORT_53_UDP_ADDR",
]


def test_what_kubernetes_puts_into_the_environment_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service named respan-guard makes variables with our prefix in every pod beside it; exactly those are let be."""
    for name in OF_A_SERVICE:
        monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    Settings.load()
    for name in ("RESPAN_GUARD_PORTS", "RESPAN_GUARD_PORT_TCP", "RESPAN_GUARD_SERVICE", "RESPAN_GUARD_SERVICE_HOSTS"):
        with monkeypatch.context() as with_one:
            with_one.setenv(name, "x")
            with pytest.raises(ConfigurationError, match="is no setting"):
                Settings.load()


def test_default_limits_take_exactly_the_limits() -> None:
    """`default_limits` accepts what limits a customer, not what tells who one is."""
    given = {
        "rate_limit": 60,
        "budget_duration": "monthly",
        "period_budget": 5,
        "total_budget": 50,
        "period_start": "2026-01-31",
        "markup_percentage": 10,
        "time_zone": "Europe/Berlin",
    }
    limits = Settings.load(default_limits=given).default_limits
    assert limits is not None
    assert set(limits) == set(given)
    assert set(given) | {"period_end"} == set(DEFAULT_LIMIT_FIELDS)
