"""What the documents say is so: the tables are fresh, commands parse, code runs, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shared.errors
from pipelines.dfc_toy import toy
from shared.config import keys_of, parse
from shared.errors import ConfigError
from shared.header import Header
from shared.hooks import KINDS
from tests import reference
from tests.build import make_store
from train import method
from train.sweep import expand

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "shared").rglob("*.md"),
                *(ROOT / "pipelines").rglob("*.md")])  # fmt: skip
SCRIPTS = sorted((ROOT / "pipelines").rglob("*.sh"))
TOMLS = sorted((ROOT / "pipelines").rglob("*.toml"))

SHELLS = ("sh", "bash", "shell", "console")
BEFORE_A_COMMAND = {"exec", "time", "then", "do", "else", "if", "!", "$", "env", "nohup"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def fences(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of these languages."""
    return [body for kind, body in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S) if kind in languages]


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@cache
def page() -> str:
    return reference.PAGE.read_text(encoding="utf-8")


@cache
def commands() -> dict[str, reference.Command]:
    return reference.commands()


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_code_gives_now() -> None:
    assert page() == reference.text(), "run: python -m tests.reference --write"


def test_the_reference_has_every_option_of_every_command() -> None:
    lacking = []
    for program, app in reference.APPS.items():
        for info in app.registered_commands:
            assert info.callback is not None
            name = f"{program} {info.name or info.callback.__name__}"
            section = page().partition(f"\n### {name}\n")[2].partition("\n##")[0]
            shown = CliRunner().invoke(app, [name.split()[1], "--help"], env={"COLUMNS": "200"}).stdout
            options = set(re.findall(r"^ *(--[a-z][a-z-]*)", shown, re.M)) - {"--help"}
            assert options, shown
            lacking += [f"{name} {option}" for option in sorted(options) if f"\n| `{option}` |" not in section]
    assert lacking == []


def test_the_reference_has_every_config_key_method_site_and_error() -> None:
    keys = [key for kind in reference.CONFIGS.values() for key in keys_of(kind)]
    keys += [f"method.{key}" for name in method.names() for key in keys_of(method.find(name))]
    sites = [f"{kind}.N" for kind in KINDS]
    kinds = [shared.errors.GranaryError, *_below(shared.errors.GranaryError)]
    rows = [*keys, *sites, *(kind.__name__ for kind in kinds)]
    assert [name for name in rows if f"\n| `{name}` |" not in page()] == []
    assert [name for name in method.names() if f"\n### {name}\n" not in page()] == []


