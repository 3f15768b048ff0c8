"""long_document.ipynb: its code runs top to bottom with tiny/, and finds the key; and what is stored in it.

python -m pytest examples/test_long_document.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent / "long_document.ipynb"
OUTPUT = {
    "stream": {"name", "text"},
    "display_data": {"data", "metadata"},
    "execute_result": {"data", "metadata", "execution_count"},
}


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_code_runs_from_its_own_folder_with_tiny(notebook):
    pytest.importorskip("matplotlib")
    lines = "\n".join(code(notebook)).split("\n")
    line = 'folder = Path("smollm2")  # or Path("tiny"), or the folder of a LongLLaMA'
    assert lines.count(line) == 1
    program = "\n".join(x.replace(line, 'folder = Path("tiny")') for x in lines if not x.startswith(("%", "!")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"document, by memory +\d\d.\d% a token +'71428", done.stdout), done.stdout
    assert not re.search("its end, no memory .*71428", done.stdout), done.stdout
    shares = [float(x) for x in re.findall(r"([\d.]+)% at token .*\[.*pass key", done.stdout)]
    assert max(shares) > 20, done.stdout  # memory's attention goes to the sentence


def test_it_is_a_notebook_of_format_4_that_was_run_top_to_bottom(notebook):
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    keys = {"markdown": {"cell_type", "id", "metadata", "source"}}
    keys["code"] = keys["markdown"] | {"execution_count", "outputs"}
    for cell in cells:
        assert cell.keys() == keys[cell["cell_type"]] and cell["metadata"] == {}
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == [*range(1, len(ran) + 1)]
    outputs = [output for cell in ran for output in cell["outputs"]]
    for output in outputs:  # no errors, and nothing that was written to standard error
        assert output.keys() - {"output_type"} == OUTPUT[output["output_type"]] and output.get("name") != "stderr"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("71428" in "".join(output.get("text", "")) for output in outputs)


def test_it_is_small_and_names_no_place_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert re.findall(r"/(?:home|root|tmp|Users|work|content)/", text) == []
