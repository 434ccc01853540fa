"""Write the generated parts of docs/reference.md from the code: commands, settings, TRL's names, rewards, gym tasks.

    python scripts/make_reference.py

A part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; everything else in the file is written by hand.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import typer.main
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from strop.cli import app
from strop.config import Config
from strop.config_load import NOT_OURS, TRL_NAMES
from strop.rewards.library import LIBRARY
from strop.tasks.gym import ALLOWED

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def commands() -> Iterator[str]:
    """Yield each command with its arguments and options."""
    for name, command in every_command(typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        yield f"### `strop {' '.join([name, *(p.name.upper() for p in arguments)])}`"
        yield ""
        yield command.help
        yield ""
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            shown = parameter.opts[0] if is_option else parameter.name.upper()
            value = "" if not is_option or parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
            yield f"- `{shown}{value}`: {parameter.help}"
        if command.params:
            yield ""


def every_command(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and command of a group, `rewards check` for one of a group within it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def settings() -> Iterator[str]:
    """Yield a table for each section of the config."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type), f"{name} is no section"
        assert issubclass(section, BaseModel), f"{name} is no section"
        yield f"### `{name}`"
        yield ""
        yield first_line(section.__doc__)
        yield ""
        yield "| setting | type | default | meaning |"
        yield "|---|---|---|---|"
        for key, setting in section.model_fields.items():
            default = setting.get_default(call_default_factory=True)
            cells = (f"`{name}.{key}`", type_of(setting), f"`{as_yaml(default)}`", one_line(setting.description))
            yield f"| {' | '.join(cells)} |"
        yield ""


def type_of(field: FieldInfo) -> str:
    """Return what a setting takes, in words, with its bounds."""
    bounds = [
        f"{words} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, words in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([in_words(field.annotation), *bounds])


def in_words(annotation: Any) -> str:
    """Return a type in words."""
    plain: Mapping[Any, str] = {
        str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null",
    }  # fmt: skip
    if annotation in plain:
        return plain[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(in_words(arg) for arg in args)
    if origin is tuple:
        return f"list of {in_words(args[0])}{'s' if args[0] is float else ''}"
    if origin is dict:
        return "mapping"
    raise TypeError(f"{annotation} has no words yet; add them here")


def as_yaml(value: Any) -> str:
    """Return a default as it is written in a config."""
    listed = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(listed, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def trl_names() -> Iterator[str]:
    """Yield the table of TRL's flat names."""
    yield "| flat name | setting |"
    yield "|---|---|"
    yield from (f"| `{flat}` | `{ours}` |" for flat, ours in TRL_NAMES.items())


def not_ours() -> Iterator[str]:
    """Yield the table of TRL's names that are refused."""
    yield "| name | instead |"
    yield "|---|---|"
    yield from (f"| `{name}` | {one_line(advice)} |" for name, advice in NOT_OURS.items())


def rewards() -> Iterator[str]:
    """Yield the built-in rewards with the first paragraph of what they say about themselves."""
    yield "| name | gives |"
    yield "|---|---|"
    seen: dict[Callable[..., Any], str] = {}
    for name, function in LIBRARY.items():
        paragraph = (function.__doc__ or "").partition("\n\n")[0]
        yield f"| `{name}` | {f'the same as `{seen[function]}`' if function in seen else one_line(paragraph)} |"
        seen.setdefault(function, name)


def gym() -> Iterator[str]:
    """Yield the allowed data sets of reasoning-gym."""
    yield ", ".join(f"`{name}`" for name in ALLOWED)


def first_line(docstring: str | None) -> str:
    """Return the first line of a docstring."""
    return (docstring or "").strip().partition("\n")[0]


def one_line(text: str | None) -> str:
    """Return a text that fits into a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


PARTS: Mapping[str, Callable[[], Iterator[str]]] = {
    "commands": commands,
    "settings": settings,
    "trl names": trl_names,
    "not ours": not_ours,
    "rewards": rewards,
    "gym": gym,
}


def make(text: str) -> str:
    """Return the text of the reference with every generated part brought up to date.

    Raises ValueError when the marks of a part are missing.
    """
    for name, part in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        found = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(found.findall(text)) != 1:
            raise ValueError(f"docs/reference.md needs `{begin}` and `{end}`, once each")
        body = "\n".join(part()).rstrip()
        text = found.sub(lambda _, new=f"{begin}\n\n{body}\n\n{end}": new, text)
    return text


if __name__ == "__main__":
    REFERENCE.write_text(make(REFERENCE.read_text(encoding="utf-8")), encoding="utf-8")
