"""A torch module as the graph that was exported from it: tensors by the names of the graph's inputs and outputs."""

import contextlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Runnable:
    """The module of a torch front end, called as its graph is, in float32.

    Attributes:
        module: the nn.Module, in eval mode.
        inputs, outputs: names of the graph's.
        examples: (args, kwargs) of the module.
    """

    module: object
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple

    def weights(self) -> dict:
        """The module's parameters and buffers by name, floating ones in float32 and without gradients; a shared one once."""
        found = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: x.detach().float() if x.is_floating_point() else x for name, x in found}

    def __call__(self, feed: dict, weights: dict) -> dict:
        """The outputs by name, with gradients where torch has them switched on; call it, and go backward, inside
        `as_exported`.

        Args:
            feed: arrays by the name of the input; those of other names are passed over.
            weights: tensors by the name of the parameter or buffer that they take the place of.
        """
        import torch

        leaves, structure = torch.utils._pytree.tree_flatten(self.examples)
        names = iter(self.inputs)
        for place, example in enumerate(leaves):
            if torch.is_tensor(example):
                array = np.asarray(feed[next(names)])
                leaves[place] = torch.tensor(array.astype(np.float32) if example.is_floating_point() else array)
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, structure)
        result = torch.func.functional_call(self.module, weights, args, kwargs)
        return dict(zip(self.outputs, tensors(torch, result), strict=False))


def tensors(torch, tree) -> list:
    """The tensors of a module's inputs or outputs in the order of the graph's."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]


@contextlib.contextmanager
def as_exported(torch):
    """Run modules as the classical graph computes them: modules of qexport.nn exactly, and torch's encoders without their
    fused path, which leaves zeros where a batch is padded."""
    from qexport.nn import exact_attention

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with exact_attention():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
