"""Every sampling parameter has the effect it promises."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    Ask = Callable[..., Any]

PROMPT = "Many fine-tunes of one base"


@pytest.mark.parametrize(
    "narrowed", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=lambda p: next(iter(p))
)
def test_a_distribution_narrowed_to_its_peak_is_greedy(narrowed: dict[str, Any], answer: Ask) -> None:
    assert answer(**{"temperature": 2, "seed": 5, **narrowed}) == answer()
    assert answer(temperature=2, seed=5) != answer()


def test_temperature_flattens_the_distribution(complete: Ask) -> None:
    def distinct(temperature: float) -> int:
        reply = complete(temperature=temperature, n=64, seed=1, max_tokens=1)
        return len({choice.text for choice in reply.choices})

    assert distinct(0.1) < distinct(0.7) < distinct(2)


def test_a_seed_repeats_its_answer_and_another_gives_another(answer: Ask) -> None:
    assert answer(temperature=1, seed=3) == answer(temperature=1, seed=3)
    assert len({answer(temperature=1, seed=seed) for seed in range(4)}) == 4
    assert len({answer(temperature=1) for _ in range(4)}) == 4, "without a seed every answer is drawn anew"


def test_a_seeded_answer_does_not_depend_on_the_crowd(tenants: dict[str, Any], answer: Ask, at_once: Ask) -> None:
    wanted = {"temperature": 1.2, "seed": 11, "max_tokens": 32}
    alone = {name: answer(name, **wanted) for name in tenants}

    def noise(index: int) -> Any:
        name = list(tenants)[index % len(tenants)]
        prompt = "noise " * (1 + index)
        return lambda: answer(name, prompt=prompt, temperature=2, max_tokens=20 + index, ignore_eos=True)

    crowd = [noise(index) for index in range(11)]
    seeded = [lambda name=name: answer(name, **wanted) for name in tenants]
    together = at_once([*crowd[:6], *seeded, *crowd[6:]])[6 : 6 + len(seeded)]

    assert dict(zip(tenants, together, strict=True)) == alone


def test_choices_of_a_seeded_request_are_distinct_and_repeatable(complete: Ask, answer: Ask) -> None:
    def choices() -> list[str]:
        reply = complete("sign", temperature=1, seed=7, n=3)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        return [choice.text for choice in reply.choices]

    first = choices()
    assert len(set(first)) == 3
    assert choices() == first
    assert [answer("sign", temperature=1, seed=7 + index) for index in range(3)] == first


def test_choices_of_a_batch_are_ordered_by_prompt(complete: Ask) -> None:
    reply = complete(prompt=["one", "two"], n=2, max_tokens=4)
    texts = [choice.text for choice in reply.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert reply.usage.completion_tokens == 16


def test_logit_bias_forces_and_forbids(tenants: dict[str, Any], answer: Ask) -> None:
    tokenizer = tenants["tiny"].tokenizer
    token = tokenizer.convert_tokens_to_ids("q")
    assert answer(temperature=1, max_tokens=5, logit_bias={token: 100}) == "qqqqq"

    first = tenants["tiny"].greedy(tenants["tiny"].encode(PROMPT), 1)[1][0]
    runner_up = tenants["tiny"].logits(tenants["tiny"].encode(PROMPT))[-1].topk(2).indices[1].item()
    assert answer(max_tokens=1) == tokenizer.decode([first])
    assert answer(max_tokens=1, logit_bias={first: -100}) == tokenizer.decode([runner_up])


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 1.8), ("presence_penalty", 2.0), ("frequency_penalty", 1.5), ("frequency_penalty", -2.0)],
)
def test_penalties_are_those_of_their_formulas(name: str, value: float, tenants: dict[str, Any], answer: Ask) -> None:
    tenant = tenants["sign"]
    prompt = tenant.encode(PROMPT)
    ids = list(prompt)
    for _ in range(24):
        row = tenant.logits(ids)[-1]
        counts = Counter(ids[len(prompt) :])
        for token in set(ids) if name == "repetition_penalty" else counts:
            if name == "repetition_penalty":
                row[token] = row[token] / value if row[token] > 0 else row[token] * value
            else:
                row[token] -= value * (counts[token] if name == "frequency_penalty" else 1)
        ids.append(int(row.argmax()))

    given = answer("sign", max_tokens=24, ignore_eos=True, **{name: value})
    assert given == tenant.text(prompt, ids[len(prompt) :])
    assert given != answer("sign", max_tokens=24, ignore_eos=True)


def test_the_end_token_ends_the_answer_unless_it_is_ignored(tenants: dict[str, Any], complete: Ask) -> None:
    eos = {tenants["tiny"].tokenizer.eos_token_id: 100}
    ended = complete(logit_bias=eos, max_tokens=5)
    assert (ended.choices[0].finish_reason, ended.choices[0].text, ended.usage.completion_tokens) == ("stop", "", 1)

    ignored = complete(logit_bias=eos, max_tokens=5, ignore_eos=True)
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 5)


def test_min_tokens_come_before_any_end(tenants: dict[str, Any], complete: Ask) -> None:
    eos = {tenants["tiny"].tokenizer.eos_token_id: 100}
    reply = complete(logit_bias=eos, max_tokens=10, min_tokens=5)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("stop", 6)


def test_min_tokens_hold_back_stop_strings_too(tenants: dict[str, Any], complete: Ask) -> None:
    token = tenants["tiny"].tokenizer.convert_tokens_to_ids("q")
    reply = complete(logit_bias={token: 100}, stop="q", max_tokens=10, min_tokens=4)
    assert (reply.choices[0].finish_reason, reply.choices[0].text) == ("stop", "qqq")


def test_a_stop_token_ends_the_answer_and_is_named(tenants: dict[str, Any], complete: Ask) -> None:
    ids = tenants["tiny"].greedy(tenants["tiny"].encode(PROMPT), 16)[1]
    stop = next(token for place, token in enumerate(ids) if place > 2 and token not in ids[:place])
    choice = complete(stop_token_ids=[stop]).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    before = ids[: ids.index(stop)]
    assert choice.text.rstrip("\ufffd") == tenants["tiny"].text(tenants["tiny"].encode(PROMPT), before).rstrip("\ufffd")


def _spanning_stop(tokens: list[str]) -> str:
    """A string that begins in one token and ends in the next, not before the fourth."""
    text = "".join(tokens)
    for left, right in zip(tokens[4:], tokens[5:], strict=False):
        stop = left[-1] + right[0]
        if text.index(stop) > 3:
            return stop
    raise AssertionError(f"no stop string in {tokens}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_across_tokens_ends_the_answer_and_never_shows(
    stream: bool, ascii_bias: dict[str, int], complete: Ask
) -> None:
    full = complete("sign", max_tokens=32, logit_bias=ascii_bias, logprobs=0).choices[0]
    stop = _spanning_stop(full.logprobs.tokens)
    expected = full.text[: full.text.index(stop)]

    reply = complete("sign", max_tokens=32, logit_bias=ascii_bias, stop=["never occurs", stop], stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]

    assert "".join(choice.text for choice in choices) == expected
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_text_held_back_for_a_stop_string_comes_in_the_end(ascii_bias: dict[str, int], complete: Ask) -> None:
    full = complete(max_tokens=12, logit_bias=ascii_bias).choices[0].text
    chunks = list(complete(max_tokens=12, logit_bias=ascii_bias, stop=full[-4:] + "§", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == full
    assert chunks[-1].choices[0].finish_reason == "length"


def test_special_tokens_are_skipped_unless_they_are_asked_for(tenants: dict[str, Any], answer: Ask) -> None:
    tool = tenants["chatty"].tokenizer.convert_tokens_to_ids("<|tool|>")
    forced = {"logit_bias": {tool: 100}, "max_tokens": 3}
    assert answer("chatty", **forced) == ""
    assert answer("chatty", **forced, skip_special_tokens=False) == "<|tool|>" * 3


def test_a_tenants_added_token_is_its_own(tenants: dict[str, Any], complete: Ask) -> None:
    end = tenants["chatty"].tokenizer.convert_tokens_to_ids("<|end_of_turn|>")
    assert complete("chatty", logit_bias={end: 100}).choices[0].finish_reason == "stop"
    assert complete("chatty", prompt=[5, end, 9]).usage.prompt_tokens == 3
    assert complete("chatty", prompt="a<|tool|>b").usage.prompt_tokens == 3
    with pytest.raises(Exception, match=f"'{end}' is no token id below {end - 1}"):
        complete("sign", logit_bias={end: 100})
    with pytest.raises(Exception, match=f"token id {end} is not below {end - 1}"):
        complete("tiny", prompt=[5, end, 9])


def test_a_silent_request_follows_the_tenants_generation_defaults(client: Any, answer: Ask) -> None:
    silent = client.completions.create(model="lowrank", prompt=PROMPT)
    assert silent.usage.completion_tokens == 7
    assert silent.choices[0].text == answer("lowrank", max_tokens=7)
    assert client.completions.create(model="lowrank", prompt=PROMPT, extra_body={"top_k": 0}, seed=1).choices[
        0
    ].text != (silent.choices[0].text)
    messages = [{"role": "user", "content": "Hello"}]
    assert client.chat.completions.create(model="lowrank", messages=messages).usage.completion_tokens == 7


def test_max_completion_tokens_limits_a_chat(client: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    reply = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=4, extra_body={"ignore_eos": True}
    )
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (4, "length")
