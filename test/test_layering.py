"""Who may import what, read from the source; and that the light parts are light."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = (ROOT / "python", ROOT / "sgl-kernel-patches")
FILES = [path for root in SOURCE_ROOTS for path in sorted(root.rglob("*.py"))]
MAX_LINES = 350


def name(path: Path) -> str:
    """The dotted name of a source file's module; a package's is without `__init__`."""
    root = next(root for root in SOURCE_ROOTS if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(path): path for path in FILES}


def below(module: str, *packages: str) -> bool:
    """Whether `module` is one of the packages or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imported(module: str, *, at_load: bool = False) -> set[str]:
    """Modules that `module` names in an import or `import_module("...")`, in dotted form.

    at_load: only what importing it imports, not what its functions or type checkers do.
    """
    tree = ast.parse(MODULES[module].read_text())
    nodes = list(_run_at_load(tree) if at_load else ast.walk(tree))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return {found for node in nodes for found in _named(node, package)}


def _run_at_load(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in function bodies and under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not checking and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _run_at_load(child)


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            kept = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*kept, *filter(None, [base])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = ast.unparse(node.func).rpartition(".")[2]
        if function in ("import_module", "__import__", "resolve_name"):
            yield str(node.args[0].value)


def fresh(code: str) -> dict[str, object]:
    """What `code` prints as JSON in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: dict[str, object] = json.loads(done.stdout)
    return loaded


def test_the_walk_sees_the_tree():
    assert {"margingate.core.ledger", "margingate.plugin", "margingate_kernels.top2"} <= set(
        MODULES
    )
    assert below("sglang.srt", "sglang")
    assert not below("sglang_router", "sglang")


def test_the_walk_sees_every_way_to_import(tmp_path, monkeypatch):
    source = tmp_path / "margingate" / "core" / "sample.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom ..runtime import g\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import h\n"
        "def late():\n    import i\n    importlib.import_module('j')\n"
    )
    monkeypatch.setitem(MODULES, "margingate.core.sample", source)
    eager = {"a.b", "d", "d.e", "margingate.core", "margingate.core.f"}
    eager |= {"margingate.runtime", "margingate.runtime.g", "typing", "typing.TYPE_CHECKING"}
    assert imported("margingate.core.sample", at_load=True) == eager
    assert imported("margingate.core.sample") == eager | {"h", "i", "j"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_runtime_and_the_plugin_import_sglang(module):
    if not below(module, "margingate.runtime", "margingate.plugin"):
        assert not [found for found in imported(module) if below(found, "sglang")]


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "margingate.core")])
def test_the_core_needs_python_and_itself(module):
    for found in imported(module):
        assert found.split(".")[0] in sys.stdlib_module_names or below(found, "margingate.core")


OPTIONS = ("margingate.config", "margingate.option_checks", "margingate.errors")


@pytest.mark.parametrize("module", OPTIONS)
def test_the_options_need_python_and_the_core_alone(module):
    for found in imported(module):
        allowed = below(found, "margingate.core", *OPTIONS)
        assert allowed or found.split(".")[0] in sys.stdlib_module_names


# From the commands down: a package imports those behind it, never those before it.
TOOLS = ("margingate.cli", "margingate.study", "margingate.harness")


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "margingate")])
def test_tools_import_downwards_only(module):
    """What is in none of them, the runtime included, is below and imports none."""
    level = next((i for i, package in enumerate(TOOLS) if below(module, package)), len(TOOLS))
    above = TOOLS[:level]
    assert not [found for found in imported(module) if below(found, *above)]


def test_tools_import_the_runtime_only_to_print_its_hooks():
    tools = [module for module in MODULES if below(module, *TOOLS)]
    found = {m for m in tools for one in imported(m) if below(one, "margingate.runtime")}
    assert found == {"margingate.cli.hooks"}


def test_tools_have_no_circle():
    """Type-only and late imports included."""
    tools = {m: imported(m) & MODULES.keys() for m in MODULES if below(m, *TOOLS)}
    while ready := {m for m, needed in tools.items() if not needed & tools.keys()}:
        tools = {m: needed for m, needed in tools.items() if m not in ready}
    assert not tools


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "margingate_kernels")])
def test_the_kernels_stand_alone(module):
    for found in imported(module):
        top = found.split(".")[0]
        assert top in {*sys.stdlib_module_names, "torch", "triton", "margingate_kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_the_runtime_is_loaded_by_the_plugin_and_late(module):
    """The command line and the tools may ask for it in a function, never when imported."""
    if not below(module, "margingate.runtime"):
        early = imported(module, at_load=True)
        assert not [found for found in early if below(found, "margingate.runtime")]


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import each other in a ring, in its order; empty without one."""
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            for below_it in graph[module]:
                if found := search(below_it, [*way, module]):
                    return found
            done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in graph)), [])


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d"]
    assert not circle({"a": ["b", "c"], "b": ["c"], "c": []})


