"""Token lengths of prompts for a teacher: which prompts it truncates, and which become identical."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from secondcast.models.teacher.folder import TeacherFolder

_LONGEST_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class PromptLengths:
    """Token counts of prompts, end token included.

    longest, longest_text: the longest prompt.
    cut: number of prompts longer than text_length.
    same: number of prompts whose truncated tokens equal those of another prompt.
    same_texts: two such prompts.
    """

    mean: float
    longest: int
    longest_text: str
    cut: int
    text_length: int
    same: int
    same_texts: tuple[str, ...]

    def cut_text(self) -> str:
        """A line about the truncated prompts."""
        shown = self.longest_text[:_LONGEST_SHOWN] + ("..." if len(self.longest_text) > _LONGEST_SHOWN else "")
        were = "prompt is" if self.cut == 1 else "prompts are"
        return (
            f"{self.cut} {were} longer than {self.text_length} tokens and truncated, the longest has {self.longest} "
            f"tokens: {shown!r}"
        )


def prompt_lengths(texts: Sequence[str], teacher: TeacherFolder, *, text_length: int | None = None) -> PromptLengths:
    """Token lengths of at least one text by the teacher's tokenizer. text_length: None for the teacher's own."""
    most = teacher.checked_text_length(text_length)
    tokenizer = teacher.family.tokenizer(teacher.part("large_tokenizer"))
    found = tokenizer.token_ids(texts)
    lengths = [len(ids) for ids in found]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    cut = [tokenizer.cut(ids, most) for ids in found]
    several = {ids: count for ids, count in Counter(cut).items() if count > 1}
    return PromptLengths(
        mean=sum(lengths) / len(lengths),
        longest=lengths[longest],
        longest_text=texts[longest],
        cut=sum(length > most for length in lengths),
        text_length=most,
        same=sum(several.values()),
        same_texts=tuple([text for text, ids in zip(texts, cut, strict=True) if ids == next(iter(several), None)][:2]),
    )
