"""A student cut out of its teacher's encoder: some layers, heads and feed-forward units, at a smaller width.

An encoder without the weights of its RMSNorms reads x / rms(x) only. P [D, W] are the eigenvectors of that signal's
second moment with the largest eigenvalues; a matrix that writes into the stream becomes P^T A, one that reads from it
A P sqrt(D/W): the RMSNorm over W of P^T x is larger by that factor. Suffixes: D width of the teacher, W of the student,
H heads, J heads x their width, F feed-forward units, V vocabulary.
"""

import math

import torch

from secondcast.models.student.initial.encoder_weights import EncoderWeights
from secondcast.models.student.initial.search import Parts, Readout, best_by_swaps
from secondcast.models.student.initial.size import Size
from secondcast.models.student.initial.statistics import Sums
from secondcast.models.student.student_network import SecondcastStudent, StudentConfig
from secondcast.storage_schemas.progress import Progress

MOST_EVALUATIONS = 50
"""Of a choice of layers, and of one of heads."""


class Cutter:
    """Cuts students of one size; at the teacher's width nothing is projected (P is the identity)."""

    def __init__(
        self, weights: EncoderWeights, sums: Sums, size: Size, config: StudentConfig, *, device: torch.device
    ) -> None:
        self._weights, self._sums, self.size, self._config, self._device = weights, sums, size, config, device
        self._head_width = int(weights.config["d_kv"])
        self._full = size.width == weights.config["d_model"]
        self._scale = math.sqrt(weights.config["d_model"] / size.width)
        self._P_DW = None if self._full else _main_directions(sums.moment_DD, size.width).to(device)
        self._embedding_VW = self._written(weights.embedding_VD().T).T.contiguous()
        self._layers: dict[int, dict[str, torch.Tensor]] = {}

    def head_order(self) -> list[int]:
        """The heads by what they write into the stream, largest first; each layer counts the same."""
        share_H = torch.zeros(self._weights.config["num_heads"], dtype=torch.float64)
        for layer, attended_J in enumerate(self._sums.attended_LJ):
            o_DJ = self._weights.attention(layer)["o"]
            written_H = (attended_J * o_DJ.double().square().sum(0)).unflatten(0, (-1, self._head_width)).sum(1)
            share_H += written_H / written_H.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return share_H.argsort(descending=True, stable=True).tolist()

    def student(self, layers: Parts, heads: Parts) -> SecondcastStudent:
        """A student of these layers and heads whose output projection is zero, fp32, in eval mode."""
        tensors = {
            "encoder.shared.weight": self._embedding_VW,
            "encoder.encoder.embed_tokens.weight": self._embedding_VW,
            "encoder.encoder.final_layer_norm.weight": torch.ones(self.size.width, device=self._device),
        }
        width = self._head_width
        kept_J = torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads]).to(self._device)
        for number, layer in enumerate(layers):
            prefix, parts = f"encoder.encoder.block.{number}.layer", self._layer(layer)
            for name in ("q", "k", "v"):
                tensors[f"{prefix}.0.SelfAttention.{name}.weight"] = parts[name][kept_J]
            tensors[f"{prefix}.0.SelfAttention.o.weight"] = parts["o"][:, kept_J]
            for name in ("wi_0", "wi_1", "wo"):
                tensors[f"{prefix}.1.DenseReluDense.{name}.weight"] = parts[name]
            for part in (0, 1):
                tensors[f"{prefix}.{part}.layer_norm.weight"] = torch.ones(self.size.width, device=self._device)
        bias_NH = self._weights.bias_NH()[:, list(heads)].to(self._device)
        tensors["encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias_NH
        return _assembled(self._config, tensors, self._device)

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer at the student's width, with all heads and the student's number of feed-forward units."""
        if layer in self._layers:
            return self._layers[layer]
        attention, feed_forward = self._weights.attention(layer), self._weights.feed_forward(layer)
        parts = {name: self._read(attention[name]) for name in ("q", "k", "v")} | {"o": self._written(attention["o"])}
        importance_F = self._sums.units_LF[layer] * feed_forward["wo"].double().square().sum(0)
        units = importance_F.argsort(descending=True, stable=True)[: self.size.units].sort().values
        parts |= {name: self._read(feed_forward[name][units]) for name in ("wi_0", "wi_1")}
        parts["wo"] = self._written(feed_forward["wo"][:, units])
        if not self._full:
            # At full width a layer of T5-XXL has 0.8 GB, and is read again instead.
            self._layers[layer] = parts
        return parts

    def _read(self, matrix_XD: torch.Tensor) -> torch.Tensor:
        matrix_XD = matrix_XD.to(self._device)
        return matrix_XD if self._P_DW is None else self._scale * (matrix_XD @ self._P_DW)

    def _written(self, matrix_DX: torch.Tensor) -> torch.Tensor:
        matrix_DX = matrix_DX.to(self._device)
        return matrix_DX if self._P_DW is None else self._P_DW.T @ matrix_DX


def choose(cutter: Cutter, readout: Readout, teacher: Size, progress: Progress) -> tuple[Parts, Parts]:
    """Layers, then heads, of the lowest context error after swaps of single ones; the first layer always stays.

    It has the position bias. One set of heads serves all layers, which share that bias.
    """
    size, order = cutter.size, cutter.head_order()
    rank = {head: place for place, head in enumerate(order)}
    by_energy = tuple(sorted(order[: size.heads]))
    of_layers = min(MOST_EVALUATIONS, math.comb(teacher.layers - 1, size.layers - 1))
    of_heads = min(MOST_EVALUATIONS, math.comb(teacher.heads, size.heads))
    with progress.bar("layers and heads", total=of_layers + of_heads, done=0, unit="cuts") as bar:

        def error(layers: Parts, heads: Parts) -> float:
            found = readout.error(cutter.student(layers, heads).encoder)
            bar.advance(1)
            return found

        def layer_swaps(kept: Parts) -> list[tuple[int, int]]:
            pairs = [(old, new) for old in kept[1:] for new in range(1, teacher.layers) if new not in kept]
            return sorted(pairs, key=lambda pair: (abs(pair[0] - pair[1]), pair))

        def head_swaps(kept: Parts) -> list[tuple[int, int]]:
            pairs = [(old, new) for old in kept for new in range(teacher.heads) if new not in kept]
            return sorted(pairs, key=lambda pair: rank[pair[1]] - rank[pair[0]])

        layers = best_by_swaps(
            layer_starts(size.layers, teacher.layers),
            layer_swaps,
            lambda layers: error(layers, by_energy),
            evaluations=of_layers,
        )
        heads = best_by_swaps([by_energy], head_swaps, lambda heads: error(layers, heads), evaluations=of_heads)
    return layers, heads


def layer_starts(kept: int, layers: int) -> list[Parts]:
    """The first layers, the first but one and the last, and evenly spaced ones."""
    first = tuple(range(kept))
    if kept == 1 or kept == layers:
        return [first]
    spread = tuple(round(number * (layers - 1) / (kept - 1)) for number in range(kept))
    return [first, (*first[:-1], layers - 1), spread]


def _main_directions(moment_DD: torch.Tensor, count: int) -> torch.Tensor:
    """P_DW, fp32: eigenvectors of the largest eigenvalues."""
    return torch.linalg.eigh(moment_DD).eigenvectors[:, -count:].float()


def _assembled(config: StudentConfig, tensors: dict[str, torch.Tensor], device: torch.device) -> SecondcastStudent:
    with torch.device("meta"):
        student = SecondcastStudent(config)
    projection = {
        name: torch.zeros(matrix.shape, device=device)
        for name, matrix in student.final_projection.state_dict(prefix="final_projection.").items()
    }
    student.load_state_dict({**tensors, **projection}, assign=True)
    student.tie_weights()
    return student.eval()
