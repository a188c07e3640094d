"""Runs a study in processes that kill themselves (SIGKILL) at given places, one after another.

    python killed.py CONFIG OUT PLACE…    PLACE: where a file comes to stand, e.g. grace-4-s0/…

A process of its own: what has trained before it forks cannot train behind the fork.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from grace.study import models, worker
from grace.study.options import read_config
from grace.study.run import run_study
from grace.training import checkpoints


def dying(publish: Any, place: str) -> Any:
    """`publish` that does not come back where its target ends like `place`."""

    def wrapped(*args: Any) -> Any:
        result = publish(*args)
        if any(str(arg).endswith(place) for arg in args if isinstance(arg, Path)):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


def main() -> None:
    config, out = read_config(sys.argv[1]), Path(sys.argv[2])
    worker.quiet()
    for place in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            for module, name in (
                (checkpoints, "publish"),
                (worker, "write_whole"),
                (models, "publish"),
            ):
                setattr(module, name, dying(getattr(module, name), place))
            run_study(config, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            sys.exit(f"not killed at {place}: {status}")


if __name__ == "__main__":
    main()
