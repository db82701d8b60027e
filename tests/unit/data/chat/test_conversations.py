"""Conversations from every form of record, and what is said of broken ones."""

from __future__ import annotations

import pytest

from megatron_r1.data.chat.conversations import Message, read_conversation
from megatron_r1.data.record_files import read_records
from megatron_r1.errors import DataError
from tests.public_data import public_file

HELLO = [Message("user", "Hello?"), Message("assistant", "Hi!")]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Hi!\n"}]
SHAREGPT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi!"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, [Message("system", "Be kind."), *HELLO]),
        ({"conversations": SHAREGPT}, HELLO),
        ({"prompt": "Hello?", "response": "Hi!"}, HELLO),
        ({"instruction": "Hello?", "input": "", "output": "Hi!"}, HELLO),
        ({"instruction": "Say it", "input": "twice", "output": "Hi!"}, [Message("user", "Say it\ntwice"), HELLO[1]]),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}}, HELLO),
        ({"prompt": "Hello?", "chosen": "Hi!", "rejected": "No."}, HELLO),
        ({"prompt": "Hello?", "chosen": CHAT, "rejected": CHAT}, HELLO),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, HELLO),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi!\n\nHuman: x\ny\n\nAssistant: z", "rejected": ""},
         [*HELLO, Message("user", "x\ny"), Message("assistant", "z")]),
    ],
)  # fmt: skip
def test_each_form_is_told_by_its_fields(record, expected):
    assert read_conversation(record, "x:1") == expected


def test_fields_of_pairs_and_the_form_can_be_named():
    record = {"question": "Hello?", "answer": "Hi!", "messages": []}
    assert read_conversation(record, "x:1", "pair", "question", "answer") == HELLO


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "x:1 message 1: role 'tool' is unknown; choose one of system, user"),
        ({"conversations": [*SHAREGPT, {"from": "function_call", "value": "x"}]}, "message 3: role 'function_call' is unknown"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "x:1 message 2: field 'content' is blank"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "message 2: field 'content' is NoneType, not text"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2: field 'content' is missing"),
        ({"messages": ["Hello?"]}, "message 1: expected an object, found str"),
        ({"messages": "Hello?"}, "expected a list of messages, found str"),
        ({"messages": CHAT[:1]}, "the conversation does not end with the assistant"),
        ({"messages": []}, "the conversation does not end with the assistant"),
        ({"prompt": "Hello?"}, "field 'response' is missing"),
        ({"instruction": "Hello?", "output": ""}, "field 'output' is blank"),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: "}, "x:1 message 2: field 'Assistant' is blank"),
        ({"chosen": "Hi!"}, "field 'chosen' is no dialogue"),
        ({"text": "Hi!"}, "no conversation in the fields 'text'; expected messages"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_on_one_line(record, says):
    with pytest.raises(DataError) as caught:
        read_conversation(record, "x:1")
    assert says in str(caught.value) and str(caught.value).startswith("x:1") and "\n" not in str(caught.value)


def test_published_files_are_read_whole():
    turns = {}
    for name in ("chat/alpaca_en_demo.json", "chat/identity.json", "preference/dpo_en_demo.json", "preference/dpo_zh_demo.json"):
        conversations = [read_conversation(record, where) for where, record in read_records(public_file(name))]
        turns[name] = (len(conversations), max(map(len, conversations)))
    assert list(turns.values()) == [(999, 2), (91, 2), (300, 14), (300, 3)]
    blank = []
    for where, record in read_records(public_file("preference/hh_harmless.jsonl.gz")):
        try:
            read_conversation(record, where)
        except DataError as error:
            blank.append(str(error))
    assert len(blank) == 4 and all("field 'Assistant' is blank" in line for line in blank)
