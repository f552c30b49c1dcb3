"""The names that `import emt` gives, as a user, an editor and a type checker see them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import emt


def declared() -> dict[str, str]:
    """Names that type checkers see, with the modules that they come from."""
    tree = ast.parse(Path(emt.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in imports for alias in node.names}


def test_every_name_is_listed_and_there():
    assert set(emt.__all__) <= set(dir(emt))
    for name in emt.__all__:
        assert getattr(emt, name) is not None, name
    assert callable(emt.load_pipeline)
    assert callable(emt.read_clip)
    assert callable(emt.write_clip)
    assert callable(emt.import_weights)
    assert "ddim" in emt.SCHEDULERS
    assert "fast" in emt.PRESETS
    assert (emt.demo.path() / "model_index.json").is_file()


def test_type_checkers_know_the_names_that_are_loaded_on_first_use():
    assert declared() == emt._EXPORTS
    assert {*declared(), "__version__"} == set(emt.__all__)


def test_import_emt_is_free_of_torch():
    code = "import sys, emt; dir(emt); assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(emt, "no_such_name")
