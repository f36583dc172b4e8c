"""The sheet of exercises: `python course/exercises.py DIR`.

DIR becomes a copy of the project in which the bodies of the method are left out; signatures, docstrings with formulas
and shapes, and comments on lines of their own stay. In DIR, `python -m pytest -q course` grades what is written there,
and `python tars.py` trains it.
"""

import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tars.py", "eval.py", "data_prep.py", "test_tars.py", "requirements.txt", "README.md", "course/README.md",
          "course/baselines.py", "course/test_exercises.py")
HOLES = {  # functions whose bodies are left out, in the order of the course
    "base_reward", "format_reward", "modality_advantages", "token_weights", "grpo_loss", "pool_hidden_states",
    "representation_reward", "behavior_reward", "pick_references", "total_reward", "modality_recovery_rate",
    "LoRALinear.forward", "paired_rows", "train_step", "sft_loss", "offline_answers", "dpo_loss", "offline_loss"}


def with_holes(source):
    """Python source without the bodies of HOLES. Signatures, docstrings and comments on lines of their own stay."""
    lines, functions = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                functions[function.name if function is node else f"{node.name}.{function.name}"] = function
    for name in sorted(HOLES & functions.keys(), key=lambda name: -functions[name].lineno):
        body = functions[name].body  # its docstring comes first
        start, end = body[0].end_lineno, functions[name].end_lineno
        comments = [line for line in lines[start:end] if line.lstrip().startswith("#")]
        hole = f'raise NotImplementedError("still to be written: {name}")\n'
        lines[start:end] = [*comments, " " * body[0].col_offset + hole]
    return "".join(lines)


def main(folder):
    """Write the sheet to a new folder."""
    if Path(folder).exists():
        raise SystemExit(f"{folder} exists: give a new folder")
    for name in COPIED:
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
        if name in ("tars.py", "course/baselines.py"):
            target.write_text(with_holes(target.read_text()))
    (Path(folder) / "pytest.ini").write_text("[pytest]\naddopts = --tb=line\n")  # a sentence, no traceback
    print(f"{folder}: fill in tars.py and course/baselines.py; grade it there with: python -m pytest -q course")


if __name__ == "__main__":
    main(*sys.argv[1:])
