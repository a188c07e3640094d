"""`grace quantize`: quantize a checkpoint after training, for `grace export` to pack."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    source: Annotated[Path, typer.Argument(help="Checkpoint directory of the model.")],
    target: Annotated[Path, typer.Argument(help="Directory to write; new or empty.")],
    method: Annotated[str, typer.Option(help="rtn, gptq or awq.")] = "gptq",
    data: Annotated[
        Path | None, typer.Option(help="Rows to calibrate with, as `grace train` reads them.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Their images; default beside DATA.")] = None,
    samples: Annotated[int, typer.Option(help="Rows to calibrate with.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.", min=1)] = 4,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a row; longer ones are cut.", min=1)
    ] = 2048,
    bits: Annotated[int, typer.Option(help="2 to 8; 4 and 8 can be packed.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1: a row.")] = 128,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="GPTQ: columns with the largest inputs first.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Which rows are drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in TARGET.")
    ] = False,
) -> None:
    """Quantize a checkpoint without training: round-to-nearest, GPTQ or AWQ.

    `grace export TARGET OUT` packs the result.
    """
    from grace import ptq
    from grace.checkpoint import check_target, copy_companions, written_whole
    from grace.models import load_model
    from grace.ptq.rows import calibration_batches

    check_target(target, overwrite)
    if method not in ptq.METHODS:
        raise ValueError(
            f"quantize: --method must be one of {', '.join(ptq.METHODS)}, got {method!r}"
        )
    if method == "rtn" and data is not None:
        raise ValueError(
            f"quantize: --data must not be given with rtn, which reads none, got {data}"
        )
    if method != "rtn" and data is None:
        raise ValueError(f"quantize: {method} must have --data to calibrate with, got none")
    model, processor = load_model(str(source), dtype, device, fuse=False)
    batches = None
    if method != "rtn" and data is not None:
        batches = calibration_batches(
            data, processor, images,
            samples=samples, batch_size=batch_size, max_length=max_length, seed=seed,
        )  # fmt: skip
    names = ptq.quantize(
        model, method, batches, bits=bits, group_size=group_size, act_order=act_order
    )
    with written_whole(target, overwrite) as partial:
        model.save_pretrained(partial)
        copy_companions(source, partial)
    typer.echo(f"{len(names)} linears at {bits} bits by {method}: {target}")
    if bits in (4, 8):
        typer.echo(f"pack it with: grace export {target} OUT")
