"""Benchmarks and examples import what there is: most of them are too slow for the tests to run."""

import ast
import importlib
import importlib.util
import json
from pathlib import Path

import pytest

from weightsmith.lab.data.text_sets import load_questions, load_sentences

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_what_there_is(script):
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "weightsmith":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def example_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_the_first_operation_of_a_solution_is_the_class_of_its_question(tmp_path):
    example = example_of("first_operations")
    data = tmp_path / "data"
    data.mkdir()
    answers = ["so <<48/2=24>>24, <<48+24=72>>72", "half of 7.5 is <<7.5*.5=3.75>>", "5", "<<(20-5)*2=30>>"]
    rows = [json.dumps({"question": f"q{i}, with a comma", "answer": answer}) for i, answer in enumerate(answers)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    assert example.main([str(tmp_path / "out"), "--data", str(data)]) == 0
    loaded = load_sentences(str(tmp_path / "out"))
    assert [loaded.classes[i] for i in loaded.train_labels] == ["divide", "multiply", "subtract"]
    assert loaded.train[0] == "q0, with a comma"


def test_word_problems_become_four_tasks_without_a_common_problem(tmp_path):
    example = example_of("word_problems")
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"question": f"A sack of {at} kg costs $1,{at}00.", "answer": "<<4/2=2>>2, <<2*3=6>>6"} for at in range(1, 9)
    ]
    rows += [{"question": "No number here", "answer": "<<1+1=2>>2"}, {"question": "7 sacks", "answer": "none"}]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert example.main([str(tmp_path / "out"), "--data", str(data)]) == 0
    made = {name: load_questions(str(tmp_path / "out" / name), "test") for name in example.TASKS}
    assert {name: rows[0][1] for name, rows in made.items()} == {
        "operation": "divide", "largest": "1200", "operation-reworded": "divide", "calculations": "2"
    }  # fmt: skip
    texts = [question.partition(": ")[2] for rows in made.values() for question, _ in rows]
    assert len(texts) == len(set(texts)) == 8
