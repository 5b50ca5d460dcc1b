import dataclasses
import functools
import importlib
import os
import subprocess
import sys
import textwrap
import time

import pytest
import toy

from weightsmith.core.load import load_object
from weightsmith.core.own_code import code_digest
from weightsmith.lab.fingerprint import function_digest, identity
from weightsmith.lab.run import run


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


def forget(*names):
    for name in names:
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def edit(path, text):
    """Write a file and run the modules that were imported from it anew."""
    write(path, text)
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            os.utime(path, (time.time() + 9,) * 2)  # bytecode is told apart by size and time
            importlib.reload(module)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of the user's own, beside a script."""
    write(tmp_path / "ownpack" / "__init__.py", "")
    write(tmp_path / "ownpack" / "widths.py", "WIDTH = 1\n")
    write(tmp_path / "ownpack" / "deep" / "__init__.py", "")
    write(tmp_path / "ownpack" / "deep" / "nets.py", "from .. import widths\nimport torch\n")
    write(tmp_path / "ownpack" / "unrelated.py", "X = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget("ownpack", "ownpack.widths", "ownpack.deep", "ownpack.deep.nets")


def test_code_of_a_package_counts_with_what_it_imports_from_anywhere_of_the_users(project):
    module = importlib.import_module("ownpack.deep.nets")
    before = code_digest(module)
    write(project / "ownpack" / "unrelated.py", "X = 2\n")
    assert code_digest(module) == before
    edit(project / "ownpack" / "widths.py", "WIDTH = 2\n")
    assert code_digest(module) != before


def test_a_script_counts_with_a_module_from_another_folder_of_the_path(project, tmp_path):
    write(tmp_path / "scripts" / "job_of_mine.py", "import ownpack.widths\ndef job(config, job): return {}\n")
    job = load_object(str(tmp_path / "scripts" / "job_of_mine.py:job"), "run")
    before = function_digest(job)
    assert function_digest(functools.partial(job)) == before
    edit(project / "ownpack" / "widths.py", "WIDTH = 3\n")
    assert function_digest(job) != before


def test_a_script_that_is_loaded_again_runs_what_was_edited_in_another_folder(project):
    """The fingerprint reads the new text: the old code must not be run under it."""
    write(project / "scripts" / "loads_mine.py", "import ownpack.widths\nVALUE = ownpack.widths.WIDTH\n")
    name = str(project / "scripts" / "loads_mine.py:VALUE")
    assert load_object(name, "run") == 1
    write(project / "ownpack" / "widths.py", "WIDTH = 7\n")
    assert load_object(name, "run") == 7


def test_two_files_of_one_name_are_each_loaded_once(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder / "same_name.py", "def job(config, job): return {}\n")
    jobs = [load_object(str(tmp_path / folder / "same_name.py:job"), "run") for folder in ("one", "two", "one", "two")]
    assert jobs[0] is jobs[2]
    assert jobs[1] is jobs[3]
    assert jobs[0] is not jobs[1]


def notebook(text):
    """A function as a notebook holds it: in a module without a file."""
    scope = {"__name__": "__main__"}
    exec(textwrap.dedent(text), scope)
    return scope["job"]


NOTEBOOK = """
import functools, os.path
from torch import nn
import ownpack.widths
FACTOR = 2
LAYERS = [{"width": 8}]
class Base(nn.Module):
    depth = 4
    @property
    def height(self): return 5
class Net(Base):
    @staticmethod
    def make(): return Net() and 6
def helper(): return {"a", "b", "c"} and FACTOR, LAYERS
def outer(gain):
    def inner(*, scale=9): return gain * scale
    return inner
gained = functools.partial(outer(10), 11)
def job(config, job): return [helper() for _ in "x"], Net.make(), gained(), ownpack.widths, os.path.join
"""


def test_code_of_a_notebook_counts_with_what_it_uses(project, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    texts = [NOTEBOOK.replace(old, "12") for old in ("2", '"width"', "4", "5", "6", '"c"', "9", "10", "11", '"x"')]
    digests = [function_digest(notebook(text)) for text in [NOTEBOOK, *texts]]
    edit(project / "ownpack" / "widths.py", "WIDTH = 2\n")
    digests.append(function_digest(notebook(NOTEBOOK)))
    assert len({*digests}) == len(digests)
    assert function_digest(notebook(f"print\n\n{NOTEBOOK}\nUNRELATED = 3")) == digests[-1]


def test_values_and_functions_bound_to_a_job_count(project):
    write(project / "bound_mine.py", "def job(config, job, loss=None): return {}\n")
    write(project / "losses_mine.py", "def loss(): return 1\n")
    job = load_object("bound_mine.py:job", "run")
    loss = load_object("losses_mine.py:loss", "run")

    def asked(**bound):
        experiment = dataclasses.replace(toy.EXPERIMENT, job=functools.partial(job, **bound))
        return identity(experiment, toy.Config(), "")["experiment"]

    assert asked() == asked()
    seen = [asked(), asked(loss=1), asked(loss=2), asked(loss=loss)]
    edit(project / "losses_mine.py", "def loss(): return 2\n")
    assert len({*seen, asked(loss=sys.modules["losses_mine"].loss)}) == 5


def test_code_of_a_notebook_is_the_same_in_every_process(project):
    program = f"{NOTEBOOK}\nfrom weightsmith.lab.fingerprint import function_digest\nprint(function_digest(job))"
    outputs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) == 13


def test_every_part_of_the_question_makes_another_folder_and_is_named(tmp_path, monkeypatch):
    write(tmp_path / "asked.py", "import toy, dataclasses\ndef job(c, j): return {'score': 1, 'cost': 1}\n")

    def ask(**changes):
        forget("asked")
        job = load_object(str(tmp_path / "asked.py:job"), "run")
        experiment = dataclasses.replace(toy.EXPERIMENT, job=job, **changes)
        return run(experiment, toy.Config(), seeds=1, out=tmp_path / "runs", workers=1)

    one = ask()
    assert (ask().folder, ask().news) == (one.folder, [])
    write(tmp_path / "asked.py", "def job(c, j): return {'score': 2, 'cost': 1}\n")
    assert ask().news == [f"experiment changed since {one.folder}: nothing of it is reused"]
    monkeypatch.setattr("weightsmith.__version__", "999")
    assert "package changed since" in ask().news[0]
    data = ask(task=lambda config: dataclasses.replace(toy.task(config), fingerprint="other"))
    assert "data and model code changed since" in data.news[0]


def test_our_own_experiments_count_with_the_package_alone():
    assert function_digest(run) == ""
    assert identity(toy.EXPERIMENT, toy.Config(), "")["experiment"].startswith("1 ")
