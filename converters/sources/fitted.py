"""A dense model whose layers come from elsewhere: a fit, or a file of packed layers."""

import torch

from converters.fitting.layer import layer_of
from converters.sources.base import PackedLayer, Source


class FittedSource(Source):
    """A dense source whose layers come from elsewhere.

    Args:
        dense: the dense source.
        stage: the last stage of their fit.

    Attributes:
        tensors: the layers' tensors by full name; empty until a fit is done.
    """

    def __init__(self, dense: Source, stage: str) -> None:
        self.dense, self.tensors = dense, dict[str, torch.Tensor]()
        self.kind = dense.kind  # type: ignore[misc]
        self.path, self.files, self.store = dense.path, dense.files, dense.store
        self.config, self.modules = dense.config, dense.modules
        self.experts, self.scale_dtype = dense.experts, dense.scale_dtype
        self.license, self.output_norm = dense.license, dense.output_norm
        self.stage = stage

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See `Source`."""
        return self.dense.suffixes

    def layer(self, module: str) -> PackedLayer:
        """The fitted layer; it has no zeros, as its signs were chosen."""
        return PackedLayer(layer_of(self.tensors, module), 0)
