"""deltaserve serve, deltaserve demo."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaserve.settings import Settings

if TYPE_CHECKING:
    import uvicorn

    from deltaserve.api.deps import Services

POLL_S = 0.05  # how often a draining server looks whether it is idle


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve_parser = subparsers.add_parser(
        "serve",
        help="serve a base model and its deltas over HTTP",
        description="Serve a base model and its deltas. Every flag is also a variable: --max-num-seqs is "
        "DELTASERVE_MAX_NUM_SEQS; the command line wins.",
    )
    for name, field in Settings.model_fields.items():
        # No types here: Settings checks every value, from the command line and from the environment alike.
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if name == "base":
            serve_parser.add_argument("base", nargs="?", metavar="BASE", help=text)
        elif field.annotation is bool:
            flag = f"--{name.replace('_', '-')}"
            serve_parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            serve_parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=text)
    serve_parser.set_defaults(run=serve)
    demo_parser = subparsers.add_parser(
        "demo", help="three sample tenants on a real base, in one command", description="Serve three sample fine-tunes."
    )
    demo_parser.add_argument("--base", help="the base's directory or .gguf file (default: found or downloaded)")
    demo_parser.add_argument("--tenants", type=Path, help="directory of the sample tenants' artifacts")
    demo_parser.add_argument("--keep", action="store_true", help="leave the server up and print curl lines")
    demo_parser.set_defaults(run=demo)


def serve(args: argparse.Namespace) -> int:
    """Runs until SIGTERM or Ctrl-C. Exit status 0 after a clean drain."""
    given: dict[str, Any] = {name: getattr(args, name) for name in Settings.model_fields}
    settings = Settings.build(**given)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger(__name__).info("settings: %s", settings.shown())

    from deltaserve.app import build_services, create_app

    services = build_services(settings)
    server = _server(create_app(services), settings)

    def drain(sig: int, frame: Any) -> None:  # noqa: ARG001
        if services.draining:
            if sig == signal.SIGINT:  # a second Ctrl-C does not wait
                server.should_exit = server.force_exit = True
            return
        services.draining = True  # /health turns 503, new work is refused, what runs goes on
        threading.Thread(target=_close_when_idle, args=(server, services, settings), daemon=True).start()

    # Not uvicorn's own: it raises the signal again at the end, and the exit status would not be ours.
    server.handle_exit = drain  # type: ignore[method-assign]
    server.run()
    return 0 if server.started else 1


def _close_when_idle(server: uvicorn.Server, services: Services, settings: Settings) -> None:
    """Keeps the port open, so that /health can tell, until nothing runs or the time is up; what is left then ends with
    an error that its client can read."""
    deadline_s = time.monotonic() + settings.shutdown_timeout_s
    while services.engine.num_running + services.engine.num_waiting and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    if time.monotonic() >= deadline_s:
        services.engine.stop()
    server.config.timeout_graceful_shutdown = max(int(deadline_s - time.monotonic()), 2)
    server.should_exit = True


def _server(app: Any, settings: Settings) -> uvicorn.Server:
    import uvicorn

    from deltaserve.api.protocol import impatient

    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout_s,
        timeout_keep_alive=settings.keep_alive_timeout_s,
        http=impatient(settings.client_timeout_s),
        ws="none",
        h11_max_incomplete_event_size=64 * 1024,
    )
    return uvicorn.Server(config)


def demo(args: argparse.Namespace) -> int:
    from deltaserve.demo import run_demo

    return run_demo(base=args.base, tenants=args.tenants, keep=args.keep)
