"""The language-consistency reward: which words count, and real sentences of eight languages."""

from __future__ import annotations

import time
import unicodedata

import pytest

from megatron_r1.rewards.language.scorer import LANGUAGES, LanguageScorer, count_words
from megatron_r1.rewards.language.text import reasoning_of, set_aside
from tests.public_data import public_file
from tests.unit.rewards.language.hiding_places import LATIN_PLACES, PLACES

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
        ("Привіт друже", {"other": 2}),
        ("Καλημέρα και α = 5", {"other": 2}),
        ("私の名前は田中です。東京。", {"ja": 7}),
        ("我的名字。们", {"zh": 4}),
        ("", {}),
        ("x = 5, y_1 = 7, sin x, CEO, getName, v2", {}),
        ("l'observateur doit vérifier l\u2019enchaînement", {"fr": 4}),
    ],
)
def test_words_are_counted(text, counts):
    assert dict(count_words(text)) == counts


ASIDE = [
    "```python\nfor word in the_list: print('this is english')\n```",
    "```python\nnum_epochs, lr, batch_size = 10, 0.5, 256\ntrain_iter, test_iter = load_data(batch_size)\n```",
    "~~~cpp\nstatic const unsigned long int best = max_sum(values.begin(), values.end());\n~~~",
    "`max_sum`",
    "$AB \\parallel CD$, $\\angle ABC = 30^\\circ$",
    "$x = 5 \\text{ and } y = 7$",
    "\\[ 3 \\text{ apples} + 4 \\text{ pears} = 7 \\]",
    "\\(the\\)",
    "\\begin{align} the \\end{align}",
    "12,345.67 %",
    "<b class='the'>",
    "https://www.example.org/questions/12345/fast-sum",
    "\\frac \\quad",
    "AB, BC, CD, DA, AC, BD",
    "x y z",
    "FileNotFoundError",
    "isNotInTheList",
    "\u03b1 + \u03b2 = \u03b3, sin\u03b1, 2\u03c0r",
]


@pytest.mark.parametrize("text", ASIDE)
def test_code_numbers_formulas_and_markup_are_set_aside(text):
    plain = "Wir rechnen das nun aus und schreiben das Ergebnis auf."
    assert count_words(f"{plain} {text} {plain}") == {"de": 20}
    assert share(f"{plain} {text} {plain}", "de") == 1.0


