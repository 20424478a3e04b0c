"""The card, the floors and the skeleton: what the package promises before any of its parts runs."""

import ast
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sfumato

ROOT = Path(__file__).resolve().parent.parent
SRC = Path(sfumato.__file__).resolve().parent.parent
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "grpc": "tritonclient",  # which brings it
    "pkcs11": "python-pkcs11",
    "prometheus_client": "prometheus-client",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}
OURS = {"sfumato", "triton_python_backend_utils"}  # the latter is the server's, and there when it runs our model.py
HEAVY = {"cv2", "jinja2", "kr8s", "kubernetes", "matplotlib", "numpy", "ray", "rich", "torch", "tritonclient", "typer"}


def fresh(code: str, src: Path = SRC) -> str:
    """What a new interpreter prints; raises where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(src)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str) -> set[str]:
    """Top-level packages in sys.modules after `code`."""
    return set(fresh(f"import sys\n{code}\nprint(*{{m.partition('.')[0] for m in sys.modules}})").split())


def test_card_holds_these_names_and_no_others() -> None:
    assert sfumato.__all__ == [
        "AsyncClient",
        "Client",
        "Obfuscator",
        "__version__",
        "audit",
        "fit",
        "load",
        "measure",
        "split",
    ]


@pytest.mark.parametrize("name", sfumato.__all__)
def test_card_names_resolve(name: str) -> None:
    value = getattr(sfumato, name)
    assert isinstance(value, str) if name == "__version__" else callable(value)
    assert name in dir(sfumato)


def test_a_name_is_loaded_once_and_is_its_home_s() -> None:
    from sfumato.core.obfuscator import Obfuscator

    assert sfumato.Obfuscator is Obfuscator
    assert vars(sfumato)["Obfuscator"] is Obfuscator


def test_unknown_name_is_an_attribute_error_that_lists_the_card() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'obfuscate'; it has AsyncClient, Client, Obfuscator"):
        sfumato.obfuscate  # noqa: B018
    assert not hasattr(sfumato, "__path_that_is_not_there__")


def test_no_public_name_is_also_a_module() -> None:
    """Else `import sfumato.x` would replace the function sfumato.x by the module."""
    modules = {module.name for module in pkgutil.iter_modules(sfumato.__path__)}
    assert "core" in modules
    assert not modules & set(sfumato.__all__)


def test_importing_the_home_of_a_function_leaves_the_function() -> None:
    code = "import sfumato, sfumato.measurement, sfumato.core.cut; print(sfumato.measure, sfumato.split)"
    assert fresh(code).count("<function ") == 2


def test_import_sfumato_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_after("import sfumato")


def test_use_of_a_name_loads_what_it_needs_and_not_the_interface() -> None:
    loaded = loaded_after("import sfumato; sfumato.Obfuscator")
    assert "torch" in loaded
    assert not {"jinja2", "kr8s", "kubernetes", "matplotlib", "ray", "tritonclient", "typer"} & loaded


def test_version_is_in_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", sfumato.__version__)
    assert f"[{sfumato.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def contracts(src: Path) -> subprocess.CompletedProcess[str]:
    """The import rules of pyproject.toml, held against the package in `src`."""
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed: pip install -e .[dev]")
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(src)},
        check=False,
    )


def test_import_rules_hold() -> None:
    done = contracts(SRC)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("outside/forbidden.py", "import sfumato.trusted"),
        ("outside/forbidden.py", "from cryptography.hazmat.primitives.ciphers import Cipher"),
        ("core/forbidden.py", "import sfumato.tasks"),
        ("tasks/forbidden.py", "from sfumato import learn"),
        ("trusted/forbidden.py", "import sfumato.cli"),
        ("loft.py", "import sfumato.core"),
    ],
)
def test_import_rules_can_break(tmp_path: Path, module: str, line: str) -> None:
    shutil.copytree(
        SRC / "sfumato", tmp_path / "sfumato", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    (tmp_path / "sfumato" / module).write_text(f"{line}\n")
    done = contracts(tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def third_party(path: Path, *, top: bool = False) -> Iterator[str]:
    """Top-level packages that a file imports, anywhere in it, or as soon as it is imported itself."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - OURS


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    """A package that only another dependency brings along is found here; extras are imported where they are needed.

    The gateway as a whole needs its extra, and of the cluster's modules one; their verbs import them when they run.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [wanted for name, more in project["optional-dependencies"].items() if name != "dev" for wanted in more]
    declared, optional = (
        {re.split(r"[^\w-]", wanted)[0] for wanted in several} for several in (project["dependencies"], extras)
    )
    for top, allowed in ((True, declared), (False, declared | optional)):
        late = [*SRC.glob("sfumato/gateway/*.py"), SRC / "sfumato/cluster/api.py"] if top else []
        paths = [path for path in SRC.glob("sfumato/**/*.py") if path not in late]
        found = {name for path in paths for name in third_party(path, top=top)}
        assert {DISTRIBUTIONS.get(name, name) for name in found} <= allowed


def test_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {line.partition("==")[0].replace("_", "-") for line in lines}
    assert {re.split(r"[^\w-]", line)[0] for line in wanted} <= pinned


@pytest.fixture(scope="module")
def check_docs() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("check_docs", ROOT / ".ci/check_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_docs"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_docs"]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("[gone](nowhere.md)", "link to nowhere.md"),
        ("# Here\n[gone](#there)", "no such heading"),
        ("It is irreversible.", "does not claim"),
        ("```python\nx = = 1\n```", "does not parse"),
        ("```python\nsfumato.obfuscate(x)\n```", "sfumato.obfuscate does not exist"),
        ("```sh\nmake coffee\n```", "no such target"),
        ("```sh\npython3 deploy/no-such-script.py --dataset D\n```", "does not exist"),
    ],
)
def test_document_check_finds(check_docs: ModuleType, tmp_path: Path, text: str, finding: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{text}\n")
    (found,) = check_docs.check(page)
    assert finding in found[1]


def test_document_check_passes_what_is_right(check_docs: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, here\n[up](#a-title-here) [web](https://example.org/x) `[no](link.md)`\nWe never say anonymous.\n"
        "```python\nsplit = sfumato.split(model)\n```\n```sh\nmake demo PYTHON=python3\n```\n```text\nx = = 1\n```\n"
    )
    assert list(check_docs.check(page)) == []


def test_document_check_reads_options_from_the_help(check_docs: ModuleType) -> None:
    check = check_docs.check_sfumato
    assert list(check(["sfumato", "measure", "--dataset", "D", "--alpha", "0.8"])) == []
    assert list(check(["sfumato", "measure", "--datasett", "D"])) == ["`sfumato measure` has no --datasett"]
    assert list(check(["sfumato", "brew"])) == ["`sfumato brew`: no such verb"]
    assert list(check(["sfumato", "k8s", "job", "run", "--nope"])) == ["`sfumato k8s job run` has no --nope"]
