"""Perplexity and divergence: against the float64 reference and plain formulas, from models and from files of a base."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import reference
from make_gguf import write_tiny_gemma3, write_tiny_llama

import woolly
from woolly import cli
from woolly.base_logits import BaseLogits, n_bytes_of, write_header, write_rows
from woolly.errors import WoollyError
from woolly.measuring import ModelDistributions, Quality, cut_windows, log_softmax, measure
from woolly.model import Model

TEXT = "The quick brown fox jumps over the lazy dog; " * 6
N_CTX = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring")
    write_tiny_llama(folder / "a.gguf", dtype="f32")
    write_tiny_llama(folder / "b.gguf", dtype="q8_0")
    raw, key = (folder / "a.gguf").read_bytes(), b"tokenizer.ggml.add_bos_token\x07\0\0\0"
    assert raw.count(key + b"\0") == 1
    (folder / "bos.gguf").write_bytes(raw.replace(key + b"\0", key + b"\1"))
    (folder / "text").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Model]:
    return {name: woolly.load_gguf(folder / f"{name}.gguf", n_ctx=64, n_threads=2) for name in ("a", "b", "bos")}


def measured(model: Model, base: Model | None = None) -> Quality:
    windows = cut_windows(model.tokenizer, TEXT, N_CTX)
    source = None if base is None else ModelDistributions(base, windows)
    return measure(ModelDistributions(model, windows), windows, base=source)


@pytest.mark.parametrize("name", ["a", "bos"])
def test_perplexity_is_the_references(models, name):
    model = models[name]
    tokens = model.tokenizer.encode(TEXT)
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    assert (bos is None) == (name == "a")
    expected = reference.perplexity(model.forward, tokens, n_ctx=N_CTX, bos=bos)
    quality = measured(model)
    assert len(quality.losses) == len(expected) * (N_CTX // 2 - 1)
    assert quality.perplexity == pytest.approx(expected[-1], rel=1e-12)
    assert quality.divergences is quality.base_losses is quality.same_top is None
    assert list(quality.summary()) == ["tokens", "perplexity", "perplexity_error"]


def test_divergence_is_that_of_whole_windows(models):
    a, b = models["a"], models["b"]
    quality = measured(b, a)
    windows = cut_windows(a.tokenizer, TEXT, N_CTX)
    p, q = (np.concatenate([log_softmax(m.forward(w)[N_CTX // 2 : -1]) for w in windows.tolist()]) for m in (a, b))
    np.testing.assert_array_equal(quality.divergences, (np.exp(p) * (p - q)).sum(axis=1))
    np.testing.assert_array_equal(quality.same_top, p.argmax(axis=1) == q.argmax(axis=1))
    assert (quality.divergences > 0).all()
    summary = quality.summary()
    assert summary["kl_mean"] == quality.divergences.mean()
    assert summary["kl_median"] <= summary["kl_p99"] <= summary["kl_p99.9"] <= summary["kl_max"]
    assert summary["perplexity_ratio"] == pytest.approx(quality.perplexity / measured(a).perplexity)
    assert summary["base_perplexity"] == measured(a).perplexity


def test_a_model_does_not_diverge_from_itself(models):
    summary = measured(models["a"], models["a"]).summary()
    assert summary["kl_mean"] == summary["kl_max"] == summary["kl_mean_error"] == 0
    assert summary["same_top"] == summary["perplexity_ratio"] == 1


def test_pieces_change_nothing(models, monkeypatch):
    whole = measured(models["b"], models["a"])
    monkeypatch.setattr("woolly.measuring.rows_of_a_piece", lambda n_vocab: 4)
    pieces = measured(models["b"], models["a"])
    np.testing.assert_array_equal(whole.divergences, pieces.divergences)
    np.testing.assert_array_equal(whole.losses, pieces.losses)


def test_standard_errors():
    losses = np.array([1.0, 2, 3, 4])
    summary = Quality(losses, losses - 1, losses * 0, losses > 2).summary()
    assert summary["perplexity"] == pytest.approx(np.exp(2.5))
    assert summary["perplexity_error"] == pytest.approx(np.exp(2.5) * losses.std(ddof=1) / 2)
    assert summary["perplexity_ratio"] == pytest.approx(np.e)
    assert (summary["perplexity_ratio_error"], summary["same_top"]) == (0, 0.5)


def test_windows(models):
    tokenizer = models["a"].tokenizer
    n_tokens = len(tokenizer.encode(TEXT))
    assert cut_windows(tokenizer, TEXT, 5).shape == (n_tokens // 5, 5)
    assert cut_windows(tokenizer, TEXT, 5, 3).tolist() == cut_windows(tokenizer, TEXT, 5)[:3].tolist()
    with pytest.raises(
        WoollyError, match=r"^the text has \d+ tokens, and one window takes 512: a longer text is needed$"
    ):
        cut_windows(tokenizer, "short", 512)
    with pytest.raises(ValueError, match=r"^cut_windows: n_ctx must be at least 4, got 3$"):
        cut_windows(tokenizer, TEXT, 3)


# --- files of a base ---


def test_rows_of_a_base_come_back(tmp_path):
    """Steps of a 65535th of the range, and a cut at e^-16 of the likeliest."""
    logits = np.random.default_rng(0).normal(0, 4, (11, 301)).astype(np.float32)
    logits[3] = 0
    log_probs, windows = log_softmax(logits), np.arange(24, dtype=np.int32).reshape(1, 24)
    with (tmp_path / "base").open("wb") as out:
        write_header(out, windows, 301)
        write_rows(out, log_probs)
    assert (tmp_path / "base").stat().st_size == n_bytes_of(24, 301, 1)
    with BaseLogits(tmp_path / "base") as base:
        np.testing.assert_array_equal(base.windows, windows)
        found = np.concatenate(list(base.log_probs(0)))
    cut = np.maximum(log_probs, log_probs.max(axis=1, keepdims=True) - 16)
    assert (cut > log_probs).any()
    assert np.abs(found - cut).max() < 16 / 65535
    assert cut[cut > log_probs].max() < BaseLogits.least


def test_a_base_is_as_good_as_its_model(folder, tmp_path, capsys):
    base, text = str(tmp_path / "base"), str(folder / "text")
    options = ["-f", text, "--ctx", str(N_CTX), "--json"]
    assert cli.main(["perplexity", str(folder / "a.gguf"), *options, "--save-base", base]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main(["perplexity", str(folder / "b.gguf"), *options, "--kl-base", base]) == 0
    of_file = json.loads(capsys.readouterr().out)
    assert cli.main(["perplexity", str(folder / "b.gguf"), *options, "--kl-base", str(folder / "a.gguf")]) == 0
    of_model = json.loads(capsys.readouterr().out)
    assert cli.main(["compare", str(folder / "a.gguf"), str(folder / "b.gguf"), *options]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert of_file["perplexity"] == of_model["perplexity"] == compared["perplexity"]
    assert of_model["base_perplexity"] == compared["base_perplexity"] == alone["perplexity"]
    assert of_model["kl_mean"] == compared["kl_mean"] > 0
    assert of_file["kl_mean"] == pytest.approx(of_model["kl_mean"], abs=1e-4)
    assert of_file["base_perplexity"] == pytest.approx(alone["perplexity"], rel=0.1)  # its losses reach beyond the cut
    assert (of_file["base"], compared["chunks"], compared["ctx"]) == (base, 7, N_CTX)
    assert (compared["model"], compared["base"]) == (str(folder / "b.gguf"), str(folder / "a.gguf"))


def broken(path: Path, change) -> str:
    windows = np.arange(16, dtype=np.int32).reshape(2, 8)
    with path.open("wb") as out:
        write_header(out, windows, 20)
        write_rows(out, np.full((6, 20), -np.log(20)))
    raw = bytearray(path.read_bytes())
    path.write_bytes(change(raw) or raw)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-2], r"its header asks for \d+ bytes, the file has \d+$"),
        (lambda raw: raw + b"..", r"its header asks for \d+ bytes, the file has \d+$"),
        (lambda raw: raw[:12], r"the header takes 20 bytes, the file has 12$"),
        (lambda raw: b"GGUF" + raw, r"magic at byte 0: expected b'_logits_', found b'GGUF_log'$"),
        (lambda raw: struct.pack_into("<I", raw, 8, 3), r"its sizes make no sense: windows of 3, a vocabulary of 20"),
        (lambda raw: struct.pack_into("<i", raw, 16, -1), r"its sizes make no sense: .* -1 windows$"),
        (lambda raw: struct.pack_into("<i", raw, 24, 20), r"a token is outside the vocabulary of 20$"),
    ],
)
def test_bad_files_of_a_base_are_refused(tmp_path, change, message):
    with pytest.raises(WoollyError, match=message):
        BaseLogits(broken(tmp_path / "base", change))


@pytest.mark.parametrize(
    "scale", [(np.nan, -1), (-1e-6, -1), (1e-4, -1), (0, 0.1), (0, -200), (0, np.nan), (np.inf, -1)]
)
def test_scales_that_no_probabilities_have_are_refused(tmp_path, scale):
    path = broken(tmp_path / "base", lambda raw: struct.pack_into("<ff", raw, 20 + 4 * 16, *scale))
    with BaseLogits(path) as base, pytest.raises(WoollyError, match=r"give no logarithms of probabilities$"):
        list(base.log_probs(0))


# --- the commands ---


def test_people_read_a_table(folder, capsys):
    arguments = [str(folder / "a.gguf"), "-f", str(folder / "text"), "--ctx", "32", "--chunks", "2"]
    assert cli.main(["perplexity", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "2 windows of 32 tokens, 30 scored" in shown
    assert "KL" not in shown
    assert cli.main(["compare", str(folder / "b.gguf"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Ratio", "KL divergence", "99.9 %", "Same top token"))


def test_errors_of_the_commands(folder, tmp_path, capsys):
    a, b, text = (str(folder / name) for name in ("a.gguf", "b.gguf", "text"))
    base, latin = str(tmp_path / "base"), tmp_path / "latin"
    latin.write_bytes(b"caf\xe9")
    write_tiny_gemma3(tmp_path / "other.gguf", dtype="f32", vocab=300)
    assert cli.main(["perplexity", a, "-f", text, "--ctx", "32", "--chunks", "2", "--save-base", base]) == 0
    (tmp_path / "more").write_text(TEXT[9:])
    for arguments, message in [
        (["perplexity", a, "-f", "nosuch"], "nosuch: No such file or directory"),
        (["perplexity", a, "-f", str(latin)], "latin: expected text in UTF-8, byte 3 is none"),
        (["perplexity", a, "-f", text, "--kl-base", "nosuch"], "no file or known model 'nosuch'"),
        (["perplexity", a, "-f", text, "--ctx", "32", "--kl-base", text], "expected b'GGUF', found b'The '"),
        (["perplexity", a, "-f", text, "--ctx", "32", "--save-base", base], "the file exists; --force replaces it"),
        (["perplexity", b, "-f", text, "--ctx", "16", "--kl-base", base], "windows of 32 tokens, expected 16"),
        (
            ["perplexity", b, "-f", text, "--ctx", "32", "--kl-base", base],
            "of 2 windows, the text has 7: choose with --ch",
        ),
        (["perplexity", b, "-f", str(tmp_path / "more"), "--ctx", "32", "--chunks", "2", "--kl-base", base], "another"),
        (
            ["perplexity", str(tmp_path / "other.gguf"), "-f", text, "--ctx", "32", "--kl-base", base],
            "the model's has 300",
        ),
        (["compare", a, str(tmp_path / "other.gguf"), "-f", text, "--ctx", "32"], "their distributions do not compare"),
        (["compare", a, str(folder / "bos.gguf"), "-f", text, "--ctx", "32"], "cut the text into different tokens"),
    ]:
        capsys.readouterr()
        assert cli.main(arguments) == 1, arguments
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["perplexity", a, "-f", text, "--ctx", "3"])
    assert "--ctx must be at least 4, got 3" in capsys.readouterr().err
