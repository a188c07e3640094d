"""`grace evaluate`: a model's scores on a local benchmark: MME, POPE, ScienceQA or MMBench."""

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    benchmark: Annotated[Path, typer.Argument(help="Folder in MME's layout, or see --suite.")],
    suite: Annotated[
        str, typer.Option(help="mme, pope or scienceqa (folders), or mmbench (a .tsv).")
    ] = "mme",
    images: Annotated[
        Path | None, typer.Option(help="POPE's images; default BENCHMARK/images.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of ScienceQA.")] = "test",
    out: Annotated[
        Path | None, typer.Option(help="Where result files go; default runs/evaluate/MODEL.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions a batch.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 16,
    prompt: Annotated[
        str, typer.Option(help="official; llava (mme, pope); plain (all but pope).")
    ] = "official",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
    graphs: Annotated[
        bool, typer.Option(help="Decode as served, by captured graphs; or by model.generate.")
    ] = True,
) -> None:
    """Answer every question of a benchmark; write results and scores.

    Answers are written as they come: the same command goes on where it was interrupted.
    """
    import json

    from grace.evaluation import resume, suites
    from grace.models import load_model

    chosen = suites.suite_named(suite)
    rows = chosen.load(benchmark, images, split)
    chosen.prompt("", prompt)  # an unknown variant is told of before a model is loaded
    network, processor = load_model(model, dtype, device, fuse)

    from grace.evaluation.decoding import Decoder

    decoder = Decoder(network, max_batch_size=batch_size, graphs=graphs)
    folder = out or Path("runs/evaluate") / Path(model).name
    run = {
        "model": resume.fingerprint(model),
        "suite": suite,
        "benchmark": str(benchmark),
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "dtype": dtype,
        "fuse": fuse,
        "graphs": graphs,
    }

    def ask(part: Any) -> list[str]:
        from grace.evaluation.answer import answer

        return answer(
            network,
            processor,
            part,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prompt=lambda question: chosen.prompt(question, prompt),
            decoder=decoder,
        )

    log = folder / "answers.part.jsonl"
    said = resume.answer_all(ask, rows, log, run, chunk=32 * batch_size)
    scores = chosen.score(rows, said, prompt)
    chosen.write(folder, rows, said)
    (folder / "scores.json").write_text(
        json.dumps({"model": model, "suite": suite, **scores}, indent=1)
    )
    log.unlink()  # all of it stands in the results now
    _show(suites.table(scores))
    typer.echo(f"results: {folder}")


def _show(lines: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console().print(table)
