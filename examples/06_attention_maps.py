"""What the heads of a model look at, as arrays and as a picture; `qexport attention` draws them all."""

import sys

import numpy as np

import qexport
from qexport.attention import figures

BUNDLE = sys.argv[1] if len(sys.argv) > 1 else "minilm_bundle"
text = "The animal did not cross the street because it was too tired."
(item,) = qexport.map_attention(BUNDLE, [text]).items  # one entry per text, in it one per attention
first, *_, last = item
print(first.classical.shape, "is (heads, queries, keys), and the keys are", " ".join(first.keys))

support = first.support.mean(axis=1)  # exp(entropy), mean over the queries
print(f"head {np.argmin(support)} of the first layer looks at {support.min():.1f} keys on average, ", end="")
print(f"head {np.argmax(support)} at {support.max():.1f}")
print(f"in the last layer {last.moved.mean():.1%} of the attention looks elsewhere in the sampled model")
figures.save(figures.plot_site(last, "difference"), "last_layer.png")
