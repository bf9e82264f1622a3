"""The linear layers that benchmarks/linear.py compares, one file a peer."""

from peers.base import Loaded, LoadedLayers, Mode, Peer, Weights
from peers.bmos import Bmos
from peers.gemlite_linear import Gemlite
from peers.humming_linear import Humming
from peers.llama_cpp_linear import LlamaCpp
from peers.marlin import Marlin
from peers.torch_linear import TorchLinear
from peers.vllm_linear import VllmBf16, VllmW4A16, VllmW8A8
from peers.zentorch_linear import Zentorch

__all__ = ["NAMES", "Loaded", "LoadedLayers", "Mode", "Peer", "Weights", "all_peers"]


def all_peers(E: int) -> list[Peer]:
    """Every peer, our own first. E is the number of experts of our own layer."""
    return [
        Bmos(E),
        VllmBf16(),
        VllmW8A8(),
        VllmW4A16(),
        TorchLinear(),
        Zentorch(),
        LlamaCpp(),
        Marlin(),
        Gemlite(),
        Humming(),
    ]


NAMES = tuple(peer.name for peer in all_peers(E=1))
