"""The documents name only what exists, and every module has its line."""

import ast
import re
import shlex
from dataclasses import fields
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.documents import ARCHITECTURE, PACKAGE, ROOT, path_table

import eagle_rpc
from eagle_rpc.config.compose import load
from eagle_rpc.config.schema import Config
from eagle_rpc.config.sweeps import is_sweep, read_sweep

PAGES = [page for folder in ("", "benchmarks", "examples") for page in sorted((ROOT / folder).glob("*.md"))]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Words of which each has a plain one: finish, handle, member, can recover.
PRIVATE_WORDS = re.compile(r"\b(settles?d?|bears?|aboard|hopeful|nobody's end)\b", re.IGNORECASE)
# A name with one of these is a file, such as `target.py`, and no setting.
SUFFIXES = {"py", "md", "html", "json", "yaml", "sh"}
# Words before a command that starts this package, whether by `launch.sh`, from an environment or under torchrun.
OWN_COMMAND = re.compile(r"(srun [^&]*?)?((\./|\S+/bin/)?(launch|eagle-rpc)|torchrun|python -m eagle)")
# What a shell does itself, what a test runs (`test_examples.py`), and installations, of which a test knows the extras.
EASY_COMMAND = re.compile(
    r"\w+=(\S+|\$?\(.*\))$|(trap|wait|kill)\b|python examples/\w+\.py|pip install|python -m venv"
)
FILE_NAME = re.compile(r"`((?:eagle_rpc|tests|benchmarks|examples|docs|conf)/[\w./-]+|[a-z_]+/[\w/]+\.py)`")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def listed_modules() -> list[str]:
    modules, room = [], None
    for line in ARCHITECTURE.read_text().splitlines():
        if line.startswith("#"):
            room = line[4:] if line.startswith("### eagle_rpc/") else None
        elif room and (row := re.match(r"\| `(\w+\.py)` \|", line)):
            modules.append(room + row[1])
    return modules


def defined(file: Path) -> set[str]:
    """Classes and functions of a module, those inside others as `Outer.inner`."""
    names = set()

    def note(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                note(node.body, f"{prefix}{node.name}.")

    note(ast.parse(file.read_text()).body, "")
    return names


def command_lines(page: Path) -> list[str]:
    """The lines of code blocks without a language or in bash, without comments and variables before a command."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = (
        "".join(text for language, text in blocks if language in ("", "bash"))
        .replace("\\\n", " ")
        .splitlines()
    )
    bare = [re.sub(r"^(\w+=[\w./-]+ +)+(?=\w)", "", line.partition("#")[0].strip()) for line in lines]
    return [line for line in bare if line]


def commands(page: Path) -> list[str]:
    """Those that start this package."""
    return [line for line in command_lines(page) if OWN_COMMAND.match(line)]


def programs_that_do_not_run(page: Path) -> list[str]:
    """The programs of the sentence that begins with "Not run by the tests"."""
    sentences = re.findall(r"^Not run by the tests: (.*?)\.(?:\s|$)", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`]+)`", " ".join(sentences))


def test_every_module_has_one_line_and_every_line_its_module():
    modules = [relative(path) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed_modules()) == sorted(["eagle_rpc/__init__.py", *modules])


@pytest.mark.parametrize("heading", ["Input ids", "Supervision, from", "SIGTERM"])
def test_the_functions_of_the_three_paths_exist(heading: str):
    for file, functions in path_table(heading).items():
        assert set(functions) <= defined(PACKAGE / file), file


def test_sigterm_at_a_target_passes_at_most_8_files():
    assert 0 < len(path_table("SIGTERM")) <= 8


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_point_to_files(page: Path):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_files_that_pages_name_exist(page: Path):
    named = FILE_NAME.findall(page.read_text())
    roots = (ROOT, PACKAGE, page.parent)
    assert [file for file in named if not any((root / file).exists() for root in roots)] == []


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_settings_that_pages_name_exist(page: Path):
    sections = {section.name: {field.name for field in fields(section.type)} for section in fields(Config)}
    named = re.findall(rf"(?<![\w./-])({'|'.join(sections)})\.(\w+)(?!\()\b", page.read_text())
    assert [f"{section}.{name}" for section, name in named if name not in sections[section] | SUFFIXES] == []


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_jobs_and_choices_of_groups_that_pages_name_exist(page: Path):
    folders = [path for path in (ROOT / "conf").iterdir() if path.is_dir()]
    groups = {path.name: {choice.stem for choice in path.iterdir()} for path in folders}
    # In Python code these are arguments.
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    named = re.findall(rf"(?<![\w.])({'|'.join(groups)})=([a-z0-9|_]+)", text)
    unknown = [
        f"{group}={one}" for group, some in named for one in some.split("|") if one not in groups[group]
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_have_no_private_words(page: Path):
    assert PRIVATE_WORDS.findall(page.read_text()) == []


@pytest.mark.parametrize(
    "command", [pytest.param(line, id=line.strip()) for page in GUIDES for line in commands(page)]
)
def test_commands_of_pages_compose(command: str):
    words = shlex.split(command.rstrip("& ").replace(" -m eagle_rpc ", " "))
    overrides = [word for word in words if "=" in word and not word.startswith("--")]
    if is_sweep(words):
        read_sweep(["--multirun", *overrides])
    else:
        load(*overrides)


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_every_other_command_of_a_page_is_said_not_to_run_in_the_tests(page: Path):
    named = tuple(programs_that_do_not_run(page))
    others = [line for line in command_lines(page) if not OWN_COMMAND.match(line)]
    assert [line for line in others if not EASY_COMMAND.match(line) and not line.startswith(named)] == []


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_extras_that_pages_install_exist(page: Path):
    extras = metadata("eagle-rpc").get_all("Provides-Extra") or []
    named = re.findall(r"(?:eagle-rpc|\.)\[([\w,]+)\]'", page.read_text())
    assert {extra for some in named for extra in some.split(",")} - set(extras) == set()


@pytest.mark.parametrize("page", GUIDES, ids=relative)
def test_names_of_the_package_that_pages_use_exist(page: Path):
    named = set(re.findall(r"\beagle_rpc\.(\w+)", page.read_text()))
    unknown = {name for name in named if find_spec(f"eagle_rpc.{name}") is None}
    assert {name for name in unknown if not hasattr(eagle_rpc, name)} == set()