def test_no_module_imports_itself_by_way_of_others():
    """Not in a function either, and not for types: an arrow that runs back up hides an owner."""
    modules = {m for m, path in MODULES.items() if path.name != "__init__.py"}
    assert not circle({module: sorted(imported(module) & modules - {module}) for module in modules})


# Packages of the runtime: each imports those before it alone. Those of one line do not meet.
ORDER = (
    ("compat",),
    ("request",),
    ("client", "sampling", "attention"),
    ("verify",),
    ("probe",),
    ("observe",),
    ("schedule",),
    ("hooks",),
    ("start",),
)
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}


def package_of(module: str) -> str:
    """Its package in the runtime; empty for a module elsewhere."""
    return f"{module}.".split(".")[2] if below(module, "margingate.runtime") else ""


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m)])
def test_packages_of_the_runtime_import_downwards(module):
    """As docs/architecture.md has them; imports for types and in functions are imports."""
    mine = package_of(module)
    used = {package_of(one) for one in imported(module)} - {"", mine}
    assert {one for one in used if LEVEL[one] >= LEVEL[mine]} == set()


def test_the_packages_of_the_runtime_are_those_of_the_architecture():
    listed = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    assert set(listed) == set(LEVEL) == {package_of(m) for m in MODULES} - {""}
    levels = [LEVEL[package] for package in listed]
    assert levels == sorted(levels, reverse=True), "from the highest to the lowest"


# Packages of `compat`: each imports those before it alone. A module at its top is written for a
# release; packages import it, and it imports none of them (`release` finds that of a release).
COMPAT_ORDER = ("arguments", "process", "kv", "model", "compute", "host")
COMPAT_TOP = {"release", "v0_5_22", "surface", "surface_table", "instance_patches"}
COMPAT = [m for m in MODULES if below(m, "margingate.runtime.compat") and m.count(".") > 2]


@pytest.mark.parametrize("module", COMPAT)
def test_packages_of_compat_import_downwards(module):
    mine = module.split(".")[3]
    used = {f"{one}...".split(".")[3] for one in imported(module) if one in COMPAT} - {mine}
    lower = COMPAT_ORDER[: COMPAT_ORDER.index(mine)] if mine in COMPAT_ORDER else ()
    assert used <= {*lower, *COMPAT_TOP}


def test_the_packages_of_compat_are_those_of_the_architecture():
    listed = re.findall(
        r"^\| `compat/(\w+)` \| ", (ROOT / "docs" / "architecture.md").read_text(), re.M
    )
    assert listed == list(reversed(COMPAT_ORDER))
    assert {m.split(".")[3] for m in COMPAT} == {*COMPAT_ORDER} | COMPAT_TOP


# Packages of `probe`, as those of `compat`; what is at its top imports them.
PROBE_ORDER = ("operators", "measuring", "planning", "checks")
PROBE = [m for m in MODULES if below(m, "margingate.runtime.probe") and m.count(".") > 3]


@pytest.mark.parametrize("module", PROBE)
def test_packages_of_probe_import_downwards(module):
    mine = PROBE_ORDER.index(module.split(".")[3])
    used = {f"{one}....".split(".")[3] for one in imported(module) if "runtime.probe." in one}
    assert used <= set(PROBE_ORDER[: mine + 1])


