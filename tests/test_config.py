"""config.py: how files, bases and overrides are put together, and what is refused."""

import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import config as c
from errors import UserError, run

CONFIGS = sorted(c.DEFAULT.parent.rglob("*.yaml"))
DEFAULTS = yaml.safe_load(c.DEFAULT.read_text(encoding="utf-8"))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict]:
    """`load(text, "key=value", ...)` resolves a file of this text with these overrides."""

    def load(text: str, *overrides: str) -> dict:
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return c.load_config([tmp_path / "mine.yaml"], list(overrides))

    return load


@pytest.fixture
def refuse(load: Callable[..., dict]) -> Callable[..., str]:
    """Like `load`, but returns the one line with which the file must be refused."""

    def refuse(text: str, *overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        message = str(caught.value)
        assert message and "\n" not in message
        return message

    return refuse


# -- putting together ----------------------------------------------------------------------


def test_default_alone_is_the_default_file():
    assert c.load_config([], []) == DEFAULTS | {"name": "default"}
    assert c.load_config([c.DEFAULT], []) == DEFAULTS | {"name": "default"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project(path):
    config = c.load_config([path], [])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert list(config) == list(DEFAULTS)
    assert config["name"] == (written.get("name") or path.stem)
    stated = written.keys() - {"base", "name"}
    assert {key: config[key] for key in stated} == {key: written[key] for key in stated}


def test_bases_are_read_from_the_bottom_up_relative_to_their_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "bottom.yaml").write_text("epochs: 1\nseed: 1\nbatch_size: 1\n")
    (tmp_path / "middle.yaml").write_text("base: bottom.yaml\nepochs: 2\nseed: 2\n")
    (tmp_path / "sub" / "top.yaml").write_text("epochs: 3\nbase: ../middle.yaml\n")
    config = c.load_config([tmp_path / "sub" / "top.yaml"], [])
    assert (config["epochs"], config["seed"], config["batch_size"]) == (3, 2, 1)
    assert config["name"] == "top" and "base" not in config


def test_later_files_win_and_overrides_win_over_all(tmp_path):
    (tmp_path / "first.yaml").write_text("epochs: 1\nseed: 1\ncrop: 1\nblur: 0.5\n")
    (tmp_path / "second.yaml").write_text("epochs: 2\nseed: 2\ncrop: 2\n")
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    config = c.load_config(files, ["epochs=3", "seed=4", "epochs=5"])
    assert [config[key] for key in ("epochs", "seed", "crop", "blur")] == [5, 4, 2, 0.5]
    assert config["name"] == "first"
    assert c.load_config(files[::-1], [])["epochs"] == 1


def test_name_is_that_of_the_file_unless_given(load):
    assert load("")["name"] == "mine"
    assert load("name: ''")["name"] == "mine"
    assert load("name: yours")["name"] == "yours"
    assert load("name: yours", "name=theirs")["name"] == "theirs"


def test_mappings_and_lists_are_replaced_not_merged(load):
    config = load("loss: {cross_entropy: 2}\nclasses: {b: [1, 2, 3], a: [0, 0, 0]}")
    assert config["loss"] == {"cross_entropy": 2.0}
    assert list(config["classes"].items()) == [("b", [1, 2, 3]), ("a", [0, 0, 0])]


def test_loading_shares_nothing_between_configs():
    first = c.load_config([], [])
    first["loss"]["dice_pooled"] = 7.0
    first["encoder"].clear()
    assert c.load_config([], []) == DEFAULTS | {"name": "default"}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("yes", True), ("false", False)])
def test_true_and_false(load, text, value):
    assert load(f"compile: {text}")["compile"] is load("", f"compile={text}")["compile"] is value


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "'1e-3'"])
def test_numbers_without_a_dot_are_numbers(load, text):
    for config in (load(f"learning_rate: {text}"), load("", f"learning_rate={text}")):
        assert config["learning_rate"] == 0.001


def test_whole_numbers_become_floats_where_the_default_is_one(load):
    config = load("dropout: 0\npublished_iou: 1\nblur_sigma: [1, 2e0]\nloss: {dice_pooled: 3}")
    values = [config["dropout"], config["published_iou"], *config["blur_sigma"]]
    values += config["loss"].values()
    assert values == [0, 1, 1, 2, 3]
    assert all(type(value) is float for value in values)


