"""The shape of the source tree. `MODULES` is its documentation, and every rule here is checked against it."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests.build import make_store

ROOT = Path(__file__).parents[1]

# In dependency order: a module imports only modules above it in its package, and of other packages only `shared`.
MODULES: dict[str, dict[str, str]] = {
    "shared": {
        "errors": "what a user can be told: one line of what, the value and the way out, and an exit code",
        "config": "frozen configs: TOML, --set, unknown keys with the nearest known one, canonical JSON, fingerprint",
        "device": "the device that a user names, and the memory that is free there",
        "files": "files that are whole or absent, free space, the user's cache folder",
        "source": "Model and Source: what a row comes from",
        "moments": "exact, mergeable count, mean, spread, maximum and norms, per class of row",
        "layout": "pure: the arrays of STORE.md, the names of their files and their bytes",
        "codec": "chunks of activations in fewer bytes",
        "header": "what a store says of itself",
        "reading": "rows from shard files: how they are asked for, and pieces that are kept in memory",
        "mapped": "rows from memory maps of shard files",
        "shard": "the rows of one source in its shard files, raw or packed",
        "flags": "what single bits say of a row",
        "view": "what can be read: one store, or several as one",
        "joined": "the rows of several views, one behind the other",
        "store": "the store on disk, as STORE.md says: create, put, seal, open, map",
        "family": "siblings as one: a store with those that it extends",
        "mixture": "several stores as one, and what they must have in common",
        "verify": "is a store sound: receipts and sizes, or every checksum",
        "models": "models and tokenizers from a folder, a GGUF file, a package or a hub id",
        "hooks": "sites of a model, and capture of what passes there",
        "collected": "folders that dictionary_learning's ActivationCache has written",
        "live": "rows of a model while it runs: a pool that texts refill, and losses with rows changed",
        "log": "one stream of events: a JSONL file, and a console that is a view of it",
        "remote": "what lies at a URL: read by name, checked by size and checksum",
        "objects": "stores in an object store",
        "hub": "stores in dataset repositories of the hub",
        "staging": "a URL opened by its kind; a whole store copied to this machine",
    },
    "harvest": {
        "config": "what a harvest is told",
        "corpus": "documents with stable ids, from files, datasets or the built-in text",
        "segments": "documents -> segments of token ids, with flags and the characters at which tokens end",
        "align": "the tokens of several models -> the places at which all of them end together",
        "chat": "messages -> the text that each model reads, and where their contents stand in it",
        "draft": "pure: one document -> its segments and rows; many of them -> a piece of a plan",
        "survey": "all corpora, read once: fingerprints, and the order of documents",
        "extend": "a sibling of a finished store: what it may change, and what it shares",
        "plan": "pure: pieces -> rows, shards, batches and bytes, fixed before any model runs",
        "forward": "the planned batches -> rows per source",
        "cast": "fp16 with a guard: a power-of-two scale, and counts of what it cannot hold",
        "job": "a harvest before it is planned: models found, corpora read, id computed",
        "planner": "the effect of planning: pieces on disk, by several processes, and what an earlier call has left",
        "bench": "what units are made with on this machine: models, device, threads",
        "lock": "one harvest of a store at a time",
        "destination": "where a store goes: into a folder, or unit by unit to a URL",
        "unit": "the batches of one shard of one model -> what store.put takes",
        "worker": "one process that makes units, with one model in memory at a time",
        "estimate": "how long a plan will take here, from some of its own batches",
        "work": "the effect: a plan -> a finished store, by whatever crew makes its units",
        "cluster": "the crew of a dask cluster",
        "inspect": "rows side by side, for people",
        "check": "a sample of rows, run again and decoded",
        "overview": "what stores there are, how far they are, which runs used them",
        "pack": "a finished store once more, its activations compressed",
        "push": "a finished store -> a URL",
        "cached": "datasets that SAELens' CacheActivationsRunner has written",
        "adopt": "caches of dictionary_learning and SAELens -> a store",
        "console": "options and results of the commands",
        "upkeep": "harvest status | ls | verify | repair | pack | pull | import | inspect",
        "cli": "harvest run | plan | sites, and those of upkeep",
    },
    "train": {
        "chance": "random numbers of a key: permutations, draws",
        "order": "pure: (seed, step) -> the rows of a batch: shuffled, in file order, in groups; resume is one integer",
        "weights": "how many rows each store of a mixture gives, and which",
        "filter": "which rows of a store a run learns from, and what dropped the others",
        "sources": "what a run asks of a store: sources, and differences of two",
        "reader": "shards, mapped, read or decoded ahead -> the rows of a batch",
        "loader": "threads -> a ring of slots -> batches on the device",
        "resident": "rows that stay where they are used, in memory or on the device",
        "schedule": "values over steps, as polylines",
        "wiring": "spans: which latents each source reads into and writes from",
        "parallel": "what the ranks of torchrun agree on; one process is one rank",
        "shards": "latents shared by the ranks: what each has of them",
        "kernels.entries": "kept entries of a matrix of codes",
        "kernels.fused": "sums over kept entries on a GPU, in Triton",
        "kernels.radix": "which entries are kept, on a GPU, in Triton",
        "kernels.choice": "entries or matrices, fp32 or bf16: by what was measured; torch or Triton",
        "kernels.ranked": "which of the scores that ranks have selected are kept, over all of them",
        "kernels.select": "which entries are kept, without a sort of all",
        "kernels.products": "products with codes and their gradients: of kept entries, or in bf16",
        "pre": "pre-activations, as activations ask for them",
        "code": "codes, and the record of a forward pass; what makes codes",
        "activation": "activations that several methods use, and those with gradients of their own",
        "objective": "the terms of a loss",
        "method": "what a method file builds, and how it is found by its file name",
        "methods.*": "one file per training method, which no other file names",
        "scale": "centring and scaling per source, part of the dictionary",
        "dictionary": "the one module with weights: encode, decode, save, load",
        "config": "what a run is told",
        "trainer": "one update of one dictionary, in its order of operations",
        "checkpoint": "the state of a run on disk, whole or absent",
        "compare": "how alike the latents of two dictionaries are",
        "exclusivity": "what is exclusive about spans that do not read every source",
        "measure": "the figures, with their formulas, over all rows at once",
        "calibrate": "thresholds from all rows of a store, behind the training",
        "resample": "dead latents begin again from rows that are reconstructed badly",
        "report": "a run's folder -> one page",
        "trackers": "TensorBoard and W&B: views of metrics.jsonl",
        "run": "a run in its folder: claimed, logged, kept, found again",
        "prepare": "a config and a store -> a trainer that can begin; refuses what is wrong",
        "sweep": "the table [sweep] -> the configs of its runs",
        "plan": "what runs take, and which of them are trained at once",
        "together": "the runs of one pass, on one loader",
        "spread": "runs over GPUs, a process each",
        "stream": "a run on batches that are made as they are needed, without a store",
        "fit": "runs from store to report, from their beginning or their last checkpoint",
        "batches": "rows of a store for loops of one's own: as training reads them, in file order, or in groups",
        "outlook": "what runs would read and take, told before they begin",
        "interop.tensors": "tensors and tables in files of other libraries",
        "interop.found": "what was found in a file of another library, and what lies beside such files",
        "interop.normaliser": "how crosscoder_learning has scaled rows",
        "interop.plain": "an autoencoder or a transcoder as other libraries have it: matrices over raw rows",
        "interop.sae_lens": "folders of SAELens",
        "interop.sparsify": "checkpoints of sparsify",
        "interop.saes": "files of the autoencoders of dictionary_learning",
        "interop.crosscoders": "files of crosscoders, of every era",
        "interop.crosscoders_written": "crosscoders as files of crosscoder_learning",
        "interop.caches": "rows of a cache by number: of a store, or of a folder of dictionary_learning",
        "interop.formats": "which library a file is of; a dictionary as files of another",
        "interop.hub": "dictionaries on the hub, and in SAELens' registry of those that are published",
        "interop.dictionary_learning.shown": "weights in another shape than they are kept in",
        "interop.dictionary_learning.shaped": "dictionaries of ours in the shapes that dictionary_learning has",
        "interop.dictionary_learning.sae": "what its autoencoders have in common",
        "interop.dictionary_learning.autoencoders": "its autoencoders",
        "interop.dictionary_learning.codes": "by which norm codes are weighed, in its words",
        "interop.dictionary_learning.layers": "the encoder and the decoder of a crosscoder, as layers",
        "interop.dictionary_learning.crosscoders": "its crosscoders",
        "interop.dictionary_learning.partition": "which latents of a dedicated crosscoder belong to which model",
        "interop.dictionary_learning.dedicated": "its dedicated feature crosscoders",
        "interop.dictionary_learning.loading": "a dictionary of the reference by its folder, whatever its class",
        "interop.dictionary_learning.recipes": "what its trainers minimise, in terms of ours",
        "interop.dictionary_learning.loose": "dictionaries of a user's own, trained by terms of ours",
        "interop.dictionary_learning.trainer": "a trainer of any kind, and those that are ours",
        "interop.dictionary_learning.trainers": "its trainers of autoencoders by name",
        "interop.dictionary_learning.crossing": "and of crosscoders",
        "interop.dictionary_learning.buffers": "its live buffers",
        "interop.dictionary_learning.evaluation": "its figures, in fp64 over all batches",
        "interop.dictionary_learning.training": "trainSAE: trainers on one stream of batches",
        "interop.dictionary_learning.caches": "its caches",
        "interop.dictionary_learning.pairs": "the rows of two models, in a store or as its scripts keep them",
        "interop.check": "eight quick checks of dedicated crosscoders",
        "exchange": "train import | export | check",
        "crosscoder": "train crosscoder: the command line of crosscoder_learning",
        "cli": "train run | plan | resume | measure | compare | methods | show, and those of exchange",
    },
}

STAGES = ("harvest", "train")
EVERYWHERE = ("*",)

# Who may import what is not in the standard library, inside functions too. What is not listed has no home yet.
HOMES: dict[str, tuple[str, ...]] = {
    "torch": EVERYWHERE,
    "numpy": EVERYWHERE,
    "scipy": ("train/compare.py",),
    "triton": ("train/kernels/fused.py", "train/kernels/radix.py"),  # where it can be had
    "zarr": ("shared/store.py",),
    "numcodecs": ("shared/codec.py",),
    "google_crc32c": ("shared/layout.py", "shared/remote.py"),  # there as bytes arrive
    "obstore": ("shared/objects.py",),  # of the extra `s3`, inside Objects alone
    "transformers": ("shared/models.py",),
    "huggingface_hub": ("shared/models.py", "shared/hub.py", "harvest/corpus.py", "train/interop/hub.py"),
    "sae_lens": ("train/interop/hub.py",),  # where it can be had
    "tqdm": ("shared/log.py",),
    "tomli_w": ("shared/config.py",),
    "pydantic": ("*/config.py", "train/filter.py", "train/method.py", "train/methods/*.py"),
    "psutil": ("harvest/lock.py", "shared/device.py"),
    "jinja2": ("harvest/chat.py",),
    "safetensors": ("shared/models.py", "train/checkpoint.py", "train/dictionary.py", "train/interop/tensors.py"),
    "datasets": ("harvest/corpus.py", "harvest/cached.py"),
    "pyarrow": ("harvest/corpus.py",),
    "dask": ("harvest/cluster.py", "shared/view.py"),  # there inside View.dask alone
    "distributed": ("harvest/cluster.py",),
    "typer": (
        "harvest/console.py",
        "harvest/upkeep.py",
        "harvest/cli.py",
        "train/exchange.py",
        "train/crosscoder.py",
        "train/cli.py",
    ),
    "matplotlib": ("train/report.py",),
    "tokenizers": (),
    "wandb": ("train/trackers.py",),
    "tensorboard": ("train/trackers.py",),
}

COMPUTED_IMPORTS = ("shared/models.py", "train/method.py")  # a package with a GGUF file; a method by its file name

HEAVY = (
    "transformers", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "dask", "distributed",
    "typer", "matplotlib", "obstore", "tensorboard", "wandb", "triton",
)  # fmt: skip
STAGE_1_ONLY = HEAVY[: HEAVY.index("typer")]

FILE_LINES, FUNCTION_LINES, COMPLEXITY = 400, 60, 12
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """`target` is the dotted name with what is taken from it, `train.order.Order`; relative ones begin with a dot."""

    line: int
    target: str
    for_types: bool  # stands under `if TYPE_CHECKING`


@cache
def sources() -> dict[str, Path]:
    """{dotted module name: file} of the three packages; a package's own name stands for its __init__.py."""
    found = {}
    for package in MODULES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def modules() -> dict[str, Path]:
    return {name: file for name, file in sources().items() if file.name != "__init__.py"}


