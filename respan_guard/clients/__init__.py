"""The client door: LLM clients guarded call by call, before each call is paid for.

`Guard.wrap`, `Guard.transport` and `Guard.async_transport` lead here. The door is an HTTP transport around the
client's own. OpenAI's and Anthropic's clients stand on httpx2, their previous majors on httpx; the two are alike,
so one implementation takes its base classes from whichever the client uses and imports neither by itself.
"""

from __future__ import annotations

from respan_guard.clients.wrap import make_transport, wrap

__all__ = ["make_transport", "wrap"]