# -- refusing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("epoch", "did you mean 'epochs'"),
        ("lerning_rate", "did you mean 'learning_rate'"),
        ("xyzzy", "known are: name, profile"),
        ("7", "known are: name, profile"),
    ],
)
def test_unknown_key_names_the_nearest_or_all(refuse, key, named):
    message = refuse(f"seed: 1\n{key}: 3")
    assert f"mine.yaml: unknown key '{key}'" in message and named in message
    message = refuse("", f"{key}=3")
    assert f"--set: unknown key '{key}'" in message and named in message


WRONG = {  # for the type of a default: what must not pass for it
    bool: ("1", "0", "null", "text", "'true'", "[true]"),
    int: ("1.5", "many", "true", "null", "[1]", "'3'"),
    float: ("many", "true", "null", ".inf", "-.inf", ".nan", "nan", "inf", "[1.0]", "{a: 1}"),
    type(None): ("many", "false", ".nan", "[1.0]"),
    str: ("5", "null", "true", "[pooled]", "2021-12-19"),
    list: ("5", "text", "null", "{a: 1}"),
    dict: ("5", "text", "null", "[1]", "!!set {a, b, c}"),
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_wrong_types(refuse, key):
    for value in WRONG[type(DEFAULTS[key])]:
        message = refuse(f"{key}: {value}")
        assert "mine.yaml" in message and f"{key}: must be" in message, value


@pytest.mark.parametrize(
    ("key", "low", "high", "below", "above"),
    [
        ("published_iou", 0, 1, -0.01, 1.01),
        ("dropout", 0, 0.99, -0.01, 1),
        ("learning_rate", 1e-9, 1, 0, 10_000),
        ("epochs", 1, 1000, 0, 10**9),
        ("images_per_epoch", 0, 10_000, -1, 10**12),
        ("batch_size", 1, 4096, 0, 10**9),
        ("seed", 0, 2**31 - 1, -1, 2**31),
        ("crop", 0, 128, -1, 10**9),
        ("blur_kernel", 1, 99, -1, 4),
        ("in_channels", 1, 4, 0, 5),
        *((key, 0, 1, -0.01, 1.01) for key in c.PROBABILITIES),
    ],
)
def test_ranges(load, refuse, key, low, high, below, above):
    assert load(f"{key}: {low}")[key] == low
    assert load(f"{key}: {high}")[key] == high
    for value in (below, above):
        message = refuse("", f"{key}={value}")
        assert message.startswith(f"{key}:") and str(value) in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("skip: half", ["skip:", "half", "pooled, full"]),
        (r'skip: "half\n"', ["skip:", "pooled, full"]),
        ("schedule: cosine", ["schedule:", "cosine", "constant, one_cycle"]),
        ("device: tpu", ["device:", "tpu", "auto, cpu, cuda"]),
        ("precision: float16", ["precision:", "float16", "bfloat16"]),
        ("upsampling_init: zero", ["upsampling_init:", "zero", "bilinear"]),
        ("compile: maybe", ["compile: must be true or false, as in 'compile: false'"]),
        ("in_channels: 2", ["in_channels:", "2", "1, 3, 4"]),
        ("encoder: [[16, 3], [32, 4], [64, 3], [128, 3]]", ["encoder:", "stage 2", "odd"]),
        ("encoder: [[16, 3], [0, 3], [64, 3], [128, 3]]", ["encoder:", "stage 2"]),
        ("encoder: [[16, 3, 1], [1, 1], [64, 3], [128, 3]]", ["encoder:", "stage 1"]),
        ("encoder: [[classes, 3], [32, 3], [64, 3], [128, 3]]", ["encoder:", "stage 1"]),
        ("encoder: [[16, 3], 32, [64, 3], [128, 3]]", ["encoder:", "stage 2 is 32"]),
        ("encoder: [[true, 3], [32, 3], [64, 3], [128, 3]]", ["encoder:", "stage 1"]),
        ("encoder: []", ["encoder:", "empty"]),
        ("decoder: [[64, 3], [32, 3], [16, 2], [classes, 3]]", ["decoder:", "stage 3", "odd"]),
        ("decoder: [[64, 3], [32, 3], [16, 3], [class, 3]]", ["decoder:", "stage 4"]),
        ("decoder: [[64, 3], [32, 3], [classes, 3]]", ["decoder:", "3 stages", "needs 4"]),
        ("skip: full", ["decoder:", "4 stages", "skip: full", "needs 5"]),
        ("loss: {dice_per_clas: 1}", ["loss:", "dice_per_clas", "did you mean 'dice_per_class'"]),
        ("loss: {1: 1}", ["loss:", "'1'", "cross_entropy, dice_pooled, dice_per_class"]),
        ("loss: {dice_pooled: -1, cross_entropy: 2}", ["loss: dice_pooled", "negative"]),
        ("loss: {dice_pooled: much}", ["loss: dice_pooled", "number"]),
        ("loss: {dice_pooled: 0}", ["loss:", "positive"]),
        ("loss: {}", ["loss:", "positive"]),
        ("classes: {a: [0, 0, 0], b: [9, 9, 9], c: [0, 0, 0]}", ["classes:", "of its own"]),
        ("classes: {a: [0, 0, 0]}", ["classes:", "2 to 255"]),
        ("classes: {}", ["classes:", "2 to 255"]),
        ("classes: {a: [0, 0, 0], b: [0, 0, 256]}", ["classes: b", "0 to 255"]),
        ("classes: {a: [0, 0, 0], b: [0, -1, 0]}", ["classes: b", "0 to 255"]),
        ("classes: {a: [0, 0], b: [1, 1, 1]}", ["classes: a", "three"]),
        ("classes: {a: black, b: [1, 1, 1]}", ["classes: a", "three"]),
        ("classes: {1: [0, 0, 0], b: [1, 1, 1]}", ["classes: 1", "name"]),
        ("blur_sigma: [0.1]", ["blur_sigma:", "2 numbers"]),
        ("blur_sigma: [2, 1]", ["blur_sigma:", "low"]),
        ("blur_sigma: [0, 1]", ["blur_sigma:", "low"]),
        ("blur_sigma: [a, b]", ["blur_sigma:", "number"]),
        ("jitter_strength: [0, 0, 0]", ["jitter_strength:", "4 numbers"]),
        ("jitter_strength: [0, 0, 0, 0.6]", ["jitter_strength:", "hue", "0.5"]),
        ("jitter_strength: [0, -1, 0, 0]", ["jitter_strength:", "negative"]),
    ],
)
def test_values_that_make_no_sense(refuse, text, parts):
    message = refuse(text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4", "'epochs' (line 3)"),
        ("loss: {dice_pooled: 1, dice_pooled: 2}", "'dice_pooled' (line 1)"),
        ("? [a]\n: 1", "(line 1)"),
        ("epochs: [", "not valid YAML"),
        ("epochs: 3: 4", "not valid YAML"),
        ("\tepochs: 3", "not valid YAML"),
        ("epochs: 3\n---\nepochs: 4", "not valid YAML"),
        ("encoder: &a [*a]", "not valid YAML"),
        ("name: \x01", "not valid YAML"),
        ("- epochs", "key: value"),
        ("epochs 3", "key: value"),
        ("base: [default.yaml]", "base"),
        ("base: nowhere.yaml", "nowhere.yaml: no such config file"),
        ("base: mine.yaml", "base"),
        ("base: .", "cannot be read"),
        # Well-formed YAML from which its reader cannot make a value:
        ("name: 2021-13-45", "mine.yaml"),
        ("seed: 0x_", "mine.yaml"),
        ("loss: !!map [1]", "mine.yaml"),
        ("learning_rate: 1" + "0" * 400, "learning_rate"),
    ],
    ids=lambda text: text.strip()[:20],
)
def test_files_that_are_no_config(refuse, tmp_path, text, part):
    message = refuse(text)
    assert part in message and str(tmp_path) in message, message


