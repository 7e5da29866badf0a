"""A chat template that behaves as Gemma 4's own does: it marks no answers and keeps tools' answers in the model's turn.

Facts it shares with the public templates: consecutive assistant messages are one turn, thoughts in an answer are cut
out, `reasoning_content` is written only beside a call that follows the last question, a call without an answer ends
with `<|tool_response>`, text is trimmed, and a system message must be a string.
"""

_MACROS = """\
{%- macro value(v) -%}
  {%- if v is string -%}<|"|>{{ v }}<|"|>
  {%- elif v is boolean -%}{{ 'true' if v else 'false' }}
  {%- elif v is mapping -%}{{ '{' }}{{ pairs(v) }}{{ '}' }}
  {%- elif v is sequence -%}[{% for x in v %}{{ value(x) }}{{ ',' if not loop.last }}{% endfor %}]
  {%- else -%}{{ v }}
  {%- endif -%}
{%- endmacro -%}
{%- macro pairs(d) -%}
  {%- for k, v in d | dictsort -%}{{ k }}:{{ value(v) }}{{ ',' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{%- macro answered(name, body) -%}
  {{- '<|tool_response>response:' + name + '{' -}}
  {{- pairs(body) if body is mapping else 'value:' + value(body) -}}
  {{- '}<tool_response|>' -}}
{%- endmacro -%}
{%- macro spoken(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- for piece in text.split('<channel|>') -%}
    {%- set kept.text = kept.text + piece.split('<|channel>')[0] -%}
  {%- endfor -%}
  {{- kept.text | trim -}}
{%- endmacro -%}
{%- macro body(content, mine) -%}
  {%- if content is string -%}
    {{- spoken(content) if mine else content | trim -}}
  {%- elif content -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{{ spoken(part.text) if mine else part.text | trim }}
      {%- else -%}{{ '<|' + part.type + '|>' }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""

_TURNS = """\
{{- bos_token -}}
{%- set turns = messages -%}
{%- if tools or messages[0].role == 'system' -%}
  {{- '<|turn>system\\n' -}}
  {%- if messages[0].role == 'system' -%}
    {{- messages[0].content | trim -}}
    {%- set turns = messages[1:] -%}
  {%- endif -%}
  {%- for tool in tools or [] -%}
    {{- '<|tool>declaration:' + tool.function.name + '{' -}}
    {{- pairs({'description': tool.function.description | default('')}) + '}<tool|>' -}}
  {%- endfor -%}
  {{- '<turn|>\\n' -}}
{%- endif -%}
{%- set s = namespace(question=-1, before='', last='') -%}
{%- for m in turns -%}{%- if m.role == 'user' -%}{%- set s.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in turns -%}{%- if m.role != 'tool' -%}
  {%- set mine = m.role == 'assistant' -%}
  {%- set place = loop.index0 -%}
  {%- set who = 'model' if mine else m.role -%}
  {%- if not (mine and s.before == 'assistant') -%}{{- '<|turn>' + who + '\\n' -}}{%- endif -%}
  {%- set s.before = m.role -%}
  {%- set s.last = '' -%}
  {%- if m.reasoning_content and m.tool_calls and place > s.question -%}
    {{- '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' -}}
  {%- endif -%}
  {%- for call in m.tool_calls or [] -%}
    {%- set told = call.function.arguments -%}
    {{- '<|tool_call>call:' + call.function.name + '{' + (told if told is string else pairs(told)) + '}<tool_call|>' -}}
    {%- set s.last = 'call' -%}
  {%- endfor -%}
  {%- set found = namespace(any=false, over=false) -%}
  {%- for r in m.tool_responses or [] -%}
    {{- answered(r.name | default('unknown'), r.response) -}}
    {%- set found.any = true -%}
  {%- endfor -%}
  {%- if m.tool_calls and not m.tool_responses -%}
    {%- for r in turns[place + 1:] -%}
      {%- if r.role != 'tool' -%}{%- set found.over = true -%}{%- endif -%}
      {%- if not found.over -%}
        {{- answered(r.name | default('unknown'), r.content) -}}
        {%- set found.any = true -%}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if found.any -%}{%- set s.last = 'response' -%}{%- endif -%}
  {%- set said = body(m.content, mine) -%}
  {{- said -}}
  {%- if s.last == 'call' -%}{{- '<|tool_response>' -}}
  {%- elif said or not found.any -%}{{- '<turn|>\\n' -}}
  {%- endif -%}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt and not s.last -%}
  {{- '<|turn>model\\n' -}}
"""

SMALL = _MACROS + _TURNS + "{%- endif -%}\n"
"""As the small models have it: the generation prompt is the opening of a turn."""
LARGE = _MACROS + _TURNS + "  {{- '<|channel>thought\\n<channel|>' -}}\n{%- endif -%}\n"
"""As the large models have it: the generation prompt closes an empty thought, which no rendered answer has."""
SPECIAL_TOKENS = (
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", "<|channel>",
    "<channel|>", '<|"|>',
)  # fmt: skip
"""Tokens of Gemma 4 that the built-in tokenizer lacks."""
