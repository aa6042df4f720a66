"""Chat templates: rendering as transformers does, refusing what is malformed, staying in the sandbox."""

import datetime as datetime_module
import hashlib
import itertools
from pathlib import Path

import pytest

import woolly.chat
from woolly.chat import ChatTemplate, validate_messages
from woolly.errors import TemplateError

TEMPLATES = Path(__file__).parents[2] / "shared" / "data" / "templates"
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# --- the conversations that are compared ---

SYSTEM = {"role": "system", "content": "Answer briefly. <b>&amp;</b> \u00e9\U0001f600"}
TURNS = [
    {"role": "user", "content": "Hi, what's 2 < 3?  "},
    {"role": "assistant", "content": "\nTrue. \u4f60\u597d"},
    {"role": "user", "content": "And \"quotes\" 'here'?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Thanks"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in caf\u00e9s & <cities>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name"},
                "days": {"type": ["integer", "string"], "default": 3, "description": "How many"},
                "unit": {"type": "string", "enum": ["C", "F"], "description": "Of heat"},
            },
            "required": ["city"],
        },
    },
}
TOOL_CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}},
}
TOOL_TURNS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "name": "get_weather", "content": '{"sky": "blue"}', "tool_call_id": "abcdef123"},
    {"role": "assistant", "content": "Blue.", "reasoning": "It said so."},
    {"role": "user", "content": "Thanks"},
]


def conversations():
    for system, n_turns in itertools.product(([], [SYSTEM]), range(1, 6)):
        yield system + TURNS[:n_turns]
    for system, n_turns in itertools.product(([], [SYSTEM]), (2, 3, 5)):
        yield system + TOOL_TURNS[:n_turns]


THINKING = ({}, {"enable_thinking": False}, {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"})


def renderings(render):
    """Every conversation with every option; a refusal counts as the text `refused`."""
    options = itertools.product((None, [TOOL], [TOOL, TOOL]), (True, False), THINKING)
    for messages, (tools, add_generation_prompt, variables) in itertools.product(list(conversations()), list(options)):
        try:
            yield render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:
            if not isinstance(error, TemplateError) and not type(error).__module__.startswith(("jinja2", "builtins")):
                raise
            yield "refused"


class FixedDatetime(datetime_module.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9, 12, 30)


@pytest.fixture
def fixed_date(monkeypatch):
    monkeypatch.setattr(woolly.chat, "datetime", FixedDatetime)


def template_named(name, **tokens):
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"no {path}: the shared data are not here")
    return ChatTemplate(path.read_text(encoding="utf-8"), **tokens)


# SHA-256 over all `renderings`, made with transformers 5.23.0 (test_as_transformers is the direct
# comparison, where that is installed).
DIGESTS = {
    "HuggingFaceTB-SmolLM3-3B": "4426614573b17dc3f421c269d3cf713a37410bbc966fd6730223156869be8f79",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "70a21aeb7d08d660a5179fa7c89ff7abca331b83081c1ec5fb8eaf1d0521416f",
    "Qwen-Qwen2.5-7B-Instruct": "47da578a69437ea8c4d8d4d3a9cfc0a6dff613c4c66705e208c03780143d03ac",
    "Qwen-Qwen3-0.6B": "c52fb4d63e0750e2e76f354a112999c289280a2c1735a5dc265be7e418d8ed44",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "de8736075b4891098aa399b52f08c83f32f57b3e29d3abbfae77c2a774f5ac59",
    "google-gemma-2-2b-it": "5e5e6613560537ae4ccf50bd63f9b4f5feee294123e6f6c9194cdb33b9795232",
    "ibm-granite-granite-3.3-2B-Instruct": "70333cf28f7b4de597e65fc4c859a106cd7c49ffc2ce31b8d27a8c749bcd2132",
    "meta-llama-Llama-3.2-3B-Instruct": "da4054651e5c44a1a9519f2580bbe35478f1d9159190e3429ec919b82a0c7a07",
    "microsoft-Phi-3.5-mini-instruct": "e4b20189fc2b5605a9f2434195bf922e50d8a51913cd054ede6fd265447026f2",
    "mistralai-Mistral-Nemo-Instruct-2407": "1a956356869f0a737147f4674951188f5a5ae0cc3ac6db3f0c3092c8bcf112fc",
    "openai-gpt-oss-120b": "04a04dd05503545041b162b54e2c5f2d0d69ef63fad86e5668de53a31dac71b8",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_shared_templates(name, fixed_date):
    template = template_named(name, bos_token="<s>", eos_token="</s>")
    digest = hashlib.sha256("\0".join(renderings(template.render)).encode()).hexdigest()
    assert digest == DIGESTS[name]


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_as_transformers(path, fixed_date, monkeypatch):
    oracle = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    monkeypatch.setattr(oracle, "datetime", FixedDatetime)
    source = path.read_text(encoding="utf-8")

    def expected(messages, **options):
        texts, _ = oracle.render_jinja_template(
            [messages], chat_template=source, bos_token="<s>", eos_token="</s>", **options
        )
        return texts[0]

    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    rendered = list(renderings(template.render))
    assert rendered == list(renderings(expected))
    assert len(set(rendered)) > 1
    last = {"continue_final_message": True, "add_generation_prompt": False}
    for messages in ([TURNS[0], {"role": "assistant", "content": said}] for said in ("Yes, ", "No", [])):
        try:
            text = expected(messages, **last)
        except Exception:
            with pytest.raises((TemplateError, ValueError)):
                template.render(messages, **last)
        else:
            assert template.render(messages, **last) == text


def test_gemma_golden():
    template = template_named("google-gemma-2-2b-it", bos_token="<bos>", eos_token="<eos>")
    assert template.render(TURNS[:3]) == (
        "<bos><start_of_turn>user\nHi, what's 2 < 3?<end_of_turn>\n<start_of_turn>model\nTrue. \u4f60\u597d"
        "<end_of_turn>\n<start_of_turn>user\nAnd \"quotes\" 'here'?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(TemplateError, match=r"^chat template, line 1: System role not supported$"):
        template.render([SYSTEM, *TURNS[:1]])
    with pytest.raises(TemplateError, match="Conversation roles must alternate"):
        template.render([TURNS[0], TURNS[0]])


def test_phi_golden():
    template = template_named("microsoft-Phi-3.5-mini-instruct", eos_token="<|endoftext|>")
    text = "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages) == text + "<|assistant|>\n"
    assert template.render(messages, add_generation_prompt=False) == text + "<|endoftext|>"


def test_qwen3_thinking_golden():
    template = template_named("Qwen-Qwen3-0.6B")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render([{"role": "user", "content": "Hi"}]) == text
    assert template.render([{"role": "user", "content": "Hi"}], enable_thinking=False) == (
        text + "<think>\n\n</think>\n\n"
    )


def test_llama_date(fixed_date):
    template = template_named("meta-llama-Llama-3.2-3B-Instruct", bos_token="<|begin_of_text|>")
    assert "\nToday Date: 09 Mar 2025\n" in template.render([{"role": "user", "content": "Hi"}])


# --- what the environment offers ---


def test_chatml():
    template = ChatTemplate(CHATML)
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "two"),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "one"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ {'b': 'é<', 'a': [1, none]} | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "one!"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}", "1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2025-03-09"),
        ("{{ missing is defined }}{{ missing }}", "False"),
    ],
)
def test_environment(source, expected, fixed_date):
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert template.render(messages) == expected


