"""What every group of settings is, and how a field says that its value may change when a run goes on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

MOST_SEED = 2**62  #: generators take 64 bits, and some draws have seeds that are a little larger
MAY_CHANGE: JsonDict = {"may_change_on_resume": True}  #: as `json_schema_extra` of a field that does not change the run's result


class Section(BaseModel):
    """A frozen group of settings that knows no extra keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def may_change(field: FieldInfo) -> bool:
    """Whether a run that goes on may have another value of this setting than it began with."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("may_change_on_resume"))
