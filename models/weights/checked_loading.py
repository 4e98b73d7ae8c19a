"""Load weights after a comparison of the checkpoint with what the class reads.

transformers initializes missing weights randomly and only logs it; diffusers leaves them without data. Here both are
errors that name the tensors. The comparison only reads the headers of the files. For classes of transformers it runs
the library's loader on tensors without data, so that tied weights, old names and buffers are treated as in loading.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from secondcast.models.weights.files import (
    DIFFUSERS,
    READ_DTYPES,
    TRANSFORMERS,
    CheckpointSource,
    StoredTensor,
    StoredWeights,
    read_header,
    stored_weights,
)
from secondcast.models.weights.mismatch import Mismatch, Shape, compared, matches
from secondcast.storage_schemas.errors import reason


@dataclass(frozen=True, kw_only=True)
class Known:
    """Known differences of names in published checkpoints of a class, as patterns.

    beside: may be in a checkpoint and is not read.
    absent: may be missing, because nothing reads it.
    tied: pairs of names of one tensor.
    renamed: old parts of names, and what replaced them.
    """

    beside: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


# Does not repeat what a class of transformers states itself (_tied_weights_keys, _keys_to_ignore_on_load_unexpected),
# except the tied weights of T5: the library only warns if a checkpoint has two different ones.
KNOWN: dict[str, Known] = {
    # The class itself ignores the decoder; T5 v1.1 also has a separate output layer.
    "T5EncoderModel": Known(beside=(r"^lm_head\.weight$",), tied=(("encoder.embed_tokens.weight", "shared.weight"),)),
    "SecondcastStudent": Known(tied=(("encoder.encoder.embed_tokens.weight", "encoder.shared.weight"),)),
    # Published checkpoints of TrOCR have no pooler.
    "VisionEncoderDecoderModel": Known(absent=(r"^encoder\.pooler\.",)),
    # Attention masks, which are computed now.
    "GPT2Model": Known(beside=(r"\.attn\.(masked_)?bias$",)),
    # A count of training, which decoding does not read.
    "AutoencoderKLFlux2": Known(absent=(r"^bn\.num_batches_tracked$",)),
    "AutoencoderKL": Known(
        # Names from before diffusers had one attention class.
        renamed=(
            (".query.", ".to_q."),
            (".key.", ".to_k."),
            (".value.", ".to_v."),
            (".proj_attn.", ".to_out.0."),
        )
    ),
}
_FLOATING = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Buffers of any class that were formerly saved and are computed now.
_COMPUTED = (r"(^|\.)position_ids$", r"(^|\.)token_type_ids$", r"(^|\.)inv_freq$")
LOADING_FAILS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError),
    SafetensorError,
)
"""Errors of loading: a class may raise almost anything for an invalid configuration."""


def load_checked(
    kind: Any,
    folder: Path,
    source: CheckpointSource,
    *,
    dtype: torch.dtype,
    config: Any = None,
    pickles: bool = False,
    other_parts: bool = False,
    needed: Collection[str] | None = None,
    **how: Any,
) -> Any:
    """A network of a class of transformers or diffusers, from the weights in a folder, cast to `dtype`, on the host.

    config: default: that of the folder.
    pickles: whether PyTorch's own format is read as well.
    other_parts: whether the checkpoint may be of a larger model, with heads or an image tower.
    needed: names of required tensors; default: all.
    how: further arguments of from_pretrained.

    Raises source.error, before any data is read, unless the checkpoint has exactly the tensors that the class reads.
    """
    stored, beside = _checked(
        kind, folder, source, config=config, pickles=pickles, other_parts=other_parts, needed=needed, **how
    )
    library: dict[str, Any] = {"torch_dtype": dtype} if _of_diffusers(kind) else {"dtype": dtype}
    if config is not None:
        library["config"] = config
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=not stored.pickled,
            output_loading_info=True,
            **library,
            **how,
        )
    except LOADING_FAILS as error:
        raise source.refused(reason(error)) from error
    _refuse(_reported(kind, stored, model, report), source, beside=beside, needed=needed)
    _check_tied(kind, model, source)
    note_cast(model, stored, dtype)
    return model


def note_cast(model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
    """Keep with a loaded network from which dtypes its weights were cast."""
    model.cast_from = tuple(name for name in stored.dtypes if _FLOATING.get(name) not in (dtype, None))


def cast_from(*networks: Any) -> str | None:
    """Dtypes in the files from which weights of loaded networks were cast; None if none was cast."""
    names = {name for network in networks for name in getattr(network, "cast_from", ())}
    return ", ".join(sorted(str(_FLOATING[name]).removeprefix("torch.") for name in names)) or None


def check_weights(kind: Any, folder: Path, source: CheckpointSource, **how: Any) -> StoredWeights:
    """The tensors in a folder; source.error unless load_checked can load them with the same arguments.

    Only reads the headers of the files.
    """
    return _checked(kind, folder, source, **how)[0]


def _checked(
    kind: Any,
    folder: Path,
    source: CheckpointSource,
    *,
    config: Any = None,
    pickles: bool = False,
    other_parts: bool = False,
    needed: Collection[str] | None = None,
    **how: Any,
) -> tuple[StoredWeights, tuple[str, ...]]:
    """The tensors in a folder, and patterns for the names of other parts of the model."""
    of_diffusers = _of_diffusers(kind)
    beside: tuple[str, ...] = ()
    stored = stored_weights(folder, DIFFUSERS if of_diffusers else TRANSFORMERS, source, pickles=pickles)
    try:
        if of_diffusers:
            mismatch = _diffusers_mismatch(kind, folder, stored)
        else:
            config = config if config is not None else kind.config_class.from_pretrained(folder)
            mismatch, model = _transformers_mismatch(kind, config, stored, **how)
            if other_parts:
                own = {name for name, _ in model.named_children()}
                beside = _other_parts(kind, config, stored, mismatch, own, **how)
    except LOADING_FAILS as error:
        raise source.refused(reason(error)) from error
    _refuse(mismatch, source, beside=beside, needed=needed)
    return stored, beside


def read_tensors(
    file: Path, expected: Mapping[str, Shape], source: CheckpointSource, *, kind: str
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; source.error unless they have the expected names and shapes.

    kind: description of their owner, for errors.
    """
    mismatch = compared(kind, expected, dict(read_header(file, source)))
    if mismatch:
        raise mismatch.error(source)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise source.refused(f"{file.name} cannot be read ({reason(error)})") from error