def test_cycle_of_bases(refuse, tmp_path):
    (tmp_path / "other.yaml").write_text("base: mine.yaml")
    assert "chain of bases" in refuse("base: other.yaml")


def test_one_base_reached_twice_is_no_cycle(load, tmp_path):
    (tmp_path / "common.yaml").write_text("epochs: 7")
    (tmp_path / "second.yaml").write_text("base: common.yaml\nseed: 5")
    (tmp_path / "first.yaml").write_text("base: common.yaml")
    config = c.load_config([tmp_path / "first.yaml", tmp_path / "second.yaml"], [])
    assert (config["epochs"], config["seed"]) == (7, 5)


@pytest.mark.parametrize(
    ("content", "part"), [(None, "no such config file"), (b"\xff\xfe\0", "not a text file")]
)
def test_missing_and_binary_files(tmp_path, content, part):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=part) as caught:
        c.load_config([path], [])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("epochs", "--set epochs: must be key=value"),
        ("epochs=", "--set: epochs: must be a whole number"),
        ("epochs=[", "not valid YAML"),
        ("loss={a: 1, a: 2}", "--set"),
        ("name=2021-13-45", "--set"),
        ("base=default.yaml", "unknown key 'base'"),
    ],
)
def test_bad_overrides(refuse, override, part):
    assert part in refuse("", override)


