"""T2I-CompBench's attribute binding: a visual question per object of a prompt, with their probabilities multiplied."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from secondcast.evaluation.image_metrics.clip_score import clip_pixels
from secondcast.evaluation.image_metrics.metric import (
    MetricName,
    Needs,
    Picture,
    Scored,
    batches,
    mean_of,
    with_prompts,
)
from secondcast.evaluation.image_metrics.phrases import noun_phrases
from secondcast.evaluation.image_metrics.weights import WantedWeights
from secondcast.storage_schemas.errors import MissingWeightsError, PromptsError
from secondcast.storage_schemas.progress import Progress, counted

# Truncation as in T2I-CompBench.
_MOST_TOKENS = 35


class AttributeBinding:
    """Disentangled BLIP-VQA (Huang et al. 2023, arXiv 2307.06350): a product over the phrases of a prompt.

    A factor is P(yes) / (P(yes) + P(no)) for the first word of BLIP's answer to a question such as "a red book?".
    """

    name: MetricName = "vqa"

    def __init__(self, model: str, *, batch_size: int, device: torch.device) -> None:
        self._wanted = WantedWeights(model, flag="--vqa-model", model_type="blip")
        self._batch_size, self._device = batch_size, device
        self.needs = Needs(packages=("transformers",), weights=model, how=self._wanted.how)

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric."""
        _asked(pictures)

    def available(self) -> str | None:
        """See Metric."""
        return self._wanted.absent()

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric. Phrases are an image's `phrases`, else noun_phrases of its prompt."""
        asked = _asked(pictures)
        if len(asked) < len(pictures):
            progress.say(f"vqa: skipped {counted(len(pictures) - len(asked), 'image')}, whose prompts have no phrases")
        values: dict[str, float] = {}
        with progress.bar(self.name, total=len(asked), done=0, unit="images") as bar:
            for batch in batches(asked, self._batch_size):
                found = self._answers([picture for picture, _ in batch], [texts for _, texts in batch])
                for (picture, _), answers in zip(batch, found, strict=True):
                    values[picture.name] = math.prod(answers)
                bar.advance(len(batch))
        scored = mean_of(self.name, values, model=self._wanted.source, revision=self.revision)
        return [replace(scored, phrases=_found_by([picture for picture, _ in asked]))]

    @property
    def revision(self) -> str:
        """Of the weights."""
        return self._wanted.found.revision

    @torch.inference_mode()
    def _answers(self, pictures: Sequence[Picture], phrases: Sequence[Sequence[str]]) -> list[list[float]]:
        network, _, processor = self._parts
        images = [picture.pixels() for picture in pictures]
        seen_BSD = network.vision_model(pixel_values=clip_pixels(processor, images, self._device))[0]
        pairs = [(row, phrase) for row, texts in enumerate(phrases) for phrase in texts]
        answers: list[list[float]] = [[] for _ in pictures]
        for part in batches(pairs, self._batch_size):
            rows = torch.tensor([row for row, _ in part], device=self._device)
            yes_N = self._yes(seen_BSD[rows], [f"{phrase.lower()}?" for _, phrase in part])
            for (row, _), yes in zip(part, yes_N.tolist(), strict=True):
                answers[row].append(yes)
        return answers

    def _yes(self, seen_NSD: torch.Tensor, questions: Sequence[str]) -> torch.Tensor:
        # The parts of BlipForQuestionAnswering.forward, which always creates a mask on the CPU.
        network, tokenizer, _ = self._parts
        tokens = tokenizer(
            list(questions), padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        ).to(self._device)
        text = network.config.text_config
        if text.bos_token_id + 1 < text.vocab_size:
            # BLIP was trained with [ENC] in place of [CLS], which the published tokenizer does not have.
            tokens.input_ids[:, 0] = text.bos_token_id + 1
        question_NTD = network.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen_NSD,
            encoder_attention_mask=torch.ones(seen_NSD.shape[:2], dtype=torch.long, device=self._device),
        )[0]
        # The cross-attention of transformers 5.23 ignores its mask: the decoder reads questions without padding.
        length_N = tokens.attention_mask.sum(dim=1)
        yes, no = self._yes_and_no
        yes_N = torch.empty(len(questions), device=self._device)
        for length in length_N.unique().tolist():
            rows = length_N == length
            states_MTD = question_NTD[rows, :length]
            start_M1 = torch.full((len(states_MTD), 1), text.bos_token_id, device=self._device)
            logits_MV = network.text_decoder(input_ids=start_M1, encoder_hidden_states=states_MTD).logits[:, 0]
            # The softmax over two logits is the logistic function of their difference.
            yes_N[rows] = torch.sigmoid(logits_MV[:, yes] - logits_MV[:, no])
        return yes_N

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        from transformers import BlipForQuestionAnswering

        weights = self._wanted.found
        network = weights.network(BlipForQuestionAnswering, device=self._device)
        return network, weights.tokenizer(), weights.image_processor()

    @cached_property
    def _yes_and_no(self) -> tuple[int, int]:
        tokenizer = self._parts[1]
        yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        if tokenizer.unk_token_id in (yes, no):
            raise MissingWeightsError(
                f"the tokenizer of {self._wanted.source} does not have 'yes' and 'no' as tokens: give another "
                f"--vqa-model"
            )
        return yes, no


def _found_by(pictures: Sequence[Picture]) -> str:
    """What found the phrases of the images, with numbers if it was not the same for all."""
    by = Counter("word rules" if p.phrases is None else p.phrases_by or "the prompt file" for p in pictures)
    if len(by) == 1:
        return next(iter(by))
    return "; ".join(f"{name} ({counted(count, 'image')})" for name, count in by.items())


def _asked(pictures: Sequence[Picture]) -> list[tuple[Picture, tuple[str, ...]]]:
    prompts = with_prompts("vqa", pictures)
    phrases = [p.phrases if p.phrases is not None else noun_phrases(prompt) for p, prompt in prompts]
    asked = [(picture, texts) for (picture, _), texts in zip(prompts, phrases, strict=True) if texts]
    if not asked:
        folder = pictures[0].file.parent
        raise PromptsError(f"vqa: no prompt of {folder} names an object: give --prompts JSONL with `phrases`")
    return asked
