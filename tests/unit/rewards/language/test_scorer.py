"""The language-consistency reward: which words count, and real sentences of eight languages."""

from __future__ import annotations

import time
import unicodedata

import pytest

from megatron_r1.rewards.language.scorer import LANGUAGES, LanguageScorer, count_words
from megatron_r1.rewards.language.text import prose_of, reasoning_of
from tests.public_data import public_file

TEXTS = {
    "en": "First we add the two numbers, then we divide the sum by three because there are three people.",
    "de": "Zuerst addieren wir die beiden Zahlen und teilen dann die Summe durch drei, weil es drei Leute sind.",
    "fr": "D'abord on additionne les deux nombres, puis on divise la somme par trois parce qu'il y a trois personnes.",
    "es": "Primero sumamos los dos números y después dividimos la suma entre tres porque hay tres personas.",
    "ru": "Сначала сложим два числа, потом разделим сумму на три, потому что людей трое.",
    "zh": "首先我们把两个数加起来，然后把总和除以三，因为一共有三个人。",
    "ja": "まず二つの数を足し、それから合計を三で割ります。人が三人いるからです。",
    "ko": "먼저 두 수를 더한 다음 사람이 세 명이므로 합을 셋으로 나눕니다.",
}


def share(response: str, language: str) -> float:
    return LanguageScorer().score(response, language).score


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_is_in_its_own_language_and_in_no_other(language):
    shares = {other: share(f"<think>\n{TEXTS[language]}\n</think>\n\nok", other) for other in LANGUAGES}
    assert shares == {other: float(other == language) for other in LANGUAGES}


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("我们学习数学", {"zh": 3}),  # one run of letters, three words
        ("東京都に住んでいます", {"ja": 7}),
        ("我们用 the method here 解决问题", {"zh": 3, "en": 3}),
        ("前 총장은 학교에 갔다", {"ko": 4}),
        ("Привіт друже", {"other": 1, "ru": 1}),
        ("Καλημέρα", {"other": 8}),
        ("私の名前は田中です。東京。", {"ja": 7}),
        ("我的名字。们", {"zh": 4}),
        ("", {}),
        ("x = 5, y_1 = 7, sin x, CEO, getName, v2", {}),
        ("l'observateur doit vérifier l\u2019enchaînement", {"fr": 4}),
    ],
)
def test_words_are_counted(text, counts):
    assert dict(count_words(text)) == counts


def test_code_numbers_formulas_and_markup_are_set_aside():
    plain = "Wir rechnen das nun aus und schreiben das Ergebnis auf."
    aside = [
        "```python\nfor word in the_list: print('this is english')\n```",
        "`for the value of x in this list`",
        "$\\text{the area of the circle}$",
        "$$\\text{the area of\n the circle}$$",
        "\\[ \\text{where the sum is} \\]",
        "\\(the\\)",
        "\\begin{align} the \\end{align}",
        "12,345.67 %",
        "<b class='the'>",
        "https://www.example.org/the/answer/is/here",
        "\\frac \\quad",
    ]
    for text in aside:
        assert count_words(f"{plain} {text} {plain}") == {"de": 20}, text


def test_money_is_no_formula():
    assert "cost three" in prose_of("It is $5 and the others cost three and $7.")
    assert "area" not in prose_of("$5 + area$ is")


@pytest.mark.parametrize(
    ("response", "reasoning"),
    [
        ("<think>a</think>b", "a"),
        ("a</think>b", "a"),
        ("a", "a"),
        ("<think>a", "a"),
        ("x<think>a</think>b<think>c</think>", "a"),
    ],
)
def test_the_reasoning_is_what_stands_between_the_tags(response, reasoning):
    assert reasoning_of(response) == reasoning


def test_the_summary_does_not_count():
    assert share(f"<think>{TEXTS['de']}</think>{TEXTS['en']}", "de") == 1.0


def test_a_mixed_reasoning_scores_its_share():
    mixed = f"{TEXTS['en']} {TEXTS['zh']} {TEXTS['en']} {TEXTS['de']}"
    words = count_words(mixed)
    alone = {language: count_words(TEXTS[language])[language] for language in ("en", "zh", "de")}
    assert words == {"en": 2 * alone["en"], "zh": alone["zh"], "de": alone["de"]}
    assert share(mixed, "en") == words["en"] / words.total()


def test_a_foreign_phrase_is_found_within_a_sentence():
    words = count_words("Dann teilen wir die Summe, because there are three people here, und erhalten das richtige Ergebnis.")
    assert 5 <= words["en"] <= 7 and words["de"] + words["en"] == 16


@pytest.mark.parametrize("text", ["", "5 + 7 = 12", "$x$", "zvwqk kjhpz wrtzpq", "..."])
def test_without_words_there_is_nothing_to_reward(text):
    for language in LANGUAGES:
        verdict = LanguageScorer().score(f"<think>{text}</think>", language)
        assert verdict.outcome == "wrong" and verdict.score == 0.0


@pytest.mark.parametrize("language", [None, "", "tlh", 5, "english"])
def test_an_unknown_target_cannot_be_scored(language):
    assert LanguageScorer().score("<think>a</think>", language).outcome == "unscorable"


@pytest.mark.parametrize(
    "run",
    ["的", "数学学习", "あ漢", "e\u0301", "e\u0301\u0327", "\u0301", "가", "a'", "$a", "<a", "`", "\\begin{", "α", "Ab "],
)
def test_a_run_without_end_costs_no_more_than_its_length(run):
    LanguageScorer().score(TEXTS["zh"] + TEXTS["ja"] + TEXTS["en"], "zh")  # loads what is loaded once
    start = time.process_time()
    LanguageScorer().score(run * (100_000 // len(run)), "zh")
    assert time.process_time() - start < 4.0


def test_accents_apart_are_accents():
    assert count_words(unicodedata.normalize("NFD", TEXTS["fr"])) == count_words(TEXTS["fr"])


def test_a_target_may_carry_its_region():
    assert share(TEXTS["zh"], "zh-CN") == share(TEXTS["en"], "en_US") == 1.0


@pytest.mark.parametrize("language", LANGUAGES)
def test_real_sentences_are_told_apart(language):
    path = public_file(f"language/{language}.txt")
    sentences = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    right = 0
    for sentence in sentences:
        words = count_words(sentence)
        shares = {name: words[name] / max(1, words.total()) for name in LANGUAGES}
        own = shares.pop(language)
        right += own > 0.9 and max(shares.values()) < 0.1
    assert right >= 0.97 * len(sentences)