def test_the_packages_of_probe_are_those_of_the_architecture():
    listed = re.findall(
        r"^\| `probe/(\w+)` \| ", (ROOT / "docs" / "architecture.md").read_text(), re.M
    )
    assert listed == list(reversed(PROBE_ORDER))
    assert {m.split(".")[3] for m in PROBE} == {*PROBE_ORDER}


def test_who_opens_the_controller():
    """Others are given what they use."""
    controller = "margingate.runtime.schedule.controller"
    users = {m.rpartition(".")[2] for m in MODULES if controller in imported(m)}
    assert users == {"handlers", "install", "next_batch", "server_info"}


# Modules that change SGLang's request (`Req`), and what of it.
WRITERS = {
    "aborts": "its id, hidden from an abort of another one",
    "columns": "how many it has, and where its next prefill forward begins and ends",
    "constraints": "its grammar",
    "lifecycle": "how it ended",
    "images": "its prompt, padded by other names of its images",
    "internal_prefill": "requests of its own, that no client sent",
    "guard": "how one ends that we failed on, and its namespace",
    "weights": "which of its tokens other weights gave",
    "admission": "the gate's record, its namespace, and inputs of one that is refused",
    "routed_experts": "its experts, as it ends",
    "retraction": "its output, while its columns are gone",
    "rollback": "its output and its columns",
    "stream": "what of its output SGLang sends",
}


def written(tree: ast.AST) -> set[str]:
    """Attributes of requests that are assigned to; the gate's own record of one is no such."""
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets.append(node.target)
        elif isinstance(node, ast.Delete):
            targets += node.targets
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            targets.append(ast.Attribute(node.args[0], ast.unparse(node.args[1])))
    flat = [each for target in targets for each in getattr(target, "elts", [target])]
    found = {ast.unparse(each) for each in flat}
    return {text for text in found if re.match(r"(self\.)?_?(req|other|kept)\.(?!gate\.)", text)}


def test_what_is_written_is_seen():
    source = "req.a = 1\nreq.a.b[0] = req.c, self.req.d = 2\nreq.gate.e += 1\nx = req.f\n"
    found = written(ast.parse(source + "setattr(req.g, name, 3)\nreq.gate = 4\ndel req.h[1:]"))
    assert found == {"req.a", "req.a.b[0]", "req.c", "self.req.d", "req.g.name", "req.gate"} | {
        "req.h[1:]"
    }