def read_tensor(file: Path, name: str, source: CheckpointSource) -> torch.Tensor:
    """One tensor of a safetensors file, without the rest of it. Raises source.error."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise source.refused(f"{name} cannot be read from {file.name} ({reason(error)})") from error
    return tensor


def _refuse(
    mismatch: Mismatch, source: CheckpointSource, *, beside: tuple[str, ...], needed: Collection[str] | None
) -> None:
    known = KNOWN.get(mismatch.kind, Known())
    ignored = (*known.beside, *_COMPUTED, *beside)
    left = replace(
        mismatch,
        missing=[
            name for name in mismatch.missing if not matches(name, known.absent) and (needed is None or name in needed)
        ],
        unexpected=[name for name in mismatch.unexpected if not matches(name, ignored)],
        unread={name: dtype for name, dtype in mismatch.unread.items() if not matches(name, known.absent)},
    )
    if left:
        raise left.error(source)


def _diffusers_mismatch(kind: Any, folder: Path, stored: StoredWeights) -> Mismatch:
    with torch.device("meta"), _unreported():
        model = kind.from_config(kind.load_config(folder))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamed = KNOWN.get(kind.__name__, Known()).renamed
    tensors = {_renamed(name, expected, renamed): tensor for name, tensor in stored.tensors.items()}
    return compared(kind.__name__, expected, tensors)


def _renamed(name: str, expected: Mapping[str, Shape], renamed: tuple[tuple[str, str], ...]) -> str:
    if name in expected:
        return name
    return next((now for old, new in renamed if (now := name.replace(old, new)) in expected), name)


def _transformers_mismatch(kind: Any, config: Any, stored: StoredWeights, **how: Any) -> tuple[Mismatch, Any]:
    """The difference of a checkpoint from what a class reads, and an instance of the class without data."""
    mismatch, model = _asked(kind, config, stored.tensors, **how)
    codes = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
    floating = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if tensor.dtype in READ_DTYPES or (tensor.dtype == "I8" and name in codes)
    }
    if len(floating) == len(stored.tensors):
        return mismatch, model
    # Tensors that are only missing without the others are stored in an unsupported dtype.
    without = set(_asked(kind, config, floating, **how)[0].missing) - set(mismatch.missing)
    others = {name: tensor.dtype for name, tensor in stored.tensors.items() if name not in floating}
    unread = {name: others.get(name) or next(iter(others.values())) for name in without}
    return replace(mismatch, unread=unread), model


def _other_parts(
    kind: Any, config: Any, stored: StoredWeights, mismatch: Mismatch, own: Collection[str], **how: Any
) -> tuple[str, ...]:
    """Patterns for the names of modules that the class does not read, such as heads.

    own: modules of the class itself.
    """
    modules = {name.split(".")[0] for name in mismatch.unexpected} & {name.split(".")[0] for name in stored.tensors}
    others = []
    for module in sorted(modules - set(own)):
        rest = {name: tensor for name, tensor in stored.tensors.items() if name.split(".")[0] != module}
        if _asked(kind, config, rest, **how)[0].missing == mismatch.missing:
            others.append(rf"^{re.escape(module)}(\.|$)")
    return tuple(others)


def _asked(kind: Any, config: Any, tensors: Mapping[str, StoredTensor], **how: Any) -> tuple[Mismatch, Any]:
    """The mismatch that transformers' loader reports for tensors of these names and shapes; the model without data."""
    without_data = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    with _unreported():
        model, report = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=without_data,
            device_map="meta",
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **how,
        )
    return _reported(kind, StoredWeights(tensors=dict(tensors)), model, report), model


