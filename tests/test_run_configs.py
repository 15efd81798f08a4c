"""Configs and command lines that no run can have: one line, nothing written."""

import re
import signal

import pytest
from absl import flags
from ml_collections import ConfigDict

from configs import defaults, digits
from configs.ranges import RANGES
from train import UserError, config_checks, config_files
from train import flags as command_line
from train.norms import make_norm
from train.topology import make_topology


def fields(config, prefix=""):
    for name in config:
        if isinstance(config[name], ConfigDict):
            yield from fields(config[name], f"{prefix}{name}.")
        else:
            yield prefix + name, config[name], config.get_type(name)


def changed(config, name, value):
    *above, last = name.split(".")
    inner = config
    for each in above:
        inner = inner[each]
    with inner.ignore_type():
        inner[last] = value
    return config


def numbers():
    return [
        (name, value, kind)
        for name, value, kind in fields(defaults.get_config())
        if kind in (int, float, tuple)
    ]


def test_one_table_has_every_number_and_nothing_else():
    assert {name for name, *_ in numbers()} == {*RANGES}


def test_every_number_is_kept_in_its_range():
    config_checks.check_fields(defaults.get_config())
    for name, value, kind in numbers():
        low, high = map(float, RANGES[name][1:-1].split(","))
        wrong = [
            low - 1,
            high * 2 + 1,
            *([low] if RANGES[name][0] == "(" else []),
        ]
        if kind is float:
            wrong += [float("nan"), float("inf")]
        else:
            wrong = [*map(int, wrong), True]
        for each in [*wrong, "1"]:
            one = (each,) if isinstance(value, tuple) else each
            config = changed(defaults.get_config(), name, one)
            with pytest.raises(UserError, match=f"{name} must be"):
                config_checks.check_fields(config)
        assert config_checks.in_range(name, high) == (RANGES[name][-1] == "]")
        assert config_checks.in_range(name, low) == (RANGES[name][0] == "[")


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "learning_rte",
            1,
            "no config.learning_rte; did you mean config.learn",
        ),
        ("zzz", 1, "There is no config.zzz; configs/defaults.py has all"),
        ("epochs", None, "epochs must be of type float; got None."),
        ("model", 5, "model must be of type str; got 5."),
        ("nesterov", 1, "nesterov must be of type bool; got 1."),
        ("boundaries", 5, "boundaries must be a tuple; got 5."),
        ("boundaries", (1.5,), "every entry of boundaries must be of type int"),
        ("norm_options", 5, "norm_options must be a ConfigDict; got 5."),
    ],
)
def test_other_fields(name, value, message):
    config = changed(digits.get_config(), name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        config_checks.check_fields(config)


def test_a_field_that_is_gone():
    config = digits.get_config()
    del config.norm_options.ddof
    with pytest.raises(UserError, match="The config has no norm_options.ddof"):
        config_checks.check_fields(config)


FILES = {
    "def get_config(:\n": r"\.py, line 1: SyntaxError: ",
    "def get_config():\npass\n": r"\.py, line 2: IndentationError: ",
    "x = 1\n": r"\.py defines no function get_config\(\); see",
    "get_config = 5\n": r"\.py defines no function get_config\(\)",
    "def get_config():\n\n    return 1 / 0\n": (
        r"\.py, line 3: ZeroDivisionError: division by zero\.$"
    ),
    "import nothing_there\n": r"\.py, line 1: ModuleNotFoundError: No module",
    "def get_config():\n    raise OSError('a\\n  b')\n": (
        r"\.py, line 2: OSError: a b\.$"
    ),
    "import sys\nsys.exit(3)\n": r"\.py, line 2: SystemExit: 3\.$",
    "def get_config():\n    return get_config()\n": r"line 2: RecursionError: ",
    "def get_config():\n    pass\n": (
        r"get_config\(\) must return a ConfigDict; got NoneType"
    ),
    "from ml_collections import FrozenConfigDict\n"
    "def get_config():\n"
    "    return FrozenConfigDict()\n": r"ConfigDict; got FrozenConfigDict",
    "from ml_collections import ConfigDict, config_dict\n"
    "def get_config():\n"
    "    return ConfigDict({'a': config_dict.required_placeholder(int)})\n": (
        r"required_placeholder field has no value; set it in the file"
    ),
    "class Odd(Exception):\n"
    "    def __str__(self): return 1 / 0\n"
    "raise Odd\n": r"\.py, line 3: Odd\.$",
    "def get_config(word):\n    pass\n": (
        r"cannot be called: missing a required argument: 'word'; give --config="
    ),
    "x = 1\0\n": r"\.py(, line 1)?: (Syntax|Value)Error: ",
    "from configs import digits\n"
    "def get_config():\n"
    "    config = digits.get_config()\n"
    "    config.batch_size = 'abc'\n"
    "    return config\n": r"\.py, line 4: TypeError: ",
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_config_files_say_where(text, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=FILES[text]) as caught:
        config_files.check(str(path))
    assert "\n" not in str(caught.value)


def test_config_files_that_do_not_do_the_same_again(parse, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import pathlib\n"
        "pathlib.Path(__file__).with_suffix('.ran').mkdir()\n"
        "from configs.digits import get_config\n"
    )
    with pytest.raises(UserError, match="the same each .*File exists") as e:
        parse(f"--config={path}")
    assert "Traceback" not in str(e.value)


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "GeneratorExit"])
def test_config_files_that_raise_what_is_no_exception(name, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"def get_config():\n    raise {name}\n")
    # As `python -m train` does: Ctrl-C raises nothing there.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with pytest.raises(UserError, match=rf"\.py, line 2: {name}\.$"):
            config_files.check(str(path))
        if name == "KeyboardInterrupt":  # may be that of a program it ends
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with pytest.raises(KeyboardInterrupt):
                config_files.check(str(path))
    finally:
        signal.signal(signal.SIGINT, before)


