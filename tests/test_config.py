"""Presets, flags and TOML: what a user types is what a stage gets, or one sentence says why not."""

import tomllib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax.config import CONFIGS, base_dir, parse, to_toml
from nanochat_jax.stages.settings import PretrainConfig


@dataclass(frozen=True)
class MidTrainConfig:
    """A stage of two words."""

    name: str = "a"
    size: int = 1
    rate: float | None = None


def test_flags_go_before_the_preset_and_that_before_defaults(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text('name = "from preset"\nsize = 2\n')
    config = parse(MidTrainConfig, "mid_train", ["--config", str(preset), "--size=3"])
    assert config == MidTrainConfig("from preset", 3)
    assert parse(MidTrainConfig, "mid_train", []) == MidTrainConfig()


def test_a_stage_takes_its_own_table_of_a_preset(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text("[mid_train]\nsize = 5\n\n[pretrain]\ndepth = 3\n")
    assert parse(MidTrainConfig, "mid_train", [f"--config={preset}"]).size == 5
    assert parse(PretrainConfig, "pretrain", [f"--config={preset}"]).depth == 3


@pytest.mark.parametrize(
    ("content", "flag", "message"),
    [
        ("sise = 2\n", "--config={}", "unknown setting sise; the known ones are name, size, rate"),
        ("size = \n", "--config={}", "is not valid TOML"),
        ("", "--config=nowhere", "no preset 'nowhere'"),
        ("", "--config", "--config needs the name of a TOML file"),
    ],
)
def test_a_mistake_ends_with_one_sentence(tmp_path, content, flag, message):
    preset = tmp_path / "p.toml"
    preset.write_text(content)
    with pytest.raises(SystemExit, match=message):
        parse(MidTrainConfig, "mid_train", [flag.format(preset)])


@given(st.builds(MidTrainConfig, st.text(), st.integers(), st.none() | st.floats(-1e9, 1e9)))
def test_toml_brings_every_configuration_back(config):
    assert MidTrainConfig(**tomllib.loads(to_toml(config))) == config


def test_every_preset_is_understood_by_pretraining():
    for preset in CONFIGS.glob("*.toml"):
        config = parse(PretrainConfig, "pretrain", ["--config", preset.stem])
        assert config.run == preset.stem


def test_the_base_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert base_dir() == tmp_path
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    assert base_dir().name == "nanochat_jax"
