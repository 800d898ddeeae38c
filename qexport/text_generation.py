"""A text and how it goes on: `qexport.Generator` between a tokenizer and its decoder."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from qexport.data import open_tokenizer
from qexport.documents import make_document
from qexport.errors import UsageError
from qexport.generation import Generator
from qexport.providers import recorded

# Tokens of the prompt that tell how the text of the first new ones looks.
CONTEXT = 8


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
    sequence, times = list(ids), []
    # What a token adds to the text depends on those before it, of which a few will do: sequence[known:fresh]. Finding it out
    # and telling it is no part of a step.
    known, fresh, told, telling = max(0, len(ids) - CONTEXT), len(ids), "", 0.0

    def show(_, token: int) -> None:
        nonlocal known, fresh, told, telling
        now = time.perf_counter()
        times.append(now - telling)
        sequence.append(token)
        if on_text is None:
            return
        before, text = tokenizer.decode(sequence[known:fresh]), tokenizer.decode(sequence[known:])
        more = text.removeprefix(before) if text.startswith(before) else ""
        # a character of several tokens ends in a replacement character until it is complete
        if more and not more.endswith("\ufffd"):
            on_text(more)
            known, fresh, told = fresh, len(sequence), told + more
        telling += time.perf_counter() - now

    began = time.perf_counter()
    generator.generate([ids], max_new_tokens=limit, on_token=show, **options)
    tokens, text = sequence[len(ids) :], tokenizer.decode(sequence).removeprefix(tokenizer.decode(ids))
    if on_text is not None and text != told and text.startswith(told):
        on_text(text[len(told) :])
    first, last = (times[0], times[-1]) if times else (time.perf_counter(),) * 2
    finish_reason = "stop" if len(tokens) < limit else "cache" if limit < wanted else "length"
    return GeneratedText(
        prompt, text, len(ids), tokens, finish_reason, generator.length, first - began, last - first, recorded(**where)
    )
