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
    │   └── DigestMismatch                  digest_mismatch            400
    ├── AuthenticationFailed                invalid_api_key            401
    ├── PermissionDenied                    insufficient_permissions   403
    │   └── QuotaExceeded                   quota_exceeded             403
    ├── NotFound                            not_found                  404
    │   └── ModelNotFound                   model_not_found            404
    ├── NameConflict                        name_conflict              409
    ├── VersionInUse                        version_in_use             409
    ├── StoreInUse                          store_in_use               409
    ├── IncompatibleStore                   incompatible_store         409
    ├── PreconditionFailed                  precondition_failed        412
    ├── ArtifactTooLarge                    artifact_too_large         413
    ├── ArtifactError                       invalid_artifact           422
    │   ├── ArtifactCorrupt                 artifact_corrupt           422
    │   ├── ArtifactMismatch                artifact_mismatch          422
    │   ├── ArtifactNotFinite               artifact_not_finite        422
    │   └── BaseMismatch                    base_mismatch              422
    ├── CheckpointError                     invalid_checkpoint         422   (command line: files that cannot be used)
    ├── CodecError                          invalid_codec_config       422
    ├── RateLimited                         rate_limit_exceeded        429   + Retry-After
    ├── QueueFull                           queue_full                 429   + Retry-After
    ├── EngineFailure                       engine_failure             500
    │   ├── DeltaLoadFailed                 delta_load_failed          500
    │   └── NumericalError                  numerical_error            500
    ├── Draining                            draining                   503   + Retry-After
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
    code, http_status = "invalid_request", 400


class InvalidJson(BadRequest):
    code = "invalid_json"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class InvalidName(BadRequest):
    code = "invalid_name"


class TemplateError(BadRequest):
    code = "chat_template_error"


class GrammarError(BadRequest):
    code = "invalid_grammar"


class UploadClosed(BadRequest):
    code = "upload_closed"


class DigestMismatch(BadRequest):
    code = "digest_mismatch"


class AuthenticationFailed(DeltaServeError):
    code, http_status = "invalid_api_key", 401


class PermissionDenied(DeltaServeError):
    code, http_status = "insufficient_permissions", 403


class QuotaExceeded(PermissionDenied):
    code = "quota_exceeded"


class NotFound(DeltaServeError):
    code, http_status = "not_found", 404


class ModelNotFound(NotFound):
    code = "model_not_found"


class NameConflict(DeltaServeError):
    code, http_status = "name_conflict", 409


class VersionInUse(DeltaServeError):
    code, http_status = "version_in_use", 409


class StoreInUse(DeltaServeError):
    code, http_status = "store_in_use", 409


class IncompatibleStore(DeltaServeError):
    code, http_status = "incompatible_store", 409


class PreconditionFailed(DeltaServeError):
    code, http_status = "precondition_failed", 412


class ArtifactTooLarge(DeltaServeError):
    code, http_status = "artifact_too_large", 413


class ArtifactError(DeltaServeError):
    code, http_status = "invalid_artifact", 422


class ArtifactCorrupt(ArtifactError):
    code = "artifact_corrupt"


class ArtifactMismatch(ArtifactError):
    code = "artifact_mismatch"


class ArtifactNotFinite(ArtifactError):
    code = "artifact_not_finite"


class BaseMismatch(ArtifactError):
    code = "base_mismatch"


class CheckpointError(DeltaServeError):
    code, http_status = "invalid_checkpoint", 422


class CodecError(DeltaServeError):
    code, http_status = "invalid_codec_config", 422


class RateLimited(DeltaServeError):
    code, http_status, retry_after_s = "rate_limit_exceeded", 429, 1

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(DeltaServeError):
    code, http_status, retry_after_s = "queue_full", 429, 1


class EngineFailure(DeltaServeError):
    code, http_status = "engine_failure", 500


class DeltaLoadFailed(EngineFailure):
    code = "delta_load_failed"


class NumericalError(EngineFailure):
    code = "numerical_error"


class Draining(DeltaServeError):
    code, http_status, retry_after_s = "draining", 503, 5


class StorageFull(DeltaServeError):
    code, http_status = "insufficient_storage", 507