def raw_settings(tree: ast.AST) -> set[str]:
    """Fields read or written on what is called `server_args`, or on a name that it was given."""

    def is_record(node: ast.AST) -> bool:
        return "server_args" in (getattr(node, "attr", None), getattr(node, "id", None))

    names = {"server_args"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_record(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if is_record(owner) or (isinstance(owner, ast.Name) and owner.id in names):
                found.add(node.attr)
    return found


def test_raw_settings_are_seen():
    source = """
def f(server_args, runner):
    args = runner.server_args
    settings.view(server_args).a
    server_args.b
    runner.server_args.c.d
    args.e = 1
    other.f
"""
    assert raw_settings(ast.parse(source)) == {"b", "c", "e"}


@pytest.mark.parametrize("module", [m for m in MODULES if below(m, "margingate.runtime")])
def test_server_arguments_are_read_as_they_were_resolved(module):
    """SGLang decides beside the record, which keeps what was given: `settings` in compat."""
    if not below(module, "margingate.runtime.compat"):
        assert not raw_settings(ast.parse(MODULES[module].read_text()))


def test_who_writes_sglangs_request():
    runtime = [module for module in MODULES if below(module, "margingate.runtime")]
    found = {m.rpartition(".")[2] for m in runtime if written(ast.parse(MODULES[m].read_text()))}
    assert found == set(WRITERS)


# What SGLang's releases change most, by attribute and by module.
RECORD = {"kv", "req_pool_idx", "kv_committed_len", "kv_allocated_len", "cache_protected_len"}
RECORD |= {"prefix_len", "prefix_indices", "extend_end", "extend_range", "cache_salt"}
TREE = {"last_node", "lock", "root_node", "inc_lock_ref", "dec_lock_ref", "evictable_size_"}
SLOTS = {"free_pages", "release_pages", "free_group"}
MEMORY = "sglang.srt.mem_cache"  # but for its registry, which is for plugins


def named_attributes(tree: ast.AST) -> set[str]:
    """Attributes that are read or written, those named in a string included."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            found |= {str(each.value) for each in node.args if isinstance(each, ast.Constant)}
    return found


def test_attributes_are_seen():
    source = "req.kv.a = b.c\ngetattr(d, 'e', None)\nsetattr(f, 'g', h)\n"
    assert named_attributes(ast.parse(source)) == {"kv", "a", "c", "e", "g", "None"}


RUNTIME = [m for m in MODULES if package_of(m) not in ("", "compat")]


@pytest.mark.parametrize("module", RUNTIME)
def test_compat_alone_opens_a_requests_record_and_the_tree(module):
    attributes = named_attributes(ast.parse(MODULES[module].read_text()))
    assert not attributes & (RECORD | TREE | SLOTS)
    memory = {one for one in imported(module) if below(one, MEMORY)}
    assert not {one for one in memory if not below(one, f"{MEMORY}.registry")}


def made_or_released(tree: ast.AST) -> set[str]:
    """Batches of a forward that are made or copied, and columns that are released, by call."""
    batches = any(
        isinstance(node, ast.ImportFrom) and any(one.name == "ForwardBatch" for one in node.names)
        for node in ast.walk(tree)
    )
    names = {"ForwardBatch", "release_kv_cache", "release_req"}
    names |= {"replace", "copy.copy"} if batches else set()
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {each for each in called if each in names or each.endswith("batch.release_req")}


def test_what_makes_and_releases_is_seen():
    source = "ForwardBatch(1)\nself.batch.release_req(0)\nx: ForwardBatch = replace(y)\n"
    assert made_or_released(ast.parse(source)) == {"ForwardBatch", "self.batch.release_req"}
    source = f"from a import ForwardBatch\n{source}"
    assert "replace" in made_or_released(ast.parse(source))


@pytest.mark.parametrize("module", RUNTIME)
def test_compat_alone_makes_forward_batches_and_calls_release_functions(module):
    assert not made_or_released(ast.parse(MODULES[module].read_text()))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_source_file_is_long(path):
    lines = path.read_text().count("\n")
    assert lines <= MAX_LINES


def test_the_core_loads_in_milliseconds_and_without_torch():
    modules = [module for module in MODULES if below(module, "margingate.core")]
    loaded = fresh(
        "import json, sys, time\n"
        "began = time.process_time()\n"
        f"import {', '.join(modules)}\n"
        "taken = time.process_time() - began\n"
        "print(json.dumps({'seconds': taken, 'modules': sorted(sys.modules)}))"
    )
    assert loaded["seconds"] < 0.5
    assert not {"torch", "sglang", "numpy"} & set(loaded["modules"])


def test_the_entry_points_and_the_command_line_load_neither_torch_nor_sglang():
    loaded = fresh(
        "import json, sys\n"
        "import margingate.plugin, margingate.config, margingate.frontend\n"
        "from margingate.cli.main import build_parser\n"
        "build_parser()\n"
        "print(json.dumps({'modules': sorted(sys.modules)}))"
    )
    assert not {"torch", "sglang", "transformers"} & set(loaded["modules"])


def test_the_table_of_faults_names_tests_that_exist():
    """Else a fault's test could go, or be renamed, and nobody would see it."""
    folder = Path(__file__).parent
    rows = re.findall(r"^\| .+ \| `(\w+)` \| (.+) \|$", (folder / "README.md").read_text(), re.M)
    assert len(rows) >= 30
    for module, tests in rows:
        source = (folder / f"test_{module}.py").read_text()
        for test in re.findall(r"`(\w+)`", tests):
            assert f"\ndef {test}(" in source, f"test_{module}.py has no {test}"


def test_the_frontend_is_loaded_when_it_is_asked_for():
    import margingate.frontend

    with pytest.raises(AttributeError, match="has no attribute 'x'"):
        margingate.frontend.x  # noqa: B018
