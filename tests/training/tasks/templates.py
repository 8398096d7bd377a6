"""Chat templates of three kinds, as the families of models have them."""

# Qwen, SmolLM: nothing marks the assistant's part.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Llama-3: the template writes the beginning of the sequence; contents are trimmed; no line break ends a turn.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|header|>{{ message.role }}<|header|>\n\n{{ message.content | trim }}<|turn_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)

# A template made for training: it marks the assistant's part, its end included.
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same, but the end of the turn stands outside.
GENERATION_WITHOUT_END = GENERATION.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")

# Qwen3 and others that reason: the last answer is written otherwise than those before it.
CHANGING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Of tools and their calls it shows the names and the arguments.
TOOLS = (
    "{% for tool in tools or [] %}<|header|>{{ tool.function.name }}({{ tool.function.parameters.properties | tojson }})\n"
    "{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
