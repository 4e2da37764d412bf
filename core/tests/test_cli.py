"""The command line: what it prints, its exit codes, that a user's mistake has no traceback, and that it is quick."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hooktuner
import pytest
from hooktuner import cli
from hooktuner.errors import TrainingError

WriteConfig = Callable[..., str]
BROKEN = "import not_there"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def tuner(capsys: pytest.CaptureFixture[str], shelf: Any) -> Callable[..., Outcome]:
    """Run `tuner` with arguments, in this process."""

    def run(*arguments: str) -> Outcome:
        code = 0
        try:
            cli.main(list(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        caught = capsys.readouterr()
        return Outcome(code, caught.out, caught.err)

    return run


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the training itself, and keeps what it was asked."""
    import types

    asked: dict[str, Any] = {}

    def run(config: str, plugins: Any = (), flags: Any = (), *, dry_run: bool = False) -> None:
        asked.update(config=config, plugins=list(plugins), flags=list(flags), dry_run=dry_run)
        if "raises" in asked:
            raise asked["raises"]

    module = types.ModuleType("hooktuner.story")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hooktuner.story", module)
    return asked


# ------------------------------------------------------------------------------------------------------ tuner run


@pytest.mark.parametrize(
    ("words", "plugins", "flags", "dry"),
    [
        (["config.json"], [], [], False),
        (["--plugin", "films", "config.json", "--enable_group_offload"], ["films"], ["--enable_group_offload"], False),
        (["config.json", "--plugin", "a", "--seed", "3", "--plugin=b"], ["a", "b"], ["--seed", "3"], False),
        (
            ["config.json", "--a=b=c", "--dry-run", "--prompt", "two words"],
            [],
            ["--a=b=c", "--prompt", "two words"],
            True,
        ),
        (["config.json", "--shift", "-2"], [], ["--shift", "-2"], False),
    ],
)
def test_run_passes_flags_on(
    tuner: Any, story: dict[str, Any], words: list[str], plugins: list[str], flags: list[str], dry: bool
) -> None:
    assert tuner("run", *words).code == 0
    assert story == {"config": "config.json", "plugins": plugins, "flags": flags, "dry_run": dry}


@pytest.mark.parametrize(("words", "place"), [([], "here"), (["--seed", "3"], "before --seed")])
def test_run_without_a_config(tuner: Any, story: dict[str, Any], words: list[str], place: str) -> None:
    outcome = tuner("run", *words)
    assert outcome.code == 2
    assert f"the path of a config file is expected {place}; flags come after it" in outcome.err
    assert story == {}


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (hooktuner.ConfigError(hooktuner.Problem("a", "b")), 2, "a — b.\n"),
        (TrainingError("step 3 — exploded."), 1, "step 3 — exploded.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_deliberate_errors_have_no_traceback(
    tuner: Any, story: dict[str, Any], raised: BaseException, code: int, text: str
) -> None:
    story["raises"] = raised
    outcome = tuner("run", "config.json")
    assert outcome.code == code
    assert outcome.err.strip() == text.strip()


