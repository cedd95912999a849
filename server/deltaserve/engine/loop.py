"""The thread that owns the device: plan → run → apply → emit, for as long as there is work.

Requests come in through a bounded queue and are told of everything by events; each ends with exactly one event that has
a finish reason, whatever happens: an answer, a cancellation, an error, or the end of the server.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from deltaserve.engine.runner import ChunkResult, Runner
from deltaserve.engine.scheduler import Chunk, Scheduler
from deltaserve.engine.types import Event, FinishReason, Request, TokenLogprob
from deltaserve.errors import DeltaServeError, Draining, EngineFailure, NumericalError, QueueFull
from deltaserve.ids import RequestId
from deltaserve.metrics import Metrics

logger = logging.getLogger(__name__)
RETRY_S = 0.05  # between two plans where requests wait and nothing runs: a slot may have come free by time alone


class Engine:
    """Thread-safe: submit, cancel, wake, stop. Everything else happens on its own thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        metrics: Metrics,
        *,
        max_num_queued: int,
        max_num_queued_per_tenant: int | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._metrics = metrics
        self._max_num_queued = max_num_queued
        self._most_queued = max_num_queued if max_num_queued_per_tenant is None else max_num_queued_per_tenant
        self._work = threading.Condition()
        self._arrived: deque[Request] = deque()
        self._cancelled: set[RequestId] = set()
        self._live: Counter[str] = Counter()  # requests of each party that have not ended
        self._stopping = False
        self._changed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        with self._work:
            return max(self._live.total() - len(self._scheduler.running), 0)

    def submit(self, requests: Sequence[Request], max_queued: int | None = None) -> None:
        """All of them, which are of one party, or none. `max_queued`: a lower bound on what may wait of that party.
        Raises QueueFull, Draining."""
        most = self._most_queued if max_queued is None else min(max_queued, self._most_queued)
        with self._work:
            if self._stopping or not self._thread.is_alive():
                raise Draining("the server is shutting down")
            party, free = requests[0].party, self._scheduler.num_free_seats
            own = max(self._live[party] - self._scheduler.seats[party], 0)
            if own + len(requests) > most + free:
                self._metrics.rejections.inc()
                raise QueueFull(f"{own} of your requests are waiting and at most {most} of one tenant may")
            if self.num_waiting + len(requests) > self._max_num_queued + free:
                self._metrics.rejections.inc()
                raise QueueFull(f"{self.num_waiting} requests are waiting and at most {self._max_num_queued} may")
            self._live[party] += len(requests)
            self._arrived.extend(requests)
            self._notify()

    def cancel(self, request_id: RequestId) -> None:
        """The request ends as cancelled, if it has not ended yet."""
        with self._work:
            self._cancelled.add(request_id)
            self._notify()

    def wake(self) -> None:
        """Something outside changed that may let a waiting request run."""
        with self._work:
            self._notify()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends every request that is left with Draining, then the thread."""
        with self._work:
            self._stopping = True
            self._notify()
        self._thread.join(timeout_s)

    def _notify(self) -> None:
        self._changed = True
        self._work.notify()

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            logger.exception("the engine stops: a bug")
        finally:
            with self._work:
                self._stopping = True
            for request in [*self._scheduler, *self._arrived]:
                self._end(request, FinishReason.ERROR, error=Draining("the server is shutting down"))

    def _serve(self) -> None:
        stuck = False  # the last plan was empty: nothing to do until something changes
        while True:
            with self._work:
                while not (self._stopping or self._changed or (len(self._scheduler) and not stuck)):
                    stuck = self._work.wait(RETRY_S if len(self._scheduler) else None)
                self._changed = False
                if self._stopping:
                    break
                self._take_in()
            stuck = not self._step()

    def _take_in(self) -> None:
        while self._arrived:
            self._scheduler.add(self._arrived.popleft())
        if self._cancelled:
            for request in [r for r in self._scheduler if r.id in self._cancelled]:
                self._end(request, FinishReason.CANCELLED)
            self._cancelled.clear()

    def _step(self) -> bool:
        """One step; False if there was nothing that could run."""
        preempted = self._scheduler.num_preemptions
        chunks, failed = self._scheduler.plan()
        self._metrics.preemptions.inc(self._scheduler.num_preemptions - preempted)
        for request, error in failed:
            self._end(request, FinishReason.ERROR, error=error)
        if not chunks:
            return bool(failed)
        began = time.monotonic()
        results = self._compute(chunks)
        now = time.monotonic()
        done = [chunk for chunk, _ in results]
        self._observe(done, began, now)
        for chunk, result in results:
            try:
                self._apply(chunk, result, now)
            except DeltaServeError as error:
                self._end(chunk.request, FinishReason.ERROR, error=error)
            except Exception:
                logger.exception("request %s could not be continued", chunk.request.id)
                failure = EngineFailure("this request's tokens could not be turned into text")
                self._end(chunk.request, FinishReason.ERROR, error=failure)
        return True

    def _compute(self, chunks: Sequence[Chunk]) -> list[tuple[Chunk, ChunkResult]]:
        """The chunks that could be computed. Where all together fail, each is tried alone: whoever is at fault ends."""
        try:
            return list(zip(chunks, self._runner.run(chunks), strict=True))
        except Exception as error:
            logger.exception("a step of %d requests failed", len(chunks))
            is_lost = isinstance(error, torch.AcceleratorError)
            if len(chunks) == 1 or is_lost:
                for chunk in chunks:
                    failure = EngineFailure(f"the forward pass of this request failed: {type(error).__name__}")
                    self._end(chunk.request, FinishReason.ERROR, error=failure)
                if is_lost:
                    raise  # the device's context is gone: /health turns 503, and a supervisor starts the server anew
                return []
        return [pair for chunk in chunks for pair in self._compute([chunk])]

    def _apply(self, chunk: Chunk, result: ChunkResult, now: float) -> None:
        request, sampled = chunk.request, result.sampled
        if result.error is not None:
            raise result.error
        request.num_computed += chunk.num_tokens
        request.prompt_reports += result.prompt_logprobs
        if sampled is None:
            request.num_computed -= chunk.samples  # its grammar was not ready: the last token runs again
            return
        prompt: tuple[TokenLogprob, ...] = ()
        if request.params.prompt_logprobs and not request.num_generated:
            prompt = (TokenLogprob(request.prompt_ids[0], None), *request.prompt_reports)
        if not sampled.finite:
            failure = NumericalError("the model's logits are not finite for this request; its delta may be damaged")
            return self._end(request, FinishReason.ERROR, error=failure)
        if request.params.max_tokens == 0:
            return self._end(request, FinishReason.LENGTH, Event(prompt_logprobs=prompt))
        token = sampled.token_id
        request.tokens.append(token)
        for row, logprob in zip(request.rows, result.row_logprobs, strict=False):
            row.logprob += logprob
        self._observe_token(request, now)
        reports = (sampled.logprob,) if sampled.logprob else ()
        reason, stop_reason, text = self._judge(request, token)
        event = Event(text, (token,), reports, prompt, stop_reason=stop_reason)
        if reason is None:
            request.emit(event)
        else:
            self._end(request, reason, event)

    def _judge(self, request: Request, token: int) -> tuple[FinishReason | None, int | str | None, str]:
        """Does `token` end the answer? → (reason, what ended it, text that is certain now)"""
        p = request.params
        enough = request.num_generated >= p.min_tokens
        if token in request.eos_ids and not p.ignore_eos and enough:
            return FinishReason.STOP, None, request.sink.finish()
        if token in p.stop_token_ids and enough:
            return FinishReason.STOP, token, request.sink.finish()
        text, matched = request.sink.push(token, enough)
        if matched is not None:
            return FinishReason.STOP, matched, text
        if request.guide is not None and request.guide.advance(token):
            return FinishReason.STOP, None, text + request.sink.finish()
        if request.num_generated >= p.max_tokens:
            return FinishReason.LENGTH, None, text + request.sink.finish()
        return None, None, text

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        event: Event | None = None,
        *,
        error: DeltaServeError | None = None,
    ) -> None:
        """The one place where a request ends: resources back, one last event."""
        if request.finished:
            return
        request.finished = True
        self._scheduler.remove(request, sound=error is None)
        self._runner.generators.forget(request)
        with self._work:
            self._live[request.party] -= 1
            self._live += Counter()  # without those that have nothing left
        self._metrics.finished(reason.value)
        now = time.monotonic()
        self._metrics.e2e_latency.observe(now - request.arrival_s)
        self._metrics.request_prompt_tokens.observe(len(request.prompt_ids))
        self._metrics.request_max_tokens.observe(request.params.max_tokens)
        if request.first_scheduled_s is not None and request.first_token_s is not None:
            self._metrics.prefill_time.observe(request.first_token_s - request.first_scheduled_s)
            self._metrics.decode_time.observe(now - request.first_token_s)
            self._metrics.inference_time.observe(now - request.first_scheduled_s)
        self._metrics.request_generation_tokens.observe(request.num_generated)
        last = event or Event()
        try:
            request.emit(replace(last, finish_reason=reason, error=error, num_cached=request.num_cached or 0))
        except Exception:
            logger.exception("nobody hears the end of request %s", request.id)

    def _observe(self, chunks: Sequence[Chunk], began: float, now: float) -> None:
        self._metrics.step_seconds.observe(now - began)
        self._metrics.iteration_tokens.observe(sum(chunk.num_tokens for chunk in chunks))
        for chunk in chunks:
            request = chunk.request
            self._metrics.prompt_tokens.inc(max(min(chunk.num_tokens, len(request.prompt_ids) - chunk.start), 0))
            if request.first_scheduled_s is None:
                request.first_scheduled_s = began
                self._metrics.queue_time.observe(began - request.arrival_s)
                if self._scheduler.blocks.caching:
                    self._metrics.prefix_queries.inc(len(request.prompt_ids))
                    self._metrics.prefix_hits.inc(request.num_cached or 0)

    def _observe_token(self, request: Request, now: float) -> None:
        self._metrics.generation_tokens.inc()
        if request.last_token_s is None:
            request.first_token_s = now
            self._metrics.time_to_first_token.observe(now - request.arrival_s)
        else:
            self._metrics.inter_token_latency.observe(now - request.last_token_s)
        request.last_token_s = now
