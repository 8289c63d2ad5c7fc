"""Settings from strings, layer selections, plans as JSON."""

from __future__ import annotations

import pytest

from longspan import ConfigError, ExactConfig, WindowConfig
from longspan.hf import LayerPlan, format_config, parse_config
from longspan.hf.plan import select_layers
from longspan.mechanisms import MECHANISMS


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("window", WindowConfig()),
        ("window:", WindowConfig()),
        ("window:window=512", WindowConfig(window=512)),
        (" window : window = 512 , num_sinks=0 ", WindowConfig(window=512, num_sinks=0)),
        ("exact:backend=chunked", ExactConfig(backend="chunked")),
        ('exact:backend="cpu"', ExactConfig(backend="cpu")),
    ],
)
def test_parse(text, config):
    assert parse_config(text) == config
    assert parse_config(format_config(config)) == config


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_has_a_string_form(name):
    config = MECHANISMS[name].config_class()
    assert format_config(config) == name
    assert parse_config(name) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windo:window=3", r"'windo' is not known. Did you mean 'window'\?"),
        ("window:windw=3", r"'window' has no setting 'windw'. Did you mean 'window'\?"),
        ("window:window", "'window' where a setting was expected. Write mechanism:setting=value"),
        ("window:window=3,window=4", "gives 'window' twice"),
        ("window:window=0", "window is 0; it must be an int >= 1"),
        ("window:window=many", "window is str 'many'"),
        ("", "'' is not known"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("all", [1, 3, 4]), ("global", [1, 3, 4]), ("every", [0, 1, 2, 3, 4, 5]),
        ("first:2", [1, 3]), ("last:2", [3, 4]), ("last:3", [1, 3, 4]), ("0,-1", [0, 5]),
        (2, [2]), ([5, 0, 0], [0, 5]), (range(2), [0, 1]), ((-2,), [4]), ([], []),
    ],
)  # fmt: skip
def test_select(selection, expected):
    assert select_layers(selection, 6, sliding=[0, 2, 5]) == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("al", "'al' is not known.*Did you mean 'all'"),
        ("last:4", "must name a number of layers from 1 to 3"),
        ("first:0", "must name a number of layers from 1 to 3"),
        ("first:x", "must name a number of layers from 1 to 3"),
        (6, "6 is out of range; the model has 6 attention layers. Use 0 to 5"),
        ([0, -7], "-7 is out of range"),
        ([True], "True is a bool"),
        ([1.5], "1.5 is a float"),
    ],
)
def test_select_errors(selection, message):
    with pytest.raises(ConfigError, match=message):
        select_layers(selection, 6, sliding=[0, 2, 5])


def test_later_selections_hold():
    plan = LayerPlan.build({"all": "window:window=8", "last:1": ExactConfig(), 0: "exact"}, None, 3)
    assert plan.configs == {0: ExactConfig(), 1: WindowConfig(window=8), 2: ExactConfig()}


def test_a_mapping_takes_no_other_settings():
    with pytest.raises(ConfigError, match="together with a mapping"):
        LayerPlan.build({"all": ExactConfig()}, ExactConfig(), 3)


def test_files(tmp_path):
    plan = LayerPlan(configs={0: WindowConfig(window=512), 7: ExactConfig(backend="chunked")})
    plan.save(tmp_path / "plan.json")
    assert LayerPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_other_files(text):
    with pytest.raises(ConfigError, match="Pass what to_json"):
        LayerPlan.from_json(text)


def test_plans_hold_settings_only():
    with pytest.raises(ConfigError, match="belongs to no mechanism"):
        LayerPlan(configs={0: 3})
