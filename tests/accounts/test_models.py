"""Who sees which model, under which name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import ModelNotFound, NotFound, PermissionDenied, PreconditionFailed, VersionInUse
from deltaserve.tenants.accounts import Caller, Scope
from deltaserve.tenants.models import Canary, Change, Condition, Model, Models, Reference

if TYPE_CHECKING:
    from deltaserve.tenants.accounts import Accounts
    from deltaserve.tenants.registry import Registry


class Town:
    """Two tenants and an admin, each with a model `m`."""

    def __init__(self, registry: Registry, accounts: Accounts) -> None:
        self.models = Models(registry)
        self.a = Caller(accounts.create("a", "test"), "ka", frozenset({Scope.INFERENCE, Scope.MANAGE}))
        self.b = Caller(accounts.create("b", "test"), "kb", frozenset({Scope.INFERENCE, Scope.MANAGE}))
        self.admin = Caller(accounts.default, "k", frozenset({Scope.ADMIN}))
        for caller in (self.a, self.b, self.admin):
            self.add(caller, "m", f"{caller.tenant.name}1")

    def add(self, caller: Caller, name: str, digest: str) -> int:
        number = self.models.add(caller.tenant.id, name, digest, 1, {}).number
        model = self.models.own(caller.tenant.id, name)
        assert model is not None
        self.models.point(model, number)
        return number

    def change(self, caller: Caller, called: str, **change: Any) -> Model:
        return self.models.change(self.models.owned(caller, called)[0], Change(**change))

    def digest(self, caller: Caller, called: str) -> str:
        model, version = self.models.find(caller, called)
        return (version or model.active).digest

    def ids(self, caller: Caller) -> list[str]:
        return [model.called_by(caller) for model in self.models.visible(caller)]


@pytest.fixture
def town(registry: Registry, accounts: Accounts) -> Town:
    return Town(registry, accounts)


def test_two_tenants_may_have_models_of_the_same_name(town: Town) -> None:
    assert (town.digest(town.a, "m"), town.digest(town.b, "m"), town.digest(town.admin, "m")) == (
        "a1",
        "b1",
        "default1",
    )


def test_a_version_can_be_named(town: Town) -> None:
    assert town.add(town.a, "m", "a2") == 2
    assert (town.digest(town.a, "m"), town.digest(town.a, "m@1"), town.digest(town.a, "a:m@1")) == ("a2", "a1", "a1")


def test_another_tenants_model_is_missed_like_one_that_never_was(town: Town) -> None:
    def miss(called: str) -> str:
        with pytest.raises(ModelNotFound) as caught:
            town.models.find(town.a, called)
        return caught.value.message.replace(f"`{called}`", "…")

    assert (
        len({miss(called) for called in ("b:m", "b:m@1", "b:x", "x:m", "default:m", "m@2", "n", "b:m:m", "M@0")}) == 1
    )
    assert town.ids(town.a) == ["m"]


def test_an_admin_sees_all_and_names_them_by_tenant(town: Town) -> None:
    assert town.ids(town.admin) == ["m", "a:m", "b:m"]
    assert (town.digest(town.admin, "a:m"), town.digest(town.admin, "b:m@1")) == ("a1", "b1")


@pytest.mark.parametrize(
    "text",
    ["", ":m", "a:", "a:b:m", "m@", "m@0", "m@01", "m@-1", "m@1@1", "m@9999999999", "a m", "m\n", "../m", "x" * 129],
)
def test_what_is_no_reference_is_no_model(text: str) -> None:
    with pytest.raises(ModelNotFound):
        Reference.parse(text)


def test_an_upload_for_a_deleted_tenant_is_refused(town: Town, accounts: Accounts) -> None:
    gone = accounts.create("gone", "test")
    accounts.delete(gone, "test")
    with pytest.raises(NotFound):
        town.models.add(gone.id, "m", "d", 1, {})


def test_owned_is_found_for_a_change_by_its_owner_and_by_admins(town: Town) -> None:
    assert town.models.owned(town.admin, "a:m")[0].owner == town.models.owned(town.a, "m")[0].owner == "a"
    with pytest.raises(ModelNotFound):
        town.models.owned(town.b, "a:m")


def test_a_shared_model_is_seen_under_its_owners_name_and_changed_by_its_owner_alone(town: Town) -> None:
    town.change(town.a, "m", shared_with=[town.b.tenant, town.a.tenant])
    assert (town.ids(town.b), town.ids(town.a)) == (["m", "a:m"], ["m"])
    assert (town.digest(town.b, "a:m"), town.digest(town.b, "m")) == ("a1", "b1"), "one's own name stays one's own"
    with pytest.raises(PermissionDenied):
        town.models.owned(town.b, "a:m")
    town.change(town.a, "m", shared_with=[])
    assert town.ids(town.b) == ["m"]
    with pytest.raises(ModelNotFound):
        town.models.find(town.b, "a:m")


def test_a_deleted_tenant_shares_nothing(town: Town, accounts: Accounts) -> None:
    town.change(town.a, "m", shared_with=[town.b.tenant])
    town.models.forget(town.models.owned(town.b, "m")[0])
    accounts.delete(town.b.tenant, "test")
    assert town.models.owned(town.a, "m")[0].shared_with == ()


def test_a_name_is_moved_between_versions(town: Town) -> None:
    town.add(town.a, "m", "a2")
    assert town.change(town.a, "m", version=1).active.digest == "a1"
    assert town.digest(town.a, "m") == "a1" and town.digest(town.a, "m@2") == "a2"
    with pytest.raises(ModelNotFound):
        town.change(town.a, "m", version=3)


def test_a_canary_gets_its_share_and_the_same_draw_the_same_side(town: Town) -> None:
    town.models.add(town.a.tenant.id, "m", "a2", 1, {})
    model = town.change(town.a, "m", canary=Canary(2, 20))
    answers = [town.models.chosen(model, str(draw)).digest for draw in range(2000)]
    assert 320 < answers.count("a2") < 480, "four standard deviations around 400"
    assert answers == [town.models.chosen(model, str(draw)).digest for draw in range(2000)]
    full = town.change(town.a, "m", canary=Canary(2, 100))
    assert {town.models.chosen(full, str(draw)).digest for draw in range(50)} == {"a2"}
    promoted = town.change(town.a, "m", version=2)
    assert promoted.canary is None and town.models.chosen(promoted, "0").digest == "a2"
    town.change(town.a, "m", canary=Canary(1, 50))
    assert town.change(town.a, "m", canary=Canary(1, 0)).canary is None


def test_the_newest_versions_stay_and_those_that_are_pointed_to(town: Town) -> None:
    for number in range(2, 7):
        town.models.add(town.a.tenant.id, "m", f"a{number}", 1, {})
    model = town.change(town.a, "m", canary=Canary(3, 10))
    assert town.models.prune(model, 2) == ["a4", "a2"]
    assert [version.number for version in town.models.versions(model)] == [6, 5, 3, 1]
    with pytest.raises(VersionInUse):
        town.models.drop(model, town.models.version(model, 3))
    town.models.drop(model, town.models.version(model, 5))
    assert [version.number for version in town.models.versions(model)] == [6, 3, 1]


def test_every_change_has_an_etag_of_its_own_and_conditions_hold_or_fail(town: Town) -> None:
    model = town.models.owned(town.a, "m")[0]
    changed = town.change(town.a, "m", pinned=True)
    assert changed.pinned and changed.etag != model.etag and town.models.pinned() == ["a1"]
    for condition in (
        Condition(changed.etag),
        Condition("*"),
        Condition(f'"x", {changed.etag}'),
        Condition(None, '"x"'),
    ):
        condition.check(changed)
    Condition(None, "*").check(None)
    for condition, found in (
        (Condition(model.etag), changed),
        (Condition("*"), None),
        (Condition(None, "*"), changed),
        (Condition(None, changed.etag), changed),
    ):
        with pytest.raises(PreconditionFailed):
            condition.check(found)
