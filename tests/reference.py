"""The text of docs/reference.md, made from the code. `python -m tests.reference --write` writes the file anew.

Commands, config keys, methods, sites, figures and errors: every list here is read from the objects that the program
itself uses, and what stands behind a config key is the comment behind its field.
"""

import ast
import datetime
import inspect
import io
import json
import sys
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from typer import Typer
from typer.utils import get_params_from_function

import harvest.cli
import shared.errors
import train.cli
from harvest.config import HarvestConfig
from shared import hooks
from shared.config import Config
from train import measure, method
from train.config import SweepConfig, TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
APPS: dict[str, Typer] = {"harvest": harvest.cli.app, "train": train.cli.app}


class FileConfig(TrainConfig):
    """What a config file may hold: a run, or several."""

    sweep: SweepConfig = SweepConfig()


CONFIGS: dict[str, type[Config]] = {"harvest": HarvestConfig, "train": FileConfig}

WORDS: dict[Any, str] = {
    str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", types.NoneType: "none",
    datetime.date: "date", Any: "any value",
}  # fmt: skip
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}

SITES = {
    "resid": "output of block N: the residual stream behind it",
    "resid_in": "input of block N: the residual stream before it",
    "mlp_in": "input of the MLP of block N, behind the norm before it",
    "mlp_out": "output of the MLP of block N, before any norm behind it and before the sum",
    "attn_out": "output of the attention of block N, before any norm behind it and before the sum",
    "heads": "input of the output projection of the attention of block N: what each head gives, head after head",
}

HEAD = """\
# Reference

<!-- Made from the code by `python -m tests.reference --write`. Change the code, not this page. -->

[Commands](#commands) · [Config of harvest](#config-of-harvest) · [Config of train](#config-of-train) ·
[Methods](#methods) · [Sites](#sites) · [Figures](#figures) · [Errors](#errors)"""

COMMANDS = """\
## Commands

Exit codes: 0 done, 1 a fault in data or in a run, 2 a wrong call, 130 and 143 stopped by SIGINT and SIGTERM.
Results go to stdout, everything else to stderr."""

KEYS = """\
Every key can stand in the TOML file and be given by `--set KEY=VALUE`. A `*` is a name of your own."""


@dataclass(frozen=True)
class Parameter:
    """An argument (`CACHE`) or an option (`--store`) of a command."""

    names: tuple[str, ...]
    type: str
    default: str
    help: str
    argument: bool
    flag: bool  # an option without a value

    @property
    def required(self) -> bool:
        return self.default == "required"


@dataclass(frozen=True)
class Command:
    """A command, `harvest run`; `help` is without its example."""

    name: str
    help: str
    example: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Key:
    """A key of a config; `key` is dotted from the top."""

    key: str
    type: str
    default: str
    comment: str


def commands() -> dict[str, Command]:
    """Every command of both programs by its full name, in the order of their definition."""
    found = {}
    for program, app in APPS.items():
        for info in app.registered_commands:
            assert info.callback is not None
            name = f"{program} {info.name or info.callback.__name__.replace('_', '-')}"
            text, _, example = (info.help or inspect.getdoc(info.callback) or "").partition("Example:")
            found[name] = Command(name, " ".join(text.split()), " ".join(example.split()), _parameters(info.callback))
    return found


def _parameters(callback: Any) -> tuple[Parameter, ...]:
    return tuple(
        _parameter(name, one.annotation, one.default) for name, one in get_params_from_function(callback).items()
    )


def _parameter(name: str, annotation: Any, info: Any) -> Parameter:
    argument = type(info).__name__ == "ArgumentInfo"
    flag = annotation is bool
    several = get_origin(_without_none(annotation)) is list
    kind = "flag" if flag else spelled(_without_none(annotation))
    if several:
        kind = kind.removeprefix("list of ") + ", repeatable"
    required = info.default is ... or (info.default is None and argument)
    default = "required" if required else _default(info.default)
    names = info.param_decls or ([name.upper()] if argument else [f"--{name.replace('_', '-')}"])
    return Parameter(
        tuple(names), kind, "" if default in ("none", "false") else default, info.help or "", argument, flag
    )


