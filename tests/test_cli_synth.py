"""`woolly synth`: the generated model as a file, which says the same."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import woolly
from woolly import cli, cli_synth, synthetic
from woolly._kernels import GENERATED_FORMATS
from woolly.loading import load_fast_fp32

SIZES = {"vocab_size": 300, "hidden_size": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "intermediate_size": 512}
OPTIONS = ["--vocab-size", "300", "--hidden-size", "256", "--layers", "2", "--heads", "4", "--kv-heads", "2"]
OPTIONS += ["--intermediate-size", "512", "--ctx", "64"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """The machine's own variables must not choose the sizes here."""
    for variable in (synthetic.DTYPE_VARIABLE, *(s.variable for s in synthetic.SETTINGS)):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("dtype", GENERATED_FORMATS)
def test_file_has_the_logits_of_the_generated_model(tmp_path, capsys, dtype):
    path = tmp_path / "out.gguf"
    assert cli.main(["synth", str(path), *OPTIONS, "--dtype", dtype, "--seed", "7"]) == 0
    assert "noise" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    with woolly.load_gguf(path) as ours, load_fast_fp32(**SIZES, n_ctx=64, dtype=dtype, seed=7) as generated:
        assert ours.config == generated.config
        text = "A text, é 😀"
        ids = generated.tokenizer.encode(text)
        assert ours.tokenizer.encode(text) == ids
        np.testing.assert_array_equal(ours.forward(ids), generated.forward(ids))
        messages = [{"role": "user", "content": "Hi </s>"}]
        assert ours.encode_chat(messages) == generated.encode_chat(messages)
        assert ours.memory_plan().weights_bytes == generated.memory_plan().weights_bytes


def test_file_is_what_other_readers_expect(tmp_path):
    path = tmp_path / "out.gguf"
    cli_synth.write_gguf(path, synthetic.resolve(**SIZES, n_ctx=64, dtype="q4_0"))
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(types) == 3 + 2 * 9
    assert types["token_embd.weight"] == types["output.weight"] == types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 64
    assert fields["tokenizer.ggml.model"] == "llama"


def test_existing_files_need_force(tmp_path, capsys):
    path = tmp_path / "out.gguf"
    path.write_bytes(b"old")
    assert cli.main(["synth", str(path), *OPTIONS]) == 1
    assert "out.gguf: the file exists; --force replaces it" in capsys.readouterr().err
    assert path.read_bytes() == b"old"
    assert cli.main(["synth", str(path), *OPTIONS, "--force"]) == 0
    assert path.read_bytes().startswith(b"GGUF")


def test_vocabulary_of_another_file(tmp_path):
    source, path = tmp_path / "source.gguf", tmp_path / "out.gguf"
    import make_gguf

    make_gguf.write_tiny_llama(source, vocab=320)
    assert cli.main(["synth", str(path), *OPTIONS[2:], "--vocab", str(source)]) == 0
    theirs, ours = woolly.Tokenizer.from_gguf(source), woolly.Tokenizer.from_gguf(path)
    assert ours.vocab_size == 320
    assert ours.encode("the other inn") == theirs.encode("the other inn")
    with woolly.load_gguf(path) as model:
        assert model.config.vocab_size == 320
        assert model.chat_template.source == make_gguf.CHAT_TEMPLATE


def test_refusals(tmp_path, capsys):
    import make_gguf

    source, path = tmp_path / "source.gguf", tmp_path / "out.gguf"
    make_gguf.write_tiny_llama(source, vocab=320)
    assert cli.main(["synth", str(path), *OPTIONS, "--vocab", str(source)]) == 1
    assert "vocab_size: " in capsys.readouterr().err
    no_tokenizer = tmp_path / "none.gguf"
    writer = gguf.GGUFWriter(no_tokenizer, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert cli.main(["synth", str(path), *OPTIONS[2:], "--vocab", str(no_tokenizer)]) == 1
    assert "the file has no vocabulary (tokenizer.ggml.tokens)" in capsys.readouterr().err
    assert cli.main(["synth", str(path), "--layers", "0"]) == 1
    assert "n_layers: expected an integer of 1 to 256, got 0" in capsys.readouterr().err
    assert cli.main(["synth", str(tmp_path / "missing" / "out.gguf"), *OPTIONS]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert not path.exists()


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_synth, "_tensor", fail)
    path = tmp_path / "out.gguf"
    path.write_text("what was there")
    assert cli.main(["synth", str(path), *OPTIONS, "--force"]) == cli.EXIT_INTERRUPTED
    assert [file.name for file in tmp_path.iterdir()] == ["out.gguf"]
    assert path.read_text() == "what was there"


def test_llama_cpp_opens_it(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    path = tmp_path / "out.gguf"
    cli_synth.write_gguf(path, synthetic.resolve(**SIZES, n_ctx=64, dtype="q4_0"))
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_predict, params.warmup = 64, 4, False
    server = xllamacpp.Server(params)
    answer = server.handle_completions({"prompt": "Hello", "n_predict": 4, "temperature": 0.0})
    assert "error" not in answer
