"""A guard, a tracer provider of its own and a span processor between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from respan_guard import Guard
from respan_guard.otel import GuardSpanProcessor
from respan_guard.testing import StandInProvider

from .support import Metered

MakeMetered = Callable[..., Metered]


@pytest.fixture
def make_metered(tmp_path: Path) -> Iterator[MakeMetered]:
    """Make guards whose spans are metered; options of the processor begin with `otel_`."""
    made: list[Metered] = []

    def make(storage: str = "memory://", **options: Any) -> Metered:
        own = {name.removeprefix("otel_"): options.pop(name) for name in list(options) if name.startswith("otel_")}
        guard = Guard(storage, **({"journal_dir": tmp_path / "journal"} | options))
        processor = GuardSpanProcessor(guard, **own)
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(processor)
        made.append(Metered(guard, processor, provider))
        return made[-1]

    yield make
    for metered in made:
        metered.provider.shutdown()
        metered.guard.sync.close()


@pytest.fixture
def metered(make_metered: MakeMetered) -> Metered:
    """One of them, over memory."""
    return make_metered()


@pytest.fixture
def provider() -> StandInProvider:
    """A provider that no one has asked anything yet."""
    return StandInProvider()


@pytest.fixture
def url(provider: StandInProvider) -> Iterator[str]:
    """Where it listens."""
    with provider.serve() as root:
        yield root
