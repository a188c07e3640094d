"""``python -m benchmarks.peers``: which peers are here; compiles ahead what compiles at first use.

A benchmark that runs later finds the compiled kernels in the peer's own cache.
"""

from __future__ import annotations

from benchmarks.peers import PEERS, humming


def main() -> None:
    """Prints a line a peer, then a line a compiled layer."""
    for peer in PEERS:
        print(f"{peer.name}: {peer.why_absent() or 'here'}", flush=True)
    if not humming.why_absent():
        humming.compile_all()


if __name__ == "__main__":
    main()