def label(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for file in sources().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, kinds):
                yield file, node


def functions() -> Iterator[tuple[str, Function]]:
    for file, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        yield f"{label(file)}:{node.lineno} {node.name}", node


def called(node: ast.AST, *names: str) -> bool:
    """Whether `node` is a call of one of these names, bare or as an attribute."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in names


@cache
def imports(file: Path) -> list[Import]:
    """Every import of a file, wherever it stands, with those that `import_module` is given as text."""
    for_types = {
        inner
        for node in ast.walk(tree(file))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree(file)):
        targets = list(_targets(node))
        found += [Import(getattr(node, "lineno", 0), target, node in for_types) for target in targets]
    return found


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and called(node, "import_module", "__import__") and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant):
            yield str(name.value)


def module_of(target: str) -> str:
    """The module or package of ours that an import reads: the longest known beginning of its name."""
    parts = target.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in sources()), "")


def listed(module: str) -> str:
    """The entry of MODULES that a module stands under, or nothing."""
    package, _, name = module.partition(".")
    return next((entry for entry in MODULES[package] if fnmatch(name, entry)), "")


def rank(module: str) -> int:
    return list(MODULES[module.partition(".")[0]]).index(listed(module))


def python(code: str, *arguments: object, cwd: Path) -> str:
    """The stdout of `code` in a fresh interpreter."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny tensors: more threads only wait for each other
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- modules and what they import -----------------------------------------------------------------------------------


