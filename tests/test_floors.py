"""The order of the floors, for the files at the root; import-linter holds it for the packages (`make lint`)."""

import ast

import pytest
from programs import ROOT

FLOORS = [
    "settings",
    "utils",
    "augment",
    "presets",
    "images",
    "learning",
    "stages",
    "reporting",
    "inference",
    "studies",
    "exports",
    "tracking",
    "train",
    "sweep",
    "predict",
    "export",
]


def imported(path):
    """Names of our modules that a file imports, anywhere in it, but for types alone."""
    names = set()

    def look(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text()))
    return names & {*FLOORS, "Graphs"}


@pytest.mark.parametrize("module", ["utils", "presets", "stages", "train", "sweep", "predict", "export"])
def test_a_file_at_the_root_imports_from_the_floors_below_it(module):
    below = set(FLOORS[: FLOORS.index(module)])
    assert imported(ROOT / f"{module}.py") <= below


def test_imports_are_found_wherever_they_stand_and_those_of_types_are_not(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "from settings.table import Config\nif TYPE_CHECKING:\n    from train import main\n"
        "def f():\n    import images.store\n"
    )
    assert imported(file) == {"settings", "images"}
