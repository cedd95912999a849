"""However a sequence is cut into steps, its logits, its tokens and its prompt's log-probabilities are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.engine.runner import Runner, _together
from deltaserve.engine.scheduler import Chunk, StepPlan
from deltaserve.errors import ContextLengthExceeded

from ..isolation.rig import Rig, load, make_request

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.model.load import ServedModel

PROMPT = [5, 9, 200, 31, 77, 4, 4, 120, 250, 66, 13, 87, 5]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> ServedModel:
    return load(tiny_base, kv_slots=256)


@pytest.fixture(scope="module")
def reference(tiny_base: Path) -> torch.Tensor:
    """float32 [T, V]: logits of PROMPT by transformers."""
    whole = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = whole(torch.tensor([PROMPT])).logits[0]
    return logits


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 12, 13, 64])
def test_a_prompt_in_chunks_gives_the_logits_of_the_prompt_in_one(
    model: ServedModel, reference: torch.Tensor, budget: int
) -> None:
    rig = Rig.of(model, budget=budget)
    request = make_request(PROMPT, max_tokens=1)
    rig.run(request)
    assert rig.num_steps == -(-len(PROMPT) // budget)
    torch.testing.assert_close(rig.logits(request)[0], reference[-1], **CLOSE)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_the_block_size_changes_nothing(model: ServedModel, reference: torch.Tensor, block_size: int) -> None:
    rig = Rig.of(model, block_size=block_size, budget=7)
    request = make_request(PROMPT, max_tokens=1)
    rig.run(make_request(PROMPT[3:], max_tokens=3), request)
    torch.testing.assert_close(rig.logits(request)[0], reference[-1], **CLOSE)


@pytest.mark.parametrize("budget", [3, 64])
def test_a_preempted_request_goes_on_with_the_same_greedy_tokens(model: ServedModel, budget: int) -> None:
    alone = [Rig.of(model).run(make_request(PROMPT[: 3 + i], max_tokens=14))[0] for i in range(3)]
    rig = Rig.of(model, num_blocks=8, budget=budget)
    assert rig.run(*(make_request(PROMPT[: 3 + i], max_tokens=14) for i in range(3))) == alone
    assert rig.scheduler.num_preemptions > 0


def test_a_preempted_seeded_request_draws_the_same_tokens(model: ServedModel) -> None:
    def requests():  # type: ignore[no-untyped-def]
        return [make_request(PROMPT[: 3 + i], max_tokens=14, temperature=1.0, seed=i) for i in range(3)]

    alone = [Rig.of(model).run(request)[0] for request in requests()]
    rig = Rig.of(model, num_blocks=8)
    assert rig.run(*requests()) == alone
    assert rig.scheduler.num_preemptions > 0


def test_a_request_that_outgrows_the_whole_cache_fails_and_the_one_behind_it_runs(model: ServedModel) -> None:
    rig = Rig.of(model, num_blocks=4)
    large, small = make_request(PROMPT, max_tokens=10), make_request(PROMPT[:5], max_tokens=3)
    rig.run(large, small)
    assert isinstance(rig.errors[large.id], ContextLengthExceeded)
    assert len(rig.answer(large)) == 4 * 4 - len(PROMPT) + 1
    assert len(rig.answer(small)) == 3


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 64])
def test_prompt_logprobs_tell_of_each_token_once_across_chunks(
    model: ServedModel, reference: torch.Tensor, budget: int
) -> None:
    rig = Rig.of(model, budget=budget)
    request = make_request(PROMPT, max_tokens=2, prompt_logprobs=True, logprobs=3)
    rig.run(request)
    assert [report.token_id for report in request.prompt_reports] == PROMPT[1:]
    expected = reference.log_softmax(-1)
    for place, report in enumerate(request.prompt_reports):
        row = expected[place]
        assert report.logprob == pytest.approx(float(row[PROMPT[place + 1]]), abs=1e-4)
        assert [token for token, _ in report.top] == row.topk(3).indices.tolist()
        assert [value for _, value in report.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_prompt_logprobs_of_a_request_preempted_while_it_is_read_come_once(model: ServedModel) -> None:
    rig = Rig.of(model, num_blocks=8, budget=5)
    first, second = make_request(PROMPT, max_tokens=9), make_request(PROMPT, max_tokens=1, prompt_logprobs=True)
    rig.scheduler.add(first)
    rig.scheduler.add(second)
    while second.num_computed < 6:
        rig.step()
    rig.scheduler._preempt(StepPlan(0, 0), second)
    rig.run()
    assert [report.token_id for report in second.prompt_reports] == PROMPT[1:]


def test_running_a_step_moves_no_request(model: ServedModel) -> None:
    runner, request = Runner(model, [], 4), make_request(PROMPT)
    request.blocks = [3, 1, 0, 2]
    results = runner.run([Chunk(request, 0, len(PROMPT))])
    assert (request.num_computed, request.tokens, request.blocks) == (0, PROMPT, [3, 1, 0, 2])
    assert results[0].sampled is not None
    assert results[0].sampled.logprob is None


def test_reading_part_of_a_prompt_samples_nothing(model: ServedModel) -> None:
    request = make_request(PROMPT)
    request.blocks = [0, 1, 2, 3]
    other = make_request(PROMPT[:3])
    other.blocks = [5]
    part, whole = Runner(model, [], 4).run([Chunk(request, 0, 6), Chunk(other, 0, 3)])
    assert part.sampled is None
    assert whole.sampled is not None


def test_rows_of_one_tensor_are_sampled_without_a_copy() -> None:
    logits = torch.arange(50.0).view(5, 10)[:, :7]
    for picked in (range(5), range(1, 4), [3], range(0, 5, 2), [2, 0], [0, 1, 4], [1, 1]):
        rows = [logits[row] for row in picked]
        together = _together(rows)
        assert torch.equal(together, torch.stack(rows))
        is_view = together.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        assert is_view == isinstance(picked, range) or len(rows) == 1
    assert torch.equal(_together([logits[0], torch.zeros(7)]), torch.stack([logits[0], torch.zeros(7)]))
