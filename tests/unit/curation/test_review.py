"""Human review: the page holds hostile text as text, and decisions come back by id."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path

import pytest

from megatron_r1.curation.forms import Form
from megatron_r1.curation.records import Conversation
from megatron_r1.curation.review import apply_decisions, export_review, read_decisions
from megatron_r1.errors import DataError

THINK = Form()
HOSTILE = "</textarea></div><script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='alert(3)' &lt;b&gt; \u202e"


def conversation(id: str, reasoning: str = "I think.\n\nIt fits.", summary: str = "Seven.") -> Conversation:
    return Conversation.of_turn(id, "What is it?", f"<think>\n{reasoning}\n</think>\n\n{summary}", language="en", source="zero")


RECORDS = [conversation("a"), conversation("b"), conversation("c")]


class Reader(html.parser.HTMLParser):
    """Collects elements and the text of shown parts and editors."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self._taking = False

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "textarea" or dict(attrs).get("class") == "text shown":
            self.texts.append("")
            self._taking = True

    def handle_endtag(self, tag):
        self._taking = False

    def handle_data(self, data):
        if self._taking:
            self.texts[-1] += data


def test_hostile_text_is_shown_as_text_and_only_the_page_s_own_script_may_run(tmp_path):
    hostile = Conversation.of_turn(HOSTILE, HOSTILE, f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}", domain=HOSTILE, source=HOSTILE)
    page = export_review([hostile], tmp_path, THINK, title=HOSTILE).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == 1 and "img" not in tags and not any("onclick" in attrs for _, attrs in reader.elements)
    assert reader.texts == [HOSTILE, "\n" + HOSTILE, HOSTILE, "\n" + HOSTILE]
    assert [attrs["data-id"] for tag, attrs in reader.elements if tag == "article"] == [HOSTILE]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
    assert json.loads((tmp_path / "review.jsonl").read_text(encoding="utf-8"))["reasoning"] == HOSTILE


def decisions(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_decisions_keep_drop_and_edit(tmp_path):
    edit = {"id": "c", "decision": "edit", "reasoning": "I see it.", "summary": "It is seven."}
    path = decisions(tmp_path / "d.jsonl", {"id": "a", "decision": "accept"}, edit)
    kept, counts = apply_decisions(RECORDS, read_decisions(path, [record.id for record in RECORDS]), THINK)
    assert counts == {"accept": 1, "reject": 0, "edit": 1, "undecided": 1}
    assert kept[0].messages == RECORDS[0].messages and kept[0].fields == {"review": "accept"}
    assert kept[1].turns == [("What is it?", "<think>\nI see it.\n</think>\n\nIt is seven.")] and kept[1].source == "zero"
    rejected = decisions(tmp_path / "e.jsonl", {"id": "a", "decision": "reject"})
    assert apply_decisions(RECORDS[:1], read_decisions(rejected, ["a"]), THINK)[0] == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"id": "x", "decision": "accept"}, "d.jsonl:2: no record with the id 'x'"),
        ({"id": "a", "decision": "reject"}, "d.jsonl:2: 'a' is decided already at .*d.jsonl:1"),
        ({"decision": "accept"}, "d.jsonl:2: field 'id' is missing"),
        ({"id": "b"}, "d.jsonl:2: field 'decision' is missing"),
        ({"id": "b", "decision": "maybe"}, "d.jsonl:2: the decision 'maybe' is unknown; choose one of accept, reject, edit"),
        ({"id": "b", "decision": "edit", "reasoning": "r"}, "d.jsonl:2: field 'summary' is missing"),
        ({"id": "b", "decision": "edit", "reasoning": " ", "summary": "s"}, "d.jsonl:2: field 'reasoning' is blank"),
        ({"id": "b", "decision": "edit", "reasoning": "r </think>", "summary": "s"}, "d.jsonl:2: .* no <think> or </think>"),
        ("{", "d.jsonl:2: bad JSON"),
    ],
)
def test_a_wrong_decision_is_named_with_its_line(tmp_path, line, says):
    path = decisions(tmp_path / "d.jsonl", {"id": "a", "decision": "accept"}, line)
    with pytest.raises(DataError, match=says) as caught:
        read_decisions(path, ["a", "b"])
    assert "\n" not in str(caught.value)


def test_what_cannot_be_reviewed_is_refused(tmp_path):
    for records, says in (
        ([], "nothing to review"),
        ([RECORDS[0]] * 2, "'a' comes twice"),
        ([conversation("z", "x <think> y")], "'z' is not"),
    ):
        with pytest.raises(DataError, match=says):
            export_review(records, tmp_path, THINK)