HI = [{"role": "user", "content": "Hi"}]


def test_variables():
    assert ChatTemplate("{{ bos_token is defined }}", bos_token=None).render(HI) == "False"
    assert ChatTemplate("{{ bos_token }}", bos_token="<s>").render(HI, bos_token="") == ""
    assert ChatTemplate("{{ style }}").render(HI, style="x") == "x"
    assert ChatTemplate("{{ messages[0].reasoning_content }}").render([HI[0] | {"thinking": "so"}]) == "so"


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(TemplateError, match=r"is unsafe|SecurityError"):
        ChatTemplate("{% set _ = messages[0].content.append('b') %}").render(messages)
    assert messages == [{"role": "user", "content": ["a"]}]


# --- failures ---


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ raise_exception('Only two\n turns') }}", r"^chat template, line 2: Only two turns$"),
        ("a\n\n{{ messages[9].content }}", r"^chat template, line 3: .*no element 9$"),
        ("{{ 'a' + 1 }}", r"^chat template, line 1: TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", r"ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", r"access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", r"unsafe"),
        ("{% set ns = namespace(__init__=1) %}", r"'__init__' starts with an underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", r"'_x' starts with an underscore"),
        ("{% include 'secret' %}", r"no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"RecursionError"),
        ("{% for i in range(100001) %}{% endfor %}", r"Range too big"),
    ],
)
def test_render_fails_in_the_templates_words(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(HI)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{% if %}", r"^chat template, line 2: Expected an expression"),
        ("{% for %}", r"^chat template, line 1: "),
        ("{{ x | no_such_filter }}", r"No filter named 'no_such_filter'"),
        ("{{" + "(" * 50_000, r"^chat template does not compile: RecursionError"),
        ("x" * (woolly.chat.MAX_TEMPLATE_CHARS + 1), r"^chat template has 262145 characters, the limit is 262144$"),
    ],
)
def test_source_is_refused(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source)


