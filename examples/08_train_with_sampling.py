"""Train a classifier of film reviews with sampled attention, and the same one with classical attention.

    python examples/08_train_with_sampling.py [--quick]

The verdict is read from the first position alone: whatever it knows of the text came to it through attention, of which
each query reads SAMPLES of LENGTH keys, other ones in every step. Needs the [bench] extra, and downloads the reviews once.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from qexport.nn import replace_attention

LENGTH, SAMPLES, BATCH = 128, 32, 32
RECIPE = {"strategy": "adaptive", "num_samples": SAMPLES, "control_variate": True}


class Classifier(nn.Module):
    """Token ids (batch, length) -> one logit each: two encoder layers of 4 heads over word vectors that stay as they are."""

    def __init__(self, vectors, length, size=128):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(vectors / vectors.std())
        self.project = nn.Linear(vectors.shape[1], size)
        self.places = nn.Parameter(0.02 * torch.randn(length, size))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, batch_first=True), 2)
        self.verdict = nn.Linear(size, 1)

    def forward(self, ids):
        return self.verdict(self.encoder(self.project(self.words(ids)) + self.places)[:, 0]).squeeze(-1)


def train(seed, vectors, ids, positive, recipe=None, epochs=2):
    """A classifier with attention as `recipe` says (None: classical), and its losses, one per step."""
    torch.manual_seed(seed)
    model = Classifier(vectors, ids.shape[1])
    batches = torch.cat([torch.randperm(len(ids)) for _ in range(epochs)]).split(BATCH)
    if recipe is not None:
        replace_attention(model, recipe)  # the same weights and batches; only attention differs
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches))
    losses = []
    for rows in batches:
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids[rows]), positive[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


@torch.no_grad()
def accuracy(model, ids, positive):
    """Share of the reviews whose verdict is right."""
    logits = torch.cat([model(part) for part in ids.split(BATCH)])
    return float(((logits > 0) == (positive > 0)).float().mean())


def data(trained, judged):
    """MiniLM's word vectors, and ids and labels of so many reviews to train on and to judge by, cut at LENGTH tokens."""
    from safetensors.torch import load_file

    from bench.minilm_error import texts
    from bench.models import minilm_dir

    ids, positive = (torch.from_numpy(x) for x in texts(trained + judged, LENGTH))
    vectors = load_file(minilm_dir() / "model.safetensors")["embeddings.word_embeddings.weight"]
    return vectors, (ids[:trained], positive[:trained].float()), (ids[trained:], positive[trained:].float())


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # `bench` of the source tree, which fetches the reviews
    vectors, known, new = data(*((640, 320) if "--quick" in sys.argv else (4000, 2000)))
    for name, recipe in {"classical": None, f"{SAMPLES} of {LENGTH} keys": RECIPE}.items():
        model, losses = train(0, vectors, *known, recipe)
        ends = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
        print(f"{name}: loss {ends[0]:.3f} -> {ends[1]:.3f}, {accuracy(model, *new):.1%} of {len(new[0])} new reviews right")
        assert ends[1] < 0.9 * ends[0]
