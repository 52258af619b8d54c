"""Headers of a reply that ask to wait before the next request."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def wait_asked(headers: Mapping[str, str], limited: bool) -> float | None:
    """Seconds that a reply asks to wait before the next request, None where it says nothing.

    ``Retry-After`` (in seconds or as a date) and ``retry-after-ms`` come first. Else, of ``x-ratelimit-reset-requests``
    and ``-tokens``, those count whose ``remaining`` is 0; on a reply that met a limit without saying which, all do.

    Args:
        headers: of the reply, keys in lower case.
        limited: the reply is a 429.
    """
    asked = _number(headers.get("retry-after-ms"), 0.001)
    asked = _retry_after(headers.get("retry-after")) if asked is None else asked
    if asked is not None:
        return max(asked, 0.0)
    resets: list[tuple[float, bool]] = []
    for suffix in ("-requests", "-tokens", ""):
        reset = _duration(headers.get(f"x-ratelimit-reset{suffix}"))
        if reset is not None:
            remaining = _number(headers.get(f"x-ratelimit-remaining{suffix}"), 1)
            resets.append((reset, remaining is not None and remaining <= 0))
    waits = [reset for reset, empty in resets if empty] or [reset for reset, _ in resets if limited]
    return max(waits, default=None)


def _number(text: str | None, unit: float) -> float | None:
    return float(text) * unit if text and re.fullmatch(r"\s*\d+(\.\d+)?\s*", text) else None


def _retry_after(text: str | None) -> float | None:
    seconds = _number(text, 1)
    if seconds is not None or not text:
        return seconds
    try:
        return email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None


def _duration(text: str | None) -> float | None:
    """``6m0s``, ``20ms``, plain seconds, or a point in time in seconds since 1970."""
    number = _number(text, 1)
    if number is not None:
        return number if number < 1e9 else max(number - time.time(), 0.0)  # 31 years to wait, or a day in 2001
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", text or "")
    if not parts or "".join(a + b for a, b in parts) != (text or "").strip():
        return None
    return sum(float(count) * _UNITS[unit] for count, unit in parts)