def _below(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        if one.__module__ == shared.errors.__name__:
            yield one
            yield from _below(one)


def test_every_config_key_has_its_unit_or_reason_behind_it() -> None:
    keys = [key for program in reference.CONFIGS for key in reference.keys(program)]
    keys += [key for name in method.names() for key in reference.method_keys(name)]
    assert sorted({key.key for key in keys if not key.comment}) == []


def test_every_command_argument_and_option_says_what_it_is() -> None:
    silent = [one.name for one in commands().values() if not one.help]
    silent += [f"{c.name} {p.names[0]}" for c in commands().values() for p in c.parameters if not p.help]
    assert silent == []


# --- commands -------------------------------------------------------------------------------------------------------


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of every call of harvest or train in lines of shell, from the program's name on."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"\b(harvest|train)\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        yield from _calls(lexer)


def _calls(words: Iterable[str]) -> Iterator[list[str]]:
    call: list[str] = []
    for word in [*words, ";"]:
        if word and set(word) <= set(";&|()<>"):
            if call and call[0] in reference.APPS:
                yield call
            call = []
        elif call:
            call.append(word)
        elif word not in BEFORE_A_COMMAND and not re.match(r"\w+=", word):
            call.append(word.rsplit("/", 1)[-1])


def shown() -> list[tuple[str, list[str]]]:
    """(file, words) of every whole command line that the documents and scripts show."""
    texts = [(file, block) for file in PAGES for block in fences(file.read_text(encoding="utf-8"), *SHELLS)]
    texts += [(file, file.read_text(encoding="utf-8")) for file in SCRIPTS]
    return [(name_of(file), words) for file, text in texts for words in commands_in(text)]


def mentioned() -> list[tuple[str, list[str]]]:
    """(file, words) of every command that stands in running text, where arguments may be left out."""
    found = []
    for file in PAGES:
        for code in re.findall(r"`((?:harvest|train) [^`\n]+)`", without_fences(file.read_text(encoding="utf-8"))):
            alternatives = [part.split() for part in code.split(" | ")]
            program, *_ = first = alternatives[0]
            found += [(name_of(file), first), *((name_of(file), [program, *words]) for words in alternatives[1:])]
    return found


def fault(words: list[str], whole: bool) -> str | None:
    """What is wrong with a command line; `whole`: with all the arguments that it needs."""
    if words[1:] in (["--help"], []):
        return None
    command = commands().get(" ".join(words[:2]))
    if command is None:
        return "no such command"
    options = {name: one for one in command.parameters if not one.argument for name in one.names}
    wanted = [one for one in command.parameters if one.argument]
    given, rest = 0, iter(words[2:])
    for word in rest:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            if name == "--help":
                return None
            if name not in options:
                return f"no option {name}"
            if not options[name].flag and (
                problem := _wrong_value(words[0], options[name], value if equals else next(rest, None))
            ):
                return problem
        elif word == "$@":
            whole = False
        elif word != "[OPTIONS]":
            given += 1
    if given > len(wanted) and not any(one.type.endswith("repeatable") for one in wanted):
        return "too many arguments"
    needed = sum(one.required for one in wanted)
    return "too few arguments" if whole and given < needed else None


def _wrong_value(program: str, option: reference.Parameter, value: str | None) -> str | None:
    if value is None:
        return f"{option.names[0]} has no value"
    if "--set" in option.names:
        return _wrong_setting(program, value)
    if option.type == "integer" and "$" not in value and not re.fullmatch(r"\d+", value):
        return f"{option.names[0]} {value} is no integer"
    return None


def _wrong_setting(program: str, setting: str) -> str | None:
    key, equals, _ = setting.partition("=")
    known = keys_of(reference.CONFIGS[program])
    if program == "train":
        known += [f"method.{one}" for name in method.names() for one in keys_of(method.find(name))]
    patterns = [
        re.escape(name).replace(r"\*", r"[\w-]+") + r"(\..+)?" for name in known
    ]  # a table's value has keys too
    if not equals or not any(re.fullmatch(pattern, key) for pattern in patterns):
        return f"no setting {setting}"
    return None


def test_every_command_line_shown_exists_with_its_options_and_arguments() -> None:
    assert [(file, " ".join(words), problem) for file, words in shown() if (problem := fault(words, True))] == []
    assert [(file, " ".join(words), problem) for file, words in mentioned() if (problem := fault(words, False))] == []


def test_the_readme_shows_both_programs_and_the_quickstart_calls_both() -> None:
    assert {words[0] for file, words in shown() if file == "README.md"} == set(reference.APPS)
    assert {words[0] for file, words in shown() if file == "pipelines/quickstart/run.sh"} == set(reference.APPS)


def test_every_command_has_an_example_that_parses() -> None:
    wrong = []
    for command in commands().values():
        [words] = list(commands_in(command.example)) or [[]]
        if " ".join(words[:2]) != command.name or fault(words, True):
            wrong.append((command.name, command.example, fault(words, True) if words else "no example"))
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("harvest run a.toml --set rows.count=10 --json", None),
        ("HF_HUB_OFFLINE=1 .venv/bin/train run a.zarr --steps=3 && echo done", None),
        ("train run a.zarr --set wiring.exclusive.gemma=5 --set method.k=2 > out.txt", None),
        ("train run a.zarr b.zarr --steps 3", None),
        ("train show a b", "too many arguments"),
        ("harvest run a.toml --set models.gemma.dtyp=float32", "no setting models.gemma.dtyp=float32"),
        ("train run a.zarr --latent 4", "no option --latent"),
        ("train run a.zarr --steps many", "--steps many is no integer"),
        ("train run", "too few arguments"),
        ("train fly a.zarr", "no such command"),
    ],
)
def test_a_command_line_that_is_wrong_is_noticed(line: str, problem: str | None) -> None:
    [words] = commands_in(line)
    assert fault(words, True) == problem


# --- configs, code, links, format -----------------------------------------------------------------------------------


def _checked(tables: Mapping[str, Any]) -> object:
    if "toy" in tables:
        return parse(toy.Whole, tables)
    harvests = {"models", "corpus", "corpora"} & tables.keys()
    return parse(reference.CONFIGS["harvest"], tables) if harvests else expand(tables)


@pytest.mark.parametrize("file", TOMLS, ids=name_of)
def test_every_config_of_the_pipelines_is_valid(file: Path) -> None:
    _checked(tomllib.loads(file.read_text(encoding="utf-8")))


def test_every_config_that_a_page_shows_is_valid_as_far_as_it_goes() -> None:
    for file in PAGES:
        for block in fences(file.read_text(encoding="utf-8"), "toml"):
            try:
                _checked(tomllib.loads(block))
            except ConfigError as error:
                assert error.what == "missing key", (name_of(file), str(error))


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = fences(README.read_text(encoding="utf-8"), "python")
    assert blocks, "README.md shows no Python"
    make_store(tmp_path / "pair.zarr", rows=400, sources={"gemma": 12, "smol": 8})
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(file: Path) -> None:
    text = without_fences(file.read_text(encoding="utf-8"))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path) if path else file
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def _anchors(file: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(file.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_the_format_page_has_the_attributes_that_the_store_writes() -> None:
    section = (ROOT / "shared" / "STORE.md").read_text(encoding="utf-8").partition("## attributes.granary")[2]
    documented = re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], re.M)
    assert documented == list(Header({}, {}, {}, {}).attributes()["granary"])
