r"""What models are asked for cold-start data.

The recipe prints two of these texts: Listing 1, which asks for a summary, and one sentence that asks for a translation (R1 v2
B.3.2). It names, without their words, few-shot prompting with a long chain of thought as an example, and prompting directly for
reflection and verification (R1 v1 (arXiv) section 2.3.1); those are ours, and so is the text that asks for a conversational
rewrite.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_r1.curation.ask_model import Messages
from megatron_r1.curation.records import Conversation
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

#: R1 v2 Listing 1, verbatim.
SUMMARY_PROMPT = """## Question
{question}

## Thought process
{thought_process}

---
Based on the above thought process, provide a clear, easy-to-follow, and well-formatted solution to the question. Use the \
same language as the question.

The solution must strictly follow these requirements:
- Stay faithful and consistent with the given thought process. Do not add new reasoning steps or conclusions not shown in \
the original.
- Show key steps leading to final answer(s) in clear, well-formatted LaTeX.
- Use \\boxed{} for final answer(s).
- Be clean and concise. Avoid colloquial language. Do not use phrases like "thought process" in the solution.

Your response should start with the solution right away, and do not include anything else. Your task is solely to write the \
solution based on the provided thought process. Do not try to solve the question yourself."""

_GIVEN = """## Question
{question}

## Thought process
{thought_process}

---
"""

#: R1 v2 B.3.2, verbatim; the frame around it is that of Listing 1, since the recipe does not print one.
TRANSLATION = "Translate the thinking process to the same language as the question."

TRANSLATION_PROMPT = _GIVEN + TRANSLATION

REWRITE_PROMPT = (
    _GIVEN
    + """Rewrite the thought process as somebody who thinks aloud about the question. Use the same language as the question.

- Write in the first person ("I", "let me"), and begin by making sure that you understand what is asked.
- Keep every step, every result and every mistake with its correction. Add no new step and no other result.
- Where the original checks or doubts something, keep that; end by checking the result.
- Short paragraphs of plain text. No headings, no lists, no bold type, no tables, no blocks of code.

Write the rewritten thought process alone, nothing before or after it."""
)

DIRECT_PROMPT = f"""Think about the question below before you answer it, and show how you think.

Write your thinking between {THINK_OPEN} and {THINK_CLOSE}: in the first person, in short paragraphs of plain text, in the \
language of the question. Begin by making sure what is asked. Go step by step. When something looks wrong, say so, go back \
and correct it. Before you finish, verify the result in another way.

After {THINK_CLOSE}, write a clear and short solution for a reader who has not seen your thinking, with the final answer in \
\\boxed{{}}.

## Question
{{question}}"""


def _worked_example(reasoning: str, solution: str) -> str:
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{solution}"


#: Worked examples in the form of R1 v2 Listing 3: language -> (question, answer). The texts are ours.
EXAMPLES = {
    "en": (
        "A tank of 30 liters holds 12. It loses 3 liters an hour and gets 5 liters an hour. After how many hours is it full?",
        _worked_example(
            """Let me first make sure I understand the question. The tank starts with 12 liters, and I want \
the time until it has 30.

It loses 3 liters an hour and gets 5 liters an hour. So every hour it gains 5 - 3 = 2 liters.

It is missing 30 - 12 = 18 liters. At 2 liters an hour that takes 18 / 2 = 9 hours.

Wait, I should check that I have not mixed up losing and gaining. After 9 hours 9 * 5 = 45 liters came in and 9 * 3 = 27 \
went out, so there are 12 + 45 - 27 = 30 liters. That is exactly full, so 9 hours is right.""",
            """**Solution:** The tank gains $5 - 3 = 2$ liters an hour and is missing $30 - 12 = 18$ liters. It is full after \
$\\frac{18}{2} = 9$ hours.

\\boxed{9}""",
        ),
    ),
    "zh": (
        "小明有 24 颗糖，他先吃掉四分之一，又把剩下的平均分给 3 个朋友。每个朋友得到几颗糖？",
        _worked_example(
            r"""我先弄清楚题目：小明一共有 24 颗糖，先吃掉四分之一，再把剩下的分给 3 个朋友，问每人几颗。

他吃掉的是 24 ÷ 4 = 6 颗，那么剩下 24 - 6 = 18 颗。

18 颗平均分给 3 个人，每人 18 ÷ 3 = 6 颗。

等一下，我来验证一下：3 个朋友一共拿到 3 × 6 = 18 颗，加上吃掉的 6 颗正好是 24 颗，没有问题。""",
            r"""**解答：** 吃掉 $24 \div 4 = 6$ 颗，剩下 $24 - 6 = 18$ 颗，每个朋友得到 $18 \div 3 = 6$ 颗。

\boxed{6}""",
        ),
    ),
}


def few_shot_messages(question: str, language: str, examples: Sequence[Conversation]) -> Messages:
    """Worked examples as earlier turns, then the question. Examples in the question's language, where there are some, alone."""
    chosen = [example for example in examples if example.language == language] or examples
    shown = [{"role": message.role, "content": message.content} for example in chosen for message in example.messages]
    return [*shown, {"role": "user", "content": question}]


def built_in_examples() -> list[Conversation]:
    """The examples above as conversations."""
    return [
        Conversation.of_turn(f"example-{language}", question, answer, language=language)
        for language, (question, answer) in EXAMPLES.items()
    ]


def direct_messages(question: str) -> Messages:
    """A request for reflection and verification."""
    return _ask(DIRECT_PROMPT, question=question)


def translation_messages(question: str, thought_process: str) -> Messages:
    """A request for the thinking in the question's language."""
    return _ask(TRANSLATION_PROMPT, question=question, thought_process=thought_process)


def rewrite_messages(question: str, thought_process: str) -> Messages:
    """A request for the thinking in conversational first person."""
    return _ask(REWRITE_PROMPT, question=question, thought_process=thought_process)


def summary_messages(question: str, thought_process: str) -> Messages:
    """A request for the solution that follows the thinking."""
    return _ask(SUMMARY_PROMPT, question=question, thought_process=thought_process)


def _ask(prompt: str, **texts: str) -> Messages:
    """Put the texts in, all at once: braces inside them, and those of \\boxed{}, stay as they are."""
    filled = re.sub(r"\{(question|thought_process)\}", lambda found: texts[found[1]], prompt)
    return [{"role": "user", "content": filled}]
