"""What the recipe samples its data with."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

from megatron_r1.config.load import load_config
from megatron_r1.pipeline.recipe import data


def test_engines_are_opened_for_the_responses_of_rejection_sampling(monkeypatch, tmp_path):
    """Longer ones than `rollout.max_response_tokens` would be refused at the first prompt, after the stages before were trained."""
    opened = []

    @contextmanager
    def open_engine(config, log):
        opened.append(config.rollout.max_response_tokens)
        yield

    for name in ("build_architecture", "build_tokenizer", "load_problems", "accuracy_scorers"):
        monkeypatch.setattr(data, name, lambda *_: None)
    monkeypatch.setattr(data, "PromptWriter", lambda *_: SimpleNamespace(write_fitting=lambda _: [], opening=""))
    monkeypatch.setattr(data, "_open_check", lambda *_: nullcontext())
    monkeypatch.setattr(data, "sample_and_keep", lambda *_, **__: SimpleNamespace())
    config = load_config(None, ["rollout.max_response_tokens=100", "curation.rejection.max_tokens=500"])
    data._sample_stage(config, "fingerprint", open_engine, [], tmp_path / "samples", config)
    assert opened == [500]
