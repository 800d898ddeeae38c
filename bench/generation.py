"""Speech and stories: what sampled attention does to a transcript and to the likelihood of a text.

    python -m bench.generation [--seeds 3] [--json FILE]

Speech: Whisper tiny.en on ten seconds of speech, all 4 encoder attentions (1500 positions) and 8 decoder attentions sampled;
`encoder_error` is the relative Frobenius error of the encoder's states, `same_tokens` the share of the classical transcript
that is most likely given the right tokens before, `same_transcript` the share of seeds whose greedy transcript is the
classical one, token for token. Story: stories15M, the classical model's own greedy text of 255 tokens;
`nats_per_token` is how well the sampled model predicts it, mean over seeds, with the 95 % interval's half width, and
`perplexity_loss_percent` the perplexity that is lost by it. The row `default` is what `convert` makes without a word.
"""

import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common
from bench.data import speech_features
from qexport.runtime import quiet_options

WHISPER_START, WHISPER_END = [50257, 50362], 50256  # start of transcript, no timestamps; end of text
STORY_TOKENS = 255


def transcribe(decoder, states: np.ndarray, seed: int | None = None, limit: int = 40) -> list[int]:
    """Greedy tokens of a decoder session for encoder states (1, 1500, 384), up to the end of the text or `limit` tokens."""
    tokens = list(WHISPER_START)
    while len(tokens) < len(WHISPER_START) + limit and tokens[-1] != WHISPER_END:
        feeds = {"decoder_input_ids": np.array([tokens]), "encoder_hidden_states": states}
        tokens.append(int(decoder.run(None, seeded(feeds, seed))[0][0, -1].argmax()))
    return tokens[len(WHISPER_START) :]


def next_tokens(decoder, states: np.ndarray, transcript: list[int], seed: int | None = None) -> np.ndarray:
    """The most likely token at each place of a transcript when the right ones precede it."""
    tokens = np.array([WHISPER_START + transcript[:-1]])
    logits = decoder.run(None, seeded({"decoder_input_ids": tokens, "encoder_hidden_states": states}, seed))[0]
    return logits[0, len(WHISPER_START) - 1 :].argmax(-1)


def greedy_story(session, length: int) -> np.ndarray:
    """The most likely text of stories15M, token ids (1, length) that start with BOS."""
    tokens = [1]
    while len(tokens) < length:
        tokens.append(int(session.run(None, {"input_ids": np.array([tokens])})[0][0, -1].argmax()))
    return np.array([tokens])


def nats_per_token(session, ids: np.ndarray, seed: int | None = None) -> float:
    """Mean cross-entropy of each next token of ids (1, length)."""
    logits = session.run(None, seeded({"input_ids": ids}, seed))[0][0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[0, 1:, None], 1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


def seeded(feeds: dict, seed: int | None) -> dict:
    return feeds if seed is None else feeds | {"seed": np.array(seed, dtype=np.int64)}


def speech_table(folder: Path, opened, seeds: int) -> list[dict]:
    bundles = {part: folder / part for part in ("encoder", "decoder")}
    for part, bundle in bundles.items():
        qexport.convert(f"bench.models:whisper_{part}", bundle, strategy="stratified")
    features = {"input_features": speech_features()}
    exact = opened(bundles["encoder"] / "classical.onnx").run(None, features)[0]
    transcript = transcribe(opened(bundles["decoder"] / "classical.onnx"), exact)
    rows = [{"samples": None, "encoder_error": 0.0, "same_tokens": 1.0, "same_transcript": 1.0}]
    for samples in (256, 64, 32, 16, 8):
        encoder, decoder = (
            opened(common.with_attributes(bundle / "model.onnx", bundle / "sampled.onnx", num_samples=[samples]))
            for bundle in bundles.values()
        )
        errors, same, agreed = [], [], []
        for seed in range(seeds):
            states = encoder.run(None, seeded(features, seed))[0]
            errors.append(common.relative_error(states, exact))
            agreed.append(np.mean(next_tokens(decoder, states, transcript, seed) == np.array(transcript)))
            same.append(transcribe(decoder, states, seed) == transcript)
        means = (float(np.mean(values)) for values in (errors, agreed, same))
        names = ("encoder_error", "same_tokens", "same_transcript")
        rows.append({"samples": samples} | dict(zip(names, means, strict=True)))
    return rows


def story_table(folder: Path, opened, seeds: int) -> list[dict]:
    bundle = folder / "stories"
    qexport.convert("bench.models:stories15m", bundle, strategy="stratified")
    classical = opened(bundle / "classical.onnx")
    ids = greedy_story(classical, STORY_TOKENS)
    least = nats_per_token(classical, ids)

    def row(samples, nats, ci95):
        loss = 100 * (np.exp(nats - least) - 1)
        return {"samples": samples, "nats_per_token": nats, "ci95": ci95, "perplexity_loss_percent": float(loss)}

    qexport.convert("bench.models:stories15m", folder / "default")
    default = nats_per_token(opened(folder / "default" / "model.onnx"), ids)
    rows = [row(None, least, None), row("default", default, None)]
    for samples in (64, 32, 16, 8):
        session = opened(common.with_attributes(bundle / "model.onnx", bundle / "sampled.onnx", num_samples=[samples]))
        mean, half = common.mean_interval([nats_per_token(session, ids, seed) for seed in range(seeds)])
        rows.append(row(samples, mean, half))
    return rows


def main():
    arguments = common.parser(__doc__.split("\n")[0], seeds=3).parse_args()

    def opened(path):
        return qexport.session(path, options=quiet_options(arguments.threads))

    with tempfile.TemporaryDirectory() as folder:
        tables = {"speech": speech_table(Path(folder), opened, arguments.seeds)}
        tables["story"] = story_table(Path(folder), opened, arguments.seeds)
    parameters = {"strategy": "stratified", "control_variate": 1, "seeds": arguments.seeds, "story_tokens": STORY_TOKENS}
    common.report("generation", arguments.threads, parameters, tables, arguments.json)


if __name__ == "__main__":
    main()
