"""The rules of the code: imports point down and make no circles, a few modules own a dependency, files and folders stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = "megatron_r1"
LONGEST_FILE = 400
MOST_ENTRIES = 12  # at the top of the packages that have sub-packages
FLOORS = [
    {"errors", "tags"},
    {"types", "config", "model", "chat_endpoint", "cpu_limit", "import_path", "process_pools"},
    {"runtime", "data", "rewards", "algorithms"},
    {"weights"},  # below mcore and rollout, which both use it
    {"mcore", "rollout", "evaluation", "curation"},
    {"training", "conversion", "preprocess"},  # none knows another
    {"plan"},  # below report and pipeline, which both ask it
    {"report"},  # below pipeline, whose stages end with a report
    {"pipeline"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv", "unsetenv"}
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
EVERY_FILE = sorted(path for folder in (PACKAGE, "tools", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; the project imports by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def environment_reads(tree: ast.Module) -> Iterator[int]:
    """Lines that touch environment variables."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ENVIRONMENT
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        ):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in ENVIRONMENT for alias in node.names):
            yield node.lineno


def imports_any(path: Path, *packages: str) -> list[str]:
    return [name for name in imported_names(parse(path)) if any(name == p or name.startswith(f"{p}.") for p in packages)]


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: a package, or a module beside them."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def upward_imports(part: str, names: Iterator[str]) -> list[str]:
    """Imports that leave `part` for another part that is not on a lower floor."""
    others = [(name, name.split(".")[1]) for name in names if name.startswith(f"{PACKAGE}.")]
    return [name for name, other in others if other != part and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[part]]


def import_graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Which of these modules import which others, inside functions and for type checkers included."""

    def find_module(name: str) -> str:
        while name and name not in trees:
            name = name.rpartition(".")[0]
        return name

    return {module: {find_module(name) for name in imported_names(tree)} - {"", module} for module, tree in trees.items()}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, the first one again at the end; empty if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_layout_is_there():
    for part in set(FLOOR_OF) - {"errors", "types", "cli", "tags", "chat_endpoint", "cpu_limit", "import_path", "process_pools"}:
        assert (ROOT / PACKAGE / part / "__init__.py").is_file(), part
    for folder in ("tools", "examples", "slurm", "benchmarks", "tests", "setup.py", "README.md", "Makefile", ".ci/run"):
        assert (ROOT / folder).exists(), folder


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_imports_point_down(path):
    if path.parent == ROOT / PACKAGE and path.name == "__init__.py":
        assert not list(imported_names(parse(path))), "importing the package must cost nothing"
        return
    assert upward_imports(part_of(path), imported_names(parse(path))) == []


def test_an_upward_import_would_be_found():
    source = ast.parse("def f():\n    from megatron_r1.training.grpo import train_grpo\nimport megatron_r1.errors, torch")
    assert upward_imports("rollout", imported_names(source)) == ["megatron_r1.training.grpo.train_grpo"]
    sideways = ast.parse("from megatron_r1.mcore import policy")
    assert upward_imports("rollout", imported_names(sideways)) == ["megatron_r1.mcore.policy"]
    assert upward_imports("mcore", imported_names(sideways)) == []


def test_no_modules_import_each_other():
    circle = find_circle(import_graph({module_name(path): parse(path) for path in MODULES}))
    assert not circle, " imports ".join(circle)


def test_a_circle_would_be_found():
    trees = {module_name(path): parse(path) for path in MODULES}
    assert "megatron_r1.data.prompts" in import_graph(trees)["megatron_r1.pipeline.stages.grpo"]
    for planted in (
        "def f():\n    from megatron_r1.pipeline.stages import grpo",
        "if TYPE_CHECKING:\n    from megatron_r1.pipeline.stages.grpo import run_grpo",
        "import megatron_r1.pipeline.stages.grpo",
    ):
        circle = find_circle(import_graph(trees | {"megatron_r1.data.prompts": ast.parse(planted)}))
        assert {"megatron_r1.data.prompts", "megatron_r1.pipeline.stages.grpo"} <= set(circle)


def test_only_mcore_imports_megatron_core_and_nobody_megatron_training():
    for path in MODULES + TOOLS:
        names = imports_any(path, "megatron")
        assert all(name.startswith("megatron.core") for name in names), f"{path} imports {names}"
        assert not names or path.parent == ROOT / PACKAGE / "mcore", f"{path} imports {names}"


def test_only_the_vllm_modules_of_rollout_import_vllm():
    for path in MODULES + TOOLS:
        allowed = path.parent == ROOT / PACKAGE / "rollout" / "vllm"
        assert allowed or not imports_any(path, "vllm"), path


def test_only_launch_touches_environment_variables():
    for path in MODULES + TOOLS:
        lines = list(environment_reads(parse(path)))
        assert not lines or path == ROOT / PACKAGE / "runtime" / "launch.py", f"{path} lines {lines}"


def test_a_read_of_the_environment_would_be_found():
    source = ast.parse("import os\nfrom os import environ\nx = os.environ['A']\ny = os.getenv('B')\nz = os.path")
    assert sorted(environment_reads(source)) == [2, 3, 4]


def questions_for_cuda(tree: ast.Module) -> list[int]:
    """Lines that ask torch whether, or how much, CUDA is there."""
    asked = ("is_available", "is_initialized", "device_count")
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {f"torch.cuda.{name}" for name in asked}
    ]


def test_only_device_asks_for_cuda():
    for path in MODULES + TOOLS:
        lines = questions_for_cuda(parse(path))
        assert not lines or path == ROOT / PACKAGE / "runtime" / "device.py", (
            f"{path} lines {lines}: take the device as an argument"
        )
    assert questions_for_cuda(ast.parse("import torch\nif torch.cuda.is_available():\n    torch.cuda.synchronize()")) == [2]


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("model", ["torch", "transformers"]),
        ("config", ["torch"]),
        ("algorithms", ["torch.distributed", "megatron_r1.config", "megatron_r1.runtime", "pathlib"]),
        ("rewards", ["transformers", "torch.nn"]),
        ("weights", ["vllm", "transformers"]),
    ],
)
def test_what_a_part_may_not_know(part, forbidden):
    for path in (ROOT / PACKAGE / part).rglob("*.py"):
        assert imports_any(path, *forbidden) == [], path


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERY_FILE}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def names_defined_twice(trees: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Functions and classes at the top of modules, private ones included: name -> modules, if there are several."""
    modules: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                modules.setdefault(node.name, []).append(module)
    return {name: found for name, found in modules.items() if len(found) > 1}


