"""What help() says is what the stubs say, and both are true."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import imagehere
from imagehere import _imagehere

STUBS = ast.parse((pathlib.Path(imagehere.__file__).parent / "_imagehere.pyi").read_text())


def documented(body, owner, path):
    """Each name with a docstring in the stubs: what it is called, what the stubs say, what the object says."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_HasDlpack"):
            item = getattr(owner, node.name, None)
            said = ast.get_docstring(node)
            if said and item is not None and not node.name.startswith("__"):  # whose help is Python's
                yield f"{path}{node.name}", said, item
            if isinstance(node, ast.ClassDef) and item is not None:
                yield from documented(node.body, item, f"{node.name}.")


@pytest.mark.parametrize("name, said, item", [pytest.param(*row, id=row[0]) for row in documented(STUBS.body, _imagehere, "")])
def test_help_says_what_the_stubs_say(name, said, item):
    words = inspect.getdoc(item).split() if inspect.getdoc(item) else []
    assert words == said.split(), name


def test_everything_public_has_a_docstring():
    for name in imagehere.__all__:
        item = getattr(imagehere, name)
        if inspect.isclass(item) or inspect.isbuiltin(item):
            assert inspect.getdoc(item), name


def test_the_stubs_are_true():
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy.stubtest", "--ignore-disjoint-bases", "imagehere._imagehere"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
