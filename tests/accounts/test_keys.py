"""Keys: found, compared, ended; and nothing in the file that a thief could use."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest

from deltaserve.errors import AuthenticationFailed, BadRequest, InvalidName, NameConflict, NotFound
from deltaserve.tenants import keys as keys_module
from deltaserve.tenants.accounts import Scope
from deltaserve.tenants.keys import Keys

if TYPE_CHECKING:
    from pathlib import Path

    from deltaserve.tenants.accounts import Accounts
    from deltaserve.tenants.registry import Registry


@pytest.fixture
def keys(registry: Registry, accounts: Accounts, clock: Any) -> Keys:
    return Keys(registry, accounts, "first", clock=clock)


def refused(keys: Keys, text: str | None) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        keys.authenticate(text)
    return caught.value.message


def test_a_server_that_never_had_a_key_is_open_and_gives_none(registry: Registry, accounts: Accounts) -> None:
    keys = Keys(registry, accounts, None)
    assert keys.is_open and keys.authenticate(None).is_admin and keys.authenticate("x").tenant == accounts.default
    with pytest.raises(BadRequest, match="--api-key"):
        keys.create(accounts.default, [Scope.ADMIN], "test")


def test_the_bootstrap_key_is_the_default_tenants_admin(keys: Keys, accounts: Accounts) -> None:
    caller = keys.authenticate("first")
    assert (caller.is_admin, caller.tenant, str(caller)) == (True, accounts.default, "default/bootstrap")


def test_a_tenant_has_several_keys_with_scopes_of_their_own(keys: Keys, accounts: Accounts) -> None:
    acme = accounts.create("acme", "test")
    asking, _ = keys.create(acme, [Scope.INFERENCE], "test", label="app")
    _, both = keys.create(acme, [Scope.INFERENCE, Scope.MANAGE], "test")
    caller = keys.authenticate(both)
    assert caller.tenant == acme and not caller.is_admin
    assert caller.may(Scope.MANAGE) and not caller.may(Scope.METRICS) and not caller.may()
    assert [key.label for key in keys.all(acme)].count("app") == 1 and asking.scopes == {Scope.INFERENCE}
    assert keys.all(accounts.default) == []


def test_a_key_survives_a_restart_and_a_server_that_had_one_is_never_open(
    keys: Keys, registry: Registry, accounts: Accounts, clock: Any
) -> None:
    key, text = keys.create(accounts.default, [Scope.ADMIN], "test")
    again = Keys(registry, accounts, None, clock=clock)
    assert not again.is_open and again.authenticate(text).key_id == key.id
    refused(again, "first")
    again.revoke(key, "test")
    last = Keys(registry, accounts, None, clock=clock)
    assert not last.is_open
    refused(last, text)


def test_a_revoked_key_is_refused_at_once_and_stays_listed(keys: Keys, accounts: Accounts) -> None:
    key, text = keys.create(accounts.default, [Scope.INFERENCE], "test")
    keys.authenticate(text)
    assert keys.revoke(key, "test").revoked is not None
    refused(keys, text)
    assert keys.revoke(keys.get(key.id), "test") == keys.get(key.id), "twice is once"
    with pytest.raises(BadRequest):
        keys.rotate(keys.get(key.id), "test")


def test_a_key_ends_when_it_expires(keys: Keys, accounts: Accounts, clock: Any) -> None:
    _, text = keys.create(accounts.default, [Scope.INFERENCE], "test", expires_in_s=60)
    clock.now += 59
    keys.authenticate(text)
    clock.now += 1
    refused(keys, text)


def test_rotation_gives_the_same_rights_and_the_old_key_a_last_while(
    keys: Keys, accounts: Accounts, clock: Any
) -> None:
    old, before = keys.create(accounts.default, [Scope.MANAGE], "test", label="ci", expires_in_s=1000)
    clock.now += 100
    new, after = keys.rotate(old, "test", grace_s=10)
    assert (new.scopes, new.label, new.expires) == (old.scopes, "ci", clock.now + 1000)
    keys.authenticate(before), keys.authenticate(after)
    clock.now += 10
    refused(keys, before)
    keys.authenticate(after)
    keys.rotate(new, "test")
    refused(keys, after)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: None,
        lambda text: "",
        lambda text: text[:-1],
        lambda text: text + "A",
        lambda text: text[:20] + secrets.token_urlsafe(32),
        lambda text: f"ds-{'0' * 16}-{text[20:]}",
        lambda text: text.upper(),
        lambda text: " " + text,
        lambda text: "ds-",
        lambda text: "\udcff" * 60,
        lambda text: "x" * 100_000,
    ],
)
def test_every_other_text_is_refused_with_the_same_words(keys: Keys, accounts: Accounts, spoil: Any) -> None:
    _, text = keys.create(accounts.default, [Scope.INFERENCE], "test")
    assert refused(keys, spoil(text)) == refused(keys, "nothing like it")


def test_secrets_are_nowhere_in_the_file_or_in_what_is_printed(
    keys: Keys, accounts: Accounts, registry: Registry, tmp_path: Path
) -> None:
    key, text = keys.create(accounts.default, [Scope.INFERENCE], "test")
    secret = text.rpartition(key.id)[2].strip("-")
    if registry.is_shared:
        stored = repr(registry.rows("SELECT * FROM keys")).encode()
    else:
        registry.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("registry*"))
    assert key.id.encode() in stored and secret.encode() not in stored and b"first" not in stored
    assert secret not in repr(key) and key.digest.hex() not in repr(key)


def test_every_comparison_is_made_whatever_was_given(
    keys: Keys, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No early end tells which part of a key was right: two comparisons of 32 bytes, always."""
    _, text = keys.create(accounts.default, [Scope.INFERENCE], "test")
    compared: list[tuple[int, int]] = []
    true = secrets.compare_digest

    def noting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return true(a, b)

    monkeypatch.setattr(keys_module.secrets, "compare_digest", noting)
    for given in ("first", text):
        keys.authenticate(given)
    for given in (None, "", text[:-1], "ds-0000000000000000-x", "firsu"):
        refused(keys, given)
    assert compared == [(32, 32)] * 14


