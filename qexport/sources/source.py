"""What a front end delivers: a graph with input specs and example inputs."""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir


@dataclass
class InputSpec:
    """One graph input as the manifest describes it.

    `shape` holds sizes and names of dynamic axes; `kind` is one of token_ids, mask, lengths, token_types, position_ids,
    continuous, boolean, integer, and of a KV cache past_length and cache; `high` is the exclusive upper bound of integers,
    None when unknown.
    """

    name: str
    dtype: str
    shape: list
    kind: str
    high: int | None = None

    def to_dict(self) -> dict:
        """The entry of manifest["inputs"]."""
        return {"name": self.name, "dtype": self.dtype, "shape": self.shape, "kind": self.kind, "high": self.high}


@dataclass
class Source:
    """A model as its front end delivers it.

    `model` is the graph, not yet classical; `examples` maps input names to arrays and `expected` output names to what
    the source itself computes for them (None: it could not be run). `limits` gives the largest size of dynamic axes,
    `tokenizer` the text of a tokenizer.json, `stop_tokens` the ids that end a text. `cache` is a
    `qexport.kv_cache.KVCache` once the model has one. `notes` are remarks for the report. `runnable` is a
    `qexport.sources.runnable.Runnable` where the model comes from a torch module. `task` and `dtype` are what was asked for.
    """

    kind: str
    name: str
    model: ir.Model
    inputs: list[InputSpec]
    examples: dict[str, np.ndarray]
    expected: dict[str, np.ndarray] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    stop_tokens: list[int] = field(default_factory=list)
    cache: object = None
    notes: list[str] = field(default_factory=list)
    runnable: object = None
    task: str | None = None
    dtype: str | None = None
