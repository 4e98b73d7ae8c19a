"""FLUX's modulation vectors as a table that replaces their weights: 3.25 of FLUX.1-dev's 11.9 billion parameters.

The vectors only depend on timestep, guidance and the pooled vector. If pooled is zero, a cache has one vector for each
pair of a timestep and a guidance value. Shape letters in this module: R rows of the table, M modulation values.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from secondcast.models.families.anatomy import Anatomy
from secondcast.models.families.registry import anatomy_of, family_of_transformer
from secondcast.models.memory.conditions import Condition, Conditions
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import SettingsError

# A table that is larger than the weights it replaces saves nothing; below this size that does not matter.
_SMALL_BYTES = 64 * 2**20

_Asked = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]
"""A lookup: whether all rows are found, found_B, timestep_B, guidance_B, pooled_projections_BP."""


def check_modulation(options: MemoryOptions, anatomy: Anatomy) -> None:
    """Raise SettingsError if the modulation weights are to be replaced and there are none."""
    if options.modulation in ("precomputed", "cpu") and not anatomy.modulation:
        raise SettingsError(
            f"--modulation is {options.modulation}, expected auto: this transformer has no modulation weights, whose "
            f"place it states; remove it"
        )


def modulation_parameters(model: torch.nn.Module, anatomy: Anatomy) -> int:
    """Number of parameters of a transformer, or of one of its blocks, that a table replaces.

    Does not count the small embeddings of timestep, guidance and pooled.
    """
    return sum(parameter_count(norm.linear) for norm in modulated_norms(model, anatomy))


def modulation_width(model: torch.nn.Module, anatomy: Anatomy) -> int:
    """M: values of a row of the table, for a transformer or for one of its blocks."""
    return sum(norm.linear.out_features for norm in modulated_norms(model, anatomy))


def worthwhile(transformer: Any, conditions: Conditions) -> bool:
    """Whether a table of these conditions is smaller than the weights it replaces, or negligible."""
    anatomy = anatomy_of(transformer)
    values = len(conditions.pairs) * modulation_width(transformer, anatomy)
    small = values * transformer.dtype.itemsize <= _SMALL_BYTES
    return small or values <= modulation_parameters(transformer, anatomy)


class ModulationTable:
    """Maps timestep and guidance to rows of the table; the rows themselves are in the transformer.

    timestep_R, guidance_R: rounded to the transformer's dtype; guidance_R is None if it takes none.
    """

    def __init__(self, timestep_R: torch.Tensor, guidance_R: torch.Tensor | None) -> None:
        self._timestep_R, self._guidance_R = timestep_R, guidance_R
        self._unchecked: list[_Asked] | None = None

    def __len__(self) -> int:
        return len(self._timestep_R)

    def select(
        self, timestep_B: torch.Tensor, guidance_B: torch.Tensor | None, pooled_projections_BP: torch.Tensor
    ) -> torch.Tensor:
        """selection_BR, 1 at the table's row for each row of the batch; passed to the transformer in place of pooled.

        SettingsError for a row that is not in the table, here or at the end of `checked_at_the_end`.
        """
        dtype = self._timestep_R.dtype
        match_BR = timestep_B.to(dtype)[:, None] == self._timestep_R
        if self._guidance_R is not None:
            assert guidance_B is not None
            match_BR &= guidance_B.to(dtype)[:, None] == self._guidance_R
        found_B = match_BR.any(1) & ~pooled_projections_BP.any(1)
        asked = (found_B.all(), found_B, timestep_B, guidance_B, pooled_projections_BP)
        if self._unchecked is None:
            self._check(asked)
        else:
            self._unchecked.append(asked)
        return match_BR.to(dtype)

    @contextmanager
    def checked_at_the_end(self) -> Iterator[None]:
        """A context in which `select` does not wait for the device; rows missing in the table are errors at its end.

        Results computed with such a row are invalid. End the context where the device is synchronized anyway.
        """
        unchecked: list[_Asked] = []
        self._unchecked = unchecked
        try:
            yield
        finally:
            self._unchecked = None
        for asked in unchecked:
            self._check(asked)

    def _check(self, asked: _Asked) -> None:
        # Synchronizes with the device: an unknown row would otherwise silently select another one.
        all_found, found_B, timestep_B, guidance_B, pooled_projections_BP = asked
        if not bool(all_found):
            self._refuse(int(found_B.int().argmin()), timestep_B, guidance_B, pooled_projections_BP)

    def _refuse(
        self,
        row: int,
        timestep_B: torch.Tensor,
        guidance_B: torch.Tensor | None,
        pooled_projections_BP: torch.Tensor,
    ) -> None:
        if pooled_projections_BP[row].any():
            raise SettingsError(
                f"row {row} of a batch has a pooled vector, but the modulation table is for zeros: give --modulation "
                "gpu"
            )
        found, expected = f"timestep {float(timestep_B[row]):.6g}", f"timesteps {_listed(self._timestep_R)}"
        if self._guidance_R is not None and guidance_B is not None:
            found += f" and guidance {float(guidance_B[row]):.6g}"
            expected += f" with guidance {_listed(self._guidance_R)}"
        raise SettingsError(
            f"row {row} of a batch has {found}, but the modulation table has {expected} and the weights it replaces "
            f"are not loaded: give --modulation gpu"
        )


@torch.no_grad()
def make_table(transformer: Any, conditions: Conditions, device: torch.device) -> ModulationTable:
    """Replace the modulation weights of a transformer by their table.

    The table is computed and stays on `device`, where there is at most one linear at a time. Everything else stays
    where it is. The transformer then takes selection_BR in place of pooled_projections_BP.
    """
    family = family_of_transformer(transformer)
    dtype, takes_guidance = transformer.dtype, family.takes_guidance(transformer.config)
    pairs = _rounded(conditions.pairs, dtype, takes_guidance=takes_guidance)
    timestep_R = torch.tensor([timestep for timestep, _ in pairs], dtype=dtype, device=device)
    guidance_R = torch.tensor([value for _, value in pairs], dtype=dtype, device=device) if takes_guidance else None
    calls = [rows_B.to(device) for rows_B in torch.arange(len(pairs)).split(conditions.batch_rows)]
    calls[-1] = _filled_up(calls[-1], conditions.batch_rows)
    embed = transformer.get_submodule(family.anatomy.conditioning).to(device)
    pooled_BP = torch.zeros(conditions.batch_rows, family.pooled_width(transformer.config), dtype=dtype, device=device)
    embedded_BD = [
        family.embedded_conditions(
            embed, timestep_R[rows_B], guidance_R[rows_B] if guidance_R is not None else None, pooled_BP
        )
        for rows_B in calls
    ]
    for norm in modulated_norms(transformer, family.anatomy):
        norm.linear.to(device)
        table_RM = torch.empty(len(pairs), norm.linear.out_features, dtype=dtype, device=device)
        for rows_B, one_BD in zip(calls, embedded_BD, strict=True):
            # Padding rows of the last call are recomputed with the same bits.
            table_RM[rows_B] = norm.linear(norm.silu(one_BD))
        norm.silu, norm.linear = torch.nn.Identity(), _Table(table_RM)
    transformer.set_submodule(family.anatomy.conditioning, PassThrough())
    return ModulationTable(timestep_R, guidance_R)


def modulated_norms(model: torch.nn.Module, anatomy: Anatomy) -> Iterator[Any]:
    """The norms with modulation of a transformer, or of one of its blocks, in the order of the modules.

    Keeps no reference to their linears.
    """
    for name in [name for name, _ in model.named_modules() if name.endswith(anatomy.modulation)]:
        yield model.get_submodule(name.rpartition(".")[0])


class PassThrough(torch.nn.Module):
    """Replaces the embedding of the conditions: passes the tensor given in place of pooled to the blocks as `temb`.

    It is an input of each block, so a recomputed block reads the same rows.
    """

    def forward(self, *conditions: torch.Tensor) -> torch.Tensor:
        """The last condition."""
        return conditions[-1]


class _Table(torch.nn.Module):
    """Replaces a linear of a norm by its results."""

    table_RM: torch.Tensor

    def __init__(self, table_RM: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table_RM", table_RM, persistent=False)

    def forward(self, selection_BR: torch.Tensor) -> torch.Tensor:
        return self.table_RM.index_select(0, selection_BR.argmax(1))


def _rounded(pairs: Iterable[Condition], dtype: torch.dtype, *, takes_guidance: bool) -> list[tuple[float, float]]:
    """The distinct pairs in the transformer's dtype, the noisiest first; guidance 0 if it takes none."""
    values = torch.tensor([(t, g if takes_guidance and g is not None else 0.0) for t, g in pairs])
    return sorted({(t, g) for t, g in values.to(dtype).tolist()}, key=lambda pair: (-pair[0], pair[1]))


def _filled_up(rows_B: torch.Tensor, batch_rows: int) -> torch.Tensor:
    return rows_B.repeat(-(-batch_rows // len(rows_B)))[:batch_rows]


def _listed(values_R: torch.Tensor) -> str:
    values = sorted(set(values_R.tolist()))
    shown = [f"{value:.6g}" for value in values]
    return ", ".join(shown) if len(shown) <= 8 else f"{', '.join(shown[:3])} .. {shown[-1]}"
