"""What every section of the JSON has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section refuses keys it does not know and is immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
