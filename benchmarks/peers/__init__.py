"""Other libraries' weight-only int4 products, with one interface: ``PEERS``.

A peer is looked for at run time; what is missing is said in the result, and is no error.
"""

from benchmarks.peers import gemlite, humming, tinygemm, vllm
from benchmarks.peers.peer import Peer

PEERS: tuple[Peer, ...] = (vllm.MARLIN, vllm.MACHETE, tinygemm.PEER, humming.PEER, gemlite.PEER)

__all__ = ["PEERS", "Peer"]
