"""Every error the product raises on purpose.

    DeltaServeError                         code                       HTTP
    ├── BadRequest                          invalid_request            400
    │   ├── InvalidJson                     invalid_json               400
    │   ├── UnsupportedParameter            unsupported_parameter      400
    │   ├── ContextLengthExceeded           context_length_exceeded    400
    │   ├── InvalidName                     invalid_name               400
    │   ├── TemplateError                   chat_template_error        400
    │   ├── GrammarError                    invalid_grammar            400
    │   ├── UploadClosed                    upload_closed              400
    │   ├── JobClosed                       job_closed                 400
    │   └── DigestMismatch                  digest_mismatch            400
    ├── AuthenticationFailed                invalid_api_key            401
    ├── PermissionDenied                    insufficient_permissions   403
    │   └── QuotaExceeded                   quota_exceeded             403
    ├── NotFound                            not_found                  404
    │   └── ModelNotFound                   model_not_found            404
    ├── MethodNotAllowed                    method_not_allowed         405
    ├── RequestTimeout                      request_timeout            408
    ├── NameConflict                        name_conflict              409
    ├── VersionInUse                        version_in_use             409
    ├── FileInUse                           file_in_use                409
    ├── StoreInUse                          store_in_use               409
    ├── IncompatibleStore                   incompatible_store         409
    ├── PreconditionFailed                  precondition_failed        412
    ├── ArtifactTooLarge                    artifact_too_large         413
    ├── ArtifactError                       invalid_artifact           422
    │   ├── ArtifactCorrupt                 artifact_corrupt           422
    │   ├── ArtifactMismatch                artifact_mismatch          422
    │   ├── ArtifactNotFinite               artifact_not_finite        422
    │   └── BaseMismatch                    base_mismatch              422
    ├── CheckpointError                     invalid_checkpoint         422
    ├── CodecError                          invalid_codec_config       422
    ├── RateLimited                         rate_limit_exceeded        429   + Retry-After
    ├── QueueFull                           queue_full                 429   + Retry-After
    ├── EngineFailure                       engine_failure             500
    │   ├── DeltaLoadFailed                 delta_load_failed          500
    │   └── NumericalError                  numerical_error            500
    ├── Draining                            draining                   503   + Retry-After
    ├── RegistryUnavailable                 registry_unavailable       503   + Retry-After
    ├── StoreUnavailable                    store_unavailable          503   + Retry-After
    └── StorageFull                         insufficient_storage       507

The class names the case, `code` is its stable name for programs, the message says what, where and what is allowed.
Raised where the fact is known; turned into HTTP by `api.errors` alone and into an exit status by `cli` alone.
"""

from __future__ import annotations

from typing import ClassVar


class DeltaServeError(Exception):
    """Base of the tree. `param` names the request field at fault; `retry_after_s` is when a retry makes sense."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadRequest(DeltaServeError):
    """A field is missing, out of its range, or does not go with another."""

    code, http_status = "invalid_request", 400


class InvalidJson(BadRequest):
    """The body is no JSON object."""

    code = "invalid_json"


class UnsupportedParameter(BadRequest):
    """A field that this server does not know."""

    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    """Prompt and answer are longer than the context."""

    code = "context_length_exceeded"


class InvalidName(BadRequest):
    """A name of a model, a tenant or a file that none may have."""

    code = "invalid_name"


class TemplateError(BadRequest):
    """The model's chat template failed, took too long or wrote too much."""

    code = "chat_template_error"


class GrammarError(BadRequest):
    """A schema, expression or grammar that cannot be used."""

    code = "invalid_grammar"


class UploadClosed(BadRequest):
    """The upload in parts was completed, cancelled, or has expired."""

    code = "upload_closed"


class JobClosed(BadRequest):
    """The job has ended; there is nothing to cancel."""

    code = "job_closed"


class DigestMismatch(BadRequest):
    """What was received is not what its digest says."""

    code = "digest_mismatch"


class AuthenticationFailed(DeltaServeError):
    """No key, or one that is unknown, revoked or expired."""

    code, http_status = "invalid_api_key", 401


