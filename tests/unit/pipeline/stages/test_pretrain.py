"""Blends that no run can be made of end in one line, before anything is opened."""

from __future__ import annotations

import pytest

from megatron_r1 import cli
from megatron_r1.config.data import BlendSource
from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.stages.pretrain import check_pretrain

PHASES = "pretrain.phases=[{updates: 1}, {updates: 1, blend: %s}]"


@pytest.mark.parametrize(
    ("blend", "told"),
    [
        ("[a, a]", "names a twice: its rows would come twice"),
        ("[a, b, ./a]", "names ./a and a, which is the same"),
        ("[a, b/../a]", "names b/../a and a, which is the same"),
        ("[{path: a, weight: 1}, {path: a, weight: 2}]", "names a twice"),
        ("[{path: a, weight: 1.0e+308}, {path: b, weight: 1.0e+308}]", "is too small a share of inf"),
        ("[{path: a, weight: 1.0e+308}, {path: b, weight: 5.0e-324}]", "weight=5e-324 of b is too small a share"),
    ],
)
def test_a_blend_that_does_not_work(blend, told):
    for key, settings in (("data.blend", [f"data.blend={blend}"]), ("pretrain.phases.1.blend", ["data.blend=[x]", PHASES % blend])):
        with pytest.raises(ConfigError) as caught:
            check_pretrain(load_config(None, settings))
        assert told in str(caught.value) and str(caught.value).startswith(key) and "\n" not in str(caught.value)


def test_sources_are_numbered_in_16_bits():
    config = load_config(None, [])
    many = config.data.model_copy(update={"blend": [BlendSource(path=str(number)) for number in range(32_767)]})
    with pytest.raises(ConfigError, match=r"^data\.blend has 32,767 sources; 32,766 is the most"):
        check_pretrain(config.model_copy(update={"data": many}))


@pytest.mark.parametrize("weight", ["0", "-1", ".nan", ".inf", "-0.0", "x", "null", "[1]"])
def test_a_weight_is_a_number_above_zero(weight):
    with pytest.raises(ConfigError, match=r"^'data\.blend\.0\.weight' on the command line is") as caught:
        load_config(None, [f"data.blend=[{{path: a, weight: {weight}}}]"])
    assert "\n" not in str(caught.value)


def test_a_link_is_what_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(ConfigError, match="which is the same"):
        check_pretrain(load_config(None, [f"data.blend=[{tmp_path}/real/a, {tmp_path}/link/a]"]))
    check_pretrain(load_config(None, [f"data.blend=[{tmp_path}/real/a, {tmp_path}/link/b]"]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["pretrain.sequence_length=2048"], "pretrain.sequence_length=2048 is more than the model's 1024 positions"),
        (
            ["pretrain.phases=[{updates: 1}, {updates: 1, sequence_length: 4096}]"],
            "pretrain.phases.1.sequence_length=4096 is more than the model's 1024 positions",
        ),
        (["data.split=[0, 1]"], "'data.split' on the command line is [0, 1], expected two shares of which"),
    ],
)
def test_no_index_is_made_for_a_run_that_cannot_be(settings, told, tmp_path, capsys):
    given = ["model.preset=tiny", f"run_dir={tmp_path / 'run'}", "data.blend=[/nowhere/text]", "runtime.device=cpu"]
    assert cli.main(["build-index", *given, *settings]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
