"""The layout: what may import what, that every room is in the wheel, and that every public name is there."""

import ast
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import evals
import surgery

ROOT = Path(__file__).parents[1]

VIOLATIONS = {
    "upwards": ("surgery/fitting/readout.py", "from surgery.saving import folder", "Rooms import downwards only"),
    "a sibling": ("surgery/publishing/card.py", "from surgery.refining import plot", "Rooms import downwards only"),
    "the measures": (
        "surgery/reading/page.py",
        "import evals.speed",
        "Inside surgery only the command line and whole runs",
    ),
    "another package": ("surgery/closed_form/sinks.py", "import tqdm", "The mathematics imports torch alone"),
    "a circle": ("surgery/runtime/files.py", "from surgery.runtime import launch", "No circles"),
}


def contracts(place):
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=environment)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    place = tmp_path_factory.mktemp("rooms")
    for name in ("surgery", "evals"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    return place


def test_the_contracts_are_kept(copied):
    done = contracts(copied)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_a_planted_violation_breaks_its_contract(copied, kind):
    file, line, contract = VIOLATIONS[kind]
    text = (copied / file).read_text()
    if kind == "a circle":
        launch = copied / "surgery/runtime/launch.py"
        before = launch.read_text()
        launch.write_text(before + "\n\nfrom surgery.runtime import files as _\n")
    try:
        (copied / file).write_text(f"{text}\n\n{line} as _planted\n")
        done = contracts(copied)
    finally:
        (copied / file).write_text(text)
        if kind == "a circle":
            launch.write_text(before)
    assert done.returncode == 1, done.stdout
    broken = [row for row in done.stdout.splitlines() if row.endswith("BROKEN")]
    assert any(row.startswith(contract) for row in broken)


def test_every_room_says_what_goes_in_and_out():
    rooms = [folder for folder in (ROOT / "surgery").iterdir() if (folder / "__init__.py").is_file()]
    assert len(rooms) == 13
    for room in rooms:
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert said, room
        assert len(said) > 60, room


def test_every_folder_with_code_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        str(file.parent.relative_to(ROOT)).replace(os.sep, ".")
        for top in ("surgery", "evals")
        for file in (ROOT / top).rglob("__init__.py")
    }
    assert listed == found


@pytest.mark.parametrize("package", [surgery, evals], ids=["surgery", "evals"])
def test_every_public_name_is_there_and_described(package):
    assert set(package._PLACES) <= set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert name == "__version__" or value.__doc__, name
        if callable(value) and not isinstance(value, type):
            hints = typing.get_type_hints(value, vars(sys.modules[value.__module__]) | {"Any": typing.Any})
            assert "return" in hints, f"{name} says what it gives back"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_every_module_can_be_imported():
    for package in (surgery, evals):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


REFERENCE = re.compile(r":(?:func|class|mod|meth|data):`~?([\w.]+)`")


def resolves(name, module):
    """Whether a reference in this module's docstrings is a name in it, a member of one of its classes, or a path."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    for root in (module, *classes):
        value = root
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None:
            return True
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def test_every_reference_in_a_docstring_names_something():
    lost, found = [], 0
    for package in (surgery, evals):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__"):
                continue
            module = importlib.import_module(info.name)
            for name in REFERENCE.findall(Path(module.__file__).read_text()):
                found += 1
                lost += [] if resolves(name, module) else [f"{info.name}: {name}"]
    assert lost == []
    assert found > 40
    assert not resolves("no_such_thing", surgery)
