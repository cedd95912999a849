"""S3 as moto's server speaks it, in this process on a free port of loopback; its buckets are in memory."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_REGION": "us-east-1",
}


class S3:
    """`url(name)` is an empty prefix of a bucket; the variables that lead to it are in `environment`."""

    def __init__(self) -> None:
        try:
            from moto.server import ThreadedMotoServer
        except ImportError as error:
            pytest.skip(f"needs moto's server: {error}")
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server: Any = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        self.lead_here()
        import boto3

        boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1").create_bucket(
            Bucket="deltas"
        )

    def lead_here(self) -> None:
        os.environ |= self.environment

    def url(self, name: str) -> str:
        return f"s3://deltas/{name}"

    def stop(self) -> None:
        for name in self.environment:
            os.environ.pop(name, None)
        self._server.stop()