def test_no_name_means_two_things():
    assert names_defined_twice({module_name(path): parse(path) for path in MODULES}) == {}


def test_a_name_defined_twice_would_be_found():
    trees = {"a": ast.parse("def f(): ...\nclass C: ..."), "b": ast.parse("class C: ...\ndef g():\n    def f(): ...")}
    assert names_defined_twice(trees) == {"C": ["a", "b"]}


@pytest.mark.parametrize("package", ["rewards", "rollout", "pipeline"])
def test_a_package_of_packages_is_short(package):
    entries = sorted(path.name for path in (ROOT / PACKAGE / package).iterdir() if path.name != "__pycache__")
    assert len(entries) <= MOST_ENTRIES, entries


def test_the_product_knows_no_path_of_the_machine_it_was_written_on():
    suffixes = {".py", ".yaml", ".sh", ".sbatch", ".md", ".toml", ".txt"}
    folders = [ROOT / name for name in (PACKAGE, "tools", "examples", "slurm")]
    for path in (path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes):
        text = path.read_text(encoding="utf-8")
        assert "/work/" not in text, path
        assert "shared/data" not in text, path


def test_every_setting_says_whether_it_may_change_when_a_run_goes_on():
    """A new setting gets `json_schema_extra=MAY_CHANGE`, or its key a place in STAYS of config/resume.py, with the reason."""
    from megatron_r1.config.resume import unsorted_keys

    assert unsorted_keys() == []


UNPICKLERS = {
    "megatron_r1.runtime.checkpoint_index",  # plain values alone
    "megatron_r1.evaluation.contest_tests",  # text alone
    "megatron_r1.rollout.channel.keyed",  # from the holder of the key
    "megatron_r1.mcore.host",  # compiled code where Python keeps its own: whoever may write there runs code anyway
}


def unpickling(tree: ast.Module) -> Iterator[int]:
    """Lines that call something by which a file or a connection can run code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            owner, name = node.func.value.id, node.func.attr
            if owner in ("pickle", "cloudpickle", "dill", "marshal") and name in ("load", "loads", "Unpickler"):
                yield node.lineno
            if (owner, name) in (("torch", "load"), ("dist_checkpointing", "load_common_state_dict")):
                yield node.lineno
            if (
                owner in ("np", "numpy")
                and name == "load"
                and not any(keyword.arg == "allow_pickle" and ast.unparse(keyword.value) == "False" for keyword in node.keywords)
            ):
                yield node.lineno


def test_only_a_few_modules_unpickle():
    found = {module_name(path): list(unpickling(parse(path))) for path in MODULES}
    assert {module for module, lines in found.items() if lines} <= UNPICKLERS, found
    planted = ast.parse(
        "import torch\ntorch.load(f, weights_only=True)\npickle.loads(b)\nnp.load(p)\nnp.load(p, allow_pickle=False)"
    )
    assert list(unpickling(planted)) == [2, 3, 4]
