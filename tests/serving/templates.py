"""Chat templates in miniature: each speaks one public family's format, in that family's words.

Every one begins the answer with the token <assistant>, behind which `scripted` writes.
"""

BEGIN = "{% if add_generation_prompt %}<assistant>{% endif %}"

_HERMES_CALL = (
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}'
    "}\n</tool_call>\n"
)
HERMES = (
    "{% if tools %}<user>system: # Tools, in <tools></tools>:{% for t in tools %}\n"
    "{{ t | tojson }}{% endfor %}\nReturn calls within <tool_call></tool_call> tags.\n{% endif %}"
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}" + _HERMES_CALL + "{% endfor %}\n{% endfor %}" + BEGIN
)
QWEN3 = (
    HERMES.removesuffix(BEGIN)
    + "{% if enable_thinking is defined and not enable_thinking %}/no_think{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and "
    "not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = (
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
QWEN_CODER = (
    "{% if tools %}<user>system: Call them as <tool_call>\n<function=name>\n<parameter=key>\nvalue\n"
    "</parameter>\n</function>\n</tool_call>.{% for t in tools %}\n<name>{{ t.function.name }}"
    "</name>{{ t.function.parameters | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}\n"
    "{% endfor %}" + BEGIN
)
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    '<user>system: {{ system }}{% if tools %} Respond in the format {"name": function name, '
    '"parameters": dictionary of argument name and its value}.{% for t in tools %}\n'
    "{{ t | tojson(indent=4) }}{% endfor %}{% endif %}\n"
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    '{% set c = m.tool_calls[0].function %}<user>assistant: {"name": "{{ c.name }}", '
    '"parameters": {{ c.arguments | tojson }}}\n'
    "{% elif m.role == 'tool' %}<user>ipython: {{ m.content | tojson }}\n"
    "{% else %}<user>{{ m.role }}: {{ m.content | trim }}\n{% endif %}{% endfor %}" + BEGIN
)
PYTHONIC = (
    "{% if tools %}<user>system: Respond in the format [func_name1(params_name1=params_value1), "
    "func_name2(params)].{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}{% if m.tool_calls %}["
    "{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{% endfor %}){% endfor %}]{% endif %}\n{% endfor %}" + BEGIN
)
_MISTRAL_TOOLS = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == users[-1] %}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}"
)
_MISTRAL_ID = (
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings "
    "with length 9!') }}{% endif %}"
)
MISTRAL = (
    _MISTRAL_TOOLS + "[TOOL_CALLS][{% for c in m.tool_calls %}" + _MISTRAL_ID + "{{ c.function | "
    "tojson }}{{ ', ' if not loop.last }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}" + BEGIN
)
MISTRAL_ARGS = (
    _MISTRAL_TOOLS + "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}" + BEGIN
)
GRANITE = (
    "{% if tools %}<user>system: When a tool is required, respond only with <|tool_call|> followed "
    "by a JSON list of tools used.\n<user>tools: {{ tools | tojson(indent=4) }}\n{% endif %}"
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}{% if m.tool_calls %}<|tool_call|>["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{% endif %}\n{% endfor %}"
    + BEGIN
)
PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}<|{{ message['role'] }}|>{{ message['content'] }}<|tool|>"
    "{{ message['tools'] }}<|/tool|><|end|>{% else %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{% for c in message.tool_calls or [] %}<|tool_call|>"
    "{{ c.function | tojson }}<|/tool_call|>{% endfor %}<|end|>{% endif %}{% endfor %}" + BEGIN
)
FUNCTOOLS = (
    "{% if tools %}<|system|>All function calls should be generated in a single JSON list formatted "
    "as functools[...]{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}" + BEGIN
)
HARMONY = (
    "{% if tools %}<|start|>developer<|message|># Tools\nnamespace functions {% raw %}{{% endraw %}"
    "{% for t in tools %}type {{ t.function.name }} = (_: {{ t.function.parameters | tojson }}) => "
    "any;{% endfor %}}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
    "{{ c.arguments | tojson }}<|call|>{% elif m.role == 'tool' %}<|start|>functions to=assistant"
    "<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + BEGIN
)

TEMPLATES = {
    "hermes": HERMES,
    "qwen-coder": QWEN_CODER,
    "llama": LLAMA,
    "pythonic": PYTHONIC,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "granite": GRANITE,
    "phi": PHI,
    "phi-functools": FUNCTOOLS,
    "harmony": HARMONY,
}
SPECIAL = {
    "llama": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral-args": ["[TOOL_CALLS]", "[ARGS]"],
    "granite": ["<|tool_call|>"],
    "phi": ["<|tool_call|>", "<|/tool_call|>", "<|end|>"],
    "harmony": ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"],
}
"""Markers that these families' tokenizers have as special tokens."""
