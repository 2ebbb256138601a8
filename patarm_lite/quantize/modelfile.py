"""For people who run a judge outside patarm-lite: an Ollama Modelfile, and the prompt as text.

Servers take a text and not token ids. They read control tokens wherever these stand in it, so the text is built by
`documented_prompt`, which breaks them in everything that is judged, as the protocol does. What is lost: contents are
tokenized together with the tags around them, so a few ids at their borders can differ from those the judge was
trained on. The Modelfile was compared with the chat template by a test; it was not run in Ollama.

Source for the Modelfile: Ollama's documentation and its `parser/parser.go` and `template/template.go` (a template
without `.Response` gets it appended).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from patarm_lite.prompts import (
    ASSISTANT,
    BROKEN,
    END_OF_TURN,
    END_TOKEN,
    NO_THINKING,
    QWEN3_TOKENS,
    USER,
    Protocol,
    inert,
    segments,
)
from patarm_lite.records import Criterion, Rubric, Turn

_MODELFILE = '''\
# {what}
# Compared with the judge's chat template by a test of patarm-lite; not run in Ollama.
#
#   ollama create JUDGE -f Modelfile
#
# The judge reads one user turn in a fixed form. Build it with
#
#   from patarm_lite.quantize.modelfile import documented_prompt
#
# or by hand, each tag on a line of its own:
#
{form}
#
# In every text that you put in, write {broken} for the `<` of these tags and of control tokens such as <|im_end|>.
# Send it as one user message (`/api/chat`) or as the prompt (`/api/generate`); no system message, no earlier turns.
# The answer ends with <score>N</score>, N from 1 to 10. Anything else is no verdict: count it, don't guess.
# A prompt and its judgement together must fit into num_ctx: Ollama cuts a longer prompt without a word.
FROM ./{file}
TEMPLATE """{template}"""
# Greedy, and nothing that changes the judge's own probabilities.
PARAMETER temperature 0
PARAMETER top_k 0
PARAMETER top_p 1
PARAMETER min_p 0
PARAMETER repeat_penalty 1
PARAMETER num_ctx {context}
PARAMETER num_predict {most}
PARAMETER stop "{end}"
'''


def modelfile(gguf_name: str, protocol: Protocol, context: int, *, max_tokens: int = 1024) -> str:
    """The text of an Ollama Modelfile for a judge.

    Args:
        gguf_name: name of the GGUF file, which lies beside the Modelfile.
        protocol: the judge's. Its template is written out literally, `{{ .Prompt }}` where the user turn stands.
        context: tokens of a prompt and its judgement together.
        max_tokens: where a judgement that does not end is cut.

    >>> print(modelfile("judge-q4_k_m.gguf", Protocol(thinking=True), 4096).partition("FROM ")[2].partition("# ")[0])
    ./judge-q4_k_m.gguf
    TEMPLATE \"\"\"<|im_start|>user
    {{ .Prompt }}<|im_end|>
    <|im_start|>assistant
    \"\"\"
    <BLANKLINE>
    """
    form = documented_prompt(protocol, "PROMPT", "RESPONSE", "TASK", (Criterion("NAME", "MEANING", 5),))
    return _MODELFILE.format(
        what=f"A judge of patarm-lite, protocol {protocol.name}.",
        form="\n".join(("#   " + line).rstrip() for line in form.split("\n")),
        broken=f"{BROKEN} (U+{ord(BROKEN):04X})",
        file=gguf_name,
        template=completion_prompt(protocol, "{{ .Prompt }}"),
        context=context,
        most=max_tokens,
        end=END_TOKEN,
    )


def documented_prompt(
    protocol: Protocol,
    prompt: str | Sequence[Turn],
    response: str,
    task: str,
    rubric: Rubric,
    *,
    reference: str | None = None,
    tokens: Iterable[str] = QWEN3_TOKENS,
) -> str:
    """The user turn of a judging prompt as text: what to send to a chat server that runs a judge.

    Args:
        prompt: a chat, or the text of its only user turn.
        tokens: control and user-defined tokens of the judge's vocabulary. They and the protocol's tags are broken in
            everything that is judged.

    Raises:
        UserError: a prompt without turns.

    >>> rubric = (Criterion("truth", "is right", 5),)
    >>> print(documented_prompt(Protocol(instructions=False), "2+2?", "4</response>", "math", rubric))
    <task>
    math
    </task>
    <rubrics>
    truth (5): is right
    </rubrics>
    <prompt>
    2+2?
    </prompt>
    <response>
    4‹/response>
    </response>
    """
    turns = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
    parts = segments(protocol, turns, response, task=task, rubric=rubric, reference=reference)
    known = tuple(tokens)
    text = "".join(inert(part.text, known) if part.content else part.text for part in parts)
    return text.removeprefix(USER).removesuffix(_after_turn(protocol))


def completion_prompt(protocol: Protocol, user_turn: str) -> str:
    """The whole prompt around a user turn, for a server's plain completion (`/v1/completions`), where no chat template
    decides whether the judge thinks.

    >>> completion_prompt(Protocol(thinking=True), "...")
    '<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n'
    """
    return USER + user_turn + _after_turn(protocol)


def _after_turn(protocol: Protocol) -> str:
    return END_OF_TURN + ASSISTANT + ("" if protocol.thinking else NO_THINKING)
