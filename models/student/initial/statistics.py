"""What a teacher's encoder computes for some prompts: its embeddings, and sums in float64 over all tokens.

Suffixes: D width, L layers, J heads x their width, F feed-forward units, N prompts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import T5EncoderModel

from secondcast.models.student.initial.work_folder import WorkFolder
from secondcast.storage_schemas.errors import NonFiniteError, StudentError
from secondcast.storage_schemas.progress import Progress, counted

CHUNK_PROMPTS = 64
"""Prompts between two writes of the sums."""
_SUMS = "sums"


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over all tokens of the fitted prompts, padding included, float64, on the CPU.

    moment_DD: second moment of x / rms(x), over all places where a layer or the end of the encoder reads x.
    attended_LJ: squares of what each o reads.
    units_LF: squares of what each wo reads.
    """

    moment_DD: torch.Tensor
    attended_LJ: torch.Tensor
    units_LF: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Token ids and the teacher's embeddings of some prompts, read from the work folder in batches.

    chunks: numbers of the chunks.
    """

    work: WorkFolder
    token_ids_NT: torch.Tensor
    chunks: tuple[range, ...]
    width: int
    batch_size: int

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """token_ids_BT and embedding_BTD, on the CPU."""
        for chunk in self.chunks:
            ids_BT = self.token_ids_NT[chunk.start : chunk.stop]
            read = self.work.read(_chunk_name(chunk), {"embedding": (*ids_BT.shape, self.width)})
            if read is None:
                raise StudentError(
                    f"{self.work.path} has no {_chunk_name(chunk)}.safetensors any more: delete this folder"
                )
            for first in range(0, len(chunk), self.batch_size):
                last = first + self.batch_size
                yield ids_BT[first:last], read["embedding"][first:last]

    def first(self, prompts: int) -> "Pairs":
        """The first prompts, in whole chunks."""
        kept = tuple(chunk for chunk in self.chunks if chunk.start - self.chunks[0].start < prompts)
        return Pairs(
            work=self.work, token_ids_NT=self.token_ids_NT, chunks=kept, width=self.width, batch_size=self.batch_size
        )


def chunks_of(first: int, last: int) -> tuple[range, ...]:
    """Prompts [first, last) in chunks."""
    return tuple(range(start, min(start + CHUNK_PROMPTS, last)) for start in range(first, last, CHUNK_PROMPTS))


def read_sums(work: WorkFolder, config: dict[str, Any]) -> tuple[Sums, int]:
    """The sums in a work folder, or zeros, and the number of prompts in them."""
    shapes = _shapes(config)
    read = work.read(_SUMS, {**shapes, "prompts": (1,)})
    if read is None:
        return Sums(**{name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}), 0
    return Sums(**{name: read[name] for name in shapes}), int(read["prompts"])


def collect(
    load: Callable[[], T5EncoderModel],
    token_ids_NT: torch.Tensor,
    fitted: int,
    work: WorkFolder,
    *,
    config: dict[str, Any],
    batch_size: int,
    progress: Progress,
) -> Sums:
    """Run the encoder once over all prompts; its embeddings and sums are in the work folder afterwards.

    load: loads the encoder, where there is something left to do.
    fitted: prompts at the beginning that count in the sums; those behind them only have embeddings.

    NonFiniteError for an embedding that is not finite.
    """
    sums, done = read_sums(work, config)
    chunks = [*chunks_of(0, fitted), *chunks_of(fitted, len(token_ids_NT))]
    missing = [chunk for chunk in chunks if chunk.start >= done]
    if not missing:
        return sums
    encoder = load()
    with progress.bar("statistics", total=len(token_ids_NT), done=done, unit="prompts") as bar, torch.no_grad():
        for chunk in missing:
            recorder = _Recorder(encoder, sums)
            embeddings = []
            with recorder.recording() if chunk.start < fitted else _nothing():
                for ids_BT in token_ids_NT[chunk.start : chunk.stop].split(batch_size):
                    embeddings.append(encoder(input_ids=ids_BT.to(encoder.device)).last_hidden_state.cpu())
                    bar.advance(len(ids_BT))
            embedding_BTD = torch.cat(embeddings)
            if not embedding_BTD.isfinite().all():
                raise NonFiniteError(
                    f"the teacher's encoder has embeddings that are not finite among prompts {chunk.start} to "
                    f"{chunk.stop - 1} ({counted(len(chunk), 'prompt')}): give --dtype float32"
                )
            work.write(_chunk_name(chunk), {"embedding": embedding_BTD})
            sums = recorder.sums()
            work.write(_SUMS, {**vars(sums), "prompts": torch.tensor([chunk.stop], dtype=torch.float64)})
    return sums


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Recorder:
    """Adds to the sums while the encoder runs; a batch's products are in fp32, sums over batches in float64."""

    def __init__(self, encoder: T5EncoderModel, before: Sums) -> None:
        self._encoder = encoder
        on = {name: tensor.to(encoder.device, copy=True) for name, tensor in vars(before).items()}
        self._moment_DD, self._attended_LJ, self._units_LF = on["moment_DD"], on["attended_LJ"], on["units_LF"]

    def sums(self) -> Sums:
        """The sums so far."""
        return Sums(moment_DD=self._moment_DD.cpu(), attended_LJ=self._attended_LJ.cpu(), units_LF=self._units_LF.cpu())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which calls of the encoder count."""
        stack = self._encoder.encoder
        hooks = [stack.final_layer_norm.register_forward_pre_hook(self._on_stream)]
        for number, block in enumerate(stack.block):
            attention, feed_forward = block.layer[0], block.layer[-1]
            hooks += [
                attention.layer_norm.register_forward_pre_hook(self._on_stream),
                feed_forward.layer_norm.register_forward_pre_hook(self._on_stream),
                attention.SelfAttention.o.register_forward_pre_hook(_adder(self._attended_LJ[number])),
                feed_forward.DenseReluDense.wo.register_forward_pre_hook(_adder(self._units_LF[number])),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_stream(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x_ND = inputs[0].float().flatten(0, 1)
        normed_ND = x_ND * x_ND.square().mean(-1, keepdim=True).rsqrt()
        self._moment_DD += normed_ND.T @ normed_ND


def _adder(sum_J: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        sum_J.add_(inputs[0].double().flatten(0, 1).square().sum(0))

    return add


def _chunk_name(chunk: range) -> str:
    return f"embeddings-{chunk.start:06d}"


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width, layers = config["d_model"], config["num_layers"]
    return {
        "moment_DD": (width, width),
        "attended_LJ": (layers, config["num_heads"] * config["d_kv"]),
        "units_LF": (layers, config["d_ff"]),
    }