def test_a_bug_keeps_its_traceback(tuner: Any, story: dict[str, Any]) -> None:
    story["raises"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        tuner("run", "config.json")


def test_an_unknown_command(tuner: Any) -> None:
    outcome = tuner("rnu", "config.json")
    assert outcome.code == 2
    assert "No such command 'rnu'" in outcome.err


def test_the_version(tuner: Any) -> None:
    assert tuner("--version").out == f"hooktuner, version {hooktuner.__version__}\n"


# --------------------------------------------------------------------------------------------------- tuner plugins


def test_the_list_of_plugins(tuner: Any, shelf: Any) -> None:
    shelf.family()
    shelf.technique(version="2.1")
    shelf.add("alpha", BROKEN, "Alpha")
    shelf.technique("twin")
    shelf.technique("twin", distribution="other-twin")
    entry = {"distribution": "hooktuner-song", "kind": "technique", "summary": "Sings."}
    shelf.catalogue({"song": entry, "echo": {**entry, "distribution": "hooktuner-echo"}})
    rows = {(row["name"], row["distribution"]): row for row in json.loads(tuner("plugins", "--json").out)}
    assert list(rows) == [
        ("alpha", "hooktuner-alpha"),
        ("echo", "hooktuner-echo"),
        ("films", "hooktuner-films"),
        ("twin", "hooktuner-twin"),
        ("twin", "other-twin"),
        ("song", "hooktuner-song"),
    ]
    echo = rows["echo", "hooktuner-echo"]
    assert (echo["kind"], echo["version"], echo["status"], echo["installed"]) == ("technique", "2.1", "ok", True)
    assert echo["hooks"] == ["on_event", "options"]
    assert rows["films", "hooktuner-films"]["kind"] == "family"
    assert rows["alpha", "hooktuner-alpha"]["status"] == (
        "cannot be used: cannot be imported: ModuleNotFoundError: No module named 'not_there'. Reinstall or update "
        "hooktuner-alpha, or run without it."
    )
    assert rows["twin", "other-twin"]["status"].startswith("cannot be used: two installed distributions provide")
    assert rows["song", "hooktuner-song"]["status"] == "not installed: pip install hooktuner-song"
    assert rows["song", "hooktuner-song"]["installed"] is False
    table = tuner("plugins")
    assert table.code == 0
    for word in ("alpha", "echo", "films", "song", "2.1", "technique", "predict", "pip install hooktuner-song"):
        assert word in table.out


def test_the_list_survives_any_plugin(tuner: Any, shelf: Any) -> None:
    shelf.add("odd", "from hooktuner import hookimpl\nclass Odd:\n    @hookimpl\n    def options(self): 1 / 0\n", "Odd")
    [row] = json.loads(tuner("plugins", "--json").out)
    assert row["status"] == "cannot be used: division by zero"


def test_no_plugins_at_all(tuner: Any) -> None:
    assert tuner("plugins").out == ("No plugin is installed. A run needs a model family: pip install hooktuner-NAME.\n")


def test_show_a_family(tuner: Any, shelf: Any) -> None:
    shelf.family()
    about = json.loads(tuner("plugins", "show", "films_old", "--json").out)
    assert about["flavours"] == {"small": "a small one", "first-frame": "starts from a frame", "built": "made here"}
    assert about["aliases"] == ["films-old"]
    assert about["offers"] == ["blocks", "frames"]
    assert [key["name"] for key in about["keys"]] == ["films_tiling", "films_margin"]
    text = tuner("plugins", "show", "films").out
    for words in ("films (hooktuner-films 0.1.0)", "A model family for tests.", "first-frame", "Overlap of tiles"):
        assert words in text


def test_show_a_technique_and_its_needs(tuner: Any, shelf: Any) -> None:
    shelf.technique(needs=("blocks",))
    assert json.loads(tuner("plugins", "show", "echo", "--json").out)["needs"] == ["blocks"]


def test_show_what_is_broken_or_missing(tuner: Any, shelf: Any) -> None:
    shelf.add("alpha", BROKEN, "Alpha")
    broken = tuner("plugins", "show", "alpha")
    assert broken.code == 2
    assert "cannot be imported: ModuleNotFoundError" in broken.err
    missing = tuner("plugins", "show", "alpah")
    assert (missing.code, missing.err) == (
        2,
        'alpah — no plugin of this name is installed. Did you mean "alpha"? Installed: alpha.\n',
    )


# ---------------------------------------------------------------------------------------------------- tuner config


def test_check_says_good(tuner: Any, shelf: Any, write_config: WriteConfig) -> None:
    shelf.family()
    outcome = tuner("config", "check", write_config(validation_resolution="480x854"), "--seed", "7")
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("config.json: good.", "films small (owner/small)", "10 steps", "seed 7", "becomes 480x848"):
        assert words in outcome.out


def test_check_prints_every_problem(tuner: Any, shelf: Any, write_config: WriteConfig) -> None:
    shelf.family()
    outcome = tuner("config", "check", write_config(learning_rte=1, seed="x"))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        'config.json: seed — must be a whole number, not "x".\n'
        'config.json: learning_rte — unknown option. Did you mean "learning_rate"?\n'
    )


