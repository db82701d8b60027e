"""Settings of a served model: what the judge, the writer of data and the model to measure have in common."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.section import Section


class EndpointConfig(Section):
    """A served model behind an OpenAI-compatible endpoint such as that of `vllm serve`."""

    url: str | None = Field(
        None, description="Base URL of the endpoint, e.g. http://localhost:8000/v1. It is needed if the model is asked anything."
    )
    model: str | None = Field(
        None, description="Name that the endpoint serves the model under. It is needed together with the URL."
    )
    timeout_seconds: float = Field(600.0, gt=0, description="Seconds that one request may take as a whole.")
    retries: int = Field(4, ge=0, description="Further requests after one that failed or gave no usable answer.")
    concurrency: int = Field(16, gt=0, description="Most requests that are under way at the same time.")
    api_key_file: str | None = Field(None, description="File that holds the endpoint's API key. null: no key is sent.")
