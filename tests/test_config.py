"""One name, one meaning for every setting: however it is typed, wherever it comes from; and mistakes are named."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from wsimil.config import SECTIONS, STUDY_SECTIONS, JobConfig, Settings, TileConfig, TrainConfig, normalise_key
from wsimil.errors import ConfigError
from wsimil.settings import as_mapping, keys_of, nearest, read_settings, save_settings, to_yaml


def from_yaml(tmp_path: Path, text: str, sections=SECTIONS, **overrides) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return read_settings(sections, path, overrides)


def test_without_a_file_or_flags_everything_is_the_default():
    assert read_settings(SECTIONS) == Settings()


def test_every_section_is_in_the_settings():
    assert [field.name for field in dataclasses.fields(Settings)] == list(SECTIONS)
    for name, section in SECTIONS.items():
        assert getattr(Settings(), name) == section()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_says_what_it_means(section):
    for setting in dataclasses.fields(SECTIONS[section]):
        assert len(setting.metadata["help"]) > 5, setting.name


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_cannot_be_changed_behind_ones_back(section):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(SECTIONS[section](), dataclasses.fields(SECTIONS[section])[0].name, None)


def test_hyphens_and_underscores_are_the_same():
    assert normalise_key("--tile.tile-px") == "tile.tile_px" == normalise_key("tile.tile_px")
    assert read_settings(SECTIONS, overrides={"--tile-px": "256"}) == read_settings(SECTIONS, overrides={"tile_px": 256})


def test_a_short_key_reaches_every_section_that_has_it():
    assert keys_of(STUDY_SECTIONS)["device"] == ["extract.device", "train.device", "predict.device"]
    settings = read_settings(SECTIONS, overrides={"device": "cuda:1"})
    assert {settings.extract.device, settings.train.device, settings.predict.device} == {"cuda:1"}
    assert read_settings(["train"], overrides={"device": "cuda:1"}).predict.device == "auto"


def test_a_full_key_beats_a_short_one_in_any_order(tmp_path):
    for overrides in ({"seed": 1, "train.seed": 2}, {"train.seed": 2, "seed": 1}):
        settings = read_settings(SECTIONS, overrides=overrides)
        assert (settings.split.seed, settings.train.seed) == (1, 2)
    for text in ("seed: 1\ntrain: {seed: 2}", "train: {seed: 2}\nseed: 1"):
        settings = from_yaml(tmp_path, text)
        assert (settings.split.seed, settings.train.seed) == (1, 2)


def test_what_is_typed_beats_the_file(tmp_path):
    assert from_yaml(tmp_path, "train: {lr: 0.1, epochs: 5}", lr="3e-4").train == TrainConfig(lr=3e-4, epochs=5)


def test_the_file_beats_the_defaults_given(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {epochs: 5}")
    defaults = Settings(train=TrainConfig(epochs=9, hidden=8))
    assert read_settings(["train"], path, defaults=defaults).train == TrainConfig(epochs=5, hidden=8)


def test_one_file_serves_every_stage_but_a_typed_key_must_belong(tmp_path):
    text = "tile: {tile_px: 256}\nlabels: {target: grade}\nfolds: 3\ntrain: {epochs: 5}"
    assert from_yaml(tmp_path, text, ["train"]) == Settings(train=TrainConfig(epochs=5))
    with pytest.raises(ConfigError, match=r"unknown key tile\.tile_px"):
        read_settings(["train"], overrides={"tile.tile_px": 256})
    with pytest.raises(ConfigError, match=r"unknown key tile\.tile_pxx"):
        from_yaml(tmp_path, "tile: {tile_pxx: 256}", ["train"])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("tile_pxx", "did you mean tile_px?"),
        ("train.learning", "unknown key train.learning"),
        ("train.epoch", "did you mean train.epochs?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path, key, expected):
    with pytest.raises(ConfigError, match="unknown key") as typed:
        read_settings(SECTIONS, overrides={key: 1})
    assert expected in str(typed.value)
    with pytest.raises(ConfigError) as read:
        from_yaml(tmp_path, f"{key}: 1")
    assert expected in str(read.value) and "config.yaml" in str(read.value)


def test_nothing_is_suggested_for_nonsense():
    assert nearest("qqqq", ["tile_px"]) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile_px", "224.5"),
        ("tile_px", "many"),
        ("tile_px", True),
        ("tile_px", None),
        ("tile_px", {"a": 1}),
        ("tile_px", [224]),
        ("tile_px", "inf"),
        ("weight_decay", "nan"),
        ("lr", "inf"),
        ("mpp", "0,5"),
        ("standardize", "maybe"),
        ("standardize", 2),
        ("tissue", "all"),
        ("dtype", "fp8"),
        ("heatmap.format", ["png", "gif"]),
        ("heatmap.format", 3),
        ("encoder", None),
        ("encoder", {"a": 1}),
        ("positive", True),  # `positive: yes` without quotes
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_names_key_and_value(key, value):
    with pytest.raises(ConfigError, match=key) as error:
        read_settings(SECTIONS, overrides={key: value})
    assert "expected" in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"mpp": 0.04},
        {"mpp": 21},
        {"tile_px": 7},
        {"overlap_px": 224},
        {"overlap_px": -1},
        {"min_tissue": 1.1},
        {"slide_mpp": 353},
        {"batch_size": 0},
        {"workers": -1},
        {"read_timeout": 0},
        {"folds": 1},
        {"val_fraction": 0},
        {"val_fraction": 1},
        {"hidden": 0},
        {"epochs": 0},
        {"patience": 0},
        {"bags_per_step": 0},
        {"seeds": 0},
        {"dropout": 1},
        {"lr": 0},
        {"fold": "first"},
        {"max_side_px": 10},
        {"shard": "3/2"},
        {"shard": "0/2"},
        {"shard": "half"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_the_range(overrides):
    (key,) = overrides
    with pytest.raises(ConfigError, match=rf"{key} is .*expected"):
        read_settings(SECTIONS, overrides=overrides)


def test_text_means_what_it_would_mean_in_yaml():
    settings = read_settings(
        SECTIONS,
        overrides={"lr": "3e-4", "epochs": "1e2", "standardize": "no", "slide_mpp": "0.25", "fold": 3, "heatmap.format": "png"},
    )
    assert settings.train == TrainConfig(lr=3e-4, epochs=100, standardize=False, fold="3")
    assert type(settings.train.epochs) is int
    assert settings.tile.slide_mpp == 0.25
    assert settings.heatmap.format == ("png",)


@pytest.mark.parametrize("nothing", [None, "none", "null"])
def test_an_optional_setting_can_be_taken_back(nothing):
    defaults = Settings(tile=TileConfig(slide_mpp=0.25))
    assert read_settings(["tile"], overrides={"slide_mpp": nothing}, defaults=defaults).tile.slide_mpp is None


def test_no_tissue_is_a_choice_not_nothing(tmp_path):
    assert from_yaml(tmp_path, "tissue: none").tile.tissue == "none"


def test_an_event_in_every_step_does_not_go_with_steps_of_any_length():
    with pytest.raises(ConfigError, match=r"train\.sampling is risk_set.*tiles_per_step"):
        read_settings(["train"], overrides={"sampling": "risk_set", "tiles-per-step": 500})
    for one in ({"sampling": "risk_set"}, {"sampling": "balanced", "tiles-per-step": 500}):
        read_settings(["train"], overrides=one)


def test_shards_are_counted_from_one():
    assert JobConfig().shard_of() == (1, 1)
    assert JobConfig(shard="2/8").shard_of() == (2, 8)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train: {}\n"])
def test_an_empty_file_or_section_changes_nothing(tmp_path, text):
    assert from_yaml(tmp_path, text) == Settings()


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "a: [1", "a: \x00"])
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(tmp_path, text):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        from_yaml(tmp_path, text)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml.*No such file"):
        read_settings(SECTIONS, tmp_path / "missing.yaml")


# what a column, a device or an encoder may be called, and all that YAML gives a meaning to
names = st.text("aNyo01µ病 .:-_/#'\"{}[],&*!|>%@`~?=\\", min_size=1, max_size=6)


def values_of(section: type) -> st.SearchStrategy:
    """Any valid values of a section's settings, whatever they are."""
    hints, defaults = typing.get_type_hints(section), section()
    choices = {}
    for name, kind in hints.items():
        default = getattr(defaults, name)
        if name == "sampling":  # risk_set does not go with tiles_per_step
            choices[name] = st.sampled_from(["shuffle", "balanced"])
        elif typing.get_origin(kind) is typing.Literal:
            choices[name] = st.sampled_from(typing.get_args(kind))
        elif name == "min_lr":  # no more than lr
            choices[name] = st.floats(0, 0.001)
        elif name in ("soup_kept", "soup_epochs"):  # no more than soup, and than epochs
            choices[name] = st.integers(1, 60)
        elif name == "overlap_px":
            choices[name] = st.integers(0, 63)
        elif name == "positive":
            choices[name] = st.none() | st.sampled_from(["yes", "off", "1", "01", "1e3", "null hypothesis", "1:30", "µ"])
        elif kind is bool:
            choices[name] = st.booleans()
        elif kind is int:
            choices[name] = st.just(default) | st.integers(64, 200)
        elif kind is float:
            choices[name] = st.just(default) | st.floats(0.06, 0.9)
        elif kind is str and name != "fold":
            choices[name] = st.just(default) | names
    return st.fixed_dictionaries({}, optional=choices).map(lambda values: section(**values))


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking six dozen settings takes minutes
@given(st.fixed_dictionaries({name: values_of(section) for name, section in SECTIONS.items()}).map(lambda parts: Settings(**parts)))
def test_saved_settings_read_back_the_same(tmp_path_factory, chosen):
    path = tmp_path_factory.mktemp("settings") / "config.yaml"
    save_settings(path, chosen, SECTIONS)
    assert read_settings(SECTIONS, path) == chosen