def test_code_in_yaml_is_refused_and_not_run(refuse, tmp_path):
    trap = tmp_path / "made"
    value = f"!!python/object/apply:os.mkdir ['{trap}']"
    assert "mine.yaml" in refuse(f"name: {value}")
    assert "--set" in refuse("", f"name={value}")
    assert "mine.yaml" in refuse("name: !!python/name:os.mkdir")
    assert not trap.exists()
    yaml.unsafe_load(value)
    assert trap.exists()  # the trap works


# -- writing -------------------------------------------------------------------------------

numbers = st.floats(0, 1)
texts = st.text(st.characters(exclude_characters="\x85", codec="utf-8"))  # PyYAML folds that one
stages = st.tuples(st.integers(1, 512), st.sampled_from([1, 3, 5, 7])).map(list)
classes = st.tuples(texts, st.tuples(*[st.integers(0, 255)] * 3))


@st.composite
def configs(draw: st.DrawFn) -> dict:
    """A valid value for every key but those whose default must do."""
    encoder = draw(st.lists(stages, min_size=1, max_size=5))
    skip = draw(st.sampled_from(["pooled", "full"]))
    count = len(encoder) + (skip == "full")
    decoder = draw(st.lists(stages, min_size=count, max_size=count))
    decoder[-1][0] = draw(st.sampled_from(["classes", 8]))
    palette = draw(
        st.lists(classes, min_size=2, max_size=9, unique_by=(itemgetter(0), itemgetter(1)))
    )
    low, high = sorted(draw(st.tuples(*[st.floats(1e-6, 1e6)] * 2)))
    return DEFAULTS | {
        "name": draw(texts.filter(bool)),
        "data": draw(texts),
        "published_iou": draw(st.none() | numbers),
        "classes": {name: list(colour) for name, colour in palette},
        "encoder": encoder,
        "decoder": decoder,
        "skip": skip,
        "loss": {draw(st.sampled_from(c.LOSSES)): draw(st.floats(1e-300, 1e299))},
        "learning_rate": draw(st.floats(1e-12, 1e3)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "blur_sigma": [low, high],
        **{key: draw(numbers) for key in c.PROBABILITIES},
    }


@given(configs())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_dump_reads_back_to_the_same(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(c.dump(config), encoding="utf-8")
    assert repr(c.load_config([path], [])) == repr(config)  # of the same types and order as well


# -- the command line ----------------------------------------------------------------------


def test_prints_the_resolved_config(monkeypatch, capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3")
    (tmp_path / "b.yaml").write_text("epochs: 4\nseed: 6")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    overrides = ["--set", "seed=7", "crop=8", "--set", "batch_size=9"]
    monkeypatch.setattr(sys, "argv", ["config.py", "--config", *files, *overrides])
    c.main()
    printed = yaml.safe_load(capsys.readouterr().out)
    changed = {"name": "a", "epochs": 4, "seed": 7, "crop": 8, "batch_size": 9}
    assert printed == DEFAULTS | changed


def test_mistake_is_one_line_and_exit_code_2(script):
    done = script("config.py", "--config", "configs/tuned.yaml", "--set", "epoch=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "'epoch'" in done.stderr and "'epochs'" in done.stderr


def test_interrupt_is_exit_code_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run(interrupted)
    assert "interrupted" in capsys.readouterr().err
