"""The browser of rollouts in a real browser without a network: no error, filters, tokens, side by side, text that stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_r1.config.load import load_config
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.report.html import write_report
from megatron_r1.runtime.run import Run
from megatron_r1.types import Prompt, Rollout, RolloutGroup, TrainingSample
from tests.headless_browser import Browser, find_browser

BROWSER = find_browser()
HOSTILE = [
    "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'><svg onload=hit()>",
    "<!--<script> &lt;b&gt; &amp; \u202eright to left\u202c \u2066x\u2069 \u200b",
    "\x00 \x07 \x7f \ud800 lone \udc00 \ufffe \u2028 \u2029",
    "\U0001f600\u4e8c" + "w" * 200_000,
    "<base href=//x.invalid><link rel=stylesheet href=//x.invalid/a.css><meta http-equiv=refresh content='0;url=//x.invalid'>",
]


def record(folder: Path, hostile: bool = True) -> None:
    """Two steps of two prompts with five responses each; a right one is finished and has a larger reward."""
    tokenizer = train_tokenizer(["the answer is one two three"] * 3, 300)
    with Run.open(folder, load_config(None, []), "grpo") as run:
        run.record(0, {"reward/mean": 0.0})
        for step in run.steps(2, "grpo"):
            groups, samples = [], []
            for name in ("a", "b"):
                texts = HOSTILE if hostile else ["the answer is one"] * 5
                ids = [tokenizer.encode_plain(text.encode("utf-8", "replace").decode()[:400]) for text in texts]
                rollouts = [Rollout(i, np.full(len(i), -0.5), t, n < 2) for n, (i, t) in enumerate(zip(ids, texts, strict=True))]
                rewards = torch.tensor([float(n < 2) for n in range(5)], dtype=torch.float64)
                prompt = Prompt(name, HOSTILE[0] if hostile else "1+1?", "<b>2</b>", "q", (1, 2))
                outcomes = {"accuracy": ["correct"] * 2 + ["wrong"] * 3}
                group = RolloutGroup(prompt, rollouts, 0, rewards, {"accuracy": rewards.tolist()}, rewards - 0.4, outcomes)
                groups.append(group)
                for number, rollout in enumerate(rollouts):
                    zeros = np.zeros(1, np.float32)
                    trainer = rollout.rollout_logprobs + np.float32(0.25 if (name, number) == ("b", 4) else 1e-3)
                    samples.append(
                        TrainingSample(
                            np.r_[1, 2, rollout.token_ids], slice(1, 1 + len(rollout.token_ids)),
                            rollout_logprobs=np.r_[zeros, rollout.rollout_logprobs], old_logprobs=np.r_[zeros, trainer],
                        )
                    )  # fmt: skip
            run.save_rollouts(step, groups, samples)
            run.record(step, {"reward/mean": 0.4, "<img src=x onerror='window.hit = 1'>": 1.0})
    tokenizer.save(folder / "hf")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no chromium-headless-shell or other Chromium is installed (tools/install_system_packages.sh test)")
    with Browser(BROWSER) as opened:
        yield opened


SET = """(id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event('input', {bubbles: true}));
}"""


def found(browser: Browser) -> str:
    return browser.run("document.getElementById('count').textContent").split(" responses")[0]


def rows(browser: Browser) -> int:
    return browser.run("document.querySelectorAll('#list tbody tr').length")


@pytest.mark.slow
def test_the_browser_filters_compares_and_shows_text_as_text(tmp_path: Path, browser: Browser) -> None:
    folder = tmp_path / "</title><img src=x onerror=hit()>".replace("/", "_")
    record(folder)
    browser.problems.clear()
    browser.open(write_report(folder))
    assert found(browser) == "20 of 20" and rows(browser) == 20
    for setting, value, left in (
        ("right", "right", 8), ("right", "wrong", 12), ("right", "", 20), ("step", "2", 10), ("finished", "yes", 4),
        ("step", "", 8), ("finished", "", 20), ("search", "WINDOW.HIT", 20), ("search", "base href", 4), ("search", "", 20),
        ("least", "0.5", 8), ("part", ".accuracy", 8), ("most", "0.9", 0), ("least", "", 12), ("most", "", 20),
        ("shortest", "300", 4), ("longest", "1", 0),
    ):  # fmt: skip
        browser.run(f"({SET})('{setting}', '{value}')")
        assert (setting, value, found(browser)) == (setting, value, f"{left} of 20")
        assert rows(browser) == left
    assert browser.run("(document.getElementById('filters').reset(), new Promise(done => setTimeout(done, 50)))") is None
    assert found(browser) == "20 of 20"

    # Both sides: the same prompt and response of both steps, then every other response.
    browser.run("document.querySelectorAll('#list tbody tr')[0].querySelectorAll('button')[0].click()")
    browser.run(
        "(select => { select.value = [...select.options].findIndex(option => option.text.startsWith('step 2')) - 1;"
        "select.dispatchEvent(new Event('change')); })(document.querySelector('.pane select'))"
    )
    titles = browser.run("[...document.querySelectorAll('.pane h3')].map(title => title.textContent)")
    assert titles == ["Left: step 1, response 0", "Right: step 2, response 0"]
    for row in range(20):
        browser.run(f"document.querySelectorAll('#list tbody tr')[{row}].querySelectorAll('button')[{row % 2}].click()")
        shown = browser.run("[...document.querySelectorAll('.pane')].map(pane => pane.textContent)")
        assert len(shown) == 2

    # Numbers of a token, by pointer and by keyboard, and colours by size.
    browser.run(f"({SET})('sort', 'difference')")
    browser.run("document.querySelectorAll('#list tbody tr')[0].querySelectorAll('button')[0].click()")
    browser.run("document.querySelector('.pane .token').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    detail = "document.querySelector('.pane .detail').textContent"
    assert "engine -0.5000, trainer -0.2500, difference 0.2500, ratio 1.284" in browser.run(detail)
    assert browser.run("document.querySelector('.pane .token').className") == "token m4 here"
    for key, place in (("ArrowRight", 2), ("End", None), ("Home", 1), ("d", 2)):
        browser.run(f"document.querySelector('.pane .response').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
        assert place is None or browser.run(detail).startswith(f"Token {place} of ")
    for colour in ("engine", "advantage", "none", "difference"):
        browser.run(f"(c => {{ c.value = '{colour}'; c.dispatchEvent(new Event('change')); }})(document.getElementById('colour'))")
        assert (browser.run("document.querySelectorAll('#legend li').length") > 0) == (colour != "none")

    made = browser.run("['img', 'base', 'link', 'iframe', 'b'].map(tag => document.querySelectorAll(tag).length)")
    assert made == [0] * 5 and browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("window.hit === undefined && document.querySelectorAll('[onload], [onerror]').length === 0")
    unlabelled = "[...document.querySelectorAll('input, select')].filter(field => !field.labels.length).length"
    assert browser.run(unlabelled) == 0
    assert browser.problems == []


@pytest.mark.slow
def test_text_is_shown_as_it_was_written_and_what_hides_is_named(tmp_path: Path, browser: Browser) -> None:
    record(tmp_path / "run")
    browser.problems.clear()
    browser.open(write_report(tmp_path / "run"))
    shown = {}
    for row in range(5):
        browser.run(f"document.querySelectorAll('#list tbody tr')[{row}].querySelectorAll('button')[0].click()")
        shown[row] = browser.run("document.querySelector('.pane details .text').textContent")
    assert shown[0] == HOSTILE[0] and shown[4] == HOSTILE[4] and shown[3] == HOSTILE[3]
    assert shown[1] == "<!--<script> &lt;b&gt; &amp; ⟨U+202E⟩right to left⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ ⟨U+200B⟩"
    assert shown[2] == "⟨U+0000⟩ ⟨U+0007⟩ ⟨U+007F⟩ ⟨U+D800⟩ lone ⟨U+DC00⟩ \ufffe ⟨U+2028⟩ ⟨U+2029⟩"
    # A smiley is four tokens here, none of which is a character by itself.
    browser.run("document.querySelectorAll('#list tbody tr')[3].querySelectorAll('button')[0].click()")
    tokens = browser.run("[...document.querySelectorAll('.pane .token')].slice(0, 4).map(token => token.textContent)")
    assert tokens == ["⟨F0⟩", "⟨9F⟩", "⟨98⟩", "⟨80⟩"]
    assert browser.problems == []


@pytest.mark.slow
def test_what_the_test_relies_on_is_noticed(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>missing()</script><img src='http://x.invalid/a.png'>")
    browser.problems.clear()
    browser.open(page)
    assert any("missing is not defined" in problem for problem in browser.problems)
    assert any("x.invalid" in problem for problem in browser.problems)
