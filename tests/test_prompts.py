"""Prompts: which template writes them, where BOS comes from, what counts as a control token."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_gguf import write_tiny_llama

import woolly
from woolly.byte_tokenizer import gguf_metadata
from woolly.chat import ChatTemplate
from woolly.errors import GGUFError, TemplateError, UnsupportedModelError
from woolly.model import Model
from woolly.prompts import Prompts, TemplateSet
from woolly.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
TOKENIZER = Tokenizer.from_metadata(gguf_metadata(300))  # a token a byte, <s> before them


def prompts(*sources: str, **named: str) -> Prompts:
    templates = dict(zip(["default"], sources, strict=False)) | named
    return Prompts("tiny", TOKENIZER, TemplateSet(templates, bos_token="<s>"))


@pytest.mark.parametrize(
    ("source", "add_bos", "bos", "n_bos"),
    [
        (PLAIN, True, "tokenizer", 1),
        (PLAIN, False, "none", 0),
        ("{{ bos_token }}" + PLAIN, True, "both", 1),
        ("{{ bos_token }}" + PLAIN, False, "template", 1),
    ],
)
def test_where_bos_comes_from(
    source: str, add_bos: bool, bos: str, n_bos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TOKENIZER, "add_bos", add_bos)
    explanation = prompts(source).explain(HI)
    assert explanation.bos == bos
    assert explanation.text == ("<s>Hi" if "bos" in source else "Hi")
    assert explanation.ids == [TOKENIZER.bos_id] * n_bos + [*b"Hi"]
    assert explanation.tokens == ["<s>"] * n_bos + ["<0x48>", "<0x69>"]


def test_a_typed_bos_is_no_bos() -> None:
    explanation = prompts(PLAIN).explain([{"role": "user", "content": "<s>"}])
    assert (explanation.text, explanation.bos) == ("<s>", "tokenizer")
    assert explanation.ids == [TOKENIZER.bos_id, *b"<s>"]


def test_control_tokens_stay_text_wherever_they_come_from() -> None:
    ours = prompts("{{ tools | tojson }}{{ documents | tojson }}{{ style }}{{ bos_token }}")
    tools, documents = [{"description": "</s>"}], ({"text": "</s>"},)
    ids = ours.explain(HI, tools=tools, documents=documents, style="</s>", bos_token="<s>").ids
    assert [i for i in ids if i in TOKENIZER.hidden_ids] == [TOKENIZER.bos_id] * 2


def test_explanation_reads_as_a_report() -> None:
    lines = str(prompts("{{ bos_token }}" + PLAIN).explain(HI)).split("\n")
    assert lines[0] == "<s>Hi"
    assert "      72  <0x48>" in lines
    assert lines[-3:] == [
        "template: default",
        "tokens: 3",
        "BOS: the template writes it and the tokenizer would add another: one is kept",
    ]


def test_the_template_is_chosen_by_name_and_by_tools() -> None:
    ours = prompts("default", tool_use="tools", rag="rag")
    assert ours.explain(HI).text == "default"
    assert ours.explain(HI, tools=[]).text == "tools"
    assert ours.explain(HI, tools=[{}], chat_template="rag").template == "rag"
    assert prompts("default").explain(HI, tools=[{}]).text == "default"
    message = "tiny has no chat template 'x'; say chat_template= one of: default, rag, tool_use"
    with pytest.raises(TemplateError, match=message):
        ours.explain(HI, chat_template="x")
    with pytest.raises(TemplateError, match="tiny has no chat template 'default'; say chat_template= one of: rag"):
        prompts(rag="rag").explain(HI)
    with pytest.raises(UnsupportedModelError, match="tiny has no chat template: use stream or generate"):
        Prompts("tiny", TOKENIZER, None).explain(HI)
    assert Prompts("tiny", TOKENIZER, ChatTemplate("one")).explain(HI).text == "one"


def test_a_template_is_compiled_when_it_is_used() -> None:
    ours = prompts("fine", rag="{% if %}")
    assert len(ours.templates) == 2
    assert ours.explain(HI).text == "fine"
    with pytest.raises(TemplateError, match="rag: chat template, line 1: Expected an expression"):
        ours.explain(HI, chat_template="rag")
    with pytest.raises(TemplateError, match=r"^chat template, line 1: Expected an expression"):
        prompts("{% if %}").explain(HI)


def test_misspelt_options_are_refused() -> None:
    ours = prompts("{{ style }}{{ enable_thinking }}")
    assert ours.explain(HI, style="x").text == "x"
    assert prompts(PLAIN).explain(HI, enable_thinking=False, documents=[]).text == "Hi"
    message = r"temprature is neither a sampling parameter nor .* template reads \(enable_thinking, style\)"
    with pytest.raises(TypeError, match=message):
        ours.explain(HI, temprature=0)
    with pytest.raises(TypeError, match=r"template reads \(nothing\)"):
        prompts(PLAIN).explain(HI, temprature=0)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = [
        {"name": "default", "template": PLAIN + "{{ enable_thinking }}"},
        {"name": "tool_use", "template": "{{ bos_token }}{{ tools[0].name }}\x1b"},
    ]
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("make_gguf.CHAT_TEMPLATE", template)
        return write_tiny_llama(path)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return woolly.load_gguf(tiny_path, n_threads=1)


def test_a_file_names_its_templates(model: Model) -> None:
    assert list(model.chat_templates) == ["default", "tool_use"]
    assert model.chat_template is model.chat_templates["default"]
    assert model.explain_prompt(HI, tools=[{"name": "f"}], show=False).text == "<|im_start|>f\x1b"


def test_a_template_that_is_named_must_be_there(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(tiny_path.read_bytes().replace(b"chat_template.tool_use", b"chat_template.tool_usf"))
    with pytest.raises(GGUFError, match=r"no key 'tokenizer.chat_template.tool_use', expected a string"):
        woolly.load_gguf(path)


def test_explain_prompt_prints_what_chat_sends(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"tools": [{"name": "f"}], "enable_thinking": False}
    explanation = model.explain_prompt(HI, **options)
    out = capsys.readouterr().out
    assert "f\\x1b" in out
    assert "\x1b" not in out
    assert "template: tool_use" in out
    assert model.encode_chat(HI, **options) == explanation.ids
    completion = model.chat(HI, max_tokens=2, temperature=0, **options)
    assert completion.prompt_tokens == len(explanation.ids)
    assert completion.tokens == model.generate(explanation.ids, max_tokens=2, temperature=0).tokens
    assert model.session().chat(HI, max_tokens=1, enable_thinking=True).prompt_tokens != len(explanation.ids)
    with pytest.raises(TypeError, match="temprature is neither a sampling parameter"):
        model.chat(HI, temprature=0)
