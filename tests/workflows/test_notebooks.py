"""The notebooks run from top to bottom, one after the other in one folder, as a reader would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_notebooks_run_and_show_no_path_of_a_machine(tmp_path: Path) -> None:
    assert len(NOTEBOOKS) == 3
    scripts = []
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert all(cell["outputs"] for cell in cells if "print(" in "".join(cell["source"])), (
            f"{path.name} was not run before it was saved"
        )
        assert "Traceback" not in text and str(Path.home()) not in text and "site-packages" not in text
        script = "\n\n".join("".join(cell["source"]) for cell in cells)
        scripts.append((path.name, script.replace("n_slides=24", "n_slides=12").replace("epochs=30", "epochs=4")))  # for time
    # in one process, since libraries take seconds to load; not as a file: processes started for painting would begin it anew
    code = f"for name, script in {scripts!r}: exec(compile(script, name, 'exec'), {{'__name__': '__main__'}})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
