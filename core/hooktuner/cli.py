"""The command `tuner`. Heavy imports happen inside commands, so that `tuner --help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

import hooktuner
from hooktuner.errors import ConfigError, HooktunerError, Problem, did_you_mean

if TYPE_CHECKING:
    from hooktuner.draft import Draft

INTERRUPTED = 130
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


class TunerGroup(click.Group):
    """The commands of core, and those that installed plugins add (hook `commands`)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's commands in the order they were defined, then plugins'."""
        added, notes = _plugin_commands(tuple(self.commands))
        for note in notes:
            click.echo(f"note: {note}", err=True)
        return [*self.commands, *added]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command of core, or else of a plugin."""
        own = self.commands.get(cmd_name)
        return own or _plugin_commands(tuple(self.commands))[0].get(cmd_name)


def _plugin_commands(taken: Sequence[str]) -> tuple[dict[str, click.Command], list[str]]:
    """(commands that installed plugins add, notes on plugins that cannot). A broken plugin harms nothing."""
    from hooktuner.discovery import HookCall, installed_plugins

    commands: dict[str, click.Command] = {}
    notes: list[str] = []
    for plugin in installed_plugins():
        group = click.Group(plugin.name)
        try:
            if "commands" in plugin.implementations:
                HookCall(plugin, "commands", plugin.implementations["commands"])({"group": group})
        except Exception as failure:
            notes.append(str(failure) if isinstance(failure, HooktunerError) else f"{plugin.name}: {failure}")
        for name, command in group.commands.items():
            if name in taken or name in commands:
                notes.append(f"{plugin.name} ({plugin.origin}) — its command {name} is left out: the name is taken.")
            else:
                commands[name] = command
    return commands, notes


@click.group(cls=TunerGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(hooktuner.__version__, prog_name="hooktuner")
def cli() -> None:
    """Fine-tune diffusion transformers for image and video."""


def _with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="CONFIG [--KEY VALUE]...")(command)
    return click.option("--plugin", "plugins", multiple=True, metavar="NAME", help="Activate a plugin; repeatable.")(
        command
    )


def _draft(words: Sequence[str], plugins: Sequence[str]) -> Draft:
    """The draft of `CONFIG --key value …`."""
    from hooktuner.draft import read_draft

    if not words or words[0].startswith("-"):
        given = f"before {words[0]}" if words else "here"
        raise click.UsageError(f"the path of a config file is expected {given}; flags come after it")
    return read_draft(words[0], words[1:], plugins)


# ------------------------------------------------------------------------------------------------------- tuner run


@cli.command(context_settings=_PASS_ON)
@click.option("--dry-run", is_flag=True, help="Stop after the plan: nothing is loaded or trained.")
@_with_config
def run(words: tuple[str, ...], plugins: tuple[str, ...], dry_run: bool) -> None:
    """Train as a config file says.

    CONFIG is a JSON file. Every config key is also a flag, and flags override the file: --max_train_steps 100.
    `tuner config explain KEY` describes a key.
    """
    if not words or words[0].startswith("-"):
        _draft(words, plugins)
    from hooktuner.story import run as run_it

    run_it(words[0], plugins=plugins, flags=words[1:], dry_run=dry_run)


# --------------------------------------------------------------------------------------------------- tuner plugins


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List plugins: what is installed, what it does, and what could be installed."""
    if ctx.invoked_subcommand is None:
        from hooktuner.listing import list_plugins

        list_plugins(as_json=as_json)


@plugins.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_plugin(name: str, as_json: bool) -> None:
    """Describe one plugin: hooks, config keys, flavours."""
    from hooktuner.listing import show_plugin as show

    show(name, as_json=as_json)


# ---------------------------------------------------------------------------------------------------- tuner config


@cli.group()
def config() -> None:
    """Check and explain configs."""


@config.command(context_settings=_PASS_ON)
@_with_config
def check(words: tuple[str, ...], plugins: tuple[str, ...]) -> None:
    """Check a config and its datasets file, and print every problem at once. Nothing is loaded."""
    from hooktuner.assemble import assemble
    from hooktuner.report import Reporter, report_plan

    assembled = assemble(_draft(words, plugins))
    reporter = Reporter()
    reporter.line(f"{words[0]}: good.")
    report_plan(assembled, reporter)
    assembled.close()


@config.command(context_settings=_PASS_ON)
@click.option("--json", "as_json", is_flag=True, help="Print the flat JSON object of `config.resolved.json`.")
@_with_config
def show(words: tuple[str, ...], plugins: tuple[str, ...], as_json: bool) -> None:
    """Print the complete config: every key, its value, and where the value comes from."""
    from hooktuner.assemble import assemble, resolved
    from hooktuner.report import Reporter

    assembled = assemble(_draft(words, plugins), with_datasets=False)
    values = resolved(assembled.run)
    if as_json:
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        rows = [
            (key, json.dumps(value, ensure_ascii=False), assembled.origins[key])
            for key, value in values.items()
            if value is not None
        ]
        Reporter().table(("key", "value", "from"), rows)
    assembled.close()


@config.command()
@click.option("--plugin", "plugins", multiple=True, metavar="NAME", help="Only core and these; default: all installed.")
def schema(plugins: tuple[str, ...]) -> None:
    """Print the JSON Schema of the config."""
    from hooktuner.config import RunConfig
    from hooktuner.keys import json_schema
    from hooktuner.listing import option_models

    models = [model for _, model in option_models(plugins)]
    click.echo(json.dumps(json_schema([RunConfig, *models]), indent=2, ensure_ascii=False))


@config.command(context_settings={"ignore_unknown_options": True})
@click.argument("key")
def explain(key: str) -> None:
    """Describe one config key: type, default, meaning, owner, other spellings."""
    from hooktuner.draft import canonical
    from hooktuner.listing import all_keys
    from hooktuner.report import Reporter

    known = {entry.name: entry for entry in all_keys()}
    wanted = canonical(key)
    if wanted not in known:
        guess = did_you_mean(wanted, known) or "`tuner config schema` lists every option."
        raise ConfigError(Problem(key, "unknown option", guess))
    found = known[wanted]
    reporter = Reporter()
    reporter.section(found.name)
    reporter.line(found.description)
    rows = [("type", found.type), ("default", found.default), ("owner", found.owner)]
    if found.aliases:
        rows.append(("other spellings", ", ".join(found.aliases)))
    reporter.table(("", ""), rows)


# ------------------------------------------------------------------------------------------------------------ main


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. A mistake of the user's ends with its exit code and without a traceback."""
    try:
        cli.main(args=arguments, prog_name="tuner", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except HooktunerError as error:
        click.echo(str(error), err=True)
        sys.exit(error.exit_code)
