"""Laws of traced text: templates see a plain str, and nothing that a client wrote passes for the template's own."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cllm_core.text.chat_template import ChatTemplate
from cllm_core.text.provenance import TracedText, concat, from_client, from_template, to_prompt
from tests.text import factories

# What clients say in these tests has no other letters, and templates none of them.
CLIENT = "xyz XYZ"
SAID = " xyz  zy\n\nx\n "
MESSAGES: list[dict[str, object]] = [
    {"role": "user", "content": SAID, "more": {"x": [SAID, 1, None]}},
    {"role": "assistant", "content": "yx"},
]

# Each character of the result can be told to be the client's or the template's.
FOLLOWED = [
    "c",
    "'<A>' + c + '<B>'",
    "'<A>' ~ c ~ 1 ~ none ~ ('<B>' ~ c)",
    "('<A>' + c) | trim",
    "('<A>' + c + '  ').strip()",
    "(c + '<A>').lstrip().rstrip('>')",
    "('<A>' + c).removeprefix('<A').removesuffix('x')",
    "('<A>' + c)[2:5] + c[-3:] + c[0] + ('<A>' + c)[::-1]",
    "(c + '|' + c).split('|') | join('<A>')",
    "(c + '<A>' + c).split() | join('|')",
    "c.split('y', 1)[0] + c.rsplit('y', 1)[-1] + c.rsplit()[0] + c.rsplit(none, 1)[0]",
    "(c + '<A>').splitlines() | join('<B>') + (c + '<A>').splitlines(true)[1]",
    "(c + '<A>' + c).partition('<A>') | join + (c + '<A>' + c).rpartition('<A>')[0]",
    "c.replace('x', '<A>') + ('<A>' + c) | replace('A', 'B')",
    "c.replace('x', '<A>', 1) | replace('y', c)",
    "'<A>'.join([c, '<B>', c]) + ''.join([])",
    "['<A>', c, 1, none, undefined] | join('|')",
    "messages | map(attribute='content') | join('<A>') + messages | join('|', attribute='role')",
    "'<A>%s|%d%%' % (c, 7) + '<A>%s' % c",
    "'<A>%(here)s|%(here)r' % {'here': 'B'} + '%s<A>' | format(c)",
    "'<A>{}|{}'.format(c, 'B') + '<A>{0}{here}{0}'.format(c, here='B')",
    "'<A>{here[0]}'.format_map({'here': [c]}) + '<A>{:>4}|{:.2f}'.format('B', 1.5)",
    "c | list | join('|') + c | first + c | last + c | reverse",
    "({'<A>': c} | items | list)[0] | join",
    "c if c is string else '<A>'",
    "missing | default('<A>') + c | default('<B>')",
    "messages[0]['content'] + messages[0].more.x[0] + (messages[0].more.keys() | first)",
    "{'user': '<A>'}[messages[0].role] + c",
    "'<A>' | upper + messages[0].role | upper + messages[0].role.title()",
    "(c | length) ~ (c == 'xyz') ~ ('x' in c) ~ c.startswith(' x') ~ c.find('z') ~ c.count('x') ~ c.isspace()",
]
# All of the result may count as the client's.
OTHERS = [
    "('<A>' + c) | upper",
    "('<A>' + c).title() + c.swapcase() + (c | capitalize) + (c | title)",
    "c.center(30) + c.ljust(30, 'A') + c.zfill(20) + c.expandtabs() + c | center(30)",
    "('<A>' ~ c) * 2 + c * 2",
    "messages",
    "messages[0].more | tojson + c | tojson(indent=2) + [c, 'A'] | string",
    "[c, {'A': c}] | join('|') + '%s' % [c] + '{}'.format({'A': c}) + '%r' % c + '{!r:>40}'.format(c)",
    "c | indent(2, true) + c | wordwrap(3) + c | truncate(7, true, 'A') + c | urlencode",
    "c | e + c | safe + (c | escape | string)",
    "(c.encode() ~ '') + c.encode().decode() + c['encode']()['decode']()",
    "c.replace('', 'A') + c.translate({120: 'y'}) + c | pprint",
    "[c] | map('upper') | join + [c] | map('replace', 'x', 'A') | list | string",
    "(c | batch(3) | list)[0] | string",
    "strftime_now(c)",
]

PRELUDE = "{%- set c = messages[0].content -%}"
STATEMENTS = [
    "{% macro say(what) %}<A>{{ what }}{{ caller() if caller else '' }}{% endmacro %}{{ say(c) + '<B>' }}",
    "{% macro say() %}<A>{{ caller() }}{% endmacro %}{% call say() %}<B>{{ c }}{% endcall %}",
    "{% set block %}<A>{{ c }}{% endset %}{{ block + block }}",
    "{% set ns = namespace(a='') %}{% for char in c %}{% set ns.a = ns.a + char + '|' %}{% endfor %}{{ ns.a }}",
    "{% for m in messages recursive %}<A>{{ m.content }}{{ loop.cycle('<B>', c) }}{% endfor %}",
    "{% set say = joiner(c) %}{{ say() }}<A>{{ say() }}{% set next = cycler(c, 'A') %}{{ next.next() }}",
    "{% filter trim %} <A>{{ c }} {% endfilter %}",
    "{% for key, value in messages[0].items() %}{{ value if value is string }}{% endfor %}",
]


def rendered(template: str) -> tuple[str, bytes]:
    prompt = ChatTemplate(PRELUDE + template).render(MESSAGES)
    return prompt.text, prompt.client_mask


def reference(template: str) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=factories.byte_level())
    text = tokenizer.apply_chat_template(
        cast(Any, MESSAGES), chat_template=PRELUDE + template, tokenize=False, add_generation_prompt=True
    )
    return cast(str, text)


@pytest.mark.parametrize("expression", [*FOLLOWED, *OTHERS])
def test_templates_work_on_it_as_on_any_text(expression: str) -> None:
    assert rendered(f"{{{{ {expression} }}}}")[0] == reference(f"{{{{ {expression} }}}}")


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statements_keep_apart_what_client_and_template_wrote(statement: str) -> None:
    text, mask = rendered(statement)
    assert text == reference(statement)
    assert [
        char for char, mark in zip(text, mask, strict=True) if not char.isspace() and (char in CLIENT) != mark
    ] == []


@pytest.mark.parametrize("expression", FOLLOWED)
def test_each_character_keeps_its_origin(expression: str) -> None:
    text, mask = rendered(f"{{{{ {expression} }}}}")
    assert [
        char for char, mark in zip(text, mask, strict=True) if not char.isspace() and (char in CLIENT) != mark
    ] == []


@pytest.mark.parametrize("expression", OTHERS)
def test_nothing_of_the_clients_passes_for_the_templates(expression: str) -> None:
    text, mask = rendered(f"{{{{ {expression} }}}}")
    assert [char for char, mark in zip(text, mask, strict=True) if char in CLIENT and not mark] == []
    assert 1 in mask


def test_a_text_that_is_made_of_both_is_wholly_the_clients() -> None:
    assert rendered("{{ ('<A>' + c[1:3]) | lower }}") == ("<a>xy", b"\1" * 5)


METHODS = [name for name in dir(str) if not name.startswith("_") and name != "maketrans"]
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("count", "endswith", "find", "index", "rfind", "rindex", "startswith"), ("x",)),
    **dict.fromkeys(("partition", "rpartition", "removeprefix", "removesuffix"), ("x",)),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), (9,)),
    "format_map": ({},),
    "join": (["A", "B"],),
    "replace": ("x", "A"),
    "translate": ({},),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_method_hands_out_the_clients_text_as_the_templates(name: str) -> None:
    arguments = ", ".join(map(repr, ARGUMENTS.get(name, ())))
    text, mask = rendered(f"{{{{ [c.{name}({arguments})] | string }}}}{{{{ c.{name}({arguments}) }}}}")
    assert [char for char, mark in zip(text, mask, strict=True) if char in CLIENT and not mark] == []


MIXED = st.text("aABb \n", max_size=12)  # upper case is the client's


def traced(text: str) -> TracedText:
    return concat(from_client(char) if char.isupper() else from_template(char) for char in text)


@given(text=MIXED, other=MIXED, sep=st.none() | st.text("aAbB \n", min_size=1, max_size=2), count=st.integers(-1, 3))
def test_cutting_and_joining_keep_origins(text: str, other: str, sep: str | None, count: int) -> None:
    whole, what = traced(text), traced(sep or " ")
    pieces = {
        "split": (whole.split(sep, count), text.split(sep, count)),
        "rsplit": (whole.rsplit(sep, count), text.rsplit(sep, count)),
        "splitlines": (whole.splitlines(), text.splitlines()),
        "partition": (whole.partition(what), text.partition(what)),
        "rpartition": (whole.rpartition(what), text.rpartition(what)),
        "strip": (
            [whole.strip(sep), whole.lstrip(sep), whole.rstrip(sep)],
            [text.strip(sep), text.lstrip(sep), text.rstrip(sep)],
        ),
        "affixes": (
            [whole.removeprefix(what), whole.removesuffix(what)],
            [text.removeprefix(what), text.removesuffix(what)],
        ),
        "replace": ([whole.replace(what, traced(other), count)], [text.replace(what, other, count)]),
        "join": ([whole.join([what, traced(other), what])], [text.join([what, other, what])]),
        "slices": (
            [whole[count:], whole[:count], whole[::-2], *whole],
            [text[count:], text[:count], text[::-2], *text],
        ),
    }
    for found, expected in pieces.values():
        assert list(found) == list(expected)
        for piece in found:
            prompt = to_prompt(piece)
            marks = zip(prompt.text, prompt.client_mask, strict=True)
            assert [char for char, mark in marks if not char.isspace() and char.isupper() != mark] == []


def test_it_is_equal_to_the_plain_text_and_as_good_as_a_key() -> None:
    assert from_client("a") == "a" == from_template("a")
    assert {"a": 1}[from_client("a")] == 1
    assert from_client({"a": ["b", 1, None]}) == {"a": ["b", 1, None]}