def test_there_are_only_so_many_keys(keys: Keys, accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "MOST_KEYS", 2)
    first, _ = keys.create(accounts.default, [Scope.INFERENCE], "test")
    keys.create(accounts.default, [Scope.INFERENCE], "test")
    with pytest.raises(BadRequest, match="revoke one"):
        keys.create(accounts.default, [Scope.INFERENCE], "test")
    keys.revoke(first, "test")
    keys.create(accounts.default, [Scope.INFERENCE], "test")


def test_changes_are_in_the_log_with_who_made_them(keys: Keys, accounts: Accounts, registry: Registry) -> None:
    acme = accounts.create("acme", "default/bootstrap")
    key, _ = keys.create(acme, [Scope.INFERENCE], "default/bootstrap")
    new, _ = keys.rotate(key, "default/bootstrap")
    keys.revoke(new, "acme/x")
    entries = registry.audit_log()
    assert [entry.action for entry in entries] == [
        "key.revoke",
        "key.rotate",
        "key.create",
        "key.create",
        "tenant.create",
    ]
    assert (entries[0].who, entries[0].object) == ("acme/x", f"acme/{new.id}")


def test_a_deleted_tenant_takes_its_keys_along_and_its_name_is_not_given_again(keys: Keys, accounts: Accounts) -> None:
    acme = accounts.create("acme", "test")
    _, text = keys.create(acme, [Scope.INFERENCE], "test")
    accounts.delete(acme, "test")
    keys.reload()
    refused(keys, text)
    with pytest.raises(NotFound):
        accounts.named("acme")
    with pytest.raises(NameConflict):
        accounts.create("acme", "test")
    with pytest.raises(NameConflict):
        accounts.delete(accounts.default, "test")


@pytest.mark.parametrize("name", ["", "A", "a:b", "a/b", "a@1", ".a", "-", "ä", "x" * 64, "a b", "a\n"])
def test_a_tenants_name_can_be_part_of_a_models(accounts: Accounts, name: str) -> None:
    with pytest.raises(InvalidName):
        accounts.create(name, "test")
