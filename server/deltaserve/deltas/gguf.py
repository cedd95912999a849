"""A .gguf file as a checkpoint directory, converted once, tensor by tensor, and cached by content.

Names, shapes and the head permutation come from transformers' own GGUF tables; quantised weights are dequantised to
bfloat16 (F16 and F32 files keep their type), so that every tool sees the same base whichever file it started from.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deltaserve.deltas.tensorfile import TensorFileWriter
from deltaserve.errors import CheckpointError
from deltaserve.settings import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)
RECIPE = "1"  # a change of the conversion gets a new number, and with it a new place in the cache


def converted(path: Path) -> Path:
    """The directory that stands for `path`. Raises CheckpointError for a file that cannot be converted."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / "gguf" / f"{digest[:32]}-{RECIPE}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        logger.info("converting %s to %s", path, target)
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".gguf-"))
        try:
            with _parsed_once():
                _convert(path, staged)
            try:
                staged.rename(target)
            except OSError:
                if not target.is_dir():  # another process may have been first
                    raise
        except (ValueError, NotImplementedError, ImportError, LookupError, struct.error) as error:
            raise CheckpointError(f"{path}: this GGUF file cannot be converted: {error}") from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return target


def _convert(path: Path, directory: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    reader = GGUFReader(path)
    architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    matrices = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    dtype = plain.get(next(iter(matrices)), torch.bfloat16) if len(matrices) == 1 else torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())  # type: ignore[no-untyped-call]
    names = get_gguf_hf_weights_map(model, processor)
    writer = TensorFileWriter(directory)
    try:
        for tensor in reader.tensors:
            result = processor.process(  # type: ignore[no-untyped-call]
                weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name, tensor_key_mapping=names
            )
            if result.name in names:
                writer.add(names[result.name], torch.from_numpy(np.array(result.weights)).to(dtype))
        with (directory / "model.safetensors").open("wb") as file:
            writer.write(file, {"format": "pt"})
    finally:
        writer.close()
    fields = _single_precision(config.to_dict())
    for field in ("quantization_config", "_name_or_path"):
        fields.pop(field, None)
    fields |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    type(config)(**fields).save_pretrained(directory)
    ends = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ends).save_pretrained(directory)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Meanwhile every GGUFReader of a file is one reader, and a name table is built once; only time depends on it.

    transformers reads the file for the configuration and again for the tokenizer, and builds the table for each module;
    the reader takes most of its time in slices of np.memmap, which plain arrays over the same memory do not.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, *args: Any, **options: Any) -> np.ndarray[Any, Any]:
            if type(self.data) is np.memmap:
                self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
            return super()._get(*args, **options)

    read = functools.cache(Reader)
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        vars(gguf).update(
            GGUFReader=lambda path: read(os.path.realpath(path)),
            get_tensor_name_map=functools.cache(gguf.get_tensor_name_map),
        )
        yield
    finally:
        vars(gguf).update(originals)


def _single_precision(value: Any) -> Any:
    """GGUF keeps numbers in float32; 9.99999974738e-06 was 1e-05: the shortest decimal that reads back the same."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, dict):
        return {key: _single_precision(item) for key, item in value.items()}
    return [_single_precision(item) for item in value] if isinstance(value, list) else value
