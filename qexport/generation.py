"""Text token by token, with a bundle that was converted with a KV cache. Needs numpy and onnxruntime alone.

    generator = qexport.Generator("bundle")
    tokens = generator.generate([[1, 9038, 2501, 263]], max_new_tokens=100)[0]

The caches are bound to the session once, one buffer as past and present: the graph writes the keys and values of new tokens
into it, and a step copies nothing of the past, however long that is. On a GPU they stay there: a step takes its tokens
there and brings its logits back.
"""

from collections.abc import Callable, Sequence

import numpy as np

from qexport import installed, runtime
from qexport.arguments import as_seed, real, several, whole, wrapped_seed
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.validation.comparison import seeded_feed

# A long prompt runs in pieces of so many tokens: the logits of a piece are (batch, piece, vocabulary).
PIECE = 128


class Generator:
    """An open bundle and its caches, which lie in the memory of the device that runs it.

    Attributes:
        length: the tokens that fit into a cache.
        past: int64 array (batch,), the tokens that each row has.
    """

    def __init__(self, bundle, *, library=True, options=None, providers=None, allow_fallback=False):
        """Open the converted model of a bundle.

        Args:
            bundle: a folder, or a `Bundle`.
            library, options, providers, allow_fallback: as in `qexport.session`.

        Raises:
            UsageError: `providers` as in `qexport.session`.
            QexportError: no bundle, one without a KV cache, this onnxruntime is too old or cannot load it, or a provider
                cannot be had.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        cache = self.bundle.manifest.get("kv_cache")
        if cache is None:
            raise QexportError(f"{self.bundle.path}: has no KV cache; convert the model with --kv-cache N")
        self._ort = installed.onnxruntime()
        needed = self.bundle.manifest["min_onnxruntime"]
        if installed.version_tuple(self._ort.__version__) < installed.version_tuple(needed):
            raise QexportError(
                f"{self.bundle.path}: its KV cache needs onnxruntime {needed} or newer, "
                f"{self._ort.__version__} is installed; upgrade it"
            )
        self.length, self._names = cache["length"], cache
        self._specs = {spec["name"]: spec for spec in self.bundle.manifest["inputs"]}
        if any(self._specs[past]["dtype"] == "bfloat16" for past, _ in cache["caches"]):
            raise QexportError(
                f"{self.bundle.path}: its caches are bfloat16, which numpy does not have; convert with --dtype float16"
            )
        where = {"providers": providers, "allow_fallback": allow_fallback}
        self._session = runtime.session(self.bundle.model_path, library=library, options=options, **where)
        self._device = runtime.device_of(self._session)
        self._binding = self._session.io_binding()
        self._binding.bind_output(self._names["logits"])  # the first, so that get_outputs() has it there
        self.reset(1)

    def reset(self, batch: int | None = None) -> None:
        """Forget the past; `batch` is the number of rows from here on, the same as before when None."""
        rows = len(self.past) if batch is None else batch
        if batch is not None and (not hasattr(self, "past") or rows != len(self.past)):
            self._bind_caches(rows)
        self.past = np.zeros(rows, np.int64)
        self._runs = 0

    def _bind_caches(self, batch: int) -> None:
        """New caches, each bound as the input of the past and the output of the present."""
        self.caches = {}
        for past, present in (*self._names["caches"], *self._names["summaries"]):
            shape = (batch, *self._specs[past]["shape"][1:])
            # zeros, not whatever the memory holds: a masked NaN is still a NaN
            value = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self._specs[past]["dtype"]), *self._device)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
            self.caches[past] = value

    def append(self, tokens: Sequence[Sequence[int]], *, seed: int = 0) -> np.ndarray:
        """Put tokens behind the past.

        Args:
            tokens: ids for each row, at least one; rows may differ in length.
            seed: of the sampled attention; each run of the model adds 1 to it, so that steps draw apart.

        Returns:
            (batch, vocabulary): the logits after the last token of each row.

        Raises:
            UsageError: another number of rows, an empty row or an id that the model does not have.
            QexportError: the cache is full.
        """
        rows, seed = self._checked(tokens), as_seed(seed)
        lengths = np.array([len(row) for row in rows])
        self._check_room(lengths)
        last: list = [None] * len(rows)
        for start in range(0, lengths.max(), PIECE):
            width = min(PIECE, lengths.max() - start)
            # A row that has ended is filled up: its queries see what is right, nobody reads their logits, and later
            # tokens overwrite its keys.
            ids = np.zeros((len(rows), width), self._specs[self._names["token_ids"]]["dtype"])
            counts = np.clip(lengths - start, 0, width)
            for row, count in enumerate(counts):
                ids[row, :count] = rows[row][start : start + count]
            logits = self._run(ids, seed)
            for row, count in enumerate(counts):
                if count and start + count == lengths[row]:
                    last[row] = logits[row, count - 1]
            self.past = self.past + counts
        return np.stack(last)

    def _checked(self, tokens) -> list[np.ndarray]:
        rows = [np.asarray(row) for row in several("tokens", tokens)]
        high = self._specs[self._names["token_ids"]]["high"]
        if len(rows) != len(self.past):
            raise UsageError(f"tokens must be one list for each of the {len(self.past)} rows, got {len(rows)}")
        for number, row in enumerate(rows):
            if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
                raise UsageError(f"row {number} of the tokens must be a list of at least one id, got {row.tolist()!r:.60}")
            if row.min() < 0 or (high and row.max() >= high):
                bad = row.min() if row.min() < 0 else row.max()
                raise UsageError(f"row {number} of the tokens must lie in [0, {high}), got {bad}")
        return rows

    def _check_room(self, lengths: np.ndarray) -> None:
        """Also for what the rows are filled up with."""
        longest = int(lengths.max())
        ends = (np.minimum(lengths, start) + min(PIECE, longest - start) for start in range(0, longest, PIECE))
        if any((self.past + end).max() > self.length for end in ends):
            raise QexportError(
                f"the cache of {self.length} tokens is full: {int(self.past.max())} are in it and {longest} more were "
                "given; call reset(), or convert with a longer --kv-cache"
            )

    def _run(self, ids: np.ndarray, seed: int) -> np.ndarray:
        """One run of the model: logits (batch, tokens, vocabulary)."""
        feed = {
            self._names["token_ids"]: ids,
            self._names["past_length"]: self.past,
        }
        feed = seeded_feed(feed, self.bundle.seed_input, wrapped_seed(seed + self._runs))
        # Not bind_cpu_input, which does not find inputs that have a default, such as the seed. The values stay in a
        # variable, since the binding keeps only pointers.
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(self._names["logits"])
        runtime.run_bound(self._session, self._binding)
        self._runs += 1
        return self._binding.get_outputs()[0].numpy()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Continue token lists; the past is forgotten first.

        Args:
            prompts: token ids, one list per text; they may differ in length.
            max_new_tokens: how many tokens a text gets at most.
            temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature).
            top_k: draw among the `top_k` most likely tokens only; needs a temperature above 0.
            seed: of the draws, and of the sampled attention.
            stop: ids that end a text and are not returned; the model's own when None.
            on_token: called with (row, token) as soon as a token is known.

        Returns:
            The new tokens of each text, without its prompt.

        Raises:
            UsageError: an argument outside its limits, or no prompt.
            QexportError: prompt and new tokens do not fit into the cache.
        """
        whole("max_new_tokens", max_new_tokens)
        if not 0 <= real("temperature", temperature) < np.inf:
            raise UsageError(f"temperature must be a number >= 0, got {temperature}")
        if top_k is not None:
            whole("top_k", top_k)
        seed = as_seed(seed)
        if not several("prompts", prompts):
            raise UsageError(f"prompts must be a list of token lists that is not empty, got {prompts}")
        for number, prompt in enumerate(prompts):
            several(f"prompt {number}", prompt)
        if top_k is not None and temperature == 0:
            raise UsageError(
                f"top_k {top_k} draws tokens, but temperature 0 takes the likeliest; give a temperature above 0, such as 0.8"
            )
        longest = max(len(prompt) for prompt in prompts)
        room = self.length + 1 - longest  # the last token that is told needs no place
        if max_new_tokens > room:
            mend = f"lower max_new_tokens to {room}" if room > 0 else "shorten the prompt"
            raise QexportError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into the cache of {self.length}; "
                f"{mend} or convert with a longer --kv-cache"
            )
        stop = set(self._names["stop_tokens"] if stop is None else several("stop", stop))
        draws = [np.random.default_rng([seed % 2**64, row]) for row in range(len(prompts))]
        texts: list[list[int]] = [[] for _ in prompts]
        running = [True] * len(prompts)
        self.reset(len(prompts))
        logits = self.append(prompts, seed=seed)
        for step in range(max_new_tokens):
            chosen = [choose(row, temperature, top_k, draw) for row, draw in zip(logits, draws, strict=True)]
            for row, token in enumerate(chosen):
                running[row] = running[row] and token not in stop
                if running[row]:
                    texts[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not any(running) or step + 1 == max_new_tokens:
                break
            logits = self.append([[token] for token in chosen], seed=seed)
        return texts


def choose(logits: np.ndarray, temperature: float, top_k: int | None, draw: np.random.Generator) -> int:
    """The next token from logits (vocabulary,): the most likely one at temperature 0, else drawn."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    tokens = np.arange(scaled.size)
    if top_k is not None and top_k < scaled.size:
        tokens = np.argsort(-scaled, kind="stable")[:top_k]
        scaled = scaled[tokens]
    total = np.exp(scaled - scaled.max()).cumsum()
    return int(tokens[min(np.searchsorted(total, draw.random() * total[-1], side="right"), tokens.size - 1)])