def test_config_files_that_are_none(tmp_path):
    def refused(message, given):
        with pytest.raises(UserError, match=re.escape(message)):
            config_files.check(given)

    refused(
        "There is no file nowhere.py; configs/ holds cifar10_94.py",
        "nowhere.py",
    )
    refused("is not a file; configs/ holds", str(tmp_path))
    refused(
        "get_config() takes no argument after the colon; got 'x'", here(":x")
    )
    other = tmp_path / "other.py"
    other.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'zzz': 1})\n"
    )
    refused("The config has no affine_lr_multiplier; build it on", str(other))


def here(after=""):
    return digits.__file__ + after


@pytest.fixture
def parse(monkeypatch):
    """Parses arguments; the flags go again."""
    before = {*flags.FLAGS}

    def parse(*arguments):
        argv = ["train", *arguments]
        monkeypatch.setattr("sys.argv", argv)
        try:
            config = command_line.parse(
                argv,
                doc="",
                default="digits.py",
                define=lambda: flags.DEFINE_string("workdir", None, ""),
            )
            return config, flags.FLAGS.workdir
        finally:
            for name in {*flags.FLAGS} - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()

    return parse


def test_a_flag_given_twice_counts_the_last_time(parse):
    config, _ = parse(
        "--config.boundaries=(1, 2)",
        "--config.epochs=3",
        "--config.boundaries",
        "(7, 9)",
        "--config.epochs=4",
    )
    assert config.boundaries == (7, 9) and config.epochs == 4
    config, _ = parse("--config.boundaries", "(5,)", "--noconfig.nesterov")
    assert config.boundaries == (5,) and not config.nesterov


def test_home_is_expanded(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/some/where")
    assert parse("--workdir=~/run")[1] == "/some/where/run"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--epochs=3"],
            "There is no --epochs; did you mean --config.epochs=3?",
        ),
        (
            ["--normalize_over=8"],
            "did you mean --config.norm_options.normalize_over=8?",
        ),
        (["--batch-size=8"], "did you mean --config.batch_size=8?"),
        (["--config.momentum=2"], "momentum must be in [0, 1); got 2.0."),
        (["--config.boundaries=abc"], "every entry of boundaries must be of "),
        (["--config.boundaries=(1,"], "--config.boundaries=(1,: "),
        (["--config.norm_epsilon=inf"], "norm_epsilon must be in (0, 1]; got"),
        (["--config.cpu_devices=100000"], "cpu_devices must be in [1, 512]"),
        (["--config.depth=99999999999998"], "depth must be in [1, 2000]"),
        (["--config.zzz=1"], "There is no config.zzz; configs/defaults.py has"),
        (
            ["--noconfig.nesterov=3"],
            "--noconfig.nesterov=3 does not take an argument",
        ),
        (["--config.=1"], "There is no config.; --help lists all."),
        (["--config...=1"], "There is no config...; --help lists all."),
        (["--config.norm_options.zzz=1"], "There is no config.zzz"),
        (["--config="], "--config= is not a file; configs/ holds"),
        (["--config"], "Missing value for flag --config"),
        (["--config=nowhere.py"], "There is no file nowhere.py"),
        (["--flagfile=/nowhere"], "/nowhere"),
        (["--workdir="], "--workdir= is empty"),
        (["--workdir=a[1]"], "'[' in "),
        (["--workdir=a*"], "'*' in "),
        (["--workdir=a\\b"], "Use another --workdir, without any of"),
        (["--workdir=gs://bucket/run"], "is a URL. Mount the storage"),
        (["--workdir=a\nb"], "contains unprintable characters"),
        (["--workdir=a\udcff"], "contains unprintable characters"),
        (["--workdir=~nobody-here/x"], "home directory"),
    ],
    ids=str,
)
def test_command_lines(arguments, message, parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"warmup_epochs": 99.0},
            "warmup_epochs=99 must not exceed epochs=20",
        ),
        (
            {"boundaries": (5, 2)},
            "boundaries=(5, 2) must be strictly increasing",
        ),
        (
            {"boundaries": (5, 5)},
            "boundaries=(5, 5) must be strictly increasing",
        ),
        (
            {"seed": 2147483647, "num_seeds": 2},
            "seed=2147483647 with num_seeds=2 ends at 2147483648",
        ),
    ],
    ids=str,
)
def test_what_fields_ask_of_each_other(changes, message):
    from train import recipe

    config = digits.get_config()
    config.update(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.check_config(config)


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "zzz",
            1,
            "norm_options.zzz is not an option of jaxbn.linen.BatchNorm.",
        ),
        ("axis_name", "x", "norm_options.axis_name must not be set"),
        ("normalize_over", "x", "norm='jaxbn': "),
    ],
)
def test_options_of_the_layer(name, value, message):
    config = digits.get_config()
    with config.norm_options.ignore_type():
        config.norm_options[name] = value
    topology = make_topology("data", config.batch_size)
    with pytest.raises(UserError, match=re.escape(message)):
        make_norm(config, topology)
