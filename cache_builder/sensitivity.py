"""Measure what the transformer reads in text embeddings: products on chosen trajectories, part by part, then the sums.

With r standard normal and J_k the derivative of the prediction at step k by the embedding, the mean over r of s s^T,
s = sum over k of J_k^T r_k / sqrt(K S C), is the matrix H of the vision loss's second order: loss = d^T H d.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch

from cache_builder.provenance import provenance
from cache_builder.sensitivity_plan import SensitivitySettings, first_trajectories
from cache_builder.weight_predictor import fit_predictor
from cache_builder.workers import Worker
from models.attention import check_attention
from models.backbone import FluxBackbone
from models.memory_options import MemoryOptions
from models.noise import draw_product
from models.quantized import check_quantizer
from models.recorded_backbone import load_recorded_backbone
from models.schedule import DTYPES
from models.teacher_folder import TeacherFolder
from models.text_products import text_products
from storage_schemas import sensitivity
from storage_schemas.digests import canonical_json
from storage_schemas.errors import BadSettings, NonFinite
from storage_schemas.fields import Array
from storage_schemas.manifest import Manifest
from storage_schemas.progress import Bar, Progress
from storage_schemas.reader import Cache
from storage_schemas.sensitivity import Part, Plan, Sensitivity, SensitivityRecord
from storage_schemas.tensors import to_torch
from storage_schemas.trajectory import Trajectory


def measure(
    cache: Cache,
    teacher: TeacherFolder,
    settings: SensitivitySettings,
    *,
    device: torch.device,
    progress: Progress,
    worker: Worker,
    anew: bool = False,
) -> Sensitivity | None:
    """Measure what is missing, and put all parts together; None where other workers are not through yet.

    SettingsDiffer where it was begun with other flags, NonFinite for a product that is no number.
    """
    if anew and worker.count > 1:
        raise BadSettings(
            f"--anew is given to {worker}: it would delete what the others measure meanwhile; give it once without "
            f"--worker, interrupt that, and start the workers without --anew"
        )
    plan = settings.plan(cache)
    if anew:
        # Not before what is asked for is known to be possible: what is deleted took hours.
        _check(cache.manifest, teacher, settings, device)
        sensitivity.forget(cache.folder)
    if (found := sensitivity.read(cache.folder)) is not None:
        was = found.record.plan
        # There are no parts any more: how many prompts one had is no matter.
        plan = _as_begun(cache, was, plan.model_copy(update={"part_size": was.part_size}))
        sensitivity.check_same_plan(cache.folder, was, plan)
        progress.say(f"all {len(plan.prompt_ids):,} prompts were measured before: nothing is left to do")
        # What one left that was killed behind the record.
        sensitivity.forget_parts(cache.folder)
        return found
    plan = _as_begun(cache, sensitivity.read_plan(cache.folder), plan)
    sensitivity.begin(cache.folder, plan)
    _make_parts(cache, teacher, settings, plan, worker, device, progress)
    return _finish(cache, plan, progress)


def _as_begun(cache: Cache, was: Plan | None, plan: Plan) -> Plan:
    """The plan of the first time where it differs only because the cache has grown: its prompts are still there."""
    if was is None or was == plan or was.model_copy(update={"prompt_ids": plan.prompt_ids}) != plan:
        return plan
    as_many = len(was.prompt_ids) == len(plan.prompt_ids)
    return was if as_many and first_trajectories(cache).keys() >= set(was.prompt_ids) else plan


def _make_parts(
    cache: Cache,
    teacher: TeacherFolder,
    settings: SensitivitySettings,
    plan: Plan,
    worker: Worker,
    device: torch.device,
    progress: Progress,
) -> None:
    own = [number for number in range(len(plan.parts)) if number % worker.count == worker.number]
    todo = [number for number in own if sensitivity.read_part(cache.folder, plan, number) is None]
    if not todo:
        return
    total = sum(len(plan.parts[number]) for number in own)
    left = sum(len(plan.parts[number]) for number in todo)
    firsts = first_trajectories(cache)
    backbone = _backbone(cache.manifest, teacher, settings, device)
    made = provenance(
        device=device, batch_size=settings.batch_size, attention=settings.attention_backend, quantize=settings.quantize
    )
    with progress.bar("products", total=total, done=total - left, unit="prompts") as bar:
        for number in todo:
            began = time.monotonic()
            work = _Measurement(
                cache=cache, backbone=backbone, plan=plan, batch_size=settings.batch_size, firsts=firsts
            )
            outer_DD, squares_NT = work.of_prompts(plan.parts[number], bar)
            seconds = time.monotonic() - began
            part = Part(outer_DD=outer_DD, squares_NT=squares_NT, made=made, seconds=seconds)
            sensitivity.write_part(cache.folder, plan, number, part)


def _dtype(manifest: Manifest, settings: SensitivitySettings) -> torch.dtype:
    return DTYPES[manifest.sampling.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype]


def _check(manifest: Manifest, teacher: TeacherFolder, settings: SensitivitySettings, device: torch.device) -> None:
    check_quantizer(settings.quantize)
    dtype = _dtype(manifest, settings)
    check_attention(settings.attention_backend, teacher.config("transformer"), dtype=dtype, device=device)


def _backbone(
    manifest: Manifest, teacher: TeacherFolder, settings: SensitivitySettings, device: torch.device
) -> FluxBackbone:
    _check(manifest, teacher, settings, device)
    options = MemoryOptions(**{name: getattr(settings, name) for name in MemoryOptions.model_fields})
    return load_recorded_backbone(
        [manifest],
        teacher,
        dtype=_dtype(manifest, settings),
        batch_rows=settings.batch_size,
        options=options,
        attention_backend=settings.attention_backend,
        device=device,
    )


@dataclass(frozen=True)
class _Measurement:
    cache: Cache
    backbone: FluxBackbone
    plan: Plan
    batch_size: int
    firsts: Mapping[str, int]

    def of_prompts(self, ids: Sequence[str], bar: Bar) -> tuple[Array, Array]:
        """outer_DD and squares_NT of a part."""
        trajectories = [self.cache.trajectory(self.firsts[identity]) for identity in ids]
        products_NPTD = self._products(trajectories, bar)
        wrong_N = ~products_NPTD.isfinite().flatten(1).all(1)
        if wrong_N.any():
            wrong = trajectories[int(wrong_N.nonzero()[0])]
            raise NonFinite(
                f"a product of trajectory {wrong.key} is not finite: the backward pass overflowed, or what was "
                f"recorded is not finite; try --backbone-dtype float32, and look with `understudy inspect show`"
            )
        width = products_NPTD.shape[-1]
        outer_DD = torch.zeros(width, width, dtype=torch.float64, device=products_NPTD.device)
        for products_PTD in products_NPTD:
            rows_RD = products_PTD.flatten(0, 1).double()
            outer_DD += rows_RD.T @ rows_RD
        squares_NT = products_NPTD.double().square().mean((1, 3))
        return outer_DD.cpu().numpy(), squares_NT.cpu().numpy()

    def _products(self, trajectories: Sequence[Trajectory], bar: Bar) -> torch.Tensor:
        """The s of each prompt and product, [N, P, T, D] fp32 on the device."""
        teacher, sampling = self.cache.manifest.teacher, self.cache.manifest.sampling
        shape = (len(trajectories), self.plan.products, teacher.text_length, teacher.text_width)
        sums_NPTD = torch.zeros(shape, device=self.backbone.device)
        rows = [(at, k) for at in range(len(trajectories)) for k in self.plan.steps]
        scale = (len(self.plan.steps) * sampling.image_tokens * sampling.channels) ** -0.5
        for first in range(0, len(rows), self.batch_size):
            batch = rows[first : first + self.batch_size]
            for product, found_BTD in enumerate(self._batch([(trajectories[at], k) for at, k in batch])):
                for (at, _), found_TD in zip(batch, found_BTD, strict=True):
                    sums_NPTD[at, product] += scale * found_TD.float()
            bar.advance(sum(k == self.plan.steps[-1] for _, k in batch))
        return sums_NPTD

    def _batch(self, rows: Sequence[tuple[Trajectory, int]]) -> list[torch.Tensor]:
        """J^T r of rows, [B, T, D], one for each product."""
        backbone, sampling = self.backbone, self.cache.manifest.sampling
        trajectories = [trajectory for trajectory, _ in rows]

        def stacked(arrays: Iterator[Array]) -> torch.Tensor:
            return to_torch(np.stack(list(arrays))).to(backbone.device, backbone.dtype)

        latents_BSC = stacked(trajectory.hidden_states_KSC[k] for trajectory, k in rows)
        pooled_BP = stacked(self.cache.pooled(trajectory.prompt) for trajectory in trajectories)
        timestep_B = torch.tensor([sampling.timesteps[k] for _, k in rows]).to(backbone.device, backbone.dtype)
        guidance_B = None
        if sampling.guidance is not None:
            values = [trajectory.guidance for trajectory in trajectories]
            guidance_B = torch.tensor(values, dtype=torch.float32, device=backbone.device)
        embedding_BTD = stacked(self.cache.embedding(trajectory.prompt) for trajectory in trajectories)
        normals = [stacked(self._normals(rows, product)) for product in range(self.plan.products)]
        return text_products(
            lambda text_BTD: backbone.predict(latents_BSC, text_BTD, pooled_BP, timestep_B, guidance_B),
            embedding_BTD,
            normals,
        )

    def _normals(self, rows: Sequence[tuple[Trajectory, int]], product: int) -> Iterator[Array]:
        sampling = self.cache.manifest.sampling
        for trajectory, k in rows:
            yield draw_product(
                seed=self.plan.seed,
                prompt_id=self.cache.prompts[trajectory.prompt].id,
                replica=trajectory.replica,
                step=k,
                product=product,
                image_tokens=sampling.image_tokens,
                channels=sampling.channels,
            )


def _finish(cache: Cache, plan: Plan, progress: Progress) -> Sensitivity | None:
    """The sums of all parts, in their order, so that it does not matter who made which."""
    width = cache.manifest.teacher.text_width
    outer_DD, squares, ways, seconds = np.zeros((width, width)), [], {}, 0.0
    for number in range(len(plan.parts)):
        part = sensitivity.read_part(cache.folder, plan, number)
        if part is None:
            if (found := sensitivity.read(cache.folder)) is not None:
                # Another worker was through first, and has put them together.
                return found
            sizes = [cache.folder.size(sensitivity.part_path(at)) for at in range(len(plan.parts))]
            progress.say(f"{sizes.count(None)} of {len(sizes)} parts are not there yet: other workers make them")
            return None
        outer_DD += part.outer_DD
        squares.append(part.squares_NT)
        ways[canonical_json(part.made)] = part.made
        seconds += part.seconds
    squares_NT = np.concatenate(squares)
    if not squares_NT.any():
        raise NonFinite(
            f"all {squares_NT.size * plan.products:,} products of tokens of {cache.folder} are 0: this transformer "
            f"does not read text embeddings, or they vanished in {plan.dtype}; try --backbone-dtype float32 --anew"
        )
    metric_DD = outer_DD / (squares_NT.size * plan.products)
    weights_NT = squares_NT / squares_NT.mean()
    predictor_D1, correlation = fit_predictor(cache, plan.prompt_ids, weights_NT)
    arrays = {"metric": metric_DD, "weights": weights_NT}
    if predictor_D1 is not None:
        arrays["predictor"] = predictor_D1
    effective_rank, spectrum = sensitivity.spectrum_of(metric_DD)
    record = SensitivityRecord(
        created_by=f"understudy {version('understudy')}",
        plan=plan,
        provenance=tuple(ways[key] for key in sorted(ways)),
        seconds=seconds,
        predicted_correlation=correlation,
        effective_rank=effective_rank,
        spectrum=spectrum,
        arrays_bytes=0,
        arrays_xxh3_128="",
    )
    sensitivity.write(cache.folder, record, arrays)
    return sensitivity.read(cache.folder)