class PermissionDenied(DeltaServeError):
    """The key lacks the scope, or the object is another's."""

    code, http_status = "insufficient_permissions", 403


class QuotaExceeded(PermissionDenied):
    """The tenant may store, or have on the device, no more models or bytes."""

    code = "quota_exceeded"


class NotFound(DeltaServeError):
    """There is no such path, tenant, key, upload or file for this caller."""

    code, http_status = "not_found", 404


class ModelNotFound(NotFound):
    """There is no such model or version for this caller."""

    code = "model_not_found"


class MethodNotAllowed(DeltaServeError):
    """The path does not take this method."""

    code, http_status = "method_not_allowed", 405


class RequestTimeout(DeltaServeError):
    """The request's body came too slowly, or stopped."""

    code, http_status = "request_timeout", 408


class NameConflict(DeltaServeError):
    """The name is taken, or belongs to what stays."""

    code, http_status = "name_conflict", 409


class VersionInUse(DeltaServeError):
    """A name or its canary points to this version."""

    code, http_status = "version_in_use", 409


class FileInUse(DeltaServeError):
    """A job that waits or runs is to read the file."""

    code, http_status = "file_in_use", 409


class StoreInUse(DeltaServeError):
    """Another server works on the store (at start only)."""

    code, http_status = "store_in_use", 409


class IncompatibleStore(DeltaServeError):
    """The store was written by a newer deltaserve, or its registry is missing (at start only)."""

    code, http_status = "incompatible_store", 409


class PreconditionFailed(DeltaServeError):
    """If-Match or If-None-Match does not hold."""

    code, http_status = "precondition_failed", 412


class ArtifactTooLarge(DeltaServeError):
    """More bytes than are accepted, in the file or in memory."""

    code, http_status = "artifact_too_large", 413


class ArtifactError(DeltaServeError):
    """The file is no delta artifact of a known version."""

    code, http_status = "invalid_artifact", 422


class ArtifactCorrupt(ArtifactError):
    """The file is cut off, padded, or breaks the format."""

    code = "artifact_corrupt"


class ArtifactMismatch(ArtifactError):
    """The artifact's tensors do not fit its base."""

    code = "artifact_mismatch"


class ArtifactNotFinite(ArtifactError):
    """The artifact holds NaN or infinite numbers."""

    code = "artifact_not_finite"


class BaseMismatch(ArtifactError):
    """The artifact was made against another base."""

    code = "base_mismatch"


class CheckpointError(DeltaServeError):
    """Files of a checkpoint that cannot be used, or are no fine-tune of the base."""

    code, http_status = "invalid_checkpoint", 422


class CodecError(DeltaServeError):
    """A codec, or a budget for it, that there is not."""

    code, http_status = "invalid_codec_config", 422


class RateLimited(DeltaServeError):
    """The tenant's requests, tokens or sequences are used up for now."""

    code, http_status, retry_after_s = "rate_limit_exceeded", 429, 1

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(DeltaServeError):
    """Too many requests wait already."""

    code, http_status, retry_after_s = "queue_full", 429, 1


class EngineFailure(DeltaServeError):
    """The engine failed at this request."""

    code, http_status = "engine_failure", 500


class DeltaLoadFailed(EngineFailure):
    """The model's weights could not be loaded."""

    code = "delta_load_failed"


class NumericalError(EngineFailure):
    """The model computed numbers that are not finite."""

    code = "numerical_error"


class Draining(DeltaServeError):
    """The server is shutting down."""

    code, http_status, retry_after_s = "draining", 503, 5


class RegistryUnavailable(DeltaServeError):
    """The database cannot be reached, or not be written."""

    code, http_status, retry_after_s = "registry_unavailable", 503, 2


class StoreUnavailable(DeltaServeError):
    """The bucket cannot be reached, or the disk not be written."""

    code, http_status, retry_after_s = "store_unavailable", 503, 2


class StorageFull(DeltaServeError):
    """The disk has no room for this; nothing of it was kept."""

    code, http_status = "insufficient_storage", 507
