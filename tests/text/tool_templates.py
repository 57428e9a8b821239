"""Chat templates that write tools as the families of models do, each reduced to that. Written for these tests."""

from collections.abc import Mapping

_CHATML_OPEN = "{{ '<|im_start|>' + m.role + '\\n' }}"
_TOOLS = "{% for t in tools or [] %}{{ t.function | tojson }}{% endfor %}"


def _chatml(call: str, *, between: str = "", first: str = "", last: str = "", hint: str = "") -> str:
    """A template of turns, in which each call of an assistant's message is written like this."""
    calls = "{% for c in m.tool_calls %}" + call + "{% if not loop.last %}" + between + "{% endif %}{% endfor %}"
    return (
        "{% if tools %}{{ '<|im_start|>system\\n' }}" + _TOOLS + hint + "<|im_end|>{% endif %}"
        "{% for m in messages %}" + _CHATML_OPEN + "{{ m.content }}"
        "{% if m.tool_calls %}" + first + calls + last + "{% endif %}<|im_end|>{% endfor %}"
        "{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    )


QWEN3_CODER = _chatml(
    "{{ '<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>\\n' + (v if v is string else v | tojson) + '\\n</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</tool_call>' }}",
    between="{{ '\\n' }}",
    first="{{ '\\n' }}",
)
SEED_OSS = _chatml(
    "{{ '<seed:tool_call>\\n<function=' + c.function.name + '>\\n' }}"
    "{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter=' + k + '>' + (v if v is string else v | tojson) + '</parameter>\\n' }}{% endfor %}"
    "{{ '</function>\\n</seed:tool_call>' }}",
    between="{{ '\\n' }}",
    first="{{ '\\n' }}",
)
MINIMAX_M2 = _chatml(
    "{{ '<invoke name=\"' + c.function.name + '\">\\n' }}"
    "{% for k, v in c.function.arguments | items %}"
    "{{ '<parameter name=\"' + k + '\">' + (v if v is string else v | tojson) + '</parameter>\\n' }}{% endfor %}"
    "{{ '</invoke>\\n' }}",
    first="{{ '\\n<minimax:tool_call>\\n' }}",
    last="</minimax:tool_call>",
)
GLM45 = _chatml(
    "{{ '\\n<tool_call>' + c.function.name + '\\n' }}{% for k, v in (c.function.arguments or {}).items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v | tojson if v is not string else v }}</arg_value>{{ '\\n' }}"
    "{% endfor %}</tool_call>",
)
GLM47 = _chatml(
    "<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson if v is not string else v }}</arg_value>"
    "{% endfor %}</tool_call>",
)
DEEPSEEK_V3 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['tool_calls'] %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
    "{% for c in m['tool_calls'] %}{{ ('' if loop.first else '\\n') + '<｜tool▁call▁begin｜>' + c['type'] "
    "+ '<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] "
    "+ '\\n```<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}"
    "{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}{{ '<｜Assistant｜>' if add_generation_prompt }}"
)
DEEPSEEK_V31 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ '<｜Assistant｜></think>' + (m['content'] or '') }}"
    "{% if m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' }}{% for c in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' "
    "+ c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments'] + '<｜tool▁call▁end｜>' }}{% endfor %}"
    "{{ '<｜tool▁calls▁end｜>' }}{% endif %}{{ '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}{{ '<｜Assistant｜></think>' if add_generation_prompt }}"
)
LLAMA4 = _chatml(
    "{{ c.function.name + '(' }}{% for k, v in c.function.arguments | items %}"
    "{{ k + '=' + v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})",
    between=", ",
    first="[",
    last="]",
    hint="Use the format [func_name1(param1=value1), func_name2()].",
)
OLMO3 = _chatml(
    "{% set ns = namespace(listed=[]) %}{% for k, v in c['function']['arguments'].items() %}"
    "{% set ns.listed = ns.listed + [k ~ '=' ~ (v | tojson)] %}{% endfor %}"
    "{{ c['function']['name'] + '(' + ns.listed | join(', ') + ')' }}",
    between="{{ '\\n' }}",
    first="<function_calls>",
    last="</function_calls>",
).replace("'<|im_start|>' + m.role", "'<|im_start|>' + ('environment' if m.role == 'tool' else m.role)")
GRANITE = (
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson }}"
    "Answer with <|tool_call|> and a JSON list.{% endif %}{% for m in messages %}"
    "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>' }}{% endfor %}"
)
PHI4_MINI = (
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}<|assistant|>"
)
PHI4_FUNCTOOLS = (
    "{% if tools %}<|system|>Write calls as functools[...]" + _TOOLS + "<|/tool|><|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.tool_calls %}functools[{% for call in m.tool_calls %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|end|>{% endfor %}<|assistant|>"
)

TEMPLATES: Mapping[str, str] = {
    "qwen3_coder": QWEN3_CODER,
    "seed_oss": SEED_OSS,
    "minimax_m2": MINIMAX_M2,
    "glm45": GLM45,
    "glm47": GLM47,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "pythonic": LLAMA4,
    "olmo3": OLMO3,
    "granite": GRANITE,
    "phi4_mini": PHI4_MINI,
    "phi4_mini_functools": PHI4_FUNCTOOLS,
}

HARMONY = (
    "{% if tools %}{{ '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions to=assistant<|channel|>commentary<|message|>' "
    "+ m.content + '<|end|>' }}{% elif 'tool_calls' in m %}"
    "{% if m.content and m.thinking %}{{ raise_exception('Pass content or thinking.') }}{% endif %}"
    "{% set thought = m.content or m.thinking %}"
    "{% if thought %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' "
    "+ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% endfor %}{{ '<|start|>assistant' if add_generation_prompt }}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content is string %}{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
