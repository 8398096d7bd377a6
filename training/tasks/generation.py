"""What a causal language model writes behind prompts of unequal length.

Greedy: a generation then depends on the weights alone, not on what stands beside it in a batch or on the process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from onecurve.training.architectures import count_positions
from onecurve.training.errors import BadInput
from onecurve.training.tasks import chats
from onecurve.training.tasks.conversations import Conversation
from onecurve.training.tasks.token_spans import PLAIN, TEMPLATE, tokenize_parts

if TYPE_CHECKING:
    import torch

_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}

_EXAMPLES_PER_BATCH = 8


def set_ends(model: Any, tokenizer: Any) -> None:
    """Let the model's generation settings, which are saved beside it, name every token that ends what it learns to write."""
    settings = model.generation_config
    known = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = [*known, tokenizer.eos_token_id, find_end_of_turn(tokenizer)]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    settings.pad_token_id = tokenizer.pad_token_id


def find_end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template ends an assistant's message with; None where it has none."""
    if not tokenizer.chat_template:
        return None
    ends = chats.find_special_tokens(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, (start, end) = chats.find_answer(tokenizer, Conversation(messages), 1, ends)
    except chats.UnclearChat:
        return None
    part = text[start:end]
    for token in ends:
        if part.endswith(token):
            number: int = tokenizer.convert_tokens_to_ids(token)
            return number
    return None


def generate(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    is_sharded: bool = False,
) -> torch.Tensor:
    """[rows, new tokens] what the model writes behind each prompt, the token that ends it included and -1 behind that.

    Args:
        input_ids: [rows, longest] prompts, padded on either side.
        attention_mask: [rows, longest], 0 in padded places; None where there are none.
        is_sharded: whether all processes must make the same number of forwards; all must be given the same prompts.
    """
    import torch

    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    # Padding goes to the left: what is generated stands directly behind the prompt.
    order = torch.argsort(attention_mask, dim=1, stable=True)
    with torch.no_grad():
        whole = model.generate(
            input_ids=input_ids.gather(1, order),
            attention_mask=attention_mask.gather(1, order),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            synced_gpus=is_sharded,
            **_GREEDY,
        )
    written: torch.Tensor = whole[:, input_ids.shape[1] :]
    ends = torch.as_tensor(model.generation_config.eos_token_id, device=written.device).reshape(-1)
    is_end = torch.isin(written, ends)
    is_behind = is_end.cumsum(dim=1) - is_end.long() > 0
    return written.masked_fill(is_behind, -1)


def answer(
    model: Any, tokenizer: Any, messages: Sequence[Mapping[str, Any]], max_new_tokens: int, write: Callable[[str], None]
) -> str:
    """As `Task.answer`. It is generated as the model's own settings say, which may sample; Ctrl-C ends it.

    Raises:
        BadInput: the messages are too long for the model, or its chat template refuses them.
    """
    import torch
    from transformers import StoppingCriteriaList, TextStreamer

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    text = str(messages[-1]["content"])
    if tokenizer.chat_template:
        try:
            text = chats.render(tokenizer, Conversation([dict(message) for message in messages]), asks_for_answer=True)
        except chats.UnclearChat as error:
            raise BadInput(str(error)) from None
    [(tokens, _)] = tokenize_parts(tokenizer, [text], [()], TEMPLATE if tokenizer.chat_template else PLAIN)
    prompt = torch.tensor([tokens])
    positions = count_positions(model.config.to_dict())
    if positions is not None and prompt.shape[1] + max_new_tokens > positions:
        raise BadInput(
            f"{prompt.shape[1]} tokens of prompt and {max_new_tokens} of the answer are more than the model's {positions} "
            "positions"
        )
    prompt, was_stopped = prompt.to(model.device), Interruption()
    with was_stopped, torch.no_grad():
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            streamer=Stream(tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=StoppingCriteriaList([was_stopped]),
        )
    answered: str = tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True)
    return answered


class Interruption:
    """Notes Ctrl-C while it is entered, so that a generation ends after the token at hand instead of in the middle."""

    def __init__(self) -> None:
        self._was_asked = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._was_asked = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
        """[rows] whether to stop, as transformers asks after each token."""
        import torch

        return torch.full((len(input_ids),), self._was_asked, device=input_ids.device)


def continue_examples(
    model: Any,
    examples: Mapping[str, Any],
    tokenizer: Any,
    num_samples: int,
    max_new_tokens: int,
    max_prompt_tokens: int | None,
    is_sharded: bool,
) -> list[dict[str, Any]]:
    """For the first examples with a prompt: its row, the prompt, what the model writes, and what the data has there."""
    import torch

    chosen = list(_find_prompts(examples, num_samples, max_prompt_tokens))
    device, lines = next(model.parameters()).device, []
    for start in range(0, len(chosen), _EXAMPLES_PER_BATCH):
        batch = chosen[start : start + _EXAMPLES_PER_BATCH]
        prompts = [examples["input_ids"][[number]][0][:length] for number, length in batch]
        longest = max(map(len, prompts))
        input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.as_tensor(prompt.copy())
            attention_mask[row, longest - len(prompt) :] = 1
        written = generate(model, input_ids.to(device), attention_mask.to(device), max_new_tokens, is_sharded)
        for (number, length), tokens in zip(batch, written.tolist(), strict=True):
            whole = examples["input_ids"][[number]][0].tolist()
            lines.append(
                {
                    "row": int(examples["row"][[number]][0]),
                    "prompt": tokenizer.decode(whole[:length]),
                    "generated": tokenizer.decode([token for token in tokens if token >= 0]),
                    "reference": tokenizer.decode(whole[length:]),
                }
            )
    return lines


def _find_prompts(examples: Mapping[str, Any], most: int, max_tokens: int | None) -> Iterator[tuple[int, int]]:
    """Number and length of the prompt of the first examples that have one."""
    found = 0
    lengths = examples["prompt_length"]
    for number in range(len(lengths)):
        if found == most:
            return
        length = int(lengths[[number]][0])
        if 0 < length <= (max_tokens or length):
            found += 1
            yield number, length
