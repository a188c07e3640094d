"""`grace chat`: a conversation about images, in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_HELP = (
    "/image PATH adds a picture to the next turn, /reset forgets all, /quit or end of input ends"
)


def chat(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub name.")],
    image: Annotated[list[Path] | None, typer.Option(help="Pictures of the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the whole conversation.", min=2)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest tokens.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of sampling.", min=0, max=1)] = 1.0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    fuse: Annotated[bool, typer.Option(help="Run packed layers of one input as one.")] = True,
    lm_head_bits: Annotated[
        int | None, typer.Option(help="8: output head at 8 bits; changes logits.")
    ] = None,
) -> None:
    """Talk with a model about images.

    /image PATH adds a picture to the next turn, /reset forgets the conversation, /quit or the end
    of input ends it. Ctrl-C stops an answer.
    """
    from grace.cli import _serving
    from grace.models import load_model

    pictures = [_serving.open_picture(path) for path in image or ()]
    network, processor = load_model(model, dtype, device, fuse)

    from grace.generation import Generator

    generator = Generator(
        network, max_batch_size=1, max_length=max_length, lm_head_bits=lm_head_bits
    )
    options = {"max_new_tokens": max_new_tokens, **_serving.sampling(temperature, top_p)}
    conversation = Conversation(generator, processor, options)
    conversation.pending = pictures
    typer.echo(_HELP, err=True)
    while (line := _next_line()) is not None:
        if not conversation.hear(line):
            return


def _next_line() -> str | None:
    """What is typed next; None at the end of input, nothing where Ctrl-C had nothing to stop."""
    try:
        return input("> ").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        typer.echo("")
        return ""


class Conversation:
    """What was said, what was shown, and what is shown with the next turn."""

    def __init__(self, generator: Any, processor: Any, options: dict[str, Any]) -> None:
        self._generator, self._processor, self._options = generator, processor, options
        self.pending: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[Any] = []

    def hear(self, line: str) -> bool:
        """A line that was typed; whether the conversation goes on."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self._reset()
            self.pending = []
        elif command == "/image":
            self._show(rest.strip())
        elif command.startswith("/"):
            typer.echo(_HELP, err=True)
        elif line:
            self._turn(line)
        return True

    def _show(self, path: str) -> None:
        from grace.cli._serving import open_picture

        try:
            self.pending.append(open_picture(Path(path).expanduser()))
        except (OSError, ValueError) as error:
            from grace.cli._errors import one_line

            typer.echo(one_line(error), err=True)

    def _turn(self, prompt: str) -> None:
        """Asks, and remembers question and answer; a turn without room leaves all as it was."""
        from grace.cli import _serving

        messages = [*self.messages, _serving.user_turn(prompt, len(self.pending))]
        pictures = [*self.pictures, *self.pending]
        model, limit = self._generator.model, self._generator.max_length
        inputs = _serving.inputs_of(model, self._processor, messages, pictures)
        taken = inputs["input_ids"].shape[1]
        if taken >= limit:
            typer.echo(
                f"this turn does not fit: the conversation would have {taken} tokens, and "
                f"there is room for {limit}, answers included; /reset makes room",
                err=True,
            )
            return
        said = self._answer(inputs, limit - taken)
        answer = {"role": "assistant", "content": [{"type": "text", "text": said}]}
        self.messages, self.pictures, self.pending = [*messages, answer], pictures, []

    def _answer(self, inputs: dict[str, Any], room: int) -> str:
        from grace.cli import _serving

        answer = _serving.Answer(self._processor.tokenizer)
        longest = min(self._options["max_new_tokens"], room)
        options = {**self._options, "max_new_tokens": longest}
        try:
            self._generator.generate(**inputs, **options, streamer=answer.streamer)
        except KeyboardInterrupt:
            typer.echo("\n(stopped)", err=True)
            return answer.text
        line = _serving.told(self._generator.timing, self._generator.device)
        typer.echo(line, err=True)
        if len(answer.tokens) == room < self._options["max_new_tokens"]:
            typer.echo("the conversation is full: /reset makes room", err=True)
        return answer.text
