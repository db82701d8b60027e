"""What `--help`, `--help-all` and `megatron-r1 config` print."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_r1 import cli
from megatron_r1.cli import arguments
from megatron_r1.cli.commands import COMMANDS, EVALUATE, EVERYBODY_SETS, PIPELINES, RECIPES
from megatron_r1.config.keys import FIELDS, is_within, known_keys
from tests.patience import patient

WITH_SETTINGS = {
    **COMMANDS,
    "evaluate": EVALUATE,
    **{f"pipeline {name}": command for name, command in (PIPELINES | RECIPES).items()},
}
WITHOUT_SETTINGS = ["", "doctor", "report", "status", "preflight", "serve-rollouts", "convert", "config", "pipeline", "preprocess"]


def help_of(capsys, name: str, option: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), option])
    assert caught.value.code == 0
    return capsys.readouterr().out


def settings_in(text: str) -> list[str]:
    """The keys that a help text describes, in its order."""
    lines = (line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].isalpha())
    return [key for key in lines if key in known_keys()]


def test_settings_are_described_only_for_help(capsys, monkeypatch):
    """It takes longer than all the rest of the parser."""
    described = []
    monkeypatch.setattr(arguments, "describe_settings", lambda sections: described.append(sections) or "as asked")
    assert cli.main(["status", "no-such-folder"]) == 2 and not described
    assert "as asked" in help_of(capsys, "grpo", "--help") and len(described) == 1
    assert "as asked" in help_of(capsys, "sft", "--help-all") and len(described) == 2


@pytest.mark.parametrize("name", [*WITH_SETTINGS, "score", *WITHOUT_SETTINGS])
def test_every_command_has_help(capsys, name):
    assert "usage: megatron-r1" in help_of(capsys, name, "--help")


def test_help_begins_with_the_settings_of_the_stage_and_shows_few_others(capsys):
    out = help_of(capsys, "grpo", "--help")
    shown = settings_in(out)
    own = [key for key in shown if key.startswith("grpo.")]
    assert own == [key for key in known_keys() if key.startswith("grpo.")] == shown[: len(own)]
    assert set(shown[len(own) :]) == set(EVERYBODY_SETS)
    assert "grpo.clip_eps=0.2\n      Epsilon of the clipped probability ratio" in out
    assert "else the CPU. One of auto, cpu, cuda." in " ".join(out.split())
    assert "`megatron-r1 grpo --help-all` shows all" in out and "`megatron-r1 config KEY` explains one" in out


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_help_all_shows_every_setting_that_the_command_reads_and_help_some_of_them(capsys, name):
    command = WITH_SETTINGS[name]
    everything = settings_in(help_of(capsys, name, "--help-all"))
    assert set(everything) == {key for key in known_keys() if is_within(key, command.sections)}
    assert len(everything) == len(set(everything))
    some = settings_in(help_of(capsys, name, "--help"))
    assert some and set(some) <= set(everything)
    assert {"run_dir", "seed"} <= set(some)


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_what_a_command_says_that_it_reads_is_there(name):
    command = WITH_SETTINGS[name]
    assert all(section in FIELDS for section in (*command.sections, *command.own, *EVERYBODY_SETS))


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom megatron_r1 import cli\n"
        "try: cli.main(['grpo', '--help'])\nexcept SystemExit: print('torch' in sys.modules)\n"
        "import megatron_r1.preprocess.commands\nprint('torch' in sys.modules)"  # each of its processes would hold it
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patient(60), check=True)
    assert done.stdout.splitlines()[-2:] == ["False", "False"]


def test_config_explains_keys_and_sections_and_lists_them(capsys):
    assert cli.main(["config", "grpo.clip_eps", "parallel"]) == 0
    out = capsys.readouterr().out
    assert "type:      number above 0" in out and "read by:   grpo, pipeline r1-zero, pipeline r1" in out
    assert "\n\nparallel\n  How the model is laid out over ranks.\n" in out
    assert cli.main(["config"]) == 0
    assert "\n  grpo\n" in capsys.readouterr().out