def test_every_module_is_on_the_list() -> None:
    assert [label(file) for name, file in modules().items() if not listed(name)] == []


def test_every_listed_module_exists() -> None:
    wanted = {f"{package}.{entry}" for package, entries in MODULES.items() for entry in entries}
    assert sorted(wanted - {f"{name.partition('.')[0]}.{listed(name)}" for name in modules()}) == []


def test_every_package_is_built_into_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name for name, file in sources().items() if file.name == "__init__.py"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_shared_imports_no_stage_and_the_stages_never_import_each_other() -> None:
    wrong = []
    for name, file in sources().items():
        allowed = {name.partition(".")[0], "shared"}
        for one in imports(file):
            if (package := one.target.partition(".")[0]) in MODULES and package not in allowed:
                wrong.append(f"{label(file)}:{one.line} imports {package}")
    assert wrong == []


def test_a_module_imports_only_modules_above_it_in_its_package() -> None:
    wrong = []
    for name, file in modules().items():
        package = name.partition(".")[0]
        for one in imports(file):
            target = module_of(one.target)
            if one.for_types or target.partition(".")[0] != package or target == "train.methods":
                continue
            if target == package or rank(target) >= rank(name):
                wrong.append(f"{label(file)}:{one.line} imports {target}")
    assert wrong == []


