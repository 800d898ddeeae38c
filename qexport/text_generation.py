"""A text and how it goes on: `qexport.Generator` between a tokenizer and its decoder."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from qexport.data import open_tokenizer
from qexport.documents import make_document
from qexport.errors import UsageError
from qexport.generation import Generator
from qexport.providers import recorded


@dataclass
class GeneratedText:
    """`text` that follows `prompt`, its `tokens`, and the time it took in seconds, the prompt apart from the steps.

    `finish_reason` says why the text ends: `stop` (the model ended it), `length` (max_new_tokens) or `cache`, which is
    full with its `cache_length` tokens. `settings` hold the providers.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: list[int]
    finish_reason: str
    cache_length: int
    prompt_s: float
    steps_s: float
    settings: dict

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of the steps, of which each makes one token; None without a step."""
        return (len(self.tokens) - 1) / self.steps_s if len(self.tokens) > 1 else None

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("generate", self.__dict__ | {"tokens_per_s": self.tokens_per_s})


def generate_text(
    bundle,
    prompt: str,
    *,
    library=True,
    providers=None,
    allow_fallback=False,
    on_text: Callable[[str], None] | None = None,
    **options,
) -> GeneratedText:
    """Continue a text with a bundle that has a KV cache and a tokenizer.

    Args:
        bundle: a folder, or a `Bundle`.
        library, providers, allow_fallback: as in `qexport.session`.
        on_text: called with each piece of text as soon as it is known.
        options: those of `Generator.generate`; max_new_tokens is cut to what the cache holds.

    Raises:
        UsageError, QexportError: as `Generator`; no tokenizer in the bundle, or an empty prompt.
    """
    where = {"providers": providers, "allow_fallback": allow_fallback}
    generator = Generator(bundle, library=library, **where)
    tokenizer, _ = open_tokenizer(generator.bundle)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise UsageError("the prompt holds no token; give a text")
    wanted, room = options.pop("max_new_tokens", 100), generator.length - len(ids) + 1
    limit = min(wanted, room) if room >= 1 else wanted
    tokens: list[int] = []
    shown, times = tokenizer.decode(ids), []

    def show(_, token: int) -> None:
        nonlocal shown
        times.append(time.perf_counter())
        tokens.append(token)
        text = tokenizer.decode(ids + tokens)
        # a character of several tokens ends in a replacement character until it is complete
        if on_text is not None and text.startswith(shown) and not text.endswith("\ufffd"):
            on_text(text[len(shown) :])
            shown = text

    began = time.perf_counter()
    generator.generate([ids], max_new_tokens=limit, on_token=show, **options)
    start, whole = tokenizer.decode(ids), tokenizer.decode(ids + tokens)
    if on_text is not None and whole != shown and whole.startswith(shown):
        on_text(whole[len(shown) :])
    first, last = (times[0], times[-1]) if times else (time.perf_counter(),) * 2
    text, settings = whole.removeprefix(start), recorded(**where)
    finish_reason = "stop" if len(tokens) < limit else "cache" if limit < wanted else "length"
    return GeneratedText(
        prompt, text, len(ids), tokens, finish_reason, generator.length, first - began, last - first, settings
    )
