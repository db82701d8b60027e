"""The client of served models: its errors say which settings are meant, whoever asks."""

from __future__ import annotations

import pytest

from megatron_r1.chat_endpoint import ChatEndpoint, NoCompletion, read_api_key
from megatron_r1.errors import ConfigError, RewardError
from tests.chat_server import ChatServer, Reply, completion

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "Hello?"}], "seed": 5}
SECTION = "curation.writer"


def endpoint(server: ChatServer, retries: int = 2) -> ChatEndpoint:
    return ChatEndpoint(server.url, None, 10.0, retries, SECTION, pause=lambda seconds: None)


def reject(text: str) -> str:
    raise ValueError("it is no number")


def test_an_answer_that_cannot_be_used_names_the_section_and_is_asked_for_again_with_other_seeds():
    with ChatServer(lambda *_: "four") as server:
        client = endpoint(server)
        with pytest.raises(NoCompletion) as caught:
            client.complete(REQUEST, reject)
        client.close()
    assert str(caught.value) == "the answer of the endpoint of curation.writer cannot be used: it is no number (3 attempts)"
    assert caught.value.outcome == "error"
    assert [request["seed"] for request in server.requests] == [5, 6, 7]


def test_a_refusal_names_the_settings_to_check_and_is_not_repeated():
    with ChatServer(lambda *_: Reply(401, b"")) as server:
        client = endpoint(server)
        with pytest.raises(RewardError, match=r"refuses \(HTTP 401\): check curation\.writer\.url, model and api_key_file"):
            client.sample(REQUEST)
        client.close()
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [404, 502, 503])
def test_a_router_that_loses_its_server_once_is_asked_again(status):
    with ChatServer(lambda _, number: Reply(status, b"") if number == 0 else "four") as server:
        client = endpoint(server)
        assert client.sample(REQUEST).text == "four" and client.counts[f"http_{status}"] == 1
        client.close()
    assert len(server.requests) == 2


@pytest.mark.parametrize(("status", "requests"), [(404, 3), (401, 1), (403, 1), (405, 1)])
def test_a_path_that_is_never_found_is_a_refusal(status, requests):
    with ChatServer(lambda *_: Reply(status, b"")) as server:
        client = endpoint(server)
        with pytest.raises(RewardError, match=rf"refuses \(HTTP {status}\)"):
            client.sample(REQUEST)
        client.close()
    assert len(server.requests) == requests


def test_a_cut_answer_is_a_sample_and_no_complete_answer():
    with ChatServer(lambda *_: completion("one, two", "length")) as server:
        client = endpoint(server, retries=0)
        sampled = client.sample(REQUEST)
        assert (sampled.text, sampled.finished, sampled.tokens) == ("one, two", False, 10)
        with pytest.raises(NoCompletion, match="finish_reason is 'length'"):
            client.complete(REQUEST, str.strip)
        client.close()


def test_a_key_that_cannot_be_read_names_its_setting(tmp_path):
    assert read_api_key(None, "x") is None
    (tmp_path / "key").write_text("secret\n")
    assert read_api_key(str(tmp_path / "key"), "x") == "secret"
    with pytest.raises(ConfigError, match=r"^reward\.judge\.api_key_file .*none cannot be read"):
        read_api_key(str(tmp_path / "none"), "reward.judge.api_key_file")
