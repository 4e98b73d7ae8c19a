"""Differences of a checkpoint from what a class reads: tensor names, likely cause and fix, in one line."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from secondcast.models.weights.files import READ_DTYPES, CheckpointSource, StoredTensor
from secondcast.storage_schemas.errors import SecondcastError

Shape = tuple[int, ...]

# Name suffixes of quantized layouts: bitsandbytes, GPTQ, AWQ, compressed-tensors, torchao, ComfyUI's scaled fp8.
_QUANTIZED = re.compile(
    r"(\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|qweight|qzeros|scales|g_idx|weight_packed|weight_scale"
    r"|weight_zero_point|scale_weight|scale_input|input_scale|comfy_quant)|\.quant_state\.\S+|:qdata|:scale|scaled_fp8)$"
)
_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_ONE_MODEL = "give weights and a config.json of the same model"


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Differences of a checkpoint from what a class reads.

    kind: name of the class.
    expected, found: shapes by name; `found` under the names of the file.
    missing, unexpected: names.
    reshaped: shape in the file and expected shape, by name.
    unread: unsupported dtypes of tensors, by name.
    """

    kind: str
    expected: Mapping[str, Shape]
    found: Mapping[str, Shape]
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    reshaped: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped or self.unread)

    def error(self, source: CheckpointSource, *, fix: str | None = None) -> SecondcastError:
        """The error for a checkpoint that differs; default fix: that of the likely cause."""
        cause, likely_fix = self._cause()
        return source.refused(f"{'; '.join(self._differences())}: {cause}", fix or likely_fix)

    def _differences(self) -> list[str]:
        parts = []
        if self.missing:
            parts.append(
                f"{len(self.missing)} of the {len(self.expected)} tensors of {self.kind} "
                f"{_are(len(self.missing))} missing ({_named(self.missing)})"
            )
        if self.unexpected:
            parts.append(f"{_tensors(len(self.unexpected))} unexpected ({_named(self.unexpected)})")
        if self.reshaped:
            name = min(self.reshaped)
            was, wanted = self.reshaped[name]
            parts.append(
                f"{_tensors(len(self.reshaped))} of another shape ({_named(sorted(self.reshaped))}: {list(was)}, "
                f"{self.kind} expects {list(wanted)})"
            )
        if self.unread:
            name = min(self.unread)
            parts.append(
                f"{_tensors(len(self.unread))} stored as {self.unread[name]} ({_named(sorted(self.unread))}), expected "
                f"{', '.join(READ_DTYPES)}"
            )
        return parts

    def _cause(self) -> tuple[str, str | None]:
        """The likely cause, and a fix other than the source's own."""
        quantized = [name for name in self.found if _QUANTIZED.search(name)]
        if self.unread or quantized:
            return "a quantized or packed layout is not supported", "give the unquantized checkpoint"
        if self.missing and (prefix := self._prefix()):
            return prefix
        if blocks := self._blocks():
            return blocks
        if len(self.missing) == 1 == len(self.unexpected):
            return f"{self.unexpected[0]} may be {self.missing[0]} under another name", None
        if self.reshaped:
            return (
                "config.json is of a model of another size, or the file is damaged",
                f"{_ONE_MODEL}, or download both again",
            )
        if self.missing and not self.unexpected:
            return "the file is incomplete", None
        if self.unexpected and not self.missing:
            return f"the file has more tensors than {self.kind} reads, so it is of another model", _ONE_MODEL
        return "the file is of another model, or written by another program", _ONE_MODEL

    def _prefix(self) -> tuple[str, str] | None:
        """Cause and fix if the names differ by a common prefix."""
        extra = self.found.keys() - self.expected.keys()
        for wanted in self.missing:
            longer = next((name for name in self.found if name in extra and name.endswith(f".{wanted}")), None)
            if longer is not None:
                prefix = longer.removesuffix(wanted)
                if self._most(f"{prefix}{name}" in extra for name in self.missing):
                    return (
                        f"the names in the file start with {prefix!r}: another program wrote it, or it contains more",
                        f"save the weights without {prefix!r}",
                    )
            shorter = next((name for name in self.found if name in extra and wanted.endswith(f".{name}")), None)
            if shorter is not None:
                prefix = wanted.removesuffix(shorter)
                if self._most(name.removeprefix(prefix) in extra for name in self.missing):
                    return (
                        f"the names in the file lack the prefix {prefix!r}",
                        f"save the weights with {prefix!r}",
                    )
        return None

    def _most(self, explained: Iterable[bool]) -> bool:
        # Not all: the file has only one of the two names of a tied tensor.
        return sum(explained) * 2 > len(self.missing)

    def _blocks(self) -> tuple[str, str | None] | None:
        """Cause and fix if a list of blocks has another length, or lacks whole blocks."""
        expected, found = _numbers(self.expected), _numbers(self.found)
        lists = dict.fromkeys((*expected, *_numbers(self.unexpected)))
        for blocks in sorted(lists, key=lambda name: name.count(".")):
            wanted, there = _of_list(expected, blocks), _of_list(found, blocks)
            if not there or there == wanted:
                continue
            if there == set(range(len(there))):
                return (
                    f"config.json has {_blocks_of(len(wanted))} in {blocks}, the file has {len(there)}",
                    _ONE_MODEL,
                )
            if lost := sorted(wanted - there):
                return f"of the {_blocks_of(len(wanted))} in {blocks} the file lacks number {lost[0]}", None
        return None


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """Indices of the blocks in lists, by the names of the lists."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        for match in _NUMBER.finditer(name):
            numbers.setdefault(name[: match.start()], set()).add(int(match[1]))
    return numbers


def _of_list(numbers: Mapping[str, set[int]], blocks: str) -> set[int]:
    """The indices in a list, which may have a prefix in the file that the class does not have."""
    same = (name for name in numbers if name.endswith(f".{blocks}") or blocks.endswith(f".{name}"))
    return numbers.get(blocks) or numbers.get(next(same, ""), set())


def compared(
    kind: str, expected: Mapping[str, Shape], tensors: Mapping[str, StoredTensor], *, absent: Sequence[str] = ()
) -> Mismatch:
    """The mismatch between tensors and the expected floating-point shapes, by name.

    absent: patterns of names that may be missing.
    """
    found = {name: tensor.shape for name, tensor in tensors.items()}
    both = expected.keys() & found.keys()
    return Mismatch(
        kind=kind,
        expected=expected,
        found=found,
        missing=[name for name in expected if name not in found and not matches(name, absent)],
        unexpected=[name for name in found if name not in expected],
        reshaped={name: (found[name], expected[name]) for name in both if found[name] != expected[name]},
        unread={name: tensors[name].dtype for name in both if tensors[name].dtype not in READ_DTYPES},
    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def _named(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _blocks_of(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