def test_no_import_is_relative() -> None:
    found = [f"{label(f)}:{one.line}" for f in sources().values() for one in imports(f) if one.target.startswith(".")]
    assert found == []


def test_every_dependency_is_imported_in_its_own_file_only() -> None:
    wrong = []
    for file in sources().values():
        for one in imports(file):
            root = one.target.partition(".")[0]
            if root in MODULES or root in sys.stdlib_module_names or not root:
                continue
            if not any(fnmatch(label(file), pattern) for pattern in HOMES.get(root, ())):
                wrong.append(f"{label(file)}:{one.line} imports {root}")
    assert wrong == []


def test_every_imported_dependency_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [text for name, texts in project["optional-dependencies"].items() if name != "test" for text in texts]
    required = [*project["dependencies"], *extras]
    declared = {re.split(r"[^\w-]", text)[0].replace("-", "_").lower() for text in required}
    used = {one.target.partition(".")[0] for file in sources().values() for one in imports(file)}
    assert sorted(used & set(HOMES) - declared) == []


def test_modules_are_imported_by_computed_names_in_two_files_only() -> None:
    found = {
        label(file)
        for file, node in nodes(ast.Call)
        if called(node, "import_module", "__import__") and not list(_targets(node))
    }
    assert found <= set(COMPUTED_IMPORTS)


def test_init_files_hold_a_docstring_and_at_most_the_public_names() -> None:
    wrong = []
    for file in sources().values():
        if file.name != "__init__.py":
            continue
        if not ast.get_docstring(tree(file)):
            wrong.append(f"{label(file)}:1 has no docstring")
        for node in tree(file).body[1:]:
            names_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not names_all and not isinstance(node, ast.Import | ast.ImportFrom):
                wrong.append(f"{label(file)}:{node.lineno} {ast.unparse(node)[:60]}")
    assert wrong == []


def test_every_module_has_a_test_file_of_its_name() -> None:
    names = [name.split(".") for name in modules() if name.count(".") == 1]  # a package's package has one for all
    expected = [ROOT / "tests" / package / f"test_{name}.py" for package, name in names]
    assert [label(file) for file in expected if not file.is_file()] == []