def _reported(kind: Any, stored: StoredWeights, model: Any, report: Mapping[str, Any]) -> Mismatch:
    """The mismatch that a library reported for a checkpoint."""
    held, missing = model.state_dict(), set(report["missing_keys"])
    return Mismatch(
        kind=kind.__name__,
        expected={name: tuple(tensor.shape) for name, tensor in held.items()},
        found={name: tensor.shape for name, tensor in stored.tensors.items()},
        # A count of batches, or of positions, is not a weight; codes in 8 bits are.
        missing=[
            name
            for name, tensor in held.items()
            if name in missing and (tensor.is_floating_point() or tensor.dtype == torch.int8)
        ],
        unexpected=sorted(report["unexpected_keys"]),
        reshaped={name: (tuple(was), tuple(wanted)) for name, was, wanted in report["mismatched_keys"]},
    )


def _check_tied(kind: Any, model: Any, source: CheckpointSource) -> None:
    held = dict(model.named_parameters(remove_duplicate=False))
    for one, other in KNOWN.get(kind.__name__, Known()).tied:
        # A quantized embedding is held once, and is no parameter.
        if one in held and held[one] is not held[other] and not torch.equal(held[one], held[other]):
            raise source.refused(f"{one} and {other} differ, expected one tensor under two names: the file is damaged")


def _of_diffusers(kind: Any) -> bool:
    return str(kind.__module__).split(".")[0] == "diffusers"


@contextmanager
def _unreported() -> Iterator[None]:
    """A context without reports and progress bars of the libraries, whose warnings are errors here."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library, library.get_verbosity()) for library in libraries]
    bar = of_transformers.is_progress_bar_enabled()
    for library in libraries:
        library.set_verbosity_error()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        if bar:
            of_transformers.enable_progress_bar()
