"""What is shipped: names, what importing costs, the house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import respan_guard

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "respan_guard"
MODULES = sorted(PACKAGE.rglob("*.py"))

LAZY = [
    "aiosqlite",
    "anthropic",
    "fastapi",
    "genai_prices",
    "google.genai",
    "httpx",
    "httpx2",
    "limits",
    "openai",
    "opentelemetry.sdk",
    "pydantic",
    "pydantic_settings",
    "redis",
    "rich",
    "starlette",
    "typer",
    "uvicorn",
]
HEAVY = [
    "anthropic",
    "genai_prices",
    "httpx",
    "httpx2",
    "openai",
    "opentelemetry.sdk",
    "redis",
    "rich",
    "typer",
    "uvicorn",
]


def loaded_by(statement: str, modules: list[str]) -> list[str]:
    """Which of `modules` a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*[name for name in {modules!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_importing_the_package_loads_nothing_else() -> None:
    """`import respan_guard` loads no dependency: names load on first use."""
    assert loaded_by("import respan_guard", LAZY) == []


@pytest.mark.parametrize("name", ["Guard", "GuardMiddleware"])
def test_using_it_loads_no_optional_package(name: str) -> None:
    """The guard and the middleware load neither an SDK nor a command line, and prices only when one is needed."""
    assert loaded_by(f"from respan_guard import {name}", HEAVY) == []


def test_public_names() -> None:
    """These names are public, each is what its module has, and `dir` shows them."""
    assert respan_guard.__all__ == [
        "Admission",
        "BudgetExceeded",
        "Customer",
        "CustomerBlocked",
        "Decision",
        "Guard",
        "GuardError",
        "GuardMiddleware",
        "GuardSpanProcessor",
        "LimitExceeded",
        "RateLimitExceeded",
        "Refusal",
        "Status",
        "StorageUnavailable",
        "Usage",
        "UsageRecord",
    ]
    for name in respan_guard.__all__:
        assert getattr(respan_guard, name).__name__ == name
    assert set(respan_guard.__all__) <= set(dir(respan_guard))


def test_without_an_extra_its_name_says_what_to_install() -> None:
    """Who imports it meets an `ImportError`, which code that can do without it expects; all else is there."""
    code = """
    import sys
    sys.modules["opentelemetry.sdk"] = None
    from respan_guard import Guard, GuardError
    for statement in ("from respan_guard import GuardSpanProcessor", "import respan_guard.otel"):
        try:
            exec(statement)
        except ImportError as error:
            assert "pip install 'respan-guard[otel]'" in str(error)
            assert isinstance(error, GuardError)
        else:
            raise AssertionError(statement)
    print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "done\n", done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Laziness hides no typo."""
    with pytest.raises(AttributeError, match="module 'respan_guard' has no attribute 'Gaurd'"):
        _ = respan_guard.Gaurd  # type: ignore[attr-defined]  # the point of the test


def test_modules_fit_a_reader() -> None:
    """No module is longer than 350 lines."""
    lengths = {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8").count("\n") for p in MODULES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def clock_reads(path: Path) -> list[str]:
    """Calls in a module that read a clock of the machine."""
    clocks = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "now", "utcnow", "today"}
    return [
        f"{path.name}:{node.lineno} {ast.unparse(node.func)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in clocks
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in {"time", "datetime", "date"}
    ]


def test_only_the_clock_reads_a_clock() -> None:
    """Time is passed in: no module but clock.py asks the machine for the time or the date."""
    assert clock_reads(PACKAGE / "clock.py") != []
    assert [read for path in MODULES if path.name != "clock.py" for read in clock_reads(path)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built with the installed build backend."""
    out = tmp_path_factory.mktemp("wheel")
    code = f"import hatchling.build; print(hatchling.build.build_wheel({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.split()[-1])


def test_the_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    """Code, py.typed and data files are in the wheel, the example that the demo runs, and nothing else."""
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert shipped == {str(path.relative_to(ROOT)) for path in files} | {"respan_guard/cli/gateway.py"}
    assert "respan_guard/py.typed" in shipped


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    """Licence, command, storage backends and version are in the wheel's metadata."""
    about = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"Version: {version}\n" in wheel.read(f"{about}/METADATA").decode()
    entry_points = wheel.read(f"{about}/entry_points.txt").decode()
    assert "respan-guard = respan_guard.cli:main" in entry_points
    assert "[respan_guard.backends]" in entry_points
    assert f"{about}/licenses/LICENSE" in wheel.namelist()


def test_the_changelog_knows_the_version() -> None:
    """The version in pyproject.toml has a heading in the changelog."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_exact_and_name_no_place() -> None:
    """Each constraint is name==version: no URL, no path, no index."""
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert len(lines) > 20
    for line in lines:
        name, exact, version = line.partition("==")
        assert name, line
        assert exact, line
        assert version, line
        assert not set(" /@:") & set(line), line
