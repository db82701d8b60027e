"""Chat templates that do not end, from somebody's tokenizer: one line, soon."""

from __future__ import annotations

import signal
import time

import pytest

from megatron_r1.data.chat import tokenizer_template
from megatron_r1.data.chat.cut_off import TookTooLong, cut_off
from megatron_r1.data.chat.load import load_chat_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import ConfigError, DataError

ASKED = [Message("user", "Hi there.")]
TRAPS = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "a loop over a long text": "{% set s = 'x' * 30000 %}{% for a in s %}{% for b in s %}{% for c in s %}" + "{% endfor %}" * 3,
    "a huge range": "{% for i in range(10000000000) %}x{% endfor %}",
    "itself for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for m in [[1]] recursive %}{{ loop([m]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "long words": "{{ lipsum(n=99999, min=1000, max=100000) }}",
    "of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Hi there. Tell me a joke."] * 3, 300)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_template_that_does_not_end_is_cut_off(monkeypatch, tokenizer, trap):
    monkeypatch.setattr(tokenizer_template, "_LONGEST_SECONDS", 0.3)
    started = time.process_time()
    with pytest.raises((ConfigError, DataError), match="chat_template") as caught:
        load_chat_template("tokenizer", tokenizer.with_chat_template(TRAPS[trap])).encode_prompt(ASKED)
    assert "\n" not in str(caught.value) and time.process_time() - started < 5


@pytest.mark.parametrize(
    "power", ["{{ 9**9**9 }}", "{% if messages|length ** 99 %}{% endif %}", "x\n{{ (2) ** 3 }}", "{{ 'a' ** 2 }}"]
)
def test_powers_are_refused(tokenizer, power):
    with pytest.raises(ConfigError, match="line . of the tokenizer's chat_template computes a power"):
        load_chat_template("tokenizer", tokenizer.with_chat_template(power))


def test_neighbours_are_rendered(tokenizer):
    for text in (
        "{% for m in messages %}{{ m.content }}{% endfor %}** bold **",
        "{% set n = namespace(**{'a': 1}) %}{{ dict(b=2, **{'c': 3}).c }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for i in range(5000) %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}{# a ** b #}{{ '**' }}",
    ):
        assert load_chat_template("tokenizer", tokenizer.with_chat_template(text)).encode_prompt(ASKED)


def test_the_timer_is_put_back():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TookTooLong), cut_off(0.05):
        while True:
            pass
    with cut_off(5):
        pass
    assert signal.getsignal(signal.SIGVTALRM) is before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
