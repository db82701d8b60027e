"""The review page: one file that needs no network, and in which no text of a record is ever markup or script.

Texts are escaped and shown as plain text. Only the page's own script may run: the content security policy names its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence

from megatron_r1.curation.forms import Answer
from megatron_r1.curation.records import Conversation

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem 4rem; color: #1b1b1b; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #bbb; padding: .6rem 0; }
header h1 { font-size: 1.2rem; margin: 0 0 .3rem; }
article { border: 1px solid #bbb; border-left-width: 6px; border-radius: 4px; padding: .8rem 1rem; margin: 1rem 0; }
article[data-decision=accept] { border-left-color: #2a7d3f; }
article[data-decision=reject] { border-left-color: #b3362c; }
article[data-decision=edit] { border-left-color: #2f5fb3; }
.about { color: #555; font-size: .85rem; }
h2 { font-size: .9rem; margin: .8rem 0 .2rem; color: #555; font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
textarea { box-sizing: border-box; width: 100%; font: inherit; }
button { font: inherit; padding: .2rem .8rem; margin-right: .4rem; }
button[aria-pressed=true] { background: #1b1b1b; color: #fff; }
"""

_SCRIPT = """
const articles = [...document.querySelectorAll("article")];
const key = "review " + document.body.dataset.key;
const kept = JSON.parse(localStorage.getItem(key) || "{}");
const decisionOf = article => {
  const line = {id: article.dataset.id, decision: article.dataset.decision};
  if (line.decision === "edit")
    for (const field of article.querySelectorAll("textarea")) line[field.name] = field.value;
  return line;
};
const save = () => {
  const decided = articles.filter(article => article.dataset.decision).map(decisionOf);
  localStorage.setItem(key, JSON.stringify(Object.fromEntries(decided.map(line => [line.id, line]))));
  document.getElementById("count").textContent = decided.length + " of " + articles.length + " decided";
  return decided;
};
const decide = (article, decision) => {
  article.dataset.decision = decision;
  for (const button of article.querySelectorAll("button")) button.setAttribute("aria-pressed", button.value === decision);
  for (const part of article.querySelectorAll(".editor")) part.hidden = decision !== "edit";
  for (const part of article.querySelectorAll(".shown")) part.hidden = decision === "edit";
};
for (const article of articles) {
  const known = kept[article.dataset.id];
  if (known) {
    for (const field of article.querySelectorAll("textarea")) if (known[field.name] !== undefined) field.value = known[field.name];
    decide(article, known.decision);
  }
  for (const button of article.querySelectorAll("button"))
    button.addEventListener("click", () => { decide(article, button.value); save(); });
  article.addEventListener("input", save);
}
document.getElementById("download").addEventListener("click", () => {
  const lines = save().map(line => JSON.stringify(line) + "\\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines], {type: "application/jsonl"}));
  link.download = "decisions.jsonl";
  link.click();
});
save();
"""


def render_page(conversations: Sequence[Conversation], answers: Sequence[Answer], title: str) -> str:
    """The page.

    Args:
        answers: of each conversation, in its parts.
    """
    articles = "\n".join(_render_article(*item) for item in zip(conversations, answers, strict=True))
    # A browser keeps the decisions under this key: pages of other records must not find them.
    key = hashlib.sha256("\0".join(conversation.id + conversation.text for conversation in conversations).encode()).hexdigest()[:16]
    policy = (
        f"default-src 'none'; style-src '{_hash_of(_STYLE)}'; script-src '{_hash_of(_SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body data-key="{key}">
<header>
<h1>{html.escape(title)}</h1>
<button id="download" type="button">Save decisions.jsonl</button> <span id="count"></span>
</header>
<main>
{articles}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _render_article(conversation: Conversation, answer: Answer) -> str:
    about = " · ".join(filter(None, [conversation.id, conversation.domain, conversation.language, conversation.source]))
    buttons = "".join(
        f'<button type="button" value="{value}" aria-pressed="false">{label}</button>'
        for value, label in (("accept", "Accept"), ("reject", "Reject"), ("edit", "Edit"))
    )
    return f"""<article data-id="{html.escape(conversation.id)}">
<p class="about">{html.escape(about)}</p>
<h2>Question</h2>
<div class="text">{html.escape(conversation.prompt)}</div>
{_render_part("reasoning", "Reasoning", answer.reasoning or "")}
{_render_part("summary", "Summary", answer.summary)}
<p>{buttons}</p>
</article>"""


def _render_part(name: str, label: str, text: str) -> str:
    escaped = html.escape(text)
    rows = min(30, max(4, len(text) // 100 + text.count("\n") + 1))
    # The line break after <textarea> is not part of its value; without it, one that begins the text would be lost.
    return f"""<h2>{label}</h2>
<div class="text shown">{escaped}</div>
<div class="editor" hidden><textarea name="{name}" rows="{rows}" aria-label="{label}">
{escaped}</textarea></div>"""


def _hash_of(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
