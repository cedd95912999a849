"""Rows of jobs: whose turn it is, what a second request is, and who may still say something of a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import BadRequest, FileInUse, JobClosed, NotFound, RateLimited
from deltaserve.tenants.accounts import Accounts, Caller, Scope, Tenant
from deltaserve.tenants.files import StagedFiles
from deltaserve.tenants.jobs import (
    KEPT_S,
    MAX_ATTEMPTS,
    MAX_EVENTS,
    MAX_OPEN,
    SILENT_S,
    Asked,
    Job,
    Jobs,
    JobStatus,
    Superseded,
)
from deltaserve.tenants.sqlite import SqliteRegistry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Desk:
    """A registry with two tenants and a clock that stands still."""

    def __init__(self, root: Path) -> None:
        self.registry = SqliteRegistry(root)
        self.now = 1_700_000_000
        accounts = Accounts(self.registry)
        self.acme, self.globex = (accounts.create(name, "test") for name in ("acme", "globex"))
        self.accounts = accounts
        self.jobs = Jobs(self.registry, lambda: self.now)
        self.files = StagedFiles(self.registry, 100, lambda: self.now)

    def add(self, owner: Tenant, name: str = "m", key: str | None = None, **recipe: Any) -> Job:
        return self.jobs.add(owner, "test", Asked(name, ["file-1"], {}, recipe, True), key)

    def claim(self) -> Job:
        job = self.jobs.claim()
        assert job is not None
        self.now += 1
        return job

    def caller(self, tenant: Tenant, *scopes: Scope) -> Caller:
        return Caller(tenant, "k", frozenset(scopes))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.registry.close()


def test_tenants_take_turns_however_many_jobs_one_has(desk: Desk) -> None:
    for number in range(3):
        desk.add(desk.acme, f"a{number}")
    desk.add(desk.globex, "g0")
    desk.add(desk.globex, "g1")
    order = []
    while job := desk.jobs.claim():
        order.append(job.name)
        desk.now += 1
        desk.jobs.close(job, JobStatus.SUCCEEDED)
    assert order == ["a0", "g0", "a1", "g1", "a2"]


def test_with_several_at_once_the_tenant_with_fewer_running_is_next(desk: Desk) -> None:
    for number in range(2):
        desk.add(desk.acme, f"a{number}")
    first = desk.claim()
    desk.add(desk.globex, "g0")
    assert [first.name, desk.claim().name, desk.claim().name] == ["a0", "g0", "a1"]
    assert desk.jobs.claim() is None
    assert desk.jobs.counts() == {"queued": 0, "running": 3}


def test_the_same_request_is_the_same_job_until_that_has_failed(desk: Desk) -> None:
    job = desk.add(desk.acme, bits=1.0)
    assert desk.add(desk.acme, bits=1.0).id == job.id
    assert len({job.id, desk.add(desk.acme, bits=2.0).id, desk.add(desk.globex, bits=1.0).id}) == 3
    running = desk.claim()
    assert running.id == job.id
    desk.jobs.close(running, JobStatus.SUCCEEDED, result={"version": 1})
    assert desk.add(desk.acme, bits=1.0).id == job.id
    other = desk.add(desk.acme, bits=2.0)
    desk.jobs.cancel(other, "test")
    assert desk.add(desk.acme, bits=2.0).id != other.id


def test_a_key_is_one_request_for_ever(desk: Desk) -> None:
    job = desk.add(desk.acme, key="k")
    desk.jobs.cancel(job, "test")
    assert desk.add(desk.acme, key="k").status is JobStatus.CANCELLED
    with pytest.raises(BadRequest):
        desk.add(desk.acme, "other", key="k")
    assert desk.add(desk.globex, "other", key="k").id != job.id, "another tenant's keys are others"


def test_who_was_taken_for_dead_changes_nothing_any_more(desk: Desk) -> None:
    desk.add(desk.acme)
    first = desk.claim()
    desk.jobs.beat(first, {"fraction": 0.5})
    desk.now += SILENT_S - 1
    desk.jobs.take_back()
    assert desk.jobs.again(first).status is JobStatus.RUNNING
    desk.now += 1
    desk.jobs.take_back()
    second = desk.claim()
    assert (second.id, second.attempts, second.progress) == (first.id, 2, None)
    for late in (
        lambda: desk.jobs.beat(first, None),
        lambda: desk.jobs.close(first, JobStatus.SUCCEEDED, result={"version": 9}),
    ):
        with pytest.raises(Superseded):
            late()
    desk.jobs.put_back(first)
    assert desk.jobs.again(second).status is JobStatus.RUNNING
    desk.jobs.close(second, JobStatus.SUCCEEDED, result={"version": 1})
    assert desk.jobs.again(second).result == {"version": 1}


def test_a_job_that_takes_its_server_along_is_not_tried_for_ever(desk: Desk) -> None:
    job = desk.add(desk.acme)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert desk.claim().attempts == attempt
        failed = desk.jobs.take_back(0)
    assert [gone.id for gone in failed] == [job.id]
    ended = desk.jobs.again(job)
    assert ended.status is JobStatus.FAILED and ended.error is not None
    assert "stopped 3 times" in ended.error["message"]
    assert desk.jobs.claim() is None


def test_a_stop_does_not_count_as_an_attempt(desk: Desk) -> None:
    desk.add(desk.acme)
    for _ in range(MAX_ATTEMPTS + 1):
        job = desk.claim()
        assert job.attempts == 1
        desk.jobs.put_back(job)


def test_an_end_is_final_and_a_cancel_may_come_twice(desk: Desk) -> None:
    desk.add(desk.acme)
    job = desk.claim()
    assert [desk.jobs.cancel(job, "test").status for _ in range(2)] == [JobStatus.CANCELLED] * 2
    with pytest.raises(Superseded):
        desk.jobs.close(job, JobStatus.SUCCEEDED, result={"version": 1})
    desk.add(desk.acme, "n")
    job = desk.claim()
    desk.jobs.close(job, JobStatus.FAILED, error={"code": "x", "message": "y"})
    with pytest.raises(JobClosed):
        desk.jobs.cancel(job, "test")


def test_another_tenants_job_and_file_are_none(desk: Desk) -> None:
    job = desk.add(desk.acme)
    file = desk.files.new(desk.acme, "config.json", "user_data", 3, "0" * 64)
    desk.files.add(file, desk.acme)
    stranger, admin = desk.caller(desk.globex, Scope.MANAGE), desk.caller(desk.globex, Scope.ADMIN)
    for find, theirs in ((desk.jobs.find, job.id), (desk.files.find, file.id)):
        words = []
        for asked in (theirs, "none"):
            with pytest.raises(NotFound) as caught:
                find(stranger, asked)
            words.append(caught.value.message.replace(asked, "…"))
        assert words[0] == words[1]
        assert find(admin, theirs).id == theirs  # type: ignore[operator]
    assert desk.jobs.visible(stranger, None, 10) == [] and desk.files.of(desk.globex) == []
    assert [found.id for found in desk.jobs.visible(admin, None, 10)] == [job.id]


def test_pages_go_on_after_a_job(desk: Desk) -> None:
    added = [desk.add(desk.acme, f"m{number}").id for number in range(5)]
    caller, found, after = desk.caller(desk.acme), [], None
    while page := desk.jobs.visible(caller, after, 2):
        found += [job.id for job in page]
        after = page[-1]
    assert found == added[::-1]


def test_a_file_that_a_job_is_to_read_stays(desk: Desk) -> None:
    file = desk.files.new(desk.acme, "config.json", "user_data", 3, "0" * 64)
    desk.files.add(file, desk.acme)
    desk.jobs.add(desk.acme, "test", Asked("m", [file.id], {}, {}, True), None)
    desk.now += 200
    assert desk.files.expired() == []
    with pytest.raises(FileInUse):
        desk.files.remove(file)
    desk.jobs.close(desk.claim(), JobStatus.FAILED, error={"code": "x", "message": "y"})
    assert desk.files.expired() == [file]
    desk.files.renew([file])
    assert desk.files.expired() == []
    desk.files.remove(desk.files.find(desk.caller(desk.acme), file.id))
    with pytest.raises(NotFound):
        desk.files.find(desk.caller(desk.acme), file.id)


def test_bounds(desk: Desk) -> None:
    job = desk.add(desk.acme, "first")
    for number in range(MAX_EVENTS + 9):
        desk.jobs.log(job, "info", f"{number}" * 9000)
    events = desk.jobs.events(job)
    assert len(events) == MAX_EVENTS and max(len(event.message) for event in events) <= 4000
    for number in range(MAX_OPEN - 1):
        desk.add(desk.acme, f"m{number}")
    with pytest.raises(RateLimited):
        desk.add(desk.acme, "more")
    desk.add(desk.globex, "theirs")
    desk.jobs.cancel(job, "test")
    desk.add(desk.acme, "more")
    desk.now += KEPT_S + 1
    desk.jobs.forget_old()
    with pytest.raises(NotFound):
        desk.jobs.find(desk.caller(desk.acme), job.id)
    assert desk.registry.rows("SELECT COUNT(*) FROM job_events WHERE job = ?", job.id) == [(0,)]