def test_money_is_no_formula():
    assert "cost three" in set_aside("It is $5 and the others cost three and $7.")[0]
    assert "area" not in set_aside("$5 + area$ is")[0]


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
    [
        "的",
        "数学学习",
        "あ漢",
        "e\u0301",
        "e\u0301\u0327",
        "\u0301",
        "가",
        "a'",
        "$a",
        "<a",
        "`",
        "\\begin{",
        "α",
        "Ab ",
        "aα",
        "aа",
        "αa",
        "a_",
        "A ",
        "a ",
        "a.",
        "\\a ",
        "<a>",
        "~~~a",
        "`a`",
        "αa ",
        "FEW ",
    ],
)
def test_a_run_without_end_costs_no_more_than_its_length(run):
    LanguageScorer().score(TEXTS["zh"] + TEXTS["ja"] + TEXTS["en"], "zh")  # loads what is loaded once
    start = time.process_time()
    LanguageScorer().score(run * (100_000 // len(run)), "zh")
    assert time.process_time() - start < 4.0


HIDDEN = {
    "en": "First we add seven and five to get twelve, then we subtract two and the result is ten. So the answer is ten. Let me "
    "check this again. There are three people in the room and each of them has a book, which makes three books for all of them.",
    "de": "Zuerst addieren wir sieben und fünf und erhalten zwölf, dann ziehen wir zwei ab und das Ergebnis ist zehn. Ich prüfe "
    "das noch einmal. In dem Raum sind drei Leute und jeder von ihnen hat ein Buch, also sind es zusammen drei Bücher für alle.",
    "ru": "Сначала сложим семь и пять и получим двенадцать, потом вычтем два и получим десять. Проверим это ещё раз. В комнате три "
    "человека и у каждого из них есть книга, поэтому всего у них три книги.",
    "zh": "首先我们把七和五加起来得到十二，然后减去二，结果是十。我们再检查一遍。"
    "房间里有三个人，每个人都有一本书，所以一共有三本书。",
}


ENGLISH_PLACES = [(place, "en") for place in LATIN_PLACES]


@pytest.mark.parametrize(("place", "hidden"), [(place, language) for place in PLACES for language in HIDDEN] + ENGLISH_PLACES)
def test_no_place_hides_words_of_another_language(place, hidden):
    text = (PLACES | LATIN_PLACES)[place](HIDDEN[hidden])
    for language in set(LANGUAGES) - {hidden}:
        sentence = TEXTS[language].partition(",")[0].partition("、")[0].partition("，")[0]
        verdict = LanguageScorer().score(f"<think>{text}\n{sentence}.</think><answer>8</answer>", language)
        assert verdict.score <= 0.5, (language, verdict, text)


@pytest.mark.parametrize("place", ["fence", "\\text", "backticks", "tags", "quotes", "list", "table"])
def test_words_of_the_target_language_may_stand_anywhere(place):
    for language, text in HIDDEN.items():
        assert share(f"{TEXTS[language]}\n{PLACES[place](text)}", language) >= 0.9


FOREIGN = [
    ("ru", "Първо събираме седем и пет и получаваме дванадесет, след това изваждаме две."),  # Bulgarian
    ("ru", "Спочатку додаємо сім і п'ять та отримуємо дванадцять, потім віднімаємо два."),  # Ukrainian
    ("ru", "Спачатку складаем сем і пяць і атрымліваем дванаццаць, потым адымаем два."),  # Belarusian
    ("ru", "Прво саберемо седам и пет и добијемо дванаест, затим одузмемо два."),  # Serbian
    ("ru", "Прво ги собираме седум и пет и добиваме дванаесет, потоа одземаме два."),  # Macedonian
    ("ru", "Эхлээд долоо ба тавыг нэмээд арван хоёр гарна, дараа нь хоёрыг хасна."),  # Mongolian
    ("ru", "Фёрст ви эдд севен энд файв ту гет твелв зен ви сабтракт ту энд зе резалт из тен"),
    ("ja", "ファースト ウィー アド セブン アンド ファイブ トゥ ゲット トゥエルブ ゼン ウィー サブトラクト トゥー"),
    ("ko", "퍼스트 위 애드 세븐 앤드 파이브 투 겟 트웰브 덴 위 서브트랙트 투 앤드 더 리절트 이즈 텐"),
    ("es", "Primer sumem els dos nombres i després dividim la suma entre tres perquè hi ha tres persones."),  # Catalan
    ("es", "Primeiro somamos os dois números e depois dividimos a soma por três porque há três pessoas."),  # Portuguese
    ("fr", "Prima sommiamo i due numeri e poi dividiamo la somma per tre perché ci sono tre persone."),  # Italian
    ("fr", "Mai întâi adunăm cele două numere, apoi împărțim suma la trei pentru că sunt trei oameni."),  # Romanian
    ("de", "Eerst tellen we de twee getallen op en daarna delen we de som door drie omdat er drie mensen zijn."),  # Dutch
    ("de", "Först adderar vi de två talen och sedan delar vi summan med tre eftersom det finns tre personer."),  # Swedish
    ("en", "Først lægger vi de to tal sammen, og så deler vi summen med tre, fordi der er tre personer."),  # Danish
    ("zh", "shouxian women ba qi he wu xiang jia dedao shi er ranhou jian qu er jieguo shi shi suoyi daan shi shi"),
    ("ja", "mazu nana to go o tashite juuni ni narimasu sorekara ni o hiku to kotae wa juu desu mou ichido tashikamemasu"),
    ("ru", "snachala slozhim sem i pyat i poluchim dvenadtsat potom vychtem dva i otvet budet desyat proverim eshcho raz summu"),
]


@pytest.mark.parametrize(("target", "text"), FOREIGN)
def test_a_neighbour_and_a_transcription_are_not_the_language(target, text):
    assert share(text, target) <= 0.3
    for language in LANGUAGES:
        assert share(text, language) <= 0.5


def test_a_repeated_sentence_is_no_reasoning():
    padding = "好的，我们开始。" * 100
    assert share(padding + HIDDEN["en"], "zh") < 0.3
    numbered = "".join(f"这是第{number}步。" for number in range(100))
    assert share(numbered + HIDDEN["en"], "zh") < 0.3
    assert share(HIDDEN["zh"] * 5, "zh") == 1.0  # what is all in one language stays so
    assert share(TEXTS["en"] + TEXTS["de"], "en") == share((TEXTS["en"] + TEXTS["de"]) * 3, "en")


def test_few_words_are_not_enough():
    assert share("<think>好的</think>", "zh") == 2 / 8
    assert share("<think>The sum is twelve</think>", "en") == 0.5
    assert LanguageScorer(min_words=2).score("<think>The sum is twelve</think>", "en").score == 1.0
    assert LanguageScorer(min_words=2).score("<think>一11二12三5四2</think>", "zh").score == 1.0


def test_what_is_set_aside_has_a_limit():
    code = "\n".join(f"value_{name} = compute({name}_total) * rate" for name in ("alpha", "brown", "castle"))
    text = f"{TEXTS['zh']}\n```python\n{code}\n```"
    found = LanguageScorer().score(text, "zh")
    assert found.score == 1.0
    strict = LanguageScorer(aside_words=0.1).score(text, "zh")
    assert strict.score < 0.8 and "in what is set aside" in strict.detail


@pytest.mark.parametrize("settings", [{"min_words": 0}, {"aside_words": -1.0}, {"threshold": 0.0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        LanguageScorer(**settings)


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
