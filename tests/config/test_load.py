from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacog.config import yaml_text
from megacog.config.load import apply_overrides, config_hash, dump_config, load_config
from megacog.config.schema import GenerationConfig, ModelConfig
from megacog.errors import EXIT_CONFIG, ConfigError

VALID = """\
model:
  num_layers: 2
  hidden_size: 32
  num_heads: 4
  grid: [4, 4]
  image_vocab_size: 320
  text_vocab_size: 100
tokenizer:
  text: tok/text
  frames: tok/frames
train:
  stage: base
  run_dir: runs/x
  steps: 10
  global_batch_size: 8
  micro_batch_size: 4
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(VALID)
    return tmp_path / "run.yaml"


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as info:
        load_config(path, overrides)
    assert info.value.exit_code == EXIT_CONFIG
    return str(info.value)


def edit(path: Path, old: str, new: str) -> None:
    assert old in VALID
    path.write_text(VALID.replace(old, new))


def test_a_valid_file_gives_its_values_and_the_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.model.grid == (4, 4)
    assert config.train.betas == (0.9, 0.95)
    assert config.data.train == ()


def test_the_dump_loads_back_as_an_equal_configuration(path: Path, tmp_path: Path) -> None:
    overrides = [
        "samples.prompts=[\"1e-4\", 'yes', '010', 'the digit 3', '\u79d2: x # y', '', '0o17', '1:30', '2024-01-01']",
        "train.learning_rate=1e-5",
        "data.train=[{path: a-*.h5, weight: 0.25}]",
        "deepspeed.zero_optimization={reduce_bucket_size: 5e8, overlap_comm: false}",
        "data.rates.phases=[{from_step: 0, min_fps: 0.25}]",
    ]
    config = load_config(path, overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert config_hash(load_config(copy)) == config_hash(config)
    assert config.samples.prompts[0] == "1e-4" and config.samples.prompts[5] == ""


def test_the_dump_holds_every_key(path: Path) -> None:
    dumped = yaml_text.parse(dump_config(load_config(path))).value
    assert set(dumped["model"]) == set(ModelConfig.model_fields)


def test_the_hash_changes_with_any_value(path: Path) -> None:
    base = config_hash(load_config(path))
    assert len(base) == 64
    assert config_hash(load_config(path, ["train.seed=1"])) != base
    assert config_hash(load_config(path, ["train.seed=1234"])) == base


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(path: Path) -> None:
    config = load_config(
        path,
        ["train.steps=20", "train.steps=30", "train.learning_rate=3e-4", "model.grid=[8, 8]", "train.threads=null"],
    )
    assert config.train.steps == 30
    assert config.train.learning_rate == 3e-4
    assert config.model.grid == (8, 8)


def test_an_override_reaches_into_lists_and_new_sections(path: Path) -> None:
    path.write_text(VALID + "data:\n  train: [{path: a.h5}, {path: b.h5}]\n")
    config = load_config(path, ["data.train.1.path=c.h5", "deepspeed.flops_profiler.enabled=true"])
    assert [source.path for source in config.data.train] == ["a.h5", "c.h5"]
    assert config.deepspeed == {"flops_profiler": {"enabled": True}}
    assert "a list of 2" in message(path, "data.train.2.path=c.h5")
    assert "train.steps is a single value" in message(path, "train.steps.x=1")


def test_a_text_that_looks_like_a_number_stays_text_in_overrides(path: Path) -> None:
    config = load_config(path, ["train.run_dir=2024", "tokenizer.text=1e5", "model.inherit=007"])
    assert (config.train.run_dir, config.tokenizer.text, config.model.inherit) == ("2024", "1e5", "007")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "+1e-4"])
def test_every_spelling_of_a_float_is_a_number_in_files_and_overrides(path: Path, text: str) -> None:
    edit(path, "steps: 10", f"steps: 10\n  learning_rate: {text}")
    assert load_config(path).train.learning_rate == 1e-4
    path.write_text(VALID)
    assert load_config(path, [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


def test_an_unknown_key_is_placed_and_the_closest_ones_are_named(path: Path) -> None:
    edit(path, "hidden_size: 32", "hiden_size: 32")
    text = message(path)
    assert f"{path}:3: model.hiden_size: unknown key; did you mean hidden_size" in text
    assert f"{path}:1: model.hidden_size: missing; it is required (int)" in text


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(path: Path) -> None:
    edit(path, "  steps: 10", "  steps: 10\n  num_layers: 4")
    assert "train.num_layers: unknown key; did you mean model.num_layers?" in message(path)


def test_an_unknown_override_names_itself_and_the_closest_key(path: Path) -> None:
    text = message(path, "train.learning_rat=1", "trian.steps=3")
    assert "override 'train.learning_rat=1': train.learning_rat: unknown key; did you mean learning_rate" in text
    assert "override 'trian.steps=3': trian: unknown key; did you mean train?" in text


def test_a_wrong_choice_shows_all_choices(path: Path) -> None:
    edit(path, "stage: base", "stage: sequental")
    assert (
        f'{path}:12: train.stage: expected one of base, sequential, interpolation, got "sequental"; '
        "did you mean sequential?" in message(path)
    )
    assert "expected one of 0, 1, 2, 3, got 4" in message(path, "train.zero_stage=4", "train.stage=base")


def test_the_choices_of_a_union_are_one_error(path: Path) -> None:
    text = message(path, "model.plus_from=bse")
    assert text == (
        "override 'model.plus_from=bse': model.plus_from: "
        'expected one of sequential, interpolation, base, got "bse"; did you mean base?'
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers=true", "expected a valid integer, got true"),
        ("model.num_layers=two", 'expected a valid integer, got "two"'),
        ("model.num_layers=2.5", "expected a valid integer, got 2.5"),
        ("model.num_layers=0", "expected greater than or equal to 1, got 0"),
        ("model.num_layers=", "expected a valid integer, got nothing"),
        ("model.grid=[4, 4, 4]", "expected 2 values, got [4, 4, 4]"),
        ("model.grid=[4]", "expected 2 values, got [4]"),
        ("metrics.tensorboard=yes", '(write true or false), got "yes"'),
        ("train.activation_checkpointing=true", "expected one of none, selective, full, got true"),
        ("train.activation_checkpointing=False", "expected one of none, selective, full, got false"),
        ("train.learning_rate=.nan", "finite"),
        ("train.learning_rate=[", "not valid YAML"),
        ("train=3", "got 3"),
        ("train.seed=!!python/object:os.system 1", "not supported"),
    ],
)
def test_ill_typed_values_are_refused_with_what_was_given(path: Path, override: str, expected: str) -> None:
    text = message(path, override)
    assert expected in text
    assert text.startswith(f"override {override!r}: ")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_an_override_without_key_or_value_is_refused(path: Path, override: str) -> None:
    assert "write it as section.key=value" in message(path, override)


def test_all_errors_come_at_once(path: Path) -> None:
    path.write_text(VALID.replace("num_layers: 2", "num_layers: x").replace("steps: 10", "stepps: 10"))
    lines = message(path, "checkpoint.keep_last=0", "foo", "deepspeed.zero_optimisation={}").splitlines()
    assert lines[0] == "6 problems in the configuration:"
    assert len(lines) == 7


def test_rules_between_keys_are_placed_at_their_section(path: Path) -> None:
    edit(path, "num_heads: 4", "num_heads: 5")
    assert f"{path}:1: model: hidden_size 32 is not divisible by num_heads 5" in message(path)
    path.write_text(VALID)
    text = message(path, "train.global_batch_size=9")
    assert "train.global_batch_size 9 is not a multiple of train.micro_batch_size 4" in text
    assert "zero_stage 0" in message(path, "train.zero_stage=0")


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("sequence", [1, 2, 4, 8])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_only_layouts_that_are_proved_are_admitted(path: Path, tensor: int, sequence: int, zero_stage: int) -> None:
    parallel = f"parallel={{tensor: {tensor}, sequence: {sequence}}}"
    overrides = ["model.num_heads=8", "train.precision=fp32", f"train.zero_stage={zero_stage}", parallel]
    refusals = []
    if tensor > 1 and sequence > 1:
        refusals.append(f"parallel.tensor {tensor} with parallel.sequence {sequence} is not proved")
    if tensor > 1 and zero_stage == 3:
        refusals.append(f"train.zero_stage 3 with parallel.tensor {tensor} would gather")
        load_config(path, [*overrides, "train.engine=torch", "parallel.sequence=1"])
    for refusal in refusals:
        assert refusal in message(path, *overrides)
    if not refusals:
        assert load_config(path, overrides).parallel.sequence == sequence


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["parallel.tensor=16", "model.num_heads=16"], "parallel.tensor 16 is not one of the sizes that are proved"),
        (["parallel.tensor=8"], "parallel.tensor 8 does not divide model.num_heads 4; 4 does"),
        (["parallel.tensor=4", "model.ffn_size=90"], "parallel.tensor 4 does not divide the MLP width 90; 3 does"),
        (["parallel.sequence=3"], "parallel.sequence 3 does not divide model.num_heads 4; 2 does"),
        (["parallel.sequence=4", "model.grid=[3, 6]"], "does not divide the 3 x 6 cells of a frame, 18; 3 does"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(path: Path, overrides: list[str], refusal: str) -> None:
    assert refusal in message(path, *overrides)
    assert "gradient_dtype bf16 needs" in message(path, "train.gradient_dtype=bf16", "train.precision=fp32")


def test_a_duplicate_key_is_an_error_with_both_lines(path: Path) -> None:
    edit(path, "  steps: 10", "  steps: 10\n  steps: 20")
    assert message(path) == f"{path}:15: train.steps: given twice, first in line 14"


def test_deepspeed_settings_are_checked_and_generated_ones_refused(path: Path) -> None:
    path.write_text(
        VALID + "deepspeed:\n  gradient_cliping: 1\n  zero_optimization: {stage: 2, reduce_scatter: true}\n"
        "  train_batch_size: 4\n  hybrid_engine: {}\n"
    )
    text = message(path)
    assert f"{path}:18: deepspeed.gradient_cliping: is no DeepSpeed setting" in text
    assert f"{path}:19: deepspeed.zero_optimization.stage: is generated by megacog; set train.zero_stage" in text
    assert f"{path}:20: deepspeed.train_batch_size: is generated by megacog; set train.global_batch_size" in text
    assert f"{path}:21: deepspeed.hybrid_engine: is a DeepSpeed feature that megacog does not support" in text
    assert text.startswith("4 problems")


def test_misspelled_deepspeed_settings_are_told_the_closest_one(path: Path) -> None:
    assert "did you mean zero_optimization" in message(path, "deepspeed.zero_optimisation={}")


def test_a_missing_file_names_the_closest_one(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file; did you mean .*run\.yaml"):
        load_config(path.with_name("rum.yaml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(path.parent)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: [", ":1: not valid YAML"),
        (b"model:\n\tx: 1", ":2: not valid YAML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "expected sections with keys"),
        (b"- a", "expected sections with keys"),
        (b"a: &x [1]\nb: *x", ":2: not valid YAML: anchors and aliases are not supported"),
        (b"a: !!python/name:os.system", "is not supported"),
        (b"? [a]\n: 1", "a key must be a plain word"),
        (b"[" * 100_000, "nested too deeply"),
        (b"#" * (1 << 20) + b"\n", "has at most 1048576 bytes"),
    ],
    ids=["unclosed", "tab", "utf16", "empty", "list", "alias", "tag", "list-key", "deep", "large"],
)
def test_a_file_that_is_no_configuration_is_one_clear_error(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    text = message(path)
    assert str(path) in text and expected in text


def test_a_section_takes_overrides_with_and_without_its_name() -> None:
    section = apply_overrides(GenerationConfig(), ["guidance=3", "generation.top_k=40"], "generation")
    assert (section.guidance, section.top_k) == (3.0, 40)
    assert section.levels == GenerationConfig().levels


def test_a_section_tells_errors_with_its_name() -> None:
    with pytest.raises(ConfigError) as info:
        apply_overrides(GenerationConfig(), ["temprature=1", "top_p=2"], "generation")
    assert "generation.temprature: unknown key; did you mean temperature, " in str(info.value)
    assert "generation.top_p: expected less than or equal to 1, got 2" in str(info.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), plain, max_size=4))
@settings(max_examples=150, deadline=None)
def test_whatever_is_dumped_is_parsed_back_equal(value: dict[str, object]) -> None:
    parsed = yaml_text.parse(yaml_text.dump(value))
    assert parsed.value == value
    assert not parsed.problems


@given(st.text(alphabet="0123456789.eE+-_:xonyfYN~ ", max_size=8))
@settings(max_examples=300, deadline=None)
def test_texts_like_numbers_survive_the_round_trip_as_text(text: str) -> None:
    assert yaml_text.parse(yaml_text.dump([text])).value == [text]