def test_what_is_saved_is_what_is_printed(tmp_path):
    path = tmp_path / "config.yaml"
    save_settings(path, Settings(), ["tile", "train"])
    assert path.read_text(encoding="utf-8") == to_yaml(Settings(), ["tile", "train"])
    assert list(as_mapping(Settings(), ["tile", "train"])) == ["tile", "train"]


@pytest.mark.parametrize(
    "text",
    [
        "tile: {mpp: 1.0}\ntile: {tile_px: 100}",
        "tile: {mpp: 1.0, mpp: 2.0}",
        "tile: {tile_px: 100, tile-px: 200}",
        "tile.mpp: 1.0\ntile: {mpp: 2.0}",
        "tile: {mpp: 1.0}\ntile.mpp: 2.0",
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="twice"):
        read_settings(["tile"], path)


@pytest.mark.parametrize(
    ("text", "said"), [("tile: 5", "tile is 5; expected keys and values"), ("tiel: {mpp: 1}", "did you mean tile")]
)
def test_a_section_is_a_mapping_and_its_name_is_suggested(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_settings(["tile"], tmp_path / "c.yaml")


def test_an_underscore_is_no_decimal_point():
    with pytest.raises(ConfigError, match="expected a number"):
        read_settings(["tile"], overrides={"tile.mpp": "0_5"})
