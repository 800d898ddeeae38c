"""The compressed model's file, beside the bundle's model until it takes its place."""

import shutil

import numpy as np
import onnx_ir as ir

from qexport import conversion, runtime
from qexport.bundle import Bundle
from qexport.compression import nodes
from qexport.compression.forms import Form
from qexport.compression.layers import find_layers
from qexport.compression.products import Rounded, multiply, names_of
from qexport.compression.trials import Measured, Trials
from qexport.external_data import file_bytes
from qexport.feeds import Inputs
from qexport.metrics import Metric
from qexport.rewrite.sample_attention import attach_fallback
from qexport.validation.comparison import output_errors

NAME = "compressed.onnx"
# Items of the judging data that the bundle keeps as its samples.
SAMPLES = 4


class Draft:
    """The file that the forms of a bundle's weights make, by the name of the layer.

    Args:
        rounded: the products that are of whole numbers.
    """

    def __init__(self, bundle: Bundle, rounded: tuple[Rounded, ...] = ()):
        self.bundle, self.path, self.rounded = bundle, bundle.path / NAME, rounded

    def size(self, chosen: dict[str, Form]) -> int:
        """Bytes of the file that `write` makes."""
        model = self._model(chosen)
        if conversion.external_name(model):  # where its weights will lie, and so what it takes to say it, shows when they do
            return self._save(model)
        return conversion.saved_bytes(model)

    def write(self, chosen: dict[str, Form]) -> int:
        """Write the file; its bytes, with those of its weights where they are too many for one."""
        return self._save(self._model(chosen))

    def judge(self, metric: Metric, inputs: Inputs, classical, *, library: bool) -> tuple[Measured, dict[str, float]]:
        """What the file makes of data: the metric, and the relative error of each output by its name.

        Args:
            classical: a session of the classical model.
            library: whether the op library runs it; a stock runtime must take it, too.

        Raises:
            QexportError: it does not run.
        """
        if library:
            runtime.run(runtime.session(self.path, library=False), None, inputs.feeds[0])
        session = runtime.session(self.path, library=library)
        errors = output_errors(self.bundle, inputs, [0], classical, session)
        measured = Trials(self.bundle, session, classical, metric, inputs.feeds).measure({})
        return measured, {name: float(found.relative_errors()[0]) for name, found in errors.items()}

    def take_place(self, feed: dict[str, np.ndarray], classical) -> None:
        """Become the bundle's model, and items of `feed`, where it has some, its samples: `validate` then looks at inputs
        like those that judged.

        Args:
            classical: a session of the classical model.
        """
        self.path.replace(self.bundle.model_path)
        if len({len(array) if array.ndim else 0 for array in feed.values()}) == 1:
            feed = {name: array[:SAMPLES] for name, array in feed.items()}
            names = [output.name for output in classical.get_outputs()]
            outputs = dict(zip(names, runtime.run(classical, names, feed), strict=True))
            shutil.rmtree(self.bundle.samples_path)
            conversion.write_samples(self.bundle.samples_path, feed, outputs)

    def _model(self, chosen: dict[str, Form]) -> ir.Model:
        model = ir.load(self.bundle.model_path)
        layers, whole = find_layers(model), names_of(self.rounded)
        for layer in layers:
            if layer.name in chosen:
                nodes.store(model, layer, chosen[layer.name], as_matrix=layer.name in whole)
        multiply(model, layers, self.rounded)
        attach_fallback(model)
        return model

    def _save(self, model: ir.Model) -> int:
        weights = self.path.with_name(NAME + ".data")
        weights.unlink(missing_ok=True)  # of the attempt before
        conversion.save(model, self.path, weights.name if conversion.external_name(model) else None)
        return file_bytes(self.path)
