"""Who sees which model, under which name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltaserve.errors import ModelNotFound, NotFound
from deltaserve.tenants.accounts import Caller, Scope
from deltaserve.tenants.models import Models, Reference

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