# --- sizes and style ------------------------------------------------------------------------------------------------


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {label(file): len(file.read_text(encoding="utf-8").splitlines()) for file in sources().values()}
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {name: (node.end_lineno or node.lineno) - node.lineno + 1 for name, node in functions()}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_every_module_begins_with_a_docstring() -> None:
    assert [label(file) for file in sources().values() if not ast.get_docstring(tree(file))] == []


def test_every_function_is_annotated() -> None:
    wrong = []
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [one.arg for one in arguments if one and one.annotation is None and one.arg not in ("self", "cls")]
        if bare or node.returns is None:
            wrong.append(f"{name}: {', '.join(bare) or 'its result'}")
    assert wrong == []


def test_ruff_checks_annotations_blind_excepts_and_complexity_everywhere() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"ANN", "BLE", "C90"} <= set(lint["select"])
    assert lint["mccabe"]["max-complexity"] <= COMPLEXITY
    assert lint.get("per-file-ignores", {}) == {}
    silenced = re.compile(r"#\s*(?:ruff:\s*)?noqa(?!:)|#\s*(?:ruff:\s*)?noqa:.*\b(?:ANN|BLE|C90|PLR0915)")
    assert _lines_with(silenced) == []


def test_nothing_catches_every_exception_without_raising_again() -> None:
    wrong = []
    for file, node in nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        caught = ast.unparse(node.type) if node.type else "everything"
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if node.type is None or (re.search(r"\b(Base)?Exception\b", caught) and not raises):
            wrong.append(f"{label(file)}:{node.lineno} catches {caught}")
    for file, node in nodes(ast.Call):
        if called(node, "suppress") and re.search(r"\b(Base)?Exception\b", ast.unparse(node)):
            wrong.append(f"{label(file)}:{getattr(node, 'lineno', 0)} suppresses every exception")
    assert wrong == []


def test_nothing_asks_with_hasattr() -> None:
    found = [f"{label(file)}:{getattr(node, 'lineno', 0)}" for file, node in nodes(ast.Call) if called(node, "hasattr")]
    assert found == []


def test_nothing_asks_an_object_whether_it_is_of_one_of_our_classes() -> None:
    ours = {node.name for _, node in nodes(ast.ClassDef) if isinstance(node, ast.ClassDef)}
    wrong = []
    for file, node in nodes(ast.Call):
        if isinstance(node, ast.Call) and called(node, "isinstance"):
            asked = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
            wrong += [f"{label(file)}:{node.lineno} isinstance(..., {name})" for name in sorted(asked & ours)]
    assert wrong == []


def test_no_file_names_a_folder_of_one_machine() -> None:
    assert _lines_with(re.compile(r"(?<![\w.:~$}/-])/(?:home|root|tmp|work|workspace|Users|scratch|mnt)/[\w.]")) == []


def _lines_with(pattern: re.Pattern[str]) -> list[str]:
    """`file:line text` of every match in the files that git tracks or is about to."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listing.stdout.splitlines():
        if not (ROOT / name).is_file():  # removed, and git not told yet
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number} {line.strip()}")
    return found


# --- what is loaded when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", MODULES)
def test_importing_a_package_loads_nothing_heavy(package: str, tmp_path: Path) -> None:
    loaded = python(f"import sys, {package}; print(*sorted(sys.modules))", cwd=tmp_path).split()
    assert package in loaded
    assert sorted(set(loaded) & set(HEAVY)) == []


HIDE = f"""
import sys
from importlib.machinery import PathFinder

HIDDEN = {STAGE_1_ONLY!r}

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
for name in HIDDEN:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{{name}} is not hidden")
"""

TRAIN = """
from pathlib import Path
from train import Dictionary, Store, fit
from train.cli import app

store, folder = Store.open(Path(sys.argv[1])), Path(sys.argv[2])
config = {
    "wiring": {"kind": "dedicated", "latents": 24, "exclusive": 4},
    "method": {"name": "batch_topk", "k": 4},
    "steps": 5, "batch": 16,
}
run = fit(store, config, folder, quiet=True)
assert set(run.figures["sources"]) == {"a", "b"}
assert (folder / "report.html").read_text().count("<svg") >= 3
assert Dictionary.load(folder).latents == 24
app(["measure", str(folder), "--json"], standalone_mode=False)
"""


def test_a_run_needs_no_library_of_the_first_stage(tmp_path: Path) -> None:
    store = make_store(tmp_path / "small.zarr", rows=200)
    printed = python(HIDE + TRAIN, store.path, tmp_path / "run", cwd=tmp_path)
    assert '"fve"' in printed
