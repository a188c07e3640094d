"""Make tests/data/lmms_mme.json: what lmms-eval's MME task asks and how it scores replies.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install lmms-eval
    /tmp/peer/bin/python tools/make_lmms_reference.py

Only lmms-eval's own file of the task is run; nothing of grace is imported here. The file holds

- `replies`: texts, and what the task's parser takes each for;
- `prompts`: questions, and what the task asks a model;
- `cases`: rows (subtask, image, answer, reply) drawn at random, with `perception` and `cognition`,
  the task's scores of them. Replies of the first half of the cases are of the plain kind that both
  parsers of MME take for the same; those of the other half are any.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import yaml

OUT = Path(__file__).parents[1] / "tests" / "data" / "lmms_mme.json"
CASES = 12
PLAIN = (
    "Yes", "No", "yes", "no", "Yes.", "No.", "YES!", "yes, it is", "No, it is not", "Nope", "Not",
    "The answer is no", "It is yes", "I do not know", "maybe", "", "Yes\nNo", "no yes",
)  # fmt: skip
ODD = (
    *PLAIN, " yes", "  yes", "\nNo", "\n\n\nNo.", "   no", "y", "n", "Y", "N.", " y ", "y.", "n!",
    "...yes", "..no", "a. no", "1. Yes", "A. Yes", "N.o", "y.e.s", ". y", "Y, it is", "**Yes**",
    "<s> no", "'No'", '"yes"', "oui", "none", "unknown", "know", "eyes", "ayes", "I'm sure: yes",
    "x", ".", "...", "   ", "\t", "yesno", "noyes", "n o", "YES.NO", "\u00a0yes", "\u200byes",
    "\uff39es", "Ye\u0301s", "\u0130yes", "no\u2026", "Answer: Yes", "- Yes", "true", "0", "NO\r\n",
)  # fmt: skip
QUESTIONS = (
    "Is there a red circle in this image? Please answer yes or no.",
    " Is this photo taken in a park?  Please answer yes or no.",
    "Is the word in this image \"please answer\"? Please answer yes or no.",
    "Are there 2 dogs?",
)  # fmt: skip


def task() -> tuple[ModuleType, dict[str, Any]]:
    """The functions and the settings of lmms-eval's task, without the rest of it."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("lmms-eval must be installed: pip install lmms-eval")
    folder = Path(spec.submodule_search_locations[0]) / "tasks" / "mme"
    file = importlib.util.spec_from_file_location("lmms_mme_task", folder / "utils.py")
    assert file is not None and file.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    text = (folder / "mme.yaml").read_text().replace("!function ", "")
    return module, yaml.safe_load(text)


def draw(mme: ModuleType, replies: tuple[str, ...], rng: Random) -> list[list[str]]:
    """Rows of some subtasks; a third of the replies is right by design: scores spread."""
    every = [name for names in mme.eval_type_dict.values() for name in names]
    rows = []
    for subtask in rng.sample(every, rng.randint(1, 6)):
        for image in range(rng.randint(2, 9)):
            for answer in rng.sample(("Yes", "No"), 2):
                said = answer if rng.random() < 0.35 else rng.choice(replies)
                rows.append([subtask, f"{image:03d}.png", answer, said])
    return rows


def scores(mme: ModuleType, rows: list[list[str]]) -> dict[str, float]:
    """The task's sums over subtasks."""
    kept: dict[str, list[Any]] = {"mme_perception_score": [], "mme_cognition_score": []}
    for subtask, image, answer, reply in rows:
        doc = {"question_id": f"{subtask}/{image}", "category": subtask, "answer": answer}
        for name, result in mme.mme_process_results(doc, [reply]).items():
            kept[name].append(result)
    return {
        name.split("_")[1]: mme.mme_aggregate_results(results) for name, results in kept.items()
    }


def main() -> None:
    """Write the file."""
    mme, settings = task()
    rng = Random(0)
    drawn = [draw(mme, PLAIN if n < CASES // 2 else ODD, rng) for n in range(CASES)]
    asked = settings["lmms_eval_specific_kwargs"]["default"]
    reference = {
        "lmms_eval": importlib.metadata.version("lmms-eval"),
        "replies": [[text, mme.parse_pred_ans(text)] for text in ODD],
        "prompts": [[q, mme.mme_doc_to_text({"question": q}, asked)] for q in QUESTIONS],
        "cases": [{"rows": rows, **scores(mme, rows)} for rows in drawn],
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in reference.items()]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{OUT}: {len(ODD)} replies, {sum(map(len, drawn))} rows")


if __name__ == "__main__":
    main()
