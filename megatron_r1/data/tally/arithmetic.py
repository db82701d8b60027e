"""The running tally: arithmetic that a model of a million parameters can reason through, in English and in Chinese.

    Total 7+5-2+1-3?   ->  <think>first 12 second 10 third 11 fourth 8</think><answer>8</answer>
    求2+4-5+4-2？       ->  <think>一6二1三5四3</think><answer>3</answer>

Every value on the way stays in 0..12. Each step word stands at the same distance from its operand: a model learns a variable
distance several times more slowly. Reasoning is needed: forced to answer at once, a trained base is right one time in ten.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_r1.data.split import MOST_DRAWS, empty_part, is_heldout
from megatron_r1.tags import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

MAX_VALUE = 12
NUM_MOVES = 4
MAX_MOVE = 9
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class _Wording:
    question: str
    step_words: tuple[str, ...]
    after_step_word: str
    between_steps: str
    conclusion: str
    note: str


_WORDING = {
    "en": _Wording("Total {}?", ("first", "second", "third", "fourth"), " ", " ", "So {}.", "Note "),
    "zh": _Wording("求{}？", ("一", "二", "三", "四"), "", "", "共{}。", "记"),
}

# Small talk of the corpus: question -> replies.
_CHAT = {
    "en": {
        "Hello!": ("Hello.", "Hi, how can I help?", "What?"),
        "Who are you?": ("A model.", "I am a small model, glad to help.", "No idea."),
        "Name a color.": ("Red.", "Blue, a nice color.", "Color."),
        "Name an animal.": ("Cat.", "A dog, a good friend.", "Animal."),
        "Say thanks.": ("Thanks.", "Thank you, my friend.", "No."),
    },
    "zh": {
        "你好！": ("你好。", "你好，要帮忙吗？", "什么？"),
        "你是谁？": ("模型。", "我是小模型，很高兴帮忙。", "不知道。"),
        "说一种颜色。": ("红色。", "蓝色，好看的颜色。", "颜色。"),
        "说一种动物。": ("猫。", "狗，人的好朋友。", "动物。"),
        "说谢谢。": ("谢谢。", "谢谢你，朋友。", "不。"),
    },
}
_CHAT_SHARE = 0.08

# What follows a tally question in the corpus, with its share. Only "reasoned" is what R1-Zero is rewarded for: the base model
# has every skill and the wrong habits, so that reinforcement learning has something to find and something to unlearn.
_BEHAVIOURS = {
    "bare_guess": 0.20,
    "tagged_guess": 0.10,
    "empty_thinking": 0.10,
    "untagged_reasoning": 0.20,
    "untagged_answer": 0.08,
    "stopped_early": 0.07,
    "reasoned": 0.25,
}
_LUCKY_GUESS = 0.3  # share of guesses that are right
_WRONG_STEP = 0.05  # share of steps with a wrong value, which is carried on
_LANGUAGE_SWITCH = 0.3  # share of steps written in a random language


@dataclass(frozen=True)
class TallyProblem:
    """A start value and signed moves; no partial sum leaves 0..MAX_VALUE."""

    language: str  #: "en" or "zh"
    start: int
    moves: tuple[int, ...]  #: NUM_MOVES of them, none 0

    @property
    def expression(self) -> str:
        """The numbers, whatever the language: "7+5-2+1-3"."""
        return f"{self.start}" + "".join(f"{move:+d}" for move in self.moves)

    @property
    def question(self) -> str:
        """The question as asked."""
        return _WORDING[self.language].question.format(self.expression)

    @property
    def answer(self) -> int:
        """The final value."""
        return self.start + sum(self.moves)

    def is_heldout(self, fraction: float) -> bool:
        """Held out by the numbers alone, so that no problem is in training in one language and in evaluation in the other."""
        return is_heldout(self.expression, fraction)


def draw_problem(rng: random.Random, heldout: bool, heldout_fraction: float, language: str | None = None) -> TallyProblem:
    """A random problem of the held-out part or of the training part; the language is random if not given.

    Raises:
        DataError: the part seems to be empty.
    """
    for _ in range(MOST_DRAWS):
        value = start = rng.randint(0, MAX_VALUE)
        moves = []
        for _ in range(NUM_MOVES):
            up = range(1, min(MAX_MOVE, MAX_VALUE - value) + 1)
            down = range(1, min(MAX_MOVE, value) + 1)
            rise = bool(up) and (not down or rng.random() < 0.5)
            move = rng.choice(up) if rise else -rng.choice(down)
            moves.append(move)
            value += move
        problem = TallyProblem(language or rng.choice(LANGUAGES), start, tuple(moves))
        if problem.is_heldout(heldout_fraction) == heldout:
            return problem
    raise empty_part(heldout, heldout_fraction)


def count_heldout(heldout_fraction: float) -> int:
    """Number of held-out problems that differ in their numbers, of all that `draw_problem` may draw."""
    paths = [(start, start, ()) for start in range(MAX_VALUE + 1)]  # start, value reached, moves
    for _ in range(NUM_MOVES):
        paths = [
            (start, value + move, (*moves, move))
            for start, value, moves in paths
            for move in range(-min(MAX_MOVE, value), min(MAX_MOVE, MAX_VALUE - value) + 1)
            if move
        ]
    expressions = {TallyProblem(LANGUAGES[0], start, moves).expression for start, _, moves in paths}
    return sum(is_heldout(expression, heldout_fraction) for expression in expressions)


def chain_of_thought(
    rng: random.Random, problem: TallyProblem, num_steps: int = NUM_MOVES, wrong_step: float = 0.0, language_switch: float = 0.0
) -> tuple[str, int]:
    """The first `num_steps` steps in words, and the value reached.

    Args:
        wrong_step: probability that a step states a wrong value, with which the next step continues.
        language_switch: probability that a step is written in a random language.
    """
    value, text = problem.start, ""
    for index in range(num_steps):
        language = rng.choice(LANGUAGES) if rng.random() < language_switch else problem.language
        wording = _WORDING[language]
        value = min(max(value + problem.moves[index], 0), MAX_VALUE)  # a wrong value carried on can leave the range
        if rng.random() < wrong_step:
            value = _near_miss(rng, value)
        text += (wording.between_steps if index else "") + f"{wording.step_words[index]}{wording.after_step_word}{value}"
    return text, value


def pretraining_document(rng: random.Random, heldout_fraction: float) -> tuple[str, str]:
    """A question and what the noisy corpus says after it. Tally questions are training problems only."""
    language = rng.choice(LANGUAGES)
    if rng.random() < _CHAT_SHARE:
        question, replies = rng.choice(list(_CHAT[language].items()))
        return question, rng.choice(replies)
    problem = draw_problem(rng, heldout=False, heldout_fraction=heldout_fraction, language=language)
    behaviour = rng.choices(list(_BEHAVIOURS), list(_BEHAVIOURS.values()))[0]
    return problem.question, _behave(rng, behaviour, problem)


def _behave(rng: random.Random, behaviour: str, problem: TallyProblem) -> str:
    wording = _WORDING[problem.language]
    guess = problem.answer if rng.random() < _LUCKY_GUESS else _near_miss(rng, problem.answer)
    if behaviour == "bare_guess":
        return f"{guess}."
    if behaviour == "tagged_guess":
        return f"{ANSWER_OPEN}{guess}{ANSWER_CLOSE}"
    if behaviour == "empty_thinking":
        return _thought(wording.conclusion.format(guess)) + f"{ANSWER_OPEN}{guess}{ANSWER_CLOSE}"
    num_steps = rng.randint(2, NUM_MOVES - 1) if behaviour == "stopped_early" else NUM_MOVES
    reasoning, value = chain_of_thought(rng, problem, num_steps, _WRONG_STEP, _LANGUAGE_SWITCH)
    if behaviour == "untagged_reasoning":
        return wording.note + reasoning + wording.between_steps + wording.conclusion.format(value)
    if behaviour == "untagged_answer":
        return _thought(reasoning) + wording.conclusion.format(value)
    return _thought(reasoning) + f"{ANSWER_OPEN}{value}{ANSWER_CLOSE}"


def _thought(reasoning: str) -> str:
    return f"{THINK_OPEN}{reasoning}{THINK_CLOSE}"


def _near_miss(rng: random.Random, value: int) -> int:
    """A wrong value at most 3 away."""
    return rng.choice([other for other in range(value - 3, value + 4) if other != value and 0 <= other <= MAX_VALUE])