def test_source_must_be_text():
    with pytest.raises(TypeError, match="a chat template is a string, got bytes"):
        ChatTemplate(b"x")


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(woolly.chat, "MAX_OUTPUT_CHARS", 1000)
    assert ChatTemplate("{{ 'a' * 1000 }}").render(HI) == "a" * 1000
    for source in ("{{ 'a' * 1001 }}", "{% for i in range(1001) %}a{% endfor %}"):
        with pytest.raises(TemplateError, match="wrote more than 1000 characters"):
            ChatTemplate(source).render(HI)


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(woolly.chat, "MAX_RENDER_S", -1)
    with pytest.raises(TemplateError, match="ran for more than -1 s"):
        ChatTemplate("{% for i in range(99999) %}{{ i }}{% endfor %}").render(HI)


@pytest.mark.parametrize(
    ("messages", "kind", "message"),
    [
        ("Hi", TypeError, "messages must be a list of dicts with role and content, got str"),
        ({"role": "user"}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "messages is empty"),
        (["Hi"], TypeError, r"messages\[0\] must be a dict with role and content, got str"),
        ([*HI, {"content": "x"}], ValueError, r"messages\[1\]: role must be a non-empty string, got None"),
        ([{"role": 1, "content": "x"}], ValueError, "role must be a non-empty string, got 1"),
        ([{"role": "user"}], ValueError, r"messages\[0\] \(user\) has no content"),
        ([{"role": "user", "content": 3}], TypeError, "content must be a string, got int"),
    ],
)
def test_messages_are_checked(messages, kind, message):
    with pytest.raises(kind, match=message):
        validate_messages(messages)
    with pytest.raises(kind, match=message):
        ChatTemplate(CHATML).render(messages)


def test_tool_calls_stand_in_for_content():
    validate_messages([{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}])
    validate_messages([{"role": "assistant", "tool_calls": [TOOL_CALL]}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [len]}, "tools must be JSON data: a builtin_function_or_method cannot be passed"),
        ({"tools": ["x"]}, r"tools must be a list of dicts \(JSON schemas\)"),
        ({"tools": {"a": 1}}, r"tools must be a list of dicts"),
        ({"extra": Path()}, "extra must be JSON data: a .*Path cannot be passed to a chat template"),
    ],
)
def test_only_json_data_reaches_the_template(options, message):
    with pytest.raises(TypeError, match=message):
        ChatTemplate(CHATML).render(HI, **options)


def test_tuples_are_lists():
    message = {"role": "user", "content": "Hi", "extra": ({"a": (1, 2)},)}
    assert ChatTemplate("{{ messages[0].extra | tojson }}").render((message,)) == '[{"a": [1, 2]}]'


def test_empty_fields_are_left_out():
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [TOOL_CALL]}
    template = ChatTemplate("{{ messages[0] | list }}")
    assert template.render([message]) == "['role', 'tool_calls']"


# --- continuing the last message ---

SAID = [*HI, {"role": "assistant", "content": "Yes, ", "thinking": "So"}]


@pytest.mark.parametrize(
    ("source", "continued", "expected"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}", True, "[Hi][Yes, "),
        ("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", True, "[Hi][Yes,"),
        ("{% for m in messages %}[{{ m.thinking }}|{{ m.content }}]{% endfor %}", "reasoning_content", "[|Hi][So"),
        ("{{ messages[0].content }}{{ add_generation_prompt }}", False, "HiTrue"),
        ("{{ messages[1].content }}{{ add_generation_prompt }}", True, "Yes, "),
    ],
)
def test_the_last_message_is_continued(source, continued, expected):
    assert ChatTemplate(source).render(SAID, continue_final_message=continued) == expected


def test_the_last_text_part_is_continued():
    said = {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}, {"type": "image"}]}
    template = ChatTemplate("{% for part in messages[0].content %}{{ part.text }};{% endfor %}")
    assert template.render([said], continue_final_message=True) == "a;b"


@pytest.mark.parametrize(
    ("messages", "options", "kind", "message"),
    [
        (SAID, {"add_generation_prompt": True}, ValueError, "add_generation_prompt begins a new message"),
        (SAID, {"continue_final_message": "name"}, ValueError, "the last message has no name to continue"),
        (SAID, {"continue_final_message": "thinking"}, ValueError, "the chat template does not read thinking"),
        ([{"role": "user", "content": [{"image": "x"}]}], {}, ValueError, "has no text to continue"),
        ([*SAID, {"role": "tool", "content": "x"}], {}, TemplateError, "it leaves out the last message"),
    ],
)
def test_what_cannot_be_continued(messages, options, kind, message):
    template = ChatTemplate("{{ messages[0].content }}{% if messages[1] %}{{ messages[1].content }}{% endif %}")
    with pytest.raises(kind, match=message):
        template.render(messages, **{"continue_final_message": True, **options})


def test_variables_that_a_template_reads():
    template = ChatTemplate("{% set a = b %}{% for m in messages %}{{ raise_exception(style) }}{% endfor %}{{ a }}")
    assert template.variables == {"b", "messages", "style"}