def test_show_a_config(tuner: Any, shelf: Any, write_config: WriteConfig) -> None:
    shelf.family()
    path = write_config(films_margin=3)
    lines = [" ".join(line.split()) for line in tuner("config", "show", path, "--lora_rank", "8").out.splitlines()]
    assert "lora_rank 8 flag" in lines
    assert "films_margin 3 config.json" in lines
    assert "frame_rate 24.0 default of films" in lines
    assert "learning_rate 0.0001 default" in lines
    flat = json.loads(tuner("config", "show", path, "--json").out)
    assert flat["films_margin"] == 3
    assert flat["max_train_steps"] == 10


def test_the_schema(tuner: Any, shelf: Any) -> None:
    shelf.family()
    shelf.technique()
    shelf.add("alpha", BROKEN, "Alpha")
    schema = json.loads(tuner("config", "schema").out)
    assert {"films_margin", "echo_weight", "learning_rate", "framerate"} <= set(schema["properties"])
    chosen = json.loads(tuner("config", "schema", "--plugin", "films").out)["properties"]
    assert "films_margin" in chosen
    assert "echo_weight" not in chosen
    assert tuner("config", "schema", "--plugin", "alpha").code == 2


@pytest.mark.parametrize("typed", ["frame_rate", "--frame-rate", "framerate"])
def test_explain_a_key_of_core(tuner: Any, typed: str) -> None:
    out = tuner("config", "explain", typed).out
    for words in ("frame_rate", "Frames per second", "number, above 0", "the family's", "hooktuner", "framerate"):
        assert words in out


def test_explain_a_key_of_a_plugin(tuner: Any, shelf: Any) -> None:
    shelf.family()
    out = tuner("config", "explain", "films_margin").out
    for words in ("Overlap of tiles in pixels.", "whole number, at least 0", "8", "hooktuner-films 0.1.0"):
        assert words in out


def test_explain_a_typo(tuner: Any) -> None:
    outcome = tuner("config", "explain", "frame_rat")
    assert (outcome.code, outcome.err) == (2, 'frame_rat — unknown option. Did you mean "frame_rate"?\n')


# ------------------------------------------------------------------------------------------------ plugins' commands


COMMAND = '''
import click
from hooktuner import hookimpl

class Plugin:
    @hookimpl
    def commands(self, group):
        @group.command("NAME")
        def command():
            """Do what PLUGIN does."""
            click.echo("done by PLUGIN")
'''


def test_commands_of_plugins(tuner: Any, shelf: Any) -> None:
    shelf.add("alpha", BROKEN, "Alpha")
    shelf.add("bee", COMMAND.replace("NAME", "hum").replace("PLUGIN", "bee"), "Plugin")
    shelf.add("cat", COMMAND.replace("NAME", "run").replace("PLUGIN", "cat"), "Plugin")
    assert tuner("hum").out == "done by bee\n"
    outcome = tuner("--help")
    assert outcome.code == 0
    assert "Do what bee does." in outcome.out
    assert "Train as a config file says." in outcome.out
    assert "note: alpha (hooktuner-alpha 0.1.0, hooktuner_alpha:Alpha) — cannot be imported" in outcome.err
    assert "note: cat (hooktuner-cat 0.1.0) — its command run is left out: the name is taken." in outcome.err


# ---------------------------------------------------------------------------------------------------------- speed


HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "av")
PROBE = f"""
import sys
from hooktuner.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("words", [["--help"], ["plugins"], ["config", "explain", "seed"], ["config", "schema"]])
def test_light_commands_stay_light(words: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_checking_a_config_stays_light(shelf: Any, write_config: WriteConfig) -> None:
    shelf.family()
    environment = {**os.environ, "PYTHONPATH": str(shelf.folders[0])}
    command = [sys.executable, "-c", PROBE, "config", "check", write_config()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=Path.cwd())
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("words", ["--help", "plugins"])
def test_it_answers_at_once(tmp_path: Path, words: str) -> None:
    """Under half a second of processor time (wall time says more about what else the machine is doing)."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROBE, words]
    subprocess.run(command, check=True, capture_output=True, env=environment)  # compiles
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5
