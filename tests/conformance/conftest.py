"""The official client, and short ways to ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .callers import KEY, LIMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import openai

PROMPT = "Many fine-tunes of one base"


@pytest.fixture(scope="session")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture(scope="session")
def complete(client: openai.OpenAI) -> Callable[..., Any]:
    """complete(model, **parameters): one completion of PROMPT, greedy and of 16 tokens unless told otherwise."""

    def ask(model: str = "tiny", **parameters: Any) -> Any:
        extra = {
            name: parameters.pop(name)
            for name in (
                "ignore_eos",
                "min_tokens",
                "top_k",
                "min_p",
                "stop_token_ids",
                "skip_special_tokens",
                "repetition_penalty",
                "structured_outputs",
            )
            if name in parameters
        }
        given = {"prompt": PROMPT, "temperature": 0, "max_tokens": 16, **parameters}
        return client.completions.create(model=model, extra_body=extra, **given)

    return ask


@pytest.fixture(scope="session")
def answer(complete: Callable[..., Any]) -> Callable[..., str]:
    """The text of `complete`'s first choice."""
    return lambda model="tiny", **parameters: str(complete(model, **parameters).choices[0].text)


@pytest.fixture(scope="session")
def ascii_bias(tenants: dict[str, Any]) -> dict[str, int]:
    """A logit_bias that leaves tokens of plain letters only, so that tokens and characters are easy to match."""
    tokenizer = tenants["tiny"].tokenizer
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return {str(token): 100 for token, text in texts.items() if text.isascii() and text.isalpha()}


@pytest.fixture(scope="session")
def imports(tenants: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imports")
    (root / "sign.safetensors").write_bytes(tenants["sign"].artifact)
    return root


@pytest.fixture(scope="session")
def site(process: Any, tiny_base: Path, imports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = tmp_path_factory.mktemp("site") / "store"
    flags = ["--import-root", str(imports), "--max-upload-bytes", str(LIMIT_BYTES)]
    with process.ServerProcess(tiny_base, store, *flags, api_key=KEY) as running:
        yield running.wait_ready()


@pytest.fixture(scope="session")
def routes(site: Any) -> set[tuple[str, str]]:
    paths = site.http.get("/openapi.json").json()["paths"]
    return {(method.upper(), path) for path, methods in paths.items() for method in methods}
