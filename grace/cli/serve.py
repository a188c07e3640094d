"""`grace serve`: a packed model behind an OpenAI-compatible API, by transformers' server."""

from typing import Annotated

import typer


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
    lm_head_bits: Annotated[
        int | None, typer.Option(help="8: output head at 8 bits; changes logits.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Compile the decode step.")] = False,
    continuous_batching: Annotated[
        bool, typer.Option(help="Batch requests as they come (text models).")
    ] = False,
    log_level: Annotated[str, typer.Option(help="Of transformers: info, warning, error.")] = (
        "warning"
    ),
) -> None:
    """Serve a model by `transformers serve`: POST /v1/chat/completions, streaming or not.

    Needs the extra serve of grace-vlm.
    """
    from grace.integrations import serving
    from grace.loading import bad_config_told
    from grace.models import DTYPES, require_checkpoint

    if dtype not in DTYPES:
        raise ValueError(f"serve: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    levels = ("debug", "info", "warning", "error", "critical")
    if log_level not in levels:
        raise ValueError(f"serve: log_level must be one of {', '.join(levels)}, got {log_level!r}")
    if lm_head_bits not in (None, 8):
        raise ValueError(f"serve: lm_head_bits must be 8, got {lm_head_bits}")
    require_checkpoint(model)
    _require_port(host, port)
    with bad_config_told(f"serve: {model} must be a model that transformers serves"):
        serving.serve(
            model,
            fuse=fuse,
            lm_head_bits=lm_head_bits,
            host=host,
            port=port,
            dtype=dtype,
            device=device,
            compile=compile,
            continuous_batching=continuous_batching,
            log_level=log_level,
        )


def _require_port(host: str, port: int) -> None:
    """OSError where nobody can listen: told before a model is loaded, and not after."""
    import socket

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(f"serve: {host}:{port} must be free to listen at, got {error}") from None
