"""Chat templates by name, from a file, or as they are: Jinja text that `apply_chat_template` takes."""

from __future__ import annotations

from pathlib import Path

_PLAIN_TURNS = """\
{%- for message in messages %}{{ BEGIN + message['role'] + MIDDLE + message['content'] + END }}{% endfor %}\
{%- if add_generation_prompt %}{{ BEGIN + 'assistant' + MIDDLE }}{% endif %}"""


def _turns(begin: str, middle: str, end: str, first: str = "") -> str:
    """Turns of role and content between three texts, which are Jinja expressions."""
    return first + _PLAIN_TURNS.replace("BEGIN", begin).replace("MIDDLE", middle).replace("END", end)


# Gemma has no system turn: such a message begins the first user's turn.
_GEMMA = """\
{{ bos_token }}{%- set ns = namespace(system='') %}{%- for message in messages %}\
{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] + '\\n\\n' %}{%- else %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + ns.system \
+ message['content'] + '<end_of_turn>\\n' }}{%- set ns.system = '' %}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": _turns(r"'<|im_start|>'", r"'\n'", r"'<|im_end|>\n'"),
    "gemma": _GEMMA,
    "llama3": _turns("'<|start_header_id|>'", r"'<|end_header_id|>\n\n'", "'<|eot_id|>'", first="{{ bos_token }}"),
    "phi3": _turns("'<|'", r"'|>\n'", r"'<|end|>\n'"),
    "zephyr": _turns("'<|'", r"'|>\n'", r"eos_token + '\n'"),
}
"""Templates that are asked for by name. The tokens they write should be single ones of the tokenizer."""


def chat_template(template: str) -> str:
    """The Jinja text of a template: one of `TEMPLATES` by its name, a `.jinja` file by its path, or the text itself.

    Raises ValueError for a text that is none of them, FileNotFoundError for a file that does not exist.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template:
        return template
    known = f"a name ({', '.join(TEMPLATES)}), the path of a .jinja file, or Jinja text"
    if Path(template).suffix != ".jinja":
        raise ValueError(f"chat_template={template!r} is no template; give {known}")
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        what = f"chat_template={template!r} cannot be read ({error.strerror})"
        raise FileNotFoundError(f"{what}; give {known}") from error
