"""What every group of settings is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings that knows no extra keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
