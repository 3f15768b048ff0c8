"""The house: which folder stands on which, that nothing is replaced from outside, and that programs take the fast model.

What longllama.py itself must be is in test_longllama.py.
"""

import ast
import re
from functools import lru_cache
from pathlib import Path

from cli.test_ending import ROOT
from longllama import Block, Cache, LocalCache, LongLlama, Memory

ORDER = [  # each may import those before it
    "longllama.py", "tokenizer.py", "fast", "cli", "convert.py", "generate.py", "training", "experiments", "evaluation",
    "examples", "benchmarks", "docs",
]  # fmt: skip
ONLY = {"longllama.py": [], "tokenizer.py": [], "fast": ["longllama.py"], "cli/ending.py": [], "generate.py": ORDER[:4]}
COMPARES_THE_CORE = {"benchmarks/bench.py"}  # which has a row for it


def is_test(name: str) -> bool:
    return Path(name).name.startswith(("test_", "conftest"))


@lru_cache
def programs() -> dict[str, ast.Module]:
    """Every Python file of ours, parsed: "fast/model.py" and so on."""
    ignored = {"__pycache__", "data", "runs"}
    names = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    names = [x for x in names if not any(part in ignored or part.startswith(".") for part in x.parent.parts)]
    return {name.as_posix(): ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in sorted(names)}


def imports(name: str, node: ast.AST) -> set[str]:
    """The files of ours that an import statement of a file names."""
    if isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        dotted = [node.module or ""] + [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
    else:
        return set()
    paths = [start / x.replace(".", "/") for x in dotted if x for start in (ROOT, (ROOT / name).parent)]
    files = {file for path in paths for file in (path.parent / f"{path.name}.py", path / "__init__.py")}
    return {file.relative_to(ROOT).as_posix() for file in files if file.is_file()}


def all_imports(name: str) -> set[str]:
    return set().union(*(imports(name, node) for node in ast.walk(programs()[name]))) - {name}


def root(node: ast.AST) -> str | None:
    """a in a.b[c].d"""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def test_imports_go_one_way():
    assert {"cli/loading.py", "fast/__init__.py", "tokenizer.py"} <= all_imports("generate.py")
    wrong = []
    for name in programs():
        part = name if name in ONLY else name.split("/")[0]
        before = ONLY.get(part, ORDER[: ORDER.index(part)] if part in ORDER else [])
        if not is_test(name):
            others = {x for x in all_imports(name) if x.split("/")[0] not in [*before, *[part] * (part != name)]}
            wrong += [f"{name} imports {x}" for x in sorted(others)]
    assert wrong == []


def test_no_imports_go_round_in_a_circle():
    def follow(name: str, path: list[str]):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(all_imports(name)):
                follow(other, [*path, name])
            done.add(name)

    done = set()
    for name in programs():
        follow(name, [])
    assert done == programs().keys()


METHODS = {name for of in (LongLlama, Cache, LocalCache, Memory, Block) for name, x in vars(of).items() if callable(x)}
METHODS = {name for name in METHODS if not name.startswith("__")} | {"__class__"}
PATCHES = {
    ast.Name: ("setattr", "delattr"),
    ast.Attribute: ("setattr", "delattr", "setitem", "patch", "object", "dict"),
}


def replaced(name: str, tree: ast.Module) -> list[str]:
    """Where a file assigns to what it imported from ours, or to a method of an object."""
    ours, found = set(), []
    for node in ast.walk(tree):
        if imports(name, node):
            ours |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    modules = "|".join(Path(x).stem for x in ORDER)
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        patches = []
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = getattr(node.func, "id", getattr(node.func, "attr", None))
            patches = node.args if called in PATCHES[type(node.func)] else []
        for target in targets if isinstance(targets, list) else []:
            parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
            attributes = [x for x in parts if isinstance(x, (ast.Attribute, ast.Subscript))]
            methods = [x for x in attributes if getattr(x, "attr", None) in METHODS and root(x) != "self"]
            found += [node.lineno for x in attributes if root(x) in ours or x in methods]
        words = [x.value for x in patches[:2] if isinstance(x, ast.Constant) and isinstance(x.value, str)]
        if patches and (root(patches[0]) in ours or any(x in METHODS or re.match(rf"({modules})\.", x) for x in words)):
            found.append(node.lineno)
    return [f"{name}:{line}" for line in found]


def test_nothing_of_ours_is_replaced_from_outside():
    caught = "import longllama\nfrom fast import FastMemory as M\nlonglama = 1\n"
    for line in (
        "longllama.attend = 1", "M.BLOCK = 5", "x.forward = 1", "setattr(longllama, 'x', 1)", "a, M.b = 1, 2", "del M.b",
        "p.setattr('longllama.attend', 1)", "p.setattr(model, 'forward', 1)", "longllama.x['a'] = 2", "p.setattr(M, 'x', 1)",
        "layer.__class__ = M", "M.BLOCK += 1",
    ):  # fmt: skip
        assert replaced("test_x.py", ast.parse(caught + line)) == ["test_x.py:4"], line
    assert sum((replaced(name, tree) for name, tree in programs().items()), []) == []


def test_programs_make_the_fast_model_and_its_caches():
    """A cache made by `Cache(config)`, or a model by `LongLlama`, is right and slow."""
    slow = []
    for name, tree in programs().items():
        if name == "longllama.py" or name.startswith("fast/") or is_test(name):
            continue
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if re.search(r"(^|\.)(Cache|LongLlama|LongLlama\.from_pretrained)$", called):
                slow.append(f"{name}:{node.lineno} calls {called}")
    assert [x for x in slow if x.split(":")[0] not in COMPARES_THE_CORE] == []
    assert {x.split(":")[0] for x in slow} == COMPARES_THE_CORE


def test_every_test_is_found_by_pytest(pytestconfig):
    places = pytestconfig.getini("testpaths")
    tests = [name for name in programs() if Path(name).name.startswith("test_")]
    assert [x for x in tests if not any(x == place or x.startswith(f"{place}/") for place in places)] == []
