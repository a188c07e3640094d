"""`grace evaluate`: a model's scores on a benchmark in MME's folder layout."""

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    benchmark: Annotated[Path, typer.Argument(help="Folder in MME's layout.")],
    out: Annotated[
        Path | None, typer.Option(help="Where result files go; default runs/evaluate/MODEL.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions a batch.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 16,
    prompt: Annotated[str, typer.Option(help="official, llava or plain.")] = "official",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
) -> None:
    """Answer every question of an MME folder; write official result files and scores."""
    import json

    from grace.cli._models import load_model
    from grace.evaluation import answer, mme

    rows = mme.load(benchmark)
    mme.prompt("", prompt)  # an unknown variant is told of before a model is loaded
    network, processor = load_model(model, dtype, device, fuse)
    said = answer.answer(
        network,
        processor,
        rows,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        prompt=lambda question: mme.prompt(question, prompt),
    )
    answered = mme.answered(rows, said)
    scores = mme.score(answered, prompt=prompt)
    folder = out or Path("runs/evaluate") / Path(model).name
    mme.write_results(folder, answered)
    (folder / "scores.json").write_text(json.dumps({"model": model, **scores}, indent=1))
    _show(scores)
    typer.echo(f"results: {folder}")


def _show(scores: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("subtask", "acc", "acc+", "score", "questions", "other")
    for name, part in scores["subtasks"].items():
        rates = (f"{100 * part[key]:.1f}" for key in ("acc", "acc_plus"))
        counts = (str(part["questions"]), str(part["other"]))
        table.add_row(name, *rates, f"{part['score']:.1f}", *counts)
    for name in ("perception", "cognition", "total"):
        table.add_row(name, "", "", f"{scores[name]:.1f}", "", "", style="bold")
    Console().print(table)
