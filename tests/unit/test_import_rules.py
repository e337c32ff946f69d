"""The direction of imports in the design's section 4, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "eagle_rpc"

# Rooms that each room may import, beside itself and `errors`.
ALLOWED = {
    "config": set(),
    "process": {"config"},
    "report": {"config", "process"},
    "topology": {"config", "process"},
    "registry": {"config", "process"},
    "rpc": {"config", "process", "topology", "registry"},
    "sizes": {"config"},
    "supervision": {"sizes"},
    "target": {"config", "process", "report", "sizes", "supervision"},
    "service": {"config", "process", "rpc", "supervision"},
    "client": {"process", "rpc", "supervision"},
    "data": {"config", "process", "report", "supervision"},
    "answers": {"client", "config", "data", "process", "report", "supervision", "target"},
    "draft": {"sizes", "supervision"},
    "train": {"config", "process", "supervision", "draft", "data", "report"},
    "serving": {"config", "process", "supervision", "draft"},
    "evaluate": {
        *{
            "answers",
            "config",
            "process",
            "supervision",
            "draft",
            "data",
            "report",
            "serving",
            "sizes",
            "target",
        }
    },
    "demo": {"config", "process"},
}
ALLOWED["jobs"] = set(ALLOWED)
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_every_room_has_a_rule():
    assert set(ROOMS) == set(ALLOWED)


def test_every_room_and_the_mark_of_types_are_packaged():
    listed = (PACKAGE.parent / "pyproject.toml").read_text()
    folders = [path.parent.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("__init__.py")]
    assert [
        name for name in map(".".join, (one.parts for one in folders)) if f'"{name}",' not in listed
    ] == []
    assert '"eagle_rpc" = ["py.typed"]' in listed and (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_design_allows(room: str):
    allowed = ALLOWED[room] | {room, "errors", "__version__"}
    for path in (PACKAGE / room).rglob("*.py"):
        rooms = {module.split(".")[1] for module in imported_modules(path) if module.startswith("eagle_rpc.")}
        assert rooms <= allowed, f"{path.name} imports {rooms - allowed}"


def test_only_config_knows_omegaconf():
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "config") or path.name == "__main__.py":
            continue
        assert not any(module.split(".")[0] in ("omegaconf", "hydra") for module in imported_modules(path)), (
            path
        )


def test_only_the_rpc_room_uses_torchs_private_rpc_parts():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "rpc":
            assert "rpc.api._" not in path.read_text() and "_transports" not in path.read_text(), path


def loaded_by(imports: str, *modules: str) -> list[str]:
    """Those of `modules` that a fresh process has loaded after `imports`."""
    program = f"import sys\n{imports}\nprint(*{set(modules)} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split()


def test_the_entry_point_imports_nothing_heavy():
    rooms = "config.compose config.launch process topology registry errors sizes".split()
    modules = [*rooms, *(f"jobs.{job}" for job in ("plan", "registry", "report", "status"))]
    imports = "import " + ", ".join(f"eagle_rpc.{module}" for module in modules)
    assert loaded_by(imports, "torch", "transformers") == []


@pytest.mark.parametrize(
    "imports", ["import eagle_rpc", "from eagle_rpc import errors", "from eagle_rpc import registry"]
)
def test_the_package_loads_its_library_at_the_first_use_of_a_name(imports: str):
    assert loaded_by(imports, "torch", "hydra", "eagle_rpc.library") == []
    assert loaded_by("from eagle_rpc import TargetConfig", "eagle_rpc.library") == ["eagle_rpc.library"]


def test_only_the_package_itself_imports_the_library():
    importers = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(module.startswith("eagle_rpc.library") for module in imported_modules(path))
    ]
    assert importers == ["__init__.py"]
