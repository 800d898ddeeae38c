"""Generating with a KV cache: in place, choosing tokens, streaming, and one line for whatever does not fit."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from cli_cases import one_line
from click.testing import CliRunner
from fake_gpu import CUDA
from scipy import stats
from test_convert_huggingface import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qexport import installed, runtime
from qexport.cli import cli
from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.generation import Generator, choose
from qexport.text_generation import generate_text

LENGTH = 48
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A random Llama with exact attention whose tokenizer has one token per letter."""
    folder = tmp_path_factory.mktemp("generation")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer = Tokenizer(models.BPE({chr(32 + i): i for i in range(95)} | {f"<{i}>": i for i in range(95, 99)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer.save(str(folder / "llama" / "tokenizer.json"))
    convert(folder / "llama", folder / "bundle", kv_cache=LENGTH, strategy="exact")
    return folder / "bundle"


@pytest.fixture(scope="module")
def generator(bundle):
    return Generator(bundle)


@pytest.fixture(scope="module")
def sampled(bundle, tmp_path_factory):
    """The same with four sampled keys per query."""
    folder = tmp_path_factory.mktemp("sampled")
    convert(bundle.parent / "llama", folder / "bundle", kv_cache=LENGTH, strategy="stratified", num_samples=4)
    return folder / "bundle"


def test_the_caches_stay_where_they_are_and_only_grow(generator):
    generator.reset(1)
    generator.append([PROMPT])
    places = {name: value.data_ptr() for name, value in generator.caches.items()}
    before = {name: value.numpy().copy() for name, value in generator.caches.items()}
    generator.append([[9]])
    assert {name: value.data_ptr() for name, value in generator.caches.items()} == places
    for name, value in generator.caches.items():
        changed = np.abs(value.numpy() - before[name]).max((0, 1, 3)) > 0
        assert changed.tolist() == [place == len(PROMPT) for place in range(LENGTH)]


WARNED = """
import sys, numpy as np, onnxruntime as ort
from qexport.generation import Generator
options = ort.SessionOptions()
options.log_severity_level = 2
generator = Generator(sys.argv[1], options=options)
generator.append([[5, 6, 7]])
generator.append([[8]])
print("apart", file=sys.stderr, flush=True)
generator._session.run(["logits", "present.0.key"], {name: value.numpy() for name, value in generator.caches.items()}
                       | {"input_ids": np.array([[9]]), "past_len": generator.past})
"""


def test_nothing_of_the_past_is_copied(bundle):
    """onnxruntime warns when TensorScatter has to copy its past: never here, and for a run with other buffers it does."""
    done = subprocess.run(
        [sys.executable, "-c", WARNED, str(bundle)], capture_output=True, text=True, timeout=120, check=True
    )
    ours, apart = done.stderr.split("apart")
    assert "copying past_cache" not in ours
    assert "copying past_cache" in apart


def test_the_same_seed_is_the_same_text(sampled):
    generator = Generator(sampled)
    options = {"max_new_tokens": 30, "temperature": 1.0, "stop": []}
    texts = [generator.generate([PROMPT], seed=seed, **options)[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 30


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_the_seed_is_any_int64(sampled, seed):
    """Steps behind the largest one included."""
    assert len(Generator(sampled).generate([PROMPT], seed=seed, max_new_tokens=3, temperature=1.0, stop=[])[0]) == 3


def test_steps_of_sampled_attention_draw_apart(sampled):
    """The same token on the same past, in run 2 and in run 3 of a text, and with the seed that makes up for it."""
    generator = Generator(sampled)

    def logits(extra, seed):
        generator.reset()
        generator.append([list(range(3, 33))], seed=seed)
        for _ in range(extra):
            generator.append([[40]], seed=seed)
            generator.past -= 1
        return generator.append([[40]], seed=seed)

    assert np.abs(logits(0, 0) - logits(1, 0)).max() > 0
    generator.reset()
    assert np.array_equal(logits(0, 0), logits(0, 0))


def test_a_callback_sees_every_token_in_order(generator):
    seen = []
    texts = generator.generate([PROMPT, [9, 10]], max_new_tokens=12, stop=[], on_token=lambda *pair: seen.append(pair))
    assert seen == [(row, texts[row][step]) for step in range(12) for row in (0, 1)]


def test_a_text_ends_before_its_stop_token(generator):
    both = generator.generate([PROMPT, [9, 10]], max_new_tokens=40, stop=[])
    stop = both[0][5]
    texts = generator.generate([PROMPT, [9, 10]], max_new_tokens=40, stop=[stop])
    for text, whole in zip(texts, both, strict=True):
        assert text == whole[: whole.index(stop) if stop in whole else None]


def test_the_models_own_stop_token_is_the_default(generator, monkeypatch):
    first = generator.generate([PROMPT], max_new_tokens=1, stop=[])[0][0]
    assert generator._names["stop_tokens"] == [2]
    monkeypatch.setitem(generator._names, "stop_tokens", [first])
    assert generator.generate([PROMPT], max_new_tokens=5) == [[]]


def test_a_text_may_fill_the_cache_to_the_last_place(generator):
    prompt = list(range(3, 23))
    text = generator.generate([prompt], max_new_tokens=LENGTH - len(prompt) + 1, stop=[])[0]
    assert generator.past.tolist() == [LENGTH]
    assert len(text) == LENGTH - len(prompt) + 1
    with pytest.raises(QexportError, match="the cache of 48 tokens is full: 48 are in it and 1 more were given"):
        generator.append([[7]])
    assert generator.past.tolist() == [LENGTH]


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "prompts must be a list of token lists that is not empty"),
        ([[]], {}, "row 0 of the tokens must be a list of at least one id"),
        ([[3], [99]], {}, "row 1 of the tokens must lie in [0, 99), got 99"),
        ([[-1]], {}, "must lie in [0, 99), got -1"),
        ([[3]], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([[3]], {"temperature": -1.0}, "temperature must be a number >= 0"),
        ([[3]], {"temperature": float("nan")}, "temperature must be a number >= 0"),
        ([[3]], {"top_k": 0}, "top_k must be >= 1"),
        ([[3]], {"top_k": 5}, "top_k 5 draws tokens, but temperature 0 takes the likeliest; give a temperature above 0"),
        ([[3]], {"seed": 1 << 63}, "seed must be a whole number of 64 bits, -2^63 to 2^63 - 1, got 9223372036854775808"),
        ([[1.5]], {}, "row 0 of the tokens must be a list of at least one id, got [1.5]"),
        ([1, 2], {}, "prompt 0 must be a list, got 1"),
        ("text", {}, "prompts must be a list, got 'text'"),
        ([[3]], {"stop": 5}, "stop must be a list, got 5"),
        ([[3]], {"seed": "a"}, "seed must be a whole number of 64 bits, -2^63 to 2^63 - 1, got 'a'"),
        ([[3]], {"top_k": 1.5, "temperature": 1.0}, "top_k must be a whole number, got 1.5"),
    ],
)
def test_arguments_outside_their_limits(generator, prompts, options, words):
    one_line(UsageError, words, generator.generate, prompts, **{"max_new_tokens": 5} | options)


def test_prompts_and_texts_that_do_not_fit(generator):
    words = "prompt of 40 tokens and 10 new ones do not fit into the cache of 48; lower max_new_tokens to 9 or"
    one_line(QexportError, words, generator.generate, [[3] * 40], max_new_tokens=10)
    assert len(generator.generate([[3] * 40], max_new_tokens=9, stop=[])[0]) == 9
    one_line(QexportError, "48; shorten the prompt or convert", generator.generate, [[3] * 49], max_new_tokens=1)
    generator.reset(2)
    one_line(UsageError, "one list for each of the 2 rows, got 1", generator.append, [[3]])
    one_line(QexportError, "more were given", generator.append, [[3], [3] * 49])
    one_line(UsageError, "seed must be a whole number of 64 bits", generator.append, [[3], [3]], seed=1.5)


def test_bundles_without_a_cache(bundle, tmp_path):
    convert(bundle.parent / "llama", tmp_path / "plain", task="causal-lm", strategy="exact")
    one_line(QexportError, "has no KV cache; convert the model with --kv-cache N", Generator, tmp_path / "plain")


def test_an_older_runtime_is_named(bundle, monkeypatch):
    monkeypatch.setattr(installed.onnxruntime(), "__version__", "1.27.0")
    one_line(QexportError, "needs onnxruntime 1.28 or newer, 1.27.0 is installed", Generator, bundle)


def test_greedy_takes_the_first_of_the_largest():
    draw = np.random.default_rng(0)
    assert choose(np.array([1.0, 3.0, 3.0], np.float32), 0.0, None, draw) == 1
    assert choose(np.array([1.0, 3.0, 2.0], np.float32), 5.0, 1, draw) == 1


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    """20000 draws against softmax(logits / T) among the k likeliest: chi-square at the 1e-6 level."""
    logits = np.array([0.3, -1.0, 2.0, 1.1, 0.0, -0.2], np.float32)
    p = np.exp(logits.astype(np.float64) / temperature)
    if top_k:
        p[np.argsort(-logits)[top_k:]] = 0
    p /= p.sum()
    draw = np.random.default_rng(5)
    counts = np.bincount([choose(logits, temperature, top_k, draw) for _ in range(20000)], minlength=6)
    assert not counts[p == 0].any()
    kept = p > 0
    assert stats.chisquare(counts[kept], 20000 * p[kept]).pvalue > 1e-6


def test_text_in_and_text_out(bundle, generator):
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    ids = tokenizer.encode("Hello").ids
    tokens = generator.generate([ids], max_new_tokens=20)[0]
    pieces = []
    report = generate_text(bundle, "Hello", max_new_tokens=20, on_text=pieces.append)
    assert (report.tokens, report.prompt_tokens) == (tokens, 5)
    assert report.text == tokenizer.decode(ids + tokens).removeprefix("Hello") == "".join(pieces)
    assert report.prompt_s > 0 < report.tokens_per_s


class Pairs:
    """A tokenizer whose characters are two tokens each; half a character is a replacement character."""

    def encode(self, text):
        return type("Encoding", (), {"ids": [token for char in text for token in (40, ord(char) - 32)]})

    def decode(self, tokens):
        whole = "".join(chr(32 + token) for token in tokens[1::2])
        return whole + "\ufffd" * (len(tokens) % 2)


@pytest.mark.parametrize("count", [6, 7])
def test_half_a_character_waits_for_its_other_half(bundle, monkeypatch, count):
    monkeypatch.setattr("qexport.text_generation.open_tokenizer", lambda bundle: (Pairs(), 0))
    pieces = []
    report = generate_text(bundle, "Hi", max_new_tokens=count, stop=[], on_text=pieces.append)
    assert len(report.text) == (count + 1) // 2
    assert "".join(pieces) == report.text
    assert [len(piece) for piece in pieces] == [1] * len(pieces)
    assert ("\ufffd" in report.text) == count % 2


def test_telling_a_token_reads_some_tokens_before_it_and_not_all(bundle, monkeypatch):
    """A step is what is timed: decoding the whole text at each would make long texts look slow."""
    read = []

    class Counted(Pairs):
        def decode(self, tokens):
            read.append(len(tokens))
            return super().decode(tokens)

    monkeypatch.setattr("qexport.text_generation.open_tokenizer", lambda bundle: (Counted(), 0))
    pieces = []
    for on_text in (None, pieces.append):
        read.clear()
        generate_text(bundle, "Hi there", max_new_tokens=20, stop=[], on_text=on_text)
        assert sorted(read)[-2:] == [16, 36]  # the prompt and the whole, once each
        assert len(read) == (2 if on_text is None else 2 + 2 * 20)
        assert all(count <= 12 for count in sorted(read)[:-2])


def test_a_text_is_cut_where_the_cache_ends(bundle):
    cut = generate_text(bundle, "Hello", max_new_tokens=1000, stop=[])
    assert (len(cut.tokens), cut.finish_reason, cut.cache_length) == (LENGTH - 5 + 1, "cache", LENGTH)
    whole = generate_text(bundle, "Hello", max_new_tokens=LENGTH - 5 + 1, stop=[])
    assert (whole.tokens, whole.finish_reason) == (cut.tokens, "length")
    ended = generate_text(bundle, "Hello", max_new_tokens=1000, stop=[cut.tokens[-1]])
    assert ended.finish_reason == "stop"
    one_line(QexportError, "prompt of 60 tokens", generate_text, bundle, "x" * 60)
    one_line(UsageError, "the prompt holds no token", generate_text, bundle, "")


def test_the_command(bundle):
    run = CliRunner().invoke(cli, ["generate", str(bundle), "--prompt", "Hello", "--max-new-tokens", "20"])
    report = generate_text(bundle, "Hello", max_new_tokens=20)
    assert run.exit_code == 0, run.output
    assert run.stdout == f"Hello{report.text}\n"
    assert "a second after the prompt" in run.stderr
    words = ["generate", str(bundle), "--prompt", "Hello", "--max-new-tokens", "20", "--no-library", "--json"]
    run = CliRunner().invoke(cli, words)
    assert json.loads(run.stdout)["tokens"] == report.tokens


def test_the_command_says_that_the_cache_is_full(bundle, monkeypatch):
    words = ["generate", str(bundle), "--prompt", "Hello", "--quiet", "--max-new-tokens"]
    monkeypatch.setattr(Generator, "_run", lambda self, ids, seed: np.eye(99)[np.full(ids.shape, 40)])  # never stops
    run = CliRunner().invoke(cli, [*words, "1000"])
    assert run.exit_code == 0, run.output
    assert run.stderr == f"stopped: the cache of {LENGTH} tokens is full; convert the model with a longer --kv-cache\n"
    assert CliRunner().invoke(cli, [*words, str(LENGTH - 5)]).stderr == ""


def test_a_gpu_generates(bundle, fake_gpu):
    words = ["generate", str(bundle), "--prompt", "Hello", "--max-new-tokens", "5", "--provider", "cuda"]
    run = CliRunner().invoke(cli, [*words, "--json", "--allow-fallback"])
    assert json.loads(run.stdout)["settings"] == {"providers": [CUDA], "allow_fallback": True}
    assert fake_gpu == [([CUDA], False)]
    run = CliRunner().invoke(cli, words)
    assert run.stdout == ""
    one_line(QexportError, "the kernels are missing", generate_text, bundle, "Hello", providers="cuda")


def test_caches_lie_on_the_device(bundle, monkeypatch):
    """The session of the CPU, with the place of another device's tensors."""
    made, real = [], onnxruntime.OrtValue.ortvalue_from_numpy

    def make(array, *place):
        made.append((array.shape, place))
        return real(array)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", make)
    monkeypatch.setattr(runtime, "device_of", lambda session: ("cuda", 1))
    generator = Generator(bundle)
    assert made == [(tuple(value.shape()), ("cuda", 1)) for value in generator.caches.values()]


def test_a_bundle_without_a_tokenizer(bundle, tmp_path):
    convert("tests.torch_zoo:decoder", tmp_path / "b", kv_cache=40, strategy="exact")
    one_line(QexportError, "has no tokenizer/tokenizer.json, so it takes no text", generate_text, tmp_path / "b", "Hello")
