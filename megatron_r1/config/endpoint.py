"""Settings of a served model: what the judge, the writer of data and the model that is measured have in common."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.section import Section


class EndpointConfig(Section):
    """A served model behind an OpenAI-compatible endpoint such as that of `vllm serve`."""

    url: str | None = Field(None, description="base URL, e.g. http://localhost:8000/v1; needed where a model is asked")
    model: str | None = Field(None, description="name that the endpoint serves it under; needed with url")
    timeout_seconds: float = Field(600.0, gt=0, description="for one request")
    retries: int = Field(4, ge=0, description="further requests after one that failed")
    concurrency: int = Field(16, gt=0, description="requests at a time")
    api_key_file: str | None = Field(None, description="file with the endpoint's key; null: none is sent")
