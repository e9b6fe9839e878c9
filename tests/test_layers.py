"""Walks every import of the packages and fails on one that points upwards or to the other side.

A new module of weightstore/ has to be given its side here; the test that says so names it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

SHARED = {"errors", "layout", "paths", "sizes", "types", "wire"}
PURE = {"allocator", "catalog"}
SERVICE = PURE | {
    "admission",
    "arena",
    "changes",
    "checksums",
    "foretelling",
    "listener",
    "mounts",
    "peers",
    "persistence",
    "requests",
    "segment",
    "service",
    "session",
    "status",
    "store",
}
CLIENT = {
    "bulk",
    "calls",
    "casts",
    "checkpoint",
    "client",
    "comparing",
    "connection",
    "copies",
    "cuda",
    "dtensors",
    "ema",
    "inbox",
    "leases",
    "ledger",
    "link",
    "local",
    "lora",
    "mapping",
    "names",
    "prefault",
    "preparing",
    "reader",
    "records",
    "refits",
    "report",
    "sharding",
    "snapshot",
    "sources",
    "tensors",
    "trainer",
    "transaction",
    "writing",
}
OPERATOR = {"__main__", "cli", "cuda.doctor", "doctor"}
"""These may look at both sides; nothing else may look at them."""

ALLOWED = {
    "shared": {"shared"},
    "service": {"shared", "service"},
    "client": {"shared", "client"},
    "operator": {"shared", "service", "client", "operator"},
}


class Import(NamedTuple):
    importer: str
    imported: str
    line: int
    type_checking: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(package: str) -> dict[str, Path]:
    """Every module of a top-level package by its full name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def side_of(module: str) -> str | None:
    """Which side a module of weightstore/ is on; the package itself, whose names are lazy, is on none."""
    inner = module.removeprefix("weightstore.")
    for name in (inner, inner.partition(".")[0]):
        for side, members in (
            ("operator", OPERATOR),
            ("shared", SHARED),
            ("service", SERVICE),
            ("client", CLIENT),
        ):
            if name in members:
                return side
    return None


def imports_in(source: str, importer: str, known: set[str]) -> list[Import]:
    """Every import in `source`, inside functions too; `from p import m` is one of p.m if that is a module."""
    found: list[Import] = []

    def visit(node: ast.AST, type_checking: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(importer, alias.name, node.lineno, type_checking) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: write imports in full"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(Import(importer, inner if inner in known else base, node.lineno, type_checking))
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, type_checking)
        else:
            for child in ast.iter_child_nodes(node):
                visit(child, type_checking)

    visit(ast.parse(source), False)
    return found


STORE_MODULES = modules("weightstore")
ENGINE_MODULES = modules("engine_hooks")
KNOWN = set(STORE_MODULES) | set(ENGINE_MODULES)
IMPORTS = [
    found
    for name, path in (STORE_MODULES | ENGINE_MODULES).items()
    for found in imports_in(path.read_text(encoding="utf-8"), name, KNOWN)
]
STORE_IMPORTS = [found for found in IMPORTS if found.importer in STORE_MODULES]


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_walk_sees_what_it_must() -> None:
    source = """
from weightstore import wire
if TYPE_CHECKING:
    import torch
def late():
    import engine_hooks.hook
"""
    found = imports_in(source, "m", {"weightstore.wire"})
    assert [(i.imported, i.type_checking) for i in found] == [
        ("weightstore.wire", False),
        ("torch", True),
        ("engine_hooks.hook", False),
    ]
    assert any(i.importer == "weightstore.types" and i.imported == "weightstore.errors" for i in IMPORTS)


def test_every_module_has_a_side() -> None:
    homeless = [name for name in STORE_MODULES if name != "weightstore" and side_of(name) is None]
    assert not homeless, f"say in {Path(__file__).name} on which side these are: {homeless}"


def test_weightstore_never_imports_engine_hooks() -> None:
    assert not [
        str(i) for i in STORE_IMPORTS if top(i.imported) in ("engine_hooks", "tests", "bench", "tools")
    ]


def test_imports_stay_on_their_side() -> None:
    breaches = [
        str(i)
        for i in STORE_IMPORTS
        if i.importer != "weightstore"
        and i.imported in STORE_MODULES
        and (side := side_of(i.imported)) is not None
        and side not in ALLOWED[side_of(i.importer) or "operator"]
    ]
    assert not breaches


def test_engine_hooks_see_the_client_side_only() -> None:
    breaches = [
        str(i)
        for i in IMPORTS
        if i.importer in ENGINE_MODULES and side_of(i.imported) in ("service", "operator")
        if top(i.imported) == "weightstore"
    ]
    assert not breaches


def test_shared_and_service_modules_know_no_tensors() -> None:
    tensors = {"torch", "numpy", "safetensors", "cuda", "cupy", "diffusers", "transformers"}
    breaches = [
        str(i)
        for i in STORE_IMPORTS
        if side_of(i.importer) in ("shared", "service") and top(i.imported) in tensors
    ]
    assert not breaches


def test_cuda_is_imported_under_cuda_and_engine_hooks_only() -> None:
    breaches = [
        str(i)
        for i in STORE_IMPORTS
        if top(i.imported) in ("cuda", "cupy") and not i.importer.startswith("weightstore.cuda")
    ]
    assert not breaches


def test_allocator_and_catalog_are_pure() -> None:
    outside = {
        "asyncio",
        "fcntl",
        "mmap",
        "os",
        "pathlib",
        "posix_ipc",
        "random",
        "socket",
        "threading",
        "time",
    }
    breaches = [
        str(i)
        for i in STORE_IMPORTS
        if i.importer.removeprefix("weightstore.").partition(".")[0] in PURE
        and (
            top(i.imported) in outside
            or (side_of(i.imported) == "service" and i.imported.split(".")[1] not in PURE)
        )
    ]
    assert not breaches


def test_modules_import_only_downwards() -> None:
    # An import for annotations alone is no dependency when the program runs.
    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if found.imported in KNOWN and not found.type_checking and found.importer not in ("weightstore",):
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("entry", ["weightstore.service", "weightstore.cli.serve"])
def test_the_service_loads_no_tensor_library_and_no_client(entry: str) -> None:
    script = f"import sys, {entry}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert entry in loaded
    heavy = {"torch", "numpy", "safetensors", "rich"} & set(loaded)
    client = sorted(m for m in loaded if m.startswith("weightstore.") and side_of(m) == "client")
    assert (heavy, client) == (set(), [])
