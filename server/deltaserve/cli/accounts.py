"""deltaserve tenant …, key …, usage, audit: a server's accounts, through its admin API and with an admin key."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from deltaserve.cli.arguments import whole
from deltaserve.cli.connection import client_of, connection_arguments, reports_errors
from deltaserve.cli.console import plain_table, write, write_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Command = Callable[[argparse.Namespace], int]

SCOPES = ("inference", "manage", "metrics", "admin")
LIMITS = {
    "requests_per_minute": "requests for an answer",
    "tokens_per_minute": "tokens, of prompts and answers",
    "max_concurrent": "sequences that wait or run at once",
    "max_tokens": "tokens of one answer",
    "max_bytes": "bytes of models, and of files for jobs",
    "max_models": "models, whatever their versions",
    "max_queued": "sequences that wait for a seat",
    "max_resident_bytes": "bytes of models in use at once or pinned, on the device",
}
SCOPES_TEXT = (
    "inference: ask models; manage: upload, change, delete; metrics: read /metrics; admin: all of it, for every "
    "tenant. May be repeated (default: inference)"
)
DAY_S = 86400


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    common = connection_arguments()

    def group(name: str, text: str) -> Callable[[str, str, Command], argparse.ArgumentParser]:
        parser = subparsers.add_parser(name, help=text, description=f"{text}; needs an admin key.")
        actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

        def action(word: str, help_text: str, run: Command) -> argparse.ArgumentParser:
            made = actions.add_parser(word, parents=[common], help=help_text)
            made.set_defaults(run=run)
            return made

        return action

    tenant = group("tenant", "the accounts of a server")
    for word, text, run in (
        ("create", "a new tenant", create_tenant),
        ("limit", "change what it may use; `none` lifts a bound", limit_tenant),
    ):
        parser = tenant(word, text, run)
        parser.add_argument("name", metavar="NAME")
        for limit, what in LIMITS.items():
            flag = f"--{limit.replace('_', '-')}"
            parser.add_argument(flag, type=_bound, default=argparse.SUPPRESS, metavar="N", help=what)
    tenant("list", "all tenants", list_tenants).add_argument("--json", action="store_true")
    tenant("delete", "a tenant with its keys and models", delete_tenant).add_argument("name", metavar="NAME")

    key = group("key", "the keys of tenants")
    parser = key("create", "a new key; it is printed this once", create_key)
    parser.add_argument("tenant", metavar="TENANT")
    parser.add_argument("--scope", action="append", choices=SCOPES, help=SCOPES_TEXT)
    parser.add_argument("--label", default="", help="what it is for")
    parser.add_argument("--expires-in-days", type=whole(1, 3651), metavar="N", help="(default: never)")
    parser = key("list", "all keys, without their secrets", list_keys)
    parser.add_argument("tenant", metavar="TENANT", nargs="?")
    parser.add_argument("--json", action="store_true")
    parser = key("rotate", "a new key in the place of one; it is printed this once", rotate_key)
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--grace-s", type=whole(0, 30 * DAY_S + 1), default=0, help="how long the old one still works")
    key("revoke", "refuse a key from now on", revoke_key).add_argument("id", metavar="ID")

    parser = subparsers.add_parser("usage", parents=[common], help="requests and tokens by day, tenant and model")
    parser.add_argument("tenant", metavar="TENANT", nargs="?", help="one alone (default: all)")
    parser.add_argument("--since", metavar="YYYY-MM-DD", help="the first day")
    parser.add_argument("--until", metavar="YYYY-MM-DD", help="the last day")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=usage)

    parser = subparsers.add_parser("audit", parents=[common], help="who changed what, newest first, as JSON lines")
    parser.add_argument("--limit", type=whole(1, 1001), default=100)
    parser.set_defaults(run=audit)


@reports_errors
def create_tenant(args: argparse.Namespace) -> None:
    _ask(args, "POST", "tenants", {"name": args.name, "limits": _limits(args)})
    write(f"created {args.name}\nnext: deltaserve key create {args.name} --scope inference --scope manage\n")


@reports_errors
def limit_tenant(args: argparse.Namespace) -> None:
    changed = _ask(args, "PATCH", f"tenants/{quote(args.name, safe='')}", {"limits": _limits(args)})
    write(f"{args.name}: {_cell('limits', changed['limits']) or 'no limits'}\n")


@reports_errors
def list_tenants(args: argparse.Namespace) -> None:
    _show(args, _ask(args, "GET", "tenants")["data"], ("id", "models", "bytes", "created", "limits"))


@reports_errors
def delete_tenant(args: argparse.Namespace) -> None:
    _ask(args, "DELETE", f"tenants/{quote(args.name, safe='')}")
    write(f"deleted {args.name}\n")


@reports_errors
def create_key(args: argparse.Namespace) -> None:
    body = {"tenant": args.tenant, "scopes": args.scope or ["inference"], "label": args.label}
    if args.expires_in_days is not None:
        body["expires_in_s"] = args.expires_in_days * DAY_S
    write(_ask(args, "POST", "keys", body)["key"] + "\n")


@reports_errors
def list_keys(args: argparse.Namespace) -> None:
    params = {"tenant": args.tenant} if args.tenant is not None else {}
    keys = _ask(args, "GET", "keys", params=params)["data"]
    _show(args, keys, ("id", "tenant", "scopes", "label", "created", "expires", "revoked"))


@reports_errors
def rotate_key(args: argparse.Namespace) -> None:
    write(_ask(args, "POST", f"keys/{quote(args.id, safe='')}/rotate", {"grace_s": args.grace_s})["key"] + "\n")


@reports_errors
def revoke_key(args: argparse.Namespace) -> None:
    _ask(args, "DELETE", f"keys/{quote(args.id, safe='')}")
    write(f"revoked {args.id}\n")


@reports_errors
def usage(args: argparse.Namespace) -> None:
    params = {name: value for name in ("since", "until", "tenant") if (value := getattr(args, name)) is not None}
    lines = _ask(args, "GET", "usage", params=params)["data"]
    _show(
        args,
        lines,
        ("day", "tenant", "model", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "resident_s"),
    )


@reports_errors
def audit(args: argparse.Namespace) -> None:
    for entry in _ask(args, "GET", "audit", params={"limit": str(args.limit)})["data"]:
        write(json.dumps(entry) + "\n")


def _bound(text: str) -> int | None:
    return None if text == "none" else whole(0)(text)


def _limits(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: value for name, value in vars(args).items() if name in LIMITS}


def _ask(
    args: argparse.Namespace,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    params: dict[str, str] | None = None,
) -> dict[str, Any]:
    with client_of(args) as client:
        return client.request(method, f"/v1/admin/{path}", body, params)


def _show(args: argparse.Namespace, items: list[dict[str, Any]], columns: Iterable[str]) -> None:
    if args.json:
        write(json.dumps(items, indent=2) + "\n")
        return
    table = plain_table(*columns)
    for item in items:
        table.add_row(*(_cell(name, item[name]) for name in columns))
    write_table(table)


def _cell(name: str, value: Any) -> str:
    if name in ("created", "expires", "revoked"):
        return "" if value is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    if isinstance(value, dict):
        return " ".join(f"{key}={bound}" for key, bound in value.items() if bound is not None)
    return " ".join(value) if isinstance(value, list) else str(value)
