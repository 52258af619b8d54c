"""Records as a pandas frame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rankalign.data.formats.table_row import flat_rows, plain_prompt
from rankalign.data.records import CandidateSet

if TYPE_CHECKING:
    import pandas as pd

_ALWAYS = ("id", "prompt", "policy", "text", "finished")


def frame(records: Iterable[CandidateSet]) -> pd.DataFrame:
    """Records as a pandas frame: one row a response, one without policy and text for a prompt that has none.

    Args:
        records: such as :func:`rankalign.read` gives.

    Returns:
        Columns ``id``, ``prompt`` (its text; messages as JSON), ``policy``, ``text``, ``finished``, and where any
        response has such: ``count`` (1 where it is not said), ``score:JUDGE``, ``sampling.NAME``, ``tokens``,
        ``response.meta.NAME``, ``meta.NAME``. What a row does not have is missing (NaN or None).
    """
    import pandas as pd

    rows = [{**row, "prompt": plain_prompt(record.prompt)} for record in records for row in flat_rows(record)]
    found = pd.DataFrame.from_records(
        rows, columns=list(dict.fromkeys((*_ALWAYS, *(key for row in rows for key in row))))
    )
    if "count" in found:
        found["count"] = found["count"].fillna(1).astype(int)
    return found