def _without_none(annotation: Any) -> Any:
    inner = [one for one in get_args(annotation) if one is not types.NoneType]
    return inner[0] if _is_union(annotation) and len(inner) == 1 else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def spelled(annotation: Any) -> str:
    """A type in words: `list[str] | None` is "list of text or none"."""
    inner = get_args(annotation)
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(spelled(one) for one in inner))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{json.dumps(one)}`" for one in inner)
    if get_origin(annotation) is list:
        return f"list of {spelled(inner[0])}"
    if get_origin(annotation) is dict:
        return f"table of {spelled(inner[1])}"
    return WORDS[annotation]


def _default(value: Any) -> str:
    return "none" if value is None else json.dumps(value, default=str)


def inner_config(annotation: Any) -> type[Config] | None:
    """The config that a key holds, as a table or as a table of tables."""
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and not get_args(one) and issubclass(one, Config):
            return one
    return None


def tables(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, type[Config], list[Key]]]:
    """(dotted table, its config, its own keys), outer tables first. A method's keys are its own matter."""
    notes, keys, deeper = comments(kind), [], []
    for name, field in kind.model_fields.items():
        inner = inner_config(field.annotation)
        if inner is None:
            keys.append(Key(prefix + name, bounded(field), default_of(field), notes.get(name, "")))
        elif inner is method.MethodConfig:
            keys.append(Key(f"{prefix}{name}.name", "text", "required", "one of the [methods](#methods)"))
        else:
            several = get_origin(field.annotation) in (dict, list)
            deeper.append((f"{prefix}{name}{'.*' if several else ''}", inner))
    yield prefix.removesuffix("."), kind, keys
    for table, inner in deeper:
        yield from tables(inner, f"{table}.")


def keys(program: str) -> list[Key]:
    """Every key of a program's config, without those of methods."""
    return [key for _, _, table in tables(CONFIGS[program]) for key in table]


def method_keys(name: str) -> list[Key]:
    """The keys of a method beside its name."""
    [(_, _, found)] = tables(method.find(name), "method.")
    return [key for key in found if key.key != "method.name"]


def bounded(field: FieldInfo) -> str:
    """The type of a field with its bounds: "integer or none, ≥ 1"."""
    limits = [
        f"{sign} {getattr(one, name):g}"
        for one in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(one, name, None) is not None
    ]
    return ", ".join([spelled(field.annotation), *limits])


def default_of(field: FieldInfo) -> str:
    return "required" if field.is_required() else _default(field.get_default(call_default_factory=True))


def comments(kind: type[Config]) -> dict[str, str]:
    """{field: the comment behind it}, those of the classes above included."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if issubclass(one, Config) and one is not Config:
            found |= _own_comments(inspect.getsource(one))
    return found


def _own_comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    at = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    [parsed] = ast.parse(source).body
    assert isinstance(parsed, ast.ClassDef)
    return {
        ast.unparse(node.target): " ".join(at[line] for line in range(node.lineno, node.end_lineno + 1) if line in at)
        for node in parsed.body
        if isinstance(node, ast.AnnAssign) and node.end_lineno is not None
    }


def errors() -> list[type[shared.errors.GranaryError]]:
    """Every class of error, in the order of shared/errors.py."""
    base = shared.errors.GranaryError
    return [one for one in vars(shared.errors).values() if isinstance(one, type) and issubclass(one, base)]


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)]


def _code(text: str) -> str:
    """A value as code; words that are no values stand plain."""
    return text if text in ("", "required", "none") else f"`{text}`"


def _commands() -> Iterator[str]:
    yield COMMANDS
    for command in commands().values():
        arguments = " ".join(one.names[0] for one in command.parameters if one.argument)
        yield f"\n### {command.name}\n\n{command.help}\n"
        yield f"```sh\n{command.name} {arguments}".rstrip() + f" [OPTIONS]\n{command.example}\n```\n"
        rows = [[", ".join(f"`{name}`" for name in one.names), one.type, _code(one.default), one.help]
                for one in command.parameters]  # fmt: skip
        yield from _table(["argument or option", "type", "default", ""], rows)


def _keys(found: list[Key]) -> list[str]:
    rows = [[f"`{key.key}`", key.type, _code(key.default), key.comment] for key in found]
    return _table(["key", "type", "default", ""], rows)


def _config(program: str) -> Iterator[str]:
    yield f"\n## Config of {program}\n\n{KEYS}"
    for table, kind, found in tables(CONFIGS[program]):
        if table:
            yield f"\n### [{table}]"
        yield f"\n{(kind.__doc__ or '').strip()}\n"
        yield from _keys(found)


def _methods() -> Iterator[str]:
    yield "\n## Methods\n\n`method.name` names one; its own keys stand beside it. One file each, in `train/methods`."
    for name in method.names():
        text = inspect.cleandoc(sys.modules[method.find(name).__module__].__doc__ or "")
        first, _, formula = text.partition("\n")
        yield f"\n### {name}\n\n{first}\n"
        if formula.strip():
            yield f"```text\n{formula.strip()}\n```\n"
        yield from _keys(method_keys(name))


def _sites() -> Iterator[str]:
    yield "\n## Sites\n\nWhere a model is read. `harvest sites MODEL` lists those of a model with their widths.\n"
    rows = [[f"`{kind}.N`", SITES[kind]] for kind in hooks.KINDS]
    rows += [["`PATH:in`", "the first input of any module, by its dotted path"]]
    rows += [["`PATH:out` or `PATH`", "the output of any module, by its dotted path"]]
    yield from _table(["site", ""], rows)
    yield "\nIn a list, `*` is anything without a dot and `{4,8}` either: `resid.{4,8}`, `layers.*.mlp:out`."


def _figures() -> Iterator[str]:
    yield "\n## Figures\n\nWhat `train measure`, measure.json and the report give, summed over all rows in fp64.\n"
    yield from _table(["figure", ""], [[f"`{name}`", formula] for name, formula in measure.FORMULAS.items()])


def _errors() -> Iterator[str]:
    yield "\n## Errors\n\nEach is one line: what is wrong, the value, and the way out. All are in `shared.errors`.\n"
    rows = []
    for one in errors():
        meaning = " ".join((one.__doc__ or "").split())
        rows.append([f"`{one.__name__}`", f"`{one.__base__.__name__}`", str(one.exit_code), meaning])
    yield from _table(["error", "is a", "exit code", ""], rows)


def text() -> str:
    """The whole page."""
    parts = [HEAD, ""]
    for section in (_commands(), _config("harvest"), _config("train"), _methods(), _sites(), _figures(), _errors()):
        parts += section
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")
